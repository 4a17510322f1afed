"""Barycenters of one-dimensional laws, and the monotone maps that transport each law to theirs.

With quantile functions Q_a, distribution functions F_a and weights w_a that sum to one:

    quantile    Q = sum_a w_a Q_a               the W2 barycenter: least sum_a w_a W_2^2(law_a, barycenter)
    median      Q = weighted median of the Q_a  a W1 barycenter: least sum_a w_a W_1(law_a, barycenter)
    cdf         F = sum_a w_a F_a               their mixture, which is no barycenter

The map T_a = Q o F_a is the optimal transport from law a, for every cost that is convex in the distance.

Agueh, Carlier, "Barycenters in the Wasserstein space", SIAM Journal on Mathematical Analysis 2011,
https://doi.org/10.1137/100805741; Peyre, Cuturi, "Computational Optimal Transport", 2019,
https://arxiv.org/abs/1803.00567, remarks 2.30 and 9.6.
"""

from typing import Literal

import torch
from torch import Tensor

from fedsim.transport.laws import distribution, grid, midranks, quantiles

Barycenter = Literal["quantile", "median", "cdf"]


def quantile_average(functions: Tensor, weights: Tensor) -> Tensor:
    """The quantile function of the W2 barycenter, (..., L).

    Args:
        functions: those of G laws at the same levels, (G, ..., L).
        weights: (G,), of any sum above zero.
    """
    weights = weights.to(functions.dtype)
    average: Tensor = torch.tensordot(weights / weights.sum(), functions, 1)
    return average


def quantile_median(functions: Tensor, weights: Tensor) -> Tensor:
    """The quantile function of a W1 barycenter, (..., L); of all medians the midmost, where there are several.

    Args:
        functions: those of G laws at the same levels, (G, ..., L).
        weights: (G,), of any sum above zero.
    """
    ordered, order = functions.sort(0)
    share = weights.double() / weights.sum()
    reached = share[order].cumsum(0)
    # The least and the greatest value with half of the weight on either side; they differ where exactly half is below.
    least = (reached < 0.5 - 1e-9).sum(0, keepdim=True)
    greatest = (reached < 0.5 + 1e-9).sum(0, keepdim=True)
    ends = [ordered.gather(0, place.clamp(max=len(ordered) - 1))[0] for place in (least, greatest)]
    return (ends[0] + ends[1]) / 2


def barycenter_quantiles(counts: Tensor, at: Tensor, kind: Barycenter = "quantile") -> Tensor:
    """The quantile function of the barycenter of laws on a grid, at some levels, (..., L).

    Args:
        counts: histograms of G laws, (G, ..., bins); each law weighs what its number of scores is.
        at: levels, (L,) or (..., L).
        kind: which barycenter.

    Raises:
        ValueError: there is no such barycenter, or nothing was counted.
    """
    size = counts.reshape(len(counts), -1).sum(1).double()  # (G,)
    if not size.sum() > 0:
        raise ValueError(f"counts must hold at least one score, got {tuple(counts.shape)} zeros")
    reached = distribution(counts)
    match kind:
        case "quantile":
            return quantile_average(quantiles(reached, at), size)
        case "median":
            return quantile_median(quantiles(reached, at), size)
        case "cdf":
            return quantiles(quantile_average(reached, size), at)
    raise ValueError(f"barycenter must be quantile, median or cdf, got {kind!r}")


def transport_maps(counts: Tensor, kind: Barycenter = "quantile") -> Tensor:
    """T_a: where each law sends the scores at each point of the grid, (G, ..., bins), monotone.

    A law without scores sends every point to itself, and has no part in the barycenter.

    Args:
        counts: histograms of G laws, (G, ..., bins); each law weighs what its number of scores is.
        kind: the barycenter that they are sent to.
    """
    stay = grid(counts.shape[-1]).expand(counts.shape)
    if not counts.any():
        return stay
    sent = torch.stack([barycenter_quantiles(counts, ranks, kind) for ranks in midranks(counts)])
    return torch.where((counts.sum(-1, keepdim=True) > 0), sent, stay)
