"""What many users send, made to tell less: gradients that are clipped to a norm, and have noise.

All leaves are (C, ...), those of C users; `clients.fedrecgel` says what this hides, and what it does not.
"""

import torch
from torch import Tensor

from fedsim import tree
from fedsim.task import Params


def norms(params: Params) -> Tensor:
    """The Euclidean norm of all that is of one user, (C,)."""
    squares = [leaf.flatten(1).square().sum(1) for leaf in params.values()]
    return torch.stack(squares).sum(0).sqrt()


def along(factor: Tensor, leaf: Tensor) -> Tensor:
    """A factor of each user, (C,), for a leaf."""
    return factor.view(-1, *[1] * (leaf.ndim - 1))


def clipped(params: Params, largest: float) -> Params:
    """Each user's, shortened to this norm where it is longer."""
    factor = (largest / norms(params)).clamp(max=1)
    return tree.map(lambda leaf: along(factor, leaf) * leaf, params)


def noised(params: Params, deviation: float, seeds: list[int], sizes: dict[str, list[int]]) -> Params:
    """With Gaussian noise on every number, which is a function of the user's seed alone.

    Args:
        params: what is sent.
        deviation: the noise's standard deviation.
        seeds: of each user.
        sizes: by leaf, how many of its rows are each user's own, where the others only fill up.
    """
    noise = tree.map(torch.zeros_like, params)
    for user, seed in enumerate(seeds):
        rng = torch.Generator("cpu").manual_seed(seed)
        for name, leaf in noise.items():
            own = leaf[user, : sizes[name][user]] if name in sizes else leaf[user]
            own.copy_(deviation * torch.randn(own.shape, generator=rng, dtype=torch.float64, device="cpu"))
    return tree.map(torch.add, params, noise)
