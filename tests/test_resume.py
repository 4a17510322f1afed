"""A run that is killed and resumed ends, to the bit, where one ends that nobody disturbed."""

import json
import multiprocessing
import os
import random
import runpy
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tomli_w

from fedsim.launch import resume
from fedsim.runs import read_checkpoint

ROUNDS = 5
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["torch._dynamo", "fedsim.launch", "fedsim.data.datasets", "strategies.scaffold", "clients.scaffold"]
)

# Local sides that say when they take a step, so that the process can be killed in the middle of a round; and a server
# side that is done before the last round.
PLUGIN = """
import sys
from dataclasses import dataclass

import torch

from clients.scaffold import ControlledSgd
from clients.sgd import Sgd
from strategies.fedavg import FedAvg

@dataclass(frozen=True)
class Content(FedAvg):
    def init(self, params):
        return {"params": params, "rounds": torch.tensor(0)}

    def aggregate(self, state, task, replies):
        params, metrics = super().aggregate({"params": state["params"]}, task, replies)
        return params | {"rounds": state["rounds"] + 1}, metrics

    def done(self, state):
        return bool(state["rounds"] >= 3)

@dataclass(frozen=True)
class Audible(Sgd):
    def step(self, state, batch):
        sys.audit("test.step")
        return super().step(state, batch)

@dataclass(frozen=True)
class AudibleScaffold(ControlledSgd):
    def step(self, state, batch):
        sys.audit("test.step")
        return super().step(state, batch)
"""
# What a process does that is killed by itself: `order` says at which of the moments that Python's audit hooks tell of.
# A limit on the size of files kills in the middle of a write, with the first bytes of it on disk.
WORKER = """
import os, resource, signal, sys
from pathlib import Path

from fedsim.launch import resume, run

moments = []

def heard(event, arguments):
    if event == "test.step":
        return "step"
    if event not in ("open", "os.rename", "os.remove") or not str(arguments[0]).startswith(order["root"]):
        return None
    if event == "open" and not set(str(arguments[1])) & set("wax"):
        return None
    if "/report" in str(arguments[0]):
        finish()
    return f"{event} {Path(arguments[0]).name}"

def finish():
    if order["moments"]:
        Path(order["moments"]).write_text("\\n".join(moments))
    os._exit(0)

def hook(event, arguments):
    moment = heard(event, arguments)
    if moment is None:
        return
    moments.append(moment)
    if len(moments) == order["kill_at"] or [moment, moments.count(moment)] == order["kill_in"]:
        os.kill(os.getpid(), signal.SIGKILL)
    if [moment, moments.count(moment)] == order["cut_in"]:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        size = os.path.getsize(arguments[0]) if os.path.exists(arguments[0]) else 0
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, size + 20))

sys.addaudithook(hook)
if order["path"]:
    resume(order["path"])
else:
    run(order["experiment"], root=order["root"])
"""


class Death(NamedTuple):
    """When a process is killed: at the n-th moment, at the n-th of one kind, or in the n-th write of one kind."""

    kill_at: int | None = None
    kill_in: tuple[str, int] | None = None
    cut_in: tuple[str, int] | None = None


def experiment(method: str) -> dict[str, Any]:
    audible = "plugin.py:AudibleScaffold" if method == "scaffold" else "plugin.py:Audible"
    return {
        "name": method,
        "seed": 3,
        "rounds": ROUNDS,
        "checkpoint_every": 2,
        "evaluate_every": 2,
        "data": {"use": "fedsim.data.datasets:gaussians", "examples": 120, "classes": 3, "features": 4},
        "partition": {"use": "fedsim.data.partition:dirichlet", "clients": 6, "alpha": 1.0},
        "split": {"use": "fedsim.data.federation:divide", "test": 0.2},
        "model": {"use": "fedsim.networks:mlp", "hidden": [4]} | ({"dropout": 0.3} if method == "fedavg" else {}),
        "strategy": {"use": "plugin.py:Content" if method == "content" else method},
        "clients": {
            "train": {"use": audible, "lr": 0.1, "epochs": 2, "batch_size": 8},
            "evaluate": {"use": "fedsim.evaluation:Evaluate", "score_bins": 11},
        },
        "sample": {
            "use": "fedsim.sampling:dropout",
            "probability": 0.2,
            "sample": {"use": "fedsim.sampling:uniform", "fraction": 0.7},
        },
    }


def ended(worker: Any) -> int:
    """The exit code of a process, once it has ended."""
    worker.join(60)
    assert worker.exitcode is not None
    return int(worker.exitcode)


class Place:
    """A folder with an experiment, its plug-in, and the runs of it."""

    def __init__(self, folder: Path, method: str) -> None:
        self.folder, self.root = folder, folder / "runs"
        folder.mkdir(exist_ok=True)
        (folder / "plugin.py").write_text(PLUGIN)
        (folder / "worker.py").write_text(WORKER)
        (folder / "experiment.toml").write_text(tomli_w.dumps(experiment(method)))

    def start(self, death: Death | None = None, path: Path | None = None, moments: Path | None = None) -> Any:
        """A process that runs the experiment, or resumes the run at `path`, up to its report."""
        order = {
            "experiment": str(self.folder / "experiment.toml"),
            "root": str(self.root),
            "path": path and str(path),
            "moments": moments and str(moments),
            **{name: list(v) if isinstance(v, tuple) else v for name, v in (death or Death())._asdict().items()},
        }
        worker = FORKS.Process(target=runpy.run_path, args=(str(self.folder / "worker.py"), {"order": order}))
        worker.start()
        return worker

    def go(self, death: Death | None = None, path: Path | None = None, moments: Path | None = None) -> int:
        """The exit code of such a process."""
        return ended(self.start(death, path, moments))

    def run(self) -> Path:
        """The directory of the one run."""
        (path,) = self.root.glob("*/*")
        return path


class Undisturbed(NamedTuple):
    """What a run leaves behind that nobody disturbed, and the moments at which it could have been killed."""

    files: dict[str, Any]
    moments: list[str]


def left(path: Path) -> dict[str, Any]:
    """All that a run leaves behind, but for what the clock says and the files of a process that died while writing."""
    files: dict[str, Any] = {}
    for file in path.rglob("*"):
        name = file.relative_to(path).as_posix()
        if file.name == "metrics.jsonl":
            lines = [json.loads(line) for line in file.read_text().splitlines()]
            files[name] = [{key: value for key, value in line.items() if key != "seconds"} for line in lines]
        elif file.is_file() and file.name != "environment.json" and file.suffix != ".part":
            files[name] = file.read_bytes().replace(str(path.parents[2]).encode(), b"here")
    return files


@pytest.fixture(scope="module", params=["fedavg", "scaffold"])
def method(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def undisturbed(method: str, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    folder = tmp_path_factory.mktemp(method)
    place = Place(folder, method)
    assert place.go(moments=folder / "moments") == 0
    return Undisturbed(left(place.run()), (folder / "moments").read_text().splitlines())


@pytest.fixture
def place(method: str, tmp_path: Path) -> Place:
    return Place(tmp_path, method)


def survives(place: Place, undisturbed: Undisturbed, deaths: Sequence[Death], code: int = -signal.SIGKILL) -> None:
    """Kills a run in all these ways, one after another; then it is resumed, and ends as the undisturbed one did."""
    path = None
    for death in deaths:
        assert place.go(death, path) == code
        path = place.run()
    assert place.go(path=path) == 0
    assert_same(left(place.run()), undisturbed)


def assert_same(found: dict[str, Any], undisturbed: Undisturbed) -> None:
    assert found.keys() == undisturbed.files.keys()
    for name, content in undisturbed.files.items():
        assert found[name] == content, name


def test_an_undisturbed_run_leaves_what_the_others_are_compared_with(undisturbed, method):
    assert [line["round"] for line in undisturbed.files["metrics.jsonl"]] == list(range(1, ROUNDS + 1))
    assert {"checkpoints/round-000004.safetensors", "checkpoints/round-000005.safetensors"} < undisturbed.files.keys()
    assert "failures.jsonl" in undisturbed.files
    scores = [json.loads(line) for line in undisturbed.files["scores.jsonl"].splitlines()]
    assert [line["round"] for line in scores] == [2, 4, 5]
    sizes = {len(column) for line in scores for group in line["clients"] for column in group}
    counts = [sum(column) for line in scores for group in line["clients"] for column in group]
    assert sizes == {11} and len(counts) == 3 * 3 and len(set(counts)) == 1 and counts[0] > 0
    classes = [json.loads(line) for line in undisturbed.files["classes.jsonl"].splitlines()]
    assert [(line["round"], sum(line["clients"]["examples"])) for line in classes] == [
        (n, counts[0]) for n in (2, 4, 5)
    ]
    assert undisturbed.moments.count("step") > 20
    assert (b"personal/" in undisturbed.files["checkpoints/round-000005.safetensors"]) == (method == "scaffold")


def test_another_seed_leaves_something_else(undisturbed, place, method):
    (place.folder / "experiment.toml").write_text(tomli_w.dumps(experiment(method) | {"seed": 4}))
    assert place.go() == 0
    found, name = left(place.run()), "checkpoints/round-000005.safetensors"
    assert found[name] != undisturbed.files[name]
    assert found["metrics.jsonl"] != undisturbed.files["metrics.jsonl"]


def test_a_run_killed_in_the_middle_of_a_round_goes_on_as_if_it_had_not_been(undisturbed, place):
    late = 3 * undisturbed.moments.count("step") // 4
    survives(place, undisturbed, [Death(kill_in=("step", late))])


def test_a_run_killed_in_the_middle_of_writing_a_checkpoint_goes_on_from_the_one_before(undisturbed, place):
    write = ("open .round-000004.safetensors.part", 1)
    assert place.go(Death(cut_in=write)) == -signal.SIGXFSZ
    half = place.run() / "checkpoints" / ".round-000004.safetensors.part"
    assert half.stat().st_size < 50, "the process was killed while it was written"
    with pytest.raises(ValueError, match="damaged"):
        read_checkpoint(half)
    assert place.go(path=place.run()) == 0
    assert left(place.run()) == undisturbed.files
    hidden = [path.name for path in (place.run() / "checkpoints").iterdir() if path.name.startswith(".")]
    assert hidden == [], "what was half written is gone"


def test_a_run_killed_in_the_middle_of_a_line_of_metrics_forgets_the_half_line(undisturbed, place):
    assert place.go(Death(cut_in=("open metrics.jsonl", 4))) == -signal.SIGXFSZ
    text = (place.run() / "metrics.jsonl").read_text()
    assert not text.endswith("\n")
    assert len(text.splitlines()[-1]) == 20
    assert place.go(path=place.run()) == 0
    assert left(place.run()) == undisturbed.files


def test_a_run_killed_after_or_in_the_middle_of_a_line_of_scores_writes_it_once(undisturbed, place):
    assert place.go(Death(cut_in=("open scores.jsonl", 2))) == -signal.SIGXFSZ  # of round 4
    assert not (place.run() / "scores.jsonl").read_text().endswith("\n")
    assert place.go(Death(kill_in=("open metrics.jsonl", 2)), place.run()) == -signal.SIGKILL  # 4 again, scores first
    lines = (place.run() / "scores.jsonl").read_text().splitlines()
    assert [json.loads(line)["round"] for line in lines] == [2, 4]
    assert place.go(path=place.run()) == 0
    assert_same(left(place.run()), undisturbed)


def test_a_run_killed_after_or_in_the_middle_of_a_line_of_classes_writes_it_once(undisturbed, place):
    assert place.go(Death(cut_in=("open classes.jsonl", 2))) == -signal.SIGXFSZ  # of round 4
    assert not (place.run() / "classes.jsonl").read_text().endswith("\n")
    assert place.go(Death(kill_in=("open metrics.jsonl", 2)), place.run()) == -signal.SIGKILL
    lines = (place.run() / "classes.jsonl").read_text().splitlines()
    assert [json.loads(line)["round"] for line in lines] == [2, 4]
    assert place.go(path=place.run()) == 0
    assert_same(left(place.run()), undisturbed)


def test_a_run_killed_again_and_again_still_ends_where_it_should(undisturbed, place):
    deaths = [
        Death(kill_in=("open metrics.jsonl", 1)),  # in round 1, which no checkpoint covers
        Death(kill_in=("os.rename .round-000002.safetensors.part", 1)),
        Death(kill_in=("step", undisturbed.moments.count("step") // 2)),
        Death(kill_in=("open .metrics.jsonl.part", 1)),  # while what comes after the checkpoint is taken back
        Death(kill_in=("os.rename .round-000005.safetensors.part", 1)),
        Death(kill_in=("os.remove round-000002.safetensors", 1)),
    ]
    survives(place, undisturbed, deaths)


def test_a_run_killed_before_it_was_written_down_is_no_run(place):
    assert place.go(Death(kill_in=("os.rename .experiment.toml.part", 1))) == -signal.SIGKILL
    with pytest.raises(FileNotFoundError, match="is not a run: it holds no experiment.toml"):
        resume(place.run())


def test_a_finished_run_that_is_resumed_stays_as_it_is(undisturbed, place):
    assert place.go() == 0
    assert place.go(path=place.run()) == 0
    assert left(place.run()) == undisturbed.files


def test_a_run_that_is_done_before_its_last_round_ends_there_wherever_it_was_killed(tmp_path):
    whole = Place(tmp_path / "whole", "content")
    assert whole.go() == 0
    files = left(whole.run())
    assert [line.get("converged") for line in files["metrics.jsonl"]] == [None, None, 1]
    assert {name for name in files if name.startswith("checkpoints/")} == {
        f"checkpoints/round-00000{number}.safetensors" for number in (2, 3)
    }
    place = Place(tmp_path / "killed", "content")
    path = None
    for death in (
        Death(cut_in=("open metrics.jsonl", 3)),  # with half of the line that says it is done
        Death(kill_in=("os.rename .round-000003.safetensors.part", 1)),  # with the whole of it, but no checkpoint
    ):
        assert place.go(death, path) < 0
        path = place.run()
    assert not (path / "checkpoints" / "round-000003.safetensors").exists()
    for _ in range(2):  # the second time there is nothing more to do
        assert place.go(path=path) == 0
        assert_same(left(path), Undisturbed(files, []))


@pytest.mark.slow
def test_a_run_may_be_killed_at_any_file_that_it_opens_renames_or_removes(undisturbed, place, tmp_path, method):
    begun = undisturbed.moments.index("os.rename .experiment.toml.part") + 1
    places = [n for n, moment in enumerate(undisturbed.moments, 1) if n > begun and moment != "step"]
    assert len(places) > 20
    several = os.cpu_count() or 1  # at the same time
    for start in range(0, len(places), several):
        here = {number: Place(tmp_path / str(number), method) for number in places[start : start + several]}
        killed = [place.start(Death(kill_at=number)) for number, place in here.items()]
        assert [ended(worker) for worker in killed] == [-signal.SIGKILL] * len(here)
        resumed = [place.start(path=place.run()) for place in here.values()]
        assert [ended(worker) for worker in resumed] == [0] * len(here)
        for place in here.values():
            assert_same(left(place.run()), undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_run_may_be_killed_at_any_time(undisturbed, place, seed):
    clock = random.Random(seed)
    path, killed = None, 0
    for _ in range(6):
        worker = place.start(path=path)
        worker.join(clock.uniform(0.05, 0.6))
        worker.kill()
        worker.join(60)
        killed += worker.exitcode == -signal.SIGKILL
        path = next((file.parent for file in place.root.glob("*/*/experiment.toml")), None)
    assert killed
    assert place.go(path=path) == 0
    finished = [file.parent for file in place.root.glob("*/*/experiment.toml")]
    assert left(finished[0]) == undisturbed.files
