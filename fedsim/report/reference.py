"""What stands beside the experiments of a comparison though nobody ran it: MostPop, once for each set of data."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from fedsim.ranking import PART, beside, is_ranking
from fedsim.report.measures import outcome
from fedsim.report.reading import RunRecord
from fedsim.report.rows import Row, Spread, titles

_DATA = ("data.", "partition.", "split.", "evaluate_clients")  # settings that say who is asked, and about what
_ASKED = ("clients.evaluate.part", "clients.evaluate.num_items")


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
    found: list[tuple[dict[str, str], Mapping[str, str], list[list[RunRecord]]]] = []
    for group, table in zip(groups, tables, strict=True):
        records = [record for record in group if _values(record, measures)]
        if not records:
            continue
        about = {name: value for name, value in sorted(table.items()) if name.startswith((*_DATA, *_ASKED))}
        there = (
            alike for told, _, alike in found if told == about and all(_agree(a, records, measures) for a in alike)
        )
        if (alike := next(there, None)) is None:
            found.append((about, table, [records]))
        else:
            alike.append(records)
    shown = [{name: value for name, value in about.items() if name in differing} for about, *_ in found]
    most = [max(alike, key=len) for *_, alike in found]
    names = [_name(some, records, shown) for some, records in zip(shown, most, strict=True)]
    rows = [_row(*one, measures) for one in zip(names, shown, (alike for *_, alike in found), strict=True)]
    whole = [{name: table[name] for name in differing if name in table} for _, table, _ in found]
    return tuple(_apart(_apart(rows, shown), whole))


def _agree(some: Sequence[RunRecord], others: Sequence[RunRecord], measures: Sequence[str]) -> bool:
    """Whether two experiments have a measure in common, and the same values of all that they have in common."""
    one, other = (
        {
            name: {value for record in records for column, value in _rounded(record, measures) if column == name}
            for name in measures
        }
        for records in (some, others)
    )
    both = [name for name in measures if one[name] and other[name]]
    return bool(both) and all(one[name] == other[name] for name in both)


def _apart(rows: Sequence[Row], settings: Sequence[dict[str, str]]) -> list[Row]:
    """The rows, with those settings in the names of namesakes that tell them apart."""
    named = titles([replace(row, settings=some) for row, some in zip(rows, settings, strict=True)])
    return [replace(row, name=name) for row, name in zip(rows, named, strict=True)]


def _name(settings: dict[str, str], records: Sequence[RunRecord], every: Sequence[dict[str, str]]) -> str:
    """MostPop; where there are several, of which data, and with which seeds if these tell them apart."""
    told = ["MostPop"]
    if len(every) > 1 and "data.use" in settings:
        told.append(settings["data.use"])
    if every.count(settings) > 1:
        seeds = [str(record.experiment.get("seed")) for record in records]
        told.append(f"{'seed' if len(seeds) == 1 else 'seeds'} {', '.join(seeds)}")
    return ", ".join(told)


def _row(name: str, settings: dict[str, str], alike: Sequence[Sequence[RunRecord]], measures: Sequence[str]) -> Row:
    """The row over the runs of the experiment that has most of them; what these did not measure is that of others."""
    values: dict[str, Spread] = {}
    records = max(alike, key=len)
    for some in (*alike, records):
        values |= _spreads(some, measures)
    if measures[0] in values:
        values["best"] = values[measures[0]]
    seeds = tuple(record.experiment.get("seed") for record in records)
    return Row(name, seeds, settings, values, 0, tuple(record.path for record in records))


def _spreads(records: Sequence[RunRecord], measures: Sequence[str]) -> dict[str, Spread]:
    each = [_values(record, measures) for record in records]
    same = len({tuple(_rounded(record, measures)) for record in records}) == 1  # of data that are always the same
    there = {column: [some[column] for some in each if column in some] for column in measures}
    return {
        column: Spread(some[0], math.nan, len(some)) if same else Spread.of(some)
        for column, some in there.items()
        if some
    }


def _rounded(record: RunRecord, measures: Sequence[str]) -> list[tuple[str, float]]:
    """The values as they are on every machine."""
    return [(name, round(value, 9)) for name, value in _values(record, measures).items()]


def _values(record: RunRecord, measures: Sequence[str]) -> dict[str, float]:
    """What popularity reaches in a run, as far as it was measured."""
    last = {name: outcome(record, beside(name)) for name in measures if is_ranking(name.removeprefix(PART))}
    return {name: one.last for name, one in last.items() if one is not None and math.isfinite(one.last)}
