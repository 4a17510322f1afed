"""How clients and classes fare in the last evaluation."""

import numpy as np

from fedsim.ranking import is_ranking
from fedsim.report import figures
from fedsim.report.content import Section, Table
from fedsim.report.formats import NONE, count, measure, several
from fedsim.report.measures import apart, direction
from fedsim.report.reading import Confusion, Floats, RunRecord

_ENDS = 5  # clients shown at either end
_CLASSES = 20
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


def classes(record: RunRecord) -> Section | None:
    """What is taken for what."""
    if not record.confusions:
        return None
    plots = tuple(figures.confusion(part, found) for part, found in record.confusions.items())
    return Section(
        "Classes",
        "A row is what an example is, a column what it is taken for; the colour is a cell’s share of its row.",
        plots=plots,
        tables=tuple(_recalls(part, found) for part, found in record.confusions.items()),
    )


def _recalls(part: str, found: Confusion) -> Table:
    """Recall and precision of each class; of many classes only those with the least recall."""
    counts, right = found.counts, found.counts.diagonal()
    truth, guessed = counts.sum(axis=1), counts.sum(axis=0)
    wrong = counts - np.diag(right)
    recall = np.divide(right, truth, out=np.full(len(right), np.inf), where=truth > 0)
    shown = np.arange(len(right))
    if len(right) > _CLASSES:
        shown = np.argsort(recall, kind="stable")[:_CLASSES]
    rows = []
    for row in shown:
        other = int(wrong[row].argmax())
        rows.append(
            (
                found.classes[row],
                count(truth[row]),
                measure(right[row] / truth[row]) if truth[row] else NONE,
                measure(right[row] / guessed[row]) if guessed[row] else NONE,
                f"{found.classes[other]} ({count(wrong[row, other])})" if wrong[row, other] else NONE,
            )
        )
    title = {"test": "Test set", "clients": "Clients’ test parts"}.get(part, part)
    note = f"The {_CLASSES} of {count(len(right))} classes with the least recall." if len(shown) < len(right) else ""
    header = ("class", "examples", "recall", "precision", "taken for")
    return Table(title, header, tuple(rows), note, words=(0, 4))
