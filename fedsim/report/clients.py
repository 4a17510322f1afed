"""How clients fare in the last evaluation."""

import numpy as np

from fedsim.ranking import is_ranking
from fedsim.report import figures
from fedsim.report.content import Section, Table
from fedsim.report.formats import NONE, count, measure, several
from fedsim.report.measures import apart, direction
from fedsim.report.reading import Floats, RunRecord

_ENDS = 5  # clients shown at either end
_SHARES = (0, 0.1, 0.5, 0.9, 1)


def over_clients(record: RunRecord) -> Section | None:
    """The spread of the last evaluation over clients, its worst and its best."""
    left = {
        "client",
        "examples",
        *_of_recommendation(record),
        *(name.removeprefix("clients/") for name in apart(record.metrics)),
    }
    columns = {n: v for n, v in record.clients.items() if n not in left and np.isfinite(v).any()}
    if not columns:
        return None
    name = sorted(columns, key=lambda n: (n != "accuracy", -direction(n), n))[0]
    silent = int((~np.isfinite(columns[name])).sum())
    note = f"Round {count(record.evaluated)}. " if record.evaluated is not None else ""
    note += f"{several(len(columns[name]), 'client')}"
    note += f", {count(silent)} of them without a value." if silent else "."
    plots = figures.over_clients(record, name)
    return Section("Clients", note, plots=tuple(plots), tables=(_spread(columns), _extremes(record, name, columns)))


def _of_recommendation(record: RunRecord) -> set[str]:
    """The columns that its own section tells of: hits, which are 0 or 1, and by what users are put into groups."""
    hits = {name for name in record.clients if is_ranking(name)}
    return hits | {"activity", "popularity"} if hits else hits


def _spread(columns: dict[str, Floats]) -> Table:
    rows = []
    for name, values in columns.items():
        finite = values[np.isfinite(values)]
        rows.append((name, *map(measure, np.quantile(finite, _SHARES)), measure(float(finite.mean()))))
    header = ("over clients", "least", "10th percentile", "median", "90th percentile", "greatest", "mean")
    return Table("Spread", header, tuple(rows), "Each client counts once, however many examples it has.")


def _extremes(record: RunRecord, name: str, columns: dict[str, Floats]) -> Table:
    """The worst clients, the one in the middle, and the best."""
    values = columns[name]
    order = np.flatnonzero(np.isfinite(values))
    order = order[np.argsort(values[order] * (direction(name) or 1), kind="stable")]
    number = len(order)
    chosen = {place: "" for place in range(number)}
    if number > 2 * _ENDS + 1:
        places = [*range(_ENDS), (number - 1) // 2, *range(number - _ENDS, number)]
        chosen = dict.fromkeys(places, "")
    names = {number - 1: "best", (number - 1) // 2: "median", 0: "worst"}  # of a single client: worst
    ids = record.clients.get("client", np.arange(len(values), dtype=np.float64))
    examples = record.clients.get("examples")
    rows = []
    for place in chosen:
        row = order[place]
        told = () if examples is None else (count(float(examples[row])),)
        others = (measure(float(c[row])) if np.isfinite(c[row]) else NONE for c in columns.values())
        rows.append((names.get(place, "") if number > 2 else "", count(float(ids[row])), *told, *others))
    header = ("", "client", *(() if examples is None else ("examples",)), *columns)
    return Table(f"Clients by {name}", header, tuple(rows))
