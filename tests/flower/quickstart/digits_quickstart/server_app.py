"""The server's side."""

import json
from pathlib import Path

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg, Result

from digits_quickstart.task import Net, load_central, test

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Trains a network from the start."""
    torch.manual_seed(0)
    strategy = FedAvg(
        fraction_train=context.run_config["fraction-train"],
        fraction_evaluate=context.run_config["fraction-evaluate"],
        min_available_nodes=context.run_config["min-available-nodes"],
    )
    result = strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(Net().state_dict()),
        train_config=ConfigRecord({"lr": context.run_config["learning-rate"]}),
        num_rounds=context.run_config["num-server-rounds"],
        evaluate_fn=global_evaluate,
    )
    if context.run_config["result-path"]:
        write(result, Path(context.run_config["result-path"]))


def global_evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
    """Measures on the server's examples."""
    net = Net()
    net.load_state_dict(arrays.to_torch_state_dict())
    loss, accuracy = test(net, load_central())
    return MetricRecord({"loss": loss, "accuracy": accuracy})


def write(result: Result, path: Path) -> None:
    """Writes down what was measured: part -> round -> name -> number."""
    parts = ("train_metrics_clientapp", "evaluate_metrics_clientapp", "evaluate_metrics_serverapp")
    told = {part: {number: dict(record) for number, record in getattr(result, part).items()} for part in parts}
    path.write_text(json.dumps(told), encoding="utf-8")
