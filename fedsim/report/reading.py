"""RunRecord: what a run's directory says, as arrays and tables."""

import csv
import json
import math
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class Failure(NamedTuple):
    """A client that did not answer."""

    round: int
    client: int
    reason: str


class Incident(NamedTuple):
    """Something that went wrong and was made good: a worker that died, say."""

    round: int
    reason: str


class Confusion(NamedTuple):
    """How often which class was taken for which."""

    counts: Ints  # (K, K), rows the truth, columns the prediction
    classes: tuple[str, ...]  # K names
    groups: Floats | None = None  # (G, K, K), the same for each group, where groups were told apart
    names: tuple[str, ...] = ()  # of the groups, G


@dataclass(frozen=True, eq=False)
class RunRecord:
    """One run, R rounds long so far."""

    path: Path
    experiment: dict[str, Any]
    environment: dict[str, Any]
    rounds: Ints  # (R,), ascending
    metrics: dict[str, Floats]  # name -> (R,); NaN where it was not measured, or was not finite
    measured: dict[str, NDArray[np.bool_]]  # name -> (R,), whether it was measured
    clients: dict[str, Floats]  # columns of the last evaluation by client, each (C,); {} where there was none
    evaluated: int | None  # the round of the last evaluation
    confusions: dict[str, Confusion]  # "test", "clients": of the last evaluation
    failures: tuple[Failure, ...]
    incidents: tuple[Incident, ...]

    @property
    def name(self) -> str:
        """What the experiment is called."""
        return str(self.experiment.get("name", self.path.name))

    @property
    def unfinished(self) -> bool:
        """Whether there should be more rounds: fewer than were asked for, and the strategy was not done before."""
        asked = self.rounds_asked
        return asked is not None and len(self.rounds) < asked and "converged" not in self.metrics

    @property
    def rounds_asked(self) -> int | None:
        """How many rounds the experiment is meant to have."""
        asked = self.experiment.get("rounds")
        return asked if isinstance(asked, int) else None

    def series(self, name: str) -> tuple[Ints, Floats]:
        """The rounds in which a metric was measured, and its values; NaN where it was not finite."""
        if name not in self.metrics:
            return self.rounds[:0], np.zeros(0)
        return self.rounds[self.measured[name]], self.metrics[name][self.measured[name]]


def read_run(path: str | Path) -> RunRecord:
    """The record in a run's directory, also of a run that still goes on or was killed.

    Raises:
        FileNotFoundError: the directory does not exist, or is not that of a run.
        ValueError: a file in it is damaged.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"run {str(path)!r}: there is no such directory")
    if not (path / "experiment.toml").is_file():
        raise FileNotFoundError(f"{path} is not the directory of a run: it has no experiment.toml")
    evaluation = _object(path / "evaluation.json")
    troubles = list(_troubles(path / "failures.jsonl"))
    return RunRecord(
        path,
        _toml(path / "experiment.toml"),
        _object(path / "environment.json"),
        *_metrics(path / "metrics.jsonl"),
        clients=_columns(path / "clients.csv"),
        evaluated=int(evaluation["round"]) if "round" in evaluation else None,
        confusions=_confusions(path / "evaluation.json", evaluation),
        failures=tuple(found for found in troubles if isinstance(found, Failure)),
        incidents=tuple(found for found in troubles if isinstance(found, Incident)),
    )


def find_runs(path: str | Path) -> list[Path]:
    """The directory itself if it is that of a run, else those of the runs up to two levels below it, by name."""
    path = Path(path)
    found = [path] if (path / "experiment.toml").is_file() else []
    if not found:
        files = chain(path.glob("*/experiment.toml"), path.glob("*/*/experiment.toml"))
        found = sorted(file.parent for file in files)
    if not found:
        raise FileNotFoundError(f"{path} is not the directory of a run and holds none: no experiment.toml was found")
    return found


def _toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def _object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; {} where there is no file."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged: it must hold an object, got {type(found).__name__}")
    return found


def json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, object) for each line; a last line that was cut off in the middle of writing is left out."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    lines = text.split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except ValueError as error:
            if number == len(lines):  # no line end behind it
                return
            raise ValueError(f"{path}, line {number} is damaged: {error}") from error
        if not isinstance(found, dict) or not isinstance(found.get("round"), int):
            raise ValueError(f"{path}, line {number} must be an object with a whole number as round, got {line[:80]}")
        yield number, found


def _metrics(path: Path) -> tuple[Ints, dict[str, Floats], dict[str, NDArray[np.bool_]]]:
    """Rounds, values and whether they were measured; of a round that occurs twice, the later line counts."""
    lines = {line["round"]: line for _, line in json_lines(path)}
    rounds = sorted(lines)
    metrics: dict[str, Floats] = {}
    measured: dict[str, NDArray[np.bool_]] = {}
    for row, number in enumerate(rounds):
        for name, value in lines[number].items():
            if name == "round" or not (value is None or isinstance(value, int | float)):
                continue
            if name not in metrics:
                metrics[name], measured[name] = np.full(len(rounds), np.nan), np.zeros(len(rounds), dtype=np.bool_)
            metrics[name][row] = value if value is not None and math.isfinite(value) else np.nan
            measured[name][row] = True
    return np.array(rounds, dtype=np.int64), metrics, measured


def _columns(path: Path) -> dict[str, Floats]:
    """The columns of a CSV of numbers; NaN where a cell is empty or no number, {} where there is no row."""
    if not path.is_file():
        return {}
    with path.open(encoding="utf-8", newline="") as file:
        names = next(csv.reader(file), [])
        if not file.readline().strip():
            return {}
    try:
        table = _table(path)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if table.shape[1] != len(names):
        raise ValueError(f"{path} is damaged: {len(names)} names for {table.shape[1]} columns")
    return {name: np.ascontiguousarray(table[:, place]) for place, name in enumerate(names)}


def _table(path: Path) -> Floats:
    """The numbers below the first line."""

    def load(convert: Callable[[str], float] | None) -> Floats:
        return np.loadtxt(
            path, delimiter=",", skiprows=1, ndmin=2, comments=None, quotechar='"', converters=convert, encoding="utf-8"
        )

    try:
        return load(None)
    except ValueError:  # some cell is no number; cell by cell takes five times as long
        return load(_number)


def _number(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        return math.nan


def _confusions(path: Path, evaluation: dict[str, Any]) -> dict[str, Confusion]:
    """What was taken for what, for each part of an evaluation that counted it."""
    found = {}
    for name, part in evaluation.items():
        if not isinstance(part, dict) or not part.get("confusion"):
            continue
        counts = np.rint(np.array(part["confusion"], dtype=np.float64)).astype(np.int64)
        if counts.ndim != 2 or counts.shape[0] != counts.shape[1]:
            raise ValueError(f"{path} is damaged: {name}.confusion must be square, got shape {counts.shape}")
        found[name] = Confusion(counts, _named(part.get("classes"), len(counts)))
        if part.get("groups"):
            groups = np.array(part["groups"], dtype=np.float64)
            if groups.shape[1:] != counts.shape:
                raise ValueError(f"{path} is damaged: {name}.groups has shape {groups.shape}, not (G, *{counts.shape})")
            found[name] = found[name]._replace(groups=groups, names=_named(part.get("group_names"), len(groups)))
    return found


def _named(names: list[Any] | None, number: int) -> tuple[str, ...]:
    """So many names: those that there are, and numbers for the rest."""
    found = [str(name) for name in names or ()][:number]
    return (*found, *map(str, range(len(found), number)))


def _troubles(path: Path) -> Iterator[Failure | Incident]:
    for number, line in json_lines(path):
        client, reason = line.get("client", ""), str(line.get("reason", ""))
        if client is None:
            yield Incident(line["round"], reason)
        elif isinstance(client, int):
            yield Failure(line["round"], client, reason)
        else:
            raise ValueError(f"{path}, line {number}: client must be a whole number or null, got {client!r}")
