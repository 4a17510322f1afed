"""What an unmodified Flower app costs: on fedsim's in-process grid, on Flower's own simulation, and as a plain loop.

The app is a ServerApp with Flower's FedAvg, and a ClientApp that loads the arrays into a model that stays, trains and
replies. Cases B (logistic regression), C (perceptron) and A (CNN) train; in E clients only send back what they got. A
pool of 5,000 generated examples is shared by 1,000 clients. Every contestant has a process of its own, in turns; the
plain loop does the same steps of the same clients that the app's server had drawn. Counted is the CPU time of whole
process trees, Ray's daemons and actors with them, a round, without the first two rounds. A contestant whose last model
differs from the plain loop's by more than 1e-4 is void.
"""

import argparse
import math
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from torch import Tensor, nn
from torch.nn import functional

CLIENTS, EXAMPLES, BATCH, WARM_UP, TOLERANCE = 1_000, 5_000, 10, 2, 1e-4
ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
    # Else it depends on what was freed before whether memory goes back to the system: a tenth of the CNN's time.
    "MALLOC_MMAP_THRESHOLD_": str(2**25),
    "MALLOC_TRIM_THRESHOLD_": str(2**30),
}


class Case(NamedTuple):
    """A model, and how much of what is done with it; no examples: clients only send the model back."""

    title: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    cohort: int
    each: int
    lr: float
    rounds: int
    systems: tuple[str, ...] = ("fedsim's grid", "Flower's simulation")


def perceptron() -> nn.Module:
    """Three layers."""
    return nn.Sequential(nn.Linear(784, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 10))


def convolutional() -> nn.Module:
    """Two unpadded convolutions and two layers behind them."""
    convolutions = (nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())
    return nn.Sequential(*convolutions, nn.Linear(12_544, 128), nn.ReLU(), nn.Linear(128, 10))


def tables() -> nn.Module:
    """8 equal tensors."""
    return nn.ParameterList(torch.randn(125_000) for _ in range(8))


CASES = {
    "B": Case("logistic 784-10", partial(nn.Linear, 784, 10), (784,), 10, 60, 0.03, 27),
    "C": Case("MLP 784-200-200-10", perceptron, (784,), 50, 50, 0.1, 10),
    "E": Case("1,000,000 parameters sent back", tables, (), 50, 0, 0.0, 6),
    "A": Case("CNN, 1,626,442 parameters", convolutional, (3, 32, 32), 50, 50, 0.1, 3, ("fedsim's grid",)),
}


# What the app and the plain loop have in common.


@cache
def resident(name: str) -> nn.Module:
    """The one model that a process has of a case, overwritten for every client."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return CASES[name].build()


@cache
def examples(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """What all clients draw from."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(EXAMPLES, *shape, generator=generator)
    return x, torch.randint(10, (EXAMPLES,), generator=generator)


def learn(name: str, client: int) -> None:
    """Trains the resident model on a client's examples, once through."""
    case, model = CASES[name], resident(name)
    weights: list[Tensor] = list(model.parameters())
    x, y = examples(case.shape)
    for rows in torch.split(torch.arange(client * case.each, (client + 1) * case.each) % EXAMPLES, BATCH):
        loss = functional.cross_entropy(model(x[rows]), y[rows])
        gradients = torch.autograd.grad(loss, weights)
        with torch.no_grad():
            torch._foreach_add_(weights, gradients, alpha=-case.lr)


# The app.

trainer, echo = ClientApp(), ClientApp()


@trainer.train()
def train(message: Message, context: Context) -> Message:
    """A client that trains."""
    name, client = str(message.content["config"]["case"]), int(context.node_config["partition-id"])
    model, arrays = resident(name), cast(ArrayRecord, message.content["arrays"])
    model.load_state_dict(arrays.to_torch_state_dict())
    learn(name, client)
    return reply(message, client, CASES[name].each, model.state_dict())


@echo.train()
def send_back(message: Message, context: Context) -> Message:
    """A client that does nothing but decode and encode."""
    arrays = cast(ArrayRecord, message.content["arrays"])
    return reply(message, int(context.node_config["partition-id"]), 1, arrays.to_torch_state_dict())


def reply(message: Message, client: int, size: int, arrays: dict[str, Tensor]) -> Message:
    """What a client answers."""
    metrics = MetricRecord({"num-examples": size, "client": client})
    return Message(RecordDict({"arrays": ArrayRecord(arrays), "metrics": metrics}), reply_to=message)


def server(name: str, file: Path) -> ServerApp:
    """The app's server, which writes down what it measured, whom it had drawn, and the last model."""
    app, case = ServerApp(), CASES[name]
    cohorts: list[list[int]] = []

    def remember(replies: list[RecordDict], weighted_by: str) -> MetricRecord:
        cohorts.append([int(str(content["metrics"]["client"])) for content in replies])
        return MetricRecord({"replies": len(replies)})

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        random.seed(0)
        clock = Clock(case.rounds)
        strategy = FedAvg(
            fraction_train=case.cohort / CLIENTS,
            fraction_evaluate=0.0,
            min_train_nodes=case.cohort,
            min_available_nodes=CLIENTS,
            train_metrics_aggr_fn=remember,
        )
        result = strategy.start(
            grid,
            initial_arrays=ArrayRecord(resident(name).state_dict()),
            num_rounds=case.rounds,
            train_config=ConfigRecord({"case": name}),
            evaluate_fn=lambda round, arrays: clock(round),
        )
        replies = [len(cohort) for cohort in cohorts]
        if replies != [case.cohort] * case.rounds:
            raise RuntimeError(f"{case.cohort} replies in each of {case.rounds} rounds expected, got {replies}")
        torch.save(clock.measured() | {"cohorts": cohorts, "model": result.arrays.to_torch_state_dict()}, file)

    return app


# The contestants, each in a process of its own.


def on_grid(name: str, file: Path) -> None:
    """The app on fedsim's grid."""
    from fedsim.flower import run  # here, so that Flower's simulation runs in processes without anything of fedsim

    run(server(name, file), trainer if CASES[name].each else echo, num_nodes=CLIENTS, seed=0)


def on_simulation(name: str, file: Path) -> None:
    """The app on Flower's simulation, with 2 actors of one processor each, on a Ray of its own."""
    from flwr.simulation import run_simulation

    ray = {"address": "local", "num_cpus": 2, "_temp_dir": str(file.parent / "ray")}
    config: Any = {"init_args": ray, "client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
    run_simulation(server(name, file), trainer if CASES[name].each else echo, CLIENTS, backend_config=config)


SYSTEMS = {"fedsim's grid": on_grid, "Flower's simulation": on_simulation}


def plain(name: str, file: Path, cohorts: Iterable[list[int]]) -> None:
    """The same rounds as one would write them without a framework."""
    case, model = CASES[name], resident(name)
    weights: list[Tensor] = list(model.parameters())
    current = [weight.detach().clone() for weight in weights]
    clock = Clock(case.rounds)
    clock(0)
    for round, cohort in enumerate(cohorts, 1):
        total = [torch.zeros_like(weight) for weight in current]
        for client in cohort:
            with torch.no_grad():
                torch._foreach_copy_(weights, current)
            learn(name, client)
            with torch.no_grad():
                torch._foreach_mul_(weights, case.each / (case.each * len(cohort)))  # rounded here, as Flower does:
                torch._foreach_add_(total, weights)  # a last bit more or less grows to 1e-4 where there are ReLUs
        current = total
        clock(round)
    with torch.no_grad():
        torch._foreach_copy_(weights, current)
    torch.save(clock.measured() | {"model": model.state_dict()}, file)


def contest(contestant: str, name: str, folder: str) -> None:
    """What a process started by `score` does: a system's app, or the plain loop with the clients of a system's."""
    file = Path(folder, contestant)
    if contestant in SYSTEMS:
        SYSTEMS[contestant](name, file)
    else:
        plain(name, file, torch.load(file.with_name(contestant.removeprefix("plain ")))["cohorts"])


# Measuring.


class Clock:
    """Told of the end of every round, of the start as round 0; measures what comes after the first rounds."""

    def __init__(self, rounds: int) -> None:
        self.rounds = rounds
        self.start = self.end = 0.0
        self.walls: list[float] = []

    def __call__(self, round: int) -> None:
        if round == WARM_UP:
            self.start = descendants() + time.process_time()  # in this order, and the other way round at the end, so
        if round == self.rounds:
            self.end = time.process_time() + descendants()  # that what it takes to find the processes is not counted
        self.walls.append(time.perf_counter())

    def measured(self) -> dict[str, float]:
        """Seconds a round: CPU time of all processes on average, wall time as the median."""
        walls = [after - before for before, after in pairwise(self.walls[WARM_UP:])]
        return {"cpu": (self.end - self.start) / (self.rounds - WARM_UP), "wall": statistics.median(walls)}


def descendants() -> float:
    """CPU seconds of all processes that descend from this one; those included that have ended and been waited for."""
    ticks: dict[int, int] = {}
    children: dict[int, list[int]] = defaultdict(list)
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = stat.read_text()
        except (FileNotFoundError, ProcessLookupError):  # it has just ended
            continue
        fields = text.rpartition(")")[2].split()  # what stands before is the name, which may hold anything
        process, parent = int(stat.parent.name), int(fields[1])
        ticks[process] = sum(map(int, fields[11:15]))
        children[parent].append(process)
    found = list(children[os.getpid()])
    for process in found:  # which grows meanwhile
        found += children[process]
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return ended.ru_utime + ended.ru_stime + sum(ticks[process] for process in found) / os.sysconf("SC_CLK_TCK")


def score(contestant: str, name: str, folder: Path) -> dict[str, Any]:
    """What one run of a contestant measured."""
    code = f"from experiments.benchmarks.flower import contest; contest({contestant!r}, {name!r}, {str(folder)!r})"
    inherited = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    settings = inherited | ENVIRONMENT | {"FLWR_HOME": str(folder / "flwr")}
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=settings, capture_output=True, text=True)
    if ran.returncode or not (folder / contestant).exists():
        sys.exit(f"{name}, {contestant}: exit code {ran.returncode}\n{(ran.stdout + ran.stderr)[-4_000:]}")
    scores: dict[str, Any] = torch.load(folder / contestant)
    return scores


def duel(system: str, name: str) -> dict[str, float]:
    """What one run of the app measured, and a plain loop over the same clients right after it."""
    with tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True) as folder:
        app = score(system, name, Path(folder))
        if CASES[name].each:
            loop = score(f"plain {system}", name, Path(folder))
        else:  # nothing is trained
            loop = {"cpu": math.nan, "model": resident(name).state_dict()}
    gap = torch.stack([(leaf - app["model"][key]).abs().max() for key, leaf in loop["model"].items()]).max()
    distance = math.inf if gap.isnan() else float(gap)
    return {"cpu": app["cpu"], "wall": app["wall"], "plain": loop["cpu"], "gap": distance}


def compare(name: str, repeat: int) -> bool:
    """Prints a case's figures; whether none is void."""
    case = CASES[name]
    runs: dict[str, list[dict[str, float]]] = {system: [] for system in case.systems}
    for _ in range(repeat):
        for system in case.systems:
            runs[system].append(duel(system, name))
    print(f"{name}: {case.title}, {case.cohort} of {CLIENTS:,} clients, {case.rounds - WARM_UP} rounds x {repeat}")
    valid = True
    for system, taken in runs.items():
        plain, cpu, wall = (statistics.median(run[key] for run in taken) * 1_000 for key in ("plain", "cpu", "wall"))
        gap = max(run["gap"] for run in taken)
        row = f"{cpu:8.1f} ms CPU a round, {wall:8.1f} ms wall, models within {gap:.0g}"
        if case.each:
            row += f", {spread([run['cpu'] / run['plain'] for run in taken])} x plain loop's {plain:.1f} ms CPU"
        if gap > TOLERANCE:
            valid, row = False, f"void: a model differs from the plain loop's by {gap:.0g}"
        print(f"    {system:<20} {row}")
    if valid and len(runs) == 2:
        ours, theirs = runs.values()
        ratios = [their["cpu"] / our["cpu"] for our, their in zip(ours, theirs, strict=True)]
        print(f"    Flower's simulation takes {spread(ratios)} x the CPU time of fedsim's grid")
    sys.stdout.flush()
    return valid


def spread(values: list[float]) -> str:
    """Median, least and largest."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def main() -> None:
    """`python -m experiments.benchmarks.flower [CASE ...] [--repeat N]`."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; all, if none is named")
    parser.add_argument("--repeat", type=int, default=3, help="how often each contestant runs")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.cases if name not in CASES]
    if unknown:
        parser.error(f"no case {', '.join(unknown)}: there are {', '.join(CASES)}")
    if arguments.repeat < 1:
        parser.error(f"--repeat must be at least 1, got {arguments.repeat}")
    if not Path("/proc/self/stat").exists():
        parser.error("CPU time of other processes is read from /proc, which this system does not have")
    if not all([compare(name, arguments.repeat) for name in arguments.cases or CASES]):
        sys.exit(1)


if __name__ == "__main__":
    main()
