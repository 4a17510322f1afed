"""Barycenters of laws on K points in closed form, for the two costs of which they are medians.

They minimise sum_c w_c W(p_c, q) as `barycenter` does by a linear program, for thousands of laws at once; a majority
decides: laws of more than half of the weight that are the same law are the barycenter, wherever the others lie.
"""

import numpy as np
from numpy.typing import ArrayLike

from fedsim.transport.discrete import Floats, masses, shares

_TIE = 1e-12  # sums of weights that are so close are the same


def _sorted(values: Floats, weights: ArrayLike) -> tuple[Floats, Floats]:
    """Values (C, n, K) sorted over the laws, and the weight of those up to each."""
    order = values.argsort(0, kind="stable")
    return np.take_along_axis(values, order, 0), shares(weights, len(values))[order].cumsum(0)


def ordinal_barycenter(laws: ArrayLike, weights: ArrayLike) -> Floats:
    """The barycenters (n, K) of laws (C, n, K) under the cost |i - j| of points i and j.

    Since W is the sum of |differences of distribution functions|, that of q is the weighted median of theirs at each
    point; where any value between two is one, halfway.
    """
    below, reached = _sorted(masses("laws", laws, 3).cumsum(-1), weights)
    lower, upper = (reached >= 0.5 - _TIE).argmax(0), (reached > 0.5 + _TIE).argmax(0)  # (n, K)
    ends = [np.take_along_axis(below, place[None], 0)[0] for place in (lower, upper)]
    found = np.diff((ends[0] + ends[1]) / 2, axis=-1, prepend=0.0)
    return np.asarray(found.clip(0) / found.clip(0).sum(-1, keepdims=True), dtype=np.float64)


def uniform_barycenter(laws: ArrayLike, weights: ArrayLike) -> Floats:
    """The barycenters (n, K) of laws (C, n, K) under a cost of 1 between any two points.

    W is half the sum of |p_k - q_k|. So q_k is a quantile of the laws' masses at point k, at the one level for all
    points at which they sum to 1 (the level is 1/2 plus the multiplier of that constraint).
    """
    mass, reached = _sorted(masses("laws", laws, 3), weights)  # (C, n, K)
    if len(mass) == 1:
        return np.asarray(mass[0], dtype=np.float64)
    levels, jumps = reached[:-1], np.diff(mass, axis=0)  # q_k grows by a jump where the level passes
    flat = [np.moveaxis(part, 0, -1).reshape(mass.shape[1], -1) for part in (levels, jumps)]  # (n, K (C - 1))
    order = flat[0].argsort(-1, kind="stable")
    total = mass[0].sum(-1, keepdims=True) + np.take_along_axis(flat[1], order, -1).cumsum(-1)
    total[:, -1] = np.inf  # it is 1 or more there, but for rounding
    first = (total >= 1 - _TIE).argmax(-1, keepdims=True)
    level = np.take_along_axis(np.take_along_axis(flat[0], order, -1), first, -1)  # (n, 1)
    lower = mass[0] + np.where(levels < level - _TIE, jumps, 0).sum(0)
    upper = mass[0] + np.where(levels <= level + _TIE, jumps, 0).sum(0)
    room = (upper - lower).sum(-1, keepdims=True)
    part = np.where(room > 0, (1 - lower.sum(-1, keepdims=True)) / np.where(room > 0, room, 1), 0).clip(0, 1)
    found = lower + part * (upper - lower)
    return np.asarray(found / found.sum(-1, keepdims=True), dtype=np.float64)
