"""Optimisers as pairs of pure functions, for clients and servers alike."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedsim import tree
from fedsim.ranges import Decay, NonNegative, Positive, Probability, checked
from fedsim.task import Params
from fedsim.tree import Rows, Tree

PIECE = 2**18  # numbers that are stepped at a time where memory is written over: they fit into a cache


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


def clipped(gradient: Params, largest: float) -> Params:
    """The gradient, scaled down where its norm over all parameters is larger than this."""
    factor = (largest / tree.norm(gradient).clamp(min=1e-12)).clamp(max=1)
    return tree.map(lambda leaf: leaf * factor.to(leaf.dtype), gradient)


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
        mean, square = (tree.map(torch.zeros_like, params) for _ in range(2))  # in memory of their own: see `overwrite`
        # Counted in float64 whatever the model's type: in bfloat16 257 is 256, and in float32 1 - beta2 is off by 1e-5.
        return {"steps": first.new_zeros((), dtype=torch.float64), "mean": mean, "square": square}

    def update(gradient: Params, state: Tree, params: Params) -> tuple[Params, Tree]:
        if weight_decay:
            gradient = tree.map(lambda g, p: torch.add(g, p, alpha=weight_decay), gradient, params)
        steps = state["steps"] + 1
        mean = tree.map(lambda m, g: beta1 * m + (1 - beta1) * g, state["mean"], gradient)
        square = tree.map(lambda v, g: beta2 * v + (1 - beta2) * g * g, state["square"], gradient)
        size, root = lr / (1 - beta1**steps), (1 - beta2**steps).sqrt()

        def step(p: Tensor, m: Tensor, v: Tensor) -> Tensor:
            moved: Tensor = p - size * m / (v.sqrt() / root + epsilon)
            return moved.to(p.dtype)  # which a parameter of one number would take from `size` otherwise

        params = tree.map(step, params, mean, square)
        return params, {"steps": steps, "mean": mean, "square": square}

    return Optimiser(init, update)


def overwrite(optimiser: Optimiser, gradient: Tree, state: Tree, params: Params) -> tuple[Tree, dict[str, float]]:
    """Writes an update over the parameters and the optimiser's state, some rows at a time.

    Gives the state back, and how far each parameter was moved (the Euclidean distance).

    The numbers are those of `optimiser.update`, to the bit, for a rule that treats each number by itself, as those here
    do. The gradient of a table may be merged `Rows`: each of them once and in order; the others' is zero.

    Raises:
        ValueError: rows are not merged, or are none of the table's. Nothing is written then.
    """
    for name, leaf in gradient.items():
        if isinstance(leaf, Rows) and (
            leaf.size != len(params[name])
            or (len(leaf.index) and not (int(leaf.index[0]) >= 0 and int(leaf.index[-1]) < leaf.size))
            or not (leaf.index.diff() > 0).all()
        ):
            raise ValueError(f"{name}: the rows of a gradient must be merged, and of {len(params[name])} there are")
    scalars = {name: leaf for name, leaf in state.items() if not isinstance(leaf, dict)}
    tables = {name: branch for name, branch in state.items() if isinstance(branch, dict)}
    after, distance = scalars, {}
    for name, leaf in params.items():
        squares = 0.0
        for rows in _pieces(leaf):
            before = {key: {name: branch[name][rows]} for key, branch in tables.items()}
            slope, old = _rows(gradient[name], leaf, rows), leaf[rows]
            new, rest = optimiser.update({name: slope}, scalars | before, {name: old})
            squares += float((new[name] - old).square().sum())
            leaf[rows] = new[name]
            for key, branch in tables.items():
                branch[name][rows] = rest[key][name]
            after = {key: rest[key] for key in scalars}
        distance[name] = math.sqrt(squares)
    return after | tables, distance


def _pieces(leaf: Tensor) -> list[Any]:
    """What to index a tensor by, to have all of it in pieces."""
    if not leaf.ndim:
        return [...]
    step = max(1, PIECE // max(1, leaf[:1].numel()))
    return [slice(start, min(start + step, len(leaf))) for start in range(0, len(leaf), step)]


def _rows(gradient: Tensor | Rows, like: Tensor, rows: Any) -> Tensor:
    """These rows of a gradient that has the shape of `like`."""
    if not isinstance(gradient, Rows):
        return gradient[rows]
    first, last = torch.searchsorted(gradient.index, torch.tensor([rows.start, rows.stop])).tolist()
    dense = torch.zeros_like(like[rows])
    dense[gradient.index[first:last] - rows.start] = gradient.values[first:last].to(dense.dtype)
    return dense
