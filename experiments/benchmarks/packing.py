"""What a round costs in process: clients one by one and packed, beside a plain PyTorch loop.

A round is configure, execute and aggregate of FedAvg with one epoch of SGD; every contestant visits the same batches,
of which the plain loop is told beforehand.
Prints CPU time as a multiple of the plain loop's, taken in turns: median, least and largest of the repetitions. A
contestant whose model differs from the plain loop's by more than 1e-4 is void. The CNN takes the longest, by far.
"""

import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from experiments.benchmarks.cases import BATCH, CASES, EXAMPLES, Case, gap, module
from experiments.benchmarks.measuring import spread
from experiments.benchmarks.systems.native import client, federation
from experiments.benchmarks.systems.plain import train
from fedsim.data.federation import schedule
from fedsim.engines.engine import Engine
from fedsim.engines.local import Sequential, Vectorised, auto
from fedsim.model import Model
from fedsim.task import Cohort, Params
from strategies.fedavg import FedAvg

ORDER = ("B", "logistic-100", "logistic-500", "mlp-100", "C", "A")
REPEATS, REPEATS_A = 9, 3


def whole(engine: Engine, model: Model, ids: list[int], round: int) -> Params:
    """One round of FedAvg on an engine."""
    strategy = FedAvg()
    state = strategy.init(model.params)
    task = strategy.configure(state, round)._replace(round=round)
    state, _ = strategy.aggregate(state, task, engine.execute(task, Cohort(ids)))
    return strategy.params(state)


def measure(name: str) -> None:
    """Prints one line a contestant."""
    case: Case = CASES[name]
    data, network = federation(case), module(case)
    model = Model(network)
    clients = {"train": client(case, model)}
    ids = list(range(case.cohort))
    first, sizes = list(model.params.values()), np.full(case.cohort, case.each)
    batches: list[list[Tensor]] = []

    def plain(round: int) -> Params:
        total = train(network, first, data.columns["x"], data.columns["y"], batches, case.lr, False)
        return dict(zip(model.params, total, strict=True))

    engines = {
        "sequential": Sequential(data, clients),
        "vectorised": Vectorised(data, clients),
        "auto": auto(data, clients),
    }
    if name == "A":  # which takes the longest, by far
        del engines["vectorised"]
    contestants: dict[str, Callable[[int], Params]] = {"plain": plain}
    for title, engine in engines.items():
        contestants[title] = lambda round, engine=engine: whole(engine, model, ids, round)
    times: dict[str, list[float]] = {title: [] for title in contestants}
    for round in range((REPEATS_A if name == "A" else REPEATS) + 1):
        order = schedule(sizes, 1, BATCH, 0, round, ids)  # of the engines' clients; before the clock starts
        owned = zip(ids, torch.from_numpy(order).unbind(), strict=True)
        batches[:] = [[(ident * case.each + step) % EXAMPLES for step in steps.unbind()] for ident, steps in owned]
        reference: Params = {}
        for title, contestant in contestants.items():
            start = time.process_time()
            params = contestant(round)
            if round:  # the first warms up
                times[title].append(time.process_time() - start)
            reference = reference or params
            if (far := gap(params, reference)) > 1e-4:
                raise RuntimeError(f"{name}, {title}: the model differs from the plain loop's by {far:.1e}: void")
    base = statistics.median(times["plain"]) * 1_000
    print(f"{name}: {case.title}, {case.cohort} clients: plain loop {base:.1f} ms a round")
    for title in list(times)[1:]:
        ratios = [mine / base for mine, base in zip(times[title], times["plain"], strict=True)]
        print(f"    {title:<11} {spread(ratios)}", flush=True)


def main() -> None:
    """Measures all cases, on one thread."""
    torch.set_num_threads(1)
    for name in ORDER:
        measure(name)


if __name__ == "__main__":
    main()
