"""Duals: multipliers for two-sided constraints |D_u| <= tolerance, kept as a pair of non-negative arrays."""

import torch
from torch import Tensor


def project(values: Tensor, bound: float) -> Tensor:
    """The nearest point, of any shape, with non-negative entries that sum to `bound` at most."""
    clipped = values.clamp(min=0)
    # On the simplex: subtract the threshold that leaves a sum of `bound`. The r largest entries stay above it.
    # All are taken relative to the largest one, beside which the bound might else be lost in rounding.
    largest = clipped.flatten().sort(descending=True).values
    below = largest - largest[0]
    rank = torch.arange(1, len(below) + 1, dtype=values.dtype, device=values.device)
    threshold = (below.cumsum(0) - bound) / rank
    last = (below > threshold).sum() - 1  # they do up to some r, and from there on do not
    nearest = (clipped - largest[0] - threshold.gather(0, last.clamp(min=0)[None])).clamp(min=0)
    return torch.where(clipped.sum() <= bound, clipped, nearest)


def ascend(dual: Tensor, deviation: Tensor, tolerance: float, step: float | Tensor, bound: float) -> Tensor:
    """One step of projected gradient ascent, (2, ...): dual[0] is for D <= tolerance, dual[1] for -D <= tolerance.

    Args:
        dual: the multipliers, (2, ...).
        deviation: D, (...).
        tolerance: what |D| is to stay within; infinity: no constraint, and no multiplier.
        step: how far to go.
        bound: of the sum of all multipliers.
    """
    slack = torch.stack([deviation - tolerance, -deviation - tolerance])
    return project(dual + step * slack, bound)


def slackness(dual: Tensor, deviation: Tensor, tolerance: float, bound: float) -> Tensor:
    """How much more the best multipliers within the bound would charge for these deviations than these do, ().

    Never negative; zero where every |D| is within the tolerance and no multiplier is on a constraint with slack. Where
    the deviations are those of the best response to the multipliers, this is the duality gap.
    """
    slack = torch.stack([deviation - tolerance, -deviation - tolerance])
    charged = torch.where(dual > 0, dual * slack, 0).sum()  # an infinite tolerance has no multiplier
    return bound * slack.max().clamp(min=0) - charged


def accelerated(dual: Tensor, ahead: Tensor, momentum: Tensor, new: Tensor, bound: float) -> dict[str, Tensor]:
    """Nesterov's method after a step from `ahead` to `new`: the next "dual", "ahead" and "momentum".

    Where the momentum led uphill it begins anew: O'Donoghue, Candes, "Adaptive restart for accelerated gradient
    schemes", 2015, https://arxiv.org/abs/1204.3982.

    Args:
        dual: the multipliers before, (2, ...).
        ahead: what they were extrapolated to.
        momentum: 1 at first, ().
        new: the multipliers after a step from there.
        bound: of the sum of all multipliers, those ahead included: beyond it `slackness` is no duality gap.
    """
    uphill = ((ahead - new) * (new - dual)).sum() > 0
    before = torch.where(uphill, 1, momentum)
    after = (1 + (1 + 4 * before**2).sqrt()) / 2
    return {"dual": new, "ahead": project(new + (before - 1) / after * (new - dual), bound), "momentum": after}
