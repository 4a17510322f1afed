"""Several runs side by side: those that differ in their seed only are one row, with mean and spread."""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fedsim.report.configuration import flat
from fedsim.report.content import Table
from fedsim.report.drawing import Plot, blank, legend, named, over_rounds, save, style, thin
from fedsim.report.formats import NONE, amount, count, duration, measure, plain, setting, several
from fedsim.report.markdown import as_table
from fedsim.report.measures import label, main, measured, outcome, total
from fedsim.report.palette import SERIES
from fedsim.report.reading import Floats, Ints, RunRecord, find_runs, read_run

_SETTINGS = 6  # columns of settings in a table
_CURVES = 16  # in a plot


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


@dataclass(frozen=True, eq=False)
class Comparison:
    """Experiments side by side."""

    rows: tuple[Row, ...]
    settings: tuple[str, ...]  # in which they differ
    columns: tuple[str, ...]  # measures at the end of the run, then "best", "rounds", "seconds", "bytes"
    curves: tuple[tuple[str, Ints, Floats, Floats], ...]  # name, rounds, mean, deviation of the first measure
    repeated: tuple[Path, ...]  # left out, because a later run has the same experiment and seed


def compare(runs: Iterable[str | Path], out: str | Path | None = None) -> Comparison:
    """Runs side by side; with `out`, also written there as comparison.md, comparison.svg and comparison.png.

    Args:
        runs: directories of runs, or directories that hold some.
        out: a directory, made if need be.

    Raises:
        FileNotFoundError: a directory neither is a run nor holds one.
        ValueError: there is no run at all, or a file is damaged.
    """
    paths = list(dict.fromkeys(found for path in runs for found in find_runs(path)))
    if not paths:
        raise ValueError("runs is empty: there must be at least one run to compare")
    groups, repeated = _grouped([read_run(path) for path in paths])
    tables = [_settings(group[0]) for group in groups]
    differing = tuple(key for key in dict.fromkeys(k for t in tables for k in t) if len({t.get(key) for t in tables}) > 1)
    names = main({name for group in groups for record in group for name in measured(record)})
    measures = [name for name in ("test/accuracy", "clients/accuracy") if name in names] or names[:2]
    rows = tuple(
        _row(group, {key: table[key] for key in differing if key in table}, measures)
        for group, table in zip(groups, tables, strict=True)
    )
    curves = tuple(_curve(row.name, group, measures[0]) for row, group in zip(rows, groups, strict=True) if measures)
    columns = (*measures, *(("best",) if measures else ()), "rounds", "seconds", "bytes")
    found = Comparison(rows, differing, columns, tuple(c for c in curves if len(c[1])), tuple(repeated))
    if out is not None:
        folder = Path(out)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "comparison.md").write_text(as_markdown(found), encoding="utf-8")
        draw(found, folder)
    return found
