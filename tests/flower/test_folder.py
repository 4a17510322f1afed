"""Flower apps in folders: what is read of them, how the command line runs them, and what it says of what is wrong."""

import itertools
import json
import os
import subprocess
import sys

import pytest
import tomli_w
from click.testing import Result
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from typer.testing import CliRunner

from fedsim import cli
from fedsim.config import ConfigError
from fedsim.flower import ClientAppsFailed, run
from fedsim.flower.folder import AppFolder, changed, flattened, load
from fedsim.launch import run_app

MODULE = """
import json
import random
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg


class Parts:
    server_app = ServerApp()


@Parts.server_app.main()
def main(grid, context):
    config = context.run_config
    nodes = len(list(grid.get_node_ids()))
    if config["file"]:
        with Path(config["file"]).open("a") as file:
            file.write(json.dumps({"nodes": nodes, "drawn": random.random(), **config}) + "\\n")
    if config["how"] == "the server fails":
        raise ZeroDivisionError("the server stumbled")
    if config["how"] == "a loop of its own":
        grid.push_messages([])
        return
    FedAvg().start(grid, ArrayRecord({"w": Array(np.zeros(2))}), num_rounds=config["rounds"])


app = ClientApp()


@app.train()
def train(message, context):
    number = context.node_config["partition-id"]
    if context.run_config["how"] == "all fail" or (context.run_config["how"] == "one fails" and number == 1):
        raise OSError("nobody is there")
    metrics = MetricRecord({"num-examples": 1, "loss": context.run_config["model.lr"] * (1 + number)})
    content = RecordDict({"arrays": message.content["arrays"], "metrics": metrics})
    return Message(content, reply_to=message)


@app.evaluate()
def evaluate(message, context):
    if context.run_config["how"] == "all fail":
        raise OSError("nobody is there")
    return Message(RecordDict({"metrics": MetricRecord({"num-examples": 1, "score": 0.25})}), reply_to=message)


nothing = None
"""
CONFIG = {"rounds": 2, "file": "", "how": "well", "model": {"lr": 0.5}, "quiet": True}
numbers = itertools.count()


def call(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, list(map(str, arguments)))


class Folder:
    """An app in a folder, whose module has a name of its own: Python imports a name once."""

    def __init__(self, path):
        self.path, self.module = path, f"somebodys_{next(numbers)}"
        (path / f"{self.module}.py").write_text(MODULE)
        self.components = {
            "serverapp": f"{self.module}:Parts.server_app",
            "clientapp": f"{self.module}:app",
        }
        self.tables = {
            "project": {"name": "somebodys-app"},
            "tool": {"flwr": {"app": {"components": self.components, "config": json.loads(json.dumps(CONFIG))}}},
        }
        self.config = self.tables["tool"]["flwr"]["app"]["config"]

    def write(self):
        (self.path / "pyproject.toml").write_text(tomli_w.dumps(self.tables))
        return self.path

    def run(self, *arguments):
        return call("run", "--flower-app", self.write(), *arguments)

    def noted(self):
        """What the server wrote down, run by run."""
        return [json.loads(line) for line in (self.path / "notes").read_text().splitlines()]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    found = Folder(tmp_path)
    yield found
    sys.modules.pop(found.module, None)


# What is read.


def test_an_app_is_read_with_its_parts_and_its_configuration(folder):
    found = load(folder.write())
    assert isinstance(found, AppFolder)
    assert isinstance(found.server_app, ServerApp) and isinstance(found.client_app, ClientApp)
    module = sys.modules[folder.module]
    assert found.server_app is module.Parts.server_app and found.client_app is module.app
    assert found.name == "somebodys-app" and found.num_nodes is None
    assert found.run_config == {"rounds": 2, "file": "", "how": "well", "model.lr": 0.5, "quiet": True}


def test_an_app_that_states_no_more_than_its_parts_is_read_too(folder):
    del folder.tables["project"], folder.tables["tool"]["flwr"]["app"]["config"]
    found = load(folder.write())
    assert (found.name, found.run_config) == (folder.path.name, {})


def test_a_folder_is_found_from_wherever_one_is(folder, monkeypatch, tmp_path):
    folder.write()
    monkeypatch.chdir(tmp_path.parent)
    assert load(type(tmp_path)(tmp_path.name)).name == "somebodys-app"
    assert sys.path[0] == str(tmp_path.resolve())


def test_a_folder_that_is_read_twice_is_in_pythons_path_once(folder):
    one, two = load(folder.write()), load(folder.path)
    assert one.server_app is not two.server_app  # what its modules kept from an earlier run is gone
    assert sys.path.count(str(folder.path)) == 1


def test_two_apps_whose_modules_have_the_same_names_are_never_taken_for_each_other(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    found = []
    for name in ("first", "second", "first"):
        (tmp_path / name).mkdir(exist_ok=True)
        one = Folder(tmp_path / name)
        (one.path / "everybodys_name.py").write_text(f"{MODULE}\nname = '{name}'\n")
        one.components |= {"serverapp": "everybodys_name:Parts.server_app", "clientapp": "everybodys_name:app"}
        try:
            app = load(one.write()).client_app
        except ValueError as error:
            found.append("everybodys_name" in str(error) and name != "first" and "refused")
        else:
            found.append(app._registered_funcs["train.default"].__globals__["name"])
    sys.modules.pop("everybodys_name", None)
    assert found in (["first", "second", "first"], ["first", "refused", "first"])


@pytest.mark.parametrize(
    ("federations", "expected"),
    [
        ({"default": "big", "big": {"options": {"num-supernodes": 7}}}, 7),
        ({"default": "big", "big": {"options": {"num-supernodes": 7}}, "small": {"options": {"num-supernodes": 2}}}, 7),
        ({"default": "other", "big": {"options": {"num-supernodes": 7}}}, None),
        ({"default": "big", "big": {"address": "127.0.0.1:9093"}}, None),
        ({"big": {"options": {"num-supernodes": 7}}}, None),
        ({}, None),
    ],
)
def test_older_files_say_how_many_nodes_there_are(folder, federations, expected):
    folder.tables["tool"]["flwr"]["federations"] = federations
    assert load(folder.write()).num_nodes == expected


def test_keys_of_nested_tables_are_joined_by_dots():
    nested = {"a": 1, "b": {"c": True, "d": {"e": "x", "f": 0.5}}, "g": {}}
    assert flattened(nested) == {"a": 1, "b.c": True, "b.d.e": "x", "b.d.f": 0.5}


@pytest.mark.parametrize("value", [[1, 2], None, b"x", {1, 2}, object()], ids=str)
def test_what_no_configuration_can_hold_is_refused_with_its_key(value):
    with pytest.raises(ValueError, match=r"run config b\.c = .*: must be a number, a string, true or false"):
        flattened({"a": 1, "b": {"c": value}})


def test_values_are_changed_and_the_others_are_not():
    before = {"a": 1, "b.c": "x"}
    assert changed(before, {"b.c": "y"}) == {"a": 1, "b.c": "y"}
    assert changed(before, {}) == before == {"a": 1, "b.c": "x"}


@pytest.mark.parametrize("changes", [{"z": 1}, {"b": 1}, {"b.c.d": 1}, {"a": 2, "z": 1}], ids=str)
def test_a_key_that_the_app_does_not_have_is_refused_and_those_that_it_has_are_named(changes):
    with pytest.raises(ValueError, match=r"unknown key of the app's run config: .*; it has a, b\.c$"):
        changed({"a": 1, "b.c": "x"}, changes)


def test_a_table_brings_in_no_key_that_the_app_does_not_have():
    with pytest.raises(ValueError, match="run config"):
        changed({"a": 1}, {"a": {"b": 2}})


# What is run.


def test_an_app_runs_in_its_folder_as_it_is(folder):
    folder.config["file"] = str(folder.path / "notes")
    outcome = run_app(folder.write(), changes=["model.lr=2", "how=well"], num_nodes=3, seed=1)
    assert outcome.failed == []
    last = outcome.result.train_metrics_clientapp[2]
    assert last["loss"] == pytest.approx(2 * (1 + 2 + 3) / 3)
    (noted,) = folder.noted()
    assert (noted["nodes"], noted["model.lr"]) == (3, 2)


@pytest.mark.parametrize(("stated", "asked", "expected"), [(None, None, 10), (4, None, 4), (4, 3, 3), (None, 3, 3)])
def test_how_many_nodes_there_are_says_the_caller_else_the_app_else_it_is_ten(folder, stated, asked, expected):
    if stated is not None:
        folder.tables["tool"]["flwr"]["federations"] = {"default": "x", "x": {"options": {"num-supernodes": stated}}}
    folder.config |= {"file": str(folder.path / "notes"), "how": "a loop of its own"}
    run_app(folder.write(), num_nodes=asked)
    assert [noted["nodes"] for noted in folder.noted()] == [expected]


def test_the_same_seed_draws_the_same_and_another_seed_something_else(folder):
    folder.config |= {"file": str(folder.path / "notes"), "how": "a loop of its own"}
    for seed in (0, 0, 1):
        run_app(folder.write(), num_nodes=1, seed=seed)
    first, second, third = (noted["drawn"] for noted in folder.noted())
    assert first == second != third


@pytest.mark.parametrize("seed", [-1, -5])
def test_a_seed_that_is_none_is_bad_input(folder, seed):
    with pytest.raises(ConfigError, match="seed must be >= 0"):
        run_app(folder.write(), num_nodes=2, seed=seed)


def test_errors_of_the_app_are_no_errors_of_its_configuration(folder):
    for how, error in {"the server fails": ZeroDivisionError, "all fail": ClientAppsFailed}.items():
        with pytest.raises(error) as raised:
            run_app(folder.write(), changes=[f"how={how}"], num_nodes=2)
        assert not isinstance(raised.value, ConfigError)


# The command line.


def test_the_command_line_runs_an_app_for_each_seed_and_says_what_came_out(folder):
    notes = folder.path / "notes"
    result = CliRunner().invoke(
        cli.app,
        cli._spread_out(
            ["run", "--flower-app", str(folder.write()), "--num-nodes", "4", "--set", f"file={notes}"]
            + ["--set", "model.lr=0.1", "--set", "quiet=false", "--seeds", "0", "1"]
        ),
    )
    assert result.exit_code == 0, result.output
    told = [line.split() for line in result.stdout.splitlines()]
    mean = 0.1 * (1 + 2 + 3 + 4) / 4
    assert told == [["train", "round", "2", "loss", f"{mean:.4f}"], ["evaluate", "round", "2", "score", "0.2500"]] * 2
    noted = folder.noted()
    assert [(run["nodes"], run["model.lr"], run["quiet"], run["rounds"]) for run in noted] == [(4, 0.1, False, 2)] * 2
    assert noted[0]["drawn"] != noted[1]["drawn"]


@pytest.mark.slow
def test_the_command_itself_does_the_same(folder):
    folder.config["file"] = str(folder.path / "notes")
    command = [sys.executable, "-m", "fedsim", "run", "--flower-app", str(folder.write()), "--num-nodes", "2"]
    environment = os.environ | {"FLWR_HOME": str(folder.path / "home")}
    done = subprocess.run(
        [*command, "--seeds", "0", "1"], cwd=folder.path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("train    round 2") == 2
    assert len(folder.noted()) == 2
    broken = subprocess.run(
        [*command, "--set", "x=1"], cwd=folder.path, env=environment, capture_output=True, text=True
    )
    assert broken.returncode == 2
    assert broken.stderr.startswith("Error: unknown key") and broken.stderr.count("\n") == 1


def test_an_app_with_a_loop_of_its_own_is_done_without_metrics(folder):
    result = folder.run("--num-nodes", 2, "--set", "how=a loop of its own")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == ["done; the app has a loop of its own, so its metrics are where it puts them"]


def test_messages_that_failed_are_counted_and_the_last_one_is_told(folder):
    result = folder.run("--num-nodes", 3, "--set", "how=one fails")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == (
        "failed   2 messages; the last, train of partition 1 in round 2: OSError: nobody is there"
    )


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("the server fails", "The run failed: ZeroDivisionError: the server stumbled"),
        ("all fail", "The run failed: ClientAppsFailed: "),
    ],
)
def test_an_app_that_fails_is_a_failed_run(folder, how, reason):
    result = folder.run("--num-nodes", 2, "--set", f"how={how}")
    assert result.exit_code == 1
    assert reason in result.stderr
    assert "OSError: nobody is there" in result.stderr or how != "all fail"
    assert result.stdout == ""


def refused(result, *words):
    """One message that says these words, and the exit code of bad input."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("Error: "), result.stderr
    for word in words:
        assert str(word) in lines[0], lines[0]


def test_a_folder_without_a_pyproject_is_no_app(tmp_path):
    refused(call("run", "--flower-app", tmp_path), tmp_path, "is not a Flower app", "pyproject.toml")
    refused(call("run", "--flower-app", tmp_path / "nowhere"), tmp_path / "nowhere", "is not a Flower app")


def test_a_file_is_no_folder(folder):
    folder.write()
    refused(call("run", "--flower-app", folder.path / "pyproject.toml"), "pyproject.toml")


@pytest.mark.parametrize("content", [b"[tool", b"\xff\xfe", b"a = 1\na = 2"], ids=["cut off", "no text", "twice"])
def test_a_pyproject_that_cannot_be_read_is_bad_input(tmp_path, content):
    (tmp_path / "pyproject.toml").write_bytes(content)
    refused(call("run", "--flower-app", tmp_path), tmp_path / "pyproject.toml", "cannot be read")


@pytest.mark.parametrize(
    "tables",
    [
        {},
        {"project": {"name": "x"}},
        {"tool": {}},
        {"tool": {"flwr": {}}},
        {"tool": {"flwr": {"app": {}}}},
        {"tool": {"flwr": {"app": {"components": "x:app"}}}},
        {"tool": 3},
    ],
    ids=str,
)
def test_a_project_without_components_is_no_app(tmp_path, tables):
    (tmp_path / "pyproject.toml").write_text(tomli_w.dumps(tables))
    refused(call("run", "--flower-app", tmp_path), "has no [tool.flwr.app.components]")


COMPONENTS = {
    "missing": (None, "must be 'package.module:name'"),
    "no string": (3, "must be 'package.module:name'"),
    "no name": ("{module}", "must be 'package.module:name'"),
    "an empty name": ("{module}:", "must be 'package.module:name'"),
    "no module": (":app", "must be 'package.module:name'"),
    "a module that is not there": ("nowhere_at_all:app", "No module named 'nowhere_at_all'"),
    "a module within a module": ("{module}.more:app", "is not a package"),
    "a relative module": (".{module}:app", "clientapp"),
    "a name that is not there": ("{module}:nobody", "has no attribute 'nobody'"),
    "a name within one that is not there": ("{module}:Parts.nobody", "has no attribute 'nobody'"),
    "the other part": ("{module}:Parts.server_app", "is a ServerApp, must be a ClientApp"),
    "a function": ("{module}:train", "is a function, must be a ClientApp"),
    "a class": ("{module}:ClientApp", "is a type, must be a ClientApp"),
    "nothing": ("{module}:nothing", "is a NoneType, must be a ClientApp"),
}


@pytest.mark.parametrize(("use", "reason"), COMPONENTS.values(), ids=COMPONENTS)
def test_a_component_that_is_none_is_told_with_its_place(folder, use, reason):
    if use is None:
        del folder.components["clientapp"]
    else:
        folder.components["clientapp"] = use.format(module=folder.module) if isinstance(use, str) else use
    refused(folder.run(), folder.path / "pyproject.toml", "tool.flwr.app.components.clientapp", reason)


def test_the_server_is_looked_at_as_well(folder):
    folder.components["serverapp"] = folder.components["clientapp"]
    refused(folder.run(), "tool.flwr.app.components.serverapp", "is a ClientApp, must be a ServerApp")


def test_a_module_that_needs_what_is_not_installed_says_so(folder):
    (folder.path / f"{folder.module}.py").write_text("import a_package_that_nobody_has\n")
    refused(folder.run(), "No module named 'a_package_that_nobody_has'")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("x=1", "unknown key of the app's run config: x; it has file, how, model.lr, quiet, rounds"),
        ("model=1", "unknown key of the app's run config: model"),
        ("model.lr.x=1", "unknown key of the app's run config: model.lr.x"),
        ("rounds=[1, 2]", "run config rounds = [1, 2]: must be a number, a string, true or false"),
        ("rounds=2020-01-01", "run config rounds = "),
        ("rounds={x = 1}", "run config"),
        ("rounds", "--set 'rounds': must be like"),
        ("=3", "--set '=3': must be like"),
    ],
)
def test_a_change_that_the_app_cannot_take_is_bad_input(folder, change, reason):
    refused(folder.run("--set", change), reason)


STATED = {
    "config that is no table": (("tool", "flwr", "app", "config"), 3),
    "a project that is no table": (("project",), "x"),
    "a list in the config": (("tool", "flwr", "app", "config", "list"), [1]),
    "no nodes": (("tool", "flwr", "federations"), {"default": "x", "x": {"options": {"num-supernodes": 0}}}),
    "nodes below zero": (("tool", "flwr", "federations"), {"default": "x", "x": {"options": {"num-supernodes": -2}}}),
    "true nodes": (("tool", "flwr", "federations"), {"default": "x", "x": {"options": {"num-supernodes": True}}}),
    "options that are no table": (("tool", "flwr", "federations"), {"default": "x", "x": {"options": 3}}),
    "a default that is no name": (("tool", "flwr", "federations"), {"default": [1]}),
}


@pytest.mark.parametrize(("path", "value"), STATED.values(), ids=STATED)
def test_a_pyproject_that_states_nonsense_is_bad_input(folder, path, value):
    *above, last = path
    table = folder.tables
    for name in above:
        table = table[name]
    table[last] = value
    refused(folder.run())


def test_a_seed_below_zero_is_bad_input_for_the_command_line(folder):
    refused(folder.run("--seeds", "-1"), "seed must be >= 0")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["fedavg/digits", "--flower-app", "."], "--flower-app runs an app, no experiment"),
        (["--flower-app", ".", "--tracker", "tensorboard"], "--flower-app runs an app, no experiment"),
        (["fedavg/digits", "--num-nodes", "3"], "--num-nodes is for --flower-app"),
        ([], "name an experiment"),
        (["--num-nodes", "3"], "name an experiment"),
    ],
    ids=str,
)
def test_options_that_do_not_go_together_are_bad_input(arguments, reason, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(call("run", *arguments), reason)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", ["0", "-1", "two", "1.5"])
def test_a_number_of_nodes_that_is_none_is_bad_input(folder, number):
    result = folder.run("--num-nodes", number)
    assert result.exit_code == 2
    assert "--num-nodes" in result.stderr and "Traceback" not in result.stderr


def test_where_an_error_came_from_is_shown_when_asked_for(folder):
    result = folder.run("--set", "x=1", "--traceback")
    assert result.exit_code == 2
    assert "Traceback" in result.stderr and result.stderr.splitlines()[-1].startswith("Error: unknown key")


def test_the_parts_of_a_folder_are_those_that_run(folder):
    """What is loaded is not a copy: who changes the app's module changes what runs."""
    found = load(folder.write())
    heard = []
    module = sys.modules[folder.module]
    module.Parts.server_app._main = lambda grid, context: heard.extend(
        grid.send_and_receive([Message(RecordDict({"c": ConfigRecord()}), n, "query") for n in grid.get_node_ids()])
    )
    with pytest.raises(ClientAppsFailed, match="No query function registered"):
        run(found.server_app, found.client_app, num_nodes=2)
    assert len(heard) == 2 and found.server_app is module.Parts.server_app
