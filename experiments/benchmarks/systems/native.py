"""fedsim: a whole simulation, as `fedsim.simulate` runs it, with its metrics, its run directory and a last checkpoint.

What is left out is evaluation.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

import fedsim
from clients.sgd import Sgd
from experiments.benchmarks.cases import BATCH, CLIENTS, EXAMPLES, Case, module, pool
from experiments.benchmarks.measuring import Clock
from experiments.benchmarks.systems.contest import Work
from fedsim.client import Client
from fedsim.data.dataset import Dataset
from fedsim.data.federation import Federation, Partition, divide, schedule
from fedsim.engines.local import Sequential, auto
from fedsim.job import Plan
from fedsim.launch import EngineFor
from fedsim.model import Model
from fedsim.progress import Silent
from fedsim.sampling import uniform
from fedsim.task import Batch, Metrics, Reply
from fedsim.tree import Tree
from strategies.fedavg import FedAvg

SEED = 0


@dataclass(frozen=True)
class Echo(Client):
    """Sends back what it got."""

    def start(self, shared: Tree, personal: Tree, data: Batch) -> Tree:
        return shared

    def step(self, state: Tree, batch: Batch) -> Tree:
        return state

    def finish(self, shared: Tree, state: Tree, data: Batch) -> Reply:
        return Reply({"params": shared["params"]}, data["mask"].sum().float())


class Ticking(Silent):
    """Tells the clock of every round, once it is written down."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        clock(0)

    def show(self, metrics: Metrics) -> None:
        self.clock(int(metrics["round"]))


def federation(case: Case) -> Federation:
    """The pool, divided among the clients."""
    x, y = pool(case)
    offsets = np.arange(CLIENTS + 1) * case.each
    return divide(Dataset("random", {"x": x, "y": y}), Partition(np.arange(offsets[-1]) % EXAMPLES, offsets))


def client(case: Case, model: Model) -> Client:
    """What all clients do."""
    return Sgd(model, lr=case.lr, batch_size=BATCH) if case.learns else Echo(batch_size=BATCH)


def choices(case: Case) -> dict[str, Any]:
    """Whom fedsim will ask in each round, and in which order the clients will visit their examples."""
    numbers = range(1, case.rounds + 1)
    sample, everyone = uniform(CLIENTS, SEED, count=case.cohort), range(CLIENTS)
    sizes = np.full(CLIENTS, case.each)
    orders = [schedule(sizes, 1, BATCH, SEED, round, everyone).reshape(CLIENTS, case.each) for round in numbers]
    return {
        "cohorts": [sample(round).ids for round in numbers],
        "orders": torch.from_numpy(np.stack(orders).astype(np.int16)),
    }


def engine(system: str) -> EngineFor:
    """Where clients run."""
    if not system.startswith("ray"):
        return {"auto": auto, "sequential": Sequential}[system]
    from fedsim.engines.ray import Ray  # here, so that the others are measured without it

    return partial(Ray, workers=int(system.removeprefix("ray")))


def run(system: str, work: Work) -> None:
    """The simulation."""
    case, clock = work.case, work.clock()
    model = Model(module(case))
    result = fedsim.simulate(
        federation=federation(case),
        model=model,
        strategy=FedAvg(),
        clients={"train": client(case, model)},
        plan=Plan(case.rounds, seed=SEED, evaluate_every=0, checkpoint_every=case.rounds),
        sample=uniform(CLIENTS, SEED, count=case.cohort),
        engine=engine(system),
        root=work.folder / "runs",
        display=lambda label, rounds, done: Ticking(clock),
    )
    work.leave(clock, result.params, [int(line["clients"]) for line in result.metrics])
