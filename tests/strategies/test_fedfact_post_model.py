"""Where the model that FedFACT calibrates after training comes from."""

import numpy as np
import pytest
import torch
from torch import nn

from clients.sgd import Sgd
from fedsim import tree
from fedsim.data.federation import Federation
from fedsim.data.generated import gaussian_task
from fedsim.engines.local import Sequential
from fedsim.model import Model
from fedsim.personal import Personal
from fedsim.runs import Run
from fedsim.simulation import Snapshot
from strategies.fedavg import FedAvg
from strategies.fedfact_post import FedFactPost


def sample(examples=300, dtype=torch.float32, outputs=3):
    """Three clients with two numbers and a group, and a small network."""
    columns = gaussian_task(examples, 3).columns
    order = columns["client"].argsort(stable=True)
    end = columns["client"].bincount().cumsum(0).numpy()
    bounds = np.stack([np.concatenate([[0], end[:-1]]), end, end, end], axis=1)
    chosen = {name: columns[name][order] for name in ("x", "y", "a")}
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, outputs)).to(dtype)
    return Federation(chosen | {"x": chosen["x"].to(dtype)}, np.arange(examples), bounds), Model(module)


def test_it_trains_first_as_federated_averaging_does_then_measures_and_calibrates_that_model(finite):
    fed, model = sample()
    _, clients = finite.prepare(fed, model, "DP", 0.02, 0.05, 3, 2, 0.1, 0.0, 5.0)
    clients["train"] = Sgd(model=model, lr=0.1, batch_size=16)
    strategy = FedFactPost(3, 2, 3, "demographic parity", 0.02, temperature=0.1, training=4)
    engine = finite.Listening(fed, clients)
    done = finite.play(strategy, engine, clients, model, 7, 3)
    assert [task.action for task, _ in engine.heard] == ["train"] * 4 + ["measure"] + ["calibrate"] * 2
    averaged = finite.play(FedAvg(), engine, clients, model, 4, 3)[-1].snapshot.state["params"]
    kept = done[-1].snapshot.personal.gather([0, 1, 2])["params"]
    for name, leaf in averaged.items():
        assert torch.equal(done[-1].snapshot.state["params"][name], leaf)
        assert all(torch.equal(own, leaf) for own in kept[name])
        assert not torch.equal(leaf, model.params[name])
    assert not done[3].snapshot.state["measured"].any() and done[-1].snapshot.state["ahead"].any()


def save(folder, params, seed, round=3):
    """A run that ended with this model."""
    run = Run.create(folder, "fedavg", seed, "", {})
    run.save(Snapshot(round, {"params": params}, Personal({}, 3, seed)), "all")
    return run.path


def strategy_from(path, **settings):
    return FedFactPost(3, 2, 3, from_run=path, **settings)


def test_the_model_may_come_from_another_run_or_from_the_one_with_the_same_seed(tmp_path):
    _, model = sample()
    paths = [save(tmp_path, tree.map(lambda leaf, s=s: torch.full_like(leaf, s), model.params), s) for s in (1, 2, 12)]
    for path, seed, expected in ((paths[0], 2, 1), (tmp_path / "fedavg", 2, 2), (tmp_path / "fedavg", 12, 12)):
        found = strategy_from(path, seed=seed).init(model.params)["params"]
        assert found.keys() == model.params.keys()
        assert all((leaf == expected).all() for leaf in found.values())
    save(tmp_path, tree.map(torch.zeros_like, model.params), 2)  # a later one
    later = strategy_from(tmp_path / "fedavg", seed=2).init(model.params)["params"]
    assert not any(leaf.any() for leaf in later.values())


def test_it_is_measured_from_the_first_round_on(tmp_path, finite):
    fed, model = sample()
    trained = tree.map(lambda leaf: leaf + 0.5, model.params)
    _, clients = finite.prepare(fed, model, "DP", 0.02, 0.05, 3, 2, 0.02, 0.0, 5.0)
    done = finite.play(strategy_from(save(tmp_path, trained, 0)), Sequential(fed, clients), clients, model, 2, 3)
    kept = done[-1].snapshot.personal.gather([0, 1, 2])["params"]
    assert all(torch.equal(kept[name][k], leaf) for name, leaf in trained.items() for k in range(3))


def test_what_is_no_run_or_another_model_is_refused_and_so_is_to_train_as_well(tmp_path):
    _, model = sample()
    run = save(tmp_path, model.params, 1)
    with pytest.raises(FileNotFoundError, match="nowhere is no run, nor does it hold one with the seed 0"):
        strategy_from(tmp_path / "nowhere").init(model.params)
    with pytest.raises(FileNotFoundError, match="fedavg is no run, nor does it hold one with the seed 7"):
        strategy_from(tmp_path / "fedavg", seed=7).init(model.params)
    _, blind = sample(outputs=6)
    with pytest.raises(ValueError, match=r"the model of .*-1 does not fit: 2\.bias has shape \(3,\), expected \(6,\)"):
        strategy_from(run).init(blind.params)
    with pytest.raises(ValueError, match="training = 2 and from_run = '.*-1': there can be one only"):
        strategy_from(run, training=2)
    bare = Run.create(tmp_path, "bare", 0, "", {}).path
    with pytest.raises(FileNotFoundError, match="has no checkpoint to take a model from"):
        strategy_from(bare).init(model.params)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"global_tolerance": -0.1}, "global_tolerance"),
        ({"bound": 0.0}, "bound"),
        ({"temperature": 0.0}, "temperature"),
        ({"gap": -1.0}, "gap"),
        ({"notion": "fairness"}, "notion must be one of"),
    ],
)
def test_settings_out_of_range_are_refused(settings, told):
    with pytest.raises(ValueError, match=told):
        FedFactPost(3, 2, 3, **settings)
