"""The rounds as one would write them without a framework: what all others are compared with."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from experiments.benchmarks.cases import module, pool
from experiments.benchmarks.systems.contest import Work

Steps = Sequence[Tensor]  # rows of the pool, those of each batch


def train(
    model: nn.Module, current: Sequence[Tensor], x: Tensor, y: Tensor, cohort: Sequence[Steps], lr: float, rounded: bool
) -> list[Tensor]:
    """One round: the mean of what becomes of the `current` parameters at each client; all have equally many examples.

    A mean is `rounded` as Flower does it: a last bit more or less grows to 1e-4 in some rounds where there are ReLUs.
    """
    weights: list[Tensor] = list(model.parameters())
    total = [torch.zeros_like(weight) for weight in current]
    share = 1 / len(cohort)
    for steps in cohort:
        with torch.no_grad():
            torch._foreach_copy_(weights, current)
        for rows in steps:
            loss = functional.cross_entropy(model(x[rows]), y[rows])
            gradients = torch.autograd.grad(loss, weights)
            with torch.no_grad():
                torch._foreach_add_(weights, gradients, alpha=-lr)
        with torch.no_grad():
            if rounded:
                torch._foreach_mul_(weights, share)
                torch._foreach_add_(total, weights)
            else:
                torch._foreach_add_(total, weights, alpha=share)
    return total


def run(system: str, work: Work) -> None:
    """All rounds."""
    case, model = work.case, module(work.case)
    current = [weight.detach().clone() for weight in model.parameters()]
    x, y = pool(case)
    rounds: list[list[Steps]] = [  # before the clock starts
        [work.batches(round, client) if case.learns else () for client in cohort]
        for round, cohort in enumerate(work.cohorts, 1)
    ]
    clock = work.clock()
    clock(0)
    for round, cohort in enumerate(rounds, 1):
        current = train(model, current, x, y, cohort, case.lr, work.rounded)
        clock(round)
    names = [name for name, _ in model.named_parameters()]
    work.leave(clock, dict(zip(names, current, strict=True)), [len(cohort) for cohort in work.cohorts])
