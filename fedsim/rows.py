"""Rows: some rows of a large table, the others of which are zero; what a client sends that touched few."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Rows:
    """Some rows of a table of `size` rows; what stands in the others is zero.

    Rows named twice add up. An index of -1 is padding. It travels as R rows and folds to those that anybody named, so
    what touches few rows never becomes a dense table, neither a client's update nor a round's.
    """

    index: Tensor  # (R,) int64, or (C, R) when stacked
    values: Tensor  # (R, ...), or (C, R, ...)
    size: int

    def dense(self) -> Tensor:
        """The whole table, (size, ...); for stacked rows the sum over clients."""
        index = self.index.flatten()
        values = self.values.flatten(0, self.index.ndim - 1)
        kept = index >= 0
        table = values.new_zeros((self.size, *values.shape[1:]))
        return table.index_add_(0, index[kept], values[kept])

    def added(self, table: Tensor) -> Tensor:
        """The table (size, ...) with these rows added to it."""
        kept = self.index >= 0
        return table.index_add(0, self.index[kept], self.values[kept].to(table.dtype))

    def merged(self) -> "Rows":
        """The same, each row once and in order, without padding; for stacked rows the sum over clients.

        It is on the CPU, which adds in a fixed order, as a GPU does not.
        """
        index = self.index.flatten().cpu()
        values = self.values.flatten(0, self.index.ndim - 1).cpu()
        kept = index >= 0
        if not kept.all():
            index, values = index[kept], values[kept]
        once, place = torch.unique(index, return_inverse=True)
        return Rows(once, values.new_zeros((len(once), *values.shape[1:])).index_add_(0, place, values), self.size)

    def plus(self, other: "Rows", mine: float = 1, theirs: float = 1) -> "Rows":
        """This one times `mine` and another times `theirs`, both merged: each row once and in order."""
        once, place = torch.unique(torch.cat([self.index, other.index]), return_inverse=True)
        values = self.values.new_zeros((len(once), *self.values.shape[1:]))
        values.index_add_(0, place[: len(self.index)], self.values, alpha=mine)
        values.index_add_(0, place[len(self.index) :], other.values, alpha=theirs)
        return Rows(once, values, self.size)

    def scaled(self, factor: Tensor) -> "Rows":
        """Stacked rows (C, R, ...), those of each client multiplied by its factor (C,)."""
        values = self.values if self.values.is_floating_point() else self.values.double()
        shape = (-1, *[1] * (values.ndim - 1))
        return Rows(self.index, values * factor.to(values.dtype).reshape(shape), self.size)
