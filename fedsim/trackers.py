"""Trackers: the metrics of a run, also sent to TensorBoard, Weights & Biases or MLflow."""

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from fedsim.config import ConfigError
from fedsim.task import Metrics


class Tracker(Protocol):
    """Somewhere else that metrics go."""

    def log(self, metrics: Metrics) -> None: ...  # noqa: D102

    def close(self) -> None: ...  # noqa: D102


class TensorBoard:
    """Event files in the run's directory, under tensorboard/."""

    def __init__(self, name: str, path: Path, tables: Mapping[str, Any], done: int) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        self.writer = SummaryWriter(str(path / "tensorboard"), purge_step=done + 1)

    def log(self, metrics: Metrics) -> None:
        """One point a metric."""
        for name, value in metrics.items():
            if name != "round":
                self.writer.add_scalar(name, value, int(metrics["round"]))

    def close(self) -> None:
        """Writes what is pending."""
        self.writer.close()


class WandB:
    """A run of Weights & Biases; WANDB_MODE=offline keeps it in the run's directory."""

    def __init__(self, name: str, path: Path, tables: Mapping[str, Any], done: int) -> None:
        import wandb

        self.run = wandb.init(
            project="fedsim",
            name=f"{name}/{path.name}",
            id=path.name,
            resume="allow",  # a run that is resumed goes on in its place
            dir=str(path),
            config=dict(tables),
        )

    def log(self, metrics: Metrics) -> None:
        """One step a round."""
        self.run.log(metrics, step=int(metrics["round"]))

    def close(self) -> None:
        """Ends the run."""
        self.run.finish()


class MLflow:
    """A run of MLflow, at MLFLOW_TRACKING_URI or else in the run's directory, in mlflow.db."""

    def __init__(self, name: str, path: Path, tables: Mapping[str, Any], done: int) -> None:
        import os

        from mlflow import MlflowClient

        self.client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{path / 'mlflow.db'}")
        found = self.client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self.client.create_experiment(name)
        same = self.client.search_runs([experiment], f"attributes.run_name = '{path.name}'")  # a run that is resumed
        self.run = (same[0] if same else self.client.create_run(experiment, run_name=path.name)).info.run_id
        for key, value in [] if same else flat(tables):
            self.client.log_param(self.run, key, str(value)[:500])

    def log(self, metrics: Metrics) -> None:
        """One step a round."""
        for name, value in metrics.items():
            if name != "round":
                self.client.log_metric(self.run, name, value, step=int(metrics["round"]))

    def close(self) -> None:
        """Ends the run."""
        self.client.set_terminated(self.run)


def flat(tables: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """("strategy.lr", 0.1) for each value of nested tables."""
    found: list[tuple[str, Any]] = []
    for key, value in tables.items():
        found += flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [(prefix + key, value)]
    return found


TRACKERS: dict[str, Callable[[str, Path, Mapping[str, Any], int], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "mlflow": MLflow,
}


def check(tracker: str) -> None:
    """Raises ConfigError when there is no tracker of that name, or what it needs is not installed."""
    if tracker not in TRACKERS:
        raise ConfigError(f"tracker {tracker!r}: must be one of {', '.join(TRACKERS)}")
    if find_spec(tracker) is None:  # each is called like the package it needs
        raise ConfigError(f"tracker {tracker!r} is not installed: pip install 'fedsim[{tracker}]'")


def track(tracker: str, name: str, path: Path, tables: Mapping[str, Any], done: int = 0) -> Tracker:
    """Opens a tracker by its name for the rounds after `done`; raises ConfigError as `check` does."""
    check(tracker)
    return TRACKERS[tracker](name, path, tables, done)
