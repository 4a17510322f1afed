"""What is benchmarked: models, the shape of their examples, and how many clients do how much. Needs torch alone."""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

CLIENTS, EXAMPLES, BATCH = 1_000, 5_000, 10


class Case(NamedTuple):
    """A model, and how much of what is done with it; where nothing is learnt, clients only send the model back."""

    title: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    classes: int
    cohort: int
    each: int  # examples of a client
    lr: float
    rounds: int  # those that warm up included
    warm_up: int = 2
    without: tuple[str, ...] = ()  # systems that are not measured here

    @property
    def learns(self) -> bool:
        """Whether clients train."""
        return self.lr > 0


def perceptron(*widths: int) -> nn.Module:
    """A multi-layer perceptron of these widths."""
    parts: list[nn.Module] = []
    for into, out in zip(widths, widths[1:], strict=False):
        parts += [nn.Linear(into, out), nn.ReLU()]
    return nn.Sequential(*parts[:-1])


def convolutional() -> nn.Module:
    """Two unpadded convolutions and two layers behind them."""
    convolutions = (nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())
    return nn.Sequential(*convolutions, nn.Linear(12_544, 128), nn.ReLU(), nn.Linear(128, 10))


def tables(size: int) -> nn.Module:
    """8 equal tensors."""
    return nn.ParameterList(torch.randn(size // 8) for _ in range(8))


# What one would not do: a cluster, or Flower's 1,000 nodes, for clients that take a millisecond together.
IN_PROCESS = ("ray1", "ray2", "grid", "flower")
CASES = {
    "A": Case("CNN, 1,626,442 parameters", convolutional, (3, 32, 32), 10, 50, 50, 0.1, 3, 1, ("sequential", "grid")),
    "B": Case("logistic 784-10", partial(perceptron, 784, 10), (784,), 10, 10, 60, 0.03, 52, without=("ray1",)),
    "C": Case("MLP 784-200-200-10", partial(perceptron, 784, 200, 200, 10), (784,), 10, 50, 50, 0.1, 10),
    "logistic-100": Case("logistic 784-10", partial(perceptron, 784, 10), (784,), 10, 100, 60, 0.03, 17, 2, IN_PROCESS),
    "logistic-500": Case("logistic 100-2", partial(perceptron, 100, 2), (100,), 2, 500, 60, 0.03, 8, 2, IN_PROCESS),
    "mlp-100": Case("MLP 100-64-2", partial(perceptron, 100, 64, 2), (100,), 2, 100, 60, 0.03, 17, 2, IN_PROCESS),
    "E": Case(
        "1,000,000 parameters sent back", partial(tables, 1_000_000), (1,), 2, 50, 1, 0.0, 10, 2, ("sequential", "ray1")
    ),
    "E-small": Case(
        "1,000 parameters sent back", partial(tables, 1_000), (1,), 2, 10, 1, 0.0, 52, 2, ("sequential", "ray1", "grid")
    ),
}


def module(case: Case) -> nn.Module:
    """The model with its first parameters, the same in every process."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return case.build()


def pool(case: Case) -> tuple[Tensor, Tensor]:
    """The examples that all clients share: client u owns `each` consecutive ones, and behind the last is the first."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(EXAMPLES, *case.shape, generator=generator)
    return x, torch.randint(case.classes, (EXAMPLES,), generator=generator)


def gap(mine: dict[str, Tensor], reference: dict[str, Tensor]) -> float:
    """The largest difference between two models; infinite where one of them is not finite."""
    largest = torch.stack([(leaf - mine[name]).abs().max() for name, leaf in reference.items()]).max()
    return math.inf if largest.isnan() else float(largest)
