"""Laws of scores in [0, 1], as histograms on a grid, and what follows from them: distribution and quantile functions.

A grid has `bins` points 0, 1 / (bins - 1), ..., 1; a score counts at the nearest one. The counts of several clients add
up to those of their pooled scores, exactly.
"""

from itertools import combinations

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack

# A distribution function that is this much below a level has reached it: sums of fractions are not exact. So of more
# than half a million scores a single one at the upper end may be lost.
SLACK = 1e-6


def grid(bins: int) -> Tensor:
    """The scores that are told apart, (bins,)."""
    return torch.linspace(0, 1, bins, dtype=torch.float64)


def nearest(scores: Tensor, bins: int) -> Tensor:
    """The number of the nearest point of the grid, for scores of any shape.

    Raises:
        ValueError: fewer than two points, or a score outside [0, 1] (under `torch.func.vmap` it counts at the end).
    """
    if bins < 2:
        raise ValueError(f"bins must be at least 2, one at either end of [0, 1], got {bins}")
    if peek_interpreter_stack() is None and not ((scores >= 0) & (scores <= 1)).all():
        wrong = scores[~((scores >= 0) & (scores <= 1))]
        raise ValueError(f"scores must lie in [0, 1], got {float(wrong[0])} and {len(wrong) - 1} others outside")
    # double, because bfloat16 cannot tell neighbours apart; NaN, which only `vmap` lets through, counts at zero.
    return ((bins - 1) * scores.double().nan_to_num() + 0.5).floor().clamp(0, bins - 1).long()


def score_width(num_classes: int) -> int:
    """S: how many scores a classifier of K classes has; two are told by the probability of the second."""
    return 1 if num_classes == 2 else num_classes


def class_scores(outputs: Tensor) -> Tensor:
    """The scores of a classifier with these outputs, (n, S): P(second class) of two, else P(each class).

    Args:
        outputs: logits, (n, K).

    Raises:
        ValueError: there is one output, whose softmax says nothing.
    """
    if outputs.shape[-1] < 2:
        raise ValueError(f"scores need the logits of two classes or more, the model has {outputs.shape[-1]} output")
    chances = outputs.softmax(-1)
    return chances[:, -score_width(chances.shape[-1]) :]


def histogram(scores: Tensor, groups: Tensor, num_groups: int, bins: int) -> Tensor:
    """How many examples of each group have which score, (G, S, bins) integers.

    Args:
        scores: in [0, 1], S of them for each example, (n, S).
        groups: the group of each example, (n,); one of none of these, such as -1, does not count.
        num_groups: G.
        bins: points of the grid.
    """
    place = nearest(scores, bins)  # (n, S)
    width = scores.shape[1]
    cell = (groups.clamp(0, num_groups - 1)[:, None] * width + torch.arange(width)) * bins + place
    counted = ((groups >= 0) & (groups < num_groups))[:, None].expand_as(cell).long()
    counts = torch.zeros(num_groups * width * bins, dtype=torch.int64)
    return counts.scatter_add(0, cell.flatten(), counted.flatten()).reshape(num_groups, width, bins)


def distribution(counts: Tensor) -> Tensor:
    """F: the share of scores at or below each point of the grid, (..., bins); zero everywhere if there are none."""
    counts = counts.double()
    return counts.cumsum(-1) / counts.sum(-1, keepdim=True).clamp(min=1)


def midranks(counts: Tensor) -> Tensor:
    """The rank in (0, 1) of a score at each point of the grid, (..., bins): midway between F before it and F at it.

    All scores at one point are ties, and have the mean of the ranks that they share.
    """
    reached = distribution(counts)
    before = torch.cat([torch.zeros_like(reached[..., :1]), reached[..., :-1]], -1)
    return (before + reached) / 2


def levels(number: int) -> Tensor:
    """Levels (i + 1/2) / number at which quantile functions are told, (L,)."""
    return (torch.arange(number, dtype=torch.float64) + 0.5) / number


def quantiles(reached: Tensor, at: Tensor) -> Tensor:
    """Q(level): the least point of the grid where F has reached the level; at level 0, where it begins.

    Args:
        reached: F, (..., bins).
        at: levels, (L,) or (..., L).
    """
    bins = reached.shape[-1]
    at = at.to(reached.dtype).expand(*reached.shape[:-1], at.shape[-1])
    above = (at - SLACK).clamp(min=torch.finfo(reached.dtype).tiny)  # else F would have reached it before any score
    place = torch.searchsorted(reached.contiguous(), above.contiguous()).clamp(max=bins - 1)
    return place.to(reached.dtype) / (bins - 1)


def sample_quantiles(samples: Tensor, at: Tensor, weights: Tensor | None = None) -> Tensor:
    """Q(level) of weighted samples, (..., L): the least sample at or below which so much weight lies.

    Args:
        samples: (..., n).
        at: levels, (L,).
        weights: (..., n), of any sum above zero; None: all the same.
    """
    ordered, order = samples.sort(-1)
    weights = torch.ones_like(samples) if weights is None else weights
    reached = weights.gather(-1, order).double().cumsum(-1)
    at = (at * reached[..., -1:]).expand(*samples.shape[:-1], at.shape[-1])
    place = torch.searchsorted(reached, at.contiguous() - SLACK * reached[..., -1:]).clamp(max=samples.shape[-1] - 1)
    return ordered.gather(-1, place)


def wasserstein(
    first: Tensor,
    second: Tensor,
    power: float = 1,
    first_weights: Tensor | None = None,
    second_weights: Tensor | None = None,
) -> Tensor:
    """W_p^p between weighted samples on a line, (...): what moving one to the other costs at |distance|^p, by POT.

        W_p^p = integral over levels in [0, 1] of |Q_first - Q_second|^p

    Gradients flow to the samples and to the weights.

    Args:
        first: (..., n).
        second: (..., m), with the same axes before.
        power: p, at least 1.
        first_weights: (..., n), which sum to one; None: all the same.
        second_weights: (..., m).

    Raises:
        ValueError: p is below 1, or the shapes do not fit.
    """
    import ot  # only here: it takes half as long as all of fedsim, and most of what needs a law needs no distance

    if not power >= 1:
        raise ValueError(f"power must be at least 1, got {power}")
    if first.shape[:-1] != second.shape[:-1]:
        raise ValueError(f"first is {tuple(first.shape)} and second {tuple(second.shape)}: all but the last must agree")
    for name, samples, weights in ("first", first, first_weights), ("second", second, second_weights):
        if weights is not None and weights.shape != samples.shape:
            shapes = tuple(weights.shape), tuple(samples.shape)
            raise ValueError(f"{name}_weights is {shapes[0]}, and what it weighs {shapes[1]}: they must agree")
    given = (first, second, first_weights, second_weights)
    # POT has samples first, and takes one axis behind them.
    columns = [None if part is None else part.reshape(-1, part.shape[-1]).T.contiguous() for part in given]
    cost: Tensor = ot.wasserstein_1d(*columns, p=power)
    return cost.reshape(first.shape[:-1])


def apart(counts: Tensor, others: Tensor) -> Tensor:
    """W_1 between laws on the same grid, (...), which is the area between their distribution functions.

    Zero where one of them has counted nothing.
    """
    area = (distribution(counts) - distribution(others)).abs().sum(-1) / (counts.shape[-1] - 1)
    return torch.where((counts.sum(-1) > 0) & (others.sum(-1) > 0), area, 0)


def farthest(counts: Tensor) -> float:
    """W_1 between the two of G laws that are farthest from one another, over all S scores; counts are (G, S, bins)."""
    return max((float(apart(one, other).max()) for one, other in combinations(counts, 2)), default=0.0)
