"""Accuracy against another measure: where each experiment lies, what is joined, what is told."""

import json

import pytest

from fedsim.report import Bound, compare
from fedsim.report.tradeoff import trade_off

GAP = "clients/demographic_parity_gap"


def make(path, accuracy, gap, seed=1, tolerance=0.1, name="fair", against=()):
    path.mkdir(parents=True)
    named = f"against = {json.dumps(list(against))}\n" if against else ""
    (path / "experiment.toml").write_text(
        f'name = "{name}"\nseed = {seed}\nrounds = 1\n{named}[strategy]\ntolerance = {tolerance}\n'
    )
    line = {"round": 1, "seconds": 1.0, "clients/accuracy": accuracy} | ({} if gap is None else {GAP: gap})
    (path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    return path


def drawn(comparison, bound=None):
    return trade_off(comparison.rows, "clients/accuracy", GAP, bound).figure.axes[0]


def test_a_point_is_the_mean_over_seeds_with_its_deviations(tmp_path):
    found = compare([make(tmp_path / str(s), 0.8 + 0.1 * s, 0.2 + 0.02 * s, seed=s) for s in range(2)], against=[GAP])
    (bars,) = drawn(found).containers
    line, _, (across, along) = bars
    assert line.get_xydata().tolist() == [[pytest.approx(0.21), pytest.approx(0.85)]]
    spread = 0.5**0.5 * 0.02, 0.5**0.5 * 0.1
    assert across.get_segments()[0][:, 0].tolist() == pytest.approx([0.21 - spread[0], 0.21 + spread[0]])
    assert along.get_segments()[0][:, 1].tolist() == pytest.approx([0.85 - spread[1], 0.85 + spread[1]])


def test_experiments_of_one_name_are_joined_and_told_apart_by_what_differs(tmp_path):
    runs = [make(tmp_path / str(t), 0.7 + t, t, tolerance=t) for t in (0.05, 0.1)]
    axes = drawn(compare([*runs, make(tmp_path / "plain", 0.9, 0.3, name="plain")], against=[GAP]))
    assert [len(bars[0].get_xdata()) for bars in axes.containers] == [2, 1]
    assert [text.get_text() for text in axes.texts] == ["0.05", "0.1", ""]


def test_the_measures_that_an_experiment_names_are_drawn_and_have_a_column(tmp_path):
    found = compare([make(tmp_path / "a", 0.8, 0.2, against=[GAP])], tmp_path / "out")
    assert found.against == (GAP,) and GAP in found.columns
    assert (tmp_path / "out" / "against-demographic-parity-gap.svg").is_file()
    assert (tmp_path / "out" / "against-demographic-parity-gap.png").is_file()


def test_a_measure_that_no_run_has_is_not_drawn(tmp_path):
    found = compare([make(tmp_path / "a", 0.8, None)], tmp_path / "out", against=[GAP])
    assert found.against == (GAP,)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "comparison.md",
        "comparison.png",
        "comparison.svg",
    ]


def test_a_bound_is_drawn_with_its_name(tmp_path):
    axes = drawn(compare([make(tmp_path / "a", 0.8, 0.2)], against=[GAP]), Bound("best", [0, 1], [0.5, 0.9]))
    assert axes.lines[0].get_xydata().tolist() == [[0, 0.5], [1, 0.9]]
    assert "best" in axes.get_legend_handles_labels()[1]
