"""Evaluation: clients count, the server divides.

Only sums travel, so the accuracy over all clients is that of their pooled examples, however unevenly these are spread.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
from annotated_types import Ge
from numpy.typing import NDArray
from torch import Tensor

from fedsim.client import Client
from fedsim.engines.engine import Engine
from fedsim.fairness import Notion, events, unfairness
from fedsim.model import Model
from fedsim.ranges import Count
from fedsim.ranking import MOSTPOP
from fedsim.task import Batch, Cohort, Metrics, Reduce, Reply, Task, Traffic
from fedsim.transport import class_scores, farthest, histogram, score_width
from fedsim.tree import Tree

NOTIONS: tuple[Notion, ...] = ("demographic parity", "equal opportunity", "equalised odds")


class Classifier(ABC):
    """How a method decides that does more than take the model's largest output."""

    @abstractmethod
    def __call__(self, shared: Tree, personal: Tree, batch: Batch) -> Tensor:
        """P(predicted | example), (B, K), out of what the server shared and what the client keeps."""


@dataclass(frozen=True, kw_only=True)
class Evaluate(Client):
    """Counts what is got right on a client's test examples.

    Its metrics are "examples" and sums over examples; divided by "examples" they are what their names say. With
    `num_groups` its confusion is counted for each group, and kept apart by client.

    Attributes:
        model: gives the loss and, if there is no classifier, the prediction: its largest output.
        num_classes: K; None: the target is no label, and only the loss is counted.
        num_groups: G, of the column "a"; None: groups are not told apart.
        classifier: what predicts the label "y" instead; a randomised one counts by its probabilities.
        score_bins: points of a grid on which the model's scores are counted, by group; None: they are not.
        part: which part of a client's examples.
    """

    model: Model
    num_classes: Count | None = None
    num_groups: Count | None = None
    classifier: Classifier | None = None
    score_bins: Annotated[int, Ge(2)] | None = None
    batch_size: Count = 256
    part: Literal["train", "validation", "test"] = "test"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.score_bins is not None and (self.num_classes is None or self.classifier is not None):
            raise ValueError("score_bins needs num_classes, and a model that decides itself, without a classifier")
        if self.classifier is None:
            return
        if not isinstance(self.classifier, Classifier):
            raise ValueError(f"classifier must be a Classifier, got a {type(self.classifier).__name__}")
        if self.num_classes is None:
            raise ValueError("classifier needs num_classes: how many labels there are to tell apart")

    @property
    def split(self) -> str:
        """Which part of a client's examples is evaluated."""
        return self.part

    @property
    def reduce(self) -> Reduce:
        """Whether confusions are summed over clients, or wanted one by one."""
        return "stack" if self.num_groups else "sum"

    def start(self, shared: Tree, personal: Tree, data: Batch) -> Tree:
        """All counts at zero."""
        state: Tree = {"shared": shared, "personal": personal, "loss": torch.zeros((), dtype=torch.float64)}
        if self.num_classes is not None:
            shape = (self.num_groups or 1, self.num_classes, self.num_classes)
            state["confusion"] = torch.zeros(shape, dtype=torch.int64 if self.classifier is None else torch.float64)
            if self.score_bins is not None:
                shape = (self.num_groups or 1, score_width(self.num_classes), self.score_bins)
                state["scores"] = torch.zeros(shape, dtype=torch.int64)
        return state

    def step(self, state: Tree, batch: Batch) -> Tree:
        """Counts one batch."""
        outputs = self.model.predict(state["shared"]["params"], batch)
        mask = batch["mask"]
        losses = torch.where(mask, self.model.criterion(outputs, batch[self.model.target]), 0.0)
        state = state | {"loss": state["loss"] + losses.sum(dtype=torch.float64)}
        if self.num_classes is None:
            return state
        if self.classifier is None:
            # float, because bfloat16 cannot count beyond 256
            guess = (outputs.argmax(-1)[:, None] == torch.arange(self.num_classes)).float()  # (B, K)
            label = batch[self.model.target]
        else:
            guess = self.classifier(state["shared"], state["personal"], batch).double()
            label = batch["y"]
        truth = (label[:, None] == torch.arange(self.num_classes)) & mask[:, None]  # (B, K)
        if self.num_groups:
            member = batch["a"][:, None] == torch.arange(self.num_groups)  # (B, G)
            truth = (member[:, :, None] & truth[:, None]).flatten(1)  # (B, G K)
        counts = (truth.to(guess.dtype).T @ guess).reshape(state["confusion"].shape)
        if self.score_bins is not None:
            state |= {"scores": state["scores"] + self._scores(outputs, batch, self.score_bins)}
        return state | {"confusion": state["confusion"] + counts.to(state["confusion"].dtype)}

    def _scores(self, outputs: Tensor, batch: Batch, bins: int) -> Tensor:
        """The histograms of scores, (G, S, bins), without those that are not finite."""
        if outputs.shape[-1] != self.num_classes:
            raise ValueError(
                f"the model has {outputs.shape[-1]} outputs; to count scores: num_classes = {self.num_classes}"
            )
        scores = class_scores(outputs)
        counted = batch["mask"] & scores.isfinite().all(1)
        groups = torch.where(counted, batch["a"] if self.num_groups else 0, -1)
        return histogram(scores.nan_to_num(0), groups, self.num_groups or 1, bins)

    def finish(self, shared: Tree, state: Tree, data: Batch) -> Reply:
        """The counts."""
        examples = data["mask"].sum()
        metrics = {"examples": examples, "loss": state["loss"]}
        if self.num_classes is None:
            return Reply({}, examples.to(torch.float64), metrics=metrics)
        confusion = state["confusion"]
        metrics["accuracy"] = confusion.diagonal(dim1=1, dim2=2).sum()
        update = {"confusion": confusion.sum(0)} if self.num_groups is None else {"groups": confusion}
        if "scores" in state:
            update["scores"] = state["scores"]
        return Reply(update, examples.to(torch.float64), metrics=metrics)


class Evaluation(NamedTuple):
    """What an evaluation found."""

    pooled: Metrics  # over the examples of all clients: examples, accuracy, loss, ...
    clients: dict[str, NDArray[np.float64]]  # the same by client, each (C,), with "client"
    confusion: Tensor | None  # (K, K), rows the truth, columns the prediction
    failed: dict[int, str]
    traffic: Traffic = Traffic()
    incidents: Sequence[str] = ()
    groups: Tensor | None = None  # (C, G, K, K), the confusion by client and group
    scores: Tensor | None = None  # (G, S, bins), histograms of the scores by group, over all clients


def evaluate(engine: Engine, shared: Tree, cohort: Cohort, round: int, reduce: Reduce = "sum") -> Evaluation:
    """What the experiment's evaluation client counts on this cohort; `reduce` as that client wants it."""
    replies = engine.execute(Task("evaluate", shared, cohort.ids, round, reduce=reduce), cohort)
    sums = {name: values.double().numpy() for name, values in replies.metrics.items()}
    examples = sums.pop("examples", np.zeros(len(replies.ids)))
    total = float(examples.sum())
    pooled = {"examples": total} | {name: float(values.sum()) / total for name, values in sums.items() if total}
    with np.errstate(divide="ignore", invalid="ignore"):
        clients = {name: values / examples for name, values in sums.items()}
    clients = {"client": np.array(replies.ids, dtype=np.float64), "examples": examples} | clients
    confusion, groups = replies.update.get("confusion"), replies.update.get("groups")
    if groups is not None:
        if reduce != "stack":
            raise ValueError(f"reduce must be 'stack' where groups are told apart, got {reduce!r}")
        confusion = groups.sum((0, 1))
        pooled |= {name: float(value) for name, value in disparities(groups.sum(0)).items() if total}
        apart = disparities(groups).items()
        clients |= {name: np.where(examples > 0, value.numpy(), np.nan) for name, value in apart}
    scores = replies.update.get("scores")
    if scores is not None:
        scores = scores.sum(0) if reduce == "stack" else scores
        pooled |= {"score_distance": farthest(scores)} if groups is not None and total else {}
    return Evaluation(
        pooled,
        clients,
        confusion,
        replies.failed,
        replies.traffic,
        replies.incidents,
        groups=groups,
        scores=scores,
    )


def disparities(groups: Tensor) -> dict[str, Tensor]:
    """How far groups are apart, by each notion, (...), out of confusions (..., G, K, K).

    A gap is the largest difference of a rate between two groups, a deviation the largest from the pooled rate.
    """
    found: dict[str, Tensor] = {}
    for notion in NOTIONS:
        gaps = unfairness(events(notion, groups.shape[-1]), groups.double())
        name = notion.replace(" ", "_")
        found |= {f"{name}_gap": gaps.gap.amax(-1), f"{name}_deviation": gaps.deviation.amax(-1)}
    return found


def spread(evaluation: Evaluation) -> Metrics:
    """How unevenly measures are spread over the clients that have examples: least, 10th percentile, deviation.

    Of how far groups are apart, the most at any client, as "local_<measure>".
    """
    some = evaluation.clients["examples"] > 0
    if not some.any():
        return {}
    apart = set(disparities(evaluation.groups)) if evaluation.groups is not None else set()
    metrics: Metrics = {f"local_{name}": float(evaluation.clients[name][some].max()) for name in sorted(apart)}
    for name in sorted(evaluation.pooled.keys() & evaluation.clients.keys() - apart - {"examples", "loss"}):
        if name.startswith(MOSTPOP):  # which is there to be compared with
            continue
        values = evaluation.clients[name][some]
        metrics |= {f"{name}/min": float(values.min()), f"{name}/p10": float(np.quantile(values, 0.1))}
        metrics[f"{name}/std"] = float(values.std())
    return metrics
