"""Both clients that forget, against steps written out: every memory, with and without a pull to the model before."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, one_hot

from clients.forget import ForgetWhileTraining
from clients.forget_alone import ForgetAlone
from fedsim import tree
from fedsim.data.federation import schedule
from fedsim.engines.local import Sequential, Vectorised
from fedsim.engines.sequential import prepare
from fedsim.forgetting import at_hand
from fedsim.model import Model
from fedsim.task import Cohort, Task

MEMORIES = ("teacher", "self", "mix", "random", "uniform", "ascent")
SEED, ROUND = 3, 2
GONE = {"gone": torch.tensor([False, True, False])}  # of the class 1 nothing is kept
CLIENTS = {"while training": ForgetWhileTraining, "alone": ForgetAlone}
both_clients = pytest.mark.parametrize("make", CLIENTS.values(), ids=CLIENTS)
both_engines = pytest.mark.parametrize("engine", [Sequential, Vectorised])


def sent(model, **others):
    """What a server sends in the second of two requests' rounds, the model before being another one."""
    generator = torch.Generator().manual_seed(7)
    before = tree.map(lambda leaf: leaf + 0.1 * torch.randn(leaf.shape, generator=generator).to(leaf), model.params)
    omega = tree.map(lambda leaf: torch.rand(leaf.shape, generator=generator).to(leaf) + 0.5, model.params)
    return {"params": model.params, "before": before, "omega": omega} | at_hand(1, 0) | others


def answer(engine, federation, client, shared):
    task = Task("forget", shared, round=ROUND)
    replies = engine(federation, {"forget": client}, SEED).execute(task, Cohort(range(5)))
    assert not replies.failed, replies.failed
    return replies


def law(memory, model, shared, x, y, q):
    """What is to be remembered, from the definitions; `q` is what the client has made."""
    label = one_hot(y, 3).bool()
    barred = label | shared.get("gone", torch.zeros(3, dtype=torch.bool))
    own = torch.func.functional_call(model.module, shared["before"], (x,)).masked_fill(barred, -1e9).softmax(1)
    if memory in ("random", "teacher", "mix"):
        assert torch.allclose(q.sum(1), torch.ones(len(q))) and (q >= 0).all() and not q[barred].any()
        assert memory != "random" or ((q == 0) | (q == 1)).all()
    return {
        "teacher": q,
        "random": q,
        "self": own,
        "mix": 0.5 * q + 0.5 * own,
        "uniform": (~barred).double() / (~barred).sum(1, keepdim=True),
        "ascent": -label.double(),
    }[memory]


def written_out(client, model, shared, data, rows):
    """The parameters after these steps, rows of `data`, one by one."""
    alone = isinstance(client, ForgetAlone)
    params = shared["params"]
    for step in rows:
        free = {name: leaf.clone().requires_grad_() for name, leaf in params.items()}
        x, y, gone = data["x"][step], data["y"][step], data["target"][step] == 1
        outputs = torch.func.functional_call(model.module, free, (x,))
        loss = torch.zeros((), dtype=torch.float64)
        if gone.any():
            p = law(client.memory, model, shared, x[gone], y[gone], data["q"][step][gone])
            loss = loss - (1 if alone else client.beta) * (p * outputs[gone].log_softmax(1)).sum(1).mean()
        if not gone.all():
            assert not alone
            loss = loss + cross_entropy(outputs[~gone], y[~gone])
        slope = dict(zip(free, torch.autograd.grad(loss, list(free.values())), strict=True))
        factor = min(1.0, client.clip / float(torch.cat([leaf.flatten() for leaf in slope.values()]).norm()))
        for name, leaf in params.items():
            moved = leaf - client.lr * factor * slope[name]
            start, omega = shared["before"][name], shared["omega"][name]
            pulled = start + (moved - start) / (1 + client.lr * client.strength * omega)
            params = params | {name: pulled if client.strength else moved}
    return params


@both_engines
@both_clients
@pytest.mark.parametrize(("strength", "others"), [(0.0, {}), (3.0, {}), (0.0, GONE)], ids=["free", "pulled", "gone"])
@pytest.mark.parametrize("memory", MEMORIES)
def test_the_steps_are_those_that_the_formulas_give(forgetful, make, engine, memory, strength, others):
    federation, model = forgetful()
    settings = {"lr": 0.3, "epochs": 2, "batch_size": 4, "memory": memory, "strength": strength, "clip": 0.4}
    client, shared = (
        make(model=model, **settings, **({"beta": 0.7} if make is ForgetWhileTraining else {})),
        sent(model, **others),
    )
    replies = answer(engine, federation, client, shared)
    here, task = Sequential(federation, {"forget": client}, SEED), Task("forget", shared, round=ROUND)
    for ident in range(5):
        data = prepare(here, task, ident)
        if client.ordered:
            rows = [(data["step"] == step).nonzero().flatten() for step in range(int(max([-1, *data["step"]])) + 1)]
        else:
            plan = schedule(np.array([len(data["y"])]), 2, 4, SEED, ROUND, [ident])[0]
            rows = [torch.from_numpy(step[step >= 0]) for step in plan]
        for name, leaf in written_out(client, model, shared, data, rows).items():
            torch.testing.assert_close(replies.update["params"][name][ident], leaf, rtol=1e-7, atol=1e-9)
    moved = [any(not torch.equal(replies.update["params"][n][i], p) for n, p in model.params.items()) for i in range(5)]
    something = [True, make is ForgetWhileTraining, True, False, True]  # to train on
    assert moved == something


@both_engines
@both_clients
def test_an_enormous_strength_leaves_the_parameters_where_they_were(forgetful, make, engine):
    federation, model = forgetful()
    shared = sent(model, before=model.params)
    held = answer(engine, federation, make(model=model, lr=0.3, batch_size=4, strength=1e12), shared)
    free = answer(engine, federation, make(model=model, lr=0.3, batch_size=4), shared)
    for name, leaf in model.params.items():
        torch.testing.assert_close(held.update["params"][name], leaf.expand(5, *leaf.shape), rtol=0, atol=1e-6)
        assert float((free.update["params"][name][0] - leaf).abs().max()) > 1e-2


@both_engines
@both_clients
def test_without_strength_what_a_server_says_of_importance_changes_no_bit(forgetful, make, engine):
    federation, model = forgetful(torch.float32)
    client = make(model=model, lr=0.3, batch_size=4, strength=0.0)
    plain = {"params": model.params} | at_hand(1, 0)
    one, other = (answer(engine, federation, client, shared).update["params"] for shared in (plain, sent(model)))
    assert all(torch.equal(leaf, other[name]) for name, leaf in one.items())


@both_clients
@pytest.mark.parametrize(
    ("settings", "lacking", "told"),
    [
        (
            {"memory": "self"},
            {"before"},
            "memory = 'self' needs the model before it forgets: set strategy.remember = \"model\"",
        ),
        ({"memory": "mix"}, {"before"}, "memory = 'mix' needs the model before it forgets"),
        (
            {"strength": 2.0},
            {"omega"},
            'strength = 2.0 needs omega of the server: set strategy.remember = "importance"',
        ),
        ({"strength": 2.0}, {"omega", "before"}, "strength = 2.0 needs before and omega of the server"),
        ({}, {"request"}, "the server does not say 'request': use a strategy that knows of requests, such as `forget`"),
        ({}, {"deleted"}, "the server does not say 'deleted'"),
    ],
)
def test_what_the_server_does_not_send_is_told_with_what_to_set(forgetful, make, settings, lacking, told):
    federation, model = forgetful()
    shared = {name: leaf for name, leaf in sent(model).items() if name not in lacking}
    for engine in (Sequential, Vectorised):
        here = engine(federation, {"forget": make(model=model, lr=0.1, **settings)}, SEED)
        assert told in here.execute(Task("forget", shared), Cohort([0, 4])).failed[0]


@both_clients
@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (
            {"memory": "teachers"},
            "memory must be one of 'teacher', 'self', 'mix', 'random', 'uniform', 'ascent', got 'teachers'",
        ),
        ({"strength": -1.0}, "strength must be >= 0, got -1"),
        ({"clip": 0.0}, "clip must be > 0, got 0"),
        ({"teachers": 0}, "teachers must be >= 1, got 0"),
        ({"temperature": 0.0}, "temperature must be > 0, got 0"),
    ],
)
def test_settings_out_of_range_are_refused(forgetful, make, settings, told):
    with pytest.raises(ValueError, match=told):
        make(model=forgetful()[1], lr=0.1, **settings)


@both_engines
@both_clients
@pytest.mark.parametrize("memory", ["teacher", "self"])
def test_a_network_that_takes_no_empty_batch_is_never_given_one(forgetful, make, engine, memory):
    class Picky(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(1, 2, 2), nn.Linear(2, 3)

        def forward(self, x):
            return self.second(self.first(x.view(len(x), 1, 2, 2)).view(len(x), -1))  # of nothing, -1 is anything

    federation, _ = forgetful(torch.float32)
    model = Model(Picky())
    with pytest.raises(RuntimeError, match="0 elements"):
        model.predict(model.params, {"x": torch.zeros(0, 4)})
    replies = answer(engine, federation, make(model=model, lr=0.1, batch_size=4, memory=memory), sent(model))
    assert replies.ids == [0, 1, 2, 3, 4]


@both_clients
def test_every_epoch_and_round_and_client_has_teachers_of_its_own(forgetful, make):
    federation, model = forgetful()
    federation.columns["x"][33:39] = federation.columns["x"][:6]  # the third client's are the first ones of the first
    federation.columns["y"][33:39] = federation.columns["y"][:6]
    client = make(model=model, lr=0.1, batch_size=4, temperature=0.01)

    def memory(round, ident, seed=SEED):
        here = Sequential(federation, {"forget": client}, seed)
        data = prepare(here, Task("forget", sent(model), round=round), ident)
        gone = data["target"] == 1
        order = data["x"][gone][:, 0].argsort()
        return data["q"][gone][order][:5]

    first = memory(1, 0)
    assert torch.equal(first, memory(1, 0))
    assert all(not torch.equal(first, other) for other in (memory(2, 0), memory(1, 2), memory(1, 0, SEED + 1)))
