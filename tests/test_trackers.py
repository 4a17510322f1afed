"""Trackers: what was sent to them is read back from their files."""

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from fedsim.config import ConfigError
from fedsim.launch import resume, run
from fedsim.trackers import TRACKERS, check, flat, track

# MLflow's own tables ask SQLAlchemy, when they are first imported, for something that it will not have for ever.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated"),
]

EXPERIMENT = {
    "name": "tracked",
    "rounds": 3,
    "evaluate_every": 2,
    "checkpoint_every": 2,
    "data": {"use": "fedsim.data.datasets:gaussians", "examples": 60, "classes": 3, "features": 4},
    "partition": {"use": "fedsim.data.partition:iid", "clients": 3},
    "model": {"use": "fedsim.networks:logistic"},
    "strategy": {"use": "strategies.fedavg:FedAvg"},
    "clients": {"train": {"use": "clients.sgd:Sgd", "lr": 0.1}},
}
LINES = [
    {"round": 1, "seconds": 0.25, "clients": 3, "test/accuracy": 0.5, "clients/accuracy/p10": 0.25},
    {"round": 2, "seconds": 0.5, "clients": 3, "loss": float("nan")},
    {"round": 3, "seconds": 0.125, "clients": 2, "test/accuracy": 0.75},
]
Points = dict[str, list[tuple[int, float]]]  # name -> (round, value)


def expected(lines: list[dict[str, float]]) -> Points:
    names = dict.fromkeys(name for line in lines for name in line if name != "round")
    return {name: [(int(line["round"]), line[name]) for line in lines if name in line] for name in names}


def tensorboard(path: Path) -> Points:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(path / "tensorboard"))
    events.Reload()
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


def mlflow(path: Path) -> Points:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{path / 'mlflow.db'}")
    (experiment,) = (found for found in client.search_experiments() if found.name != "Default")
    (found,) = client.search_runs([experiment.experiment_id])
    return {
        name: [(point.step, point.value) for point in client.get_metric_history(found.info.run_id, name)]
        for name in found.data.metrics
    }


READERS = {"tensorboard": tensorboard, "mlflow": mlflow}


@pytest.fixture(params=list(READERS))
def tracker(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    pytest.importorskip(request.param)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return str(request.param)


def close(one: Points, other: Points) -> bool:
    """Whether the points are the same; TensorBoard keeps 32 bits of a number."""
    return one.keys() == other.keys() and all(
        [step for step, _ in one[name]] == [step for step, _ in other[name]]
        and [value for _, value in one[name]] == pytest.approx([v for _, v in other[name]], rel=1e-6, nan_ok=True)
        for name in one
    )


def test_what_is_logged_is_read_back(tracker, tmp_path):
    opened = track(tracker, "name", tmp_path, {"strategy": {"lr": 0.1}})
    for line in LINES:
        opened.log(line)
    opened.close()
    found = READERS[tracker](tmp_path)
    if tracker == "mlflow":
        found = {name: points for name, points in found.items() if name != "loss"}
        assert close(found, {name: points for name, points in expected(LINES).items() if name != "loss"})
    else:
        assert close(found, expected(LINES))
    assert not close(found, expected(LINES[:2]))


def test_a_run_sends_what_it_writes_down(tracker, tmp_path):
    result = run(EXPERIMENT, root=tmp_path, tracker=tracker)
    assert close(READERS[tracker](result.path), expected(result.metrics))


def test_a_resumed_run_goes_on_in_the_same_place(tracker, tmp_path):
    first = run(EXPERIMENT, root=tmp_path, tracker=tracker)
    result = resume(first.path, rounds=4, tracker=tracker)
    assert close(READERS[tracker](result.path), expected(result.metrics))


def test_the_settings_of_a_run_are_sent_to_mlflow(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    from mlflow import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    track("mlflow", "name", tmp_path, {"strategy": {"lr": 0.1}, "rounds": 3}).close()
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("name")
    assert experiment is not None
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.data.params == {"strategy.lr": "0.1", "rounds": "3"}
    assert found.info.status == "FINISHED"


def test_nested_tables_are_flattened():
    assert flat({"a": 1, "b": {"c": 2, "d": {"e": 3}}, "f": {}}) == [("a", 1), ("b.c", 2), ("b.d.e", 3)]


def test_an_unknown_tracker_is_refused_before_anything_is_run(tmp_path):
    with pytest.raises(ConfigError, match=r"^tracker 'comet': must be one of tensorboard, wandb, mlflow$"):
        run(EXPERIMENT, root=tmp_path, tracker="comet")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", list(TRACKERS))
def test_a_tracker_that_is_not_installed_is_refused_with_what_to_install(name, monkeypatch):
    for module in [module for module in sys.modules if module.partition(".")[0] == name]:
        monkeypatch.delitem(sys.modules, module)
    here = Path(find_spec("fedsim").submodule_search_locations[0])  # type: ignore[union-attr, index]
    monkeypatch.setattr(sys, "path", [str(here)])  # a path on which there is no tracker
    with pytest.raises(ConfigError, match=rf"^tracker '{name}' is not installed: pip install 'fedsim\[{name}\]'$"):
        check(name)


def test_rounds_that_are_done_again_are_in_tensorboard_once(tmp_path):
    pytest.importorskip("tensorboard")
    for done, lines in ((0, LINES), (1, LINES[1:])):
        opened = track("tensorboard", "name", tmp_path, {}, done)
        for line in lines:
            opened.log(line)
        opened.close()
    assert close(tensorboard(tmp_path), expected(LINES))
