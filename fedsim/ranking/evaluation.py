"""RankItems: puts each user's held-out item in order with others, and counts where it stands."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from fedsim.client import Client
from fedsim.ranges import Count
from fedsim.ranking.measures import hit_rate, ndcg, rank
from fedsim.ranking.naming import MOSTPOP
from fedsim.ranking.splitting import KNOWN, WANTED
from fedsim.task import Batch, Reply
from fedsim.tree import Tree


class Scorer(ABC):
    """How a method scores items for a user."""

    @abstractmethod
    def __call__(self, shared: Tree, personal: Tree, items: Tensor) -> Tensor:
        """The scores (n,) of items (n,), out of what the server shared and what the user keeps."""


@dataclass(frozen=True, kw_only=True)
class RankItems(Client):
    """Hit rate and NDCG of a user's held-out item; its metrics are sums over users, "examples" how many there are.

    "hr_10" and "ndcg_10" are among the held-out item and its drawn negatives; "full_hr_10" and "full_ndcg_10" among all
    items but those that the user is known to have. Ties count against it. With `popularity` each has its like, such as
    "mostpop_hr_10": what MostPop gives, which puts the same candidates in the order of their popularity.

    Attributes:
        scorer: what gives scores.
        num_items: I; None: nothing is ranked in full.
        full: whether all items are ranked too, which costs the whole catalogue for each user.
        at: how many items are proposed.
        part: which held-out item.
        popularity: how many users have each item in their training part, (I,), as `fedsim.ranking:popularity` counts
            them; None: not known, as at a user who sees its own data alone, and then there is no MostPop.
    """

    scorer: Scorer
    num_items: Count | None = None
    full: bool = True
    at: tuple[Count, ...] = (5, 10, 20)
    part: Literal["validation", "test"] = "test"
    popularity: Tensor | None = field(default=None, repr=False, compare=False)
    batch_size: Count = 2**30  # its one step does nothing

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.popularity is None:
            return
        shape = tuple(self.popularity.shape)
        if len(shape) != 1 or (self.num_items is not None and shape != (self.num_items,)):
            wanted = "I" if self.num_items is None else f"num_items = {self.num_items}"
            raise ValueError(f"popularity must have the shape ({wanted},), got {shape}")

    @property
    def split(self) -> str:
        """Which part of a user's items is put in order."""
        return self.part

    @property
    def needs(self) -> tuple[str, ...]:
        """What `leave_one_out` makes."""
        return ("item", "y")

    def footprint(self, shared: Tree, examples: int) -> int:
        """What the items that are scored take up, if a scorer has a thousand numbers for each."""
        every = self.num_items if self.full and self.num_items else 0
        return 4 * 1000 * (examples + every)

    def start(self, shared: Tree, personal: Tree, data: Batch) -> Tree:
        """Where the held-out item stands, in each order."""
        item, mask = data["item"], data["mask"]
        wanted, candidate = mask & (data["y"] == WANTED), mask & (data["y"] != KNOWN)
        state = {"there": wanted.any()} | self._ranks("rank", shared, personal, item, wanted, candidate)
        if self.num_items is None or not self.full:
            return state
        every = torch.arange(self.num_items)
        # Told by counts, because of what `vmap` allows: padding counts nowhere.
        held, known = (
            torch.zeros(self.num_items, dtype=torch.int64).scatter_add(0, item, some.long()) > 0
            for some in (wanted, mask & (data["y"] == KNOWN))
        )
        return state | self._ranks("full_rank", shared, personal, every, held, ~known)

    def _ranks(
        self, name: str, shared: Tree, personal: Tree, item: Tensor, wanted: Tensor, candidate: Tensor
    ) -> dict[str, Tensor]:
        """Where the wanted one of items (n,) stands, (): by their scores and, where that is known, by popularity."""
        found = {name: rank(self.scorer(shared, personal, item), wanted, candidate)}
        if self.popularity is not None:
            found[f"{MOSTPOP}{name}"] = rank(self.popularity[item].double(), wanted, candidate)
        return found

    def step(self, state: Tree, batch: Batch) -> Tree:
        """All is done."""
        return state

    def finish(self, shared: Tree, state: Tree, data: Batch) -> Reply:
        """The measures of this user; zero where nothing was held out."""
        there = state["there"].double()
        metrics = {"examples": there}
        for name in state:
            if name == "there":
                continue
            before = name.removesuffix("rank")
            for k in self.at:
                metrics[f"{before}hr_{k}"] = there * hit_rate(state[name], k)
                metrics[f"{before}ndcg_{k}"] = there * ndcg(state[name], k)
        return Reply({}, there, metrics=metrics)
