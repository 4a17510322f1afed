"""MostPop's local side: which items a user has."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedsim import tree
from fedsim.client import Client
from fedsim.model import Model
from fedsim.ranges import Count
from fedsim.ranking import Scorer
from fedsim.task import Batch, Reply
from fedsim.tree import Tree


@dataclass(frozen=True, kw_only=True)
class TellItems(Client):
    """Sends the items that it has, which hides nothing: what other methods are compared with.

    Attributes:
        num_items: I.
    """

    num_items: Count
    batch_size: Count = 2**30  # its one step does nothing

    @property
    def needs(self) -> tuple[str, ...]:
        """The items that a user has."""
        return ("item",)

    def start(self, shared: Tree, personal: Tree, data: Batch) -> Tree:
        """Its items."""
        one = torch.ones(len(data["item"]))
        return {"popularity": tree.Rows(torch.where(data["mask"], data["item"], -1), one, self.num_items)}

    def step(self, state: Tree, batch: Batch) -> Tree:
        """All is done."""
        return state

    def finish(self, shared: Tree, state: Tree, data: Batch) -> Reply:
        """One for each of them. The weight is how many there are."""
        return Reply({"popularity": state["popularity"]}, data["mask"].sum().double())


@dataclass(frozen=True)
class Popularity(Scorer):
    """An item's score is how many have it."""

    def __call__(self, shared: Tree, personal: Tree, items: Tensor) -> Tensor:
        """The scores (n,) of items (n,)."""
        counts: Tensor = shared["popularity"]
        return counts[items]


def nothing() -> Model:
    """A model without parameters: there is nothing to train."""
    return Model(nn.Identity())
