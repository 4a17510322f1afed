"""Optimisers as pairs of pure functions, for clients and servers alike."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from fedsim import tree
from fedsim.ranges import Decay, NonNegative, Positive, Probability, checked
from fedsim.task import Params
from fedsim.tree import Tree


class Optimiser(NamedTuple):
    """`init(params)` is the state before the first step; `update(gradient, state, params)` gives (params, state)."""

    init: Callable[[Params], Tree]
    update: Callable[[Params, Tree, Params], tuple[Params, Tree]]


@checked
def sgd(lr: Positive, momentum: Probability = 0.0, weight_decay: NonNegative = 0.0) -> Optimiser:
    """Stochastic gradient descent, the same to the bit as `torch.optim.SGD`.

    v <- momentum v + (g + weight_decay p);  p <- p - lr v.
    """

    def init(params: Params) -> Tree:
        # torch starts the velocity with the first gradient, which is what zeros times momentum plus it gives.
        return {"velocity": tree.map(torch.zeros_like, params)} if momentum else {}

    def update(gradient: Params, state: Tree, params: Params) -> tuple[Params, Tree]:
        if weight_decay:
            gradient = tree.map(lambda g, p: torch.add(g, p, alpha=weight_decay), gradient, params)
        if momentum:
            gradient = tree.map(lambda v, g: v * momentum + g, state["velocity"], gradient)
            state = {"velocity": gradient}
        return tree.map(lambda p, g: torch.add(p, g, alpha=-lr), params, gradient), state

    return Optimiser(init, update)


@checked
def adam(
    lr: Positive,
    beta1: Decay = 0.9,
    beta2: Decay = 0.999,
    epsilon: Positive = 1e-8,
    weight_decay: NonNegative = 0.0,
) -> Optimiser:
    """Adam with bias correction (Kingma, Ba, ICLR 2015, https://arxiv.org/abs/1412.6980)."""

    def init(params: Params) -> Tree:
        first = next(iter(params.values()))
        zeros = tree.map(torch.zeros_like, params)
        # Counted in float64 whatever the model's type: in bfloat16 257 is 256, and in float32 1 - beta2 is off by 1e-5.
        return {"steps": first.new_zeros((), dtype=torch.float64), "mean": zeros, "square": zeros}

    def update(gradient: Params, state: Tree, params: Params) -> tuple[Params, Tree]:
        if weight_decay:
            gradient = tree.map(lambda g, p: torch.add(g, p, alpha=weight_decay), gradient, params)
        steps = state["steps"] + 1
        mean = tree.map(lambda m, g: beta1 * m + (1 - beta1) * g, state["mean"], gradient)
        square = tree.map(lambda v, g: beta2 * v + (1 - beta2) * g * g, state["square"], gradient)
        size, root = lr / (1 - beta1**steps), (1 - beta2**steps).sqrt()
        params = tree.map(lambda p, m, v: p - size * m / (v.sqrt() / root + epsilon), params, mean, square)
        return params, {"steps": steps, "mean": mean, "square": square}

    return Optimiser(init, update)
