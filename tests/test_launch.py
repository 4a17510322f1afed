"""Experiments and simulations from beginning to end, and what comes of it when they go wrong."""

import json
import logging
import tomllib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from clients.sgd import Sgd
from fedsim.client import Client
from fedsim.config import ConfigError, assemble, locate, read
from fedsim.engines.local import Sequential
from fedsim.files import read_lines
from fedsim.job import Plan, Result
from fedsim.launch import load, resume, run, simulate
from fedsim.model import Model
from fedsim.runs import Run, read_checkpoint
from fedsim.sampling import uniform
from fedsim.simulation import TooFewReplies
from fedsim.task import Metrics, Reply
from strategies.fedavg import FedAvg

Tables = dict[str, Any]
# A local side that fails for one client while a file named "broken" lies beside it, and a server side that does.
PLUGIN = """
from dataclasses import dataclass
from pathlib import Path

import torch

from clients.sgd import Sgd
from strategies.fedavg import FedAvg

BROKEN = Path(__file__).with_name("broken")

@dataclass(frozen=True)
class Picky(Sgd):
    least: int = 0

    def prepare(self, examples, rng):
        if BROKEN.exists() and int(examples["client"][0]) >= self.least:
            raise OSError("the disk of this client is full")
        return examples

@dataclass(frozen=True)
class Failing(FedAvg):
    def aggregate(self, state, task, replies):
        if BROKEN.exists() and task.round == 3:
            raise ValueError("the server stumbled")
        return super().aggregate(state, task, replies)

@dataclass(frozen=True)
class Measuring(FedAvg):
    def aggregate(self, state, task, replies):
        state, _ = super().aggregate(state, task, replies)
        return state, {"tensor": torch.tensor(0.5), "nan": float("nan")}
"""


def tables(**others: Any) -> Tables:
    return {
        "name": "small",
        "seed": 2,
        "rounds": 4,
        "evaluate_every": 0,
        "checkpoint_every": 2,
        "data": {"use": "fedsim.data.datasets:gaussian_task", "examples": 90},
        "partition": {"use": "fedsim.data.partition:by_column", "column": "client"},
        "split": {"use": "fedsim.data.federation:divide", "test": 0.2},
        "model": {"use": "plugin.py:model"},
        "strategy": {"use": "strategies.fedavg:FedAvg"},
        "clients": {"train": {"use": "clients.sgd:Sgd", "lr": 0.1, "batch_size": 16}},
        "engine": {"use": "fedsim.engines.local:Sequential"},
    } | others


# A server side that is done after some rounds; one that measures what only the run may; and data with two named groups.
DONE = """
from dataclasses import replace

from fedsim.data.generated import gaussian_task

@dataclass(frozen=True)
class Content(FedAvg):
    enough: int = 3

    def init(self, params):
        return {"params": params, "rounds": torch.tensor(0)}

    def aggregate(self, state, task, replies):
        params, metrics = super().aggregate({"params": state["params"]}, task, replies)
        return params | {"rounds": state["rounds"] + 1}, metrics

    def done(self, state):
        return bool(state["rounds"] >= self.enough)

@dataclass(frozen=True)
class Boasting(FedAvg):
    def aggregate(self, state, task, replies):
        return state, {"converged": 0.5}

def grouped(named=("y", "a")):
    names = {"y": ("p", "q", "r"), "a": ("one", "other")}
    return replace(gaussian_task(examples=90, seed=2), names={name: names[name] for name in named})
"""
DRAWN = """
def drawn():
    return Model(nn.Linear(2, 3))
"""
NAMED = """
@dataclass(frozen=True)
class Clashing(FedAvg):
    def aggregate(self, state, task, replies):
        return state, {"seconds": 0.5}
"""
MODEL = """
from torch import nn
from fedsim.model import Model

def model():
    module = nn.Linear(2, 3)
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return Model(module)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with plug-ins in it."""
    (tmp_path / "plugin.py").write_text(PLUGIN + NAMED + MODEL + DRAWN + DONE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def picky(least: int) -> Tables:
    return {"train": {"use": "plugin.py:Picky", "lr": 0.1, "batch_size": 16, "least": least}}


def quiet(metrics: list[Metrics]) -> list[Metrics]:
    """What was measured, but for the clock."""
    return [{name: value for name, value in line.items() if name != "seconds"} for line in metrics]


def final(result: Result) -> bytes:
    return sorted((result.path / "checkpoints").iterdir())[-1].read_bytes()


def test_a_run_gives_its_metrics_the_model_and_its_directory(folder):
    result = run(tables(evaluate_every=2))
    assert result.path.parent == Path("runs/small")
    assert [line["round"] for line in result.metrics] == [1, 2, 3, 4]
    assert {name: leaf.shape for name, leaf in result.params.items()} == {"weight": (3, 2), "bias": (3,)}
    assert (result.path / "report" / "index.html").is_file()
    flat, number = read_checkpoint(result.path / "checkpoints" / "round-000004.safetensors")
    assert number == 4
    assert all(torch.equal(flat[f"state/params/{name}"], leaf) for name, leaf in result.params.items())


def test_the_environment_of_a_run_is_written_down(folder):
    told = json.loads((run(tables(rounds=1)).path / "environment.json").read_text())
    assert (told["engine"], told["num_clients"], told["parameters"]) == ("Sequential()", 3, 2 * 3 + 3)
    assert told["torch"] == torch.__version__.split("+")[0] or told["torch"] == torch.__version__


def test_evaluations_come_when_they_should_and_after_the_last_round(folder):
    result = run(tables(rounds=5, evaluate_every=2))
    assert [line["round"] for line in result.metrics if "clients/loss" in line] == [2, 4, 5]
    assert not any("clients/loss" in line for line in run(tables()).metrics)


def test_some_clients_may_evaluate_for_all_and_are_always_the_same(folder):
    lines = [
        (result.path / "clients.csv").read_text().splitlines()
        for result in (run(tables(evaluate_every=1, evaluate_clients=2, rounds=rounds)) for rounds in (1, 2))
    ]
    assert [len(table) for table in lines] == [3, 3]
    assert [line.split(",")[0] for line in lines[0]] == [line.split(",")[0] for line in lines[1]]


def test_training_learns_something(folder):
    result = run(tables(rounds=15, evaluate_every=1))
    losses = [line["clients/loss"] for line in result.metrics]
    assert result.last("clients/loss") == losses[-1] < losses[0]
    assert result.last("train/loss") < result.metrics[0]["train/loss"]


def test_the_latest_value_of_a_metric_is_asked_for_by_name():
    result = Result([{"round": 1, "a": 1.0}, {"round": 2, "a": 2.0, "b": 5.0}, {"round": 3, "c": 1.0}], {}, Path())
    assert (result.last("a"), result.last("b"), result.last("round")) == (2.0, 5.0, 3)
    with pytest.raises(KeyError, match="'d' was never measured: there are a, b, c, round"):
        result.last("d")
    with pytest.raises(KeyError, match="'d' was never measured"):
        Result([], {}, Path()).last("d")


def test_a_strategy_may_measure_with_tensors_and_what_is_not_a_number(folder):
    result = run(tables(rounds=1, strategy={"use": "plugin.py:Measuring"}))
    assert result.last("tensor") == 0.5
    assert result.last("nan") != result.last("nan")


def test_a_run_asks_for_no_more_than_what_is_changed(folder):
    assert len(run(tables(), changes=["rounds=1", "seed=5"]).metrics) == 1


def test_the_resolved_experiment_runs_to_the_same_bits(folder, tmp_path, monkeypatch):
    first = run(tables(clients=picky(0)))
    (tmp_path / "elsewhere").mkdir()
    path = first.path.resolve()
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = run(path / "experiment.toml")
    assert (again.path / "experiment.toml").read_bytes() == (path / "experiment.toml").read_bytes()
    assert quiet(again.metrics) == quiet(first.metrics)
    assert final(again) == final(Result([], {}, path))
    other = run(path / "experiment.toml", changes=["seed=3"])
    assert final(other) != final(again)


def test_the_number_of_threads_is_as_before_even_after_a_failure(folder):
    before = torch.get_num_threads()
    seen = []

    class Watching:
        def show(self, metrics: Metrics) -> None:
            seen.append(torch.get_num_threads())
            if len(seen) > 1:
                raise RuntimeError("seen enough")

        def __enter__(self) -> "Watching":
            return self

        def __exit__(self, *_: object) -> None:
            return None

    with pytest.raises(RuntimeError, match="seen enough"):
        run(tables(threads=before + 1), display=lambda *_: Watching())
    assert seen == [before + 1] * 2
    assert torch.get_num_threads() == before


def test_a_run_prints_and_logs_nothing_by_itself(folder, capfd, caplog):
    with caplog.at_level(logging.INFO):
        run(tables(evaluate_every=1))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("engine", ["Sequential", "Vectorised"])
def test_a_client_that_raises_costs_that_client_and_is_told(folder, engine):
    (folder / "broken").touch()
    result = run(tables(clients=picky(2), engine={"use": f"fedsim.engines.local:{engine}"}))
    failures = read_lines(result.path / "failures.jsonl")
    assert [(line["round"], line["client"]) for line in failures] == [(1, 2), (2, 2), (3, 2), (4, 2)]
    assert all(line["reason"].endswith("OSError: the disk of this client is full") for line in failures)
    assert [(line["clients"], line["failed"]) for line in result.metrics] == [(2, 1)] * 4


def test_too_few_replies_end_a_run_that_can_be_resumed_when_the_cause_is_gone(folder):
    sound = run(tables(clients=picky(1), min_replies=2), root="sound")
    with pytest.raises(TooFewReplies, match="round 1: 1 of 3 clients answered, min_replies is 2.*disk of this client"):
        (folder / "broken").touch()
        run(tables(clients=picky(1), min_replies=2))
    (path,) = (folder / "runs" / "small").iterdir()
    assert [(line["round"], line["client"]) for line in read_lines(path / "failures.jsonl")] == [(1, 1), (1, 2)]
    assert [file.name for file in (path / "checkpoints").iterdir()] == ["round-000000.safetensors"]
    with pytest.raises(TooFewReplies):
        resume(path)
    (folder / "broken").unlink()
    result = resume(path)
    assert quiet(result.metrics) == quiet(sound.metrics)
    assert final(result) == final(sound)
    assert read_lines(path / "failures.jsonl") == []


def test_rounds_that_nobody_answers_change_nothing_where_that_is_allowed(folder):
    (folder / "broken").touch()
    result = run(tables(rounds=2, clients=picky(0), min_replies=0))
    assert [(line["clients"], line["failed"]) for line in result.metrics] == [(0, 3)] * 2
    assert not any(leaf.any() for leaf in result.params.values())


def test_a_strategy_that_raises_ends_the_run_where_a_checkpoint_is_and_says_which_run(folder):
    sound = run(tables(strategy={"use": "plugin.py:Failing"}), root="sound")
    (folder / "broken").touch()
    with pytest.raises(ValueError, match="the server stumbled") as caught:
        run(tables(strategy={"use": "plugin.py:Failing"}))
    assert not isinstance(caught.value, ConfigError)
    (path,) = (Path("runs") / "small").iterdir()
    assert caught.value.__notes__[-1] == f"The run is in {path}."
    (folder / "broken").unlink()
    assert final(resume(path)) == final(sound)


def test_an_evaluation_in_which_nobody_answers_ends_the_run(folder):
    (folder / "broken").touch()
    failing = tables(evaluate_every=1, clients=tables()["clients"] | {"evaluate": {"use": "evaluating.py:Failing"}})
    (folder / "evaluating.py").write_text(
        "from fedsim.evaluation import Evaluate\n"
        "class Failing(Evaluate):\n"
        "    def prepare(self, examples, rng):\n"
        "        raise ValueError('cannot tell')\n"
    )
    with pytest.raises(RuntimeError, match=r"round 1: evaluation failed: (.|\n)*cannot tell"):
        run(failing)


def test_a_run_may_go_on_for_longer_than_was_asked_at_first(folder):
    straight = run(tables(rounds=6), root="straight")
    short = run(tables(rounds=3))
    longer = resume(short.path, rounds=6)
    assert quiet(longer.metrics) == quiet(straight.metrics)
    assert final(longer) == final(straight)
    assert read(longer.path / "experiment.toml")[0].rounds == 6


def test_a_run_cannot_be_resumed_for_fewer_rounds_than_it_has_had(folder):
    path = run(tables()).path
    before = {file: file.read_bytes() for file in path.iterdir() if file.is_file()}
    with pytest.raises(ConfigError, match="rounds = 3: must be at least 4, so many have been done"):
        resume(path, rounds=3)
    assert before == {file: file.read_bytes() for file in path.iterdir() if file.is_file()}


def test_a_damaged_checkpoint_is_told_and_without_it_the_run_goes_on_from_the_one_before(folder):
    result = run(tables())
    whole = final(result)
    path = sorted((result.path / "checkpoints").iterdir())[-1]
    path.write_bytes(whole[:-1])
    with pytest.raises(ConfigError, match="round-000004.safetensors is damaged: .*remove it to go on from the one"):
        resume(result.path)
    path.unlink()
    assert final(resume(result.path)) == whole


def test_a_checkpoint_of_another_model_is_refused_with_the_leaves_that_differ(folder):
    result = run(tables())
    text = (result.path / "experiment.toml").read_text()
    start = text.index("[model]")
    end = text.index("[", start + 1)
    (result.path / "experiment.toml").write_text(f'{text[:start]}[model]\nuse = "other.py:model"\n\n{text[end:]}')
    (result.path / "other.py").write_text(MODEL.replace("nn.Linear(2, 3)", "nn.Linear(2, 3, bias=False)"))
    with pytest.raises(ConfigError, match="round-000004.safetensors does not fit: surplus params/bias"):
        resume(result.path)


def test_damaged_metrics_are_told(folder):
    result = run(tables())
    file = result.path / "metrics.jsonl"
    file.write_text(file.read_text().replace('"round": 2', '"rou'))
    with pytest.raises(ConfigError, match="metrics.jsonl, line 2 is damaged"):
        resume(result.path)


def test_where_there_is_no_run_there_is_nothing_to_resume(folder):
    with pytest.raises(FileNotFoundError, match="nowhere is not a run"):
        resume("nowhere")


def test_a_run_that_cannot_begin_leaves_no_directory(folder):
    nothing = {"use": "fedsim.data.federation:divide"}
    for wrong, told in (
        (tables(split=nothing, evaluate_every=1), "has nothing to evaluate on"),
        (tables(strategy={"use": "strategies.fedavg:FedAvg", "lr": -1}), "must be float > 0"),
        (tables(clients={"retrain": tables()["clients"]["train"]}), "clients.train is missing"),
    ):
        with pytest.raises(ConfigError, match=told):
            run(wrong)
    assert not (folder / "runs").exists()


@pytest.mark.parametrize(
    ("split", "part", "told"),
    [
        ({"use": "leave_one_out", "validation": False}, "validation", "set split.validation = true, or evaluate"),
        ({"use": "divide"}, "validation", 'needs a column y; .*: set split.use = "leave_one_out"'),
        ({"use": "divide"}, "test", 'needs a column y; .*: set split.use = "leave_one_out"'),
    ],
)
def test_where_nothing_is_held_out_to_rank_the_setting_that_holds_it_out_is_told(folder, split, part, told):
    wrong = tomllib.loads(locate("mostpop/latent-factors").read_text(encoding="utf-8")) | {"split": split}
    wrong["clients"]["evaluate"]["part"] = part
    with pytest.raises(ConfigError, match=told):
        run(wrong)


@pytest.mark.parametrize("part", ["validation", "test"])
def test_where_nothing_is_held_out_the_part_that_is_evaluated_is_told(folder, part):
    nothing = {"use": "fedsim.data.federation:divide"}
    clients = tables()["clients"] | {"evaluate": {"use": "evaluate", "part": part}}
    with pytest.raises(ConfigError, match=rf"set split\.{part} \(0.2, say\)"):
        run(tables(split=nothing, clients=clients, evaluate_every=1))


def test_a_folder_in_which_no_directory_can_be_made_is_told(folder):
    (folder / "file").touch()
    with pytest.raises(ConfigError, match="no directory can be made for the run in file"):
        run(tables(), root="file")


def objects(**others: Any) -> dict[str, Any]:
    """A simulation made of objects."""
    federation = assemble(*read(tables())).federation
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = Model(nn.Linear(2, 3))
    return {
        "federation": federation,
        "model": model,
        "strategy": FedAvg(),
        "clients": {"train": Sgd(model=model, lr=0.1)},
        "plan": Plan(rounds=4, name="objects", checkpoint_every=2, evaluate_every=0),
        "sample": uniform(federation.num_clients, 1, count=2),
    } | others


def test_objects_are_simulated_as_tables_are(folder):
    by_tables = run(tables())
    assembly = assemble(*read(tables()))
    by_objects = simulate(
        federation=assembly.federation,
        model=assembly.model,
        strategy=assembly.strategy,
        clients={"train": assembly.clients["train"]},
        plan=Plan(rounds=4, seed=2, evaluate_every=0),
        engine=Sequential,
    )
    assert quiet(by_objects.metrics) == quiet(by_tables.metrics)
    assert final(by_objects) == final(by_tables)
    assert by_objects.path.parent == Path("runs/simulation")


def test_a_simulation_of_objects_is_evaluated_and_described(folder):
    result = simulate(**objects(plan=Plan(rounds=2)))
    assert result.last("clients/loss") >= 0
    text = (result.path / "experiment.toml").read_text()
    assert "rounds = 2" in text
    assert "FedAvg(lr=1.0)" in text


def test_a_simulation_of_objects_is_resumed_with_the_same_objects(folder):
    straight = simulate(**objects())
    short = simulate(**objects(plan=replace(objects()["plan"], rounds=2)))
    longer = simulate(**objects(resume=short.path))
    assert longer.path == short.path
    assert quiet(longer.metrics) == quiet(straight.metrics)
    assert final(longer) == final(straight)
    assert "rounds = 4" in (longer.path / "experiment.toml").read_text()


def test_a_simulation_of_objects_cannot_be_resumed_without_them(folder):
    result = simulate(**objects())
    with pytest.raises(ConfigError, match=r"was made of objects: go on with it by fedsim.simulate\(..., resume=...\)"):
        resume(result.path)


@pytest.mark.parametrize(
    "wrong", [{"rounds": 0}, {"seed": -1}, {"checkpoint_every": 0}, {"evaluate_every": -1}, {"keep_checkpoints": 0}]
)
def test_a_plan_out_of_range_is_refused(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=rf"^{name} must be >= \d, got {value}$"):
        Plan(**{"rounds": 4} | wrong)


@dataclass(frozen=True)
class Shifted(Client):
    """Keeps a shift of its own, learnt as the mean of its labels, and never sends it."""

    def personal(self, rng):
        return {"shift": torch.zeros(())}

    def start(self, shared, personal, data):
        return {"shift": personal["shift"]}

    def step(self, state, batch):
        return {"shift": torch.where(batch["mask"], batch["y"].double(), 0.0).sum().float()}

    def finish(self, shared, state, data):
        return Reply({"params": shared["params"]}, data["mask"].sum().float(), personal=state)


@dataclass(frozen=True)
class CountsShift(Shifted):
    """Reports the shift that it finds, and what the strategy offers besides the model."""

    @property
    def split(self):
        return "test"

    def finish(self, shared, state, data):
        examples = data["mask"].sum()
        return Reply({}, examples.float(), metrics={"examples": examples, "offered": shared["offer"] * examples})

    def step(self, state, batch):
        return state


@dataclass(frozen=True)
class Offers(FedAvg):
    """Offers a number besides the model to those who evaluate."""

    def shared(self, state):
        return {"params": state["params"], "offer": torch.tensor(7.0)}


def test_evaluation_gets_what_the_strategy_offers_and_what_clients_keep_even_on_the_common_test_set(folder):
    federation = objects()["federation"]
    common = {name: column[:5] for name, column in federation.columns.items()}
    result = simulate(
        **objects(
            federation=replace(federation, test=common),
            strategy=Offers(),
            clients={"train": Shifted(), "evaluate": CountsShift()},
            plan=Plan(rounds=2, name="offers"),
        )
    )
    assert result.last("test/offered") == 7 and result.last("clients/offered") == 7


def test_a_users_model_is_the_same_however_much_was_drawn_before(folder):
    first = run(tables(rounds=1, model={"use": "plugin.py:drawn"}))
    torch.rand(3)
    again = run(tables(rounds=1, model={"use": "plugin.py:drawn"}))
    other = run(tables(rounds=1, model={"use": "plugin.py:drawn"}), changes=["seed=3"])
    assert final(first) == final(again) != final(other)


def test_what_is_written_down_is_what_was_run_with_every_default(folder):
    (written, _) = read(run(tables(rounds=1)).path / "experiment.toml")
    assert written.strategy == {"use": "strategies.fedavg:FedAvg", "lr": 1.0}
    assert written.clients["train"]["epochs"] == Sgd(model=objects()["model"], lr=0.1).epochs


def test_a_measure_that_is_named_like_one_of_the_run_is_refused(folder):
    with pytest.raises(ValueError, match="round 1: the strategy measures 'seconds', a name that every round has"):
        run(tables(strategy={"use": "plugin.py:Clashing"}))


def test_a_run_that_is_being_written_is_left_alone(folder):
    path = run(tables()).path
    with Run.open(path).locked(), pytest.raises(ConfigError, match=f"{path} is being written by another process"):
        resume(path, rounds=5)
    assert len(resume(path, rounds=5).metrics) == 5


def test_what_an_evaluation_of_the_clients_costs_is_counted_where_there_was_one(folder):
    first, second = run(tables(rounds=2, evaluate_every=2)).metrics
    assert "evaluate/bytes_down" not in first
    assert second["evaluate/bytes_down"] == first["bytes_down"] > 0  # the same model to the same clients
    assert second["evaluate/bytes_up"] > 0


def test_a_plug_in_that_was_changed_since_is_warned_of(folder, caplog):
    path = run(tables(rounds=1)).path
    resume(path, rounds=2)
    assert not caplog.records
    with (folder / "plugin.py").open("a") as file:
        file.write("\n")
    resume(path, rounds=3)
    assert [record.getMessage() for record in caplog.records] == [
        f"{folder / 'plugin.py'} was changed since the run in {path} began: the run may not be of one piece"
    ]


def content(enough: int, **others: Any) -> Tables:
    return tables(strategy={"use": "plugin.py:Content", "enough": enough}) | others


def test_a_run_ends_with_the_round_in_which_the_strategy_is_done_evaluated_and_kept(folder):
    result = run(content(3, rounds=9, evaluate_every=2, checkpoint_every=5))
    assert [line["round"] for line in result.metrics] == [1, 2, 3]
    assert [line["round"] for line in result.metrics if "clients/loss" in line] == [2, 3]
    assert [line.get("converged") for line in result.metrics] == [None, None, 1]
    assert [file.name for file in (result.path / "checkpoints").iterdir()] == ["round-000003.safetensors"]
    others = run(content(9, rounds=3, evaluate_every=2, checkpoint_every=5))
    assert quiet(others.metrics)[:2] == quiet(result.metrics)[:2]
    assert quiet(others.metrics)[2] | {"converged": 1} == quiet(result.metrics)[2]
    assert all(torch.equal(others.params[name], leaf) for name, leaf in result.params.items())


def test_a_strategy_that_is_done_when_its_rounds_are_over_is_done_too(folder):
    assert [line.get("converged") for line in run(content(4, rounds=4)).metrics] == [None] * 3 + [1]
    assert not any("converged" in line for line in run(content(5, rounds=4)).metrics)


def test_a_run_whose_strategy_is_done_has_nothing_more_to_do_when_it_is_resumed(folder):
    first = run(content(3, rounds=9, evaluate_every=2))
    before = {file.name: file.read_bytes() for file in first.path.iterdir() if file.is_file()}
    again = resume(first.path)
    assert again.metrics == first.metrics
    assert before == {file.name: file.read_bytes() for file in first.path.iterdir() if file.is_file()}
    longer = resume(first.path, rounds=50)
    assert longer.metrics == first.metrics and final(longer) == final(first)
    assert all(torch.equal(longer.params[name], leaf) for name, leaf in first.params.items())


def test_a_run_that_was_left_before_its_strategy_was_done_goes_on_until_it_is(folder):
    straight = run(content(5, rounds=9), root="straight")
    short = run(content(5, rounds=3))
    assert not any("converged" in line for line in short.metrics)
    longer = resume(short.path, rounds=9)
    assert quiet(longer.metrics) == quiet(straight.metrics) and final(longer) == final(straight)
    assert [line["round"] for line in longer.metrics if "converged" in line] == [5]


def test_a_measure_that_is_named_like_the_end_of_a_run_is_refused(folder):
    with pytest.raises(ValueError, match="round 1: the strategy measures 'converged', a name that every round has"):
        run(tables(strategy={"use": "plugin.py:Boasting"}))


NOTIONS = ("demographic_parity", "equal_opportunity", "equalised_odds")
APART = {f"{notion}_{measure}" for notion in NOTIONS for measure in ("gap", "deviation")}


def test_groups_with_names_are_told_apart_in_all_that_a_run_writes_down(folder):
    result = run(tables(evaluate_every=2, data={"use": "plugin.py:grouped"}))
    names = {f"clients/{prefix}{name}" for name in APART for prefix in ("", "local_")}
    assert [names <= line.keys() for line in result.metrics] == [False, True, False, True]
    assert not any(names & line.keys() for line in result.metrics[::2])
    found = json.loads((result.path / "evaluation.json").read_text())["clients"]
    groups = torch.tensor(found["groups"])
    assert groups.shape == (2, 3, 3) and found["group_names"] == ["one", "other"]
    assert groups.sum(0).tolist() == found["confusion"] and int(groups.sum()) == found["examples"]
    assert {name: found[name] for name in APART} == {name: result.last(f"clients/{name}") for name in APART}
    header, *rows = (result.path / "clients.csv").read_text().splitlines()
    assert set(header.split(",")) == {"client", "examples", "accuracy", "loss"} | APART
    place = header.split(",").index("demographic_parity_gap")
    worst = max(float(row.split(",")[place]) for row in rows)
    assert worst == result.last("clients/local_demographic_parity_gap") > 0


def test_groups_without_names_are_not_told_apart(folder):
    result = run(tables(evaluate_every=2, data={"use": "plugin.py:grouped", "named": ["y"]}))
    assert not any(name.endswith(("_gap", "_deviation")) for line in result.metrics for name in line)
    found = json.loads((result.path / "evaluation.json").read_text())["clients"]
    assert "confusion" in found and not {"groups", "group_names"} & found.keys()
    assert (result.path / "clients.csv").read_text().splitlines()[0] == "client,examples,loss,accuracy"


def test_a_simulation_of_objects_tells_groups_apart_on_the_common_test_set_too(folder):
    federation = assemble(*read(tables(data={"use": "plugin.py:grouped"}))).federation
    common = {name: column[:40] for name, column in federation.columns.items()}
    result = simulate(**objects(federation=replace(federation, test=common), plan=Plan(rounds=1, name="common")))
    found = json.loads((result.path / "evaluation.json").read_text())
    assert torch.tensor(found["test"]["groups"]).sum() == 40
    assert torch.tensor(found["test"]["groups"]).sum((1, 2)).tolist() == torch.bincount(common["a"]).tolist()
    assert {f"clients/local_{name}" for name in APART} < result.metrics[0].keys()
    tests = {name.removeprefix("test/") for name in result.metrics[0] if name.startswith("test/")}
    assert tests == {"loss", "accuracy"} | APART  # of parts that are no clients' there is no largest


def test_a_run_that_is_there_is_loaded_as_it_was_given_back(tmp_path):
    changes = ("rounds=3", "checkpoint_every=1", "keep_checkpoints='all'")
    first, second = (run("fedavg/digits", changes=(*changes, f"seed={seed}"), root=tmp_path) for seed in (5, 6))
    for given, found in (
        (first, load(first.path)),
        (first, load(str(first.path.parent), seed=5)),
        (second, load(first.path.parent)),
    ):
        assert (found.metrics, found.path) == (given.metrics, given.path)
        assert all(torch.equal(leaf, given.params[name]) for name, leaf in found.params.items())
        assert found.params.keys() == given.params.keys()
    parts = assemble(*read(first.path / "experiment.toml"))
    guess = parts.model.predict(load(first.path).params, parts.federation.test).argmax(1)
    assert float((guess == parts.federation.test["y"]).double().mean()) == first.last("test/accuracy")
    with pytest.raises(FileNotFoundError, match="is no run, nor does it hold one with the seed 7"):
        load(first.path.parent, seed=7)
