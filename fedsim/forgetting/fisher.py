"""Fisher information: which parameters the memory of some examples hangs on; elastic weight consolidation.

Kirkpatrick et al., "Overcoming catastrophic forgetting in neural networks", PNAS 2017,
https://arxiv.org/abs/1612.00796, with the refinements for forgetting in a federation: over retained examples and those
to be forgotten, sums of the diagonal terms

    true:       sum_x sum_y p(y|x) (d_i log p(y|x))^2       empirical:  sum_x (d_i log p(y_x|x))^2

which clients send as sums with their counts, so that the server's total is what all examples together give. With F_r
the mean of the true one over retained examples and F_f the mean of both over those to be forgotten,

    Omega_i = F_r,i / (F_r,i + F_f,i + 1e-8), divided by its mean over i:

parameters that matter for what is forgotten alone are free. After each step the parameters are pulled back to where
they were before, theta*, by an implicit step, which is stable for any strength:

    theta <- theta* + (theta - theta*) / (1 + eta lambda Omega).

Symbols: `strength` is lambda, `lr` eta.
"""

from collections.abc import Callable
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.func import grad, vmap

from fedsim import tree
from fedsim.model import Model
from fedsim.task import Params
from fedsim.tree import Tree

AT_ONCE = 2**24  # numbers of gradients of single examples that are in memory at one time


class Evidence(NamedTuple):
    """Sums of Fisher terms over examples, and how many these are: what a client tells."""

    sums: Params
    examples: Tensor  # (), float64

    def plus(self, other: "Evidence") -> "Evidence":
        """Of both clients' examples together."""
        return Evidence(tree.map(torch.add, self.sums, other.sums), self.examples + other.examples)

    @property
    def mean(self) -> Params:
        """The mean over examples; zero where there are none."""
        return tree.map(lambda leaf: leaf / self.examples.clamp(min=1).to(leaf.dtype), self.sums)


def together(params: Params) -> int:
    """Of how many examples the gradients are in memory at one time, at most."""
    return max(1, AT_ONCE // max(1, sum(leaf.numel() for leaf in params.values())))


def true_fisher(model: Model, params: Params, inputs: Tensor, mask: Tensor | None = None) -> Evidence:
    """The true diagonal Fisher information of the inputs (n, ...), of those where the mask (n,) holds."""
    chance = model.predict(params, {model.inputs: inputs}).softmax(1)  # (n, K)
    mask = torch.ones(len(inputs), dtype=torch.bool) if mask is None else mask
    total = tree.map(torch.zeros_like, params)
    for label in range(chance.shape[1]):
        labels, weight = torch.full(mask.shape, label), torch.where(mask, chance[:, label], 0)
        total = tree.map(torch.add, total, _squares(model, params, inputs, labels, weight))
    return Evidence(total, mask.sum().double())


def empirical_fisher(
    model: Model, params: Params, inputs: Tensor, labels: Tensor, mask: Tensor | None = None
) -> Evidence:
    """The same with the labels (n,) that the examples have in the place of those that the model expects."""
    mask = torch.ones(len(inputs), dtype=torch.bool) if mask is None else mask
    return Evidence(_squares(model, params, inputs, labels, mask.to(torch.get_default_dtype())), mask.sum().double())


def _squares(model: Model, params: Params, inputs: Tensor, labels: Tensor, weight: Tensor) -> Params:
    """sum_x weight_x (d_i log p(label_x | x))^2."""

    def surprise(params: Params, x: Tensor, label: Tensor) -> Tensor:
        logits = model.predict(params, {model.inputs: x[None]})
        return torch.nn.functional.log_softmax(logits, 1)[0].gather(0, label[None])[0]

    each: Callable[..., Params] = vmap(grad(surprise), in_dims=(None, 0, 0))
    step = together(params)
    total = tree.map(torch.zeros_like, params)
    for start in range(0, len(inputs), step):
        part = slice(start, start + step)
        slopes = each(params, inputs[part], labels[part])
        share = weight[part]
        squares = tree.map(lambda g, share=share: torch.tensordot(share.to(g.dtype), g.square(), 1), slopes)
        total = tree.map(torch.add, total, squares)
    return total


def importance(retained: Evidence, forgotten: Evidence) -> Params:
    """Omega: how much of each parameter's importance is for what is retained; its mean over all of them is one.

    Args:
        retained: the true Fisher information of the retained examples.
        forgotten: the true and the empirical one, added up, of those to be forgotten.
    """
    ratio = tree.map(lambda r, f: r / (r + f + 1e-8), retained.mean, forgotten.mean)
    numbers = sum(leaf.numel() for leaf in ratio.values())
    mean = sum((leaf.double().sum() for leaf in ratio.values()), torch.zeros((), dtype=torch.float64)) / max(1, numbers)
    return tree.map(lambda leaf: leaf / mean.clamp(min=1e-30).to(leaf.dtype), ratio)


def expected(memory: bool, strength: float) -> dict[str, str]:
    """What a server must share for old memories, and for a pull -> what to set so that it does."""
    asked = {"before": 'set strategy.remember = "model"'} if memory else {}
    whole = 'set strategy.remember = "importance"'
    return asked | ({"before": whole, "omega": whole} if strength else {})


def pull(params: Params, shared: Tree, lr: float, strength: float) -> Params:
    """The parameters pulled back by what the server shares, "before" and "omega"; the same where strength is 0.

    Raises:
        ValueError: the server does not share them.
    """
    if not strength:
        return params
    if missing := {"before", "omega"} - shared.keys():
        told = " and ".join(sorted(missing))
        raise ValueError(f'strength = {strength} needs {told} of the server: set strategy.remember = "importance"')
    return pulled(params, cast(Params, shared["before"]), cast(Params, shared["omega"]), lr, strength)


def pulled(params: Params, before: Params, omega: Params, lr: float, strength: float) -> Params:
    """The parameters pulled back to where they were before, the nearer the larger the strength is."""
    return tree.map(lambda p, b, o: b + (p - b) / (1 + lr * strength * o), params, before, omega)
