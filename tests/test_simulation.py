"""The loop: it can be resumed to the bit, and it tells what it could not do."""

from itertools import islice

import numpy as np
import pytest
import torch

from clients.scaffold import ControlledSgd
from clients.sgd import Sgd
from fedsim import tree
from fedsim.data.federation import Federation
from fedsim.engines.local import Sequential, Vectorised
from fedsim.method import averages
from fedsim.personal import Personal
from fedsim.sampling import dropout, everyone, uniform
from fedsim.simulation import Snapshot, TooFewReplies, begin, rounds
from fedsim.task import Replies, Task
from strategies.fedavg import FedAvg
from strategies.scaffold import Scaffold

SIZES = (0, 1, 7, 20, 33, 2)


def take(loop, number):
    return [next(loop) for _ in range(number)]


def saved(snapshot):
    """What a checkpoint would hold."""
    copies = [
        {name: leaf.clone() for name, leaf in flat.items()}
        for flat in (tree.flatten(snapshot.state), snapshot.personal.flat())
    ]
    return snapshot.round, *copies


@pytest.mark.parametrize("engine", [Sequential, Vectorised])
def test_three_rounds_a_reload_and_three_more_are_six_rounds_to_the_bit(classification, engine):
    model, federation = classification(SIZES)
    clients = {"train": ControlledSgd(model=model, lr=0.1, epochs=2, batch_size=8)}
    strategy, sample = Scaffold(6), uniform(6, 4, count=3)

    def loop(snapshot):
        return rounds(strategy, engine(federation, clients, 4), sample, snapshot)

    whole = take(loop(begin(strategy, model.params, clients, 6, 4)), 6)[-1].snapshot
    number, state, kept = saved(take(loop(begin(strategy, model.params, clients, 6, 4)), 3)[-1].snapshot)
    personal = Personal(clients, 6, 4)
    personal.load(kept)
    restored = tree.restore(state, strategy.init(model.params))
    resumed = take(loop(Snapshot(number, restored, personal)), 3)[-1].snapshot
    assert resumed.round == whole.round == 6
    for one, other in zip(saved(whole)[1:], saved(resumed)[1:], strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(leaf, other[name]) for name, leaf in one.items())

    forgetful = take(loop(Snapshot(number, restored, Personal(clients, 6, 4))), 3)[-1].snapshot
    assert not torch.equal(forgetful.state["params"]["0.weight"], whole.state["params"]["0.weight"]), (
        "what clients keep makes a difference"
    )


def test_a_generator_taken_further_gives_the_same_rounds_as_one_taken_at_once(classification):
    model, federation = classification(SIZES)
    clients = {"train": Sgd(model=model, lr=0.1)}

    def start():
        return rounds(FedAvg(), Sequential(federation, clients), everyone(6), begin(FedAvg(), model.params, clients, 6))

    first, again = take(start(), 2), take(start(), 2)
    assert [one.snapshot.round for one in first] == [1, 2]
    for one, other in zip(first, again, strict=True):
        assert one.metrics == other.metrics
        assert torch.equal(one.snapshot.state["params"]["0.weight"], other.snapshot.state["params"]["0.weight"])


@pytest.mark.parametrize("engine", [Sequential, Vectorised])
def test_other_names_for_the_clients_leave_fedavgs_model_the_same(classification, engine):
    model, federation = classification(SIZES, torch.float64)
    order = np.array([4, 2, 0, 5, 1, 3])
    renamed = Federation(federation.columns, federation.rows, federation.bounds[order])
    found = []
    for data in (federation, renamed):
        clients = {"train": Sgd(model=model, lr=0.1, epochs=3, batch_size=64)}  # whole batches: their order is nothing
        loop = rounds(FedAvg(), engine(data, clients), everyone(6), begin(FedAvg(), model.params, clients, 6))
        found.append(take(loop, 3)[-1].snapshot.state["params"])
    for name, leaf in found[0].items():
        torch.testing.assert_close(found[1][name], leaf, rtol=1e-10, atol=1e-12)
    assert not torch.allclose(found[0]["0.weight"], model.params["0.weight"], atol=1e-2), "there was training"


def test_who_is_drawn_is_a_function_of_seed_and_round():
    draws = [uniform(50, 1, count=5)(round).ids for round in range(1, 20)]
    backwards = [uniform(50, 1, count=5)(round).ids for round in range(19, 0, -1)][::-1]
    assert draws == backwards
    assert draws != [uniform(50, 2, count=5)(round).ids for round in range(1, 20)]
    assert len({tuple(ids) for ids in draws}) > 15, "rounds differ"


def test_a_client_that_dropped_out_is_told_as_failed_and_was_sent_the_model(classification):
    model, federation = classification(SIZES)
    clients = {"train": Sgd(model=model, lr=0.1)}
    sample = dropout(everyone(6), 0.5, seed=1)
    draw = sample(1)
    assert 0 < len(draw.dropped) < 6
    loop = rounds(FedAvg(), Sequential(federation, clients), sample, begin(FedAvg(), model.params, clients, 6))
    first = next(loop)
    assert first.failed == dict.fromkeys(draw.dropped, "dropped out")
    assert first.answered == len(draw.ids)
    size = 4 * sum(leaf.numel() for leaf in model.params.values())
    assert first.traffic.down == 6 * size
    assert first.traffic.up == len(draw.ids) * (size + 8 + 8)


class FailsFrom(Sequential):
    """Its clients 3, 4 and 5 fail from a round on."""

    def execute(self, task, cohort):
        replies = super().execute(task, cohort)
        if task.round < 3:
            return replies
        kept = torch.tensor([place for place, ident in enumerate(replies.ids) if ident < 3])
        lost = {ident: "Traceback\nOSError: the disk is full" for ident in replies.ids if ident >= 3}
        return replies._replace(
            ids=replies.ids[:3], weight=replies.weight[kept], personal=tree.take(replies.personal, kept),
            metrics=tree.take(replies.metrics, kept), failed=lost,
        )  # fmt: skip


def test_too_few_answers_end_the_run_and_the_snapshot_before_still_holds(classification):
    model, federation = classification(SIZES)
    clients = {"train": ControlledSgd(model=model, lr=0.1, batch_size=8)}
    strategy, engine = Scaffold(6), FailsFrom(federation, clients)
    loop = rounds(strategy, engine, everyone(6), begin(strategy, model.params, clients, 6), min_replies=4)
    last = take(loop, 2)[-1].snapshot
    before = saved(last)
    with pytest.raises(
        TooFewReplies, match="round 3: 3 of 6 clients answered, min_replies is 4.*the disk is full"
    ) as caught:
        next(loop)
    assert caught.value.round == 3 and set(caught.value.failed) == {3, 4, 5}
    after = saved(last)
    assert all(torch.equal(leaf, after[2][name]) for name, leaf in before[2].items())
    resumed = next(rounds(strategy, Sequential(federation, clients), everyone(6), last))
    whole = take(
        rounds(strategy, Sequential(federation, clients), everyone(6), begin(strategy, model.params, clients, 6)), 3
    )
    assert torch.equal(resumed.snapshot.state["params"]["0.weight"], whole[-1].snapshot.state["params"]["0.weight"])
    enough = rounds(strategy, engine, everyone(6), begin(strategy, model.params, clients, 6), min_replies=3)
    assert take(enough, 3)[-1].answered == 3


def test_a_round_that_nobody_answers_ends_the_run_or_changes_nothing_as_min_replies_says(classification):
    model, federation = classification(SIZES)
    clients = {"train": Sgd(model=model, lr=0.1)}
    first = begin(FedAvg(), model.params, clients, 6)
    nobody = dropout(everyone(6), 1.0)
    with pytest.raises(
        TooFewReplies, match="round 1: 0 of 6 clients answered, min_replies is 1; the others: dropped out"
    ):
        next(rounds(FedAvg(), Sequential(federation, clients), nobody, first))
    allowed = take(rounds(FedAvg(), Sequential(federation, clients), nobody, first, min_replies=0), 2)
    assert [(step.snapshot.round, step.answered, len(step.failed)) for step in allowed] == [(1, 0, 6), (2, 0, 6)]
    assert allowed[-1].snapshot.state is first.state


class Chooses(FedAvg):
    def configure(self, state, round):
        return Task("train", {"params": state["params"]}, ids=[4, 2], reduce="mean")


def test_a_strategy_that_names_its_clients_is_not_asked_by_the_sampler(classification):
    model, federation = classification(SIZES)
    clients = {"train": Sgd(model=model, lr=0.1)}
    loop = rounds(Chooses(), Sequential(federation, clients), everyone(6), begin(Chooses(), model.params, clients, 6))
    assert next(loop).answered == 2


def test_metrics_are_averaged_by_weight_and_named_after_the_action():
    replies = Replies([0, 1], torch.tensor([1.0, 3.0]), {}, metrics={"loss": torch.tensor([2.0, 6.0])})
    assert averages(replies) == {"loss": (1 * 2 + 3 * 6) / 4}
    assert averages(replies._replace(weight=torch.zeros(2))) == {}


class Squeezes(FedAvg):
    def aggregate(self, state, task, replies):
        return tree.map(lambda leaf: leaf.sum(), state), {}


class Expects(FedAvg):
    def aggregate(self, state, task, replies):
        return {"params": replies.update["control"]}, {}


def test_a_state_that_changes_its_shape_ends_the_run_by_name(classification):
    model, federation = classification(SIZES)
    clients = {"train": Sgd(model=model, lr=0.1)}
    engine = Sequential(federation, clients)
    with pytest.raises(ValueError, match=r"the state that Squeezes made in round 1 does not fit: params/.* has shape"):
        next(rounds(Squeezes(), engine, everyone(6), begin(Squeezes(), model.params, clients, 6)))
    with pytest.raises(KeyError) as caught:
        next(rounds(Expects(), engine, everyone(6), begin(Expects(), model.params, clients, 6)))
    assert "Expects was to aggregate params/" in caught.value.__notes__[0]


class Content(FedAvg):
    """Counts its rounds, and is done after three of them."""

    def init(self, params):
        return {"params": params, "rounds": torch.tensor(0)}

    def aggregate(self, state, task, replies):
        params, metrics = super().aggregate({"params": state["params"]}, task, replies)
        return params | {"rounds": state["rounds"] + 1}, metrics

    def done(self, state):
        return bool(state["rounds"] >= 3)


def test_a_strategy_that_is_done_ends_the_loop_with_the_round_that_made_it_so(classification):
    model, federation = classification(SIZES)
    clients = {"train": Sgd(model=model, lr=0.1)}

    def loop(strategy):
        engine = Sequential(federation, clients)
        return rounds(strategy, engine, everyone(6), begin(strategy, model.params, clients, 6))

    steps = list(islice(loop(Content()), 9))
    assert [(step.snapshot.round, step.done) for step in steps] == [(1, False), (2, False), (3, True)]
    others = take(loop(FedAvg()), 4)
    assert [(step.snapshot.round, step.done) for step in others] == [(n, False) for n in (1, 2, 3, 4)]
    for name, leaf in others[2].snapshot.state["params"].items():
        assert torch.equal(steps[-1].snapshot.state["params"][name], leaf)


def test_a_strategy_that_was_done_already_has_no_round_and_asks_nobody(classification):
    model, federation = classification(SIZES)
    clients = {"train": Sgd(model=model, lr=0.1)}
    first = begin(Content(), model.params, clients, 6)
    enough = first._replace(round=3, state=first.state | {"rounds": torch.tensor(3)})

    class Nobody(Sequential):
        def execute(self, task, cohort):
            raise AssertionError("somebody was asked")

    assert list(rounds(Content(), Nobody(federation, clients), everyone(6), enough)) == []
    almost = first._replace(round=2, state=first.state | {"rounds": torch.tensor(2)})
    (last,) = rounds(Content(), Sequential(federation, clients), everyone(6), almost)
    assert (last.snapshot.round, last.done) == (3, True)


def test_a_round_that_nobody_answers_brings_no_strategy_nearer_to_its_end(classification):
    model, federation = classification(SIZES)
    clients = {"train": Sgd(model=model, lr=0.1)}
    first = begin(Content(), model.params, clients, 6)
    nobody = dropout(everyone(6), 1.0)
    steps = take(rounds(Content(), Sequential(federation, clients), nobody, first, min_replies=0), 5)
    assert not any(step.done for step in steps)
