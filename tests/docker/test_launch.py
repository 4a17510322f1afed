"""`fedsim launch`: a run in containers and what is left of it, whatever becomes of it."""

import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
import tomli_w

from fedsim.containers.composition import COMPOSITIONS
from fedsim.containers.docker import DockerError
from fedsim.containers.project import Project

from .conftest import OURS, RAY, ROOT, lines

pytestmark = pytest.mark.docker
ENDLESS = ("--set", "rounds=100000", "--set", "checkpoint_every=1", "--set", "evaluate_every=50")
NOTE = "a \"b\" 'c' $HOME $$ `d`; e\\f"
TABLES = {
    "name": "mine",
    "rounds": 2,
    "data": {"use": "plugin.py:data", "file": "numbers.txt"},
    "partition": {"use": "iid", "clients": 4},
    "split": {"test": 0.2},
    "model": {"use": "logistic"},
    "strategy": {"use": "fedavg"},
    "clients": {"train": {"use": "plugin.py:Noted", "lr": 0.1}},
    "engine": {"use": "sequential"},
}
PLUGIN = """
import os
from dataclasses import dataclass
from pathlib import Path
from clients.sgd import Sgd
from fedsim.data.datasets import gaussians
from strategies.fedavg import FedAvg
from neighbour import FEATURES

@dataclass(frozen=True)
class Noted(Sgd):
    note: str = ""

@dataclass(frozen=True)
class Greedy(FedAvg):
    def aggregate(self, state, task, replies):
        if task.round == 3:
            eaten = bytearray(b"x") * 2**33
        return super().aggregate(state, task, replies)

def data(file: Path, seed: int = 0):
    examples = int(file.read_text()) + int(Path(os.environ["FEDSIM_DATA"], "more.txt").read_text())
    return gaussians(examples=examples, classes=3, features=FEATURES, seed=seed)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, beside that of an experiment, and one with data."""
    there = tmp_path / 'some $HOME\'s "folder"'
    for each in (there, tmp_path / "data", tmp_path / "here"):
        each.mkdir()
    (there / "mine.toml").write_text(tomli_w.dumps(TABLES))
    (there / "mine.toml").chmod(0o600)
    (there / "plugin.py").write_text(PLUGIN)
    (there / "neighbour.py").write_text("FEATURES = 4\n")
    (there / "numbers.txt").write_text("40")
    (tmp_path / "data" / "more.txt").write_text("20")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("FEDSIM_DATA", str(tmp_path / "data"))
    return there


def command(*arguments):
    return [sys.executable, "-m", "fedsim", *map(str, arguments)]


def surroundings(**more):
    kept = {name: value for name, value in os.environ.items() if not OURS.match(name) or name == "FEDSIM_DATA"}
    return kept | {"PYTHONPATH": str(ROOT)} | more


def fedsim(*arguments, **more):
    """What a command of fedsim's says."""
    return subprocess.run(
        command(*arguments),
        env=surroundings(**more),
        capture_output=True,
        text=True,
        timeout=900,
        stdin=subprocess.DEVNULL,
    )


def left():
    """What there is of launches in Docker."""
    named = ("--format", "{{.Name}}")
    kinds = (("ps", "--all", "--format", "{{.Names}}"), ("network", "ls", *named), ("volume", "ls", *named))
    return {name for kind in kinds for name in lines(*kind) if name.startswith("fedsim-launch-")}


@pytest.fixture(autouse=True)
def nothing_left(engine):
    """That a test leaves nothing in Docker, nor a folder that was on its way."""
    before = left()
    yield
    assert not left() - before
    assert not list(Path("runs").glob(".*"))


def brought(root="runs"):
    """The only run in a folder."""
    (path,) = (file.parent for file in Path(root).glob("*/*/experiment.toml"))
    return path


def measured(path):
    """All rounds of a run, without the seconds."""
    rounds = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in rounds]


def await_round(path, process):
    """Until a file of what a launch says has a line of a round."""
    deadline = time.monotonic() + 300
    while " round " not in path.read_text():
        assert process.poll() is None and time.monotonic() < deadline, path.read_text()
        time.sleep(0.2)


def test_an_experiment_of_yours_runs_there_as_here_on_as_many_workers_as_asked_for(image, folder):
    changes = ("--set", f"clients.train.note={json.dumps(NOTE)}", "--set", "rounds=3", "--seeds", "4")
    launched = fedsim(
        "launch", "ray", folder / "mine.toml", "--workers", "4", "--image", image, "--out", "there", *changes
    )
    assert (launched.returncode, launched.stderr) == (0, "")
    path = brought("there")
    assert launched.stdout.splitlines()[-1].split() == ["here", str(path)]
    assert fedsim("run", folder / "mine.toml", "--out", "alone", *changes).returncode == 0
    alone = brought("alone")
    for there, here in zip(measured(path), measured(alone), strict=True):
        assert there == pytest.approx(here, rel=1e-4)  # the image may have another build of torch
    written = tomllib.loads((path / "experiment.toml").read_text())
    assert written == tomllib.loads((alone / "experiment.toml").read_text())  # its engine is its own again
    assert (written["clients"]["train"]["note"], written["seed"]) == (NOTE, 4)
    engine = json.loads((path / "environment.json").read_text())["engine"]
    assert engine.startswith("Ray(Sequential") and engine.endswith("workers=4)")
    assert all(each.stat().st_uid == os.getuid() for each in path.rglob("*"))
    assert (path / "report" / "index.html").is_file()
    assert fedsim("resume", path, "--rounds", "4").returncode == 0


def test_what_is_wrong_is_said_before_anything_starts(image, folder, monkeypatch):
    def refused(*arguments, **more):
        done = fedsim("launch", "ray", "fedavg/digits", *arguments, **more)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
        assert not Path("runs").exists()
        return done.stderr

    told = refused("--image", "fedsim-nowhere")
    assert "'fedsim-nowhere'" in told and "make docker-build" in told and "docker pull" in told
    told = refused("--image", image, "--workers", "3", WORKER_MEMORY="9000g")
    assert "not enough memory" in told and "3 x worker" in told and "WORKER_MEMORY" in told
    assert "is not right" in refused("--image", image, WORKER_MEMORY="much")
    (folder / "packaged.py").write_text("from strategies.fedavg import FedAvg\n")
    monkeypatch.setenv("PYTHONPATH", str(folder))
    search = f"{ROOT}{os.pathsep}{folder}"
    told = refused("--image", image, "--set", "strategy.use=packaged:FedAvg", PYTHONPATH=search)
    assert "strategy.use names the module 'packaged'" in told and "path/to/file.py:name" in told


def test_a_port_that_was_taken_meanwhile_is_told_and_nothing_stays(image, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as listening:
        number = listening.getsockname()[1]
        more = tmp_path / "more.yaml"
        ports = (
            f"services: {{head: {{ports: ['127.0.0.1:{number}:6379'], networks: [ray, out]}}}}\nnetworks: {{out: }}\n"
        )
        more.write_text(ports)
        env = surroundings(FEDSIM_IMAGE=image, WORKERS="1")
        project = Project(f"fedsim-launch-{os.getpid()}", (Path(RAY), more), COMPOSITIONS["ray"], env)
        with pytest.raises(DockerError, match=f"{number}.*(in use|allocated)"):
            project.start(["--version"], None)
        assert project.left()
        project.remove()
        assert not project.left()


def test_a_cluster_that_does_not_come_up_is_told_with_why(image, folder):
    done = fedsim("launch", "ray", "fedavg/digits", "--image", image, HEAD_MEMORY="40m", OBJECT_STORE="1000000")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1), done.stderr
    told = r"The run failed: container fedsim-launch-\w+-head-1 (ran out of memory: it may use 41.9 MB|was killed)"
    assert re.match(told, done.stderr), done.stderr


def test_a_run_that_runs_out_of_memory_is_told_so_and_brought_back(image, folder):
    changes = ("--set", "strategy.use=plugin.py:Greedy", "--set", "rounds=5", "--set", "checkpoint_every=1")
    done = fedsim("launch", "ray", folder / "mine.toml", "--image", image, *changes, DRIVER_MEMORY="1500m")
    assert done.returncode == 1
    assert re.search(
        r"The run failed: container fedsim-launch-\w+-driver ran out of memory: it may use 1.57 GB", done.stderr
    )
    assert "DRIVER_MEMORY" in done.stderr
    path = brought()
    assert f"`fedsim resume {path}` goes on with it" in done.stderr
    assert [line["round"] for line in measured(path)] == [1, 2]


def test_runs_that_cannot_be_brought_back_stay_in_their_volume(image, folder):
    Path("runs").mkdir()
    Path("runs/fedavg-digits").touch()  # where a folder is to be
    done = fedsim("launch", "ray", "fedavg/digits", "--image", image, "--workers", "1", "--set", "rounds=2")
    assert (done.returncode, done.stderr.count("The run failed:")) == (1, 1), done.stderr
    (volume,) = set(re.findall(r"fedsim-launch-\w+_runs", done.stderr))
    try:
        (way,) = re.findall(r"`(docker run .*)`", done.stderr)
        subprocess.run(way, shell=True, check=True)
        assert len(measured(brought("."))) == 2
    finally:
        lines("volume", "rm", volume)


def in_a_terminal(image, end):
    """Launches in a terminal, does something to this when a round is over; what was shown, and the exit code."""
    pid, terminal = pty.fork()
    if pid == 0:
        words = command("launch", "ray", "fedavg/digits", "--image", image, *ENDLESS)
        os.execvpe(words[0], words, surroundings(TERM="xterm"))
    shown, deadline, open_, ended = b"", time.monotonic() + 300, True, False
    while open_ and time.monotonic() < deadline:
        try:
            shown += os.read(terminal, 10000)
        except OSError:  # all that was in it has ended
            break
        if b"train/loss" in shown and not ended:
            ended, open_ = True, end(terminal)
    _, status = os.waitpid(pid, 0)
    return shown.decode(errors="replace"), os.waitstatus_to_exitcode(status)


def test_a_terminal_that_is_closed_ends_the_run(image, folder):
    in_a_terminal(image, os.close)
    assert len(measured(brought())) >= 1


def test_ctrl_c_in_a_terminal_ends_the_run_which_goes_on_here(image, folder):
    text, code = in_a_terminal(image, lambda terminal: os.write(terminal, b"\x03"))
    assert code == 130, text
    assert "starting 1 head and 2 workers" in text and "\N{BOX DRAWINGS HEAVY HORIZONTAL}" in text  # the live display
    path = brought()
    done = len(measured(path))
    assert f"`fedsim resume {path}` goes on with it" in " ".join(text.split())
    assert done >= 1 and list((path / "checkpoints").iterdir())
    # It had 100000 rounds to do, on its own engine; a few of them are enough.
    tables = tomllib.loads((path / "experiment.toml").read_text())
    assert tables["engine"]["use"] == "fedsim.engines.local:auto"
    (path / "experiment.toml").write_text(tomli_w.dumps(tables | {"rounds": done + 2}))
    assert fedsim("resume", path).returncode == 0
    assert [line["round"] for line in measured(path)] == list(range(1, done + 3))


def test_two_launches_side_by_side_do_not_meet_and_sigterm_ends_one(image, folder):
    small = ("launch", "ray", "fedavg/digits", "--image", image, "--workers", "1")
    with open("log", "w") as log, subprocess.Popen(command(*small, *ENDLESS), env=surroundings(), stdout=log) as first:
        await_round(Path("log"), first)
        second = fedsim(*small, "--set", "rounds=2", "--out", "second")
        assert second.returncode == 0 and first.poll() is None
        first.send_signal(signal.SIGTERM)
        assert first.wait(120) == 130
    assert len(measured(brought("second"))) == 2 and len(measured(brought())) >= 1


@pytest.mark.parametrize("seconds", [3.0, 6.0, 9.0])
def test_an_interrupt_while_it_starts_leaves_nothing(image, folder, seconds):
    words = command("launch", "ray", "fedavg/digits", "--image", image, *ENDLESS)
    with subprocess.Popen(
        words, env=surroundings(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as started:
        deadline = time.monotonic() + 120
        while not left() and started.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(seconds - 3)
        started.send_signal(signal.SIGINT)
        _, said = started.communicate(timeout=120)
    assert started.returncode == 130 and "Traceback" not in said, said


def test_an_experiment_of_yours_travels_to_flowers_nodes_and_all_seeds_come_back(image, folder):
    own = folder / "own.toml"
    own.write_bytes((ROOT / "experiments" / "fedavg" / "digits.toml").read_bytes())
    own.chmod(0o600)
    done = fedsim("launch", "flower", own, "--image", image, "--set", "rounds=1", "--seeds", "3", "4", "--workers", "4")
    assert done.returncode == 0, done.stdout + done.stderr
    paths = [Path(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("here ")]
    assert [tomllib.loads((path / "experiment.toml").read_text())["seed"] for path in paths] == [3, 4]
    assert all(len(measured(path)) == 1 and path.stat().st_uid == os.getuid() for path in paths)
