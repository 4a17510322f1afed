"""How the scores of each group are distributed, before and after, and their barycenter."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from fedsim.report.content import Section
from fedsim.report.drawing import Plot, blank, legend, named
from fedsim.report.palette import INK, QUIET, SERIES
from fedsim.report.reading import Ints, RunRecord, json_lines
from fedsim.transport import barycenter_quantiles, distribution, levels

_PARTS = {"test": "Test set", "clients": "Clients’ test parts"}
_CLASSES = 4  # whose scores are drawn
_LEVELS = 400  # of the barycenter's curve


class Scores(NamedTuple):
    """Histograms of scores by group, at the first evaluation and at the last."""

    rounds: tuple[int, ...]  # one of them if there was no other
    counts: tuple[Ints, ...]  # (G, S, bins) each


def scores(record: RunRecord) -> Section | None:
    """The distribution functions of the scores of each group, as they were first and last."""
    found = read_scores(record.path / "scores.jsonl")
    plots = [plot for part, counted in found.items() for plot in _plots(record, part, counted)]
    if not plots:
        return None
    note = (
        "The share of each group that has this score or less. The area between two curves is how far the groups are "
        "apart (W₁); the barycenter is what they would agree on with least transport (W₂)."
    )
    most_groups, most_scores = (max(each.counts[0].shape[axis] for each in found.values()) for axis in (0, 1))
    if most_groups > len(SERIES):
        note += f" The first {len(SERIES)} of {most_groups} groups are drawn; the barycenter is that of all."
    if most_scores > _CLASSES:
        note += f" The scores of the first {_CLASSES} of {most_scores} classes are drawn."
    return Section("Scores", note, plots=tuple(plots))


def read_scores(path: Path) -> dict[str, Scores]:
    """The histograms of each part that was evaluated.

    Raises:
        ValueError: the file is damaged.
    """
    lines = {line["round"]: line for _, line in json_lines(path)}
    found: dict[str, Scores] = {}
    for part in _PARTS:
        rounds = sorted(number for number, line in lines.items() if part in line)
        ends = tuple(dict.fromkeys(rounds[:1] + rounds[-1:]))
        counts = tuple(_counts(path, number, part, lines[number][part]) for number in ends)
        if len({each.shape for each in counts}) > 1:
            raise ValueError(f"{path} is damaged: {part} has shapes {', '.join(str(each.shape) for each in counts)}")
        if counts:
            found[part] = Scores(ends, counts)
    return found


def _counts(path: Path, number: int, part: str, told: object) -> Ints:
    try:
        counts = np.array(told)
    except ValueError as error:  # rows of different lengths
        raise ValueError(f"{path} is damaged: {part} of round {number} holds no table of counts") from error
    if counts.dtype.kind != "i" or counts.ndim != 3 or counts.shape[-1] < 2 or (counts < 0).any():
        got = f"{counts.shape} of {counts.dtype}"
        raise ValueError(f"{path} is damaged: {part} of round {number} must be counts (G, S, bins), got {got}")
    return counts


def _plots(record: RunRecord, part: str, found: Scores) -> list[Plot]:
    confusion = record.confusions.get(part)
    groups = confusion.names if confusion is not None else ()
    classes = confusion.classes if confusion is not None else ()
    plots = []
    for number, counts in zip(found.rounds, found.counts, strict=True):
        for place in range(min(counts.shape[1], _CLASSES)):
            label = place + 1 if counts.shape[1] == 1 else place  # of two classes, the second one's score is told
            what = classes[label] if label < len(classes) else str(label)
            title = f"P({what}), {_PARTS[part].lower()}, round {number}"
            plots.append(_distributions(f"scores-{part}-{number}-{label}", title, counts[:, place], groups))
    return plots


def _distributions(name: str, title: str, counts: Ints, groups: tuple[str, ...]) -> Plot:
    """The distribution function of each group's scores, (G, bins), and of their barycenter."""
    figure, axes = blank(title)
    reached = distribution(torch.from_numpy(counts)).numpy()
    points = np.linspace(0, 1, counts.shape[1])
    there = [group for group in range(len(counts)) if counts[group].any()]
    for place, group in enumerate(there[: len(SERIES)]):
        text = groups[group] if group < len(groups) else f"group {group}"
        axes.plot(points, reached[group], color=SERIES[place], linewidth=1.7, label=named(text), drawstyle="steps-post")
    if len(there) > 1:
        at = levels(_LEVELS)
        centre = barycenter_quantiles(torch.from_numpy(counts), at).numpy()
        axes.plot(centre, at.numpy(), "--", color=INK, linewidth=1.2, label="barycenter")
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("score", color=QUIET, fontsize=9)
    axes.set_ylabel("share of the group", color=QUIET, fontsize=9)
    legend(figure, axes)
    return Plot(name, f"Distribution of {title}", figure)
