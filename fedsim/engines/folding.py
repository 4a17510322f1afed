"""Folding: means and sums of updates, taken in as they come, so that memory for a few of them is enough."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor

from fedsim import tree
from fedsim.task import Reduce
from fedsim.tree import Rows, Tree


class Fold:
    """The mean (by weight) or the sum of updates, in memory for one of them."""

    def __init__(self, reduce: Reduce, update: Tree | None = None, weight: float = 0.0, count: int = 0) -> None:
        self.reduce = reduce
        self.update: Tree = update or {}
        self.weight = weight
        self.count = count  # of clients
        self.own = False  # whether nobody else has these tensors, so that they may be changed in place

    def add(self, update: Tree, weight: Tensor) -> None:
        """Takes in the updates of C clients, leaves (C, ...)."""
        weight = weight.double()  # shares in float32 would cost a float64 update half of its digits
        block = tree.total(update) if self.reduce == "sum" else tree.weighted_mean(update, weight)
        self.merge(Fold(self.reduce, block, float(weight.sum()), len(weight)))

    def merge(self, other: "Fold") -> None:
        """Takes in what another fold made of its clients."""
        if not other.count:
            return
        total = self.weight + other.weight
        if not self.count:
            self.update, self.own = other.update, other.own
        else:
            # The share of what is new. A running mean, unlike a sum divided at the end, gives one client back exactly.
            share = other.weight / total if total else other.count / (self.count + other.count)
            self.update = tree.map(partial(self._both, share), self.update, other.update)
            self.own = True
        self.weight = total
        self.count += other.count

    def _both(self, share: float, mine: Any, other: Any) -> Any:
        """What two leaves become; `share` is that of the other one in a mean."""
        if isinstance(mine, Rows):
            return mine.plus(other) if self.reduce == "sum" else mine.plus(other, 1 - share, share)
        if self.reduce == "sum":
            return mine.add_(other) if self.own else mine + other
        return mine.lerp_(other, share) if self.own else mine.lerp(other, share)


class Folds:
    """The folds of blocks, merged pairwise: a block with its neighbour, such a pair with the next pair, and so on.

    So the result depends on the order of the blocks alone, and not on who merged which of them: 2^k neighbours of which
    the first is at a multiple of 2^k may be merged elsewhere. About log2 of the number of blocks are in memory.
    """

    def __init__(self, reduce: Reduce) -> None:
        self.reduce = reduce
        self.waiting: list[tuple[Fold, int]] = []  # each with the number of its blocks, the largest first

    def push(self, fold: Fold, blocks: int = 1) -> None:
        """Takes in what was made of the next blocks."""
        while self.waiting and self.waiting[-1][1] == blocks:
            before, _ = self.waiting.pop()
            before.merge(fold)
            fold, blocks = before, 2 * blocks
        self.waiting.append((fold, blocks))

    @property
    def last(self) -> Fold:
        """What was pushed last, with all that it was merged with."""
        if not self.waiting:
            self.push(Fold(self.reduce))
        return self.waiting[-1][0]

    @property
    def blocks(self) -> int:
        """How many were taken in."""
        return sum(blocks for _, blocks in self.waiting)

    def whole(self) -> Fold:
        """All of them merged; nothing can be taken in afterwards."""
        while len(self.waiting) > 1:
            after, blocks = self.waiting.pop()
            self.waiting[-1][0].merge(after)
            self.waiting[-1] = (self.waiting[-1][0], self.waiting[-1][1] + blocks)
        return self.last


def pieces(lengths: Sequence[float], workers: float) -> list[range]:
    """Neighbouring blocks that one worker had best run and merge together, by how long each of them takes.

    Large pieces come first and single blocks last, so that all workers end at about the same time, and few results have
    to travel. Each piece is one that `Folds` allows.
    """
    found, start, left = [], 0, sum(lengths)
    while start < len(lengths):
        number, length = 1, lengths[start]
        while start % (2 * number) == 0 and start + 2 * number <= len(lengths):
            longer = length + sum(lengths[start + number : start + 2 * number])
            if longer > left / workers:
                break
            number, length = 2 * number, longer
        found.append(range(start, start + number))
        start, left = start + number, left - length
    return found
