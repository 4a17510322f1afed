"""A client answers the same whether it runs alone or vectorised: the framework's main test.

A new client needs one line in SHIPPED.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import pytest
import torch

from clients.activations import MeasureActivations
from clients.fairfed import ReweightedSgd
from clients.fedfact import FairSgd
from clients.fedmf import factors
from clients.fedrecgel import DualSam
from clients.fedrecgel_loss import UserLoss
from clients.forget import ForgetWhileTraining
from clients.forget_alone import ForgetAlone
from clients.ncf import OWN, scorer
from clients.penalty import PenalisedAdam
from clients.pfedrec import TABLE, DualPersonal
from clients.pfedrec import scorer as layer
from clients.prox import Prox
from clients.qfedavg import LossThenSgd
from clients.retained import Retained
from clients.sam import Sam
from clients.scaffold import ControlledSgd
from clients.sgd import Sgd
from clients.wassffed import CountScores, TransportAdam
from clients.weigh import Weigh
from fedsim import tree
from fedsim.client import Client
from fedsim.engines.local import Sequential, Vectorised
from fedsim.evaluation import Evaluate
from fedsim.forgetting import at_hand
from fedsim.model import Model
from fedsim.personal import Personal
from fedsim.sharpness import MeanLoss
from fedsim.task import Cohort, Reply, Task

SIZES = (0, 1, 7, 20, 33, 2, 33, 0, 16)
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


@dataclass(frozen=True)
class Resampling(Sgd):
    """Draws its examples anew in every round, more or fewer than it has."""

    def prepare(self, examples, rng):
        size = len(examples["y"])
        drawn = int(torch.randint(2 * size + 1, (), generator=rng))
        chosen = torch.randint(max(size, 1), (drawn,), generator=rng)
        noise = torch.randn(drawn, 5, generator=rng).to(examples["x"].dtype)
        return {"x": examples["x"][chosen] + 0.1 * noise, "y": examples["y"][chosen]}


@dataclass(frozen=True)
class Touching(Client):
    """Moves the rows of a table that its items name, and sends only those; keeps how far it went."""

    lr: float

    def personal(self, rng):
        return {"moved": torch.zeros((), dtype=torch.float64)}

    def start(self, shared, personal, data):
        return {"table": shared["table"], "moved": personal["moved"]}

    def step(self, state, batch):
        pull = torch.where(batch["mask"][:, None], self.lr * (batch["x"] - state["table"][batch["item"]]), 0.0)
        return state | {"table": state["table"].index_add(0, batch["item"], pull)}

    def finish(self, shared, state, data):
        item, mask = data["item"], data["mask"]
        change = state["table"] - shared["table"]
        often = torch.zeros(9, dtype=change.dtype).index_add(0, item, mask.to(change.dtype))  # (I,)
        values = torch.where(mask[:, None], change[item] / often[item].clamp(min=1)[:, None], 0.0)
        update = {"table": tree.Rows(torch.where(mask, item, -1), values, 9)}
        moved = state["moved"] + change.abs().sum()
        return Reply(update, mask.sum().double(), {"moved": moved}, {"moved": moved})


@dataclass(frozen=True, kw_only=True)
class WithEmbedding(UserLoss):
    """Begins with a user's embedding, where no DualSam has made one."""

    def personal(self, rng):
        return {"own": {name: leaf for name, leaf in self.model.params.items() if name.startswith(OWN)}}


class Shipped(NamedTuple):
    """A client, and what it is sent besides the model's parameters."""

    client: Callable[[Model], Client]
    sent: Callable[[Model], tree.Tree] = lambda model: {}


def half(model):
    return {"control": tree.map(lambda leaf: 0.5 * leaf, model.params)}


def asked(model):
    """A request, what the model was before, and which of its parameters matter."""
    weighed = {
        name: torch.linspace(0, 2, leaf.numel()).reshape(leaf.shape).to(leaf) for name, leaf in model.params.items()
    }
    return at_hand(1, 0) | {"before": tree.map(lambda leaf: 0.9 * leaf, model.params), "omega": weighed}


def priced(model):
    return {"price": torch.tensor([[0.3, 0.0, -0.3], [-0.5, 0.2, 0.0]], dtype=model.params["0.weight"].dtype)}


def carried(model):
    like = model.params["0.weight"]
    maps = torch.linspace(0, 1, 21, dtype=like.dtype).square().expand(2, 3, 21)
    return {"maps": maps, "alpha": like.new_tensor(0.4)}


def shared_ncf(model):
    return {"params": {name: leaf for name, leaf in ncf(model).params.items() if not name.startswith(OWN)}}


def ncf(model):
    """A small recommender of the same type, for more items than there are."""
    small = scorer(60, dim=4, layers=2)
    return Model(small.module.to(model.params["0.weight"].dtype), small.criterion, "item", "y")


def mf(model):
    """Matrix factorisation of the same type, for more items than there are."""
    small = factors(60, dim=4, spread=0.3)
    return Model(small.module.to(model.params["0.weight"].dtype), small.criterion, "item", "y")


def score_layer(model):
    """A smaller one, of the same type."""
    small = layer(60, dim=4)
    return Model(small.module.to(model.params["0.weight"].dtype), small.criterion, "item", "y")


SHIPPED = {
    "sgd": Shipped(lambda model: Sgd(model=model, lr=0.1, epochs=2, batch_size=8)),
    "momentum": Shipped(
        lambda model: Sgd(model=model, lr=0.1, momentum=0.9, weight_decay=0.01, epochs=3, batch_size=8)
    ),
    "full batch": Shipped(lambda model: Sgd(model=model, lr=0.1, epochs=2, batch_size=64)),
    "single examples": Shipped(lambda model: Sgd(model=model, lr=0.1, batch_size=1)),
    "prox": Shipped(lambda model: Prox(model=model, lr=0.1, mu=0.5, epochs=2, batch_size=8)),
    "sam": Shipped(
        lambda model: Sam(model=model, lr=0.1, rho=0.3, momentum=0.5, weight_decay=0.01, epochs=2, batch_size=8)
    ),
    "asam": Shipped(lambda model: Sam(model=model, lr=0.1, rho=0.5, adaptive=True, epochs=2, batch_size=8)),
    "scaffold": Shipped(lambda model: ControlledSgd(model=model, lr=0.1, epochs=2, batch_size=8), half),
    "qfedavg": Shipped(lambda model: LossThenSgd(model=model, lr=0.1, epochs=2, batch_size=8)),
    "fedfact": Shipped(
        lambda model: FairSgd(model, 3, 2, lr=0.1, local_tolerance=0.05, average=3, epochs=2, batch_size=8), priced
    ),
    "fairfed": Shipped(lambda model: ReweightedSgd(model, 3, 2, lr=0.1, epochs=2, batch_size=8)),
    "wassffed": Shipped(lambda model: TransportAdam(model, 2, lr=0.03, epochs=2, batch_size=8), carried),
    "wassffed, squares": Shipped(
        lambda model: TransportAdam(model, 2, lr=0.03, power=2, targets="argsort", epochs=2, batch_size=8), carried
    ),
    "count scores": Shipped(lambda model: CountScores(model=model, num_groups=2, bins=21)),
    "penalty": Shipped(lambda model: PenalisedAdam(model, 2, lr=0.03, penalty=0.7, epochs=2, batch_size=8)),
    "fedrecgel": Shipped(lambda model: DualSam(model=ncf(model), lr=0.1, negatives=2, piece=16), shared_ncf),
    "loss": Shipped(lambda model: MeanLoss(model=model, batch_size=8)),
    "loss and its slope": Shipped(lambda model: MeanLoss(model=model, slope=True, batch_size=8)),
    "fedrecgel's loss": Shipped(lambda model: WithEmbedding(model=ncf(model), negatives=2), shared_ncf),
    "fedrecgel's loss and its slope": Shipped(
        lambda model: WithEmbedding(model=ncf(model), negatives=2, slope=True), shared_ncf
    ),
    "forget while training": Shipped(
        lambda model: ForgetWhileTraining(model=model, lr=0.1, epochs=2, batch_size=8), asked
    ),
    "forget while training, with importance": Shipped(
        lambda model: ForgetWhileTraining(model=model, lr=0.1, memory="mix", strength=2.0, epochs=2, batch_size=8),
        asked,
    ),
    "forget alone": Shipped(
        lambda model: ForgetAlone(model=model, lr=0.1, memory="self", strength=2.0, epochs=2, batch_size=8), asked
    ),
    "weigh": Shipped(lambda model: Weigh(model=model, batch_size=8), asked),
    "retained": Shipped(
        lambda model: Retained(client=Sgd(model=model, lr=0.1, momentum=0.9, epochs=2, batch_size=8)), asked
    ),
    "activations": Shipped(lambda model: MeasureActivations(model=model, batch_size=8), asked),
    "fedmf": Shipped(
        lambda model: DualSam(model=mf(model), lr=0.5, rho_shared=0, rho_own=0, rule="sgd", negatives=2),
        lambda model: {"params": {"item_factors": mf(model).params["item_factors"]}},
    ),
    "pfedrec": Shipped(
        lambda model: DualPersonal(
            model=score_layer(model), lr=0.1, lr_eta=0.5, negatives=2, capacity=59, epochs=2, batch_size=16
        ),
        lambda model: {"params": {TABLE: score_layer(model).params[TABLE]}},
    ),
    "evaluate": Shipped(lambda model: Evaluate(model=model, num_classes=3, part="train", batch_size=8)),
    "evaluate with scores by group": Shipped(
        lambda model: Evaluate(model=model, num_classes=3, num_groups=2, score_bins=11, part="train", batch_size=8)
    ),
    "evaluate without classes": Shipped(lambda model: Evaluate(model=model, part="train", batch_size=8)),
    "its own prepare": Shipped(lambda model: Resampling(model=model, lr=0.1, momentum=0.5, epochs=2, batch_size=8)),
    "rows of a table": Shipped(
        lambda model: Touching(lr=0.3, epochs=2, batch_size=8),
        lambda model: {"table": torch.linspace(-1, 1, 45, dtype=model.params["0.weight"].dtype).reshape(9, 5)},
    ),
}


def kept_before(client, ids):
    """What the clients keep, other than at first, where everything is zero."""

    def some(leaf):
        return leaf + torch.stack([torch.full(leaf.shape[1:], 0.1 * (ident + 1), dtype=leaf.dtype) for ident in ids])

    return tree.map(some, Personal({"train": client}, len(SIZES), 0).gather(ids))


def execute(engine, client, shared, ids, reduce="stack"):
    replies = engine.execute(Task("train", shared, round=4, reduce=reduce), Cohort(ids, kept_before(client, ids)))
    assert replies.failed == {}
    assert replies.ids == list(ids)
    return replies


def by_client(replies, reduce):
    """What was answered, as named tensors; stacked parts in ascending order of clients, rows as tables."""
    order = torch.tensor(replies.ids).argsort()
    stacked = {"weight": replies.weight, "personal": replies.personal, "metrics": replies.metrics}
    folded = {"update": replies.update} if reduce != "stack" else {}
    stacked |= {"update": replies.update} if reduce == "stack" else {}

    def table(leaf):
        if not isinstance(leaf, tree.Rows):
            return leaf
        return torch.stack([tree.Rows(i, v, leaf.size).dense() for i, v in zip(leaf.index, leaf.values, strict=True)])

    whole = tree.map(lambda leaf: leaf.dense() if isinstance(leaf, tree.Rows) else leaf, folded)
    return tree.flatten(tree.take(tree.map(table, stacked), order)) | tree.flatten(whole)


def assert_same(one, other, dtype, reduce="stack"):
    first, second = by_client(one, reduce), by_client(other, reduce)
    assert first.keys() == second.keys()
    for name, leaf in first.items():
        allowed = max(TOLERANCE[dtype], TOLERANCE.get(leaf.dtype, 0)) * float(leaf.abs().max())
        torch.testing.assert_close(second[name], leaf, rtol=0, atol=allowed, msg=lambda text, name=name: name + text)
    assert one.traffic == other.traffic


def both(classification, name, dtype):
    model, federation = classification(SIZES, dtype)
    columns = federation.columns | {"target": federation.columns["a"]}  # one of the groups is to be forgotten
    federation, case = replace(federation, columns=columns), SHIPPED[name]
    client = case.client(model)
    return {"train": client}, federation, {"params": model.params} | case.sent(model)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", SHIPPED)
def test_a_client_answers_vectorised_what_it_answers_alone_in_blocks_of_any_size(classification, name, dtype):
    clients, federation, shared = both(classification, name, dtype)
    ids = list(range(len(SIZES)))
    alone = execute(Sequential(federation, clients, seed=5), clients["train"], shared, ids)
    for block in (1, 2, 4, None):
        together = execute(Vectorised(federation, clients, 5, block), clients["train"], shared, ids)
        assert_same(alone, together, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", SHIPPED)
def test_the_order_in_which_clients_are_named_changes_no_answer(classification, name, dtype):
    clients, federation, shared = both(classification, name, dtype)
    alone = execute(Sequential(federation, clients, seed=5), clients["train"], shared, [0, 1, 2, 3, 4, 5, 6, 7, 8])
    for ids, block in (([8, 7, 6, 5, 4, 3, 2, 1, 0], None), ([3, 0, 8, 1, 6, 5, 2, 7, 4], 4)):
        for engine in (Sequential(federation, clients, 5), Vectorised(federation, clients, 5, block)):
            assert_same(alone, execute(engine, clients["train"], shared, ids), dtype)


@pytest.mark.parametrize("reduce", ["mean", "sum"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", SHIPPED)
def test_what_is_folded_is_the_mean_or_sum_of_what_is_stacked_on_both_engines(classification, name, dtype, reduce):
    clients, federation, shared = both(classification, name, dtype)
    ids = [3, 0, 8, 1, 6, 5, 2, 7, 4]
    alone = execute(Sequential(federation, clients, seed=5), clients["train"], shared, ids, reduce)
    for block in (2, None):
        together = execute(Vectorised(federation, clients, 5, block), clients["train"], shared, ids, reduce)
        assert_same(alone, together, dtype, reduce)

    stacked = execute(Sequential(federation, clients, 5), clients["train"], shared, ids)
    factor = stacked.weight.double() / stacked.weight.double().sum() if reduce == "mean" else torch.ones(len(ids))
    for name, leaf in tree.items(stacked.update):
        each = [tree.take({"leaf": leaf}, place)["leaf"] for place in range(len(ids))]
        each = [one.dense() if isinstance(one, tree.Rows) else one for one in each]
        expected = sum(one.double() * share for one, share in zip(each, factor.double(), strict=True))
        found = by_client(alone, reduce)[f"update/{name}"]
        near = max(TOLERANCE[dtype], TOLERANCE.get(found.dtype, 0))  # the mean of counts is float32
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=near * float(expected.abs().max()))


@pytest.mark.parametrize("name", ["momentum", "scaffold", "its own prepare", "rows of a table"])
def test_a_clients_answer_does_not_depend_on_who_else_takes_part(classification, name):
    clients, federation, shared = both(classification, name, torch.float64)
    everyone = execute(Vectorised(federation, clients, 5), clients["train"], shared, list(range(len(SIZES))))
    for ids in ([2], [4, 1], [0]):
        few = execute(Vectorised(federation, clients, 5), clients["train"], shared, ids)
        chosen = tree.take(tree.map(dense, everyone.update), torch.tensor(ids))
        for name, leaf in tree.flatten(tree.map(dense, few.update)).items():
            torch.testing.assert_close(leaf, tree.flatten(chosen)[name], rtol=1e-10, atol=1e-12)


def dense(leaf):
    if not isinstance(leaf, tree.Rows):
        return leaf
    return torch.stack([tree.Rows(i, v, leaf.size).dense() for i, v in zip(leaf.index, leaf.values, strict=True)])


def test_one_engine_gives_the_same_bits_twice_and_others_with_another_seed_or_round(classification):
    clients, federation, shared = both(classification, "sgd", torch.float32)
    task = Task("train", shared, round=1)
    for engine in (Sequential, Vectorised):
        first = engine(federation, clients, 1).execute(task, Cohort([4])).update["params"]["0.weight"]
        again = engine(federation, clients, 1).execute(task, Cohort([4])).update["params"]["0.weight"]
        seed = engine(federation, clients, 2).execute(task, Cohort([4])).update["params"]["0.weight"]
        later = engine(federation, clients, 1).execute(task._replace(round=2), Cohort([4])).update["params"]["0.weight"]
        assert torch.equal(first, again)
        assert not torch.equal(first, seed) and not torch.equal(first, later)


# Negative controls: what these tests are there to catch, they catch.


@dataclass(frozen=True)
class IgnoresTheMask(Sgd):
    def step(self, state, batch):
        return super().step(state, batch | {"mask": torch.ones_like(batch["mask"])})


@dataclass(frozen=True)
class CountsPaddedExamples(Sgd):
    def finish(self, shared, state, data):
        return super().finish(shared, state, data | {"mask": torch.ones_like(data["mask"])})


@dataclass(frozen=True)
class KeepsPaddedSteps(Sgd):
    """A hand-written cohort that forgets to throw the steps of finished clients away."""

    def run_cohort(self, shared, personal, data, rows):
        def one(data, rows):
            state = self.start(shared, {}, data)
            for step in rows.unbind(0):
                state = self.step(state, tree.take(data, step.clamp(min=0)) | {"mask": step >= 0})
            return self.finish(shared, state, data)._asdict()

        return Reply(**torch.func.vmap(one)(data, rows))


@pytest.mark.parametrize("wrong", [IgnoresTheMask, CountsPaddedExamples, KeepsPaddedSteps])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_equality_would_fail_for_a_client_that_lets_padding_count(classification, wrong, dtype):
    model, federation = classification(SIZES, dtype)
    clients = {"train": wrong(model=model, lr=0.1, momentum=0.9, epochs=2, batch_size=8)}
    ids, shared = list(range(len(SIZES))), {"params": model.params}
    alone = execute(Sequential(federation, clients), clients["train"], shared, ids)
    together = execute(Vectorised(federation, clients), clients["train"], shared, ids)
    with pytest.raises(AssertionError):
        assert_same(alone, together, dtype)
