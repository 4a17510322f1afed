"""Measures of an order of items: where the wanted one stands, the hit rate and NDCG at K.

With r the number of other candidates that score at least as high (pessimistic: ties count against), and one wanted
item for each user,

    HR@K = mean 1[r < K],    NDCG@K = mean 1[r < K] / log2(r + 2).
"""

import torch
from torch import Tensor


def rank(scores: Tensor, wanted: Tensor, candidate: Tensor) -> Tensor:
    """How many other candidates score at least as high as the wanted item, (...).

    A score that is not a number is below all others, and the wanted item's is below itself.

    Args:
        scores: (..., n).
        wanted: whether it is the wanted item, (..., n): true once.
        candidate: whether it may be proposed at all, (..., n).
    """
    scores = torch.where(scores.isnan(), -torch.inf, scores)
    own = torch.where(wanted, scores, -torch.inf).amax(-1, keepdim=True)
    return ((scores >= own) & candidate & ~wanted).sum(-1)


def hit_rate(ranks: Tensor, k: int) -> Tensor:
    """1 where the wanted item is among the first `k`, else 0; the shape of `ranks`."""
    return (ranks < k).double()


def ndcg(ranks: Tensor, k: int) -> Tensor:
    """1 / log2(rank + 2) where the wanted item is among the first `k`, else 0; the shape of `ranks`."""
    return torch.where(ranks < k, 1 / (ranks.double() + 2).log2(), 0.0)
