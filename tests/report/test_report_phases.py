"""The phases of a method are found in what its rounds measured, and are marked in figures over rounds."""

import json
from pathlib import Path
from typing import Any

import pytest

from fedsim.report import read_run
from fedsim.report.drawing import Plot, over_rounds
from fedsim.report.drawing import blank as empty
from fedsim.report.figures import curves
from fedsim.report.phases import Phase, mark, marked, phases, sentence
from fedsim.report.sections import curves as section

Line = dict[str, Any]


def make(path: Path, lines: list[Line], actions: tuple[str, ...] = ()) -> Path:
    """A run that measured this in its rounds, which are numbered from 1; its clients know these actions."""
    path.mkdir(parents=True, exist_ok=True)
    tables = "".join(f"[clients.{action}]\nlr = 0.1\n" for action in actions)
    (path / "experiment.toml").write_text(f"rounds = {len(lines)}\n{tables}")
    numbered = [{"round": number, "seconds": 0.1, **line} for number, line in enumerate(lines, start=1)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in numbered))
    return path


def loss(action: str, **others: float | None) -> Line:
    return {f"{action}/loss": 0.5, "test/accuracy": 0.75, **others}


def found(path: Path, lines: list[Line], actions: tuple[str, ...] = ()) -> list[Phase]:
    return phases(read_run(make(path, lines, actions)))


def figure(path: Path, name: str) -> Plot:
    plots, _ = curves(read_run(path))
    (plot,) = (plot for plot in plots if name in plot.name)
    return plot


def between(plot: Plot) -> list[float]:
    """Where the lines of a figure stand that are no curves: they lie at one round."""
    (axes,) = plot.figure.axes
    spans = [[float(x) for x in line.get_xdata()] for line in axes.lines]
    return [xs[0] for xs in spans if len(xs) == 2 and xs[0] == xs[1]]


def names(plot: Plot) -> list[str]:
    (axes,) = plot.figure.axes
    return [text.get_text() for text in axes.texts]


def test_a_phase_is_a_span_of_rounds_with_one_action(tmp_path):
    lines = [loss("train")] * 3 + [loss("forget")] + [loss("repair")] * 2 + [loss("train")]
    assert found(tmp_path, lines) == [
        *(Phase("train", None, 1, 3), Phase("forget", None, 4, 4), Phase("repair", None, 5, 6)),
        Phase("train", None, 7, 7),
    ]


def test_evaluation_and_what_has_no_action_before_it_make_no_phase(tmp_path):
    quiet = {"test/loss": 1, "clients/accuracy/min": 0, "evaluate/bytes_up": 8, "duality_gap": 2, "bytes_up": 3}
    assert found(tmp_path / "nothing", [quiet] * 3) == []
    assert found(tmp_path / "empty", []) == []
    assert found(tmp_path / "train", [quiet | loss("train"), quiet]) == [Phase("train", None, 1, 2)]


def test_a_round_that_measured_nothing_belongs_to_the_phase_before_it(tmp_path):
    nobody: Line = {"failed": 3}
    lines = [nobody, loss("train"), nobody, loss("train"), nobody, loss("forget"), nobody]
    assert found(tmp_path, lines) == [Phase("train", None, 2, 5), Phase("forget", None, 6, 7)]


def test_what_was_measured_and_not_finite_was_measured(tmp_path):
    assert found(tmp_path, [loss("train"), {"forget/loss": None}]) == [
        *(Phase("train", None, 1, 1), Phase("forget", None, 2, 2))
    ]


def test_another_request_begins_a_phase(tmp_path):
    lines = [loss("train"), loss("forget", request=1), loss("forget", request=1), loss("forget", request=2)]
    lines += [loss("repair", request=2), loss("train")]
    assert found(tmp_path, lines) == [
        *(Phase("train", None, 1, 1), Phase("forget", 1, 2, 3), Phase("forget", 2, 4, 4)),
        *(Phase("repair", 2, 5, 5), Phase("train", None, 6, 6)),
    ]


def test_a_request_that_is_not_told_again_is_still_the_same(tmp_path):
    lines = [loss("forget", request=7), loss("forget"), {}, loss("forget", request=None), loss("forget", request=7)]
    assert found(tmp_path, lines) == [Phase("forget", 7, 1, 5)]


def test_a_request_of_a_round_without_an_action_counts_from_the_next_one_on(tmp_path):
    lines = [loss("forget", request=1), {"request": 2}, loss("forget", request=2)]
    assert found(tmp_path, lines) == [Phase("forget", 1, 1, 2), Phase("forget", 2, 3, 3)]


def test_only_what_the_clients_know_is_an_action_where_the_experiment_says_so(tmp_path):
    lines = [{"dual/race": 0.1, **loss("train")}, {"dual/race": 0.1}, {"dual/race": 0.2, **loss("calibrate")}]
    expected = [Phase("train", None, 1, 2), Phase("calibrate", None, 3, 3)]
    assert found(tmp_path / "said", lines, ("train", "calibrate", "evaluate")) == expected
    lines[1] |= loss("train")  # of several, the rarer one: what is measured in every round tells none from another
    assert found(tmp_path / "unsaid", lines) == expected


@pytest.mark.parametrize(("number", "drawn"), [(0, 0), (1, 0), (2, 2), (12, 12), (13, 0)])
def test_phases_are_marked_where_there_are_several_and_not_too_many(tmp_path, number, drawn):
    lines = [loss(("train", "forget")[place % 2]) for place in range(number)] or [{"test/accuracy": 0.75}]
    record = read_run(make(tmp_path, lines))
    assert len(phases(record)) == number and len(marked(record)) == drawn
    plot = figure(tmp_path, "test-accuracy")
    assert between(plot) == [place + 0.5 for place in range(1, drawn)]
    assert bool(names(plot)) == bool(drawn)
    part = section(record)
    assert part is not None and ("Phases: " in part.note) == bool(drawn)


def test_the_lines_stand_between_two_phases_and_each_has_its_name(tmp_path):
    make(tmp_path, [loss("train")] * 20 + [loss("forget", request=1)] * 15 + [loss("repair", request=1)] * 15)
    plot = figure(tmp_path, "test-accuracy")
    assert between(plot) == [20.5, 35.5] and names(plot) == ["train", "forget", "repair"]
    (plot,) = (plot for plot in curves(read_run(tmp_path))[0] if plot.title.startswith("repair/loss"))
    assert not between(plot) and not names(plot)  # it lies in one phase


def test_the_number_of_a_request_is_told_where_there_are_several(tmp_path):
    lines = [loss("train")] * 20 + [loss("forget", request=1)] * 20 + [loss("forget", request=2)] * 20
    make(tmp_path, lines)
    assert names(figure(tmp_path, "test-accuracy")) == ["train", "forget 1", "forget 2"]
    assert sentence(marked(read_run(tmp_path))) == (
        "Phases: train, rounds 1 to 20; forget 1, rounds 21 to 40; forget 2, rounds 41 to 60."
    )
    assert sentence([Phase("train", None, 1, 1), Phase("forget", 3, 2, 2000)]) == (
        "Phases: train, round 1; forget, rounds 2 to 2,000."
    )
    assert sentence([]) == ""


@pytest.mark.parametrize("lengths", [(30, 3, 2), (300, 3, 2, 5, 10), (1, 1, 200), (200, 1, 1), (5,) * 12, (50, 1) * 6])
def test_names_do_not_lie_on_one_another(lengths):
    actions = ("train", "forget", "repair", "a-very-long-action-indeed")
    some, end = [], 0
    for place, length in enumerate(lengths):
        some.append(Phase(actions[place % len(actions)], float(place), end + 1, end + length))
        end += length
    drawing, axes = empty("A title")
    over_rounds(axes, 1, end)
    mark(axes, some, 1, end)
    drawing.draw_without_rendering()
    boxes = [text.get_window_extent() for text in axes.texts]
    assert boxes and all(not one.overlaps(other) for n, one in enumerate(boxes) for other in boxes[:n])
    title = axes._left_title.get_window_extent()  # type: ignore[attr-defined] # matplotlib gives it by no other name
    assert all(not box.overlaps(title) and box.x1 <= drawing.bbox.x1 for box in boxes)
