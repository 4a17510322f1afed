"""What a contestant's process does: `python -m experiments.benchmarks.systems.contest SYSTEM CASE FOLDER`.

The folder holds the work: who takes part in each round, and in which order every client visits its examples. That is
fedsim's own choice, of which the others are told beforehand. There the contestant leaves what it measured, and the
last model.
"""

import os
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from experiments.benchmarks.cases import BATCH, CASES, EXAMPLES, Case
from experiments.benchmarks.measuring import Clock

BESIDE = "experiments.benchmarks.systems"


class System(NamedTuple):
    """A contestant: what it is called, the module and function that run it, and whether it draws cohorts itself."""

    title: str
    module: str
    draws: bool = False


SYSTEMS = {
    "plain": System("plain loop", "plain"),
    "auto": System("fedsim", "native"),
    "sequential": System("fedsim, one by one", "native"),
    "ray1": System("fedsim, Ray, 1 worker", "native"),
    "ray2": System("fedsim, Ray, 2 workers", "native"),
    "grid": System("Flower app on fedsim", "flower", True),
    "flower": System("Flower's simulation, 2 actors", "flower", True),
    "pfl": System("pfl", "pfl"),
    "pfl2": System("pfl, 2 processes", "pfl"),
}


class Work:
    """What is to be done in a case, as the comparing process wrote it down."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        self.case: Case = CASES[name]
        given = torch.load(folder / "work.pt")
        self.cohorts: list[list[int]] = given["cohorts"]  # a list a round
        self.orders: Tensor = given["orders"]  # (rounds, CLIENTS, each): the order of its examples
        self.rounded: bool = given.get("rounded", False)  # the plain loop rounds products of a mean, as Flower does

    def examples(self, round: int, client: int) -> Tensor:
        """Rows of the pool that a client visits in a round (counted from 1), in this order."""
        return (client * self.case.each + self.orders[round - 1, client].long()) % EXAMPLES

    def batches(self, round: int, client: int) -> tuple[Tensor, ...]:
        """The same, cut into batches."""
        return torch.split(self.examples(round, client), BATCH)

    def visits(self) -> Iterator[tuple[int, int]]:
        """(round, client), one after the other."""
        return ((round, client) for round, cohort in enumerate(self.cohorts, 1) for client in cohort)

    def clock(self) -> Clock:
        """To be told of every round."""
        return Clock(self.case.rounds, self.case.warm_up)

    def leave(self, clock: Clock, model: dict[str, Tensor], replies: list[int], **more: Any) -> None:
        """Writes down what was measured, the model after the last round, and how many answered in each."""
        found = clock.measured() | {"model": {name: leaf.detach() for name, leaf in model.items()}, "replies": replies}
        torch.save(found | more, self.folder / "found.part")
        os.replace(self.folder / "found.part", self.folder / "found.pt")


def main() -> None:
    """Runs one contestant."""
    system, name, folder = sys.argv[1:]
    torch.set_num_threads(1)
    import_module(f"{BESIDE}.{SYSTEMS[system].module}").run(system, Work(name, Path(folder)))


if __name__ == "__main__":
    main()
