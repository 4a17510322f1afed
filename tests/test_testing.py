"""The conformance checks pass what keeps the promises and catch whatever breaks one."""

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import nn

from clients.prox import Prox
from clients.qfedavg import LossThenSgd
from clients.scaffold import ControlledSgd
from clients.sgd import Sgd
from fedsim import tree
from fedsim.client import Client
from fedsim.data.federation import Federation
from fedsim.evaluation import Evaluate
from fedsim.model import Model
from fedsim.task import Replies, Reply
from fedsim.testing import check_client, check_strategy, ragged
from strategies.fedavg import FedAvg
from strategies.fedopt import FedOpt
from strategies.qfedavg import QFedAvg
from strategies.scaffold import Scaffold

GOOD = {
    "sgd": lambda model: Sgd(model=model, lr=0.1, momentum=0.9, weight_decay=0.1, epochs=2, batch_size=8),
    "prox": lambda model: Prox(model=model, lr=0.1, mu=0.1, batch_size=8),
    "scaffold": lambda model: ControlledSgd(model=model, lr=0.1, epochs=2, batch_size=8),
    "qfedavg": lambda model: LossThenSgd(model=model, lr=0.1, batch_size=8),
    "evaluate": lambda model: Evaluate(model=model, num_classes=3, batch_size=8),
}


def check(client, model, federation):
    check_client(client, {"params": model.params, "control": tree.map(torch.ones_like, model.params)}, federation)


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_client_that_ships_passes(classification, name, dtype):
    model, federation = classification(dtype=dtype)
    check(GOOD[name](model), model, federation)


def test_a_client_with_dropout_passes(classification):
    model, federation = classification(dropout=0.5)
    check(Sgd(model=model, lr=0.1), model, federation)


@dataclass(frozen=True)
class Prepares(Sgd):
    def prepare(self, examples, rng):
        noise = torch.randn(examples["x"].shape, generator=rng)
        return {"x": torch.cat([examples["x"], examples["x"] + noise]), "y": examples["y"].repeat(2)}


def test_a_client_with_a_prepare_of_its_own_passes(classification):
    model, federation = classification()
    check(Prepares(model=model, lr=0.1, batch_size=8), model, federation)


# Clients that break a promise. `check` must see it, and say which.


@dataclass(frozen=True)
class ChangesShared(Sgd):
    def finish(self, shared, state, data):
        shared["params"]["2.bias"].add_(1)
        return super().finish(shared, state, data)


@dataclass(frozen=True)
class StepsInPlace(Sgd):
    """The commonest mistake: its first state is the server's model, not a copy."""

    def step(self, state, batch):
        gradient = self.model.gradient(state["params"], batch)[1]
        for name, leaf in state["params"].items():
            leaf.sub_(self.lr * gradient[name])
        return state


@dataclass(frozen=True)
class ChangesPersonal(Sgd):
    def personal(self, rng):
        return {"rounds": torch.zeros(1)}

    def start(self, shared, personal, data):
        personal["rounds"].add_(1)
        return super().start(shared, personal, data)


@dataclass(frozen=True)
class ChangesData(Sgd):
    def start(self, shared, personal, data):
        data["x"].mul_(0.5)
        return super().start(shared, personal, data)


@dataclass(frozen=True)
class ChangesDataInPrepare(Sgd):
    def prepare(self, examples, rng):
        examples["x"].clamp_(-0.5, 0.5)
        return examples


@dataclass(frozen=True)
class RemembersTheModel(Sgd):
    """Goes on from where the last client stopped."""

    def start(self, shared, personal, data):
        return super().start({"params": getattr(self, "last", shared["params"])}, personal, data)

    def finish(self, shared, state, data):
        object.__setattr__(self, "last", tree.map(torch.clone, state["params"]))
        return super().finish(shared, state, data)


@dataclass(frozen=True)
class RemembersForNothing(Sgd):
    """No answer shows what it remembers, not yet."""

    def finish(self, shared, state, data):
        object.__setattr__(self, "finished", getattr(self, "finished", 0) + 1)
        return super().finish(shared, state, data)


@dataclass(frozen=True)
class RemembersInAField(Sgd):
    seen: list = field(default_factory=list)

    def start(self, shared, personal, data):
        self.seen.append(len(data["x"]))
        return super().start(shared, personal, data)


@dataclass(frozen=True)
class ChangesItsModel(Sgd):
    def finish(self, shared, state, data):
        with torch.no_grad():
            self.model.module[0].weight.add_(1)
        return super().finish(shared, state, data)


@dataclass(frozen=True)
class IgnoresTheMask(Sgd):
    def step(self, state, batch):
        return super().step(state, batch | {"mask": torch.ones_like(batch["mask"])})


@dataclass(frozen=True)
class CountsPadding(Sgd):
    def finish(self, shared, state, data):
        reply = super().finish(shared, state, data)
        return reply._replace(weight=torch.tensor(float(len(data["y"]))).double())


@dataclass(frozen=True)
class RowsOfPadding(Client):
    """Its rows are numbered from the end of the table, which is padded; their values are the same."""

    def start(self, shared, personal, data):
        return {}

    def step(self, state, batch):
        return state

    def finish(self, shared, state, data):
        index = torch.where(data["mask"], len(data["y"]) - 1 - torch.arange(len(data["y"])), -1)
        values = torch.where(data["mask"][:, None], data["x"], 0.0)
        return Reply({"table": tree.Rows(index, values, 40)}, data["mask"].sum().double())


@dataclass(frozen=True)
class Draws(Sgd):
    def start(self, shared, personal, data):
        noisy = tree.map(lambda leaf: leaf + torch.rand(leaf.shape), shared["params"])
        return super().start({"params": noisy}, personal, data)


@dataclass(frozen=True)
class DividesByItsExamples(Sgd):
    def finish(self, shared, state, data):
        mean = data["x"].sum() / data["mask"].sum()
        return super().finish(shared, state, data)._replace(update={"mean": 0 * mean})


@dataclass(frozen=True)
class SendsTheGraph(Sgd):
    def finish(self, shared, state, data):
        weight = state["params"]["0.weight"].detach().requires_grad_()
        return super().finish(shared, state, data)._replace(update={"w": 2 * weight})


BAD = {
    ChangesShared: "changes shared/params/2.bias in place",
    StepsInPlace: "changes shared/params/0.weight in place",
    ChangesPersonal: "changes personal/rounds in place",
    ChangesData: "changes examples/x in place",
    ChangesDataInPrepare: "changes examples/x in place",
    RemembersTheModel: "changed itself|twice the same task",
    RemembersForNothing: "changed itself",
    RemembersInAField: "changed itself",
    ChangesItsModel: "changed itself",
    IgnoresTheMask: "alone and vectorised",
    CountsPadding: "alone and vectorised in blocks of 2: weight",
    RowsOfPadding: "alone and vectorised in blocks of 2: update/table",
    Draws: "cannot be vectorised, say that it is `stochastic`",
    DividesByItsExamples: "client 0 failed: its update holds NaN",
    SendsTheGraph: "requires a gradient",
}


@pytest.mark.parametrize("kind", BAD)
def test_a_client_that_breaks_a_promise_is_told_which(classification, kind):
    model, federation = classification()
    settings = {"batch_size": 8, "epochs": 2} if kind is RowsOfPadding else {"model": model, "lr": 0.1, "batch_size": 8}
    with pytest.raises(AssertionError, match=BAD[kind]):
        check(kind(**settings), model, federation)


@pytest.mark.parametrize("kind", [ChangesData, ChangesDataInPrepare])
def test_changed_examples_are_seen_in_a_federation_whose_rows_lie_scattered_too(classification, kind):
    model, federation = classification((7, 20))
    rows = np.random.default_rng(0).permutation(federation.rows)
    scattered = Federation(federation.columns, rows, federation.bounds)
    with pytest.raises(AssertionError, match="changes examples/x in place"):
        check(kind(model=model, lr=0.1, batch_size=8), model, scattered)


@dataclass(frozen=True)
class Branches(Sgd):
    def step(self, state, batch):
        return super().step(state, batch) if batch["x"].sum() > 0 else state


def test_a_client_that_branches_on_a_value_is_sent_to_sequential(classification):
    model, federation = classification()
    with pytest.raises(AssertionError, match="Branches cannot be vectorised, use fedsim.engines.local:Sequential"):
        check(Branches(model=model, lr=0.1, batch_size=8), model, federation)


def test_a_class_in_the_place_of_an_object_is_refused(classification):
    model, federation = classification()
    with pytest.raises(TypeError, match=r"client must be an object, got the class Sgd: pass Sgd\(...\)"):
        check(Sgd, model, federation)
    with pytest.raises(TypeError, match="strategy must be an object, got the class FedAvg"):
        check_strategy(FedAvg, {"w": torch.zeros(4)}, replies(FedAvg()))


def test_batch_norm_does_not_even_become_a_model():
    with pytest.raises(ValueError, match="use GroupNorm or LayerNorm"):
        Model(nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)))


@dataclass(frozen=True)
class RaisesOnEmpty(Sgd):
    def start(self, shared, personal, data):
        data["x"][0]
        return super().start(shared, personal, data)


def test_a_client_that_cannot_do_without_examples_is_told_so(classification):
    model, federation = classification()
    with pytest.raises(AssertionError, match="client 0 failed: Traceback"):
        check(RaisesOnEmpty(model=model, lr=0.1), model, federation)


def test_a_ragged_federation_has_clients_of_the_sizes_asked_for():
    federation = ragged({"x": torch.arange(10)}, (0, 1, 7, 20))
    assert federation.sizes().tolist() == [0, 1, 7, 20]
    assert federation.examples(3)["x"].tolist() == [(8 + place) % 10 for place in range(20)]


# Strategies


def answers():
    stacked = {"params": {"w": torch.randn(3, 4, generator=torch.Generator().manual_seed(0))}}
    stacked["control"], stacked["loss"] = {"w": torch.ones(3, 4)}, torch.tensor([0.1, 1.0, 2.0])
    stacked["lipschitz"] = torch.full((3,), 10.0)
    return stacked


def replies(strategy):
    update, weight = answers(), torch.tensor([1.0, 2.0, 0.0])
    task = strategy.configure(strategy.init({"w": torch.zeros(4)}), 1)
    return Replies([0, 1, 2], weight, update if task.reduce == "stack" else tree.weighted_mean(update, weight))


@pytest.mark.parametrize(
    "strategy",
    [FedAvg(), FedAvg(0.5), Scaffold(5), QFedAvg(0.1), *map(FedOpt, ["adam", "yogi", "adagrad", "momentum"])],
    ids=repr,
)
def test_every_strategy_that_ships_passes(strategy):
    check_strategy(strategy, {"w": torch.zeros(4)}, replies(strategy))


@dataclass(frozen=True)
class ChangesState(FedAvg):
    def aggregate(self, state, task, replies):
        state["params"]["w"].lerp_(replies.update["params"]["w"], self.lr)
        return state, {}


@dataclass(frozen=True)
class ChangesReplies(FedAvg):
    def aggregate(self, state, task, replies):
        return {"params": {"w": replies.update["params"]["w"].mul_(0.5)}}, {}


@dataclass(frozen=True)
class ChangesWeights(FedAvg):
    def aggregate(self, state, task, replies):
        replies.weight.div_(replies.weight.sum())
        return super().aggregate(state, task, replies)


@dataclass(frozen=True)
class ChangesParams(FedAvg):
    def init(self, params):
        return {"params": {"w": params["w"].add_(1)}}


@dataclass(frozen=True)
class AddsALeaf(FedAvg):
    def aggregate(self, state, task, replies):
        return super().aggregate(state, task, replies)[0] | {"momentum": torch.zeros(4)}, {}


@dataclass(frozen=True)
class LosesALeaf(FedAvg):
    def init(self, params):
        return {"params": params, "momentum": torch.zeros(4)}


@dataclass(frozen=True)
class Reshapes(FedAvg):
    def aggregate(self, state, task, replies):
        return {"params": {"w": replies.update["params"]["w"][None]}}, {}


@dataclass(frozen=True)
class ChangesType(FedAvg):
    def aggregate(self, state, task, replies):
        return {"params": {"w": replies.update["params"]["w"].double()}}, {}


@dataclass(frozen=True)
class CountsItsCalls(FedAvg):
    def aggregate(self, state, task, replies):
        object.__setattr__(self, "calls", getattr(self, "calls", 0) + 1)
        return {"params": {"w": replies.update["params"]["w"] * self.calls}}, {}


WRONG = {
    ChangesState: "changed the state",
    ChangesReplies: "changed the replies that it was given: update/params/w",
    ChangesWeights: "changed the replies that it was given: weight",
    ChangesParams: "init changed the parameters",
    AddsALeaf: "surplus momentum",
    LosesALeaf: "missing momentum",
    Reshapes: r"params/w has shape \(1, 4\), expected \(4,\)",
    ChangesType: "params/w",
    CountsItsCalls: "two answers|changed itself",
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_strategy_that_breaks_a_promise_is_told_which(kind):
    with pytest.raises(AssertionError, match=WRONG[kind]):
        check_strategy(kind(), {"w": torch.zeros(4)}, replies(kind()))
