"""Hundreds of damaged experiment files: each ends with exit code 2 and one message that names what is wrong."""

import copy
import datetime
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tomli_w
from typer.testing import CliRunner

from fedsim.cli import app
from fedsim.config import PARTS, Experiment, bundled, locate

Tables = dict[str, Any]
MISSING = object()
BASE: Tables = {
    "name": "sound",
    "seed": 1,
    "rounds": 1,
    "evaluate_every": 1,
    "evaluate_clients": 2,
    "checkpoint_every": 1,
    "keep_checkpoints": 2,
    "min_replies": 1,
    "threads": 1,
    "data": {"use": "fedsim.data.datasets:gaussians", "examples": 60, "classes": 3, "features": 4, "test": 0.2},
    "partition": {"use": "fedsim.data.partition:dirichlet", "clients": 3, "alpha": 10.0, "column": "y", "min_size": 1},
    "split": {"use": "fedsim.data.federation:divide", "validation": 0.1, "test": 0.2},
    "model": {"use": "fedsim.networks:mlp", "hidden": [4], "dropout": 0.0},
    "strategy": {
        "use": "strategies.fedopt:FedOpt",
        "optimiser": "adam",
        "lr": 0.1,
        "beta1": 0.9,
        "beta2": 0.99,
        "tau": 0.01,
    },
    "clients": {
        "train": {
            "use": "clients.sgd:Sgd",
            "lr": 0.1,
            "momentum": 0.5,
            "weight_decay": 0.0,
            "epochs": 1,
            "batch_size": 8,
        },
        "evaluate": {"use": "fedsim.evaluation:Evaluate", "batch_size": 16, "part": "test"},
    },
    "sample": {
        "use": "fedsim.sampling:dropout",
        "probability": 0.0,
        "sample": {
            "use": "fedsim.sampling:available",
            "probability": 1.0,
            "sample": {"use": "fedsim.sampling:uniform", "fraction": 0.5},
        },
    },
    "engine": {"use": "fedsim.engines.local:Vectorised", "block": 2},
}


class Damage(NamedTuple):
    """A damaged experiment, and what its message must have."""

    label: str
    tables: Tables
    told: tuple[str, ...]


def leaves(tables: Tables, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(path, value) of each value that is not a table."""
    for key, value in tables.items():
        if isinstance(value, dict):
            yield from leaves(value, (*path, key))
        else:
            yield (*path, key), value


def branches(tables: Tables, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The path of each table."""
    for key, value in tables.items():
        if isinstance(value, dict):
            yield (*path, key)
            yield from branches(value, (*path, key))


def altered(tables: Tables, path: tuple[str, ...], value: Any) -> Tables:
    """The tables with another value at a path, or without it if the value is MISSING."""
    tables = copy.deepcopy(tables)
    branch = tables
    for key in path[:-1]:
        branch = branch[key]
    if value is MISSING:
        del branch[path[-1]]
    else:
        branch[path[-1]] = value
    return tables


def written(value: Any) -> str:
    """How a message writes a value."""
    return value.isoformat() if isinstance(value, datetime.date | datetime.time) else repr(value)


def wrong_types(name: str, tables: Tables) -> Iterator[Damage]:
    day, moment = datetime.date(2020, 1, 31), datetime.datetime(2020, 1, 31, 7, 30)
    for path, value in leaves(tables):
        others: list[Any] = [day, {"a": 1}]
        if isinstance(value, str):
            others += [3, ["text"], True]
        elif isinstance(value, list):
            others += [3, ["text"]]
        else:
            others += ["text", True, float("nan"), moment, [value]]
        for other in others if name == "base" else others[len(written(value)) % len(others) :][:1]:
            label = f"{name}: {'.'.join(path)} = {written(other)}"
            yield Damage(label, altered(tables, path, other), (".".join(path), written(other), "must be"))


def not_tables(name: str, tables: Tables) -> Iterator[Damage]:
    for path in branches(tables):
        place = ".".join(path)
        for other in (3, "text", [1], datetime.date(2020, 1, 31)):
            if path[-1] == "clients" and other != 3:
                continue
            yield Damage(
                f"{name}: {place} = {written(other)}", altered(tables, path, other), (place, written(other), "must be")
            )


def unknown_keys(name: str, tables: Tables) -> Iterator[Damage]:
    for path in [(), *branches(tables)]:
        if path == ("clients",):
            continue
        surplus = ".".join((*path, "surplus"))
        yield Damage(
            f"{name}: {surplus}", altered(tables, (*path, "surplus"), 77), (f"{surplus} = 77", "unknown key surplus")
        )


def missing(name: str, tables: Tables) -> Iterator[Damage]:
    for path in branches(tables):
        if path not in [("clients",), ("split",)]:  # for a split there is a default
            place = ".".join(path)
            yield Damage(f"{name}: no {place}.use", altered(tables, (*path, "use"), MISSING), (place, "use"))
    for key in ("name", "rounds", "data", "partition", "model", "strategy", "clients"):
        yield Damage(f"{name}: no {key}", altered(tables, (key,), MISSING), (f"{key} is missing", "must be"))
    for path in (("partition", "clients"), ("clients", "train"), ("clients", "train", "lr")):
        if path == ("clients", "train") and len(tables["clients"]) > 1 and name != "base":
            continue  # missed only when the strategy is there, which takes the data
        if any(path == known[: len(path)] for known, _ in leaves(tables)):
            place = ".".join(path)
            yield Damage(f"{name}: no {place}", altered(tables, path, MISSING), (place,))


def bad_uses(name: str, tables: Tables) -> Iterator[Damage]:
    uses = {
        "no.such.module:thing": "there is no module 'no'",
        "fedsim.nowhere:thing": "there is no module 'fedsim.nowhere'",
        "fedsim.networks:nothing": "has no 'nothing'",
        "fedsim.networks:mlp.nothing": "has no 'mlp.nothing'",
        "fedsim.ranges:Positive.__metadata__": "must be callable",
        "builtins:dict": "arguments cannot be told",
        "nowhere.py:thing": "there is no file 'nowhere.py'",
        "unheard-of": "no entry point",
        "fedsim.networks:": "must be 'package.module:name'",
        ":mlp": "must be 'package.module:name'",
        "": "must be 'package.module:name'",
        ".relative:thing": "failed",
        "x" * 300 + ".py:thing": "there is no file",
        "syntax.py:thing": "SyntaxError",
        "raises.py:thing": "ZeroDivisionError",
        "leaves.py:thing": "SystemExit",
        "needs.py:thing": "ModuleNotFoundError",
        "bytes.py:thing": "failed",
        "number.py:thing": "must be callable",
    }
    for path in branches(tables):
        if path == ("clients",):
            continue
        for use, told in uses.items():
            place = ".".join((*path, "use"))
            shown = use if len(use) < 100 else use[:50]
            yield Damage(f"{name}: {place} = {shown!r}", altered(tables, (*path, "use"), use), (place, shown, told))


def out_of_range(name: str, tables: Tables) -> Iterator[Damage]:
    values: dict[str, list[Any]] = {
        "name": ["", "a b", "../up", ".hidden", "x" * 101, "a\nb", "ä"],
        "seed": [-1, 2**63, 10**30],
        "rounds": [0, -5, 10**12],
        "evaluate_every": [-1, 10**12],
        "evaluate_clients": [0, -1],
        "checkpoint_every": [0, -1],
        "keep_checkpoints": [0, "some", -1],
        "min_replies": [-1, -2],
        "threads": [0, 10**9],
        "sweep": [3, [], {"strategy.lr": []}, {"strategy.lr": 1.0}],
        "against": [3, "clients/loss", [1]],
        "data.examples": [0, -60, 1.5],
        "data.test": [-0.1, 1.0, float("inf")],
        "data.seed": [-1],
        "partition.clients": [0, -3, 2.5, 10**25],
        "partition.alpha": [0, -1.0, float("inf"), 10**400],
        "partition.min_size": [-1],
        "split.test": [-0.1, 1.1, 2],
        "split.validation": [-0.1, 1.1],
        "model.hidden": [[0], [4, -1], [1.5]],
        "model.dropout": [-0.1, 1.5],
        "model.federation": [3],
        "strategy.optimiser": ["sgd", "Adam"],
        "strategy.lr": [0, -0.1, float("inf"), -float("inf")],
        "strategy.beta1": [-0.1, 1.01],
        "strategy.tau": [0.0],
        "clients.train.lr": [0, -1, float("inf")],
        "clients.train.momentum": [1.5, -0.5],
        "clients.train.weight_decay": [-1e-9],
        "clients.train.epochs": [0, 1.0],
        "clients.train.batch_size": [0, -8],
        "clients.train.model": ["mlp"],
        "clients.evaluate.part": ["training"],
        "clients.evaluate.num_classes": [0],
        "sample.probability": [-0.1, 1.1],
        "sample.sample.probability": [2],
        "sample.sample.sample": [{"fraction": 0.5}, "uniform"],
        "sample.sample.sample.fraction": [0, 1.5, -0.5, "half"],
        "engine.block": [0, -1],
    }
    for place, wrong in values.items():
        for value in wrong:
            tables_now = altered(tables, tuple(place.split(".")), value)
            shown = written(value)[:60]
            yield Damage(f"{name}: {place} = {shown}", tables_now, (place, shown, "must be"))


def contradictions(name: str, tables: Tables) -> Iterator[Damage]:
    """Each value is allowed, but not together with the others; some are found only when the objects are made."""
    wrong: list[tuple[dict[str, Any], tuple[str, ...]]] = [
        ({"sample": {"use": "uniform"}}, ("sample", "fraction = None and count = None")),
        ({"sample": {"use": "uniform", "fraction": 0.5, "count": 2}}, ("sample", "fraction = 0.5 and count = 2")),
        ({"sample": {"use": "uniform", "count": 4}}, ("sample", "at most the number of clients, 3, got 4")),
        ({"partition": {"use": "iid", "clients": 99}}, ("partition", "48 examples are too few for 99 clients")),
        ({"partition": {"use": "by_column"}}, ("partition", "no column 'client'", "x, y")),
        ({"partition": {"use": "by_column", "column": "x"}}, ("partition", "column 'x' must hold one integer")),
        ({"partition": {"use": "mlp"}}, ("partition.use = 'mlp'", "no entry point")),
        ({"split": {"use": "fedsim.data.federation:divide", "validation": 0.7, "test": 0.7}}, ("split", "0.7 + 0.7")),
        ({"model": {"use": "cnn"}}, ("model", "a cnn needs images")),
        ({"model": {"use": "fedsim.data.partition:apportion"}}, ("model.weights is missing",)),
        ({"strategy": {"use": "fedsim.networks:mlp"}}, ("strategy", "gives a Model, it must give a Strategy")),
        ({"model": {"use": "plain.py:nothing"}}, ("model", "gives a NoneType, it must give a Model")),
        ({"data": {"use": "plain.py:nothing"}}, ("data", "gives a NoneType, it must give a Dataset")),
        ({"sample": {"use": "plain.py:nothing"}}, ("sample", "gives None, it must give a sampler")),
        ({"engine": {"use": "plain.py:nothing"}}, ("engine", "gives a NoneType, it must give a Engine")),
        ({"engine": {"use": "plain.py:fails"}}, ("engine", "KeyError: 'lost'")),
        ({"clients": {"trian": {"use": "sgd", "lr": 0.1}}}, ("clients.train is missing", "clients.trian")),
        ({"clients": {"train": {"use": "evaluate", "lr": 0.1}}}, ("clients.train.lr = 0.1", "unknown key lr")),
        (
            {"clients": {"train": {"use": "sgd", "lr": 0.1}, "trian": {"lr": 1}}},
            ("clients.trian.use is missing", "did you mean train?"),
        ),
        ({"clients": {}}, ("clients = {}", "must be")),
        (
            {"data": {"use": "gaussians", "examples": 60, "test": 0.0}, "split": {"use": "plain.py:split"}},
            ("nothing to evaluate on", "split.test", "evaluate_every = 0"),
        ),
    ]
    for changes, told in wrong:
        yield Damage(f"{name}: {changes}", copy.deepcopy(tables) | changes, told)


def bundled_tables() -> Iterator[tuple[str, Tables]]:
    for name in bundled():
        tables = tomllib.loads(locate(name).read_text(encoding="utf-8"))
        yield name, {key: value for key, value in tables.items() if key not in ("sweep", "against")}  # no parts


def damages() -> Iterator[Damage]:
    for damage in (wrong_types, not_tables, unknown_keys, missing, bad_uses, out_of_range, contradictions):
        yield from damage("base", BASE)
    for name, tables in bundled_tables():
        for damage in (wrong_types, unknown_keys, missing):
            yield from damage(name, tables)


DAMAGES = list({repr(damage.tables): damage for damage in damages()}.values())
FILES = {
    "syntax.py": b"def thing(:\n",
    "raises.py": b"1 / 0\n",
    "leaves.py": b"import sys\nsys.exit(0)\n",
    "needs.py": b"import no_such_module_anywhere\n",
    "bytes.py": b"thing = '\xff\xfe'\n",
    "number.py": b"thing = 3\n",
    "plain.py": (
        b"from fedsim.data.federation import divide\n"
        b"def nothing():\n    return None\n"
        b"def fails():\n    raise KeyError('lost')\n"
        b"def split(dataset, partition):\n    return divide(dataset, partition)\n"
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with plug-in files, most of them broken."""
    folder = tmp_path_factory.mktemp("experiments")
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    return folder


def told_by(arguments: list[str], folder: Path) -> str:
    """The one message with which a command with these arguments is refused."""
    result = CliRunner().invoke(app, [*arguments, "--out", str(folder / "runs")])
    assert result.exit_code == 2, result.output
    assert not (folder / "runs").exists()
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert result.stderr.startswith("Error: ")
    return result.stderr.removeprefix("Error: ").strip()


def test_there_are_hundreds_of_damaged_experiments_and_no_two_are_the_same():
    assert len({tomli_w.dumps(damage.tables) for damage in DAMAGES}) == len(DAMAGES) >= 200


def test_every_part_and_every_plain_key_is_damaged_somewhere():
    assert {*Experiment.model_fields} == {*BASE, "sweep", "against"}
    assert {*PARTS} <= {damage.told[0].split(".")[0].split(" ")[0] for damage in DAMAGES}


def test_the_undamaged_base_runs(folder, tmp_path):
    path = folder / "sound.toml"
    path.write_text(tomli_w.dumps(BASE))
    result = CliRunner().invoke(app, ["run", str(path), "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    assert "after 1 round" in result.stdout


@pytest.mark.parametrize("damage", DAMAGES, ids=[damage.label[:100] for damage in DAMAGES])
def test_a_damaged_experiment_is_refused_with_one_message_that_says_what_and_where(damage, folder):
    path = folder / "damaged.toml"
    path.write_text(tomli_w.dumps(damage.tables), encoding="utf-8")
    message = told_by(["run", str(path)], folder)
    for part in damage.told:
        assert part in message
    assert "\n" not in message
    assert len(message) < 900


def test_several_mistakes_are_told_at_once_each_on_a_line(folder):
    path = folder / "damaged.toml"
    path.write_text(tomli_w.dumps(BASE | {"rounds": 0, "seed": "one", "surplus": 1}))
    lines = told_by(["run", str(path)], folder).splitlines()
    assert [line.removeprefix(f"{path}: ").split(" =")[0] for line in lines] == ["seed", "rounds", "surplus"]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"name = ", "is not TOML"),
        (b"name = 'a'\nname = 'b'\n", "is not TOML"),
        (b'{"name": 1}', "is not TOML"),
        (b"\xff\xfe\x00", "cannot be read"),
        (b"name = '\xe4'\n", "cannot be read"),
        (b"\x89PNG\r\n\x1a\n", "cannot be read"),
        (b"", "name is missing"),
        (b"x = " + b"[" * 20000, "nested too deeply"),
    ],
)
def test_a_file_that_is_no_experiment_is_refused(content, told, folder):
    path = folder / "broken.toml"
    path.write_bytes(content)
    message = told_by(["run", str(path)], folder)
    assert told in message
    assert str(path) in message


@pytest.mark.parametrize("name", ["nowhere.toml", "fedavg/digit", "", "x" * 3000, "fedavg"])
def test_an_experiment_that_does_not_exist_is_refused(name, folder):
    message = told_by(["run", name], folder)
    assert message.startswith(f"experiment {name!r}"[:60])


def test_a_mistyped_bundled_experiment_is_recognised(folder):
    assert "did you mean fedavg/digits?" in told_by(["run", "fedavg/digit"], folder)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("rounds", "must be like strategy.lr=0.1"),
        ("=3", "must be like strategy.lr=0.1"),
        ("strategy..lr=3", "must be like strategy.lr=0.1"),
        (".=3", "must be like strategy.lr=0.1"),
        ("rounds.x=3", "rounds = 1, which is not a table"),
        ("strategy.lr.x=3", "lr = 0.1, which is not a table"),
        ("rounds=", "rounds = '': must be int"),
        ("rounds=many", "rounds = 'many': must be int"),
        ("rounds=1\nseed=3", "rounds = '1\\nseed=3': must be int"),
        ("strategy.lr='0.1'", "strategy.lr = '0.1': must be float > 0"),
        (
            "strategy.rate=0.1",
            "strategy.rate = 0.1: strategies.fedopt:FedOpt takes optimiser, lr, beta1, beta2, tau; unknown key rate",
        ),
        ("stratgy.lr=0.1", "unknown key stratgy; did you mean strategy?"),
        ("model.hidden=[1,", "model.hidden = '[1,': must be a list of int >= 1"),
    ],
)
def test_a_change_that_makes_no_sense_is_refused(change, told, folder):
    path = folder / "sound.toml"
    path.write_text(tomli_w.dumps(BASE))
    assert told in told_by(["run", str(path), "--set", change], folder)


@pytest.mark.parametrize("command", [["doctor"], ["data", "describe"]])
def test_other_commands_refuse_a_damaged_experiment_in_the_same_way(command, folder):
    path = folder / "damaged.toml"
    path.write_text(tomli_w.dumps(altered(BASE, ("strategy", "lr"), -1)))
    result = CliRunner().invoke(app, [*command, str(path)])
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == "Error: strategy.lr = -1: must be float > 0\n"


@pytest.mark.slow
@pytest.mark.parametrize("place", [0, len(DAMAGES) - 1])
def test_the_real_command_refuses_as_the_one_in_this_process_does(place, folder):
    damage = DAMAGES[place]
    path = folder / "damaged.toml"
    path.write_text(tomli_w.dumps(damage.tables), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "fedsim", "run", str(path)], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert f"Error: {told_by(['run', str(path)], folder)}\n" == done.stderr
