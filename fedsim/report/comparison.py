"""Several runs side by side: those that differ in their seed only are one row, with mean and spread."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes

from fedsim.ranking import foremost
from fedsim.report import markdown
from fedsim.report.content import Table
from fedsim.report.drawing import Plot, blank, legend, named, over_rounds, save, style, thin
from fedsim.report.formats import NONE, amount, count, duration, measure, several
from fedsim.report.measures import label, main, measured
from fedsim.report.palette import QUIET, SERIES
from fedsim.report.reading import RunRecord, find_runs, read_run
from fedsim.report.reference import mostpop
from fedsim.report.rows import Curve, Row, average, by_file_name, grouped, separating, settings, summary, titles
from fedsim.report.tradeoff import Bound, trade_off

_SETTINGS = 6  # columns of settings in a table
_CURVES = 16  # in a plot
_QUIET_LINES = ("--", ":", "-.")  # of what is compared with


@dataclass(frozen=True, eq=False)
class Comparison:
    """Experiments side by side."""

    rows: tuple[Row, ...]
    settings: tuple[str, ...]  # in which they differ, first those that separate experiments of the same name
    columns: tuple[str, ...]  # measures at the end of the run, then "best", "rounds", "seconds", "bytes"
    curves: tuple[Curve, ...]  # of the first measure, for each experiment that has it
    repeated: tuple[Path, ...]  # left out, because a later run has the same experiment and seed
    against: tuple[str, ...] = ()  # measures that the first one is drawn against
    references: tuple[Row, ...] = ()  # what nobody ran, to compare with: MostPop


def compare(
    runs: Iterable[str | Path], out: str | Path | None = None, against: Sequence[str] = (), bound: Bound | None = None
) -> Comparison:
    """Runs side by side; with `out`, also written there as comparison.md, comparison.svg and comparison.png.

    Args:
        runs: directories of runs, or directories that hold some.
        out: a directory, made if need be.
        against: measures that the accuracy is drawn against, such as "clients/demographic_parity_gap", as
            against-*.svg and .png; none: those that the experiments name.
        bound: drawn with them: what no experiment could do better than.

    Raises:
        FileNotFoundError: a directory neither is a run nor holds one.
        ValueError: there is no run at all, or a file is damaged.
    """
    paths = {found.resolve(): found for path in runs for found in find_runs(path)}
    if not paths:
        raise ValueError("runs is empty: there must be at least one run to compare")
    found = _compared([read_run(path) for path in paths.values()], against)
    if out is not None:
        folder = Path(out)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "comparison.md").write_text(as_markdown(found), encoding="utf-8")
        draw(found, folder, bound)
    return found


def _compared(records: Sequence[RunRecord], against: Sequence[str] = ()) -> Comparison:
    groups, repeated = grouped(records)
    tables = [settings(group[0]) for group in groups]
    differing = [key for key in dict.fromkeys(k for t in tables for k in t) if len({t.get(key) for t in tables}) > 1]
    first = separating([group[0].name for group in groups], tables, differing)
    differing.sort(key=lambda key: key not in first)
    names = main({name for group in groups for record in group for name in measured(record)})
    measures: list[str] = [name for name in ("test/accuracy", "clients/accuracy") if name in names]
    measures = measures or foremost(names) or names[:2]
    asked = against or [name for record in records for name in record.experiment.get("against", ())]
    others = tuple(dict.fromkeys(asked))
    measures += [name for name in others if name not in measures]
    rows = tuple(
        summary(group, {key: table[key] for key in differing if key in table}, measures)
        for group, table in zip(groups, tables, strict=True)
    )
    curves = tuple(
        average(name, group, measures[0]) for name, group in zip(titles(rows), groups, strict=True) if measures
    )
    references = mostpop(groups, tables, differing, measures)
    columns = (*measures, *(("best",) if measures else ()), "rounds", "seconds", "bytes")
    curves = tuple(curve for curve in curves if len(curve.rounds))
    return Comparison(rows, tuple(differing), columns, curves, tuple(repeated), others, references)


def as_table(comparison: Comparison) -> Table:
    """The rows as text, of the settings only the first six."""
    shown = comparison.settings[:_SETTINGS]
    measured = ("rounds done" if name == "rounds" else label(name) for name in comparison.columns)
    header = ("experiment", *shown, *measured, "seeds")
    rows = tuple(
        (
            row.name,
            *(by_file_name(row.settings.get(key, NONE)) for key in shown),
            *(_cell(column, row) for column in comparison.columns),
            f"n={row.n}",
        )
        for row in (*comparison.rows, *comparison.references)
    )
    return Table("", header, rows, " ".join(_notes(comparison)), words=tuple(range(1 + len(shown))))


def as_markdown(comparison: Comparison) -> str:
    """The table, and what one should know when reading it."""
    return f"# Comparison\n\n{markdown.as_table(as_table(comparison))}\n"


def draw(comparison: Comparison, folder: Path, bound: Bound | None = None) -> list[Path]:
    """Writes comparison.svg and comparison.png: the mean curve of each experiment, in a band of one deviation.

    Also, for each measure to draw the first one against, against-*.svg and .png. Gives the paths, none of them where
    nothing was evaluated.
    """
    if not comparison.curves:
        return []
    with style():
        plots = [trade_off(comparison.rows, comparison.columns[0], name, bound) for name in comparison.against]
        for plot in filter(None, plots):
            save(plot, folder)
        figure, axes = blank(f"{label(comparison.columns[0])}, mean and deviation over seeds", 4.2)
        figure.set_figwidth(7.5)
        for place, curve in enumerate(comparison.curves[:_CURVES]):
            _draw(axes, curve, SERIES[place % len(SERIES)], "-" if place < len(SERIES) else "--")
        for place, row in enumerate(comparison.references):
            if (value := row.values.get(comparison.columns[0])) is not None:
                text = named(titles(comparison.references)[place])
                axes.axhline(value.mean, color=QUIET, linewidth=1.2, linestyle=_QUIET_LINES[place % 3], label=text)
        ends = [rounds[end] for _, rounds, *_ in comparison.curves[:_CURVES] for end in (0, -1)]
        over_rounds(axes, int(min(ends)), int(max(ends)))
        legend(figure, axes)
        save(Plot("comparison", axes.get_title(loc="left"), figure), folder)
    names = ["comparison", *(plot.name for plot in plots if plot is not None)]
    return [folder / f"{name}.{kind}" for name in names for kind in ("svg", "png")]


def _draw(axes: Axes, curve: Curve, colour: str, line: str) -> None:
    x, mean, *_ = thin(curve.rounds, curve.mean)
    _, deviation, *_ = thin(curve.rounds, curve.deviation)
    points = "o" if len(x) <= 25 else ""
    axes.plot(x, mean, line, color=colour, linewidth=1.7, label=named(curve.name), marker=points, markersize=4)
    axes.fill_between(x, mean - deviation, mean + deviation, color=colour, alpha=0.18, linewidth=0)


def _cell(column: str, row: Row) -> str:
    """Mean ± deviation; how many runs it is over, where that is not all."""
    if column not in row.values:
        return NONE
    mean, deviation, n = row.values[column]
    written: Callable[[float], str] = {"rounds": _rounds, "seconds": duration, "bytes": amount}.get(column, measure)
    varies = deviation > 0 or (math.isfinite(deviation) and column not in ("rounds", "bytes"))
    text = f"{written(mean)} ± {written(deviation)}" if varies else written(mean)
    return text if n == row.n else f"{text} (n={n})"


def _rounds(value: float) -> str:
    return count(value) if value == round(value) else f"{value:.1f}"


def _notes(comparison: Comparison) -> list[str]:
    notes = []
    if any(row.n > 1 for row in comparison.rows):
        notes.append("Mean ± sample standard deviation over seeds.")
    if "best" in comparison.columns:
        notes.append(f"Best is that of {comparison.columns[0]} in any round.")
    rest = comparison.settings[_SETTINGS:]
    if rest:
        notes.append(f"They differ also in {', '.join(rest)}.")
    for row in comparison.rows:
        if row.unfinished:
            notes.append(f"{row.name}: {several(row.unfinished, 'run')} of {row.n} did not finish.")
    if comparison.repeated:
        notes.append(
            f"{several(len(comparison.repeated), 'run')} left out: the same experiment and seed ran again later."
        )
    return notes
