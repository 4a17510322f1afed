"""Stability: how much a table of embeddings changed between two moments of a training.

Two numbers for tables as they stand, and one that does not change when all embeddings are rotated together, as they
may be without a score of the kind <p, q> changing: of each row's nearest rows, how many are still its nearest.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from fedsim.ranges import Count, checked

AT_ONCE = 2**24  # similarities that are in memory at one time


def relative_change(before: Tensor, after: Tensor) -> float:
    """|after - before| / |before|, Frobenius norms of tables (I, D).

    Raises:
        ValueError: tables of different shapes, or there is nothing that the change could be relative to.
    """
    before, after = _tables(before, after)
    norm = float(before.norm())
    if norm == 0:
        raise ValueError("before is zero everywhere: no change can be relative to it")
    return float((after - before).norm()) / norm


def mean_cosine(before: Tensor, after: Tensor) -> float:
    """The mean over rows of the cosine between a row (D,) before and after.

    Rows that are zero in one of the tables have no direction and are left out; NaN if that is all of them.

    Raises:
        ValueError: tables of different shapes.
    """
    before, after = _tables(before, after)
    there = before.any(1) & after.any(1)
    return float((normalize(before[there]) * normalize(after[there])).sum(1).mean())


@checked
def neighbour_overlap(before: Tensor, after: Tensor, k: Count = 10) -> float:
    """Of the k rows nearest to a row by cosine, itself not among them, the share that is the same; the mean over rows.

    1 where no neighbour changed; tables that have nothing to do with each other give k / (I - 1). The cosine with a row
    of zeros is zero.

    Raises:
        ValueError: tables of different shapes, or of no more than k rows.
    """
    before, after = _tables(before, after)
    if len(before) <= k:
        raise ValueError(f"k = {k}: a table of {len(before)} rows has {len(before) - 1} neighbours for each of them")
    units = normalize(before), normalize(after)
    same, rows = 0, max(1, AT_ONCE // len(before))
    for start in range(0, len(before), rows):
        one, other = (_nearest(unit, slice(start, start + rows), k) for unit in units)  # (R, k)
        same += int((one[:, :, None] == other[:, None, :]).sum())
    return same / (k * len(before))


def _nearest(unit: Tensor, rows: slice, k: int) -> Tensor:
    """The k rows nearest to each of some rows, (R, k)."""
    similar = unit[rows] @ unit.T  # (R, I)
    own = torch.arange(len(similar))
    similar[own, rows.start + own] = -torch.inf
    return similar.topk(k, 1).indices


def _tables(before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    """Both in float64."""
    if before.shape != after.shape or before.ndim != 2:
        raise ValueError(f"two tables of one shape (I, D) are compared, got {(*before.shape,)} and {(*after.shape,)}")
    return before.double(), after.double()
