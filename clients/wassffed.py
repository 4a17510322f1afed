"""WassFFed's local side: histograms of scores by group, and training towards where these are to be carried.

Li, Zheng, Chen, Chen, Han, Zhang, "WassFFed: Wasserstein Fair Federated Learning", IEEE TKDE 2025,
https://arxiv.org/abs/2411.06881. A client that trains receives the maps T_a that carry the scores of group a to the
barycenter (`strategies.wassffed`), and before its first step looks up the target t_i = T_a(f(x_i)) of each example by
the model that it got. Its loss is, over a batch of B,

    alpha CE + (1 - alpha) / B sum_i max(|f(x_i) - t_i| - z, 0)^p,

with f the score, P(second class) of two, or else P(each class), over which the cost is summed.

Symbols: `power` is p, `dead_zone` is z; alpha comes from the server. Histograms are summed, so they may travel by any
protocol for secure sums; one of few examples tells much of these.

Differs from the paper: there z = 0. Here it is half of a bin: so much is rounding, at which |.| would pull with full
strength. `targets = "argsort"` is an error in the authors' code, which gives each example the target of another one: it
is here to be compared with.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Literal

import torch
from annotated_types import Ge
from torch import Tensor

from fedsim.client import Client
from fedsim.model import Model, gradient, mean
from fedsim.optim import Optimiser, adam
from fedsim.ranges import Count, Decay, NonNegative, Positive
from fedsim.task import Batch, Params, Reply
from fedsim.transport import class_scores, histogram, nearest
from fedsim.tree import Tree


@dataclass(frozen=True, kw_only=True)
class CountScores(Client):
    """Counts the scores of the model that it gets, by group. The weight is the number of examples.

    Attributes:
        model: its outputs are logits of the K classes.
        num_groups: G, of the column "a".
        bins: points of the grid; the strategy's.
    """

    model: Model
    num_groups: Count
    bins: Annotated[int, Ge(2)] = 101
    batch_size: Count = 2**30  # its one step does nothing

    def start(self, shared: Tree, personal: Tree, data: Batch) -> Tree:
        """The histograms, and the number of examples, which is NaN where a score is."""
        scores = class_scores(self.model.predict(shared["params"], data))
        groups = torch.where(data["mask"], data["a"], -1)
        sound = (scores.isfinite() | ~data["mask"][:, None]).all()
        size = torch.where(sound, data["mask"].sum().double(), torch.nan)
        return {"counts": histogram(scores, groups, self.num_groups, self.bins), "size": size}

    def step(self, state: Tree, batch: Batch) -> Tree:
        """All is done."""
        return state

    def finish(self, shared: Tree, state: Tree, data: Batch) -> Reply:
        """The histograms, and nothing else."""
        return Reply({"counts": state["counts"]}, state["size"])


@dataclass(frozen=True)
class TransportAdam(Client):
    """Trains for accuracy, and for scores that are where the server's maps carry them. The weight is its examples.

    Without maps it trains for accuracy alone.

    Attributes:
        model: its outputs are logits of the K classes.
        num_groups: G, of the column "a".
        lr: of Adam, which is new in every round.
        power: of the distance to the target.
        dead_zone: how far a score may be from its target at no cost; None: half of a bin.
        targets: which example has which target.
    """

    model: Model
    num_groups: Count
    lr: Positive
    beta1: Decay = 0.9
    beta2: Decay = 0.999
    weight_decay: NonNegative = 0.0
    power: Annotated[float, Ge(1)] = 1.0
    dead_zone: NonNegative | None = None
    targets: Literal["rank", "argsort"] = "rank"

    @cached_property
    def optimiser(self) -> Optimiser:
        """The rule of a step."""
        return adam(self.lr, self.beta1, self.beta2, weight_decay=self.weight_decay)

    def prepare(self, examples: Batch, rng: torch.Generator) -> Batch:
        """The examples, numbered: each has a target.

        Raises:
            ValueError: column "a" holds no groups from 0 to G - 1.
        """
        groups = examples["a"]
        if groups.is_floating_point() or (groups.numel() and int(groups.max()) >= self.num_groups):
            held = f"{groups.dtype} up to {groups.max().item() if groups.numel() else '-'}"
            raise ValueError(f"column a must hold groups as integers below num_groups = {self.num_groups}, got {held}")
        return examples | {"number": torch.arange(len(groups))}

    def start(self, shared: Tree, personal: Tree, data: Batch) -> Tree:
        """The server's model, the optimiser at rest, and where each score is to go."""
        params = shared["params"]
        state: Tree = {"params": params, "optimiser": self.optimiser.init(params)}
        zero = torch.zeros((), dtype=torch.float64)
        if "maps" not in shared:
            return state | {"loss": zero}
        target = self._targets(shared["maps"], class_scores(self.model.predict(params, data)), data)
        half = 0.5 / (shared["maps"].shape[-1] - 1)
        zone = torch.tensor(half if self.dead_zone is None else self.dead_zone, dtype=target.dtype)
        return state | {"loss": zero, "alpha": shared["alpha"], "target": target, "zone": zone}

    def _targets(self, maps: Tensor, scores: Tensor, data: Batch) -> Tensor:
        """Where each score is to go, (n, S)."""
        column = torch.arange(scores.shape[1])
        sent = maps[data["a"].clamp(min=0)[:, None], column, nearest(scores, maps.shape[-1])]
        sent = torch.where((data["a"] >= 0)[:, None], sent, scores)  # one of an unknown group stays where it is
        return sent if self.targets == "rank" else shuffled(sent, scores, data, self.num_groups)

    def step(self, state: Tree, batch: Batch) -> Tree:
        """One step of Adam on the batch's mean loss."""

        def loss(params: Params) -> Tensor:
            outputs = self.model.outputs(params, batch)
            accuracy = mean(self.model.criterion(outputs, batch[self.model.target]), batch["mask"])
            if "target" not in state:
                return accuracy
            off = (class_scores(outputs) - state["target"][batch["number"]]).abs()
            cost = (off - state["zone"]).clamp(min=0) ** self.power
            both: Tensor = state["alpha"] * accuracy + (1 - state["alpha"]) * mean(cost.sum(1), batch["mask"])
            return both

        value, slope = gradient(loss, state["params"])
        params, optimiser = self.optimiser.update(slope, state["optimiser"], state["params"])
        return state | {"params": params, "optimiser": optimiser, "loss": state["loss"] + value * batch["mask"].sum()}

    def finish(self, shared: Tree, state: Tree, data: Batch) -> Reply:
        """The trained model, and the mean loss met on the way."""
        examples = data["mask"].sum()
        loss = state["loss"] / (examples * self.epochs).clamp(min=1)
        return Reply({"params": state["params"]}, examples.to(loss.dtype), metrics={"loss": loss})


def shuffled(sent: Tensor, scores: Tensor, data: Batch, num_groups: int) -> Tensor:
    """The targets as the authors' code deals them out, (n, S): right as a whole for each group, wrong for each example.

    There among all examples of a group, here among those of it that the client has. With order = argsort(scores) of a
    group, its sorted targets belong at `order`; there they are taken from `order`.
    """
    found = sent
    for group in range(num_groups):
        member = ((data["a"] == group) & data["mask"])[:, None].expand_as(scores)
        place = member.cumsum(0) - 1  # of a member among its group
        order = torch.where(member, scores, torch.inf).argsort(0)
        taken = place.gather(0, order.gather(0, place.clamp(min=0)))
        found = torch.where(member, sent.gather(0, order.gather(0, taken.clamp(min=0))), found)
    return found
