"""How each class fares: what it is taken for in the last evaluation, and how its recall went over rounds."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from fedsim.report import figures
from fedsim.report.content import Section, Table
from fedsim.report.drawing import Plot
from fedsim.report.formats import NONE, count, measure
from fedsim.report.phases import marked
from fedsim.report.reading import Confusion, Floats, Ints, RunRecord, json_lines

_PARTS = {"test": "Test set", "clients": "Clients’ test parts"}
_ROWS = 20  # of a table
_CURVES = 12


class Recalls(NamedTuple):
    """The share of each class that was recognised, in E evaluations."""

    rounds: Ints  # (E,), ascending
    values: Floats  # (E, K); NaN where a class had no examples, or what was counted was not finite


def classes(record: RunRecord) -> Section | None:
    """What is taken for what, and the recall of each class over rounds."""
    read = read_recalls(record.path / "classes.jsonl")
    recalls = {part: found for part, found in read.items() if len(found.rounds) > 1}
    plots = [plot for part, found in recalls.items() for plot in _over_rounds(record, part, found)]
    if not (record.confusions or plots):
        return None
    note = ""
    if record.confusions:
        note = "A row is what an example is, a column what it is taken for; the colour is a cell’s share of its row. "
    if plots:
        note += "Recall is the share of a class that is recognised. "
        most = max(found.values.shape[1] for found in recalls.values())
        if most > _CURVES:
            note += f"Of {most} classes those {_CURVES} are drawn whose least and greatest recall differ the most."
    return Section(
        "Classes",
        note.strip(),
        plots=(*(figures.confusion(part, found) for part, found in record.confusions.items()), *plots),
        tables=tuple(_table(part, found) for part, found in record.confusions.items()),
    )


def read_recalls(path: Path) -> dict[str, Recalls]:
    """The recall of each class in each part that was evaluated; {} where there is no file.

    Raises:
        ValueError: the file is damaged.
    """
    lines = {line["round"]: line for _, line in json_lines(path)}
    found: dict[str, Recalls] = {}
    for part in _PARTS:
        rounds = sorted(number for number, line in lines.items() if part in line)
        rows = [_recall(path, number, part, lines[number][part]) for number in rounds]
        if len({len(row) for row in rows}) > 1:
            numbers = ", ".join(str(len(row)) for row in rows)
            raise ValueError(f"{path} is damaged: {part} must have one number of classes, got {numbers}")
        if rows:
            found[part] = Recalls(np.array(rounds, dtype=np.int64), np.array(rows))
    return found


def _recall(path: Path, number: int, part: str, told: object) -> Floats:
    where = f"{path} is damaged: {part} of round {number}"
    if not isinstance(told, dict) or not {"right", "examples"} <= told.keys():
        raise ValueError(f"{where} must have right and examples, got {str(told)[:80]}")
    try:
        right, examples = np.array(told["right"]), np.array(told["examples"])
    except ValueError as error:  # rows of different lengths
        raise ValueError(f"{where} must be two rows of numbers, got {str(told)[:80]}") from error
    for counts in (right, examples):
        if counts.dtype.kind not in "if" or counts.ndim != 1 or not counts.size or (counts < 0).any():
            raise ValueError(f"{where} must be two rows of numbers, none below 0, got {str(told)[:80]}")
    if len(right) != len(examples):
        raise ValueError(f"{where} must be two rows of one length, got {len(right)} right and {len(examples)} examples")
    known = np.isfinite(right) & np.isfinite(examples) & (examples > 0)
    recall = np.full(len(right), np.nan)
    recall[known] = right[known] / examples[known]
    return recall


def _over_rounds(record: RunRecord, part: str, found: Recalls) -> list[Plot]:
    """The recall of each class over rounds; of many classes, of those that moved the most."""
    there = np.flatnonzero(np.isfinite(found.values).any(axis=0))
    if not len(there):
        return []
    moved = np.nanmax(found.values[:, there], axis=0) - np.nanmin(found.values[:, there], axis=0)
    shown = np.sort(there[np.argsort(-moved, kind="stable")[:_CURVES]])
    confusion = record.confusions.get(part)
    names = dict(enumerate(confusion.classes)) if confusion is not None else {}
    series = [(names.get(place, str(place)), found.rounds, found.values[:, place]) for place in shown.tolist()]
    title = f"Recall of each class, {_PARTS[part].lower()}"
    return [figures.lines(f"classes-{part}", title, series, marked(record))]


def _table(part: str, found: Confusion) -> Table:
    """Recall and precision of each class; of many classes only those with the least recall."""
    counts, right = found.counts, found.counts.diagonal()
    truth, guessed = counts.sum(axis=1), counts.sum(axis=0)
    wrong = counts - np.diag(right)
    recall = np.divide(right, truth, out=np.full(len(right), np.inf), where=truth > 0)
    shown = np.arange(len(right))
    if len(right) > _ROWS:
        shown = np.argsort(recall, kind="stable")[:_ROWS]
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
    title = _PARTS.get(part, part)
    note = f"The {_ROWS} of {count(len(right))} classes with the least recall." if len(shown) < len(right) else ""
    header = ("class", "examples", "recall", "precision", "taken for")
    return Table(title, header, tuple(rows), note, words=(0, 4))
