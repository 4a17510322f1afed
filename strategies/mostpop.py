"""MostPop: everybody is proposed what most have. What a method of recommendation must exceed to have learned a taste.

The local side is `clients.mostpop:TellItems`. Everybody is asked once, and nothing is trained.
"""

from dataclasses import dataclass

import torch

from fedsim.ranges import Count
from fedsim.strategy import Strategy
from fedsim.task import Metrics, Params, Replies, Task
from fedsim.tree import Tree


@dataclass(frozen=True)
class MostPop(Strategy):
    """Counts who has which item.

    Attributes:
        num_items: I.
        num_clients: N.
    """

    num_items: Count
    num_clients: Count

    def init(self, params: Params) -> Tree:
        """Nothing is counted yet."""
        return {
            "params": params,
            "popularity": torch.zeros(self.num_items),
            "counted": torch.zeros((), dtype=torch.bool),
        }

    def configure(self, state: Tree, round: int) -> Task:
        """All are asked which items they have."""
        return Task("train", {}, range(self.num_clients), reduce="sum")

    def aggregate(self, state: Tree, task: Task, replies: Replies) -> tuple[Tree, Metrics]:
        """How many have which item."""
        popularity = replies.update["popularity"].dense()
        return state | {"popularity": popularity, "counted": torch.ones_like(state["counted"])}, {}

    def shared(self, state: Tree) -> Tree:
        """How many have which item."""
        return {"popularity": state["popularity"]}

    def done(self, state: Tree) -> bool:
        """Once everybody has been asked."""
        return bool(state["counted"])
