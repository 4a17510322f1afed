import json
import math
from pathlib import Path

import numpy as np
import pytest

from fedsim.report import compare
from fedsim.report.comparison import as_markdown, as_table, draw


def make(
    path: Path,
    accuracies: list[float | None],
    *,
    seed: int = 1,
    lr: float = 0.1,
    name: str = "digits",
    rounds: int | None = None,
    started: str = "",
    seconds: float = 2.0,
    extra: str = "",
) -> Path:
    path.mkdir(parents=True)
    (path / "experiment.toml").write_text(
        f'name = "{name}"\nseed = {seed}\nrounds = {rounds or len(accuracies)}\n{extra}\n[clients.train]\nlr = {lr}\n'
    )
    (path / "environment.json").write_text(json.dumps({"started": started}))
    lines = [
        {"round": n, "seconds": seconds, "bytes_down": 100, "bytes_up": 50, "test/accuracy": value}
        for n, value in enumerate(accuracies, start=1)
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_runs_that_differ_in_their_seed_only_are_one_row_with_mean_and_sample_deviation(tmp_path):
    final = [0.5, 0.7, 0.9]
    runs = [make(tmp_path / str(seed), [0.95, value], seed=seed) for seed, value in enumerate(final)]
    (row,) = compare(runs).rows
    mean = (0.5 + 0.7 + 0.9) / 3
    deviation = math.sqrt(sum((value - mean) ** 2 for value in final) / 2)  # n - 1
    assert row.values["test/accuracy"] == pytest.approx((mean, deviation, 3))
    assert row.values["best"] == pytest.approx((0.95, 0, 3))
    assert row.values["seconds"].mean == 2 * 2.0
    assert row.values["bytes"].mean == 2 * (100 + 50)
    assert row.n == 3 and row.seeds == (0, 1, 2) and row.settings == {} and row.unfinished == 0


def test_another_setting_is_another_row_and_only_what_differs_is_a_column(tmp_path):
    found = compare(
        [
            make(tmp_path / "a", [0.5], seed=1, lr=0.1),
            make(tmp_path / "b", [0.6], seed=1, lr=0.2),
            make(tmp_path / "c", [0.8], seed=2, lr=0.1),
        ]
    )
    assert found.settings == ("clients.train.lr",)
    assert [(row.settings, row.n) for row in found.rows] == [
        ({"clients.train.lr": "0.1"}, 2),
        ({"clients.train.lr": "0.2"}, 1),
    ]
    assert found.rows[0].values["test/accuracy"].mean == pytest.approx(0.65)
    assert math.isnan(found.rows[1].values["test/accuracy"].deviation)  # one run has no spread


def test_a_setting_that_one_experiment_lacks_is_a_difference(tmp_path):
    found = compare([make(tmp_path / "a", [0.5]), make(tmp_path / "b", [0.5], extra="min_replies = 3")])
    assert found.settings == ("min_replies",)
    assert [row.settings for row in found.rows] == [{}, {"min_replies": "3"}]
    assert [row[1] for row in as_table(found).rows] == ["–", "3"]


def test_a_plug_in_is_the_same_by_its_short_name_and_by_its_module(tmp_path):
    uses = ("scaffold", "strategies.scaffold:Scaffold", "strategies.fedavg:FedAvg")
    runs = [
        make(tmp_path / str(n), [0.5], seed=n, extra=f'[strategy]\nuse = "{use}"')
        for n, use in enumerate(uses, start=1)
    ]
    found = compare(runs)
    assert [(row.settings, row.n) for row in found.rows] == [
        ({"strategy.use": "scaffold"}, 2),
        ({"strategy.use": "fedavg"}, 1),
    ]


def test_a_plug_in_s_file_goes_by_its_name(tmp_path):
    uses = ("/far/away/mine.py:Median", "fedavg")
    found = compare([make(tmp_path / use[1:4], [0.5], extra=f'[strategy]\nuse = "{use}"') for use in uses])
    assert [row[1] for row in as_table(found).rows] == ["mine.py:Median", "fedavg"]
    assert [curve.name for curve in found.curves] == ["digits, use = mine.py:Median", "digits, use = fedavg"]


def test_the_same_seed_again_counts_once(tmp_path):
    early = make(tmp_path / "late-name", [0.1], started="2025-01-01")
    late = make(tmp_path / "early-name", [0.9], started="2025-01-02")
    found = compare([late, early])
    assert found.repeated == (early,)
    assert found.rows[0].runs == (late,) and found.rows[0].values["test/accuracy"].mean == 0.9


def test_a_run_that_diverged_is_not_averaged_away(tmp_path):
    found = compare([make(tmp_path / "a", [0.5, 0.6], seed=1), make(tmp_path / "b", [0.5, None], seed=2)])
    assert math.isnan(found.rows[0].values["test/accuracy"].mean)
    assert found.rows[0].values["best"].mean == pytest.approx(0.55)
    assert "not finite" in as_markdown(found)


def test_the_curve_is_that_of_the_rounds_that_all_seeds_have(tmp_path):
    found = compare([make(tmp_path / "a", [0.2, 0.4, 0.9], seed=1), make(tmp_path / "b", [0.4, 0.8], seed=2, rounds=3)])
    (curve,) = found.curves
    assert curve.rounds.tolist() == [1, 2]
    np.testing.assert_allclose(curve.mean, [0.3, 0.6])
    np.testing.assert_allclose(curve.deviation, [0.1 * math.sqrt(2), 0.2 * math.sqrt(2)])
    assert found.rows[0].unfinished == 1
    assert "1 run of 2 did not finish" in as_markdown(found)


def test_a_run_that_converged_before_its_last_round_did_finish(tmp_path):
    runs = [make(tmp_path / str(seed), [0.2, 0.4], seed=seed, rounds=9) for seed in (1, 2)]
    file = runs[1] / "metrics.jsonl"
    file.write_text(file.read_text().replace('"round": 2,', '"round": 2, "converged": 1,'))
    found = compare(runs)
    assert found.rows[0].unfinished == 1 and "1 run of 2 did not finish" in as_markdown(found)
    (row,) = compare(runs[1:]).rows
    assert row.unfinished == 0 and row.values["rounds"].mean == 2
    assert "did not finish" not in as_markdown(compare(runs[1:]))


def test_the_table_is_written_as_markdown_and_the_curves_as_a_plot(tmp_path):
    runs = [
        make(tmp_path / "runs" / f"{lr}-{seed}", [0.5, 0.7 + seed / 10], seed=seed, lr=lr)
        for lr in (1, 2)
        for seed in (0, 1)
    ]
    out = tmp_path / "out" / "deep"
    found = compare(runs, out)
    assert {path.name for path in out.iterdir()} == {"comparison.md", "comparison.svg", "comparison.png"}
    text = (out / "comparison.md").read_text()
    assert text == as_markdown(found)
    assert f"| digits | 1.0 | 0.750 ± {0.05 * math.sqrt(2):.3f} |".replace("1.0", "1") in text
    assert "n=2" in text
    assert [cell for cell in as_table(found).header] == [
        *("experiment", "clients.train.lr", "Test accuracy", "best", "rounds done", "seconds", "bytes", "seeds")
    ]
    assert compare([tmp_path / "runs"]).rows == found.rows  # a directory of runs


def test_runs_without_evaluation_are_compared_by_what_they_cost(tmp_path):
    runs = [make(tmp_path / str(lr), [], lr=lr, rounds=2) for lr in (1, 2)]
    found = compare(runs)
    assert found.columns == ("rounds", "seconds", "bytes") and found.curves == ()
    assert found.rows[0].values.keys() == {"rounds"}
    assert draw(found, tmp_path) == []


def test_nothing_to_compare_is_refused(tmp_path):
    with pytest.raises(ValueError, match="runs is empty"):
        compare([])
    with pytest.raises(FileNotFoundError, match="not the directory of a run"):
        compare([tmp_path])


def test_what_tells_experiments_of_one_name_apart_comes_first_and_files_go_by_their_name(tmp_path):
    found = compare(
        [
            make(tmp_path / "a", [0.5], lr=0.1),
            make(tmp_path / "b", [0.5], lr=0.2),
            make(tmp_path / "c", [0.5], lr=0.1, name="mine", extra='[strategy]\nuse = "/home/me/mine.py:Median"'),
        ]
    )
    assert found.settings == ("clients.train.lr", "strategy.use")
    assert [row[2] for row in as_table(found).rows] == ["–", "–", "mine.py:Median"]
