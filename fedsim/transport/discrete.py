"""Optimal transport between laws on finitely many points: plans, and barycenters of several laws.

A law is a histogram, its masses non-negative with sum 1. With a cost M (K, K) of moving mass between K points, and
weights w of C laws, their barycenter is

    argmin_q sum_c w_c W(p_c, q),    W(p, q) = min <M, P> over plans P >= 0 with rows that sum to p and columns to q.

All of it is solved by POT (Flamary et al., "POT: Python Optimal Transport", JMLR 2021, https://pythonot.github.io).
Arrays may be numpy's or tensors of torch on the CPU; weights count by their shares.
"""

import warnings
from collections.abc import Sequence

import numpy as np
import ot
from numpy.typing import ArrayLike, NDArray

from fedsim.randomness import rng

Floats = NDArray[np.float64]

_FLOOR = 1e-12  # of a histogram's masses where a kernel is to be divided by
_STOP = 1e-7  # by how much the marginals of plans may be off
_NEAR = 1e-6  # by how much the sum of a law may be off 1: float32 sums are


def numbers(name: str, values: ArrayLike, ndim: int) -> Floats:
    """The values in float64; raises ValueError unless they are finite, at least one, and have so many axes."""
    array: Floats = np.asarray(values, dtype=np.float64)
    if array.ndim != ndim or not array.size:
        raise ValueError(f"{name} must have {ndim} axes, none of length 0; got shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite, got {array[~np.isfinite(array)][0]}")
    return array


def masses(name: str, values: ArrayLike, ndim: int) -> Floats:
    """Laws along the last axis, with sums of exactly 1; raises ValueError unless their sums are nearly that."""
    array = numbers(name, values, ndim)
    if array.min() < 0:
        raise ValueError(f"{name} must not be negative, got {array.min()}")
    total = array.sum(-1, keepdims=True)
    worst = float(total.flat[np.abs(total - 1).argmax()])
    if abs(worst - 1) > _NEAR:
        raise ValueError(f"{name} must sum to 1, got a sum of {worst}")
    return np.asarray(array / total, dtype=np.float64)


def shares(weights: ArrayLike, count: int) -> Floats:
    """Weights (C,) divided by their sum; raises ValueError unless they are `count`, non-negative and not all zero."""
    array = numbers("weights", weights, 1)
    if len(array) != count:
        raise ValueError(f"weights must be {count}, one for each law; got {len(array)}")
    if array.min() < 0 or not array.sum() > 0:
        raise ValueError(f"weights must not be negative, and not all zero; got {array.tolist()}")
    return np.asarray(array / array.sum(), dtype=np.float64)


def _square(cost: ArrayLike, size: int) -> Floats:
    """A cost between the points of laws of this size."""
    array = numbers("cost", cost, 2)
    if array.shape != (size, size):
        raise ValueError(f"cost must have shape {(size, size)}, as laws of {size} points ask for; got {array.shape}")
    if array.min() < 0:
        raise ValueError(f"cost must not be negative, got {array.min()}")
    return array


def plan(cost: ArrayLike, source: ArrayLike, target: ArrayLike) -> Floats:
    """The cheapest plan (m, n) that moves the law `source` (m,) to the law `target` (n,), exactly.

    It has at most m + n - 1 entries that are not zero; of two uniform laws on n points each it is a permutation
    divided by n.
    """
    source, target = masses("source", source, 1), masses("target", target, 1)
    cost = numbers("cost", cost, 2)
    if cost.shape != (len(source), len(target)):
        raise ValueError(f"cost must have shape {(len(source), len(target))}, source by target; got {cost.shape}")
    found, log = ot.emd(source, target, np.ascontiguousarray(cost), numItermax=10_000_000, log=True)
    if log["warning"] is not None:
        raise ValueError(f"no plan was found for {len(source)} by {len(target)} points: {log['warning']}")
    return np.asarray(found, dtype=np.float64)


def barycenter(laws: ArrayLike, cost: ArrayLike, weights: ArrayLike) -> Floats:
    """A barycenter (K,) of laws (C, K) on the same points, exactly: a linear program over C plans.

    It has C K^2 + K variables: for 10 points and 20 laws it takes some 25 ms. There may be several; this is one.
    """
    laws = masses("laws", laws, 2)
    cost, weights = _square(cost, laws.shape[1]), shares(weights, len(laws))
    some = weights > 0
    found, log = ot.lp.barycenter(laws[some].T, cost, weights[some], log=True, solver="highs-ds")
    if log.status != 0:
        raise ValueError(f"the barycenter of {len(laws)} laws on {laws.shape[1]} points was not found: {log.message}")
    found = np.clip(found, 0, None)
    return np.asarray(found / found.sum(), dtype=np.float64)


def entropic_barycenter(laws: ArrayLike, cost: ArrayLike, weights: ArrayLike, temperature: float) -> Floats:
    """The barycenter (K,) of laws (C, K) for plans of cost <M, P> - temperature entropy(P).

    It is unique, blurred the more the higher the temperature, and found by iterated Bregman projections (Benamou,
    Carlier, Cuturi, Nenna, Peyre, 2015, https://arxiv.org/abs/1412.5154) in floats, not in logarithms.

    Raises:
        ValueError: besides what is wrong with the arguments, a temperature too low for that.
    """
    if not (np.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature must be > 0, got {temperature}")
    laws = masses("laws", laws, 2)
    cost, weights = _square(cost, laws.shape[1]), shares(weights, len(laws))
    # Where exp(-cost / temperature) is zero, no mass would reach a point, and zero would be divided by zero.
    held = np.maximum(laws, _FLOOR)
    held = held / held.sum(1, keepdims=True)
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # what they warn of is looked for below
        # ot.bregman.barycenter starts where uneven weights lead it to another law (POT 0.9.7). This function starts
        # right, and with tau = inf it stays with these iterations throughout.
        found, log = ot.bregman.barycenter_stabilized(
            held.T, cost, temperature, np.inf, weights, numItermax=20_000, stopThr=_STOP, log=True, warn=False
        )
    if not np.isfinite(found).all() or not log["err"][-1] < _STOP:
        raise ValueError(
            f"temperature = {temperature} is too low for costs up to {cost.max():.3g}: the projections did not converge"
        )
    return np.asarray(found / found.sum(), dtype=np.float64)


def free_support(
    points: Sequence[ArrayLike],
    weights: ArrayLike,
    size: int,
    seed: int = 0,
    laws: Sequence[ArrayLike] | None = None,
) -> Floats:
    """Points (size, D), of equal mass, that are a barycenter of clouds (n_k, D) under the squared distance.

    Found from a random start by alternating plans and means (Cuturi, Doucet, "Fast Computation of Wasserstein
    Barycenters", ICML 2014, https://arxiv.org/abs/1310.4375): a local minimum, as the problem is not convex.

    Args:
        points: the clouds.
        weights: of the clouds.
        size: how many points.
        seed: of the start.
        laws: the masses (n_k,) in each cloud; None: the points of a cloud weigh the same.
    """
    if not points or size < 1:
        raise ValueError(f"there must be a cloud and a point to find, got {len(points)} clouds and size = {size}")
    clouds = [numbers(f"points[{k}]", cloud, 2) for k, cloud in enumerate(points)]
    if len({cloud.shape[1] for cloud in clouds}) > 1:
        raise ValueError(f"points must be of one dimension, got {[cloud.shape[1] for cloud in clouds]}")
    if laws is None:
        laws = [np.full(len(cloud), 1 / len(cloud)) for cloud in clouds]
    held = [masses(f"laws[{k}]", law, 1) for k, law in enumerate(laws)]
    if [len(law) for law in held] != [len(cloud) for cloud in clouds]:
        raise ValueError(f"laws must be as long as their clouds {list(map(len, clouds))}, got {list(map(len, held))}")
    weights = shares(weights, len(clouds))
    pooled = np.concatenate(clouds)
    start = pooled.mean(0) + pooled.std(0) * rng(seed, "free support").normal(size=(size, pooled.shape[1]))
    return np.asarray(ot.lp.free_support_barycenter(clouds, held, start, weights=weights), dtype=np.float64)
