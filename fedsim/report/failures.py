"""Clients that did not answer, by reason; and what else went wrong."""

import re
from collections.abc import Sequence
from typing import TypeVar

from fedsim.report.content import Fold, Section, Table
from fedsim.report.drawing import short
from fedsim.report.formats import count, several
from fedsim.report.reading import Failure, Incident, RunRecord

_GROUPS = 20
Trouble = TypeVar("Trouble", Failure, Incident)


def grouped(failures: Sequence[Trouble]) -> list[list[Trouble]]:
    """The failures by reason, the most frequent first; reasons that differ in numbers only are one."""
    groups: dict[str, list[Trouble]] = {}
    for failure in failures:
        groups.setdefault(re.sub(r"\d+(\.\d+)?", "#", headline(failure)), []).append(failure)
    return sorted(groups.values(), key=len, reverse=True)


def headline(failure: Failure | Incident) -> str:
    """The last line of a reason: what a traceback ends in."""
    lines = failure.reason.strip().splitlines()
    return lines[-1].strip() if lines else "no reason given"


def failures(record: RunRecord) -> Section | None:
    """A table of the reasons, and the full text of the first failure for each."""
    if not record.failures:
        return None
    groups = grouped(record.failures)
    rows = []
    for group in groups[:_GROUPS]:
        clients = sorted({failure.client for failure in group})
        who = ", ".join(map(str, clients[:5])) + (f" and {count(len(clients) - 5)} more" if len(clients) > 5 else "")
        first = min(failure.round for failure in group)
        rows.append((short(headline(group[0]), 160), count(len(group)), who, count(first)))
    rest = groups[_GROUPS:]
    table = Table(
        "",
        ("reason", "times", "clients", "first in round"),
        tuple(rows),
        f"{several(len(rest), 'more reason')}, {count(sum(map(len, rest)))} times, in failures.jsonl." if rest else "",
        words=(0, 2),
    )
    texts = [
        Fold(f"client {group[0].client} in round {group[0].round}: {short(headline(group[0]), 100)}", group[0].reason)
        for group in groups[:_GROUPS]
    ]
    note = f"{several(len(record.failures), 'time')} a client did not answer. "
    note += "Below the table: the full text of the first failure of each kind."
    return Section("Failures", note, tables=(table,), folds=tuple(texts))


def incidents(record: RunRecord) -> Section | None:
    """A table of what went wrong and was made good."""
    if not record.incidents:
        return None
    groups = grouped(record.incidents)
    rows = [
        (short(headline(group[0]), 200), count(len(group)), count(min(incident.round for incident in group)))
        for group in groups[:_GROUPS]
    ]
    table = Table("", ("what happened", "times", "first in round"), tuple(rows), words=(0,))
    note = f"{several(len(record.incidents), 'time')} something went wrong. "
    note += "It cost no client its reply, unless that is told above."
    return Section("Incidents", note, tables=(table,))
