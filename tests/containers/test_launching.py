"""`fedsim launch` without an engine: what is refused, and what becomes of runs that are brought back."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tomllib

import pytest
from typer.testing import CliRunner

from fedsim import cli
from fedsim.containers import COMPOSITIONS, composition
from fedsim.containers.docker import DockerError
from fedsim.containers.launch import INTERRUPTS, _brought_back, _interruptible, _settled, _undisturbed
from fedsim.containers.parcel import pack
from fedsim.containers.project import Project, overlay


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def without_docker(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))


def call(*arguments):
    return CliRunner().invoke(cli.app, list(arguments))


def refused(result, *told):
    """That the input was bad, that one message says so, and that there is no trace of a start."""
    assert (result.exit_code, result.stdout, result.stderr.count("Error:")) == (2, "", 1), result.stderr
    assert result.stderr.startswith("Error: ") and "Traceback" not in result.stderr
    assert all(each in result.stderr for each in told), result.stderr
    assert not os.path.exists("runs")


def test_without_docker_it_says_so(without_docker):
    refused(call("launch", "ray", "fedavg/digits"), "no command docker", "install it")


@pytest.mark.skipif(shutil.which("docker") is None, reason="there is no command docker here")
def test_without_an_engine_it_says_where_none_answers(monkeypatch):
    monkeypatch.setenv("DOCKER_HOST", "tcp://127.0.0.1:9")
    monkeypatch.delenv("DOCKER_CONTEXT", raising=False)
    result = call("launch", "ray", "fedavg/digits")
    refused(result, "no Docker engine answers at tcp://127.0.0.1:9", "DOCKER_HOST")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["fedavg/digit"],
        ["nowhere/mine.toml"],
        ["fedavg/digits", "--set", "rounds=0"],
        ["fedavg/digits", "--set", "strategy.rate=1"],
        ["fedavg/digits", "--set", "clients.train.use=mine.py:Client"],
        ["fedavg/digits", "--set", "nonsense"],
        ["fedavg/digits", "--seeds", "-1"],
    ],
)
def test_a_wrong_experiment_is_told_as_run_tells_it_and_before_docker_is_asked(without_docker, arguments):
    launched = call("launch", "ray", *arguments)
    refused(launched)
    assert launched.stderr == call("run", *arguments).stderr


def test_an_unknown_place_is_bad_input(without_docker):
    refused(call("launch", "slurm", "fedavg/digits"), "launch 'slurm': must be one of ray, flower")


def test_no_plug_in_file_travels_to_flowers_nodes(without_docker, tmp_path):
    (tmp_path / "mine.py").write_text("from strategies.fedavg import FedAvg\n")
    told = call("launch", "flower", "fedavg/digits", "--set", "strategy.use=mine.py:FedAvg")
    refused(told, "no file that it names", str(tmp_path / "mine.py"))


@pytest.mark.parametrize("arguments", [["launch"], ["launch", "ray"], ["launch", "ray", "x", "--workers", "0"]])
def test_a_command_line_that_makes_no_sense(arguments):
    assert call(*arguments).exit_code == 2


def test_the_help_says_what_it_does():
    result = call("launch", "--help")
    assert result.exit_code == 0 and "--workers" in result.stdout and "Ctrl-C" in result.stdout


def run_in(folder, stamp, engine="ray"):
    """A run's directory as a container leaves it."""
    path = folder / "mine" / stamp
    path.mkdir(parents=True)
    (path / "experiment.toml").write_text(f'name = "mine"\n\n[engine]\nuse = "{engine}"\naddress = "head:6379"\n')
    (path / "metrics.jsonl").write_text(json.dumps({"stamp": stamp}))
    return path


def test_runs_are_put_beside_those_that_are_there(tmp_path):
    there, root = tmp_path / "there", tmp_path / "runs"
    before = run_in(root, "1-1", "before")
    for stamp in ("1-1", "1-2"):
        run_in(there, stamp)
    (there / "mine" / "comparison").mkdir()
    (there / "mine" / "comparison" / "comparison.md").write_text("new")
    (root / "mine" / "comparison").mkdir()
    (root / "mine" / "comparison" / "comparison.md").write_text("old")
    runs = _settled(there, {"use": "auto"}, root)
    assert runs == [root / "mine" / "1-1-2", root / "mine" / "1-2"]
    assert "before" in (before / "experiment.toml").read_text()
    for path, stamp in zip(runs, ("1-1", "1-2"), strict=True):
        assert json.loads((path / "metrics.jsonl").read_text()) == {"stamp": stamp}
        assert tomllib.loads((path / "experiment.toml").read_text()) == {"name": "mine", "engine": {"use": "auto"}}
    assert (root / "mine" / "comparison" / "comparison.md").read_text() == "new"


def test_sources_are_seen_at_their_own_path_and_can_be_read_by_whoever_runs_there(tmp_path, monkeypatch):
    there, folder = tmp_path / "a $b", tmp_path / "folder"
    for each in (there, folder):
        each.mkdir()
    own = there / "mine.toml"
    own.write_bytes(pack("fedavg/digits", (), ()).path.read_bytes())
    own.chmod(0o600)
    (there / "here").mkdir()
    monkeypatch.chdir(there / "here")
    file = overlay(pack(str(own), (), ()), "driver", {}, folder)
    driver = json.loads(file.read_text())["services"]["driver"]
    (bound,) = driver["volumes"]
    escaped = str(there).replace("$", "$$")
    assert (bound["target"], driver["working_dir"]) == (f"{escaped}/mine.toml", f"{escaped}/here")
    assert bound["read_only"]
    copy = folder / "0-mine.toml"
    assert (bound["source"], copy.stat().st_mode & 0o777) == (str(copy).replace("$", "$$"), 0o644)
    assert copy.read_bytes() == own.read_bytes()


@pytest.mark.skipif(shutil.which("docker") is None, reason="there is no command docker here")
def test_where_the_engine_is_gone_nobody_is_told_to_remove_what_may_hold_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("DOCKER_HOST", "tcp://127.0.0.1:9")
    chosen = COMPOSITIONS["ray"]
    env = dict(os.environ, FEDSIM_IMAGE="image")
    project = Project("fedsim-launch-gone", (composition.path(chosen),), chosen, env)
    with pytest.raises(DockerError, match=r"in the volume fedsim-launch-gone_runs") as told:
        _brought_back(project, tmp_path / "there", {"use": "auto"}, tmp_path)
    assert "down" not in str(told.value)


@pytest.mark.parametrize("number", INTERRUPTS)
def test_a_signal_interrupts_but_not_while_all_is_taken_away(number):
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt), _interruptible():
        with _undisturbed():
            signal.raise_signal(number)
        signal.raise_signal(number)
    assert signal.getsignal(number) is before


def test_a_signal_that_is_ignored_stays_so():
    code = (
        "import signal; from fedsim.containers.launch import _interruptible\n"
        "with _interruptible(): signal.raise_signal(signal.SIGHUP)"
    )
    script = f"trap '' HUP; exec {sys.executable} -c \"$CODE\""
    done = subprocess.run(["sh", "-c", script], env=os.environ | {"CODE": code}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
