"""What stands beside the experiments of a comparison though nobody ran it: MostPop, once for each set of data."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fedsim.ranking import PART, beside, is_ranking
from fedsim.report.measures import outcome
from fedsim.report.reading import RunRecord
from fedsim.report.rows import Row, Spread

_DATA = ("data.", "partition.", "split.", "evaluate_clients")  # settings that say who is asked, and about what
_ASKED = ("clients.evaluate.at", "clients.evaluate.part", "clients.evaluate.num_items")


def mostpop(
    groups: Sequence[Sequence[RunRecord]],
    tables: Sequence[Mapping[str, str]],
    differing: Sequence[str],
    measures: Sequence[str],
) -> tuple[Row, ...]:
    """What popularity reaches, in these measures: one row for all experiments on the same data.

    Data that are drawn anew with each seed are the same for experiments that ran with the same seeds.

    Args:
        groups: the runs of each experiment.
        tables: what each experiment asks for.
        differing: settings in which they differ; those that are about data tell the rows apart, and else the seeds do.
        measures: of the comparison.
    """
    found: dict[Any, tuple[dict[str, str], list[RunRecord]]] = {}
    for group, table in zip(groups, tables, strict=True):
        records = [record for record in group if _values(record, measures)]
        about = {name: value for name, value in sorted(table.items()) if name.startswith((*_DATA, *_ASKED))}
        key = tuple(about.items()), frozenset(map(tuple, (_rounded(record, measures) for record in records)))
        if records and len(records) > len(found.get(key, ({}, []))[1]):
            found[key] = {name: value for name, value in about.items() if name in differing}, records
    every = [settings for settings, _ in found.values()]
    return tuple(
        _row(_name(settings, records, every), settings, records, measures) for settings, records in found.values()
    )


def _name(settings: dict[str, str], records: Sequence[RunRecord], every: Sequence[dict[str, str]]) -> str:
    """MostPop; where there are several, of which data, and with which seeds if these tell them apart."""
    told = ["MostPop"]
    if len(every) > 1 and "data.use" in settings:
        told.append(settings["data.use"])
    if every.count(settings) > 1:
        seeds = [str(record.experiment.get("seed")) for record in records]
        told.append(f"{'seed' if len(seeds) == 1 else 'seeds'} {', '.join(seeds)}")
    return ", ".join(told)


def _row(name: str, settings: dict[str, str], records: Sequence[RunRecord], measures: Sequence[str]) -> Row:
    """The row over some runs."""
    each = [_values(record, measures) for record in records]
    same = len({tuple(_rounded(record, measures)) for record in records}) == 1  # of data that are always the same
    values = {}
    for column in measures:
        if there := [some[column] for some in each if column in some]:
            values[column] = Spread(there[0], math.nan, len(there)) if same else Spread.of(there)
    if measures[0] in values:
        values["best"] = values[measures[0]]
    seeds = tuple(record.experiment.get("seed") for record in records)
    return Row(name, seeds, settings, values, 0, tuple(record.path for record in records))


def _rounded(record: RunRecord, measures: Sequence[str]) -> list[tuple[str, float]]:
    """The values as they are on every machine."""
    return [(name, round(value, 9)) for name, value in _values(record, measures).items()]


def _values(record: RunRecord, measures: Sequence[str]) -> dict[str, float]:
    """What popularity reaches in a run, as far as it was measured."""
    last = {name: outcome(record, beside(name)) for name in measures if is_ranking(name.removeprefix(PART))}
    return {name: one.last for name, one in last.items() if one is not None and math.isfinite(one.last)}
