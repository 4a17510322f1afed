"""Sharpness: how much the loss that clients share rises around a solution, uphill and in random directions.

With theta the parameters that are shared, L_k(theta) client k's mean loss there (what it keeps stays as it is) and w_k
the weight of its reply,

    L(theta) = sum_k w_k L_k(theta) / sum_k w_k.

Uphill, as Foret, Kleiner, Mobahi, Neyshabur, "Sharpness-Aware Minimization for Efficiently Improving Generalization",
ICLR 2021, https://arxiv.org/abs/2010.01412, eq. 2, approximate the largest rise within a radius rho:

    L(theta + rho g / |g|) - L(theta),    g = grad L(theta)

In random directions, as Li, Xu, Taylor, Studer, Goldstein, "Visualizing the Loss Landscape of Neural Nets", NeurIPS
2018, https://arxiv.org/abs/1712.09913, section 4, normalise them by filter, so that solutions of another scale can be
compared:

    L(theta + t d) - L(theta),    d_row = |theta_row| z_row / |z_row|,    z standard normal

A row is all that stands at one index of a parameter's first axis: the weights of a neuron, a filter, an item's
embedding. Biases, and all else with less than two axes, do not move: so it is in the authors' code.

Differs from the papers: L is over all clients and all examples of one part, not over a batch. Dropout is off. Losses
are summed in float64, but computed in the type of theta: where rises are small, let that be float64 too.

    surface = Surface(auto(federation, losses(model)), Cohort(range(federation.num_clients)))
    ascent(surface, {"params": params}, [0.02, 0.05])
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fedsim import tree
from fedsim.client import Client
from fedsim.engines.engine import Engine
from fedsim.model import Model, gradient
from fedsim.randomness import generator
from fedsim.ranges import Count, Natural, NonNegative, checked
from fedsim.task import Batch, Cohort, Params, Reduce, Replies, Reply, Task
from fedsim.tree import Rows, Tree


@dataclass(frozen=True, kw_only=True)
class MeanLoss(Client):
    """A client's mean loss at the parameters that it is sent; or the loss's gradient. The weight is its examples.

    Attributes:
        model: gives the loss, without dropout.
        slope: whether the gradient is answered too.
        part: which part of a client's examples.
    """

    model: Model
    slope: bool = False
    part: Literal["train", "validation", "test"] = "train"
    batch_size: Count = 256

    @property
    def split(self) -> str:
        """Which part of a client's examples the loss is of."""
        return self.part

    def start(self, shared: Tree, personal: Tree, data: Batch) -> Tree:
        """Nothing seen yet."""
        params, zero = shared["params"], torch.zeros((), dtype=torch.float64)
        slope = {"slope": tree.map(torch.zeros_like, params)} if self.slope else {}
        return {"params": params, "loss": zero, "seen": zero} | slope

    def step(self, state: Tree, batch: Batch) -> Tree:
        """Adds one batch; in float64, for differences of losses are small."""
        mask = batch["mask"]

        def loss(params: Params) -> Tensor:
            losses = self.model.criterion(self.model.predict(params, batch), batch[self.model.target])
            return torch.where(mask, losses, 0.0).sum(dtype=torch.float64)

        if not self.slope:
            added = {"loss": state["loss"] + loss(state["params"])}
        else:
            value, slope = gradient(loss, state["params"])
            added = {"loss": state["loss"] + value, "slope": tree.map(torch.add, state["slope"], slope)}
        return state | added | {"seen": state["seen"] + mask.sum()}

    def finish(self, shared: Tree, state: Tree, data: Batch) -> Reply:
        """The mean over examples; zero, with weight zero, where there are none."""
        seen = state["seen"].clamp(min=1)
        update = {"params": tree.map(lambda leaf: leaf / seen.to(leaf.dtype), state["slope"])} if self.slope else {}
        return Reply(update, state["seen"], metrics={"loss": state["loss"] / seen})


def losses(
    model: Model, part: Literal["train", "validation", "test"] = "train", batch_size: int = 256
) -> dict[str, Client]:
    """The two clients that a `Surface` asks, for a method whose clients keep nothing of the model to themselves."""
    return {
        "loss": MeanLoss(model=model, part=part, batch_size=batch_size),
        "gradient": MeanLoss(model=model, part=part, batch_size=batch_size, slope=True),
    }


@dataclass(frozen=True, eq=False)
class Surface:
    """The loss that clients share, as a function of what they are sent.

    Attributes:
        engine: has a client for "loss", which measures its mean loss as the metric "loss", and one for "gradient",
            whose update is {"params": the gradient of that}.
        cohort: whose losses, with what they keep; that never changes here.
        round: of all that is asked. It is always the same, so that a client that draws its examples draws the same for
            each theta; training never has the round 0.
    """

    engine: Engine
    cohort: Cohort
    round: int = 0

    def loss(self, shared: Tree) -> float:
        """L.

        Raises:
            RuntimeError: a client failed.
            ValueError: no client has an example.
        """
        replies = self._ask("loss", shared, "stack")
        weight = replies.weight.double()
        some = weight > 0  # what weighs nothing counts for nothing, were it NaN
        return float((weight[some] * replies.metrics["loss"][some].double()).sum() / weight.sum())

    def gradient(self, shared: Tree) -> Params:
        """The gradient of L with respect to shared["params"], tables whole; raises as `loss`."""
        found: Params = self._ask("gradient", shared, "mean").update["params"]
        return tree.map(lambda leaf: leaf.dense() if isinstance(leaf, Rows) else leaf, found)

    def _ask(self, action: str, shared: Tree, reduce: Reduce) -> Replies:
        task = Task(action, shared, self.cohort.ids, self.round, reduce)
        replies = self.engine.execute(task, self.cohort)
        for ident, why in replies.failed.items():  # without it, it would be the loss of others
            raise RuntimeError(f"client {ident} did not answer its {action}: {why}")
        if not replies.weight.any():
            raise ValueError(f"none of the {len(self.cohort.ids)} clients has an example: there is no {action}")
        return replies


class Rises(NamedTuple):
    """How much the loss rises in random directions, for T steps."""

    mean: Tensor  # (T,)
    deviation: Tensor  # (T,), the sample standard deviation over directions; NaN for one direction
    each: Tensor  # (m, T)


@checked
def ascent(surface: Surface, shared: Tree, radii: Sequence[NonNegative]) -> Tensor:
    """L(theta + rho g / |g|) - L(theta) for each radius rho, (T,) in float64; zero where the gradient is zero.

    Args:
        surface: the loss.
        shared: what clients are sent, {"params": theta} and whatever else they need; of it, "params" is moved.
        radii: rho, each at least 0; in units of the parameters.

    Raises:
        ValueError: a radius is negative, or shared has no "params".
        RuntimeError: a client failed.
    """
    _check_shared(shared)
    slope = surface.gradient(shared)
    norm = tree.norm(slope)
    direction = tree.map(lambda leaf: leaf / norm, slope) if norm > 0 else slope
    return _along(surface, shared, direction, radii) - surface.loss(shared)


@checked
def scattered(surface: Surface, shared: Tree, steps: Sequence[float], number: Count = 10, seed: Natural = 0) -> Rises:
    """L(theta + t d) - L(theta) for each step t, over so many random directions d.

    Args:
        surface: the loss.
        shared: what clients are sent, {"params": theta} and whatever else they need; of it, "params" is moved.
        steps: t, in units of a row's own norm; of either sign, for -t d is a direction too.
        number: m, of directions; the first of them are the same for any m.
        seed: of the directions.

    Raises:
        ValueError: shared has no "params", or number < 1 or seed < 0.
        RuntimeError: a client failed.
    """
    _check_shared(shared)
    found = [_along(surface, shared, random_direction(shared["params"], seed, k), steps) for k in range(number)]
    each = torch.stack(found) - surface.loss(shared)  # (m, T)
    deviation = each.std(0) if number > 1 else torch.full_like(each[0], torch.nan)
    return Rises(each.mean(0), deviation, each)


def random_direction(params: Params, seed: int, number: int = 0) -> Params:
    """A Gaussian direction of which each row has the norm of the parameter's; zero for what has less than two axes.

    It is a function of (seed, number), and of a parameter's name, shape and row norms alone.
    """

    def drawn(name: str, leaf: Tensor) -> Tensor:
        if leaf.ndim < 2:
            return torch.zeros_like(leaf)
        random = generator(seed, "direction", number, name)
        normal = torch.randn(leaf.shape, generator=random, dtype=torch.float64).flatten(1)
        scale = leaf.flatten(1).double().norm(dim=1, keepdim=True).cpu() / normal.norm(dim=1, keepdim=True)
        direction: Tensor = (scale * normal).reshape(leaf.shape).to(leaf)
        return direction

    return {name: drawn(name, leaf) for name, leaf in params.items()}


def _check_shared(shared: Tree) -> None:
    if "params" not in shared:
        raise ValueError(
            f'shared must be {{"params": the parameters, ...}}, got the keys {", ".join(shared) or "none"}'
        )


def _along(surface: Surface, shared: Tree, direction: Params, steps: Sequence[float]) -> Tensor:
    """L(theta + t d) for each step t, (T,) in float64."""
    moved = (tree.map(lambda leaf, d, t=step: leaf + t * d, shared["params"], direction) for step in steps)
    return torch.tensor([surface.loss(shared | {"params": there}) for there in moved], dtype=torch.float64)
