"""Flower's strategies in the place of ours: over our clients and engines, in experiments and in simulations of objects.

Where a strategy of Flower's computes what one of ours computes, or what the formula says, it comes out so; where its
formula is another one than ours, the test says which.
"""

import gc
import logging
import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import flwr.serverapp.strategy
import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from clients.prox import Prox
from clients.qfedavg import LossThenSgd
from clients.scaffold import ControlledSgd
from clients.sgd import Sgd
from fedsim import tree
from fedsim.checkpoints import read_checkpoint
from fedsim.client import Client
from fedsim.config import ConfigError
from fedsim.data.federation import Federation
from fedsim.engines.local import Sequential, Vectorised
from fedsim.evaluation import Evaluate
from fedsim.files import read_lines
from fedsim.flower import ClientNodes, SimulationGrid
from fedsim.foreign import Foreign, adopt
from fedsim.job import Plan
from fedsim.launch import resume, run, simulate
from fedsim.model import Model
from fedsim.personal import Personal
from fedsim.sampling import dropout, everyone, uniform
from fedsim.simulation import Snapshot, begin, rounds
from fedsim.task import Cohort, Draw, Metrics, Params, Task
from strategies.fedavg import FedAvg
from strategies.fedopt import FedOpt
from strategies.qfedavg import QFedAvg
from strategies.scaffold import Scaffold

SIZES = (4, 1, 7, 20, 33, 2, 9, 11)
N = len(SIZES)
SEED = 3
LR = 0.1  # the clients'
ENGINES = {"sequential": Sequential, "vectorised": Vectorised}
FLOWERS: dict[str, dict[str, Any]] = {
    "FedAvg": {},
    "FedAvgM": {"server_learning_rate": 0.9, "server_momentum": 0.5},
    "FedAdam": {"eta": 0.1, "tau": 0.1},
    "FedYogi": {"eta": 0.1, "tau": 0.1},
    "FedAdagrad": {"eta": 0.1, "tau": 0.1},
    "FedProx": {"proximal_mu": 0.1},
    "FedMedian": {},
    "FedTrimmedAvg": {"beta": 0.2},
    "Krum": {"num_malicious_nodes": 1},
    "MultiKrum": {"num_malicious_nodes": 1, "num_nodes_to_select": 3},
    "Bulyan": {"num_malicious_nodes": 1},
    "QFedAvg": {"client_learning_rate": LR, "q": 1.5, "train_loss_key": "loss"},
}


def flowers(name, **others):
    """A strategy of Flower's, which makes itself heard when it is made."""
    return getattr(flwr.serverapp.strategy, name)(**FLOWERS.get(name, {}) | others)


def sgd(model):
    return Sgd(model=model, lr=LR, momentum=0.5, epochs=2, batch_size=8)


class Played(NamedTuple):
    """What came of the rounds, as a Result tells it, and who failed."""

    params: Params
    metrics: list[Metrics]
    failed: list[dict[int, str]]


class Setting(NamedTuple):
    """Clients and data; called with a strategy, it takes the rounds that `simulate` takes, and leaves no directory."""

    model: Model
    federation: Federation
    clients: dict[str, Client]
    root: Path

    def __call__(self, strategy, number=2, engine=Sequential, seed=SEED, sample=None):
        strategy, sample = adopt(strategy, sample or everyone(N), N, seed)
        first = begin(strategy, self.model.params, self.clients, N, seed)
        loop = rounds(strategy, engine(self.federation, self.clients, seed), sample, first)
        steps = list(islice(loop, number))
        counts = [dict(zip(("bytes_down", "bytes_up"), step.traffic, strict=True)) for step in steps]
        for step, line in zip(steps, counts, strict=True):
            line |= step.metrics | {"clients": step.answered, "failed": len(step.failed)}
        return Played(strategy.params(steps[-1].snapshot.state), counts, [step.failed for step in steps])

    def simulate(self, strategy, number=2, engine=Sequential, evaluate_every=0, **others):
        plan = Plan(rounds=number, seed=SEED, evaluate_every=evaluate_every)
        made = {name: getattr(self, name) for name in ("model", "federation", "clients", "root")}
        return simulate(**made, strategy=strategy, plan=plan, engine=engine, **others)


@pytest.fixture
def setting(classification, tmp_path):
    def build(client=sgd, dtype=torch.float32, sizes=SIZES):
        model, federation = classification(sizes, dtype)
        counting = Evaluate(model=model, num_classes=3, part="train", batch_size=16)
        return Setting(model, federation, {"train": client(model), "evaluate": counting}, tmp_path)

    return build


def assert_near(found, expected, near=1e-6):
    assert found.keys() == expected.keys()
    for name, leaf in expected.items():
        assert found[name].dtype == leaf.dtype
        torch.testing.assert_close(found[name], leaf, rtol=near, atol=near, msg=lambda text, name=name: name + text)


def assert_far(found, expected, least=1e-4):
    assert max(float((found[name] - leaf).abs().max()) for name, leaf in expected.items()) > least


def assert_same_metrics(found, expected, near=1e-4):
    """All but what a clock measures, and the number of the round."""
    for one, other in zip(found, expected, strict=True):
        kept = [{name: line[name] for name in line.keys() - {"round", "seconds"}} for line in (one, other)]
        assert kept[0] == pytest.approx(kept[1], rel=near, abs=near / 100)


TABLES: dict[str, Any] = {
    "name": "small",
    "seed": SEED,
    "rounds": 2,
    "evaluate_every": 0,
    "checkpoint_every": 1,
    "data": {"use": "gaussians", "examples": 160, "classes": 3, "features": 4},
    "partition": {"use": "iid", "clients": N},
    "model": {"use": "mlp", "hidden": [5]},
    "strategy": {"use": "fedavg"},
    "clients": {"train": {"use": "sgd", "lr": LR, "batch_size": 8}},
    "engine": {"use": "sequential"},
}


def experiment(strategy, **others):
    """The tables of a small experiment with this strategy."""
    clients = {"train": {"use": "qfedavg", "lr": LR, "batch_size": 8}} if "QFedAvg" in strategy["use"] else {}
    return TABLES | {"strategy": strategy, "clients": clients or TABLES["clients"]} | others


def table(name, **others):
    return {"use": f"flwr.serverapp.strategy:{name}"} | FLOWERS.get(name, {}) | others


# All of them run, by objects and by tables, on both engines.


def local(name):
    """The local side of a strategy, Flower's or ours."""
    kind = {"QFedAvg": LossThenSgd, "Scaffold": ControlledSgd}.get(name)
    return sgd if kind is None else lambda model: kind(model=model, lr=LR, epochs=2, batch_size=8)


@pytest.mark.parametrize("name", FLOWERS)
def test_a_strategy_of_flowers_takes_part_in_a_simulation_and_gives_the_same_on_both_engines(setting, name):
    play = setting(local(name))
    one, other = play.simulate(flowers(name), engine=Vectorised), play(flowers(name), engine=Sequential)
    assert_near(other.params, one.params, 1e-5)
    assert_same_metrics(one.metrics, other.metrics)
    assert [line["clients"] for line in one.metrics] == [N] * 2
    assert_far(one.params, play.model.params, 1e-2)


@pytest.mark.parametrize("name", FLOWERS)
def test_a_strategy_of_flowers_is_named_in_a_table(tmp_path, name):
    one, other = (run(experiment(table(name), engine={"use": engine}), root=tmp_path) for engine in ENGINES)
    assert_near(other.params, one.params, 1e-5)
    assert_same_metrics(one.metrics, other.metrics)
    assert one.metrics[0]["train/loss"] != one.metrics[-1]["train/loss"]


def test_the_loop_evaluates_what_a_strategy_of_flowers_makes(tmp_path):
    found = run(experiment(table("FedMedian"), evaluate_every=1, rounds=6), root=tmp_path)
    assert [sorted(line.keys() & {"test/loss", "test/accuracy"}) for line in found.metrics] == [
        ["test/accuracy", "test/loss"]
    ] * 6
    assert found.metrics[-1]["test/loss"] < found.metrics[0]["test/loss"]


def test_what_a_table_tells_a_strategy_of_flowers_matters(tmp_path):
    full, half = (run(experiment(table("FedAdam", eta=eta)), root=tmp_path) for eta in (0.1, 0.05))
    assert_far(half.params, full.params, 1e-3)


@pytest.fixture
def frozen():
    """What is in memory already is no garbage: some of Flower's strategies collect it for each array."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("frozen")
@pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)
@pytest.mark.parametrize("name", FLOWERS)
def test_under_its_own_loop_over_our_nodes_it_gives_what_it_gives_in_a_simulation(setting, name, engine):
    play = setting(local(name))
    clients = ClientNodes(engine(play.federation, play.clients, SEED), Personal(play.clients, N, SEED))
    grid, initial = SimulationGrid(clients, N, SEED), ArrayRecord(play.model.module.state_dict())
    found = flowers(name).start(grid=grid, initial_arrays=initial, num_rounds=2)
    assert list(found.train_metrics_clientapp) == list(found.evaluate_metrics_clientapp) == [1, 2]
    params = {part: torch.from_numpy(array.numpy().copy()).float() for part, array in found.arrays.items()}
    assert_near(params, play(flowers(name), engine=engine).params, 1e-5)


# What they compute.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)
def test_fedavg_of_flowers_is_fedavg_of_ours(setting, engine, dtype):
    play, near = setting(dtype=dtype), 1e-12 if dtype == torch.float64 else 1e-6
    theirs, ours = play(flowers("FedAvg"), engine=engine), play(FedAvg(), engine=engine)
    assert_near(theirs.params, ours.params, near)
    assert_same_metrics(theirs.metrics, ours.metrics, near)
    assert_far(play(FedAvg(lr=0.9), engine=engine).params, ours.params, 1e-3)


def test_the_names_of_a_strategys_records_are_its_own(setting):
    play = setting()
    other = play(flowers("FedAvg", arrayrecord_key="weights", configrecord_key="orders"))
    assert_near(other.params, play(flowers("FedAvg")).params, 0)


def test_fedprox_of_flowers_is_fedavg_where_our_clients_pull_themselves(setting):
    """Its server side is FedAvg's, and the mu that it tells clients is none that ours listen to."""
    play = setting(lambda model: Prox(model=model, lr=LR, mu=0.5, epochs=2, batch_size=8))
    theirs = play(flowers("FedProx", proximal_mu=0.5))
    assert_near(theirs.params, play(FedAvg()).params)
    assert_far(theirs.params, setting()(FedAvg()).params, 1e-3)


def median(models):
    """Of an even number of models, the mean of the two in the middle."""
    ordered = models.sort(0).values
    return (ordered[(len(models) - 1) // 2] + ordered[len(models) // 2]) / 2


def trimmed(models, beta=0.2):
    cut = int(beta * len(models))
    return models.sort(0).values[cut : len(models) - cut].mean(0)


def leafwise(function):
    return lambda update: tree.map(function, update)


def krum(update, malicious=1):
    """The model whose N - f - 2 nearest others are nearest."""
    flat = torch.cat([leaf.flatten(1) for leaf in update.values()], 1)  # (C, P)
    distances = (flat[:, None] - flat[None]).square().sum(-1)  # (C, C)
    nearest = distances.sort(1).values[:, 1 : 1 + len(flat) - malicious - 2]
    return tree.take(update, int(nearest.sum(1).argmin()))


ORACLES: dict[str, Callable[[Any], Any]] = {
    "FedMedian": leafwise(median),
    "FedTrimmedAvg": leafwise(trimmed),
    "Krum": krum,
}


@pytest.mark.parametrize("drawn", [N, N - 1], ids=["an even number", "an odd number"])
@pytest.mark.parametrize("name", ORACLES)
def test_what_it_makes_of_the_clients_models_is_what_its_formula_says(setting, name, drawn):
    play = setting(dtype=torch.float64)
    sample = uniform(N, SEED, count=drawn)
    found = play(flowers(name), sample=sample)
    engine, params = Sequential(play.federation, play.clients, SEED), play.model.params
    for number in (1, 2):
        task = Task("train", {"params": params}, round=number, reduce="stack")
        params = ORACLES[name](engine.execute(task, Cohort(sample(number).ids)).update["params"])
    assert_near(found.params, params, 1e-12)
    assert_far(play(FedAvg(), sample=sample).params, params, 1e-3)


def ours(play, optimiser, start, number=2):
    """What our server optimisers make of the model, from a second moment that `start` gives; one for each round."""
    strategies = [optimiser(number) for number in range(1, number + 1)]
    engine = Sequential(play.federation, play.clients, SEED)
    snapshot = begin(strategies[0], play.model.params, play.clients, N, SEED)
    snapshot = Snapshot(0, start(snapshot.state), snapshot.personal)
    for strategy in strategies:
        snapshot = next(rounds(strategy, engine, everyone(N), snapshot)).snapshot
    return snapshot.state["params"]


def from_zero(state):
    return state | {"second": tree.map(torch.zeros_like, state["second"])}


def adam(number, eta=0.1, beta1=0.9, beta2=0.99, tau=0.1):
    """Flower corrects the learning rate for the moments' start, the paper and we do not."""
    corrected = eta * np.sqrt(1 - beta2 ** (number + 1)) / (1 - beta1 ** (number + 1))
    return FedOpt("adam", float(corrected), beta1, beta2, tau)


OPTIMISERS: dict[str, tuple[Callable[[int], FedOpt], Callable[[Any], Any]]] = {
    "FedAvgM": (lambda number: FedOpt("momentum", lr=0.9, beta1=0.5), lambda state: state),
    "FedAdam": (adam, from_zero),
    "FedYogi": (lambda number: FedOpt("yogi", lr=0.1, beta1=0.9, beta2=0.99, tau=0.1), from_zero),
    "FedAdagrad": (lambda number: FedOpt("adagrad", lr=0.1, beta1=0.0, tau=0.1), from_zero),
}


@pytest.mark.parametrize("name", OPTIMISERS)
def test_flowers_server_optimisers_are_ours_where_the_formulas_agree(setting, name):
    """FedAvgM agrees; the others start from a second moment of 0, the paper and we from tau^2; Adam also see `adam`."""
    play = setting(dtype=torch.float64)
    optimiser, start = OPTIMISERS[name]
    found = play(flowers(name)).params
    assert_near(found, ours(play, optimiser, start), 1e-10)
    if name != "FedAvgM":
        assert_far(found, ours(play, optimiser, lambda state: state), 1e-3)
    if name == "FedAdam":
        assert_far(found, ours(play, lambda number: adam(0), from_zero), 1e-3)


def test_qfedavg_of_flowers_is_ours_where_every_client_has_examples(setting):
    """Both keep losses away from zero, but by 1e-10 that Flower adds and of which we make the least."""
    play = setting(local("QFedAvg"), dtype=torch.float64)
    found = play(flowers("QFedAvg"))
    assert_near(found.params, play(QFedAvg(q=1.5)).params, 1e-8)
    assert_far(found.params, play(QFedAvg(q=1.0)).params, 1e-4)


def test_qfedavg_of_flowers_counts_clients_without_examples_and_ours_does_not(setting):
    play = setting(local("QFedAvg"), dtype=torch.float64, sizes=(0, 1, 7, 20, 33, 2, 0, 11))
    theirs = play(flowers("QFedAvg", q=0.0))
    engine = Sequential(play.federation, play.clients, SEED)
    params = play.model.params
    for number in (1, 2):  # with q = 0 the step is the plain mean
        task = Task("train", {"params": params}, round=number, reduce="stack")
        params = tree.map(lambda leaf: leaf.mean(0), engine.execute(task, Cohort(range(N))).update["params"])
    assert_near(theirs.params, params, 1e-8)
    assert_far(theirs.params, play(QFedAvg(q=0.0)).params, 1e-3)


# Who takes part.


class Watching(flwr.serverapp.strategy.FedAvg):
    """Notes which nodes it sees, and who answers."""

    def __init__(self, **others):
        super().__init__(**others)
        self.there: list[list[int]] = []
        self.answers: list[tuple[list[int], dict[int, str]]] = []

    def __deepcopy__(self, memo):
        return self  # a run has a copy of its own, and this one is looked at afterwards

    def configure_train(self, server_round, arrays, config, grid):
        self.there.append(list(grid.get_node_ids()))
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(self, server_round, replies):
        replies = list(replies)
        good = [reply.metadata.src_node_id for reply in replies if not reply.has_error()]
        bad = {reply.metadata.src_node_id: reply.error.reason for reply in replies if reply.has_error()}
        self.answers.append((good, bad))
        return super().aggregate_train(server_round, replies)


class Listening(Sequential):
    """Notes who trains."""

    heard: list[tuple[int, ...]]

    def execute(self, task, cohort):
        if task.action == "train":
            self.heard.append(tuple(cohort.ids))
        return super().execute(task, cohort)


def listening(into):
    def engine(federation, clients, seed):
        made = Listening(federation, clients, seed)
        object.__setattr__(made, "heard", into)
        return made

    return engine


NODES = SimulationGrid(None, N, SEED).node_ids


def test_a_strategy_sees_those_that_were_drawn_and_those_that_dropped_out_fail(setting):
    play, strategy, heard = setting(), Watching(), []
    sample = dropout(uniform(N, SEED, count=6), 0.4, SEED)
    draws = [sample(number) for number in (1, 2)]
    assert any(draw.dropped for draw in draws) and len({tuple(draw.ids) for draw in draws}) > 1
    found = play(strategy, sample=sample, engine=listening(heard))
    assert strategy.there == [[NODES[client] for client in sorted([*draw.ids, *draw.dropped])] for draw in draws]
    assert [sorted(ids) for ids in heard] == [draw.ids for draw in draws]
    for draw, (good, bad) in zip(draws, strategy.answers, strict=True):
        assert sorted(good) == [NODES[client] for client in draw.ids]
        assert bad == {NODES[client]: "dropped out" for client in draw.dropped}
    assert [(line["clients"], line["failed"]) for line in found.metrics] == [
        (len(draw.ids), len(draw.dropped)) for draw in draws
    ]
    assert found.failed == [dict.fromkeys(draw.dropped, "dropped out") for draw in draws]
    same = play(FedAvg(), sample=sample)
    assert_near(found.params, same.params)
    down = [line["bytes_down"] for line in found.metrics]
    assert down == [line["bytes_down"] for line in same.metrics], "those that drop out were sent the model"


def test_what_a_strategy_remembers_of_a_run_does_not_reach_the_next_one(setting):
    play, strategy = setting(), flwr.serverapp.strategy.FedAdam(eta=0.05)
    first, second = (play(strategy) for _ in range(2))
    assert all(torch.equal(leaf, second.params[name]) for name, leaf in first.params.items())
    assert strategy.m_t is None


def test_the_samplers_table_is_honoured(tmp_path):
    sampled = {"use": "dropout", "probability": 0.3, "sample": {"use": "uniform", "fraction": 0.75}}
    theirs = run(experiment(table("FedAvg"), sample=sampled), root=tmp_path)
    same = run(experiment({"use": "fedavg"}, sample=sampled), root=tmp_path)
    assert_near(theirs.params, same.params)
    for name in ("clients", "failed", "bytes_up", "bytes_down"):
        assert [line[name] for line in theirs.metrics] == [line[name] for line in same.metrics]
    failures = [(line["round"], line["reason"]) for line in read_lines(theirs.path / "failures.jsonl")]
    assert len(failures) == sum(line["failed"] for line in theirs.metrics) > 0
    assert {reason for _, reason in failures} == {"dropped out"}
    assert all(line["clients"] + line["failed"] == 0.75 * N for line in theirs.metrics)


def test_a_strategys_own_fraction_draws_within_the_drawn_by_the_seed(setting):
    play, sample = setting(), uniform(N, SEED, count=6)

    def once(seed):
        heard: list[tuple[int, ...]] = []
        found = play(flowers("FedAvg", fraction_train=0.5), 4, seed=seed, sample=sample, engine=listening(heard))
        return heard, found

    (one, first), (two, again), (three, other) = once(SEED), once(SEED), once(SEED + 1)
    assert [len(ids) for ids in one] == [3] * 4
    for number, ids in enumerate(one, 1):
        assert set(ids) < set(sample(number).ids)
    assert len(set(map(frozenset, one))) > 1, "rounds differ"
    assert one == two and first.metrics == again.metrics
    assert_near(again.params, first.params, 0)
    assert one != three
    assert_far(other.params, first.params, 1e-4)


def test_what_the_strategy_draws_neither_depends_on_nor_moves_the_global_generators(setting):
    play, found = setting(), []
    for state in (1, 2):
        random.seed(state)
        before = random.getstate()
        found.append(play(flowers("FedAvg", fraction_train=0.5)))
        assert random.getstate() == before
    assert_near(found[1].params, found[0].params, 0)


def test_waiting_for_more_nodes_than_were_drawn_ends_with_an_error_at_once(setting, monkeypatch):
    play, waits = setting(), []
    monkeypatch.setattr("flwr.serverapp.strategy.strategy_utils.sleep", waits.append)
    with pytest.raises(RuntimeError, match=f"waits for more than the {N} clients that were drawn.*min_available_nodes"):
        play(flowers("FedAvg", min_available_nodes=99))
    with pytest.raises(RuntimeError, match="waits for more than the 1 clients that were drawn"):
        play(flowers("FedAvg"), sample=uniform(N, SEED, count=1))  # min_train_nodes is 2
    assert 0 < sum(waits) < 10


def test_a_strategy_that_asks_nobody_ends_with_an_error_that_says_so(setting):
    with pytest.raises(ValueError, match=r"round 1: flwr.*FedAvg sends no messages \(is fraction_train 0\?\)"):
        setting()(flowers("FedAvg", fraction_train=0.0))


@dataclass(frozen=True)
class Picky(Sgd):
    """Cannot work on 20 examples: that is client 3."""

    def prepare(self, examples, rng):
        if len(examples["y"]) == 20:
            raise OSError("the disk is full")
        return examples


@pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)
def test_a_client_that_raises_costs_that_client_alone(setting, engine):
    play, strategy = setting(lambda model: Picky(model=model, lr=LR, batch_size=8)), Watching()
    found = play(strategy, engine=engine)
    assert [(line["clients"], line["failed"]) for line in found.metrics] == [(N - 1, 1)] * 2
    assert all(list(bad) == [NODES[3]] and "the disk is full" in bad[NODES[3]] for _, bad in strategy.answers)
    assert_near(found.params, play(FedAvg(), engine=engine).params)


def test_where_a_strategy_refuses_to_aggregate_the_model_stays(setting):
    """Bulyan does with fewer than 4 f + 3 replies, clipping wrappers where somebody failed."""
    play = setting()
    few = play(flowers("Bulyan"), sample=uniform(N, SEED, count=6))
    assert_near(few.params, play.model.params, 0)
    lost = play(clipping(flowers("FedAvg")), sample=dropout(everyone(N), 0.4, SEED))
    assert all(line["failed"] for line in lost.metrics)
    assert_near(lost.params, play.model.params, 0)


# Wrappers, Flower's around Flower's and around ours.


def clipping(strategy, norm=1e6, noise=0.0):
    return flwr.serverapp.strategy.DifferentialPrivacyServerSideFixedClipping(strategy, noise, norm, N)


INSIDE = {
    "FedAvg": FedAvg(lr=0.9),
    "FedOpt": FedOpt("yogi", lr=0.1, tau=0.1),
    "Scaffold": Scaffold(N),
    "QFedAvg": QFedAvg(),
}


@pytest.mark.parametrize("name", INSIDE)
def test_wrapped_by_clipping_that_clips_nothing_ours_are_what_they_are_alone(setting, name):
    play = setting(local(name))
    found = play(clipping(INSIDE[name]))
    alone = play(INSIDE[name])
    assert_near(found.params, alone.params, 2e-6)
    assert found.metrics[-1]["train/loss"] == pytest.approx(alone.metrics[-1]["train/loss"], rel=1e-5)
    assert_far(play(clipping(INSIDE[name], norm=0.01)).params, alone.params, 1e-3)


@pytest.mark.parametrize("inside", [{"use": "fedavg"}, table("FedAvg"), table("FedYogi")], ids=lambda t: t["use"])
def test_a_wrappers_table_holds_that_of_the_strategy_inside(tmp_path, inside):
    wrapper = table("DifferentialPrivacyServerSideFixedClipping", noise_multiplier=0.0, num_sampled_clients=N)
    found = run(experiment(wrapper | {"clipping_norm": 1e6, "strategy": inside}), root=tmp_path)
    alone = run(experiment(inside), root=tmp_path)
    assert_near(found.params, alone.params, 2e-6)
    clipped = run(experiment(wrapper | {"clipping_norm": 0.01, "strategy": inside}), root=tmp_path)
    assert_far(clipped.params, alone.params, 1e-3)


def test_noise_that_a_wrapper_adds_is_drawn_by_the_seed(setting):
    play = setting()
    one, again, other = (play(clipping(FedAvg(), 1.0, 0.1), seed=seed) for seed in (SEED, SEED, SEED + 1))
    assert_near(again.params, one.params, 0)
    assert_far(one.params, play(FedAvg()).params, 1e-3)
    assert_far(other.params, one.params, 1e-3)


# Other types of numbers.


@pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)
def test_a_model_in_bfloat16_stays_one(setting, engine):
    play = setting(dtype=torch.bfloat16)
    alone = play(FedAvg(), engine=engine)
    for strategy in (flowers("FedAvg"), clipping(FedAvg())):
        assert_near(play(strategy, engine=engine).params, alone.params, 2e-2)
    assert_far(alone.params, play.model.params, 5e-2)
    for name in ("FedMedian", "FedAdam", "Krum"):
        found = play(flowers(name), engine=engine)
        assert {leaf.dtype for leaf in found.params.values()} == {torch.bfloat16}
        assert_far(found.params, play.model.params, 1e-2)


# What is refused.


@pytest.mark.parametrize(
    ("use", "kind"),
    [
        ("fedsim.sampling:everyone", "function"),
        ("flwr.serverapp.strategy:Result", "Result"),
        ("flwr.server.strategy:FedAvg", "FedAvg"),
    ],
)
def test_what_is_no_strategy_is_refused_by_name(tmp_path, use, kind):
    with pytest.raises(ConfigError, match=f"strategy: {use} gives a {kind}, it must give a Strategy"):
        run(experiment({"use": use}), root=tmp_path)
    assert not list(tmp_path.iterdir())


def test_arguments_that_a_strategy_of_flowers_does_not_take_are_refused_before_anything_runs(tmp_path):
    with pytest.raises(ConfigError, match=r"strategy\.fraction_trian = 0\.5: .*did you mean fraction_train\?"):
        run(experiment(table("FedAvg", fraction_trian=0.5)), root=tmp_path)
    with pytest.raises(ConfigError, match=r"strategy\.beta = 'much'"):
        run(experiment(table("FedTrimmedAvg", beta="much")), root=tmp_path)
    with pytest.raises(ConfigError, match=r"beta.*must be in the range"):
        run(experiment(table("FedTrimmedAvg", beta=0.5)), root=tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_experiment_whose_clients_cannot_train_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"clients\.train is missing: .*FedAvg asks the clients to train"):
        run(experiment(table("FedAvg")) | {"clients": {"tune": {"use": "sgd", "lr": 0.1}}}, root=tmp_path)


def test_a_run_leaves_metrics_and_checkpoints_and_cannot_be_resumed(tmp_path):
    found = run(experiment(table("FedAvgM")), root=tmp_path)
    assert [line["round"] for line in read_lines(found.path / "metrics.jsonl")] == [1, 2]
    kept = sorted(path.name for path in (found.path / "checkpoints").iterdir())
    assert kept == ["round-000001.safetensors", "round-000002.safetensors"]
    state, number = read_checkpoint(found.path / "checkpoints" / kept[-1])
    assert number == 2
    assert_near({name.removeprefix("state/params/"): leaf for name, leaf in state.items()}, found.params, 0)
    before = (found.path / "metrics.jsonl").read_bytes()
    with pytest.raises(ConfigError, match=r"FedAvgM is a strategy of Flower's.*cannot be resumed, only run anew"):
        resume(found.path, rounds=5)
    assert (found.path / "metrics.jsonl").read_bytes() == before
    ours = run(experiment({"use": "fedavg"}), root=tmp_path)
    assert len(resume(ours.path, rounds=4).metrics) == 4


def test_a_simulation_with_a_strategy_of_flowers_cannot_be_resumed(setting):
    play = setting()
    path = play.simulate(flowers("FedAvg")).path
    with pytest.raises(ConfigError, match="FedAvg is a strategy of Flower's.*cannot be resumed"):
        play.simulate(flowers("FedAvg"), 5, resume=path)
    with pytest.raises(ConfigError, match="cannot be resumed"):
        play.simulate(clipping(FedAvg()), 5, resume=path)


class Personalised(flwr.serverapp.strategy.FedAvg):
    """Sends each node a content of its own, which differs from the others' or does not."""

    def __init__(self, differ):
        super().__init__()
        self.differ = differ

    def configure_train(self, server_round, arrays, config, grid):
        for place, node in enumerate(grid.get_node_ids()):
            own = {name: Array(array.numpy() + np.float32(place * self.differ)) for name, array in arrays.items()}
            records = {"arrays": ArrayRecord(own), "config": ConfigRecord({"server-round": server_round})}
            yield Message(RecordDict(records), node, "train")


def test_a_strategy_that_does_not_send_the_same_to_all_is_refused(setting):
    with pytest.raises(ValueError, match=r"round 1: .*Personalised does not send the same to all"):
        setting()(Personalised(differ=1))


def test_a_strategy_that_sends_the_same_to_all_in_so_many_records_is_not_refused(setting):
    play = setting()
    assert_near(play(Personalised(differ=0)).params, play(flowers("FedAvg")).params)


class Renames(flwr.serverapp.strategy.FedAvg):
    """Makes a model with other names."""

    def aggregate_train(self, server_round, replies):
        arrays, metrics = super().aggregate_train(server_round, replies)
        return ArrayRecord({f"new.{name}": array for name, array in arrays.items()}), metrics


def test_a_model_that_is_not_the_one_that_was_given_ends_the_run_by_name(setting):
    with pytest.raises(ValueError, match=r"the model that .*Renames made in round 1 does not fit: missing 0\.bias"):
        setting()(Renames())


class Talks(flwr.serverapp.strategy.FedAvg):
    """Sends messages of its own while it is configured."""

    def configure_train(self, server_round, arrays, config, grid):
        messages = list(super().configure_train(server_round, arrays, config, grid))
        grid.send_and_receive(messages)
        return messages


def test_a_strategy_that_sends_messages_of_its_own_is_refused(setting):
    with pytest.raises(NotImplementedError, match="a strategy cannot send messages of its own"):
        setting()(Talks())


class Measures(flwr.serverapp.strategy.FedAvg):
    """Measures more than the clients did, and a list."""

    def aggregate_train(self, server_round, replies):
        arrays, metrics = super().aggregate_train(server_round, replies)
        metrics["spread"], metrics["each"] = 0.5, [1.0, 2.0]
        return arrays, metrics


def test_what_a_strategy_measures_is_written_down_a_list_number_by_number(setting):
    line = setting()(Measures()).metrics[-1]
    assert (line["train/spread"], line["train/each/0"], line["train/each/1"]) == (0.5, 1.0, 2.0)


def test_the_log_of_flowers_strategies_stays_quiet_while_they_work(setting, caplog):
    with caplog.at_level(logging.DEBUG):
        setting()(flowers("FedAvg"))
    assert not [record for record in caplog.records if record.name == "flwr" and record.levelno < logging.WARNING]


def test_ours_are_adopted_as_they_are_and_flowers_in_a_shell():
    strategy, sample = FedAvg(), everyone(N)
    assert adopt(strategy, sample, N, SEED) == (strategy, sample)
    shell, own = adopt(flowers("FedAvg"), sample, N, SEED)
    assert isinstance(shell, Foreign) and own(1) == Draw([]), "nobody before it was asked"
    assert "FedAvg" in repr(shell.guest)
