"""Forgetting from disk: it begins with the model of another run, and stops in any phase to go on to the same bits."""

import shutil

import pytest
import torch

import fedsim
from fedsim.config import ConfigError, assemble, read
from fedsim.runs import Run, read_checkpoint
from strategies.forget import Forget

DATA = {
    "data": {"use": "fedsim.data.datasets:gaussians", "examples": 120, "classes": 3, "features": 4},
    "partition": {"use": "fedsim.data.partition:dirichlet", "clients": 4, "alpha": 1.0},
    "model": {"use": "fedsim.networks:mlp", "hidden": [4]},
}
SGD = {"use": "clients.sgd:Sgd", "lr": 0.1, "batch_size": 8}
TRAINING = DATA | {
    "name": "training",
    "rounds": 3,
    "strategy": {"use": "strategies.fedavg:FedAvg"},
    "clients": {"train": SGD},
}
FORGETTING = DATA | {
    "name": "forgetting",
    "rounds": 13,
    "checkpoint_every": 1,
    "split": {"use": "fedsim.data.targets:marked", "requests": [{"class": 1}, {"class": 0, "client": [0, 1, 2]}]},
    "strategy": {
        "use": "strategies.forget:Forget",
        "training": 3,
        "forgetting": 2,
        "repairing": 2,
        "remember": "importance",
    },
    "clients": {
        "train": SGD,
        "weigh": {"use": "clients.weigh:Weigh"},
        "forget": {"use": "clients.forget:ForgetWhileTraining", "lr": 0.1, "memory": "mix", "strength": 1.0},
        "repair": {"use": "clients.retained:Retained", "client": SGD},
    },
}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(tables, *changes):
    return fedsim.run(tables, changes=changes)


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(leaf, other[name]) for name, leaf in one.items())


def state(path):
    """All that the last checkpoint of a run holds."""
    return read_checkpoint(Run.open(path).checkpoints()[-1])[0]


# A run before.


def test_it_begins_with_the_last_model_of_a_run():
    before = run(TRAINING)
    changes = [f"strategy.from_run={before.path}", "strategy.training=0"]
    assert same(run(FORGETTING, *changes, "rounds=1").params, before.params), "at first it weighs"
    found = run(FORGETTING, *changes)
    assert [line.get("request", 0) for line in found.metrics] == [1] * 5 + [2] * 5
    assert not same(found.params, before.params)
    for name, leaf in Forget(4, 3, from_run=before.path, remember="model").init(found.params)["before"].items():
        assert torch.equal(leaf, before.params[name])


def test_of_a_folder_of_runs_it_takes_the_latest_with_the_same_seed():
    models = {seed: run(TRAINING, f"seed={seed}").params for seed in (1, 2)}
    again = run(TRAINING, "seed=2", "rounds=4").params
    for seed, expected in ((1, models[1]), (2, again)):
        made = assemble(read(FORGETTING, [f"seed={seed}", "strategy.from_run=runs/training", "strategy.training=0"])[0])
        assert same(made.strategy.init(made.model.params)["params"], expected)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ("model.hidden=[5]", r"the model of .* does not fit: 1.bias has shape \(4,\), expected \(5,\); 1.weight has"),
        ("model.hidden=[4, 4]", r"does not fit: .*missing 5.bias; missing 5.weight"),
        ("model={use='fedsim.networks:logistic'}", r"does not fit: .*surplus 3.bias; surplus 3.weight"),
        ("seed=9", r"runs/training is no run, nor does it hold one with the seed 9"),
        ("strategy.from_run=runs/nothing", r"runs/nothing is no run, nor does it hold one with the seed 0"),
        ("strategy.training=2", r"training = 2 and from_run = '.*runs/training': there can be one only"),
    ],
)
def test_a_run_that_does_not_fit_or_is_not_there_is_refused_before_anything_runs(folder, change, complaint):
    run(TRAINING, "rounds=1")
    changes = ["strategy.from_run=runs/training", "strategy.training=0", change]
    with pytest.raises(ConfigError, match=f"strategy: strategies.forget:Forget: .*{complaint}"):
        fedsim.run(FORGETTING, changes=changes)
    assert not (folder / "runs" / "forgetting").exists()


def test_a_run_without_a_checkpoint_is_refused():
    before = run(TRAINING)
    shutil.rmtree(before.path / "checkpoints")
    with pytest.raises(ConfigError, match="has no checkpoint to take a model from"):
        run(FORGETTING, f"strategy.from_run={before.path}", "strategy.training=0")


# A run that stops.


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nobody stopped."""
    return fedsim.run(FORGETTING, root=tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("stop", [2, 4, 6, 9])
def test_a_run_that_stops_anywhere_goes_on_to_the_same_bits(whole, stop):
    # Rounds: 3 of training; then for each request one to weigh, 2 to forget, 2 to repair.
    half = run(FORGETTING, f"rounds={stop}")
    assert len(half.metrics) == stop and not same(half.params, whole.params)
    ended = fedsim.resume(half.path, rounds=13)
    assert same(state(ended.path), state(whole.path))
    assert [line.get("request", 0) for line in ended.metrics] == [0] * 3 + [1] * 5 + [2] * 5
    for one, other in zip(ended.metrics, whole.metrics, strict=True):
        assert {k: v for k, v in one.items() if k != "seconds"} == {k: v for k, v in other.items() if k != "seconds"}


def test_it_ends_with_its_plan_whatever_the_number_of_rounds(whole):
    longer = run(FORGETTING, "rounds=40")
    assert len(longer.metrics) == 13 and same(state(longer.path), state(whole.path))


def test_what_is_remembered_is_in_the_checkpoint_and_the_same_on_every_engine(whole):
    names = {name.split("/")[1] for name in state(whole.path)}
    assert names == {"params", "before", "omega", "phase", "rounds", "holders"}
    again = run(FORGETTING, "engine.use=vectorised")
    for name, leaf in state(whole.path).items():
        torch.testing.assert_close(state(again.path)[name], leaf, rtol=1e-4, atol=1e-5)
