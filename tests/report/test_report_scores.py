"""The scores of the groups, before and after, are drawn as they were counted, with their barycenter."""

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
from fedsim.report.drawing import Plot
from fedsim.report.measures import direction
from fedsim.report.palette import SERIES
from fedsim.report.scores import read_scores, scores
from fedsim.runs import Run
from fedsim.transport import barycenter_quantiles, levels

NAMES = {"y": ("no", "yes"), "a": ("left", "right")}
BINS = 21


def drawn(groups: int = 2, width: int = 1, seed: int = 0) -> Tensor:
    """Histograms (G, S, bins) of 200 and more scores, which are higher from group to group."""
    random = np.random.default_rng(seed)
    counts = np.zeros((groups, width, BINS), dtype=np.int64)
    for group in range(groups):
        for column in range(width):
            found = random.beta(2 + group, 5, 200 + 100 * group) * (BINS - 1)
            np.add.at(counts[group, column], found.round().astype(int), 1)
    return torch.from_numpy(counts)


def evaluated(counts: Tensor | None, classes: int = 2) -> Evaluation:
    groups = 2 if counts is None else len(counts)
    confusion = torch.ones(1, groups, classes, classes, dtype=torch.int64)
    clients = {"client": np.array([0.0]), "examples": np.array([4.0])}
    return Evaluation({"examples": 4.0}, clients, confusion.sum((0, 1)), {}, groups=confusion, scores=counts)


def make(
    root: Path,
    rounds: dict[int, Tensor | None],
    parts: tuple[str, ...] = ("test",),
    names: dict[str, tuple[str, ...]] = NAMES,
    classes: int = 2,
) -> Path:
    """A run that was evaluated in these rounds."""
    run = Run.create(root, "scored", 1, 'name = "scored"\nrounds = 9\n', {"num_clients": 1})
    for number, counts in rounds.items():
        found = {part: evaluated(counts, classes) for part in parts}
        run.save_evaluation(number, found, names)
        run.record_counts(number, found)
        run.record({"round": number, "test/score_distance": 1 / number, "test/accuracy": 0.5})
    return run.path


def plots(path: Path) -> dict[str, Plot]:
    """The figures of the section, by their names."""
    found = scores(read_run(path))
    assert found is not None and found.title == "Scores"
    assert len({plot.name for plot in found.plots}) == len(found.plots)
    return {plot.name: plot for plot in found.plots}


def curves(plot: Plot) -> dict[str, tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
    """The curves of a figure by their labels: x and y."""
    (axes,) = plot.figure.axes
    return {str(line.get_label()): (np.array(line.get_xdata()), np.array(line.get_ydata())) for line in axes.lines}


def headings(index: Path) -> list[str | None]:
    page = ElementTree.fromstring(index.read_text(encoding="utf-8").removeprefix("<!DOCTYPE html>\n"))
    return [heading.text for heading in page.iter("h2")]


def test_the_section_is_there_only_where_scores_were_counted(tmp_path):
    without, with_ = make(tmp_path / "without", {1: None, 4: None}), make(tmp_path / "with", {1: drawn()})
    assert not (without / "scores.jsonl").exists() and read_scores(without / "scores.jsonl") == {}
    assert scores(read_run(without)) is None
    assert "Scores" not in headings(write_report(without))
    index = write_report(with_)
    assert "Scores" in headings(index)
    assert {path.name for path in index.parent.glob("scores-*")} == {"scores-test-1-1.svg", "scores-test-1-1.png"}
    assert "## Scores" in (index.parent / "summary.md").read_text(encoding="utf-8")


def test_before_and_after_are_the_first_and_the_last_evaluation(tmp_path):
    first, between, last = (drawn(seed=seed) for seed in range(3))
    path = make(tmp_path, {2: first, 4: between, 6: None, 8: last})
    found = read_scores(path / "scores.jsonl")
    assert list(found) == ["test"] and found["test"].rounds == (2, 8)
    assert [counts.tolist() for counts in found["test"].counts] == [first.tolist(), last.tolist()]
    assert list(plots(path)) == ["scores-test-2-1", "scores-test-8-1"]
    for plot, counts in zip(plots(path).values(), (first, last), strict=True):
        for name, own in zip(NAMES["a"], counts[:, 0].numpy(), strict=True):
            x, y = curves(plot)[name]
            assert x.tolist() == pytest.approx(np.linspace(0, 1, BINS).tolist())
            assert y.tolist() == pytest.approx((own.cumsum() / own.sum()).tolist())


def test_a_single_evaluation_is_drawn_once(tmp_path):
    path = make(tmp_path, {5: drawn()})
    assert read_scores(path / "scores.jsonl")["test"].rounds == (5,)
    assert list(plots(path)) == ["scores-test-5-1"]


def test_the_test_set_comes_before_the_clients_parts(tmp_path):
    path = make(tmp_path, {1: drawn(), 3: drawn(seed=1)}, ("clients", "test"))
    assert [plot.title for plot in plots(path).values()] == [
        *("Distribution of P(yes), test set, round 1", "Distribution of P(yes), test set, round 3"),
        *(
            "Distribution of P(yes), clients’ test parts, round 1",
            "Distribution of P(yes), clients’ test parts, round 3",
        ),
    ]


def test_a_round_that_occurs_twice_counts_as_it_was_written_later(tmp_path):
    path = make(tmp_path, {1: drawn()})
    with (path / "scores.jsonl").open("a") as file:
        file.write(json.dumps({"round": 1, "test": drawn(seed=5).tolist()}) + "\n")
    assert read_scores(path / "scores.jsonl")["test"].counts[0].tolist() == drawn(seed=5).tolist()


@pytest.mark.parametrize("groups", [2, 3])
def test_the_barycenter_is_drawn_between_the_groups(tmp_path, groups):
    counts = drawn(groups)
    names = {"y": NAMES["y"], "a": ("left", "right", "middle")[:groups]}
    (plot,) = plots(make(tmp_path, {1: counts}, names=names)).values()
    found = curves(plot)
    assert list(found) == [*names["a"], "barycenter"]
    x, y = found.pop("barycenter")
    functions = []  # the least score at which each group's curve has come to this height
    for points, heights in found.values():
        functions.append([points[heights >= height - 1e-6].min() for height in y])
    weights = counts[:, 0].sum(1).numpy() / counts.sum().item()
    assert x.tolist() == pytest.approx((weights @ np.array(functions)).tolist())
    assert (x >= np.min(functions, axis=0) - 1e-12).all() and (x <= np.max(functions, axis=0) + 1e-12).all()
    assert np.ptp(functions, axis=0).max() > 0.05 and (np.diff(x) >= -1e-12).all()


def test_of_more_than_two_classes_each_has_a_figure_and_of_many_the_first_four(tmp_path):
    names = {"y": ("a", "b", "c"), "a": NAMES["a"]}
    three = plots(make(tmp_path / "three", {1: drawn(width=3)}, names=names, classes=3))
    assert list(three) == ["scores-test-1-0", "scores-test-1-1", "scores-test-1-2"]
    assert [plot.title.split(",")[0] for plot in three.values()] == [f"Distribution of P({name})" for name in "abc"]
    run = make(tmp_path / "six", {1: drawn(width=6), 2: drawn(width=6)}, names={}, classes=6)
    six = plots(run)
    assert scores(read_run(run)).note.endswith("The scores of the first 4 of 6 classes are drawn.")
    assert list(six) == [f"scores-test-{number}-{label}" for number in (1, 2) for label in range(4)]
    assert [plot.title.split(",")[0] for plot in six.values()] == 2 * [f"Distribution of P({n})" for n in range(4)]


def test_of_many_groups_as_many_are_drawn_as_there_are_colours_and_all_are_in_the_barycenter(tmp_path):
    counts = drawn(groups=11)
    run = make(tmp_path, {1: counts}, names={})
    (plot,) = plots(run).values()
    found = curves(plot)
    assert scores(read_run(run)).note.endswith("The first 8 of 11 groups are drawn; the barycenter is that of all.")
    assert list(found) == [*map(str, range(len(SERIES))), "barycenter"]
    expected = barycenter_quantiles(counts[:, 0], levels(len(found["barycenter"][0])))
    assert found["barycenter"][0].tolist() == pytest.approx(expected.tolist())
    assert len({line.get_color() for line in plot.figure.axes[0].lines}) == len(SERIES) + 1


def test_a_group_without_examples_has_no_curve_and_the_others_keep_their_names(tmp_path):
    counts = drawn(groups=3)
    counts[1] = 0
    names = {"y": NAMES["y"], "a": ("left", "nobody", "right")}
    (plot,) = plots(make(tmp_path / "two", {1: counts}, names=names)).values()
    assert list(curves(plot)) == ["left", "right", "barycenter"]
    right = counts[2, 0].numpy()
    assert curves(plot)["right"][1].tolist() == pytest.approx((right.cumsum() / right.sum()).tolist())
    counts[2] = 0
    (plot,) = plots(make(tmp_path / "one", {1: counts}, names=names)).values()
    assert list(curves(plot)) == ["left"]
    assert write_report(make(tmp_path / "nobody", {1: torch.zeros_like(counts)}, names=names)).is_file()


def test_without_groups_there_is_one_curve_and_no_barycenter(tmp_path):
    run = Run.create(tmp_path, "alone", 1, "rounds = 1\n", {})
    found = {"test": Evaluation({"examples": 4.0}, {}, torch.ones(2, 2), {}, scores=drawn(groups=1))}
    run.save_evaluation(1, found, {})
    run.record_counts(1, found)
    run.record({"round": 1, "test/accuracy": 0.5})
    (plot,) = plots(run.path).values()
    assert list(curves(plot)) == ["group 0"] and not plot.figure.legends
    (run.path / "evaluation.json").unlink()  # scores need nothing of it
    assert list(plots(run.path)) == ["scores-test-1-1"]


def test_names_are_no_markup_and_none_is_hidden(tmp_path):
    names = {"y": ("<i>no</i>", "<b>yes</b> $x$"), "a": ("<b>left</b> & $y$", "_right")}
    path = make(tmp_path, {1: drawn()}, names=names)
    (plot,) = plots(path).values()
    assert list(curves(plot)) == ["<b>left</b> & $y$", " _right", "barycenter"]
    assert [text.get_text() for text in plot.figure.legends[0].get_texts()] == list(curves(plot))
    index = write_report(path)
    assert "Scores" in headings(index) and "<b>" not in index.read_text(encoding="utf-8")
    ElementTree.parse(index.parent / "scores-test-1-1.svg")


def test_a_run_that_is_still_going_on_has_the_scores_that_it_wrote_so_far(tmp_path):
    path = make(tmp_path, {1: drawn(), 3: drawn(seed=1)})
    with (path / "scores.jsonl").open("a") as file:
        file.write('{"round": 5, "test": [[[1, 2')
    assert read_scores(path / "scores.jsonl")["test"].rounds == (1, 3)
    assert "Scores" in headings(write_report(path))


def test_a_damaged_line_is_named(tmp_path):
    path = make(tmp_path, {1: drawn()})
    with (path / "scores.jsonl").open("a") as file:
        file.write('{"round": 3, "test": [[[1, 2\n{"round": 4}\n')
    with pytest.raises(ValueError, match=r"scores.jsonl, line 2 is damaged"):
        scores(read_run(path))


@pytest.mark.parametrize(
    "told",
    [
        *([[1, 2]], [[[[1, 2]]]], [[[1]], [[2]]], [[[1, -2]]], 3, "scores", None, {}, [], [[[]]]),
        *([[[1, 2]], [[1, 2, 3]]], [[[1, None]]], [[[1.5, 2]]], [[["1", "2"]]], [[[1, 10**30]]], [[[True, False]]]),
        *([[[1, float("nan")]]], [[[1, float("inf")]]]),
    ],
)
def test_what_is_no_table_of_counts_is_refused_with_file_part_and_round(tmp_path, told):
    path = make(tmp_path, {1: drawn()})
    with (path / "scores.jsonl").open("a") as file:
        file.write(json.dumps({"round": 3, "test": told}) + "\n")
    with pytest.raises(ValueError, match=r"scores.jsonl is damaged: test of round 3 (must be|holds no)"):
        scores(read_run(path))


def test_evaluations_that_do_not_fit_each_other_are_refused(tmp_path):
    path = make(tmp_path, {1: drawn(), 3: drawn(groups=3)})
    with pytest.raises(ValueError, match=r"scores.jsonl is damaged: test has shapes \(2, 1, 21\), \(3, 1, 21\)"):
        scores(read_run(path))


def test_a_distance_is_the_better_the_less_it_is():
    assert direction("test/score_distance") == direction("test/loss") != direction("test/accuracy")
