"""The command line: what it prints, and its exit codes."""

import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from click.testing import Result
from typer.testing import CliRunner

from fedsim import cli
from fedsim.config import PARTS, bundled, names

TABLES: dict[str, Any] = {
    "name": "small",
    "rounds": 2,
    "evaluate_every": 1,
    "data": {"use": "fedsim.data.datasets:gaussians", "examples": 60, "classes": 3, "features": 4},
    "partition": {"use": "fedsim.data.partition:iid", "clients": 3},
    "split": {"use": "fedsim.data.federation:divide", "test": 0.2},
    "model": {"use": "fedsim.networks:logistic"},
    "strategy": {"use": "strategies.fedavg:FedAvg"},
    "clients": {"train": {"use": "clients.sgd:Sgd", "lr": 0.1}},
}
PLUGIN = """
from dataclasses import dataclass
from clients.sgd import Sgd
from strategies.fedavg import FedAvg

@dataclass(frozen=True)
class Failing(FedAvg):
    def aggregate(self, state, task, replies):
        if task.round == 2:
            raise ValueError("the server stumbled")
        return super().aggregate(state, task, replies)

@dataclass(frozen=True)
class Stopping(FedAvg):
    def aggregate(self, state, task, replies):
        raise KeyboardInterrupt

class Sound(Sgd): ...

@dataclass(frozen=True)
class Silent(Sgd):
    def prepare(self, examples, rng):
        raise OSError("nobody is there")
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with an experiment and plug-ins in it."""
    (tmp_path / "small.toml").write_text(tomli_w.dumps(TABLES))
    (tmp_path / "plugin.py").write_text(PLUGIN)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, list(arguments))


def directory(result: Result) -> str:
    """The run's directory, as the output names it."""
    found = re.search(r"^run +(.+)$", result.stdout, re.MULTILINE)
    assert found is not None
    return found[1]


def test_a_run_ends_with_its_accuracy_and_where_to_find_it(folder):
    result = call("run", "small.toml")
    assert (result.exit_code, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert [line.split()[2] for line in lines[:2]] == ["1/2", "2/2"]
    assert re.fullmatch(r"test/accuracy \d\.\d{4}  clients/accuracy \d\.\d{4}  after 2 rounds", lines[-3])
    assert Path(directory(result), "metrics.jsonl").is_file()
    assert Path(lines[-1].split()[1]).is_file()


def test_a_run_without_an_evaluation_is_done_too(folder):
    result = call("run", "small.toml", "--set", "evaluate_every=0", "--out", "elsewhere")
    assert result.exit_code == 0
    assert "done  after 2 rounds" in result.stdout
    assert directory(result).startswith("elsewhere/small/")


def test_one_round_is_not_several(folder):
    result = call("run", "small.toml", "--set", "rounds=1")
    assert result.exit_code == 0
    assert result.stdout.splitlines()[-3].endswith("after 1 round")


def test_a_run_for_each_seed_ends_with_a_comparison(folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fedsim", "run", "--seeds", "0", "1", "2", "small.toml", "--set", "rounds=1"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    shown = capsys.readouterr().out
    runs = [Path(line.split()[1]) for line in shown.splitlines() if line.startswith("run ")]
    assert [tomllib.loads((path / "experiment.toml").read_text())["seed"] for path in runs] == [0, 1, 2]
    assert re.search(r"^small .*±.* n=3 *$", shown, re.MULTILINE)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("run x --seeds 0 1 2", "run x --seeds 0 --seeds 1 --seeds 2"),
        ("run --seeds 0 1 x --set a=1", "run --seeds 0 --seeds 1 x --set a=1"),
        ("run x --seeds 0 --seeds 1", "run x --seeds 0 --seeds 1"),
        ("run x --seeds 0,1,2", "run x --seeds 0 --seeds 1 --seeds 2"),
        ("run x --seeds 0, 1", "run x --seeds 0 --seeds 1"),
        ("run x --seeds=0 1,2 --set a=1", "run x --seeds 0 --seeds 1 --seeds 2 --set a=1"),
        ("run x --seeds=-1", "run x --seeds -1"),
        ("run x --seeds", "run x --seeds"),
        ("run --seeds x", "run --seeds x"),
        ("run x --set rounds=3", "run x --set rounds=3"),
    ],
)
def test_several_seeds_are_spread_out_for_the_parser(given, expected):
    assert cli._spread_out(given.split()) == expected.split()


@pytest.mark.parametrize("arguments", [["--seeds"], ["--seeds", "one"], ["--seeds", "1.5"], ["--seed", "1"]])
def test_a_seed_that_is_none_is_bad_input(folder, arguments):
    result = call("run", "small.toml", *arguments)
    assert result.exit_code == 2
    assert "Error" in result.stderr
    assert not Path("runs").exists()


def test_a_negative_seed_is_bad_input(folder):
    result = call("run", "small.toml", "--seeds", "-1")
    assert (result.exit_code, result.stderr.count("Error:")) == (2, 1)
    assert "seed = -1: must be int >= 0" in result.stderr


def test_bad_input_shows_where_it_came_from_only_on_demand(folder):
    brief, full = (call("run", "small.toml", "--set", "rounds=0", *more) for more in ([], ["--traceback"]))
    assert (brief.exit_code, full.exit_code) == (2, 2)
    assert "Traceback" not in brief.stderr
    assert "Traceback" in full.stderr
    assert full.stderr.endswith(brief.stderr)


def test_too_few_replies_are_a_failed_run_without_a_traceback(folder):
    result = call("run", "small.toml", "--set", "clients.train.use=plugin.py:Silent")
    assert result.exit_code == 1
    assert "Traceback" not in result.stderr
    failed, where = result.stderr.splitlines()
    assert failed == (
        "The run failed: round 1: 0 of 3 clients answered, min_replies is 1; the others: OSError: nobody is there"
    )
    path = Path(where.split()[4].rstrip(";"))
    assert where.endswith(f"; {path}/failures.jsonl tells why, client by client.")
    assert (path / "failures.jsonl").read_text().count("OSError: nobody is there") == 3
    assert call("resume", str(path)).exit_code == 1


@pytest.mark.parametrize("resumed", [False, True])
def test_a_strategy_that_raises_is_a_failed_run_with_a_traceback(folder, resumed):
    result = call("run", "small.toml", "--set", "strategy.use=plugin.py:Failing")
    if resumed:
        (path,) = Path("runs/small").iterdir()
        result = call("resume", str(path))
    assert result.exit_code == 1
    assert "Traceback (most recent call last):" in result.stderr
    assert result.stderr.splitlines()[-1] == "The run failed: ValueError: the server stumbled"
    assert "it can be resumed" not in result.stderr


def test_an_interrupted_run_says_where_it_is(folder):
    result = call("run", "small.toml", "--set", "strategy.use=plugin.py:Stopping")
    (path,) = Path("runs/small").iterdir()
    assert result.exit_code == 130
    assert result.stderr == f"Interrupted.\nThe run is in {path}; it can be resumed: `fedsim resume {path}`\n"


def test_a_run_is_resumed_for_longer(folder):
    path = directory(call("run", "small.toml"))
    result = call("resume", path, "--rounds", "3")
    assert result.exit_code == 0
    assert "after 3 rounds" in result.stdout
    assert directory(result) == path


@pytest.mark.parametrize("command", ["resume", "report", "compare"])
def test_a_directory_that_is_no_run_is_bad_input(folder, command):
    (folder / "empty").mkdir()
    for path in ("nowhere", "empty", "small.toml"):
        result = call(command, path)
        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr.startswith("Error: ")
        assert path in result.stderr
        assert result.stderr.count("\n") == 1


def test_a_report_is_written_again(folder):
    path = Path(directory(call("run", "small.toml")))
    index = path / "report" / "index.html"
    index.unlink()
    result = call("report", str(path))
    assert result.exit_code == 0
    assert result.stdout.strip() == str(index)
    assert index.is_file()


def test_runs_are_compared_and_the_comparison_is_written_if_asked_for(folder):
    for lr in ("0.5", "1.0"):
        assert call("run", "small.toml", "--set", f"strategy.lr={lr}", "--set", "rounds=1").exit_code == 0
    result = call("compare", "runs", "--out", "compared")
    assert result.exit_code == 0
    assert len([line for line in result.stdout.splitlines() if line.startswith("small")]) == 2
    assert (folder / "compared" / "comparison.md").is_file()


def test_a_long_table_is_not_cut_where_there_is_no_terminal(folder):
    result = call("data", "list")
    assert result.exit_code == 0
    assert "…" not in result.stdout
    assert len(result.stdout.splitlines()) == 1 + len(names("fedsim.datasets"))


def test_the_list_has_every_bundled_experiment_and_every_short_name():
    result = call("list")
    assert result.exit_code == 0
    words = result.stdout.split()
    assert set(bundled()) <= set(words)
    for group, _ in PARTS.values():
        for short, target in names(group).items():
            assert short in words
            assert target in words


def test_the_doctor_tells_versions_and_devices():
    result = call("doctor")
    assert result.exit_code == 0
    told = {line.split()[0] for line in result.stdout.splitlines()}
    assert {"python", "torch", "flwr", "processors", "devices", "free"} <= told


def test_the_doctor_tells_what_an_experiment_would_run(folder):
    result = call("doctor", "small.toml", "--set", "sample.use=uniform", "--set", "sample.count=2")
    assert result.exit_code == 0
    parameters = 4 * 3 + 3
    assert re.search(r"^experiment +small, 2 rounds", result.stdout, re.MULTILINE)
    assert re.search(r"^clients +3, 2 in round 1", result.stdout, re.MULTILINE)
    assert re.search(rf"^model +{parameters} parameters, {4 * parameters} B", result.stdout, re.MULTILINE)
    assert re.search(r"^engine +Vectorised\(block=None\)", result.stdout, re.MULTILINE)
    assert re.search(r"^block +2 clients at once", result.stdout, re.MULTILINE)
    assert not Path("runs").exists()


def test_the_doctor_knows_a_block_that_was_asked_for_and_an_engine_without_one(folder):
    block = call("doctor", "small.toml", "--set", "engine={use='vectorised', block=1}")
    assert re.search(r"^block +1 clients at once", block.stdout, re.MULTILINE)
    assert not re.search(r"^block", call("doctor", "small.toml", "--set", "engine.use=sequential").stdout, re.MULTILINE)


def test_the_data_of_an_experiment_are_described_and_drawn(folder):
    result = call("data", "describe", "small.toml", "--plot", "shares.png")
    assert result.exit_code == 0
    assert re.search(r"^clients +3 *$", result.stdout, re.MULTILINE)
    assert re.search(r"^examples +48 *$", result.stdout, re.MULTILINE)
    shares = [float(share) for share in re.findall(r"^y = \d +(\S+) *$", result.stdout, re.MULTILINE)]
    assert len(shares) == 3
    assert sum(shares) == pytest.approx(1, abs=0.002)
    assert (folder / "shares.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--column", "a"], "has no column 'a'"),
        (["--column", "x"], "column 'x' must hold one integer"),
        (["--plot", "shares.doc"], "doc"),
        (["--plot", "nowhere/shares.png"], "nowhere"),
    ],
)
def test_data_that_cannot_be_described_are_bad_input(folder, arguments, told):
    result = call("data", "describe", "small.toml", *arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: ")
    assert told in result.stderr
    assert "Traceback" not in result.stderr


def test_a_generated_data_set_needs_no_files():
    result = call("data", "fetch", "gaussians", "digits")
    assert result.exit_code == 0
    assert result.stdout == "gaussians: needs no files\ndigits: needs no files\n"


def test_an_unknown_data_set_is_bad_input():
    result = call("data", "fetch", "mnist")
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: data set 'mnist': must be one of adult, ")


def unreachable(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Makes this machine one without a network and without files."""
    monkeypatch.delenv("FEDSIM_DATA", raising=False)
    monkeypatch.setenv("FEDSIM_CACHE", str(folder / "cache"))
    monkeypatch.setenv("FEDSIM_MIRROR", "http://127.0.0.1:9")  # the port at which nobody answers
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def test_a_data_set_that_cannot_be_fetched_is_told_with_what_to_do(folder, monkeypatch):
    unreachable(monkeypatch, folder)
    result = call("data", "fetch", "adult")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("Error: http://127.0.0.1:9/adult/adult.zip could not be fetched")
    assert "Set FEDSIM_DATA" in result.stderr
    assert "Traceback" not in result.stderr


def test_an_experiment_whose_data_cannot_be_fetched_is_told_so(folder, monkeypatch):
    unreachable(monkeypatch, folder)
    result = call("run", "fedavg/adult")
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: data: fedsim.data.datasets:adult: http://127.0.0.1:9/adult/adult.zip")
    assert "Traceback" not in result.stderr
    assert not Path("runs").exists()


@pytest.mark.skipif("FEDSIM_DATA" not in os.environ, reason="needs the data sets: set FEDSIM_DATA to their folder")
def test_a_data_set_that_is_here_is_not_fetched(folder, monkeypatch):
    data = os.environ["FEDSIM_DATA"]
    unreachable(monkeypatch, folder)
    monkeypatch.setenv("FEDSIM_DATA", data)
    result = call("data", "fetch", "filmtrust")
    assert result.exit_code == 0
    assert result.stdout.startswith(f"filmtrust: {data}")


def test_an_unknown_tracker_is_bad_input(folder):
    result = call("run", "small.toml", "--tracker", "comet")
    assert result.exit_code == 2
    assert result.stderr == "Error: tracker 'comet': must be one of tensorboard, wandb, mlflow\n"
    assert not Path("runs").exists()


@pytest.mark.parametrize("arguments", [["nonsense"], ["run"], ["run", "a", "b"], ["resume", "x", "--rounds", "0"]])
def test_a_command_line_that_makes_no_sense_is_bad_input(folder, arguments):
    result = call(*arguments)
    assert result.exit_code == 2
    assert "Traceback" not in result.stderr


def test_help_is_there_for_every_command():
    for command in ("run", "resume", "report", "compare", "list", "doctor", "data", "data fetch", "data describe"):
        result = call(*command.split(), "--help")
        assert result.exit_code == 0
        assert "Usage:" in result.stdout
        assert "\\" not in result.stdout


@pytest.mark.slow
def test_the_module_is_the_command_and_runs_without_a_terminal(folder):
    done = subprocess.run(
        [sys.executable, "-m", "fedsim", "run", "small.toml", "--seeds", "0", "1"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
    assert done.stdout.count("\nrun ") == 2
    assert "n=2" in done.stdout


@pytest.mark.slow
def test_a_run_on_a_terminal_has_a_bar(folder):
    terminal, other = os.openpty()
    process = subprocess.Popen([sys.executable, "-m", "fedsim", "run", "small.toml"], stdout=other, stdin=other)
    os.close(other)
    shown = b""
    while True:
        try:
            shown += os.read(terminal, 4096)
        except OSError:  # how Linux tells that the other side is gone
            break
    os.close(terminal)
    assert process.wait() == 0
    assert b"\x1b[" in shown
    assert b"2/2" in shown
    assert b"after 2 rounds" in shown


def test_the_version_is_told():
    result = call("--version")
    assert (result.exit_code, result.stdout) == (0, f"fedsim {version('fedsim')}\n")


def test_a_plug_in_that_was_changed_since_is_warned_of_in_plain_words(folder):
    path = directory(call("run", "small.toml", "--set", "clients.train.use=plugin.py:Sound"))
    (folder / "plugin.py").write_text(PLUGIN + "\n")
    result = call("resume", path, "--rounds", "3")
    assert result.exit_code == 0
    assert result.stderr.startswith(f"Warning: {folder / 'plugin.py'} was changed since the run in {path} began")
    assert result.stderr.count("\n") == 1


def test_an_action_that_is_mistyped_is_recognised(folder):
    result = call("run", "small.toml", "--set", "clients.trian.lr=1")
    assert result.exit_code == 2
    assert "clients.trian.use is missing" in result.stderr
    assert "did you mean train?" in result.stderr
