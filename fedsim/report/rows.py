"""The rows of a comparison: runs that differ in their seed only are one experiment, with mean and spread."""

import functools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fedsim.report.configuration import flat
from fedsim.report.formats import plain, setting
from fedsim.report.measures import outcome, total
from fedsim.report.reading import Floats, Ints, RunRecord


class Spread(NamedTuple):
    """A number over the runs that have it."""

    mean: float  # NaN where it was not finite in one of them
    deviation: float  # the sample standard deviation; NaN for a single run
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Mean and sample standard deviation."""
        if not all(map(math.isfinite, values)):
            return cls(math.nan, math.nan, len(values))
        return cls(float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else math.nan, len(values))


class Curve(NamedTuple):
    """A measure over rounds, over the runs of one experiment."""

    name: str
    rounds: Ints  # (R,), those in which all runs have it
    mean: Floats  # (R,)
    deviation: Floats  # (R,), 0 for a single run


@dataclass(frozen=True)
class Row:
    """One experiment, run with n seeds."""

    name: str
    seeds: tuple[int | None, ...]
    settings: dict[str, str]  # those that not all experiments share; a key is missing where the experiment lacks it
    values: dict[str, Spread]  # by column; a key is missing where no run measured it
    unfinished: int  # runs with fewer rounds than asked for
    runs: tuple[Path, ...]

    @property
    def n(self) -> int:
        """How many runs it stands for."""
        return len(self.runs)


def grouped(records: Sequence[RunRecord]) -> tuple[list[list[RunRecord]], list[Path]]:
    """Runs of the same experiment together, one for each seed, and the earlier runs of seeds that occur again."""
    groups: dict[str, dict[Any, RunRecord]] = {}
    repeated = []
    for record in sorted(records, key=lambda r: (str(r.environment.get("started", "")), r.path.name)):
        group = groups.setdefault(json.dumps([record.name, _asked(record)], sort_keys=True, default=str), {})
        seed = record.experiment.get("seed", str(record.path))
        if seed in group:
            repeated.append(group[seed].path)
        group[seed] = record
    order = {record.path: place for place, record in enumerate(records)}
    found = [sorted(group.values(), key=lambda r: order[r.path]) for group in groups.values()]
    return sorted(found, key=lambda group: order[group[0].path]), repeated


def settings(record: RunRecord) -> dict[str, str]:
    """What an experiment asks for, besides name and seed, by dotted names."""
    return {plain(key): setting(value) for key, value in _asked(record).items()}


def _asked(record: RunRecord) -> dict[str, Any]:
    """The same as values; a plug-in that has a short name goes by it, however the experiment names it."""
    values = {key: value for key, value in flat(record.experiment).items() if key not in ("name", "seed")}
    return {
        key: _short_names().get(value, value) if key.endswith(".use") and isinstance(value, str) else value
        for key, value in values.items()
    }


@functools.cache
def _short_names() -> dict[str, str]:
    """From "module:name" to the short name, for what is declared in fedsim's groups of entry points."""
    groups = sorted(group for group in entry_points().groups if group.startswith("fedsim."))
    declared = {(group, entry.name): entry.value for group in groups for entry in entry_points(group=group)}
    return {value: name for (_, name), value in declared.items()}


def by_file_name(value: str) -> str:
    """A setting as it is shown: of a plug-in's file, the name without its folder."""
    return Path(value).name if ".py:" in value else value


def separating(names: Sequence[str], tables: Sequence[dict[str, str]], keys: Sequence[str]) -> set[str]:
    """Those of the keys in which experiments of the same name differ."""
    alike = [
        [table for other, table in zip(names, tables, strict=True) if other == name]
        for name in set(names)
        if names.count(name) > 1
    ]
    return {key for key in keys if any(len({table.get(key) for table in group}) > 1 for group in alike)}


def summary(group: Sequence[RunRecord], settings: dict[str, str], measures: Sequence[str]) -> Row:
    """The row of one experiment; `settings` are those in which it differs from others."""
    values = {}
    for column in (*measures, "best", "rounds", "seconds", "bytes"):
        found = [value for record in group if (value := _value(record, column, measures)) is not None]
        if found:
            values[column] = Spread.of(found)
    return Row(
        plain(group[0].name),
        tuple(record.experiment.get("seed") for record in group),
        settings,
        values,
        sum(record.unfinished for record in group),
        tuple(record.path for record in group),
    )


def _value(record: RunRecord, column: str, measures: Sequence[str]) -> float | None:
    if column == "rounds":
        return float(len(record.rounds))
    if column == "seconds":
        return total(record, "seconds")
    if column == "bytes":
        parts = [size for name in ("bytes_down", "bytes_up") if (size := total(record, name)) is not None]
        return sum(parts) if parts else None
    if column != "best":
        found = outcome(record, column)
        return None if found is None else found.last
    found = outcome(record, measures[0]) if measures else None
    return None if found is None else math.nan if found.best is None else found.best


def titles(rows: Sequence[Row]) -> list[str]:
    """The experiments' names, with the settings that tell them apart where several have the same name."""
    found = []
    for row in rows:
        namesakes = [other.settings for other in rows if other.name == row.name]
        telling = separating([row.name] * len(namesakes), namesakes, list(row.settings))
        told = (
            f"{key.rsplit('.', 1)[-1]} = {by_file_name(value)}" for key, value in row.settings.items() if key in telling
        )
        found.append(", ".join([row.name, *told]))
    return found


def average(name: str, group: Sequence[RunRecord], measured: str) -> Curve:
    """Mean and deviation of a measure, over the rounds in which all runs have it."""
    series = [record.series(measured) for record in group]
    rounds = functools.reduce(np.intersect1d, (rounds for rounds, _ in series))
    values = np.stack([values[np.searchsorted(at, rounds)] for at, values in series])  # (n, rounds)
    deviation = values.std(axis=0, ddof=1) if len(values) > 1 else np.zeros(len(rounds))
    return Curve(name, rounds, values.mean(axis=0), deviation)
