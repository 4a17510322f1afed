"""The ServerApp and the ClientApp of an experiment: `flwr run .` runs it on Flower's simulation or on real nodes.

    flwr run . --run-config 'experiment="fedavg/digits" set="rounds=3; strategy.lr=0.5"'

The loop is the ordinary one, in the ServerApp; it leaves an ordinary run directory. The run's configuration is in
[tool.flwr.app.config] of pyproject.toml:

    experiment   a TOML file, which all nodes must have, the name of a bundled experiment, or what a TOML file holds
    set          changes of keys, separated by semicolons
    out          the folder under which the run's directory is made
    wait         how long to wait for the nodes in the beginning, in seconds
    timeout      how long to wait for the answers of a round, in seconds
"""

import logging
import tomllib
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Self

import torch
from flwr.app import ConfigRecord, Context
from flwr.serverapp import Grid, ServerApp

from fedsim.config import ConfigError, read, resolve, supply
from fedsim.flower import GridEngine
from fedsim.flower.node import NodeApp, Site
from fedsim.launch import run
from fedsim.progress import Silent, told
from fedsim.task import Metrics

logger = logging.getLogger("flwr")  # what `flwr run --stream` and `flwr log` show


class Logged(Silent):
    """A line for each round, in Flower's log."""

    def __init__(self, label: str, rounds: int, done: int) -> None:
        self.label, self.rounds = label, rounds

    def show(self, metrics: Metrics) -> None:
        """The line."""
        logger.info("%s %d/%d  %s", self.label, metrics["round"], self.rounds, told(metrics))

    def __enter__(self) -> Self:
        return self


def asked(context: Context) -> tuple[str, tuple[str, ...]]:
    """The experiment that the run's configuration names, and the changes."""
    name, changes = (context.run_config.get(key, "") for key in ("experiment", "set"))
    if not isinstance(name, str) or not name or not isinstance(changes, str):
        raise ConfigError(f"run config: experiment and set must be strings, got {name!r} and {changes!r}")
    return name, tuple(part.strip() for part in changes.split(";") if part.strip())


def source(name: str) -> str | Mapping[str, Any]:
    """What `read` is given: where there are several lines they are the experiment, else they name it."""
    if "\n" not in name:
        return name
    try:
        return tomllib.loads(name)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"run config: experiment is not TOML: {error}") from None


def seconds(context: Context, key: str) -> float:
    """A number of seconds in the run's configuration."""
    value = context.run_config.get(key)
    if isinstance(value, bool | str) or value is None or not value > 0:
        raise ConfigError(f"run config: {key} must be a number of seconds > 0, got {value!r}")
    return float(value)


server_app = ServerApp()


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    """Runs the experiment; what became of it is in the Context's state, too."""
    name, changes = asked(context)
    out = str(context.run_config.get("out", "runs"))
    wait, timeout = seconds(context, "wait"), seconds(context, "timeout")
    result = run(
        source(name),
        changes=changes,
        root=out,
        display=Logged,
        engine=lambda federation, clients, seed: GridEngine(grid, federation.num_clients, timeout, wait),
    )
    logger.info("run in %s", result.path.resolve())
    context.state["fedsim"] = ConfigRecord({"run": str(result.path.resolve())})


@lru_cache(maxsize=1)
def site(name: str, changes: tuple[str, ...]) -> Site:
    """What a node needs for this experiment; a process makes it once."""
    experiment, folder = read(source(name), changes)
    experiment = resolve(experiment, folder)
    torch.set_num_threads(experiment.threads)
    supplies = supply(experiment, folder)
    return Site(supplies.federation, supplies.clients, experiment.seed)


def load(context: Context) -> Site:
    """What a node needs, by its run's configuration."""
    return site(*asked(context))


client_app = NodeApp(load)
