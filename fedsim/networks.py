"""Networks to start with, sized by the federation that they are to be trained on."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import nn

from fedsim.data.federation import Federation
from fedsim.model import Model
from fedsim.ranges import Count, Natural, Probability, checked


def _classes(federation: Federation, target: str) -> int:
    if target in federation.names:
        return len(federation.names[target])
    raise ValueError(f"{federation.name} names no classes: a classifier needs names of the values of {target}")


def _features(federation: Federation) -> torch.Size:
    if "x" in federation.columns:
        return federation.columns["x"].shape[1:]
    raise ValueError(f"{federation.name} has no column x, only {', '.join(federation.columns)}")


def seeded(seed: int, build: Callable[[], nn.Module]) -> nn.Module:
    """What `build` makes, its first parameters a function of the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return build()


@checked
def logistic(federation: Federation, target: str = "y") -> Model:
    """Multinomial logistic regression, starting from zero; `target` is the column that it learns."""
    module = nn.Sequential(nn.Flatten(), nn.Linear(_features(federation).numel(), _classes(federation, target)))
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return Model(module, target=target)


@checked
def mlp(
    federation: Federation,
    seed: Natural = 0,
    hidden: Sequence[Count] = (200, 200),
    dropout: Probability = 0.0,
    target: str = "y",
) -> Model:
    """A multi-layer perceptron with ReLU; `target` is the column that it learns."""
    widths = [_features(federation).numel(), *hidden]

    def build() -> nn.Module:
        parts: list[nn.Module] = [nn.Flatten()]
        for into, out in pairwise(widths):
            parts += [nn.Linear(into, out), nn.ReLU(), *([nn.Dropout(dropout)] if dropout else [])]
        return nn.Sequential(*parts, nn.Linear(widths[-1], _classes(federation, target)))

    return Model(seeded(seed, build), target=target)


@checked
def cnn(
    federation: Federation,
    seed: Natural = 0,
    channels: Sequence[Count] = (16, 32),
    hidden: Count = 64,
    target: str = "y",
) -> Model:
    """A CNN: per entry of `channels` a 3x3 convolution, ReLU and 2x2 max pooling; one hidden layer.

    `target` is the column that it learns.
    """
    shape = _features(federation)
    if len(shape) != 3:
        raise ValueError(
            f"a cnn needs images (channels, height, width), {federation.name} has x of shape {tuple(shape)}"
        )
    depth, *size = shape
    size = [length // 2 ** len(channels) for length in size]
    if not all(size):
        raise ValueError(f"channels: {len(channels)} halvings leave nothing of {tuple(shape[1:])} images")

    def build() -> nn.Module:
        parts: list[nn.Module] = []
        for into, out in pairwise([depth, *channels]):
            parts += [nn.Conv2d(into, out, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        inner = nn.Linear([depth, *channels][-1] * size[0] * size[1], hidden)
        return nn.Sequential(*parts, nn.Flatten(), inner, nn.ReLU(), nn.Linear(hidden, _classes(federation, target)))

    return Model(seeded(seed, build), target=target)
