"""An unmodified Flower app: on Flower's own simulation, and on fedsim's in-process grid.

The app is a ServerApp with Flower's FedAvg, and a ClientApp that loads the arrays into a model that stays, trains and
replies: Flower at its best. Whom the server asks is its own draw, from the operating system's random numbers.
"""

import random
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from torch import Tensor, nn
from torch.nn import functional

from experiments.benchmarks.cases import CLIENTS, module, pool
from experiments.benchmarks.systems.contest import Work

trainer, echo = ClientApp(), ClientApp()


@cache
def resident(name: str, folder: str) -> tuple[Work, nn.Module, Tensor, Tensor]:
    """What stays in a process: the work, the model, which is overwritten for every client, and the examples."""
    torch.set_num_threads(1)
    work = Work(name, Path(folder))
    return work, module(work.case), *pool(work.case)


@trainer.train()
def train(message: Message, context: Context) -> Message:
    """A client that trains."""
    config, client = message.content["config"], int(context.node_config["partition-id"])
    work, model, x, y = resident(str(config["case"]), str(config["folder"]))
    model.load_state_dict(cast(ArrayRecord, message.content["arrays"]).to_torch_state_dict())
    weights: list[Tensor] = list(model.parameters())
    for rows in work.batches(int(str(config["server-round"])), client):
        loss = functional.cross_entropy(model(x[rows]), y[rows])
        gradients = torch.autograd.grad(loss, weights)
        with torch.no_grad():
            torch._foreach_add_(weights, gradients, alpha=-work.case.lr)
    return reply(message, client, work.case.each, model.state_dict())


@echo.train()
def send_back(message: Message, context: Context) -> Message:
    """A client that does nothing but decode and encode."""
    arrays = cast(ArrayRecord, message.content["arrays"])
    return reply(message, int(context.node_config["partition-id"]), 1, arrays.to_torch_state_dict())


def reply(message: Message, client: int, size: int, arrays: dict[str, Tensor]) -> Message:
    """What a client answers."""
    metrics = MetricRecord({"num-examples": size, "client": client})
    return Message(RecordDict({"arrays": ArrayRecord(arrays), "metrics": metrics}), reply_to=message)


def server(work: Work) -> ServerApp:
    """The app's server, which also leaves whom it had asked."""
    app, case = ServerApp(), work.case
    cohorts: list[list[int]] = []

    def remember(replies: list[RecordDict], weighted_by: str) -> MetricRecord:
        cohorts.append([int(str(content["metrics"]["client"])) for content in replies])
        return MetricRecord({"replies": len(replies)})

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        random.seed(0)
        clock = work.clock()
        strategy = FedAvg(
            fraction_train=case.cohort / CLIENTS,
            fraction_evaluate=0.0,
            min_train_nodes=case.cohort,
            min_available_nodes=CLIENTS,
            train_metrics_aggr_fn=remember,
        )
        result = strategy.start(
            grid,
            initial_arrays=ArrayRecord(module(case).state_dict()),
            num_rounds=case.rounds,
            train_config=ConfigRecord({"case": work.name, "folder": str(work.folder)}),
            evaluate_fn=lambda round, arrays: clock(round),
        )
        work.leave(clock, result.arrays.to_torch_state_dict(), [len(cohort) for cohort in cohorts], cohorts=cohorts)

    return app


def run(system: str, work: Work) -> None:
    """The app, where `system` says."""
    app = trainer if work.case.learns else echo
    if system == "grid":
        from fedsim.flower import run as run_on_fedsim  # here, so that Flower's simulation runs without fedsim

        run_on_fedsim(server(work), app, num_nodes=CLIENTS, seed=0)
    else:
        from flwr.simulation import run_simulation

        # A Ray of its own, with 2 actors of one processor each.
        ray = {"address": "local", "num_cpus": 2, "_temp_dir": str(work.folder / "ray")}
        config: Any = {"init_args": ray, "client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
        run_simulation(server(work), app, CLIENTS, backend_config=config)
