"""A user's loss at the shared parameters and its gradient, for how sharp FedRecGEL's solutions are.

What `clients.fedrecgel:DualSam` descends with reduction "mean", without any climbing: the mean binary cross entropy of
the user's items and of `negatives` drawn for each, at the shared parameters that it is sent and its own embedding,
which stays as it is. An item that is there more than once is one row, whose loss counts as often. Asked twice in the
same round it draws the same; `fedsim.sharpness` asks in one round only.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from clients.fedrecgel import once
from clients.ncf import ITEM, table_size
from fedsim.client import Client
from fedsim.model import Model, gradient
from fedsim.ranges import Count, Natural
from fedsim.ranking import draw_negatives
from fedsim.task import Batch, Params, Reply
from fedsim.tree import Rows, Tree


@dataclass(frozen=True, kw_only=True)
class UserLoss(Client):
    """A user's mean loss; or its gradient, of the items' tables the rows that are touched. All users weigh the same.

    It reads the embedding "own" that `DualSam` keeps, and keeps nothing itself.

    Attributes:
        model: scores items, as `DualSam` has it.
        slope: whether the gradient is answered too.
        negatives: drawn for each item that the user has.
    """

    model: Model
    slope: bool = False
    negatives: Natural = 4
    batch_size: Count = 2**30  # its one step does nothing

    @cached_property
    def num_items(self) -> int:
        """I."""
        return table_size(self.model)

    def prepare(self, examples: Batch, rng: torch.Generator) -> Batch:
        """The items of its loss, each once: its own and negatives; and what the loss of each counts."""
        has = examples["item"]
        item = torch.cat([has[:, None], draw_negatives(has, self.negatives, self.num_items, rng)], 1)
        y = torch.zeros_like(item)  # (n, 1 + negatives)
        y[:, 0] = 1
        weight = torch.ones(y.numel(), dtype=torch.float64) / y.numel()
        return once({"item": item.flatten(), "y": y.flatten(), "weight": weight})

    def start(self, shared: Tree, personal: Tree, data: Batch) -> Tree:
        """The loss and its gradient, on all rows at once."""
        items, weight = data["item"], torch.where(data["mask"], data["weight"], 0.0)
        touched = {n: leaf[items] if n.startswith(ITEM) else leaf for n, leaf in shared["params"].items()}

        def loss(params: Params) -> Tensor:
            outputs = self.model.predict(params | personal["own"], {"item": torch.arange(len(items))})
            return (weight * self.model.criterion(outputs, data["y"])).sum()

        if not self.slope:
            return {"loss": loss(touched)}
        value, slope = gradient(loss, touched)
        return {"loss": value, "slope": slope}

    def step(self, state: Tree, batch: Batch) -> Tree:
        """All is done."""
        return state

    def finish(self, shared: Tree, state: Tree, data: Batch) -> Reply:
        """The mean loss, or the gradient; with weight zero where the user has no item."""
        there = data["mask"].any().double()
        if not self.slope:
            return Reply({}, there, metrics={"loss": state["loss"]})
        place = torch.where(data["mask"], data["item"], -1)
        slope = {
            name: Rows(place, leaf, self.num_items) if name.startswith(ITEM) else leaf
            for name, leaf in state["slope"].items()
        }
        return Reply({"params": slope}, there, metrics={"loss": state["loss"]})


def user_losses(model: Model, negatives: int = 4) -> dict[str, Client]:
    """The two clients that a `fedsim.sharpness.Surface` asks."""
    return {
        "loss": UserLoss(model=model, negatives=negatives),
        "gradient": UserLoss(model=model, negatives=negatives, slope=True),
    }
