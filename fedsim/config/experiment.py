"""Experiments: read from a file, and checked."""

import copy
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import tomli_w
from annotated_types import Interval
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedsim.config.plugins import HOME, ConfigError, absolute, closest, shown
from fedsim.config.recipe import COUNTED, NAMED, describe, unfit

Table = dict[str, Any]
SPLIT = {"use": "fedsim.data.federation:divide"}  # also where a table for it names nothing else
EXPERIMENTS = HOME / "experiments"
Number = Annotated[int, Interval(ge=1, le=10**9)]
Name = Annotated[
    str,
    Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        max_length=100,
        description="a string of 1 to 100 letters, digits, '.', '_' and '-', of which the first is a letter or a digit",
    ),
]


class Experiment(BaseModel):
    """An experiment file: plain values, and a table for each part."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    name: Name
    seed: Annotated[int, Interval(ge=0, lt=2**63)] = 0
    rounds: Number
    evaluate_every: Annotated[int, Interval(ge=0, le=10**9)] = 1  # 0: never
    evaluate_clients: Number | None = None  # how many clients evaluate; None: all with a test part
    checkpoint_every: Number = 10
    keep_checkpoints: Number | Literal["all"] = 2  # the last so many
    min_replies: Annotated[int, Interval(ge=0, le=10**9)] = 1  # 0: a round that nobody answers changes nothing
    threads: Annotated[int, Interval(ge=1, le=1024)] = 1  # of torch; more change the last bits of a sum
    data: Table
    partition: Table
    split: Table = SPLIT
    model: Table
    strategy: Table
    clients: Annotated[dict[str, Table], Field(min_length=1)]
    sweep: dict[str, Annotated[list[Any], Field(min_length=1)]] = {}  # key -> the values that it takes, a run for each
    against: list[str] = []  # measures that a comparison draws the accuracy against
    sample: Table = {"use": "fedsim.sampling:everyone"}
    engine: Table = {"use": "fedsim.engines.local:auto"}

    def toml(self) -> str:
        """The experiment as it is resolved, defaults included."""
        return tomli_w.dumps(self.model_dump(exclude_none=True))


# For each part: the entry points of its short names, and the arguments that are filled in.
PARTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "data": ("fedsim.datasets", ("seed",)),
    "partition": ("fedsim.partitions", ("columns", "seed")),
    "split": ("fedsim.splits", ("dataset", "partition", "seed")),
    "model": ("fedsim.models", ("federation", *COUNTED, "seed")),
    "strategy": ("fedsim.strategies", ("federation", "model", *NAMED, "num_clients", "seed")),
    "clients": ("fedsim.clients", ("federation", "model", *NAMED, "num_clients", "seed")),
    "sample": ("fedsim.samplers", ("federation", "num_clients", "seed")),
    "engine": ("fedsim.engines", ("federation", "clients", "seed")),
}


def read(source: str | Path | Mapping[str, Any], changes: Sequence[str] = ()) -> tuple[Experiment, Path | None]:
    """An experiment and the folder it lies in.

    Args:
        source: a TOML file, the name of a bundled experiment ("fedavg/digits"), or the tables themselves.
        changes: "strategy.lr=0.1", in TOML's notation; a value that is not TOML is a string.
    """
    if isinstance(source, Mapping):
        tables, folder, label = copy.deepcopy(dict(source)), None, "experiment"
        for key, value in tables.items():
            if reason := unfit({key: value}):
                raise ConfigError(f"{label}: {key} = {shown(value)}: {reason}")
    else:
        path = locate(source)
        tables, folder, label = _parse(path), path.resolve().parent, str(path)
    for change in changes:
        _change(tables, change)
    tables = _referred(tables, tables, label)
    if isinstance(tables.get("split"), Mapping):
        tables["split"] = SPLIT | tables["split"]
    try:
        experiment = Experiment.model_validate(tables)
    except ValidationError as error:
        raise ConfigError("\n".join(f"{label}: {line}" for line in _faults(tables, error))) from None
    return experiment.model_copy(update=_absolute(experiment, folder)), folder


def _faults(tables: Mapping[str, Any], error: ValidationError) -> list[str]:
    """A line for each key that is wrong: the key, its value, and what is allowed."""
    hints = get_type_hints(Experiment, include_extras=True)
    lines = {}
    for problem in error.errors(include_url=False):
        key, *inner = (str(part) for part in problem["loc"])
        hint, value, place = hints.get(key), tables.get(key), key
        if key == "clients" and inner:
            hint, value, place = Table, problem["input"], f"{key}.{inner[0]}"
        line = f"{place} = {shown(value)}: must be {describe(hint)}"
        if problem["type"] == "missing":
            line = f"{place} is missing: it must be {describe(hint)}{' with `use`' if hint is Table else ''}"
        elif problem["type"] == "extra_forbidden":
            line = f"{place} = {shown(value)}: unknown key {place}{closest(place, hints)}"
        elif problem["type"] == "too_short" and key == "clients":
            line = f"{place} = {shown(value)}: must be a table for each action, such as clients.train"
        lines[place] = line
    return list(lines.values())


def locate(source: str | Path) -> Path:
    """The file of an experiment given by its path or by the name of a bundled one."""
    try:
        # The last one is for a node, whose current folder is not where fedsim lies.
        there = (
            Path(source),
            Path(f"{source}.toml"),
            EXPERIMENTS / f"{source}.toml",
            EXPERIMENTS / source,
            HOME / source,
        )
        for path in there:
            if path.is_file():
                return path
    except OSError as error:  # a name that is too long, or a folder that may not be read
        raise ConfigError(f"experiment {shown(str(source))}: {error.strerror}") from None
    near = closest(str(source), bundled())
    raise ConfigError(f"experiment {shown(str(source))}: no such file, nor a bundled experiment{near}")


def bundled() -> list[str]:
    """The names of the bundled experiments."""
    return sorted(path.relative_to(EXPERIMENTS).with_suffix("").as_posix() for path in EXPERIMENTS.rglob("*.toml"))


def _parse(path: Path) -> Table:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not TOML: {error}") from None
    except RecursionError:
        raise ConfigError(f"{path} is not an experiment: its values are nested too deeply") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None


def assignment(change: str) -> tuple[str, Any]:
    """Key and value of "strategy.lr=0.1", in TOML's notation; a value that is not TOML is a string."""
    key, equals, text = change.partition("=")
    if not equals or not all(part.strip() for part in key.split(".")):
        raise ConfigError(f"--set {shown(change)}: must be like strategy.lr=0.1")
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (tomllib.TOMLDecodeError, RecursionError):
        parsed = {}
    return ".".join(part.strip() for part in key.split(".")), parsed["value"] if len(parsed) == 1 else text


def _change(tables: Table, change: str) -> None:
    key, value = assignment(change)
    *path, last = key.split(".")
    branch = tables
    for depth, part in enumerate(path):
        default = None if depth else getattr(Experiment.model_fields.get(part), "default", None)
        branch = branch.setdefault(part, dict(default) if isinstance(default, dict) else {})
        if not isinstance(branch, dict):
            raise ConfigError(f"--set {shown(change)}: {part} = {shown(branch)}, which is not a table")
    branch[last] = value


def _referred(value: Any, tables: Table, label: str, where: str = "", path: tuple[str, ...] = ()) -> Any:
    """The same with the values that "${strategy.notion}" and the like stand for."""
    if isinstance(value, dict):
        return {k: _referred(v, tables, label, f"{where}.{k}".lstrip("."), path) for k, v in value.items()}
    if isinstance(value, list):
        return [_referred(part, tables, label, f"{where}[{place}]", path) for place, part in enumerate(value)]
    if not (isinstance(value, str) and (match := re.fullmatch(r"\$\{([^{}]+)\}", value))):
        return value
    key = match[1]
    if key in path:
        raise ConfigError(f"{label}: {where} = {shown(value)}: refers to itself, by way of {' and '.join(path)}")
    found: Any = tables
    for depth, part in enumerate(key.split(".")):
        if not isinstance(found, dict) or part not in found:
            there = closest(part, found) if isinstance(found, dict) else ""
            at = ".".join(key.split(".")[: depth + 1])
            raise ConfigError(
                f"{label}: {where} = {shown(value)}: {at} is missing: it must be there to refer to{there}"
            )
        found = found[part]
    return _referred(found, tables, label, where, (*path, key))


def _absolute(experiment: Experiment, folder: Path | None) -> dict[str, Any]:
    """The tables, with the paths of plug-in files made absolute."""

    def fix(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {k: absolute(v, folder) if k == "use" and isinstance(v, str) else fix(v) for k, v in value.items()}

    return {name: fix(getattr(experiment, name)) for name in PARTS}
