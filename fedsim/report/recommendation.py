"""Recommendation: how often held-out items are proposed, over rounds and by kind of user and item, beside MostPop."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedsim.ranking import MOSTPOP, Measure, ranked, usual
from fedsim.report.content import Fact, Section, Table
from fedsim.report.drawing import Plot, blank, legend, named, over_rounds
from fedsim.report.figures import curve
from fedsim.report.formats import NONE, count, measure, several
from fedsim.report.measures import outcome
from fedsim.report.palette import AXIS, INK, QUIET, SERIES
from fedsim.report.reading import Floats, RunRecord

_KINDS = {  # columns of clients.csv: the figure's name, what is told of a group, its title
    "activity": ("By user activity", "items that the user is trained on"),
    "popularity": ("By popularity of the held-out item", "users who train with the held-out item"),
}
_WIDTH = 0.36  # of a bar


class Group(NamedTuple):
    """Users who are alike, n of them, and the share of them whose held-out item is proposed."""

    low: float  # the bounds, both inside
    high: float
    n: int
    hits: dict[str, float]  # by column: "hr_10", "mostpop_hr_10"

    @property
    def bounds(self) -> str:
        """As text."""
        return count(self.low) if self.low == self.high else f"{count(self.low)}–{count(self.high)}"

    def error(self, name: str) -> float:
        """The binomial standard error of such a share."""
        return math.sqrt(self.hits[name] * (1 - self.hits[name]) / self.n)


def recommendations(record: RunRecord) -> list[Fact]:
    """The first hit rate and NDCG, for the headline."""
    facts = []
    for told in usual(_measured(record))[:2]:
        found = outcome(record, f"clients/{told.name}")
        if found is not None:
            popular = _popular(record, told)
            best = f"best {measure(found.best)}, round {count(found.best_round or 0)}" if found.best is not None else ""
            facts.append(
                Fact(
                    told.label + _part(record),
                    measure(found.last),
                    best if popular is None else f"MostPop {popular:.3f}",
                )
            )
    return facts


def recommendation(record: RunRecord) -> Section | None:
    """Hit rate and NDCG over rounds and in the end, and the hit rate by kind of user and of item.

    Raises:
        ValueError: clients.csv is damaged.
    """
    names = _measured(record)
    found = ranked(names)
    if not found:
        return None
    plots = [_over_rounds(record, told) for told in usual(names)]
    tables = [_results(record, [m for m in found if m.full == full]) for full in sorted({m.full for m in found})]
    note = (
        "HR@K is how often a user’s held-out item is among the first K, NDCG@K counts it by its place; ties count "
        "against it. MostPop proposes to everybody what most users have: what it reaches needs no learning."
    )
    if _part(record):
        note += " Here the held-out item is the one for validation, not the one for testing."
    if not any(name.startswith(MOSTPOP) for name in names):
        note += " It is not known here, for that takes the data of all users."
    groups = {kind: some for kind in _KINDS if (some := by_kind(record, kind))}
    if groups:
        of = "" if record.evaluated is None else f" of round {count(record.evaluated)}"
        note += f" The groups{of} are quarters of the users, as far as ties allow, each with its standard error."
    plots += [_bars(record, kind, some) for kind, some in groups.items()]
    tables += [_by_group(kind, some) for kind, some in groups.items()]
    return Section("Recommendation", note, plots=tuple(plots), tables=tuple(tables))


def by_kind(record: RunRecord, kind: str) -> list[Group]:
    """Quarters of the users by a column of clients.csv, "activity" or "popularity"; none where it is not there.

    Raises:
        ValueError: the file is damaged.
    """
    columns = record.clients
    hits = [m.name for m in usual(columns) if m.kind == "hr"]
    hits = [name for told in hits for name in (told, MOSTPOP + told) if name in columns]
    if kind not in columns or not hits:
        return []
    there = columns.get("examples", np.ones(len(columns[kind]))) > 0  # nothing is held out of the others
    _check(record, kind, there & ~(columns[kind] >= 0), "a number >= 0")
    for name in hits:
        _check(record, name, there & ~np.isin(columns[name], (0, 1)), "0 or 1")
    values = columns[kind][there]
    return [
        Group(
            float(values[some].min()),
            float(values[some].max()),
            int(some.sum()),
            {name: float(columns[name][there][some].mean()) for name in hits},
        )
        for some in quarters(values)
    ]


def quarters(values: Floats) -> list[NDArray[np.bool_]]:
    """Which of n values are in which quarter, (n,) each. Equal ones stay together, so there may be fewer than four."""
    if not len(values):
        return []
    edges = np.unique(np.quantile(values, (0.25, 0.5, 0.75), method="inverted_cdf"))
    place = np.searchsorted(edges[edges < values.max()], values)
    return [place == group for group in range(int(place.max()) + 1)]


def _check(record: RunRecord, name: str, wrong: NDArray[np.bool_], allowed: str) -> None:
    if wrong.any():
        row = int(wrong.argmax())
        who = record.clients.get("client", np.arange(len(wrong), dtype=np.float64))[row]
        value = record.clients[name][row]
        raise ValueError(
            f"{record.path / 'clients.csv'} is damaged: {name} of client {who:g} must be {allowed}, got {value:g}"
        )


def _measured(record: RunRecord) -> list[str]:
    """The metrics of the clients' own parts, by their own names."""
    return [name.removeprefix("clients/") for name in record.metrics if name.startswith("clients/")]


def _part(record: RunRecord) -> str:
    """Which held-out item is put in order, where it is that for validation; empty for the test item."""
    told: Any = record.experiment
    for key in ("clients", "evaluate", "part"):
        told = told.get(key) if isinstance(told, dict) else None
    return " (validation)" if told == "validation" else ""


def _popular(record: RunRecord, told: Measure) -> float | None:
    """What MostPop reaches; None where that is not known."""
    found = outcome(record, f"clients/{MOSTPOP}{told.name}")
    return None if found is None or not math.isfinite(found.last) else found.last


def _among(full: bool) -> str:
    return "among all items" if full else "among drawn negatives"


def _over_rounds(record: RunRecord, told: Measure) -> Plot:
    title = f"{told.label} {_among(told.full)}"
    figure, axes = blank(title)
    rounds, values = record.series(f"clients/{told.name}")
    curve(axes, record.name, rounds, values, SERIES[0])
    if (popular := _popular(record, told)) is not None:
        axes.axhline(popular, color=QUIET, linewidth=1.2, linestyle="--", label="MostPop")
    over_rounds(axes, int(rounds[0]), int(rounds[-1]))
    axes.set_ylim(bottom=0)
    legend(figure, axes)
    return Plot(f"recommendation-{told.name.replace('_', '-')}", f"{title} over rounds", figure)


def _bars(record: RunRecord, kind: str, groups: Sequence[Group]) -> Plot:
    """The share of each group whose item is proposed, and MostPop's beside it."""
    title, across = _KINDS[kind]
    name, *popular = list(groups[0].hits)[:2]
    label = ranked([name])[0].label
    figure, axes = blank(f"{label} {title[:1].lower()}{title[1:]}")
    popular = [other for other in popular if other == MOSTPOP + name]
    for place, (column, text, colour) in enumerate(
        [(name, record.name, SERIES[0]), *((other, "MostPop", AXIS) for other in popular)]
    ):
        axes.bar(
            np.arange(len(groups)) + (place - len(popular) / 2) * _WIDTH,
            [group.hits[column] for group in groups],
            _WIDTH,
            color=colour,
            label=named(text),
            yerr=[group.error(column) for group in groups],
            error_kw={"ecolor": INK, "elinewidth": 1, "capsize": 3, "capthick": 1},
        )
    told = [f"{group.bounds}\n{several(group.n, 'user')}" for group in groups]
    axes.set_xticks(range(len(groups)), told, fontsize=9 if max(len(group.bounds) for group in groups) < 15 else 7)
    axes.set_xlim(-0.6, len(groups) - 0.4)
    axes.set_ylim(bottom=0)
    axes.set_xlabel(across, color=QUIET, fontsize=9)
    legend(figure, axes)
    return Plot(f"recommendation-{kind}", f"{label} {title[:1].lower()}{title[1:]}", figure)


def _results(record: RunRecord, found: Sequence[Measure]) -> Table:
    """A row for the method in its last round and at its best, and MostPop's."""
    outcomes = [outcome(record, f"clients/{told.name}") for told in found]
    last = (NONE if one is None else measure(one.last) for one in outcomes)
    best = (NONE if one is None or one.best is None else measure(one.best) for one in outcomes)
    rows = [(record.name, *last), ("its best in any round", *best)]
    popular = [_popular(record, told) for told in found]
    if any(value is not None for value in popular):
        rows.append(("MostPop", *(NONE if value is None else measure(value) for value in popular)))
    title = _among(found[0].full)
    return Table(f"{title[:1].upper()}{title[1:]}", ("", *(told.label for told in found)), tuple(rows))


def _by_group(kind: str, groups: Sequence[Group]) -> Table:
    """A column for each group; a row for each hit rate, and one for MostPop's below it."""
    title, across = _KINDS[kind]
    rows = [("users", *(count(group.n) for group in groups))]
    for name in groups[0].hits:
        told = ranked([name.removeprefix(MOSTPOP)])[0]
        who = "MostPop’s " if name.startswith(MOSTPOP) else ""
        cells = (f"{measure(group.hits[name])} ± {measure(group.error(name))}" for group in groups)
        rows.append((f"{who}{told.label} {_among(told.full)}", *cells))
    return Table(title, (across, *(group.bounds for group in groups)), tuple(rows))
