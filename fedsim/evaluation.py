"""Evaluation: clients count, the server divides.

Only sums travel, so the accuracy over all clients is that of their pooled examples, however unevenly these are spread.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsim.client import Client
from fedsim.engines.engine import Engine
from fedsim.model import Model
from fedsim.ranges import Count
from fedsim.task import Batch, Cohort, Metrics, Reply, Task, Traffic
from fedsim.tree import Tree


@dataclass(frozen=True, kw_only=True)
class Evaluate(Client):
    """Counts what the model gets right on a client's test examples.

    Its metrics are "examples" and sums over examples; divided by "examples" they are what their names say.
    """

    model: Model
    num_classes: Count | None = None  # K; None: the target is no label, and only the loss is counted
    batch_size: Count = 256
    part: Literal["train", "validation", "test"] = "test"

    @property
    def split(self) -> str:
        """Which part of a client's examples is evaluated."""
        return self.part

    def start(self, shared: Tree, personal: Tree, data: Batch) -> Tree:
        """All counts at zero."""
        state: Tree = {"params": shared["params"], "loss": torch.zeros((), dtype=torch.float64)}
        if self.num_classes is not None:
            state["confusion"] = torch.zeros((self.num_classes, self.num_classes), dtype=torch.int64)
        return state

    def step(self, state: Tree, batch: Batch) -> Tree:
        """Counts one batch."""
        outputs = self.model.predict(state["params"], batch)
        target, mask = batch[self.model.target], batch["mask"]
        losses = torch.where(mask, self.model.criterion(outputs, target), 0.0)
        state = state | {"loss": state["loss"] + losses.sum(dtype=torch.float64)}
        if self.num_classes is not None:
            classes = torch.arange(self.num_classes)
            truth = ((target[:, None] == classes) & mask[:, None]).float()  # (B, K); bfloat16 cannot count beyond 256
            guess = (outputs.argmax(-1)[:, None] == classes).float()  # (B, K)
            state["confusion"] = state["confusion"] + (truth.T @ guess).to(torch.int64)
        return state

    def finish(self, shared: Tree, state: Tree, data: Batch) -> Reply:
        """The counts."""
        examples = data["mask"].sum()
        metrics = {"examples": examples, "loss": state["loss"]}
        if self.num_classes is None:
            return Reply({}, examples.to(torch.float64), metrics=metrics)
        metrics["accuracy"] = state["confusion"].diagonal().sum()
        return Reply({"confusion": state["confusion"]}, examples.to(torch.float64), metrics=metrics)


class Evaluation(NamedTuple):
    """What an evaluation found."""

    pooled: Metrics  # over the examples of all clients: examples, accuracy, loss, ...
    clients: dict[str, NDArray[np.float64]]  # the same by client, each (C,), with "client"
    confusion: Tensor | None  # (K, K), rows the truth, columns the prediction
    failed: dict[int, str]
    traffic: Traffic = Traffic()
    incidents: Sequence[str] = ()


def evaluate(engine: Engine, shared: Tree, cohort: Cohort, round: int) -> Evaluation:
    """What the experiment's evaluation client counts on this cohort."""
    replies = engine.execute(Task("evaluate", shared, cohort.ids, round, reduce="sum"), cohort)
    sums = {name: values.double().numpy() for name, values in replies.metrics.items()}
    examples = sums.pop("examples", np.zeros(len(replies.ids)))
    total = float(examples.sum())
    pooled = {"examples": total} | {name: float(values.sum()) / total for name, values in sums.items() if total}
    with np.errstate(divide="ignore", invalid="ignore"):
        clients = {name: values / examples for name, values in sums.items()}
    clients = {"client": np.array(replies.ids, dtype=np.float64), "examples": examples} | clients
    confusion = replies.update.get("confusion")
    return Evaluation(pooled, clients, confusion, replies.failed, replies.traffic, replies.incidents)


def spread(evaluation: Evaluation) -> Metrics:
    """How unevenly measures are spread over the clients that have examples: least, 10th percentile, deviation."""
    some = evaluation.clients["examples"] > 0
    metrics: Metrics = {}
    for name in evaluation.pooled.keys() - {"examples", "loss"}:
        values = evaluation.clients[name][some]
        metrics |= {f"{name}/min": float(values.min()), f"{name}/p10": float(np.quantile(values, 0.1))}
        metrics[f"{name}/std"] = float(values.std())
    return metrics
