"""What a round costs in process: clients one by one and packed, beside a plain PyTorch loop.

A round is configure, execute and aggregate of FedAvg with one epoch of SGD; every contestant visits the same batches.
Prints CPU time as a multiple of the plain loop's, taken in turns: median, least and largest of the repetitions. A
contestant whose model differs from the plain loop's by more than 1e-4 is void. The CNN takes the longest, by far.
"""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from clients.sgd import Sgd
from fedsim.data.dataset import Dataset
from fedsim.data.federation import Federation, Partition, divide, schedule
from fedsim.engines.engine import Engine
from fedsim.engines.local import Sequential, Vectorised, auto
from fedsim.model import Model
from fedsim.networks import seeded
from fedsim.task import Cohort, Params
from strategies.fedavg import FedAvg

EXAMPLES, CLIENTS, LR, REPEATS = 5_000, 1_000, 0.05, 9


class Case(NamedTuple):
    """A model, the shape of its examples, and a cohort."""

    name: str
    shape: tuple[int, ...]
    classes: int
    build: Callable[[], nn.Module]
    cohort: int
    each: int
    repeats: int = REPEATS


def perceptron(*widths: int) -> Callable[[], nn.Module]:
    """A multi-layer perceptron of these widths."""

    def build() -> nn.Module:
        parts: list[nn.Module] = [nn.Flatten()]
        for into, out in zip(widths, widths[1:], strict=False):
            parts += [nn.Linear(into, out), nn.ReLU()]
        return nn.Sequential(*parts[:-1])

    return build


def convolutional() -> nn.Module:
    """Two unpadded convolutions and two layers behind them, 1,626,442 parameters."""
    convolutions = (nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())
    return nn.Sequential(*convolutions, nn.Linear(12_544, 128), nn.ReLU(), nn.Linear(128, 10))


CASES = (
    Case("logistic 784-10, 10 clients", (784,), 10, perceptron(784, 10), 10, 60),
    Case("logistic 784-10, 100 clients", (784,), 10, perceptron(784, 10), 100, 60),
    Case("logistic 100-2, 500 clients", (100,), 2, perceptron(100, 2), 500, 60),
    Case("MLP 100-64-2, 100 clients", (100,), 2, perceptron(100, 64, 2), 100, 60),
    Case("MLP 784-200-200-10, 50 clients", (784,), 10, perceptron(784, 200, 200, 10), 50, 50),
    Case("CNN 1.6M, 50 clients", (3, 32, 32), 10, convolutional, 50, 50, 3),
)


def plain(model: Model, federation: Federation, ids: list[int], round: int) -> Params:
    """One round as one would write it without a framework."""
    module = model.module
    weights = list(module.parameters())
    total = [torch.zeros_like(weight) for weight in weights]
    examples = 0
    for ident in ids:
        with torch.no_grad():
            for weight, first in zip(weights, model.params.values(), strict=True):
                weight.copy_(first)
        data = federation.examples(ident)
        size = len(data["y"])
        for rows in schedule(np.array([size]), 1, 10, 0, round, [ident])[0]:
            index = torch.from_numpy(rows)
            loss = functional.cross_entropy(module(data["x"][index]), data["y"][index])
            gradients = torch.autograd.grad(loss, weights)
            with torch.no_grad():
                torch._foreach_add_(weights, gradients, alpha=-LR)
        with torch.no_grad():
            torch._foreach_add_(total, weights, alpha=size)
        examples += size
    return {name: leaf / examples for name, leaf in zip(model.params, total, strict=True)}


def whole(engine: Engine, model: Model, ids: list[int], round: int) -> Params:
    """One round of FedAvg on an engine."""
    strategy = FedAvg()
    state = strategy.init(model.params)
    task = strategy.configure(state, round)._replace(round=round)
    state, _ = strategy.aggregate(state, task, engine.execute(task, Cohort(ids)))
    return strategy.params(state)


def measure(case: Case) -> None:
    """Prints one line a contestant."""
    generator = torch.Generator().manual_seed(0)
    columns = {
        "x": torch.randn(EXAMPLES, *case.shape, generator=generator),
        "y": torch.randint(case.classes, (EXAMPLES,), generator=generator),
    }
    offsets = np.arange(CLIENTS + 1) * case.each
    federation = divide(Dataset("random", columns), Partition(np.arange(offsets[-1]) % EXAMPLES, offsets))
    model = Model(seeded(0, case.build))
    clients = {"train": Sgd(model, lr=LR, batch_size=10)}
    ids = list(range(case.cohort))
    engines = {
        "sequential": Sequential(federation, clients),
        "vectorised": Vectorised(federation, clients),
        "auto": auto(federation, clients),
    }
    if case.repeats < REPEATS:
        del engines["vectorised"]
    contestants: dict[str, Callable[[int], Params]] = {"plain": lambda round: plain(model, federation, ids, round)}
    for name, engine in engines.items():
        contestants[name] = lambda round, engine=engine: whole(engine, model, ids, round)
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for round in range(case.repeats + 1):
        reference: Params = {}
        for name, contestant in contestants.items():
            start = time.process_time()
            params = contestant(round)
            if round:  # the first warms up
                times[name].append(time.process_time() - start)
            reference = reference or params
            gap = max(float((params[leaf] - reference[leaf]).abs().max()) for leaf in params)
            if gap > 1e-4:
                raise RuntimeError(f"{case.name}, {name}: the model differs from the plain loop's by {gap:.1e}: void")
    print(f"{case.name}: plain loop {statistics.median(times['plain']) * 1000:.1f} ms a round")
    for name in list(times)[1:]:
        ratios = [mine / base for mine, base in zip(times[name], times["plain"], strict=True)]
        print(f"    {name:<11} {statistics.median(ratios):.2f}  ({min(ratios):.2f} to {max(ratios):.2f})", flush=True)


def main() -> None:
    """Measures all cases, on one thread."""
    torch.set_num_threads(1)
    for case in CASES:
        measure(case)


if __name__ == "__main__":
    main()
