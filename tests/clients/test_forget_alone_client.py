"""Active forgetting alone: only what is to be forgotten is looked at, and it is told how much of it was known."""

import pytest
import torch

from clients.forget_alone import ForgetAlone
from fedsim.engines.local import Sequential, Vectorised
from fedsim.engines.sequential import prepare
from fedsim.forgetting import at_hand
from fedsim.task import Cohort, Task
from fedsim.testing import check_client

both_engines = pytest.mark.parametrize("engine", [Sequential, Vectorised])


def answer(engine, federation, client, request=(1, 0)):
    shared = {"params": client.model.params} | at_hand(*request)
    replies = engine(federation, {"forget": client}, 3).execute(Task("forget", shared, round=1), Cohort(range(5)))
    assert not replies.failed
    return replies


@both_engines
def test_the_weight_is_how_much_is_to_be_forgotten_and_the_accuracy_is_that_of_the_model_sent(forgetful, engine):
    federation, model = forgetful()
    replies = answer(engine, federation, ForgetAlone(model=model, lr=0.5, epochs=3, batch_size=4))
    assert replies.weight.tolist() == [5, 0, 6, 0, 8]
    for ident in range(5):
        own = federation.examples(ident)
        gone = own["target"] == 1
        right = model.module(own["x"][gone]).argmax(1) == own["y"][gone]
        expected = right.double().mean() if gone.any() else torch.zeros((), dtype=torch.float64)
        assert replies.metrics["accuracy"][ident] == pytest.approx(float(expected))
    assert len(set(replies.metrics["accuracy"].tolist())) > 2


@both_engines
@pytest.mark.parametrize("memory", ["teacher", "mix", "random", "ascent"])
def test_other_examples_that_are_kept_change_no_bit(forgetful, engine, memory):
    federation, model = forgetful(torch.float32)
    client = ForgetAlone(model=model, lr=0.3, batch_size=4, memory=memory)
    kept = federation.columns["target"] == 0
    shared = {"params": model.params, "before": model.params} | at_hand(1, 0)

    def told():
        task = Task("forget", shared, round=1)
        replies = engine(federation, {"forget": client}, 3).execute(task, Cohort(range(5)))
        return [*replies.update["params"].values(), replies.weight, *replies.metrics.values()]

    before = told()
    federation.columns["x"][kept] = 1e9
    federation.columns["y"][kept] = 2
    assert all(torch.equal(one, other) for one, other in zip(before, told(), strict=True))
    federation.columns["x"][~kept] += 1
    assert not all(torch.equal(one, other) for one, other in zip(before, told(), strict=True))


def test_what_a_request_before_named_is_not_looked_at_either(forgetful):
    federation, model = forgetful()
    federation.columns["target"][:5] = torch.tensor([1, 2, 3, 1, 2])
    client = ForgetAlone(model=model, lr=0.3)
    engine = Sequential(federation, {"forget": client}, 3)
    for request, deleted, rows in ((1, 0, [0, 3]), (2, 1, [1, 4]), (3, 2, [2]), (3, 0, [0, 1, 2, 3, 4]), (3, 3, [])):
        data = prepare(engine, Task("forget", at_hand(request, deleted), round=1), 0)
        assert data["x"].tolist() == federation.columns["x"][rows].tolist()
        assert answer(Sequential, federation, client, (request, deleted)).weight[0] == len(rows)


@both_engines
def test_a_client_with_nothing_to_forget_sends_the_servers_model(forgetful, engine):
    federation, model = forgetful()
    update = answer(engine, federation, ForgetAlone(model=model, lr=0.3, epochs=2)).update["params"]
    for name, leaf in model.params.items():
        assert torch.equal(update[name][1], leaf) and torch.equal(update[name][3], leaf)
        assert not torch.equal(update[name][0], leaf)


def test_it_keeps_the_promises_of_a_client(forgetful):
    federation, model = forgetful(torch.float32)
    shared = {"params": model.params} | at_hand(1, 0)
    check_client(ForgetAlone(model=model, lr=0.3, batch_size=4, epochs=2), shared, federation)
