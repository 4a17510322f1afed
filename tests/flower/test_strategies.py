"""Every shipped strategy is a strategy of Flower's: under Flower's loop and wrappers it does what it does under ours.

A new strategy needs one line in SHIPPED.
"""

import logging
import math
import re
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import adaptiveclipping_mod, fixedclipping_mod
from flwr.serverapp import ServerApp
from flwr.serverapp.exception import InconsistentMessageReplies
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideAdaptiveClipping,
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyServerSideFixedClipping,
)
from flwr.serverapp.strategy import FedAvg as FlowersFedAvg
from flwr.serverapp.strategy import Strategy as FlowersStrategy
from flwr.serverapp.strategy.strategy_utils import validate_message_reply_consistency
from torch import nn

from clients.fairfed import ReweightedSgd
from clients.fedfact import FairSgd
from clients.prox import Prox
from clients.qfedavg import LossThenSgd
from clients.scaffold import ControlledSgd
from clients.sgd import Sgd
from fedsim import flower, tree
from fedsim.client import Client
from fedsim.config.plugins import find, names
from fedsim.data.dataset import Dataset
from fedsim.engines.local import Sequential, Vectorised
from fedsim.evaluation import Evaluate, evaluate
from fedsim.flower import ClientNodes, SimulationGrid, client_app
from fedsim.method import averages
from fedsim.model import Model
from fedsim.personal import Personal
from fedsim.sampling import dropout, everyone, uniform
from fedsim.simulation import begin, rounds
from fedsim.strategy import Strategy
from fedsim.task import Cohort, Draw, Replies, Task
from strategies.distillation import Distillation
from strategies.fairfed import FairFed
from strategies.fedavg import FedAvg
from strategies.federaser import FedEraser
from strategies.fedfact import FedFact
from strategies.fedfact_post import FedFactPost
from strategies.fedopt import FedOpt
from strategies.fedrecgel import FedRecGel
from strategies.forget import Forget
from strategies.fusion import Fusion
from strategies.mostpop import MostPop
from strategies.pfedrec import PFedRec
from strategies.pruning import Pruning
from strategies.qfedavg import QFedAvg
from strategies.scaffold import Scaffold
from strategies.wassffed import WassFFed

SIZES = (0, 1, 7, 20, 33, 2)
INHABITED = (4, 1, 7, 20, 33, 2)  # Flower's wrappers divide by how far a client went
N = len(SIZES)
SEED = 3
ENGINES = {"sequential": Sequential, "vectorised": Vectorised}
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}


# Of the shape that is trained here, for a strategy that asks for a model; its parameters are not used.
LIKE = Model(nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)))
PROBE = Dataset("probe", {"x": torch.linspace(-1, 1, 100).reshape(20, 5)})


class Case(NamedTuple):
    """A strategy for N clients, and its local side."""

    strategy: Strategy
    client: Callable[[Model], Client] = lambda model: Sgd(model=model, lr=0.1, momentum=0.5, epochs=2, batch_size=8)


SHIPPED = {
    "fedavg": Case(FedAvg(lr=0.9)),
    "fedprox": Case(FedAvg(), lambda model: Prox(model=model, lr=0.1, mu=0.5, epochs=2, batch_size=8)),
    "adam": Case(FedOpt("adam", tau=0.1, lr=0.1)),
    "yogi": Case(FedOpt("yogi", tau=0.1, lr=0.1)),
    "adagrad": Case(FedOpt("adagrad", tau=0.1, lr=0.1)),
    "momentum": Case(FedOpt("momentum", lr=0.7)),
    "scaffold": Case(Scaffold(N, lr=0.9), lambda model: ControlledSgd(model=model, lr=0.1, epochs=2, batch_size=8)),
    "fedfact": Case(
        FedFact(3, 2, global_tolerance=0.02),
        lambda model: FairSgd(model, 3, 2, lr=0.1, local_tolerance=0.05, epochs=2, batch_size=8),
    ),
    "fedfact_post": Case(FedFactPost(3, 2, N, training=5)),  # the rounds in which it trains
    "fairfed": Case(
        FairFed(3, N), lambda model: ReweightedSgd(model=model, num_classes=3, num_groups=2, lr=0.1, batch_size=8)
    ),
    "fedrecgel": Case(FedRecGel(lr=0.1)),  # to which what is sent is a gradient
    "distillation": Case(Distillation(LIKE, PROBE, steps=5, lr=0.01, batch_size=8)),
    "fusion": Case(Fusion(LIKE)),
    "wassffed": Case(WassFFed(3, 2)),  # the rounds of its warm-up
    "forget": Case(Forget(N, training=5)),  # the rounds in which it trains
    "federaser": Case(FedEraser(N, training=5)),  # the rounds in which it trains
    "pruning": Case(Pruning(LIKE, N, training=5)),  # the same
    "qfedavg": Case(QFedAvg(q=1.5), lambda model: LossThenSgd(model=model, lr=0.1, epochs=2, batch_size=8)),
}


class Overheard(SimulationGrid):
    """A loopback grid that keeps what was sent and what came back, after `change` has had its way with it."""

    def __init__(self, nodes, num_nodes, seed, change=lambda sent, replies: replies):
        super().__init__(nodes, num_nodes, seed)
        self.change = change
        self.sent: list[list[Message]] = []
        self.received: list[list[Message]] = []  # copies: strategies change replies in place

    def send_and_receive(self, messages, *, timeout=None):
        sent = list(messages)
        replies = self.change(sent, list(super().send_and_receive(sent, timeout=timeout)))
        self.sent.append(sent)
        self.received.append(deepcopy(replies))
        return replies

    def asked(self, kind="train"):
        """The clients that were asked, phase by phase."""
        phases = [sent for sent in self.sent if sent and sent[0].metadata.message_type == kind]
        return [sorted(self._number[message.metadata.dst_node_id] for message in sent) for sent in phases]

    def models(self, kind="train"):
        """The model that was sent, phase by phase."""
        phases = [sent[0] for sent in self.sent if sent and sent[0].metadata.message_type == kind]
        return [params(message.content["arrays"]) for message in phases]


class Setting(NamedTuple):
    """Clients and data, behind a grid or in our loop."""

    model: Model
    clients: dict[str, Client]
    engine: Any

    def grid(self, change=lambda sent, replies: replies):
        return Overheard(ClientNodes(self.engine, Personal(self.clients, N, SEED)), N, SEED, change)

    def initial(self):
        return ArrayRecord(self.model.module.state_dict())

    def loop(self, strategy, number=3, sample=None, min_replies=1):
        """The rounds of our own loop, with a copy of each state, which the next may be written over."""
        first = begin(strategy, self.model.params, self.clients, N, SEED)
        steps = rounds(strategy, self.engine, sample or everyone(N), first, min_replies)
        return [
            step._replace(snapshot=step.snapshot._replace(state=tree.clone(step.snapshot.state)))
            for step in islice(steps, number)
        ]


@pytest.fixture
def setting(classification):
    def build(client, engine=Sequential, sizes=SIZES, dtype=torch.float32, **others):
        model, federation = classification(sizes, dtype)
        counting = Evaluate(model=model, num_classes=3, part="train", batch_size=16)
        clients = {"train": client(model), "evaluate": counting} | {name: c(model) for name, c in others.items()}
        return Setting(model, clients, engine(federation, clients, SEED))

    return build


def params(record):
    return {name: torch.from_numpy(array.numpy().copy()) for name, array in record.items()}


def assert_near(found, expected, near=1e-6):
    assert found.keys() == expected.keys()
    for name, leaf in expected.items():
        assert found[name].dtype == leaf.dtype
        torch.testing.assert_close(found[name], leaf, rtol=near, atol=near, msg=lambda text, name=name: name + text)


def assert_far(found, expected, least=1e-4):
    assert max(float((found[name] - leaf).abs().max()) for name, leaf in expected.items()) > least


def assert_same_metrics(record, expected, action="train", near=1e-6):
    """A record of Flower's against the metrics of a round of ours, where the clients' bear their action's name."""
    found = {name if name in expected else f"{action}/{name}": value for name, value in record.items()}
    assert found == pytest.approx(expected, rel=near, abs=near)


every_case = pytest.mark.parametrize("case", SHIPPED.values(), ids=SHIPPED)
both_engines = pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)


def test_every_shipped_strategy_is_among_these_and_is_one_of_flowers():
    shipped = {find(name, "fedsim.strategies", "use") for name in names("fedsim.strategies")}
    # Those for users with items of their own are in test_recommenders.
    assert shipped == {type(case.strategy) for case in SHIPPED.values()} | {MostPop, PFedRec}
    optimisers = {case.strategy.optimiser for case in SHIPPED.values() if isinstance(case.strategy, FedOpt)}
    assert optimisers == {"adam", "yogi", "adagrad", "momentum"}
    assert all(isinstance(case.strategy, FlowersStrategy) for case in SHIPPED.values())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@both_engines
@every_case
def test_under_flowers_loop_a_strategy_does_what_it_does_under_ours(setting, case, engine, dtype):
    here, near = setting(case.client, engine, dtype=dtype), TOLERANCE[dtype]
    ours = here.loop(case.strategy)
    result = case.strategy.start(grid=here.grid(), initial_arrays=here.initial(), num_rounds=3)
    assert_near(params(result.arrays), case.strategy.params(ours[-1].snapshot.state), near)
    assert list(result.train_metrics_clientapp) == [1, 2, 3]
    for step in ours:
        assert_same_metrics(result.train_metrics_clientapp[step.snapshot.round], step.metrics, near=near)
    assert_far(params(result.arrays), here.model.params, 1e-2)


@both_engines
@every_case
def test_what_flowers_loop_measures_at_the_clients_is_what_is_true_of_their_pooled_examples(setting, case, engine):
    here = setting(case.client, engine)
    steps = here.loop(case.strategy)
    result = case.strategy.start(here.grid(), here.initial())
    assert list(result.evaluate_metrics_clientapp) == [1, 2, 3]
    for step in steps:
        shared, everybody = case.strategy.shared(step.snapshot.state), Cohort(range(N))
        pooled = evaluate(here.engine, shared, everybody, step.snapshot.round).pooled
        found = dict(result.evaluate_metrics_clientapp[step.snapshot.round])
        assert found == pytest.approx({name: pooled[name] for name in ("loss", "accuracy")}, rel=1e-6)
        assert round(found["accuracy"] * sum(SIZES), 6) == round(found["accuracy"] * sum(SIZES)), "a count of examples"


@every_case
def test_the_server_evaluates_the_first_model_and_that_of_each_round(setting, case):
    here, seen = setting(case.client), []

    def evaluate_fn(number, arrays):
        seen.append((number, params(arrays)))
        return MetricRecord({"sum": float(sum(leaf.sum() for leaf in params(arrays).values()))})

    result = case.strategy.start(here.grid(), here.initial(), 2, evaluate_fn=evaluate_fn)
    expected = [here.model.params, *(case.strategy.params(step.snapshot.state) for step in here.loop(case.strategy, 2))]
    assert [number for number, _ in seen] == [0, 1, 2]
    for (number, model), ours in zip(seen, expected, strict=True):
        assert_near(model, ours)
        total = float(sum(leaf.sum() for leaf in model.values()))
        assert result.evaluate_metrics_serverapp[number]["sum"] == total


def test_what_the_user_tells_the_nodes_reaches_them_and_the_round_with_it(setting):
    here = setting(SHIPPED["fedavg"].client)
    grid = here.grid()
    told = {"train_config": ConfigRecord({"lr": 0.5}), "evaluate_config": ConfigRecord({"how": "well"})}
    FedAvg().start(grid, here.initial(), 2, **told)
    expected = [own | {"server-round": number} for number in (1, 2) for own in ({"lr": 0.5}, {"how": "well"})]
    for sent, words in zip(grid.sent, expected, strict=True):
        assert dict(sent[0].content["config"]).items() >= words.items()


# Flower's own check of replies.


@every_case
def test_the_replies_pass_flowers_check_and_with_something_missing_they_do_not(setting, case):
    here = setting(case.client)
    grid = here.grid()
    case.strategy.start(grid, here.initial(), 2)
    kinds = [sent[0].metadata.message_type for sent in grid.sent]
    assert kinds == ["train", "evaluate", "train", "evaluate"]
    for kind, received in zip(kinds, grid.received, strict=True):
        contents = [message.content for message in received if not message.has_error()]
        assert len(contents) == (N if kind == "train" else N - SIZES.count(0))
        validate_message_reply_consistency(contents, "num-examples", check_arrayrecord=kind == "train")
    for spoil in (without_an_array, without_a_metric, without_a_weight, with_another_record):
        contents = deepcopy([message.content for message in grid.received[0]])
        spoil(contents)
        with pytest.raises(InconsistentMessageReplies):
            validate_message_reply_consistency(contents, "num-examples", check_arrayrecord=True)


def without_an_array(contents):
    del contents[1]["arrays"]["0.weight"]


def without_a_metric(contents):
    del contents[1]["metrics"]["loss"]


def without_a_weight(contents):
    for content in contents:
        del content["metrics"]["num-examples"]


def with_another_record(contents):
    contents[1]["more"] = ArrayRecord()


# Wrapped: Flower's strategies around ours.


@dataclass
class Wrapper(FlowersStrategy):
    """Does nothing to the strategy inside."""

    strategy: FlowersStrategy

    def configure_train(self, server_round, arrays, config, grid):
        return self.strategy.configure_train(server_round, arrays, config, grid)

    def aggregate_train(self, server_round, replies):
        return self.strategy.aggregate_train(server_round, replies)

    def configure_evaluate(self, server_round, arrays, config, grid):
        return self.strategy.configure_evaluate(server_round, arrays, config, grid)

    def aggregate_evaluate(self, server_round, replies):
        return self.strategy.aggregate_evaluate(server_round, replies)

    def summary(self):
        self.strategy.summary()


@dataclass
class Shifting(Wrapper):
    """Adds a constant to the new model, in a record of its own or in the one that it was given, in its type or not."""

    by: float = 0.25
    in_place: bool = False
    dtype: str | None = None

    def aggregate_train(self, server_round, replies):
        arrays, metrics = super().aggregate_train(server_round, replies)
        if arrays is None:
            return arrays, metrics
        numbers = {name: array.numpy() for name, array in arrays.items()}
        shifted = {
            name: Array((part + part.dtype.type(self.by)).astype(self.dtype or part.dtype))
            for name, part in numbers.items()
        }
        if not self.in_place:
            return ArrayRecord(shifted), metrics
        for name, array in shifted.items():
            arrays[name] = array
        return arrays, metrics


def fixed(strategy, noise=0.0, norm=1e6):
    return DifferentialPrivacyServerSideFixedClipping(strategy, noise, norm, num_sampled_clients=N)


@both_engines
@every_case
def test_wrapped_by_clipping_that_clips_nothing_a_strategy_is_what_it_is_alone(setting, case, engine):
    here = setting(case.client, engine, INHABITED)
    alone = case.strategy.start(here.grid(), here.initial(), 3)
    wrapped = fixed(case.strategy).start(here.grid(), here.initial(), 3)
    assert_near(params(wrapped.arrays), params(alone.arrays))
    for number in (1, 2, 3):
        found, expected = wrapped.train_metrics_clientapp[number], alone.train_metrics_clientapp[number]
        assert dict(found) == pytest.approx(dict(expected), rel=1e-6, abs=1e-6)
        found, expected = wrapped.evaluate_metrics_clientapp[number], alone.evaluate_metrics_clientapp[number]
        assert dict(found) == pytest.approx(dict(expected), rel=1e-6)


@every_case
def test_wrapped_by_clipping_that_clips_it_is_another(setting, case):
    here = setting(case.client, sizes=INHABITED)
    alone = case.strategy.start(here.grid(), here.initial(), 2)
    clipped = fixed(case.strategy, norm=0.01).start(here.grid(), here.initial(), 2)
    assert_far(params(clipped.arrays), params(alone.arrays), 1e-3)


@every_case
def test_it_goes_on_from_the_model_to_which_noise_was_added(setting, case):
    here = setting(case.client, sizes=INHABITED)
    grid, seen = here.grid(), []
    torch.manual_seed(0)
    noisy = fixed(case.strategy, noise=1e-7)  # of 1e6, the norm, over N clients: a deviation of 1 / 60
    noisy.start(grid, here.initial(), 3, evaluate_fn=lambda number, arrays: seen.append(params(arrays)))
    for sent, evaluated, made in zip(grid.models(), grid.models("evaluate"), range(3), strict=True):
        assert_near(sent, seen[made], 0)
        assert_near(evaluated, seen[made + 1], 0)
    alone = case.strategy.start(here.grid(), here.initial(), 3)
    assert_far(seen[-1], params(alone.arrays), 1e-3)


@pytest.mark.parametrize("in_place", [False, True], ids=["anew", "in place"])
@every_case
def test_a_model_that_a_wrapper_shifts_is_the_one_from_which_the_next_round_starts(setting, case, in_place):
    here, by = setting(case.client, dtype=torch.float64), 0.25
    grid = here.grid()
    found = Shifting(case.strategy, by, in_place).start(grid, here.initial(), 3)

    strategy, personal = case.strategy, Personal(here.clients, N, SEED)
    state = strategy.init(here.model.params)
    for number, sent in zip((1, 2, 3), grid.models(), strict=True):
        assert_near(sent, state["params"], 1e-12)
        task = strategy.configure(state, number)._replace(round=number)
        replies = here.engine.execute(task, Cohort(range(N), personal.gather(range(N))))
        state, _ = strategy.aggregate(state, task, replies)
        personal.scatter(replies.ids, replies.personal)
        state = state | {"params": tree.map(lambda leaf: leaf + by, state["params"])}
    assert_near(params(found.arrays), state["params"], 1e-12)
    assert_far(params(found.arrays), here.loop(strategy)[-1].snapshot.state["params"], by / 2)


@both_engines
def test_a_model_that_a_wrapper_makes_of_wider_numbers_is_narrowed_again(setting, engine):
    """As it becomes where a wrapper adds numpy's noise, which is of float64."""
    here = setting(SHIPPED["momentum"].client, engine)
    narrow, wide = (
        Shifting(SHIPPED["momentum"].strategy, dtype=dtype).start(here.grid(), here.initial(), 3)
        for dtype in ("float32", "float64")
    )
    assert list(wide.train_metrics_clientapp) == [1, 2, 3]
    assert_near({name: leaf.float() for name, leaf in params(wide.arrays).items()}, params(narrow.arrays))


def test_a_wrapped_strategy_can_be_used_again_and_begins_anew(setting):
    case = SHIPPED["momentum"]
    here = setting(case.client)
    first, again = (Shifting(case.strategy).start(here.grid(), here.initial(), 2) for _ in range(2))
    assert_near(params(again.arrays), params(first.arrays), 0)


def all_clipped(number):
    """By what an adaptive norm has changed after so many rounds in which every client was clipped."""
    return math.exp(-0.2 * (1 - 0.5) * number)  # clip_norm_lr and target_clipped_quantile, as Flower has them


@every_case
def test_clipping_at_an_adaptive_norm_runs_and_adapts(setting, case):
    here = setting(case.client, sizes=INHABITED)
    wrapper = DifferentialPrivacyServerSideAdaptiveClipping(case.strategy, 0.0, N, initial_clipping_norm=1e-3)
    found = wrapper.start(here.grid(), here.initial(), 3)
    assert wrapper.clipping_norm == pytest.approx(1e-3 * all_clipped(3))
    assert_far(params(found.arrays), case.strategy.params(here.loop(case.strategy)[-1].snapshot.state), 1e-3)
    assert list(found.evaluate_metrics_clientapp) == [1, 2, 3]


@every_case
def test_wrapped_by_client_side_clipping_it_tells_the_nodes_the_norm(setting, case):
    here = setting(case.client, sizes=INHABITED)
    grid = here.grid()
    wrapper = DifferentialPrivacyClientSideFixedClipping(case.strategy, 0.0, 7.0, N)
    found = wrapper.start(grid, here.initial(), 2)
    assert [sent[0].content["config"]["clipping_norm"] for sent in grid.sent[::2]] == [7.0, 7.0]
    assert_near(params(found.arrays), case.strategy.params(here.loop(case.strategy, 2)[-1].snapshot.state))


def clip_at_clients(here, strategy, mod):
    """A Result over nodes that are our ClientApp with this mod of Flower's."""
    server = ServerApp()

    @server.main()
    def main(grid, context):
        strategy.start(grid=grid, initial_arrays=here.initial(), num_rounds=2)

    def in_training(message, context, call_next):
        inner = partial(mod, call_next=call_next) if message.metadata.message_type == "train" else call_next
        return inner(message, context)

    app = client_app(here.engine.federation, here.clients, SEED, mods=[in_training])
    return flower.run(server, app, num_nodes=N, seed=SEED)


@every_case
def test_our_nodes_clip_by_flowers_mod_what_the_wrapper_tells_them_to(setting, case):
    here = setting(case.client, sizes=INHABITED)
    for norm, same in ((1e6, True), (0.01, False)):
        wrapper = DifferentialPrivacyClientSideFixedClipping(case.strategy, 0.0, norm, N)
        outcome = clip_at_clients(here, wrapper, fixedclipping_mod)
        assert not outcome.failed
        expected = case.strategy.params(here.loop(case.strategy, 2)[-1].snapshot.state)
        (assert_near if same else assert_far)(params(outcome.result.arrays), expected)


@pytest.mark.parametrize("name", ["fedavg", "scaffold"])
def test_our_nodes_clip_at_an_adaptive_norm_by_flowers_mod(setting, name):
    case = SHIPPED[name]
    here = setting(case.client, sizes=INHABITED)
    wrapper = DifferentialPrivacyClientSideAdaptiveClipping(case.strategy, 0.0, N, initial_clipping_norm=1e-3)
    outcome = clip_at_clients(here, wrapper, adaptiveclipping_mod)
    assert not outcome.failed
    assert wrapper.clipping_norm == pytest.approx(1e-3 * all_clipped(2))


@dataclass(frozen=True)
class Centred(FedAvg):
    """Its model is made of its state, which holds the model's distance from one."""

    def init(self, params):
        return {"params": tree.map(lambda leaf: leaf - 1, params)}

    def configure(self, state, round):
        return Task("train", {"params": self.params(state)}, reduce="mean")

    def aggregate(self, state, task, replies):
        return self.init(replies.update["params"]), {}

    def params(self, state):
        return tree.map(lambda leaf: leaf + 1, state["params"])


def test_a_strategy_that_makes_its_model_out_of_its_state_runs_but_takes_no_other_model(setting):
    here = setting(SHIPPED["fedavg"].client, dtype=torch.float64)
    expected = here.loop(FedAvg())[-1].snapshot.state["params"]
    assert_near(params(Centred().start(here.grid(), here.initial(), 3).arrays), expected, 1e-12)
    assert_near(params(Wrapper(Centred()).start(here.grid(), here.initial(), 3).arrays), expected, 1e-12)
    with pytest.raises(TypeError, match=r"Centred makes the model out of its state by `params`, so it cannot go on"):
        Shifting(Centred()).start(here.grid(), here.initial(), 3)


def test_such_a_strategy_survives_a_first_round_that_nobody_answers(setting):
    here = setting(SHIPPED["fedavg"].client, dtype=torch.float64)

    def lost(sent, replies):
        number, kind = sent[0].content["config"]["server-round"], sent[0].metadata.message_type
        return [] if (number, kind) == (1, "train") else replies

    found = Centred().start(here.grid(lost), here.initial(), 2)
    steps = here.loop(FedAvg(), 2, lambda round, among=None: Draw(list(range(N)) if round == 2 else []), 0)
    assert_near(params(found.arrays), steps[-1].snapshot.state["params"], 1e-12)


# What is asked of whom.


@dataclass(frozen=True)
class TwoPhases(FedAvg):
    """Trains in odd rounds, and calibrates in even ones."""

    def configure(self, state, round):
        return Task("train" if round % 2 else "calibrate", {"params": state["params"]}, reduce="mean")


@both_engines
def test_an_action_of_its_own_travels_as_train_and_its_name(setting, engine):
    case = SHIPPED["fedavg"]
    here = setting(case.client, engine, calibrate=lambda model: Sgd(model=model, lr=0.01, batch_size=4))
    grid = here.grid()
    result = TwoPhases().start(grid, here.initial(), 4)
    kinds = [sent[0].metadata.message_type for sent in grid.sent]
    assert kinds == ["train", "evaluate", "train.calibrate", "evaluate"] * 2
    steps = here.loop(TwoPhases(), 4)
    assert_near(params(result.arrays), steps[-1].snapshot.state["params"])
    for step, action in zip(steps, ("train", "calibrate") * 2, strict=True):
        assert_same_metrics(result.train_metrics_clientapp[step.snapshot.round], step.metrics, action)
    assert_far(params(result.arrays), here.loop(FedAvg(), 4)[-1].snapshot.state["params"], 1e-3)


@both_engines
@every_case
def test_a_sampler_draws_the_nodes_that_it_draws_in_our_loop(setting, case, engine):
    here, sample = setting(case.client, engine), uniform(N, SEED, fraction=0.5)
    grid = here.grid()
    result = case.strategy.start(grid, here.initial(), 4, sample=sample)
    assert grid.asked() == [sample(number).ids for number in (1, 2, 3, 4)]
    assert len({tuple(ids) for ids in grid.asked()}) > 1 and all(len(ids) == N / 2 for ids in grid.asked())
    assert grid.asked("evaluate") == [list(range(N))] * 4
    expected = here.loop(case.strategy, 4, sample)[-1].snapshot.state
    assert_near(params(result.arrays), case.strategy.params(expected))


def test_a_sampler_whose_clients_drop_out_asks_only_those_that_are_there(setting):
    here, sample = setting(SHIPPED["fedavg"].client), dropout(everyone(N), 0.5, SEED)
    grid = here.grid()
    result = FedAvg().start(grid, here.initial(), 3, sample=sample)
    assert grid.asked() == [sample(number).ids for number in (1, 2, 3)]
    assert all(sample(number).dropped for number in (1, 2, 3))
    assert_near(params(result.arrays), here.loop(FedAvg(), 3, sample)[-1].snapshot.state["params"])


@dataclass(frozen=True)
class Chooses(FedAvg):
    """Names the clients that it asks."""

    ids: Sequence[int] = (4, 2)

    def configure(self, state, round):
        return Task("train", {"params": state["params"]}, ids=self.ids, reduce="mean")


@pytest.mark.parametrize("sample", [None, everyone(N)], ids=["without a sampler", "whatever the sampler says"])
def test_the_clients_that_a_strategy_names_are_asked(setting, sample):
    here = setting(SHIPPED["fedavg"].client)
    grid = here.grid()
    result = Chooses().start(grid, here.initial(), 2, sample=sample)
    assert grid.asked() == [[2, 4]] * 2
    assert_near(params(result.arrays), here.loop(Chooses(), 2)[-1].snapshot.state["params"])
    assert_far(params(result.arrays), here.loop(FedAvg(), 2)[-1].snapshot.state["params"], 1e-3)


@pytest.mark.parametrize("outside", [-1, N])
def test_clients_that_are_no_node_are_refused(setting, outside):
    here = setting(SHIPPED["fedavg"].client)
    with pytest.raises(ValueError, match=rf"round 1: asks for clients \[{outside}\], there are nodes 0 to {N - 1}"):
        Chooses(ids=(1, outside)).start(here.grid(), here.initial(), 1)
    with pytest.raises(ValueError, match=rf"round 1: asks for clients \[{outside}\]"):
        FedAvg().start(here.grid(), here.initial(), 1, sample=lambda round, among=None: Draw([outside]))


class Arriving(Overheard):
    """Its nodes come one by one, each time that it is asked for them."""

    calls = 0

    def get_node_ids(self):
        self.calls += 1
        return self.node_ids[: self.calls]


def test_it_waits_until_there_are_as_many_nodes_as_it_wants(setting):
    here = setting(SHIPPED["fedavg"].client)
    grid = Arriving(ClientNodes(here.engine, Personal(here.clients, N, SEED)), N, SEED)
    FedAvg().start(grid, here.initial(), 1, min_nodes=2)
    assert grid.asked() == [[0, 1]]
    assert grid.asked("evaluate") == [[0, 1, 2]], "a third one came in the meantime"


def test_waiting_for_more_nodes_than_there_are_ends_with_an_error(setting, monkeypatch):
    monkeypatch.setattr("fedsim.flower.grid.PATIENCE_CALLS", 2)
    monkeypatch.setattr("fedsim.flower.grid.PATIENCE_SECONDS", 0.0)
    here = setting(SHIPPED["fedavg"].client)
    FedAvg().start(here.grid(), here.initial(), 1, min_nodes=N)
    with pytest.raises(RuntimeError, match=f"waits for more than the {N} nodes that there are"):
        FedAvg().start(here.grid(), here.initial(), 1, min_nodes=N + 1)


# What goes wrong at one node costs that node.


@dataclass(frozen=True)
class Picky(Sgd):
    """Cannot work on 20 examples: that is client 3."""

    def prepare(self, examples, rng):
        if len(examples["y"]) == 20:
            raise OSError("the disk is full")
        return examples


def everyone_but(*lost):
    return lambda round, among=None: Draw([client for client in range(N) if client not in lost])


@both_engines
def test_a_client_that_raises_costs_that_client_alone(setting, engine, caplog):
    here = setting(lambda model: Picky(model=model, lr=0.1, batch_size=8), engine)
    with caplog.at_level(logging.WARNING, "fedsim"):
        result = FedAvg().start(here.grid(), here.initial(), 2)
    expected = here.loop(FedAvg(), 2, everyone_but(3))
    assert_near(params(result.arrays), expected[-1].snapshot.state["params"])
    assert warned(caplog, "train") == [f"round {number}, train" for number in (1, 2)]
    assert "the disk is full" in caplog.text


def warned(caplog, action):
    """Which phases had a node that failed, a line for each node."""
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    return [found[0] for text in told if (found := re.match(rf"round \d+, {action}", text))]


def error(message):
    return Message(Error(0, "out of memory"), reply_to=message)


def without(name):
    def change(content):
        del content["arrays"][name]

    return change


def resized(content):
    content["arrays"]["0.bias"] = Array(torch.zeros(9).numpy())


def poisoned(content):
    content["arrays"]["0.bias"] = Array(torch.full((8,), torch.nan).numpy())


def weightless(content):
    del content["metrics"]["num-examples"]


def negative(content):
    content["metrics"]["num-examples"] = -1.0


def measured_otherwise(content):
    content["metrics"]["speed"] = 3.0


def garbled(content):
    array = content["arrays"]["0.bias"]
    content["arrays"]["0.bias"] = Array(array.dtype, array.shape, array.stype, b"garbage")


def spoilt(spoil, which):
    """A change of the reply of this client."""

    def change(sent, replies):
        replies[which] = deepcopy(replies[which])
        spoil(replies[which].content)
        return replies

    return change


WRONG = {
    "a parameter missing": (without("0.bias"), "0.bias is missing"),
    "a parameter of another shape": (resized, r"0.bias has shape \(9,\), was sent as \(8,\)"),
    "an update of NaN": (poisoned, "NaN or infinity"),
    "no weight": (weightless, "lack 'num-examples'"),
    "a negative weight": (negative, "num-examples must be a number >= 0, got -1.0"),
    "a metric of its own": (measured_otherwise, "answered in another form"),
    "bytes that are no array": (garbled, "is not in .npy format"),
}


@pytest.mark.parametrize("which", [0, 3], ids=["first", "fourth"])
@pytest.mark.parametrize("wrong", WRONG)
def test_a_reply_that_is_wrong_costs_its_node_alone(setting, wrong, which, caplog):
    spoil, reason = WRONG[wrong]
    here = setting(SHIPPED["fedavg"].client, sizes=INHABITED)
    strategy, grid = FedAvg(lr=0.9), here.grid(spoilt(spoil, which))
    arrays, _ = one_round(strategy, here, grid)
    assert_near(params(arrays), here.loop(strategy, 1, everyone_but(which))[-1].snapshot.state["params"])
    assert_far(params(arrays), here.loop(strategy, 1)[-1].snapshot.state["params"], 1e-3)
    assert warned(caplog, "train") == ["round 1, train"]
    assert re.search(reason, caplog.text)


@pytest.mark.parametrize("wrong", WRONG)
def test_the_warning_says_whose_reply_was_wrong(setting, wrong, caplog):
    here = setting(SHIPPED["fedavg"].client, sizes=INHABITED)
    grid = here.grid(spoilt(WRONG[wrong][0], 3))
    one_round(FedAvg(), here, grid)
    assert re.search(rf"client 3\b|node {grid.node_ids[3]}\b", caplog.text)


def one_round(strategy, here, grid, number=1):
    """A round of training, phase by phase, as a wrapper calls them."""
    sent = strategy.configure_train(number, here.initial(), ConfigRecord(), grid)
    return strategy.aggregate_train(number, grid.send_and_receive(sent))


def answers_with_an_error(sent, replies):
    return [error(sent[3]) if place == 3 else reply for place, reply in enumerate(replies)]


def stays_silent(sent, replies):
    return replies[:3] + replies[4:]


@pytest.mark.parametrize(
    ("change", "reason"),
    [(answers_with_an_error, "error 0: out of memory"), (stays_silent, "did not answer")],
    ids=["error", "silence"],
)
@every_case
def test_the_round_goes_on_without_a_node_that_fails(setting, case, change, reason, caplog):
    here = setting(case.client, sizes=INHABITED)

    def training_only(sent, replies):
        return change(sent, replies) if sent[0].metadata.message_type == "train" else replies

    result = case.strategy.start(here.grid(training_only), here.initial(), 2)
    expected = here.loop(case.strategy, 2, everyone_but(3))
    if isinstance(case.strategy, Scaffold):  # the client did its work, and its control variate is not lost
        expected = expected[:1]
        result = case.strategy.start(here.grid(training_only), here.initial(), 1)
    assert_near(params(result.arrays), case.strategy.params(expected[-1].snapshot.state))
    assert warned(caplog, "train")[:1] == ["round 1, train"]
    assert reason in caplog.text


def test_who_answers_twice_or_unasked_is_not_counted(setting, caplog):
    here, some = setting(SHIPPED["fedavg"].client), everyone_but(5)
    expected = here.loop(FedAvg(), 1, some)[-1].snapshot.state["params"]
    grid = here.grid()

    def intrude(sent, replies):
        if sent[0].metadata.message_type != "train":
            return replies
        twice = deepcopy(replies[1])
        stranger = Message(sent[0].content, grid.node_ids[5], "train")
        unasked = Message(deepcopy(replies[2].content), reply_to=stranger)
        return [*replies, twice, unasked]

    grid.change = intrude
    with caplog.at_level(logging.WARNING, "fedsim"):
        result = FedAvg().start(grid, here.initial(), 1, sample=some)
    assert_near(params(result.arrays), expected, 0)
    refused = [record.args[1] for record in caplog.records if "unasked, or twice" in record.getMessage()]
    assert sorted(refused) == [grid.node_ids[1], grid.node_ids[5]]


@every_case
def test_the_order_in_which_nodes_answer_changes_no_bit(setting, case):
    here = setting(case.client)
    orders = (lambda sent, replies: replies, lambda sent, replies: replies[::-1])
    one, other = (case.strategy.start(here.grid(order), here.initial(), 3) for order in orders)
    assert_near(params(other.arrays), params(one.arrays), 0)
    assert other.train_metrics_clientapp == one.train_metrics_clientapp


@every_case
def test_where_nobody_answers_the_model_stays_and_so_does_the_state(setting, case):
    here = setting(case.client)
    strategy = replace(case.strategy)

    def second_is_lost(sent, replies):
        number, kind = sent[0].content["config"]["server-round"], sent[0].metadata.message_type
        return [error(message) for message in sent] if (number, kind) == (2, "train") else replies

    grid = here.grid(second_is_lost)
    result = strategy.start(grid, here.initial(), 3)
    assert list(result.train_metrics_clientapp) == [1, 3]
    assert list(result.evaluate_metrics_clientapp) == [1, 2, 3]
    first, second, third = grid.models()
    assert_near(third, second, 0)
    assert_far(second, first, 1e-3)
    if not isinstance(strategy, Scaffold | FedFact):  # there clients had done their work before their answers were lost
        skipping = here.loop(strategy, 3, lambda round, among=None: Draw([] if round == 2 else list(range(N))), 0)
        assert_near(params(result.arrays), strategy.params(skipping[-1].snapshot.state))


def test_nothing_is_aggregated_of_errors_alone(setting):
    here, strategy = setting(SHIPPED["fedavg"].client), FedAvg()
    grid = here.grid(lambda sent, replies: [error(message) for message in sent])
    assert one_round(strategy, here, grid) == (None, None)
    grid = here.grid(lambda sent, replies: [])
    assert one_round(strategy, here, grid, 2) == (None, None)
    sent = strategy.configure_evaluate(2, here.initial(), ConfigRecord(), grid)
    assert strategy.aggregate_evaluate(2, grid.send_and_receive(sent)) is None


def test_phases_out_of_order_are_refused(setting):
    here, strategy = setting(SHIPPED["fedavg"].client), FedAvg()
    with pytest.raises(RuntimeError, match=r"aggregate_train\(1\): configure_train\(1\) must come first"):
        strategy.aggregate_train(1, [])
    with pytest.raises(RuntimeError, match=r"aggregate_evaluate\(1\): configure_evaluate\(1\) must come first"):
        strategy.aggregate_evaluate(1, [])
    grid = here.grid()
    strategy.configure_train(1, here.initial(), ConfigRecord(), grid)
    with pytest.raises(RuntimeError, match=r"aggregate_train\(2\)"):
        strategy.aggregate_train(2, [])
    with pytest.raises(RuntimeError, match=r"aggregate_evaluate\(1\)"):
        strategy.aggregate_evaluate(1, [])
    strategy.configure_evaluate(1, here.initial(), ConfigRecord(), grid)
    with pytest.raises(RuntimeError, match=r"aggregate_train\(1\)"):
        strategy.aggregate_train(1, [])


# A strategy stays what it is: a frozen dataclass of hyper-parameters.


@every_case
def test_nothing_of_a_run_is_left_on_a_strategy_and_the_next_run_is_the_same(setting, case):
    here, strategy = setting(case.client), replace(case.strategy)
    first = strategy.start(here.grid(), here.initial(), 2)
    found = {name for name in vars(strategy) if not isinstance(getattr(type(strategy), name, None), cached_property)}
    assert found == {field.name for field in fields(strategy)}
    assert strategy == replace(strategy) == case.strategy and hash(strategy) == hash(case.strategy)
    again = strategy.start(here.grid(), here.initial(), 2)
    assert_near(params(again.arrays), params(first.arrays), 0)


@every_case
def test_a_run_within_a_run_of_the_same_strategy_disturbs_neither(setting, case):
    here, inner = setting(case.client), []

    def evaluate_fn(number, arrays):
        inner.append(case.strategy.start(here.grid(), here.initial(), 2))

    outer = case.strategy.start(here.grid(), here.initial(), 2, evaluate_fn=evaluate_fn)
    alone = case.strategy.start(here.grid(), here.initial(), 2)
    for result in (outer, *inner):
        assert_near(params(result.arrays), params(alone.arrays), 0)


# Other people's clients under our strategies.


def foreign_client(module, names=("arrays", "metrics"), mods=()):
    """A ClientApp that has never heard of fedsim: one step of gradient descent on data of the node's own."""
    app = ClientApp()

    def own(message, context):
        number = context.node_config["partition-id"]
        generator = torch.Generator().manual_seed(number)
        x, y = torch.randn(5 + number, 4, generator=generator), torch.randint(3, (5 + number,), generator=generator)
        net = deepcopy(module)
        net.load_state_dict(next(iter(message.content.array_records.values())).to_torch_state_dict())
        return net, x, y

    def metrics(net, x, y):
        losses = nn.functional.cross_entropy(net(x), y, reduction="none").detach()
        by_class = [float(losses[y == label].sum()) for label in range(3)]
        return MetricRecord({"num-examples": len(y), "loss": float(losses.mean()), "by-class": by_class})

    @app.train(mods=list(mods))
    def train(message, context):
        net, x, y = own(message, context)
        optimiser = torch.optim.SGD(net.parameters(), 0.1)
        nn.functional.cross_entropy(net(x), y).backward()
        optimiser.step()
        records = {names[0]: ArrayRecord(net.state_dict()), names[1]: metrics(net, x, y)}
        return Message(RecordDict(records), reply_to=message)

    @app.evaluate()
    def count(message, context):
        net, x, y = own(message, context)
        return Message(RecordDict({names[1]: metrics(net.eval(), x, y)}), reply_to=message)

    return app


def over_foreign_nodes(strategy, module, app):
    server = ServerApp()

    @server.main()
    def main(grid, context):
        strategy.start(grid=grid, initial_arrays=ArrayRecord(module.state_dict()), num_rounds=3)

    outcome = flower.run(server, app, num_nodes=N, seed=SEED)
    assert not outcome.failed
    return outcome.result


MODULES = {
    "a perceptron": lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)),
    "one with batch statistics": lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)),
}


@pytest.mark.parametrize("names", [("arrays", "metrics"), ("weights", "numbers")], ids=["usual names", "other names"])
@pytest.mark.parametrize("build", MODULES.values(), ids=MODULES)
def test_over_a_foreign_client_app_our_mean_is_flowers(build, names):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = build()
    app = foreign_client(module, names)
    ours, theirs = (over_foreign_nodes(strategy, module, app) for strategy in (FedAvg(), FlowersFedAvg()))
    assert ours.arrays.keys() == theirs.arrays.keys() == module.state_dict().keys()
    for name, array in theirs.arrays.items():
        torch.testing.assert_close(
            torch.as_tensor(ours.arrays[name].numpy(), dtype=torch.float64),
            torch.as_tensor(array.numpy(), dtype=torch.float64),
            rtol=1e-6,
            atol=1e-6,
        )
    for part in ("train_metrics_clientapp", "evaluate_metrics_clientapp"):
        found, expected = getattr(ours, part), getattr(theirs, part)
        assert list(found) == list(expected) == [1, 2, 3]
        for number, record in expected.items():
            assert found[number].keys() == record.keys() == {"loss", "by-class"}
            for name, value in record.items():
                assert found[number][name] == pytest.approx(value, rel=1e-6)
    assert_far(params(ours.arrays), dict(module.state_dict()), 1e-2)


@pytest.mark.parametrize("norm", [1e6, 0.01])
def test_a_foreign_client_app_clips_what_our_strategy_sends_as_it_clips_what_flowers_sends(norm):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = MODULES["a perceptron"]()
    app = foreign_client(module, mods=[fixedclipping_mod])
    ours, theirs = (
        over_foreign_nodes(DifferentialPrivacyClientSideFixedClipping(inside, 0.0, norm, N), module, app)
        for inside in (FedAvg(), FlowersFedAvg())
    )
    assert_near(params(ours.arrays), params(theirs.arrays))


def test_a_parameter_whose_name_is_no_key_of_a_tree_is_refused_and_not_lost(classification):
    arrays = ArrayRecord({"dense/kernel": Array(np.zeros(2)), "w": Array(np.zeros(3))})
    with pytest.raises(ValueError, match="'dense/kernel'"):
        FedAvg().configure_train(1, arrays, ConfigRecord(), SimulationGrid(None, 2))


def test_what_a_wrapper_does_not_see_is_told_once(classification, caplog):
    for name, told in (("scaffold", 1), ("fedavg", 0)):
        caplog.clear()
        model, federation = classification((5, 7, 9, 3))
        client = {"scaffold": ControlledSgd, "fedavg": Sgd}[name](model=model, lr=0.1)
        method = Scaffold(num_clients=4) if name == "scaffold" else FedAvg()
        nodes = ClientNodes(Sequential(federation, {"train": client}), Personal({"train": client}, 4, 0))
        wrapped = DifferentialPrivacyServerSideFixedClipping(method, 0.0, 1e6, 4)
        wrapped.start(SimulationGrid(nodes, 4), ArrayRecord(model.module.state_dict()), num_rounds=2)
        assert sum("neither clipped nor noised" in message for message in caplog.messages) == told


def test_a_client_that_weighs_nothing_does_not_spoil_a_mean_with_a_number_that_is_none():
    replies = Replies([0, 1], torch.tensor([0.0, 2.0]), {}, metrics={"loss": torch.tensor([float("nan"), 3.0])})
    assert averages(replies) == {"loss": 3.0}
    assert averages(replies._replace(weight=torch.tensor([1.0, 1.0])))["loss"] != 3.0
