"""Measures: what classifiers do to groups, counted, and how far groups are apart."""

from typing import NamedTuple

import torch
from torch import Tensor

from fedsim.fairness.notions import Events
from fedsim.task import Batch


def known(data: Batch, num_groups: int, num_classes: int, dtype: torch.dtype) -> Tensor:
    """P(group, label | example), (n, G, K), where columns "a" and "y" tell both: one-hot, and zero for padding."""
    member = data["a"][:, None] == torch.arange(num_groups)  # (n, G)
    labelled = (data["y"][:, None] == torch.arange(num_classes)) & data["mask"][:, None]  # (n, K)
    return (member[:, :, None] & labelled[:, None]).to(dtype)


def belonging(found: Events, scores: Tensor) -> Tensor:
    """P(group, label in event | example), (B, G, V), out of P(group, label | example), (B, G, K)."""
    return scores @ found.labels.to(scores.dtype).T


def count(found: Events, scores: Tensor, predicted: Tensor) -> tuple[Tensor, Tensor]:
    """How much of each group falls under each event, and how much of that is taken for the event's class; (G, V) each.

    Args:
        found: the events.
        scores: P(group, label | example), (B, G, K): one-hot where both are known; zero for what does not count.
        predicted: P(predicted | example), (B, K).
    """
    belongs = belonging(found, scores)
    taken = torch.einsum("bgv,bv->gv", belongs, predicted[:, found.classes])
    return taken, belongs.sum(0)


def binding(among: Tensor, examples: Tensor) -> Tensor:
    """How much falls under each event, (G, V), and zero where less than one example is expected to: that binds nothing.

    Args:
        among: P(group, label in event), (G, V).
        examples: how many there are, ().
    """
    return torch.where(among * examples < 0.99, 0, among)  # 1, but for rounding


def deviations(taken: Tensor, among: Tensor) -> Tensor:
    """Each group's rate minus the pooled one, (G, V); zero for a group of which nothing falls under an event.

    Args:
        taken: how much of each group and event is taken for the event's class, (G, V); any scale, that of `among`;
            where `among` is zero it does not count.
        among: how much falls under the event, (G, V).
    """
    there = among > 0
    pooled = torch.where(there, taken, 0).sum(0) / torch.where(there.any(0), among.sum(0), 1)  # (V,)
    return torch.where(there, taken / torch.where(there, among, 1) - pooled, 0)


def rates(found: Events, confusion: Tensor) -> Tensor:
    """P(predicted = y_v | label in E_v, group), (..., G, V), NaN where there is no such example.

    Args:
        found: the rates that are wanted.
        confusion: how often which label was taken for which class in which group, (..., G, K, K); any scale.
    """
    confusion = confusion.double()  # of whole numbers torch would make a float32
    labels = found.labels.to(confusion.dtype)
    predicted = torch.einsum("vi,...aiv->...av", labels, confusion[..., found.classes])
    among = torch.einsum("vi,...ai->...av", labels, confusion.sum(-1))
    return predicted / among


class Unfairness(NamedTuple):
    """How far rates are apart, (..., V) each."""

    deviation: Tensor  # of the group that is farthest from the pooled rate
    gap: Tensor  # between the two groups that are farthest from each other


def unfairness(found: Events, confusion: Tensor) -> Unfairness:
    """The largest deviation from the pooled rate, and the largest gap between two groups.

    Groups without examples of an event are left out of it.
    For two groups the deviation is (1 - share of the smaller group) times the gap, about half of it: they must not be
    taken for each other.

    Args:
        found: the rates that are compared.
        confusion: counts, (..., G, K, K).
    """
    each = rates(found, confusion)  # (..., G, V)
    pooled = rates(found, confusion.sum(-3, keepdim=True))  # (..., 1, V)
    there = ~each.isnan()
    deviation = torch.where(there, (each - pooled).abs(), 0).amax(-2)
    most = torch.where(there, each, -torch.inf).amax(-2)
    least = torch.where(there, each, torch.inf).amin(-2)
    return Unfairness(deviation, (most - least).clamp(min=0))


def max_deviation(found: Events, confusion: Tensor) -> float:
    """The largest deviation of a group's rate from the pooled one, over everything in `confusion`, (..., G, K, K)."""
    return float(unfairness(found, confusion).deviation.max())


def pairwise_gap(found: Events, confusion: Tensor) -> float:
    """The largest difference of a rate between two groups, over everything in `confusion`, (..., G, K, K)."""
    return float(unfairness(found, confusion).gap.max())
