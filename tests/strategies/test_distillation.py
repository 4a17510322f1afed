"""Distillation: FedAvg without steps, at rest where all agree, and led by the majority where they do not."""

from itertools import islice

import numpy as np
import pytest
import torch
from torch import nn

from fedsim import tree
from fedsim.config import ConfigError, assemble, read
from fedsim.data.dataset import Dataset
from fedsim.model import Model, gradient, squared_error
from fedsim.networks import seeded
from fedsim.simulation import begin, rounds
from fedsim.task import Replies, Task
from fedsim.testing import check_strategy
from fedsim.transport.discrete import plan
from strategies.distillation import Distillation, held_out, noise
from strategies.fedavg import FedAvg

ORDINAL = tuple(tuple(float(abs(i - j)) for j in range(4)) for i in range(4))
UNIFORM = tuple(tuple(float(i != j) for j in range(4)) for i in range(4))
COSTS = {"uniform": "uniform", "ordinal": "ordinal", "a table": ORDINAL}
every_cost = pytest.mark.parametrize("cost", COSTS.values(), ids=COSTS)


def made(seed, dtype=torch.float32):
    return Model(seeded(seed, lambda: nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4)).to(dtype)))


def probe(examples=40):
    generator = torch.Generator().manual_seed(0)
    return Dataset("probe", {"x": 3 * torch.randn(examples, 3, generator=generator)})


def replies(clients, weight):
    weight = torch.tensor(weight, dtype=torch.float64)
    return Replies(list(range(len(clients))), weight, {"params": tree.stack(clients)})


def aggregate(strategy, clients, weight, round=1):
    state = strategy.init(clients[0])
    return strategy.aggregate(state, Task("train", state, round=round), replies(clients, weight))


def laws(strategy, clients):
    """The clients' probabilities on the probe set, (C, n, K)."""
    x = strategy.inputs
    model = strategy.exact
    with torch.no_grad():
        outputs = [model.outputs(tree.map(torch.Tensor.double, client), {"x": x}) for client in clients]
    return torch.stack(outputs).softmax(2).numpy()


def distance(found, expected):
    return max(float((found[name] - leaf).abs().max()) for name, leaf in expected.items())


CLIENTS = [made(seed).params for seed in range(4)]


def test_without_steps_it_is_fedavg_to_the_bit():
    few = ["partition.clients=20", "model.hidden=[16]", "strategy={use='strategies.distillation:Distillation', steps=0,"
           "probe={use='strategies.distillation:noise'}}"]  # fmt: skip
    parts = assemble(*read("fedavg/digits", few))
    assert isinstance(parts.strategy, Distillation)
    ends = []
    for strategy in (FedAvg(), parts.strategy):
        start = begin(strategy, parts.model.params, parts.clients, 20, 1)
        steps = islice(rounds(strategy, parts.engine, parts.sample, start), 4)
        ends.append(list(steps)[-1].snapshot.state["params"])
    assert all(torch.equal(ends[0][name], leaf) for name, leaf in ends[1].items())
    assert distance(ends[1], parts.model.params) > 1e-2


@every_cost
@pytest.mark.parametrize("clients", [1, 3])
def test_where_all_clients_agree_the_model_stays(cost, clients):
    strategy = Distillation(made(0), probe(), cost, lr=0.1)
    own = CLIENTS[1]
    target = torch.from_numpy(strategy.targets(laws(strategy, [own] * clients), np.ones(clients)))
    _, slope = gradient(strategy._loss, tree.map(torch.Tensor.double, own), strategy.inputs, target)
    assert float(tree.norm(slope)) < 1e-6
    state, metrics = aggregate(strategy, [own] * clients, [2.0] * clients)
    assert distance(state["params"], own) < 1e-6
    assert metrics["divergence/before"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("cost", ["uniform", "ordinal"])
def test_with_a_temperature_the_targets_are_blurred_the_more_the_higher(cost):
    blur = []
    for temperature in (0.1, 0.3, 1.0):
        strategy = Distillation(made(0), probe(), cost, temperature)
        own = laws(strategy, [CLIENTS[1]] * 2)
        blur.append(np.abs(strategy.targets(own, np.ones(2)) - own[0]).sum(1).mean())
    assert blur[0] < blur[1] < blur[2]
    state, metrics = aggregate(strategy, [CLIENTS[1]] * 2, [1.0, 1.0])
    assert metrics["divergence/after"] < metrics["divergence/before"]
    assert distance(state["params"], CLIENTS[1]) > 1e-4


@every_cost
def test_a_majority_decides_the_target_and_the_mean_of_outputs_it_does_not(cost):
    strategy = Distillation(made(0), probe(), cost)
    weight = np.array([1.0, 2.0, 2.0, 4.0])  # the odd one has 4/9
    own = laws(strategy, [CLIENTS[1], CLIENTS[1], CLIENTS[1], CLIENTS[2]])
    np.testing.assert_allclose(strategy.targets(own, weight), own[0], atol=1e-6)
    mean = np.tensordot(weight / 9, own, 1)
    assert np.abs(mean - own[0]).max() > 0.1
    heavier = strategy.targets(own, np.array([1.0, 1.0, 1.0, 4.0]))
    np.testing.assert_allclose(heavier, own[3], atol=1e-6)


def test_the_named_costs_are_what_the_same_tables_give():
    weight = np.array([1.0, 2.0, 3.0, 2.5])
    for name, table in (("uniform", UNIFORM), ("ordinal", ORDINAL)):
        own = laws(Distillation(made(0), probe()), CLIENTS)
        found, expected = (Distillation(made(0), probe(), cost).targets(own, weight) for cost in (name, table))
        for k in range(0, len(found), 5):  # there may be several barycenters
            spent = [
                sum(w * (plan(table, law, q) * np.array(table)).sum() for w, law in zip(weight, own[:, k], strict=True))
                for q in (found[k], expected[k])
            ]
            assert spent[0] == pytest.approx(spent[1], abs=1e-6)
        warm, same = (Distillation(made(0), probe(), cost, 0.5).targets(own, weight) for cost in (name, table))
        np.testing.assert_array_equal(warm, same)


@every_cost
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_steps_lead_the_mean_to_the_barycenter(cost, dtype):
    clients = [made(seed, dtype).params for seed in range(4)]
    strategy = Distillation(made(9, dtype), probe(), cost, steps=200, lr=0.01)
    state, metrics = aggregate(strategy, clients, [1.0, 2.0, 3.0, 0.0])
    assert metrics["divergence/after"] < 0.3 * metrics["divergence/before"]
    assert all(leaf.dtype == dtype for leaf in state["params"].values())
    without, _ = aggregate(strategy, clients[:3], [1.0, 2.0, 3.0])
    assert distance(state["params"], without["params"]) == 0, "who has no examples does not count"
    order = [2, 0, 1]
    other, _ = aggregate(strategy, [clients[k] for k in order], [[1.0, 2.0, 3.0][k] for k in order])
    if cost in ("uniform", "ordinal"):
        assert distance(state["params"], other["params"]) < 1e-5
    assert aggregate(strategy, clients, [0.0] * 4)[0] == {"params": clients[0]}


def test_one_step_is_adams_first_from_the_mean():
    strategy = Distillation(made(0, torch.float64), probe(), steps=1, lr=0.01, batch_size=100)
    clients = [made(seed, torch.float64).params for seed in (1, 2)]
    state, metrics = aggregate(strategy, clients, [1.0, 3.0])
    target = torch.from_numpy(strategy.targets(laws(strategy, clients), np.array([1.0, 3.0])))
    mean = {name: (0.25 * leaf + 0.75 * clients[1][name]).requires_grad_() for name, leaf in clients[0].items()}
    torch.nn.functional.cross_entropy(strategy.exact.outputs(mean, {"x": strategy.inputs}), target).backward()
    for name, leaf in mean.items():
        expected = leaf - 0.01 * leaf.grad / (leaf.grad.abs() + 1e-8)
        torch.testing.assert_close(state["params"][name], expected.detach(), rtol=0, atol=1e-9)
    own = torch.log_softmax(strategy.exact.outputs(mean, {"x": strategy.inputs}), 1).detach()
    divergence = torch.nn.functional.kl_div(own, target, reduction="batchmean")
    assert metrics["divergence/before"] == pytest.approx(float(divergence), abs=1e-9)


def test_batches_depend_on_seed_and_round_alone():
    def end(round=1, seed=0):
        return aggregate(Distillation(made(0), probe(), batch_size=8, seed=seed), CLIENTS, [1.0] * 4, round)[0][
            "params"
        ]

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        assert distance(end(), end()) == 0
    assert distance(end(), end(round=2)) > 0 and distance(end(), end(seed=1)) > 0


def test_it_keeps_the_promises_of_strategies():
    for strategy in (Distillation(made(0), probe(), steps=3), Distillation(made(0), probe(), ORDINAL, 0.5, 2)):
        check_strategy(strategy, CLIENTS[0], replies(CLIENTS, [1.0, 2.0, 3.0, 4.0]))


# Probe sets.


def test_noise_has_the_shape_of_the_data_and_nothing_else_of_it(classification):
    model, federation = classification()
    for law, mean, deviation in (("uniform", 0.5, 12**-0.5), ("normal", 0.0, 1.0)):
        x = noise(federation, model, 4000, law, seed=1).columns["x"]
        assert x.shape == (4000, 5) and x.dtype == torch.float32
        assert float(x.mean()) == pytest.approx(mean, abs=0.02) and float(x.std()) == pytest.approx(deviation, abs=0.02)
        federation.columns["x"] = federation.columns["x"] * 7 + 1
        assert torch.equal(x, noise(federation, model, 4000, law, seed=1).columns["x"])
        assert not torch.equal(x, noise(federation, model, 4000, law, seed=2).columns["x"])


def test_a_public_set_is_held_out_and_what_clients_hold_is_refused(classification):
    model, federation = classification()
    public = Dataset("public", {"x": torch.arange(60.0).reshape(12, 5), "y": torch.arange(12)})
    found = held_out(federation, model, public, examples=7, seed=1)
    assert found.columns.keys() == {"x"}
    assert {tuple(row) for row in found.columns["x"].tolist()} < {tuple(row) for row in public.columns["x"].tolist()}
    assert len(found.columns["x"].unique(dim=0)) == 7
    with pytest.raises(ValueError, match="examples must be at most 12, as many as public has; got 500"):
        held_out(federation, model, public)
    with pytest.raises(ValueError, match="private is what the clients hold: a probe set must be public"):
        held_out(federation, model, Dataset("private", {"x": federation.columns["x"]}), 7)
    with pytest.raises(ValueError, match="other has no column x, only z"):
        held_out(federation, model, Dataset("other", {"z": torch.ones(3)}), 2)


def test_noise_stands_for_numbers_alone(classification):
    model, federation = classification()
    federation.columns["x"] = federation.columns["x"].long()
    with pytest.raises(ValueError, match="column x of .* holds torch.int64"):
        noise(federation, model)


@pytest.mark.parametrize("name", ["digits", "digits-public"])
def test_its_experiments_have_probe_sets_that_no_client_holds(name):
    parts = assemble(*read(f"distillation/{name}"))
    assert len(parts.strategy.probe) == 500 and parts.strategy.probe.columns.keys() == {"x"}
    federation = parts.federation
    known = {row.numpy().tobytes() for row in torch.cat([federation.columns["x"], federation.test["x"]])}
    found = sum(row.numpy().tobytes() in known for row in parts.strategy.probe.columns["x"])
    assert found < 5  # some digits are there twice


def test_a_catalogues_data_set_can_be_a_probe_set():
    use = "strategy={use='strategies.distillation:Distillation', probe={%s}}"
    gaussians = "use='fedsim.data.datasets:gaussians', features=64, examples=30"
    with pytest.raises(ConfigError, match=r"strategy: .*the model cannot predict.*\(24, 8\)"):
        assemble(*read("fedavg/digits", [use % gaussians.replace("64", "8")]))
    assert len(assemble(*read("fedavg/digits", [use % gaussians])).strategy.probe) == 24
    nested = f"use='strategies.distillation:held_out', examples=20, dataset={{{gaussians}}}"
    assert len(assemble(*read("fedavg/digits", [use % nested])).strategy.probe) == 20


# What is not right is refused.


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"steps": -1}, "steps must be >= 0, got -1"),
        ({"temperature": -0.1}, "temperature must be >= 0, got -0.1"),
        ({"lr": 0.0}, "lr must be > 0, got 0.0"),
        ({"batch_size": 0}, "batch_size must be >= 1, got 0"),
        ({"cost": "euclidean"}, "cost must be one of 'uniform', 'ordinal', got 'euclidean'"),
        ({"cost": ((0.0, 1.0), (1.0,))}, r"cost must be square, got rows of \[2, 1\] entries"),
        ({"cost": ((0.0, 1.0),)}, r"cost must be square, got rows of \[2\] entries"),
        ({"cost": ((0.0, -1.0), (1.0, 0.0))}, r"cost\[0\]\[1\] must be >= 0, got -1.0"),
        ({"probe": torch.ones(3, 3)}, "probe must be a Dataset, such as noise.* makes, got a Tensor"),
        ({"probe": Dataset("z", {"z": torch.ones(3)})}, "probe has no column x, which the model reads; it has z"),
        ({"probe": Dataset("none", {"x": torch.ones(0, 3)})}, "probe must hold an example, it is empty"),
    ],
)
def test_what_is_out_of_range_is_refused(arguments, told):
    with pytest.raises(ValueError, match=told):
        Distillation(made(0), **({"probe": probe()} | arguments))


def test_what_does_not_fit_the_model_is_refused_before_a_round():
    wrong = Dataset("wrong", {"x": torch.ones(6, 5)})
    with pytest.raises(ValueError, match=r"cannot predict the probe set of shape \(6, 5\)"):
        Distillation(made(0), wrong).init(CLIENTS[0])
    with pytest.raises(ValueError, match="cost must have 4 rows, one for each class of the model; got 2"):
        Distillation(made(0), probe(), ((0.0, 1.0), (1.0, 0.0))).init(CLIENTS[0])
    number = Model(nn.Linear(3, 1), squared_error)
    with pytest.raises(ValueError, match=r"must give logits of K classes, \(n, K\); it gives \(1, 1\)"):
        Distillation(number, probe()).init(number.params)


def test_a_temperature_too_low_is_told():
    strategy = Distillation(made(0), probe(), "ordinal", 1e-5)
    with pytest.raises(ValueError, match="temperature = 1e-05 is too low for costs up to 3"):
        aggregate(strategy, CLIENTS, [1.0] * 4)
