"""How far groups are apart: by each notion, over all examples and at each client, and the rates that are compared."""

from collections.abc import Sequence

import numpy as np

from fedsim.report import figures
from fedsim.report.content import Fact, Section, Table
from fedsim.report.drawing import Plot
from fedsim.report.formats import NONE, count, measure
from fedsim.report.measures import notions, outcome
from fedsim.report.reading import Confusion, Floats, RunRecord

_RATES = 20  # in a table of them
_PARTS = {"test": "Test set", "clients": "Clients’ test parts"}


def gaps(record: RunRecord) -> list[Fact]:
    """The gap of each notion, on the common test set where there is one, and the largest at a client."""
    facts = []
    for part, some in list(notions(record.metrics).items())[:1]:
        for notion in some:
            worst = outcome(record, f"clients/local_{notion}_gap")
            name = f"{_spoken(notion)[:1].upper()}{_spoken(notion)[1:]} gap"
            remark = "" if worst is None else f"{measure(worst.last)} at the worst client"
            facts.append(Fact(name, _last(record, f"{part}/{notion}_gap"), remark))
    return facts


def fairness(record: RunRecord) -> Section | None:
    """How gaps went over rounds; gaps, deviations and the rates of each group in the last evaluation."""
    found = notions(record.metrics)
    if not found:
        return None
    note = "A gap is the largest difference of a rate between two groups, a deviation the largest from the rate of all."
    if record.evaluated is not None:
        note += f" The tables are of round {count(record.evaluated)}."
    plots = [plot for part, some in found.items() for plot in _plots(record, part, some)]
    tables = [table for part, some in found.items() for table in _tables(record, part, some)]
    return Section("Fairness", note, plots=tuple(plots), tables=tuple(tables))


def _plots(record: RunRecord, part: str, some: Sequence[str]) -> list[Plot]:
    """The gaps over rounds, those over all examples and those at the worst clients."""
    plots = []
    for scope, title in (("", _PARTS[part]), ("local_", "the worst client")):
        series = [(_spoken(notion), *record.series(f"{part}/{scope}{notion}_gap")) for notion in some]
        if drawn := _distinct([curve for curve in series if len(curve[1])]):
            plots.append(figures.lines(f"fairness-{scope.replace('_', '-')}{part}", f"Gaps, {title.lower()}", drawn))
    return plots


def _distinct(series: Sequence[figures.Curve]) -> list[figures.Curve]:
    """The curves, of which none hides another: for two classes, some notions compare the same."""
    found: list[figures.Curve] = []
    for text, rounds, values in series:
        for place, (other, its, known) in enumerate(found):
            if np.array_equal(rounds, its) and np.allclose(values, known, rtol=0, atol=1e-9, equal_nan=True):
                found[place] = (f"{other}, {text}", its, known)
                break
        else:
            found.append((text, rounds, values))
    return found


def _tables(record: RunRecord, part: str, some: Sequence[str]) -> list[Table]:
    confusion = record.confusions.get(part)
    rates = [] if confusion is None or confusion.groups is None else [_rates(part, confusion, confusion.groups)]
    return [_apart(record, part, some), *rates]


def _apart(record: RunRecord, part: str, some: Sequence[str]) -> Table:
    """A row for each notion; of clients also how it is at each of them."""
    header: tuple[str, ...] = ("notion", "gap", "deviation")
    rows = [(_spoken(notion), *(_last(record, f"{part}/{notion}_{end}") for end in header[1:])) for notion in some]
    if part == "clients" and any(f"{notion}_gap" in record.clients for notion in some):
        header += ("median client’s gap", "worst client’s gap", "of client", "worst client’s deviation")
        rows = [(*row, *_local(record, notion)) for row, notion in zip(rows, some, strict=True)]
    return Table(_PARTS[part], header, tuple(rows))


def _local(record: RunRecord, notion: str) -> tuple[str, ...]:
    values = record.clients.get(f"{notion}_gap", np.zeros(0))
    if not np.isfinite(values).any():
        return (NONE,) * 4
    worst = int(np.nanargmax(values))
    who = record.clients["client"][worst] if "client" in record.clients else worst
    told = measure(float(np.nanmedian(values))), measure(float(values[worst])), count(float(who))
    return (*told, _last(record, f"clients/local_{notion}_deviation"))


def _rates(part: str, found: Confusion, groups: Floats) -> Table:
    """A row for each rate that is compared; of many, those that differ most. Of two classes one tells of both."""
    every = np.concatenate([groups, groups.sum(axis=0, keepdims=True)])  # (G + 1, K, K)
    size = every.sum(axis=(1, 2))
    skipped = int(len(found.classes) == 2)
    names = found.classes[skipped:]
    with np.errstate(invalid="ignore", divide="ignore"):  # NaN where there is nobody
        accuracy = every.trace(axis1=1, axis2=2) / size
        taken = every.sum(axis=1)[:, skipped:] / size[:, None]  # (G + 1, V)
        given = every[:, :, skipped:] / every.sum(axis=2, keepdims=True)  # (G + 1, K, V)
    rates = np.column_stack([accuracy, taken, given.reshape(len(every), -1)])
    there = ~np.isnan(rates[:-1])
    most, least = (np.where(there, rates[:-1], end) for end in (-np.inf, np.inf))
    gaps = np.clip(most.max(axis=0) - least.min(axis=0), 0, None)
    chosen = np.sort(np.argsort(-gaps, kind="stable")[:_RATES])
    rows = [("examples", *map(count, size.tolist()), NONE)]
    for rate in chosen.tolist():
        label, guess = divmod(rate - 1, len(names))
        told = f"P({names[guess]})" if label == 0 else f"P({names[guess]} | {found.classes[label - 1]})"
        values = (NONE if np.isnan(value) else measure(value) for value in rates[:, rate].tolist())
        rows.append((told if rate else "accuracy", *values, measure(float(gaps[rate]))))
    note = "P(a): how many are taken for a; P(a | b): how many of those that are b."
    if len(chosen) < len(gaps):
        note += f" The {_RATES} of {count(len(gaps))} rates that differ most."
    return Table(f"{_PARTS[part]}, by group", ("", *found.names, "all", "gap"), tuple(rows), note)


def _spoken(notion: str) -> str:
    return notion.replace("_", " ")


def _last(record: RunRecord, name: str) -> str:
    found = outcome(record, name)
    return NONE if found is None else measure(found.last)
