"""Clients per second on one GPU: one by one, packed, and packed on 1, 2, 4 and 8 workers that share it.

Cases A and C of `systems`, with a whole round of FedAvg: configure, execute, aggregate. Without a GPU, `--device cpu`
shows that it works, and nothing else.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterable

import torch

from experiments.benchmarks.cases import CASES, CLIENTS, Case, module
from experiments.benchmarks.measuring import spread
from experiments.benchmarks.systems.native import SEED, client, federation
from fedsim.engines.engine import Engine
from fedsim.engines.local import Sequential, Vectorised
from fedsim.engines.ray import Ray
from fedsim.model import Model
from fedsim.sampling import uniform
from fedsim.simulation import begin, rounds
from strategies.fedavg import FedAvg

WORKERS, WARM_UP, ROUNDS = (1, 2, 4, 8), 2, 5


def engines(case: Case, model: Model, device: str, workers: Iterable[int]) -> dict[str, Callable[[], Engine]]:
    """The contestants, by what they are called."""
    data, clients = federation(case), {"train": client(case, model)}
    share = 0.0 if device == "cpu" else 1.0

    def on(number: int) -> Engine:
        return Ray(data, clients, SEED, number, 0.5, share / number, inner="vectorised")

    found: dict[str, Callable[[], Engine]] = {
        "one by one": lambda: Sequential(data, clients, SEED, device),
        "packed": lambda: Vectorised(data, clients, SEED, device=device),
    }
    return found | {f"{number} workers, packed": lambda number=number: on(number) for number in workers}  # type: ignore[misc]


def pace(case: Case, model: Model, make: Callable[[], Engine], cohort: int) -> float:
    """Clients per second, the median of some rounds."""
    strategy = FedAvg()
    snapshot = begin(strategy, model.params, {}, CLIENTS, SEED)
    seconds = []
    with make() as engine:
        steps = rounds(strategy, engine, uniform(CLIENTS, SEED, count=cohort), snapshot, min_replies=cohort)
        for number in range(WARM_UP + ROUNDS):
            start = time.perf_counter()
            next(steps)
            if number >= WARM_UP:
                seconds.append(time.perf_counter() - start)
    return cohort / statistics.median(seconds)


def main() -> None:
    """`python -m experiments.benchmarks.gpu [--device cpu] [--cohort N] [--repeat N] [--workers N ...]`."""
    parser = argparse.ArgumentParser(prog="python -m experiments.benchmarks.gpu", description=main.__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--cohort", type=int, default=200, help="clients a round, of 1,000")
    parser.add_argument("--repeat", type=int, default=5, help="how often each contestant runs, in turns")
    parser.add_argument("--workers", type=int, nargs="+", default=list(WORKERS))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    for name in ("A", "C"):
        case = CASES[name]
        model = Model(module(case))
        contestants = engines(case, model, asked.device, asked.workers)
        taken: dict[str, list[float]] = {title: [] for title in contestants}
        for _ in range(asked.repeat):
            for title, make in contestants.items():
                taken[title].append(pace(case, model, make, asked.cohort))
        print(f"{name}: {case.title}, {asked.cohort} clients a round, on {asked.device}")
        for title, paces in taken.items():
            faster = spread([mine / alone for mine, alone in zip(paces, taken["one by one"], strict=True)])
            print(f"    {title:<20} {statistics.median(paces):10.1f} clients/s  {faster} x one by one", flush=True)


if __name__ == "__main__":
    main()
