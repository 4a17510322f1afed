"""What a client of a round costs in memory: a cohort of 1,000 beside one of 50, in process and over Ray.

Every client trains the CNN of 1,626,442 parameters for one step on one example, and FedAvg needs no more than the mean
of what they send. A run has a process of its own; its peak is the most that all its processes had at one time, memory
that they share counted once, as seen by somebody who looks ten times a second.
"""

import argparse
import statistics
import sys
import tempfile
from functools import partial
from pathlib import Path

import fedsim
from experiments.benchmarks.cases import CASES, CLIENTS, module
from experiments.benchmarks.measuring import Watch, check_system, spread, start
from experiments.benchmarks.systems.native import client, engine, federation
from fedsim.job import Plan
from fedsim.model import Model
from fedsim.sampling import uniform
from strategies.fedavg import FedAvg

ENGINES = {"auto": "in process", "ray2": "Ray, 2 workers"}
FEW, MANY, ROUNDS = 50, CLIENTS, 2


def simulate(system: str, cohort: int, folder: str) -> None:
    """One run."""
    case = CASES["A"]._replace(each=1)
    model = Model(module(case))
    fedsim.simulate(
        federation=federation(case),
        model=model,
        strategy=FedAvg(),
        clients={"train": client(case, model)},
        plan=Plan(ROUNDS, evaluate_every=0, checkpoint_every=ROUNDS),
        sample=uniform(CLIENTS, count=cohort),
        engine=engine(system),
        root=folder,
    )


def peak(system: str, cohort: int) -> float:
    """MB that one run had at most."""
    with tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True) as folder:
        watch = Watch()
        call = f"from experiments.benchmarks.memory import simulate; simulate({system!r}, {cohort}, {folder!r})"
        start([sys.executable, "-c", call], Path(folder), watch)
        return watch.peak


def main() -> None:
    """`python -m experiments.benchmarks.memory [--repeat N]`."""
    parser = argparse.ArgumentParser(prog="python -m experiments.benchmarks.memory", description=main.__doc__)
    parser.add_argument("--repeat", type=int, default=3, help="how often each of them runs")
    asked = parser.parse_args()
    if asked.repeat < 1:
        parser.error(f"--repeat must be at least 1, got {asked.repeat}")
    check_system()
    for system, title in ENGINES.items():
        take = partial(peak, system)
        taken = [(take(FEW), take(MANY)) for _ in range(asked.repeat)]
        few, many = (statistics.median(peaks) for peaks in zip(*taken, strict=True))
        print(
            f"{title:<15} cohort of {FEW}: {few:.0f} MB, of {MANY:,}: {many:.0f} MB, "
            f"ratio {spread([large / small for small, large in taken])}",
            flush=True,
        )


if __name__ == "__main__":
    main()
