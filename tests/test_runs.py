"""A run's directory: what is in it is whole, and a checkpoint gives back what it took."""

import csv
import io
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from clients.scaffold import ControlledSgd
from clients.sgd import Sgd
from fedsim import tree
from fedsim.evaluation import Evaluation
from fedsim.files import append, as_csv, read_lines, replace
from fedsim.model import Model
from fedsim.personal import Personal
from fedsim.runs import Run, read_checkpoint, trained
from fedsim.simulation import Snapshot

MODEL = Model(torch.nn.Linear(2, 3))


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run.create(tmp_path, "name", 7, "rounds = 3\n", {"python": "3"})


def snapshot(round: int = 4, fill: float = 1.0, personal: bool = False) -> Snapshot:
    clients = {"train": ControlledSgd(model=MODEL, lr=0.1) if personal else Sgd(model=MODEL, lr=0.1)}
    state = {"params": {"weight": torch.full((3, 2), fill), "bias": torch.arange(3.0)}, "steps": torch.tensor(round)}
    return Snapshot(round, state, Personal(clients, 5, seed=0))


def control(value: float) -> tree.Tree:
    """What two clients keep."""
    return {"control": {name: torch.full((2, *leaf.shape), value) for name, leaf in MODEL.params.items()}}


def same(one: tree.Tree, other: tree.Tree) -> bool:
    flat, others = tree.flatten(one), tree.flatten(other)
    return flat.keys() == others.keys() and all(torch.equal(leaf, others[name]) for name, leaf in flat.items())


def test_a_new_run_has_a_directory_named_by_date_and_seed(run, tmp_path):
    assert run.path.parent == tmp_path / "name"
    assert run.path.name.endswith("-7")
    assert (run.path / "experiment.toml").read_text() == "rounds = 3\n"
    assert json.loads((run.path / "environment.json").read_text()) == {"python": "3"}
    assert Run.open(run.path) == run


def test_runs_of_one_second_have_directories_of_their_own(tmp_path):
    runs = [Run.create(tmp_path, "name", 7, "", {}) for _ in range(12)]
    assert len({run.path for run in runs}) == 12


def test_a_directory_without_an_experiment_is_no_run(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match=r"is not a run: it holds no experiment.toml"):
            Run.open(path)


def test_rounds_are_recorded_line_by_line_and_read_back(run):
    lines = [{"round": 1, "test/accuracy": 0.1 + 0.2, "bytes_up": 123}, {"round": 2, "seconds": 1e-300}]
    for line in lines:
        run.record(line)
        assert run.metrics_file.read_text().endswith("\n")
    assert run.metrics() == lines


def test_what_is_not_finite_is_null_on_disk_and_nan_when_read(run):
    run.record({"round": 1, "loss": math.nan, "norm": math.inf})
    assert json.loads(run.metrics_file.read_text()) == {"round": 1, "loss": None, "norm": None}
    (line,) = run.metrics()
    assert math.isnan(line["loss"])
    assert math.isnan(line["norm"])


def test_a_metric_may_be_a_tensor_or_a_number_of_numpy(run):
    run.record({"round": 1, "loss": torch.tensor(0.5), "norm": np.float32(0.25)})  # type: ignore[dict-item]
    assert run.metrics() == [{"round": 1, "loss": 0.5, "norm": 0.25}]


def scored(number: int) -> Evaluation:
    """What an evaluation found that counted so many scores, all of them 0."""
    return evaluation(None)._replace(scores=torch.tensor([[[number, 0]]]))


def test_scores_are_a_line_for_each_evaluation_that_counted_some_with_each_part_that_did(run):
    run.record_counts(1, {"test": evaluation(None)})
    run.record_counts(2, {})
    assert not run.scores_file.exists()
    groups = torch.tensor([[[1, 2], [3, 0]], [[0, 0], [4, 5]]])  # two groups, two scores, two points
    run.record_counts(3, {"test": evaluation(None), "clients": evaluation(None)._replace(scores=groups)})
    run.record_counts(6, {"test": scored(7), "clients": scored(8)})
    assert run.scores_file == run.path / "scores.jsonl" and run.scores_file.read_text().endswith("\n")
    assert read_lines(run.scores_file) == [
        {"round": 3, "clients": groups.tolist()},
        {"round": 6, "test": [[[7, 0]]], "clients": [[[8, 0]]]},
    ]


def confused(table: Tensor | None) -> Evaluation:
    """What an evaluation found that counted this."""
    return evaluation(None)._replace(confusion=table)


def test_of_each_class_what_is_right_is_a_line_for_each_evaluation_that_told_classes_apart(run):
    run.record_counts(1, {"test": confused(None)})
    run.record_counts(2, {})
    assert not run.classes_file.exists()
    whole, broken = torch.tensor([[3, 1], [0, 2]]), torch.tensor([[0.25, 0.5], [0.0, 2.5]])
    run.record_counts(3, {"test": confused(whole), "clients": confused(None)})
    run.record_counts(6, {"test": confused(whole.flip(1)), "clients": confused(broken)})
    assert run.classes_file == run.path / "classes.jsonl" and run.classes_file.read_text().endswith("\n")
    assert read_lines(run.classes_file) == [
        {"round": 3, "test": {"right": [3, 2], "examples": [4, 2]}},
        {
            "round": 6,
            "test": {"right": [1, 0], "examples": [4, 2]},
            "clients": {"right": [0.25, 2.5], "examples": [0.75, 2.5]},
        },
    ]
    assert not run.scores_file.exists()


def test_of_more_than_a_hundred_classes_nothing_is_kept_by_class(run):
    run.record_counts(1, {"test": confused(torch.eye(101, dtype=torch.int64))})
    assert not run.classes_file.exists()
    run.record_counts(2, {"test": confused(torch.eye(100, dtype=torch.int64))})
    assert read_lines(run.classes_file) == [{"round": 2, "test": {"right": [1] * 100, "examples": [1] * 100}}]


def test_incidents_are_lines_without_a_client(run):
    run.record_incidents(2, ["a worker died"])
    run.record_incidents(3, [])
    assert read_lines(run.failures_file) == [{"round": 2, "client": None, "reason": "a worker died"}]


def test_failures_are_a_line_each(run):
    run.record_failures(2, {5: "line 1\nline 2", 3: "ü"})
    run.record_failures(3, {})
    assert read_lines(run.failures_file) == [
        {"round": 2, "client": 5, "reason": "line 1\nline 2"},
        {"round": 2, "client": 3, "reason": "ü"},
    ]


def test_a_run_without_a_round_has_no_metrics(run):
    assert run.metrics() == []
    assert run.checkpoints() == []


@pytest.mark.parametrize("half", ['{"round": 3, "te', '{"round": 3}', "{", "\x00\x00"])
def test_a_last_line_that_was_cut_off_does_not_count(run, half):
    run.record({"round": 1})
    run.record({"round": 2})
    with run.metrics_file.open("a") as file:
        file.write(half)
    assert [line["round"] for line in run.metrics()] == [1, 2]


def test_a_letter_that_was_cut_in_the_middle_does_no_harm(run):
    run.record({"round": 1})
    with run.metrics_file.open("ab") as file:
        file.write('{"ü'.encode()[:-1])
    assert [line["round"] for line in run.metrics()] == [1]


@pytest.mark.parametrize("line", ['{"round": 2', "[1]", "3", '{"seconds": 1}', "nonsense"])
def test_a_damaged_line_in_the_middle_is_named(run, line):
    run.record({"round": 1})
    with run.metrics_file.open("a") as file:
        file.write(f"{line}\n")
    run.record({"round": 3})
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2 is damaged: it must be an object with a round"):
        run.metrics()


def test_rewinding_takes_back_all_that_came_after_a_round(run):
    for number in range(1, 6):
        run.record({"round": number, "value": number / 3})
        run.record_failures(number, {number: "why"})
        run.record_counts(
            number,
            {"test": scored(number)._replace(confusion=None), "clients": confused(torch.tensor([[number, 1], [0, 2]]))},
        )
    for path in (run.metrics_file, run.scores_file, run.classes_file):
        with path.open("a") as file:
            file.write('{"round": 6')
    run.rewind(3)
    assert run.metrics() == [{"round": number, "value": number / 3} for number in (1, 2, 3)]
    assert [line["round"] for line in read_lines(run.failures_file)] == [1, 2, 3]
    assert read_lines(run.scores_file) == [{"round": number, "test": [[[number, 0]]]} for number in (1, 2, 3)]
    assert read_lines(run.classes_file) == [
        {"round": number, "clients": {"right": [number, 2], "examples": [number + 1, 2]}} for number in (1, 2, 3)
    ]
    run.record_counts(4, {"test": scored(8)})
    assert read_lines(run.scores_file)[3:] == [{"round": 4, "test": [[[8, 0]]]}]
    run.record({"round": 4})
    assert [line["round"] for line in run.metrics()] == [1, 2, 3, 4]


def test_rewinding_a_new_run_makes_no_files(run):
    before = sorted(run.path.iterdir())
    run.rewind(0)
    assert sorted(run.path.iterdir()) == before


@pytest.mark.parametrize("personal", [False, True])
def test_a_checkpoint_gives_back_what_it_took(run, personal):
    saved = snapshot(4, 0.1 + 0.2, personal)
    if personal:
        saved.personal.scatter([3, 1], control(2.5))
    found = run.load(run.save(saved, 2), snapshot(0, 0.0, personal))
    assert found.round == 4
    assert same(found.state, saved.state)
    assert same(found.personal.gather([0, 1, 3]), saved.personal.gather([0, 1, 3]))


def test_the_same_snapshot_gives_the_same_bytes(tmp_path):
    files = [Run.create(tmp_path, "name", seed, "", {}).save(snapshot(), 2).read_bytes() for seed in range(8)]
    assert len(set(files)) == 1


def test_leaves_may_share_memory_and_need_not_be_contiguous(run):
    whole = torch.arange(12.0).reshape(3, 4)
    state = {"a": whole, "b": whole, "c": whole.T, "d": whole[:, ::2], "e": whole[0]}
    saved = Snapshot(1, state, snapshot().personal)
    assert same(run.load(run.save(saved, 2), saved).state, state)


def test_a_file_has_the_rights_that_a_new_file_gets_here(run, tmp_path):
    (tmp_path / "usual").touch()
    saved = Snapshot(1, {"a": torch.zeros(2)}, snapshot().personal)
    assert run.save(saved, 2).stat().st_mode == (tmp_path / "usual").stat().st_mode


LARGE = """
import resource, sys
from pathlib import Path
import torch
from fedsim.personal import Personal
from fedsim.runs import Run
from fedsim.simulation import Snapshot

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10

state = {"a": torch.ones(200 * 2**18), "b": torch.ones(100 * 2**18)}  # 300 MB
before = peak()
Run.create(Path(sys.argv[1]), "large", 0, "", {}).save(Snapshot(1, state, Personal({}, 1, 0)), 1)
print(peak() - before)
"""


def test_a_checkpoint_of_a_large_state_takes_little_memory_of_its_own(tmp_path):
    told = subprocess.run([sys.executable, "-c", LARGE, str(tmp_path)], capture_output=True, text=True, check=True)
    assert float(told.stdout) < 100


def test_a_checkpoint_may_hold_rows_and_any_kind_of_number(run):
    state = {
        "rows": tree.Rows(torch.tensor([1, -1]), torch.ones(2, 3), 5),
        "half": torch.ones(2, dtype=torch.bfloat16),
        "yes": torch.tensor([True, False]),
        "none": torch.zeros(0, 4),
    }
    saved = Snapshot(1, state, snapshot().personal)
    found = run.load(run.save(saved, 2), saved)
    assert same(found.state, state)
    assert found.state["half"].dtype == torch.bfloat16


def wrong(run: Run, leaves: dict[str, Tensor | None]) -> Path:
    """A checkpoint of `snapshot` with some leaves replaced, or left out where None stands."""
    path = run.save(snapshot(), 2)
    flat, _ = read_checkpoint(path)
    changed: dict[str, Any] = {name: leaf for name, leaf in (flat | leaves).items() if leaf is not None}
    told = json.dumps({"format": 1, "round": 4})
    path.write_bytes(safetensors.torch.save(changed, {"fedsim": told}))
    return path


def test_leaves_that_are_missing_surplus_or_of_another_shape_are_all_named(run):
    path = wrong(
        run,
        {
            "state/params/bias": None,
            "state/params/surplus": torch.ones(1),
            "state/params/weight": torch.ones(2, 3),
        },
    )
    with pytest.raises(ValueError) as caught:
        run.load(path, snapshot())
    message = str(caught.value)
    assert str(path) in message
    assert "missing params/bias" in message
    assert "surplus params/surplus" in message
    assert "params/weight has shape (2, 3), expected (3, 2)" in message


def test_a_checkpoint_of_clients_that_kept_something_else_is_refused(run):
    saved = snapshot(personal=True)
    saved.personal.scatter([3, 1], control(2.5))
    path = run.save(saved, 2)
    with pytest.raises(ValueError, match="what clients keep does not fit: surplus control/bias; surplus control/w"):
        run.load(path, snapshot(personal=False))


@pytest.mark.parametrize("damage", ["empty", "cut", "nonsense", "header", "zeros"])
def test_a_damaged_checkpoint_is_named_and_said_what_to_do_about(run, damage):
    path = run.save(snapshot(), 2)
    whole = path.read_bytes()
    content = {
        "empty": b"",
        "cut": whole[: len(whole) // 2],
        "nonsense": b"nonsense" * 100,
        "header": whole[:20] + b"\xff" * 8 + whole[28:],
        "zeros": bytes(len(whole)),
    }
    path.write_bytes(content[damage])
    with pytest.raises(ValueError, match=r"checkpoint .*round-000004.safetensors is damaged: .*remove it to go on"):
        run.load(path, snapshot())


@pytest.mark.parametrize("told", [None, {"fedsim": '{"format": 9, "round": 1}'}, {"other": "1"}])
def test_a_checkpoint_of_another_format_is_refused(run, told):
    path = run.save(snapshot(), 2)
    path.write_bytes(safetensors.torch.save({"a": torch.ones(1)}, told))
    with pytest.raises(ValueError, match="has format (None|9), this version reads 1"):
        read_checkpoint(path)


@pytest.mark.parametrize(("keep", "left"), [(1, [5]), (2, [4, 5]), (99, [1, 2, 3, 4, 5]), ("all", [1, 2, 3, 4, 5])])
def test_the_last_checkpoints_are_kept(run, keep, left):
    for number in range(1, 6):
        run.save(snapshot(number), keep)
    assert [read_checkpoint(path)[1] for path in run.checkpoints()] == left


def test_the_latest_checkpoint_is_last_however_many_digits_its_round_has(run):
    for number in (999_998, 999_999, 1_000_000, 1_000_001):
        run.save(snapshot(number), 2)
    assert [read_checkpoint(path)[1] for path in run.checkpoints()] == [1_000_000, 1_000_001]


def test_what_was_being_written_when_the_process_died_is_no_checkpoint(run):
    path = run.save(snapshot(4), 2)
    part = path.with_name(".round-000006.safetensors.part")
    part.write_bytes(path.read_bytes()[:100])
    assert run.checkpoints() == [path]
    run.save(snapshot(6), 2)
    assert not part.exists()


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    replace(path, b"old")
    with pytest.raises(TypeError):
        replace(path, "not bytes")  # type: ignore[arg-type]
    assert path.read_bytes() == b"old"
    replace(path, b"new")
    assert path.read_bytes() == b"new"
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_appending_nothing_makes_no_file(tmp_path):
    append(tmp_path / "file", [])
    assert not (tmp_path / "file").exists()
    assert read_lines(tmp_path / "file") == []


def test_a_line_that_cannot_be_written_leaves_no_half_of_it(tmp_path):
    with pytest.raises(TypeError):
        append(tmp_path / "file", [{"round": 1}, {"round": object()}])
    assert read_lines(tmp_path / "file") == []


def test_columns_are_written_as_csv_that_reads_back():
    columns = {"client": np.array([0.0, 12.0, 3.0]), "a,b": np.array([0.1 + 0.2, np.nan, 1e-17])}
    rows = list(csv.reader(io.StringIO(as_csv(columns))))
    assert rows[0] == ["client", "a,b"]
    assert [row[0] for row in rows[1:]] == ["0", "12", "3"]
    assert [float(row[1]) if row[1] else None for row in rows[1:]] == [0.1 + 0.2, None, 1e-17]


def evaluation(groups: Tensor | None) -> Evaluation:
    """What two clients' evaluation found, that of the second of which counted half an example."""
    confusion = torch.tensor([[3, 1], [0, 2]]) if groups is None else groups.sum((0, 1))
    clients = {"client": np.array([0.0, 4.0]), "examples": np.array([4.0, 2.0]), "apart": np.array([0.5, np.nan])}
    return Evaluation({"examples": 6.0, "apart": 0.25}, clients, confusion, {}, groups=groups)


def test_an_evaluation_by_group_is_written_down_summed_over_clients_with_the_groups_names(run):
    groups = torch.tensor([[[[1.0, 0.5], [0.0, 1.0]]] * 3, [[[0.0, 0.0], [0.0, 0.5]]] * 3], dtype=torch.float64)
    names = {"y": ("no", "yes"), "a": ("p", "q", "r"), "other": ("x",)}
    run.save_evaluation(3, {"clients": evaluation(groups), "test": evaluation(None)}, names)
    found = json.loads((run.path / "evaluation.json").read_text())
    assert found["round"] == 3
    assert found["clients"]["groups"] == [[[1.0, 0.5], [0.0, 1.5]]] * 3
    assert (found["clients"]["group_names"], found["clients"]["classes"]) == (["p", "q", "r"], ["no", "yes"])
    assert found["clients"]["confusion"] == [[3.0, 1.5], [0.0, 4.5]]
    assert found["test"] == {"examples": 6, "apart": 0.25, "confusion": [[3, 1], [0, 2]], "classes": ["no", "yes"]}
    assert (run.path / "clients.csv").read_text() == "client,examples,apart\n0,4,0.5\n4,2,\n"


def test_an_evaluation_without_names_has_none(run):
    groups = torch.ones(2, 3, 2, 2)
    run.save_evaluation(1, {"test": evaluation(groups)}, {})
    found = json.loads((run.path / "evaluation.json").read_text())
    assert (found["test"]["group_names"], found["test"]["classes"]) == ([], [])
    assert not (run.path / "clients.csv").exists()  # of clients nothing was counted


def several(folder: Path, *names: str) -> dict[str, Path]:
    """Runs with these directories, whose models are told apart by what they are filled with: 0, 1, ..."""
    for number, name in enumerate(names):
        run = Run.create(folder, "made", 0, "", {})
        run.save(snapshot(1, -1.0), "all")
        run.save(snapshot(2, float(number)), "all")
        run.path.rename(folder / name)
    return {name: folder / name for name in names}


def fill(params: dict[str, Tensor]) -> float:
    """What a model was filled with."""
    assert params.keys() == {"weight", "bias"} and params["bias"].tolist() == [0, 1, 2]
    return float(params["weight"].unique())


def test_the_trained_model_of_a_run_is_that_of_its_last_checkpoint(tmp_path):
    paths = several(tmp_path, "20250101-000000-1", "elsewhere")
    assert [fill(trained(path, seed)) for path in paths.values() for seed in (0, 1)] == [0, 0, 1, 1]


def test_of_a_folder_of_runs_the_latest_with_this_seed_counts(tmp_path):
    several(
        tmp_path,
        *("20250101-000000-1", "20250102-000000-1", "20250103-000000-2", "20250102-235959-1", "20240101-000000-12"),
        *("20250102-000000-1-2", "20990101-000000-21", "20990101-000000-1-x", "x20990101-000000-1", "20990101-1"),
    )
    assert [fill(trained(tmp_path, seed)) for seed in (1, 2, 12)] == [3, 2, 4]
    assert Run.latest(tmp_path).path.name == "20990101-000000-21" and Run.latest(tmp_path, 2).path.name.endswith("-2")
    for seed in (0, 3):
        with pytest.raises(FileNotFoundError, match=f"{tmp_path} is no run, nor does it hold one with the seed {seed}"):
            trained(tmp_path, seed)


def test_of_two_runs_of_one_second_the_later_one_counts(tmp_path):
    several(tmp_path, "20250101-000000-1", "20250101-000000-1-2")
    assert fill(trained(tmp_path, 1)) == 1


def test_where_there_is_no_trained_model_that_is_said(run, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is no run, nor does it hold one with the seed 0"):
        trained(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="name is no run, nor does it hold one with the seed 8"):
        trained(run.path.parent, 8)
    with pytest.raises(FileNotFoundError, match=f"{run.path} has no checkpoint to take a model from"):
        trained(run.path)
    with pytest.raises(FileNotFoundError, match=f"{run.path} has no checkpoint to take a model from"):
        trained(run.path.parent, 7)


def test_a_checkpoint_without_a_model_is_refused_with_what_it_holds(run):
    run.save(Snapshot(1, {"users": torch.ones(2), "items": {"params": torch.ones(1)}}, snapshot().personal), 2)
    with pytest.raises(ValueError, match=r"round-000001.safetensors holds no model: .* state/items/params, state/user"):
        trained(run.path)


def test_a_model_is_not_taken_from_a_damaged_checkpoint_nor_from_the_one_before(run):
    run.save(snapshot(1), "all")
    path = run.save(snapshot(2), "all")
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match="round-000002.safetensors is damaged"):
        trained(run.path)
    path.unlink()
    assert fill(trained(run.path)) == 1.0
