"""The recall of each class over rounds is read as it was counted, and drawn."""

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedsim.evaluation import Evaluation
from fedsim.report import read_run, write_report
from fedsim.report.classes import classes, read_recalls
from fedsim.report.drawing import Plot
from fedsim.runs import Run

FIRST, SECOND, THIRD = (  # rows the truth
    torch.tensor([[3, 1, 0], [0, 5, 5], [2, 0, 0]]),
    torch.tensor([[4, 0, 0], [4, 1, 5], [1, 0, 1]]),
    torch.tensor([[2, 2, 0], [0, 9, 1], [0, 0, 2]]),
)
RECALLS = [[3 / 4, 5 / 10, 0 / 2], [4 / 4, 1 / 10, 1 / 2], [2 / 4, 9 / 10, 2 / 2]]


def make(
    root: Path, rounds: dict[int, Tensor | None], parts: tuple[str, ...] = ("test",), names: tuple[str, ...] = ()
) -> Path:
    """A run that was evaluated in these rounds."""
    run = Run.create(root, "told apart", 1, "rounds = 9\n", {"num_clients": 1})
    for number, table in rounds.items():
        found = {part: Evaluation({"examples": 16.0}, {}, table, {}) for part in parts}
        run.save_evaluation(number, found, {"y": names})
        run.record_counts(number, found)
        run.record({"round": number, "test/accuracy": 0.5})
    return run.path


def moving(distances: list[float]) -> dict[int, Tensor | None]:
    """Confusions of two rounds, between which the recall of each class falls so far, from 1."""
    wrong = torch.tensor(distances, dtype=torch.float64)
    return {1: torch.eye(len(wrong)), 2: torch.diag(1 - wrong) + torch.diag(wrong).roll(1, 1)}


def drawn(path: Path) -> dict[str, Plot]:
    """The figures of the section that are over rounds, by their names."""
    found = classes(read_run(path))
    assert found is not None and found.title == "Classes"
    return {plot.name: plot for plot in found.plots if not plot.name.startswith("confusion")}


def series(plot: Plot) -> dict[str, list[tuple[float, float]]]:
    """The curves of a figure by their labels."""
    (axes,) = plot.figure.axes
    pairs = {str(line.get_label()): (line.get_xdata(), line.get_ydata()) for line in axes.lines}
    return {label: list(zip(map(float, x), map(float, y), strict=True)) for label, (x, y) in pairs.items()}


def test_the_share_of_each_class_that_is_right_is_read_for_each_part_and_round(tmp_path):
    path = make(tmp_path, {2: FIRST, 4: None, 6: SECOND, 9: THIRD}, ("clients", "test"))
    found = read_recalls(path / "classes.jsonl")
    assert list(found) == ["test", "clients"]
    for recalls in found.values():
        assert recalls.rounds.tolist() == [2, 6, 9]
        np.testing.assert_allclose(recalls.values, RECALLS)


def test_the_recall_of_each_class_is_drawn_over_rounds(tmp_path):
    path = make(tmp_path, {2: FIRST, 6: SECOND, 9: THIRD}, ("test", "clients"), names=("cat", "dog", "_x"))
    plots = drawn(path)
    assert list(plots) == ["classes-test", "classes-clients"]
    for plot in plots.values():
        curves = series(plot)
        assert list(curves) == ["cat", "dog", " _x"]
        for place, curve in enumerate(curves.values()):
            assert [number for number, _ in curve] == [2, 6, 9]
            assert [value for _, value in curve] == pytest.approx([recalls[place] for recalls in RECALLS])
    index = write_report(path)
    assert (index.parent / "classes-test.svg").is_file() and (index.parent / "classes-clients.png").is_file()


def test_a_single_evaluation_has_no_curve(tmp_path):
    assert drawn(make(tmp_path / "one", {3: FIRST})) == {}
    assert list(drawn(make(tmp_path / "two", {3: FIRST, 4: FIRST}))) == ["classes-test"]


def test_a_run_without_the_file_is_reported_as_before(tmp_path):
    path = make(tmp_path, {3: FIRST, 4: SECOND})
    (path / "classes.jsonl").unlink()
    assert read_recalls(path / "classes.jsonl") == {} and drawn(path) == {}
    found = classes(read_run(path))
    assert found is not None and [plot.name for plot in found.plots] == ["confusion-test"]
    assert write_report(path).is_file()


def test_the_file_alone_is_enough_and_classes_are_numbered(tmp_path):
    path = make(tmp_path, {3: FIRST, 4: SECOND}, names=("a", "b", "c"))
    (path / "evaluation.json").unlink()
    found = classes(read_run(path))
    assert found is not None and [plot.name for plot in found.plots] == ["classes-test"] and not found.tables
    assert list(series(found.plots[0])) == ["0", "1", "2"]
    assert classes(read_run(make(tmp_path / "nothing", {3: None}))) is None


def test_counts_of_a_randomised_classifier_may_be_broken(tmp_path):
    table = torch.tensor([[1.25, 0.75], [0.5, 2.0]], dtype=torch.float64)
    found = read_recalls(make(tmp_path, {1: table, 2: table.flip(0)}) / "classes.jsonl")["test"]
    np.testing.assert_allclose(found.values, [[1.25 / 2, 2 / 2.5], [0.5 / 2.5, 0.75 / 2]])


def test_a_class_without_examples_has_no_curve_and_the_others_keep_their_names(tmp_path):
    some = torch.tensor([[3, 1, 0], [0, 0, 0], [2, 0, 0]])
    curves = series(drawn(make(tmp_path / "some", {1: some, 2: some}))["classes-test"])
    assert list(curves) == ["0", "2"] and curves["2"] == [(1, 0), (2, 0)]
    lost = torch.tensor([[float("nan"), 1.0], [0.0, 2.0]])
    values = read_recalls(make(tmp_path / "lost", {1: lost, 2: lost}) / "classes.jsonl")["test"].values
    np.testing.assert_array_equal(values, [[np.nan, 1], [np.nan, 1]])
    nobody = torch.zeros(2, 2, dtype=torch.int64)
    path = make(tmp_path / "nobody", {1: nobody, 2: nobody})
    assert drawn(path) == {} and write_report(path).is_file()


def test_of_many_classes_the_twelve_are_drawn_that_moved_the_most(tmp_path):
    distances = [0.1, 0.9, 0.0, 0.8, 0.5, 0.6, 0.05, 0.7, 0.2, 0.3, 0.4, 0.25, 0.35, 0.15, 0.45]
    path = make(tmp_path, moving(distances))
    least = {2, 6, 0}  # 0, 0.05 and 0.1
    plot = drawn(path)["classes-test"]
    assert list(series(plot)) == [str(place) for place in range(15) if place not in least]
    found = classes(read_run(path))
    assert found is not None and "Of 15 classes those 12 are drawn whose least and greatest recall differ" in found.note
    looks = {(line.get_color(), line.get_linestyle()) for line in plot.figure.axes[0].lines}
    assert len(looks) == 12
    few = classes(read_run(make(tmp_path / "few", moving(distances[:12]))))
    assert few is not None and "are drawn" not in few.note and len(series(few.plots[-1])) == 12


def test_phases_are_marked(tmp_path):
    path = make(tmp_path, {1: FIRST, 20: SECOND, 40: THIRD})
    with (path / "metrics.jsonl").open("a") as file:
        for number in range(1, 41):
            file.write(json.dumps({"round": number, f"{'train' if number <= 25 else 'forget'}/loss": 0.5}) + "\n")
    (axes,) = drawn(path)["classes-test"].figure.axes
    assert [text.get_text() for text in axes.texts] == ["train", "forget"]
    assert [float(x) for x in axes.lines[-1].get_xdata()] == [25.5, 25.5]


def test_a_round_that_occurs_twice_counts_as_it_was_written_later(tmp_path):
    path = make(tmp_path, {1: FIRST})
    with (path / "classes.jsonl").open("a") as file:
        file.write('{"round": 1, "test": {"right": [1, 2], "examples": [4, 4]}}\n{"round": 5, "test": {"right": [1')
    found = read_recalls(path / "classes.jsonl")["test"]
    assert found.rounds.tolist() == [1] and found.values.tolist() == [[0.25, 0.5]]


def test_names_are_no_markup(tmp_path):
    index = write_report(make(tmp_path, {1: FIRST, 2: SECOND}, names=("<b>cat</b>", "$x$ & y", "c")))
    assert "<b>" not in index.read_text(encoding="utf-8")
    ElementTree.parse(index.parent / "classes-test.svg")


def test_a_damaged_line_is_named(tmp_path):
    path = make(tmp_path, {1: FIRST})
    with (path / "classes.jsonl").open("a") as file:
        file.write('{"round": 3, "test": {"right"\n{"round": 4}\n')
    with pytest.raises(ValueError, match=r"classes.jsonl, line 2 is damaged"):
        classes(read_run(path))


def rows(right: object, examples: object) -> dict[str, object]:
    return {"right": right, "examples": examples}


@pytest.mark.parametrize(
    ("told", "why"),
    [
        *((3, "must have right and examples, got 3"), (None, "must have right and examples, got None")),
        *(([1, 2], "must have right and examples"), ({"right": [1]}, "must have right and examples")),
        *((rows([1], [1, 2]), "must be two rows of one length, got 1 right and 2 examples"),),
        *((rows(one, [1, 2, 3]), "must be two rows of numbers") for one in (1, [], None, "abc", ["a"], [1, None, 2])),
        *((rows([1, 2, 3], one), "must be two rows of numbers") for one in ([[1], [2]], [[1], [2, 3]], [1, -1, 2])),
        *((rows([True, False], [1, 2]), "must be two rows of numbers"), (rows([10**30], [1]), "must be two rows")),
    ],
)
def test_what_is_no_two_rows_of_counts_is_refused_with_file_part_and_round(tmp_path, told: Any, why: str):
    path = make(tmp_path, {1: FIRST})
    with (path / "classes.jsonl").open("a") as file:
        file.write(json.dumps({"round": 3, "test": told}) + "\n")
    with pytest.raises(ValueError, match=rf"classes.jsonl is damaged: test of round 3 {why}"):
        classes(read_run(path))


def test_evaluations_of_other_classes_are_refused(tmp_path):
    path = make(tmp_path, {1: FIRST, 3: torch.eye(2, dtype=torch.int64)})
    with pytest.raises(ValueError, match=r"classes.jsonl is damaged: test must have one number of classes, got 3, 2"):
        classes(read_run(path))
