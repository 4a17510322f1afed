"""Trade-offs: accuracy against another measure, a point with its spread for each experiment of a comparison."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from fedsim.report.drawing import Plot, blank, legend, named
from fedsim.report.measures import label
from fedsim.report.palette import INK, QUIET, SERIES
from fedsim.report.rows import Row, by_file_name, separating

_LABELS = 24  # points with a label of their own


class Bound(NamedTuple):
    """What no experiment could do better than."""

    name: str
    across: Sequence[float]
    along: Sequence[float]


def trade_off(rows: Sequence[Row], measure: str, against: str, bound: Bound | None = None) -> Plot | None:
    """The plot, points of the same name joined in the order of the rows; None where no row has both measures."""
    shown = [row for row in rows if measure in row.values and against in row.values]
    if not shown:
        return None
    figure, axes = blank(f"{label(measure)} against {label(against).lower()}", 4.2)
    figure.set_figwidth(7.5)
    if bound is not None:
        axes.plot(bound.across, bound.along, "--", color=QUIET, linewidth=1.2, label=named(bound.name))
    for place, name in enumerate(dict.fromkeys(row.name for row in shown)):
        same = [row for row in shown if row.name == name]
        points = [(row.values[against], row.values[measure]) for row in same]
        axes.errorbar(
            [x.mean for x, _ in points],
            [y.mean for _, y in points],
            xerr=[0 if math.isnan(x.deviation) else x.deviation for x, _ in points],
            yerr=[0 if math.isnan(y.deviation) else y.deviation for _, y in points],
            fmt="o-",
            color=SERIES[place % len(SERIES)],
            linewidth=1.4,
            elinewidth=0.8,
            markersize=4,
            label=named(name),
        )
        told = _told(same)
        for (x, y), words in list(zip(points, told, strict=True))[:_LABELS]:
            axes.annotate(
                words,
                (x.mean, y.mean),
                (5, -11),
                textcoords="offset points",
                fontsize=8,
                color=INK,
                annotation_clip=True,
            )
    axes.set_xlabel(label(against), color=QUIET, fontsize=9)
    axes.grid(axis="x", color=axes.yaxis.get_gridlines()[0].get_color(), linewidth=0.8)
    legend(figure, axes)
    return Plot(f"against-{against.rpartition('/')[2].replace('_', '-')}", axes.get_title(loc="left"), figure)


def _told(rows: Sequence[Row]) -> list[str]:
    """What tells experiments of one name apart: the values of the settings in which they differ."""
    tables = [row.settings for row in rows]
    telling = separating(
        [row.name for row in rows], tables, list(dict.fromkeys(key for table in tables for key in table))
    )
    return [
        ", ".join(dict.fromkeys(by_file_name(value) for key, value in table.items() if key in telling))
        for table in tables
    ]
