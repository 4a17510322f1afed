"""Phases of a strategy that trains and then serves requests to forget: which one a state is in, and what it asks."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from fedsim import tree
from fedsim.runs import trained
from fedsim.task import Params, Task
from fedsim.tree import Tree


class Phase(NamedTuple):
    """So many rounds of one action, with what the server says of requests (`fedsim.forgetting.requests`)."""

    action: str
    rounds: int
    request: int = 0
    deleted: int = 0


def planned(
    training: int, num_targets: int, together: bool, serve: Callable[[int, int], Sequence[Phase]], served: int = 0
) -> list[Phase]:
    """Training, then what `serve` gives for the "request" and "deleted" of each request; phases of no rounds left out.

    Args:
        training: rounds of it.
        num_targets: one more than there are requests.
        together: all are dealt with as one.
        serve: the phases of one request.
        served: how many requests have been dealt with before.
    """
    last = num_targets - 1
    steps = [(last, served)] if together else [(request, request - 1) for request in range(served + 1, last + 1)]
    phases = [Phase("train", training), *(phase for step in steps for phase in serve(*step))]
    return [phase for phase in phases if phase.rounds]


def check(training: int, from_run: Path | None, num_targets: int) -> None:
    """Raises ValueError for two models to begin with, or no request."""
    if training and from_run is not None:
        raise ValueError(f"training = {training} and from_run = {str(from_run)!r}: there can be one only")
    if num_targets < 2:
        raise ValueError("num_targets must be at least 2, what is kept and a request: nothing is to be forgotten")


def first(params: Params, from_run: Path | None, seed: int) -> Tree:
    """The state before the first phase: a run's model, or this one, and counters."""
    if from_run is not None:
        params = tree.restore(trained(from_run, seed), params, f"the model of {from_run}")
    zero = torch.zeros((), dtype=torch.int64)
    return {"params": params, "phase": zero, "rounds": zero.clone()}  # rounds of the phase that are done


def over(plan: Sequence[Phase], state: Tree) -> bool:
    """Whether all phases are."""
    return int(state["phase"]) >= len(plan)


def nobody(plan: Sequence[Phase], state: Tree) -> Task:
    """What is asked where a loop, such as Flower's, goes on after the last phase."""
    return Task(plan[-1].action, {"params": state["params"]}, (), reduce="mean")
