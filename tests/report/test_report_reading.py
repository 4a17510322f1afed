import json
import math
import tomllib
from pathlib import Path

import numpy as np
import pytest

from fedsim.report import read_run
from fedsim.report.formats import amount, count, duration, measure
from fedsim.report.reading import Failure, Incident, find_runs


@pytest.fixture
def run(tmp_path: Path) -> Path:
    path = tmp_path / "digits" / "20250101-000000-1"
    path.mkdir(parents=True)
    (path / "experiment.toml").write_text('name = "digits"\nseed = 1\nrounds = 3\n[strategy]\nuse = "fedavg"\n')
    return path


def write(path: Path, lines: list[dict[str, object]], tail: str = "") -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)


def test_metrics_are_arrays_over_rounds_with_nan_where_nothing_was_measured(run):
    write(
        run / "metrics.jsonl",
        [{"round": 1, "seconds": 0.5}, {"round": 2, "seconds": 0.25, "test/accuracy": 0.75}, {"round": 3}],
    )
    record = read_run(run)
    np.testing.assert_array_equal(record.rounds, [1, 2, 3])
    np.testing.assert_array_equal(record.metrics["seconds"], [0.5, 0.25, np.nan])
    rounds, values = record.series("test/accuracy")
    assert rounds.tolist() == [2] and values.tolist() == [0.75]
    assert record.name == "digits" and record.rounds_asked == 3
    assert record.series("never")[0].size == 0


def test_a_value_that_was_not_finite_counts_as_measured_a_missing_one_does_not(run):
    (run / "metrics.jsonl").write_text('{"round": 1, "a": null}\n{"round": 2, "a": NaN}\n{"round": 3}\n')
    rounds, values = read_run(run).series("a")
    assert rounds.tolist() == [1, 2]
    assert np.isnan(values).all()


def test_a_last_line_that_was_cut_off_is_left_out(run):
    whole = json.dumps({"round": 2, "a": 1.0})
    for end in range(1, len(whole)):
        write(run / "metrics.jsonl", [{"round": 1, "a": 0.5}], whole[:end])
        assert read_run(run).rounds.tolist() == [1]
    write(run / "metrics.jsonl", [{"round": 1, "a": 0.5}], whole)
    assert read_run(run).rounds.tolist() == [1, 2]


def test_a_damaged_line_in_the_middle_is_named(run):
    (run / "metrics.jsonl").write_text('{"round": 1}\n{"round": \n{"round": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2 is damaged"):
        read_run(run)
    (run / "metrics.jsonl").write_text('{"loss": 1}\n')
    with pytest.raises(ValueError, match="line 1 must be an object with a whole number as round"):
        read_run(run)


def test_of_a_round_that_occurs_twice_the_later_line_counts(run):
    write(run / "metrics.jsonl", [{"round": 1, "a": 1}, {"round": 2, "a": 2, "b": 5}, {"round": 2, "a": 3}])
    record = read_run(run)
    assert record.metrics["a"].tolist() == [1, 3]
    assert "b" not in record.metrics


def test_what_is_not_a_number_is_no_metric(run):
    write(run / "metrics.jsonl", [{"round": 1, "note": "hello", "list": [1], "a": 1}])
    assert read_run(run).metrics.keys() == {"a"}


def test_clients_are_columns_and_empty_cells_are_nan(run):
    (run / "clients.csv").write_text('client,examples,accuracy,"odd, name"\n0,10,0.5,1\n1,0,,2\n2,5,word,3\n')
    columns = read_run(run).clients
    assert list(columns) == ["client", "examples", "accuracy", "odd, name"]
    np.testing.assert_array_equal(columns["accuracy"], [0.5, np.nan, np.nan])
    np.testing.assert_array_equal(columns["odd, name"], [1, 2, 3])


@pytest.mark.parametrize("text", ["", "client,examples\n"])
def test_clients_without_a_row_are_none_at_all(run, text):
    (run / "clients.csv").write_text(text)
    assert read_run(run).clients == {}


def test_damaged_clients_are_named(run):
    (run / "clients.csv").write_text("client,accuracy\n0,0.5,7\n")
    with pytest.raises(ValueError, match=r"clients\.csv is damaged: 2 names for 3 columns"):
        read_run(run)
    (run / "clients.csv").write_text("client,accuracy\n0,0.5\n1\n")
    with pytest.raises(ValueError, match=r"clients\.csv is damaged"):
        read_run(run)


def test_confusion_has_a_name_for_every_class(run):
    (run / "evaluation.json").write_text(
        json.dumps({"round": 4, "test": {"accuracy": 1, "confusion": [[1, 0], [0, 2]], "classes": ["cat"]}})
    )
    record = read_run(run)
    assert record.evaluated == 4
    assert record.confusions["test"].classes == ("cat", "1")
    np.testing.assert_array_equal(record.confusions["test"].counts, [[1, 0], [0, 2]])
    (run / "evaluation.json").write_text(json.dumps({"test": {"confusion": [[1, 0]]}}))
    with pytest.raises(ValueError, match=r"test\.confusion must be square"):
        read_run(run)


def test_confusion_that_was_counted_by_probabilities_is_rounded(run):
    (run / "evaluation.json").write_text(json.dumps({"test": {"confusion": [[7.6, 0.4], [1e-9, 12.5000001]]}}))
    counts = read_run(run).confusions["test"].counts
    assert counts.tolist() == [[8, 0], [0, 13]] and counts.dtype == np.int64


def test_a_run_is_unfinished_while_there_should_be_more_rounds(run):
    assert read_run(run).unfinished  # of 3 none
    write(run / "metrics.jsonl", [{"round": 1}, {"round": 2, "converged": 1}])
    assert not read_run(run).unfinished
    write(run / "metrics.jsonl", [{"round": 1}, {"round": 2, "clients/converged": 1, "note": "converged"}])
    assert read_run(run).unfinished
    write(run / "metrics.jsonl", [{"round": 1}, {"round": 2}, {"round": 3}])
    assert not read_run(run).unfinished
    write(run / "metrics.jsonl", [{"round": 1}])
    (run / "experiment.toml").write_text('name = "digits"\n')  # nobody said how many
    assert not read_run(run).unfinished


def test_failures_are_read_in_order(run):
    write(run / "failures.jsonl", [{"round": 2, "client": 7, "reason": "x"}], '{"round": 3, "cl')
    assert read_run(run).failures == (Failure(2, 7, "x"),)


def test_what_cost_no_client_its_reply_is_no_failure(run):
    write(
        run / "failures.jsonl", [{"round": 1, "client": None, "reason": "y"}, {"round": 2, "client": 7, "reason": "x"}]
    )
    record = read_run(run)
    assert record.failures == (Failure(2, 7, "x"),) and record.incidents == (Incident(1, "y"),)


def test_an_experiment_alone_is_a_run_before_its_first_round(run):
    record = read_run(run)
    assert record.rounds.size == 0 and record.metrics == {} and record.clients == {}
    assert record.environment == {} and record.confusions == {} and record.failures == ()


def test_what_is_not_a_run_is_refused_with_its_path(tmp_path, run):
    with pytest.raises(FileNotFoundError, match="nowhere.*no such directory"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"not the directory of a run: it has no experiment\.toml"):
        read_run(tmp_path)
    (run / "experiment.toml").write_text("name = ")
    with pytest.raises(ValueError, match=r"experiment\.toml is damaged") as caught:
        read_run(run)
    assert isinstance(caught.value.__cause__, tomllib.TOMLDecodeError)


def test_runs_are_found_up_to_two_levels_below(tmp_path, run):
    assert find_runs(run) == find_runs(run.parent) == find_runs(tmp_path) == [run]
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="holds none"):
        find_runs(tmp_path / "empty")


def test_numbers_are_written_for_people():
    assert [measure(x) for x in (0.9341, 12.34, 1234.5, 0.00012, 0.0, math.nan)] == [
        *("0.934", "12.3", "1,234", "0.00012", "0.000", "not finite")
    ]
    assert [amount(x) for x in (0, 999, 1000, 12_345_678, 999_600)] == ["0 B", "999 B", "1 kB", "12.3 MB", "1 MB"]
    assert [duration(x) for x in (0.0032, 0.81, 12.34, 59.97, 80, 7500, 100 * 3600)] == [
        *("3.2 ms", "0.81 s", "12.3 s", "1 min", "1 min 20 s", "2 h 5 min", "4 d 4 h")
    ]
    assert [duration(x) for x in (0.0994, 0.0995, 0.0999, 0.1)] == ["99 ms", "0.10 s", "0.10 s", "0.10 s"]
    assert not any("e" in duration(milliseconds / 10_000) for milliseconds in range(1, 2000))
    assert count(1_000_000) == "1,000,000"
