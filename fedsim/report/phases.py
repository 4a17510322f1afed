"""The phases of a method: spans of rounds in which it asks its clients for the same, and their marks in a figure."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from fedsim.report.drawing import entitle, short
from fedsim.report.formats import count
from fedsim.report.palette import AXIS, PAPER, QUIET
from fedsim.report.reading import RunRecord

_EVALUATED = ("test", "clients", "evaluate")  # names before a slash that are no action of a method's
_MOST = 12  # phases that are marked
_SIZE = 8  # of the letters, in points
_LETTER, _WIDTH = 4.9, 330  # how wide one is, and the axes of a figure, in points
_ROWS = 3  # of labels above one another
_ROW, _HEIGHT = 10, 150  # how high one is, and the axes, in points


class Phase(NamedTuple):
    """Rounds that follow one another."""

    action: str  # what clients are asked for
    request: float | None  # which request is being served; None where nothing said so
    first: int
    last: int


def phases(record: RunRecord) -> list[Phase]:
    """The phases of a run, by the metrics "<action>/<name>" of its rounds; a change of "request" begins one too.

    A round in which no action was measured belongs to the phase before it. Where the experiment says which actions its
    clients know, only these count: what a strategy measures may have a slash in its name.
    """
    actions = _actions(record)
    requests = record.metrics.get("request", np.full(len(record.rounds), np.nan))
    found: list[Phase] = []
    for number, action, value in zip(record.rounds.tolist(), actions, requests.tolist(), strict=True):
        request = None if np.isnan(value) else value
        same = action is None or (found and found[-1].action == action and request in (None, found[-1].request))
        if found and same:
            found[-1] = found[-1]._replace(last=number)
        elif action is not None:
            found.append(Phase(action, request, number, number))
    return found


def _actions(record: RunRecord) -> list[str | None]:
    """The action of each round; of several, the one that was measured the least often."""
    known = record.experiment.get("clients")
    rows: dict[str, NDArray[np.bool_]] = {}
    for name, measured in record.measured.items():
        action, slash, _ = name.partition("/")
        if slash and action not in _EVALUATED and (not isinstance(known, dict) or action in known):
            rows[action] = rows.get(action, np.zeros_like(measured)) | measured
    rare = sorted(rows, key=lambda action: int(rows[action].sum()))
    return [next((action for action in rare if rows[action][row]), None) for row in range(len(record.rounds))]


def marked(record: RunRecord) -> list[Phase]:
    """The phases that figures show: all of them, or none where there is but one, or too many to tell apart."""
    found = phases(record)
    return found if 2 <= len(found) <= _MOST else []


def label(phase: Phase, some: Sequence[Phase]) -> str:
    """What a phase is called among others: its action, and its request where there are several."""
    several = len({other.request for other in some} - {None}) > 1
    return short(phase.action, 16) + (f" {phase.request:g}" if several and phase.request is not None else "")


def sentence(some: Sequence[Phase]) -> str:
    """The phases in a sentence: "Phases: train, rounds 1 to 50; forget, round 51."; nothing where there are none."""
    spans = (
        f"{label(phase, some)}, "
        + (f"rounds {count(phase.first)} to " if phase.last > phase.first else "round ")
        + count(phase.last)
        for phase in some
    )
    return f"Phases: {'; '.join(spans)}." if some else ""


def mark(axes: Axes, some: Sequence[Phase], first: int, last: int) -> None:
    """Marks the phases in a figure of these rounds, if they lie in at least two: lines between them, names above.

    A name that has no room above its phase stands higher; one that has none there either is left out.
    """
    shown = [phase for phase in some if phase.first <= last and phase.last >= first]
    if len(shown) < 2:
        return
    low, high = axes.get_xlim()
    point = (high - low) / _WIDTH  # in rounds
    ends = [low] * _ROWS  # how far each row is taken
    highest = 0
    for place, phase in enumerate(shown):
        text = label(phase, some)
        width = (len(text) * _LETTER + 6) * point
        start = max(phase.first - 0.5, low)
        left = min(start, high - width)  # the last ones end where the axes do
        row = next((row for row, end in enumerate(ends) if left >= end), None)
        if row is not None:
            ends[row] = left + width
            highest = max(highest, row)
            where = axes.get_xaxis_transform()
            shift = (2, 3.5 + _ROW * row)
            box = {"facecolor": PAPER, "edgecolor": "none", "pad": 0.5}  # of what is behind, nothing shows through
            axes.annotate(text, (left, 1), shift, where, "offset points", color=QUIET, fontsize=_SIZE, bbox=box)
        if place:
            top = 1 + (0 if row is None else (row + 0.9) * _ROW / _HEIGHT)
            axes.axvline(start, ymax=top, color=AXIS, linewidth=0.8, zorder=0.5, clip_on=False)
    entitle(axes, axes.get_title("left"), (highest + 0.4) * _ROW)
