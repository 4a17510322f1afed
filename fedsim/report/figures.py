"""The figures of one run: curves, clients, confusion, traffic, time."""

import re
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from fedsim.report.drawing import Plot, blank, in_bytes, legend, named, over_rounds, plain_log, shades, short, thin
from fedsim.report.formats import count
from fedsim.report.measures import curved, direction, label
from fedsim.report.palette import INK, PAPER, QUIET, SERIES
from fedsim.report.phases import Phase, mark, marked
from fedsim.report.reading import Confusion, Floats, Ints, RunRecord

_ON_DARK = "#fdfdfd"  # on a dark cell, on a light and on a dark page alike
_FIGURES = 24  # of metrics, at most
_LINES = 6  # in one of them
_POINTS = 2000  # clients that are drawn one by one
Curve = tuple[str, Ints, Floats]  # label, rounds, values


def curves(record: RunRecord) -> tuple[list[Plot], int]:
    """A figure for each measure and each group of metrics, and how many metrics found no place."""
    families: dict[str, list[str]] = {}
    for name in curved(record):
        group, _, leaf = name.rpartition("/")
        families.setdefault(leaf if group in ("test", "clients", "train") else f"{group or name} ", []).append(name)
    drawn: list[tuple[str, list[str]]] = []
    for family, names in families.items():
        parts = _alike(record, names)
        drawn += [(family, part) for part in parts]
    plots = [_metrics(record, family, names, place) for place, (family, names) in enumerate(drawn[:_FIGURES])]
    return plots, sum(len(names) for _, names in drawn[_FIGURES:])


def _alike(record: RunRecord, names: Sequence[str]) -> list[list[str]]:
    """The metrics in parts whose values are of about the same size, so that one axis suits them."""
    parts: list[tuple[float, list[str]]] = []
    for name in names:
        values = np.abs(record.series(name)[1])
        size = float(np.max(values, initial=0, where=np.isfinite(values)))
        for other, part in parts:
            if len(part) < _LINES and (not size or not other or 1 / 20 < size / other < 20):
                part.append(name)
                break
        else:
            parts.append((size, [name]))
    return [part for _, part in parts]


def _metrics(record: RunRecord, family: str, names: Sequence[str], place: int) -> Plot:
    whole = family.endswith(" ")  # a group of metrics, not one measure of several groups
    title = names[0] if len(names) == 1 and whole else family.strip()
    told = [
        name.removeprefix(family.strip() + "/") if whole else label(name).rsplit(" ", 1)[0].rstrip("’")
        for name in names
    ]
    if not whole:
        title = label(names[0]) if len(names) == 1 else title[:1].upper() + title[1:]
    series = [(text, *record.series(name)) for text, name in zip(told, names, strict=True)]
    slug = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")[:40]
    return lines(f"metric-{place + 1:02}-{slug}".rstrip("-"), title, series, marked(record))


def lines(name: str, title: str, series: Sequence[Curve], phases: Sequence[Phase] = ()) -> Plot:
    """Curves over rounds, and where phases begin. Beyond as many curves as there are colours they are dashed.

    Of more than 400 points neighbours are drawn as their mean, in a band of all they reach.
    """
    figure, axes = blank(title, 3.1 if len(series) <= len(SERIES) else 3.8)  # a legend of many rows takes room
    seen: list[Floats] = []
    ends: list[int] = []
    for place, (text, rounds, values) in enumerate(series):
        curve(axes, text, rounds, values, SERIES[place % len(SERIES)], "-" if place < len(SERIES) else "--")
        seen.append(values[np.isfinite(values)])
        ends += [int(rounds[0]), int(rounds[-1])]
    over_rounds(axes, min(ends), max(ends))
    mark(axes, phases, min(ends), max(ends))
    values = np.concatenate(seen)
    if not values.size:
        axes.set_yticks([])
        axes.text(0.5, 0.5, "never finite", transform=axes.transAxes, ha="center", color=QUIET)
    elif 1e-9 * values.max() < values.min() and values.max() > 50 * np.median(values):  # few values dwarf the others
        axes.set_yscale("log")
        plain_log(axes.yaxis)
    legend(figure, axes)
    return Plot(name, f"{short(title, 80)} over rounds", figure)


def curve(axes: Axes, text: str, rounds: Ints, values: Floats, colour: str, dashes: str = "-") -> None:
    """One curve, with points while they are few."""
    x, mean, low, high = thin(rounds, values)
    finite = int(np.isfinite(values).sum())
    dots = "o" if finite <= 25 else ""
    axes.plot(x, mean, dashes, color=colour, linewidth=1.7, label=named(text), marker=dots, markersize=4)
    if len(x) < len(rounds):
        axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)


def over_clients(record: RunRecord, name: str) -> list[Plot]:
    """How a measure of the last evaluation is spread over clients, and how it goes with their number of examples."""
    values = record.clients[name]
    examples = record.clients.get("examples", np.full(len(values), np.nan))
    kept = np.isfinite(values)
    plots = [_histogram(name, values[kept])] if kept.any() else []
    kept &= np.isfinite(examples)
    if len(np.unique(examples[kept])) > 1:
        plots.append(_against(name, examples[kept], values[kept]))
    return plots


def _histogram(name: str, values: Floats) -> Plot:
    figure, axes = blank(f"Clients by {name}")
    low, high = float(values.min()), float(values.max())
    room = 0.0 if high > low else max(abs(low), 1) * 0.05
    edges = np.linspace(low - room, high + room, 31 if len(values) > 300 else 21 if len(values) > 30 else 11)
    axes.hist(values, edges.tolist(), color=SERIES[0], edgecolor=PAPER, linewidth=0.6)
    worse = 0.9 if direction(name) < 0 else 0.1
    for share, text, dashes in ((0.5, "median", "-"), (worse, f"{worse * 100:.0f}th percentile", "--")):
        axes.axvline(float(np.quantile(values, share)), color=INK, linewidth=1.2, linestyle=dashes, label=text)
    axes.set_xlabel(short(name, 40), color=QUIET, fontsize=9)
    axes.set_ylabel("clients", color=QUIET, fontsize=9)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: count(value)))
    legend(figure, axes)
    return Plot("clients-histogram", f"Histogram of {name} over clients", figure)


def _against(name: str, examples: Floats, values: Floats) -> Plot:
    figure, axes = blank(f"{name[:1].upper()}{name[1:]} and number of examples")
    wide = bool(examples.min() > 0 and examples.max() > 50 * examples.min())
    if len(values) <= _POINTS:
        axes.plot(examples, values, "o", color=SERIES[0], markersize=4.5, alpha=0.55, markeredgewidth=0)
        if wide:
            axes.set_xscale("log")
    else:
        cells = axes.hexbin(
            examples,
            values,
            gridsize=(36, 18),
            mincnt=1,
            norm=LogNorm(vmin=0.3),
            xscale="log" if wide else "linear",
            cmap=shades(SERIES[0]),
            linewidths=0,
        )
        axes.set_title(
            f"at most {count(float(np.max(np.asarray(cells.get_array()))))} clients in a cell",
            loc="right",
            fontsize=8,
            color=QUIET,
        )
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: count(value)))
    if wide:
        plain_log(axes.xaxis)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, steps=[1, 2, 5, 10]))
    axes.set_xlabel("examples of the client", color=QUIET, fontsize=9)
    axes.set_ylabel(short(name, 40), color=QUIET, fontsize=9)
    return Plot("clients-examples", f"{name} of each client against its number of examples", figure)


def confusion(part: str, found: Confusion) -> Plot:
    """Rows the truth, columns the prediction; the colour is a cell’s share of its row."""
    number = len(found.counts)
    figure, axes = blank("Test set" if part == "test" else "Clients’ test parts" if part == "clients" else part, 4.6)
    shares: NDArray[np.float64] = found.counts / np.maximum(found.counts.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, cmap=shades(SERIES[0]), vmin=0, vmax=1, interpolation="none")
    names = [short(text, 14) for text in found.classes]
    if number <= 20:
        crowded = number > 6 and max(map(len, names)) > 3
        axes.set_xticks(range(number), names, rotation=90 if crowded else 0)
        axes.set_yticks(range(number), names)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    if number <= 12:
        for row, column in np.ndindex(number, number):
            if found.counts[row, column]:
                colour = _ON_DARK if shares[row, column] > 0.5 else INK
                text = count(int(found.counts[row, column]))
                axes.text(
                    column, row, text, ha="center", va="center", fontsize=9 - max(0, number - 6) / 4, color=colour
                )
    axes.set_xlabel("predicted", color=QUIET, fontsize=9)
    axes.set_ylabel("true", color=QUIET, fontsize=9)
    axes.grid(visible=False)
    axes.spines["bottom"].set_visible(False)
    return Plot(f"confusion-{re.sub(r'[^a-z0-9]+', '-', part.lower())}", f"Confusion matrix, {part}", figure)


def traffic(record: RunRecord) -> Plot:
    """Bytes that have travelled up to each round."""
    figure, axes = blank("Traffic, added up")
    for name, text, colour in (("bytes_down", "to clients", SERIES[0]), ("bytes_up", "from clients", SERIES[1])):
        rounds, sizes = record.series(name)
        if len(rounds):
            x, total, *_ = thin(rounds, np.cumsum(np.nan_to_num(sizes)))
            style = "--" if name == "bytes_up" else "-"  # often they coincide
            axes.plot(x, total, style, color=colour, linewidth=1.7, label=text, marker="o" if len(x) == 1 else "")
    over_rounds(axes, int(record.rounds[0]), int(record.rounds[-1]))
    axes.set_ylim(bottom=0)
    in_bytes(axes)
    legend(figure, axes)
    return Plot("traffic", "Bytes to and from clients, added up over rounds", figure)


def time(record: RunRecord) -> Plot:
    """Seconds that each round took."""
    figure, axes = blank("Seconds a round")
    curve(axes, "seconds", *record.series("seconds"), SERIES[0])
    over_rounds(axes, int(record.rounds[0]), int(record.rounds[-1]))
    axes.set_ylim(bottom=0)
    return Plot("time", "Seconds that each round took", figure)
