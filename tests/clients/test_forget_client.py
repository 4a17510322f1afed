"""Active forgetting: ordinary steps where there is nothing to forget, and a class that is gone and stays away."""

from dataclasses import replace
from functools import cache
from itertools import islice

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn.functional import cross_entropy, log_softmax

from clients.forget import ForgetWhileTraining
from clients.sgd import Sgd
from fedsim.data.federation import Federation
from fedsim.engines.local import Sequential, Vectorised
from fedsim.engines.sequential import prepare
from fedsim.model import Model
from fedsim.sampling import everyone
from fedsim.simulation import begin, rounds
from fedsim.task import Cohort, Task
from fedsim.testing import check_client
from strategies.fedavg import FedAvg


def clients_of(parts):
    """A federation of tables (x, y, target)."""
    sizes = torch.tensor([len(y) for _, y, _ in parts])
    ends = sizes.cumsum(0)
    columns = {name: torch.cat([part[place] for part in parts]) for place, name in enumerate(("x", "y", "target"))}
    bounds = torch.stack([ends - sizes, ends, ends, ends], 1).numpy()
    return Federation(columns, np.arange(int(sizes.sum())), bounds)


def small(dtype=torch.float64):
    """Clients of which some have much to forget, one nothing, one nothing else, and one no example at all."""
    generator = torch.Generator().manual_seed(0)
    parts = []
    for size, gone in ((20, 5), (13, 0), (6, 6), (0, 0), (9, 8)):
        x = torch.randn(size, 4, generator=generator, dtype=dtype)
        y = torch.randint(3, (size,), generator=generator)
        parts.append((x, y, (torch.arange(size) < gone).long()))
    torch.manual_seed(1)
    model = Model(nn.Sequential(nn.Linear(4, 6, dtype=dtype), nn.Tanh(), nn.Linear(6, 3, dtype=dtype)))
    return clients_of(parts), model


def test_retained_examples_come_in_batches_and_the_others_evenly_with_them():
    federation, model = small()
    client = ForgetWhileTraining(model=model, lr=0.1, batch_size=4, epochs=2)
    for ident, (kept, gone) in enumerate(((15, 5), (13, 0), (0, 6), (0, 0), (1, 8))):
        engine = Sequential(federation, {"train": client}, 3)
        data = prepare(engine, Task("train", {}, round=1), ident)
        steps = max(1, -(-kept // 4))
        each = max(1, -(-gone // steps))
        for epoch in range(2 if kept + gone else 0):
            here = (data["step"] >= epoch * steps) & (data["step"] < (epoch + 1) * steps)
            for target, size, width in ((0, kept, 4), (1, gone, each)):
                counts = (data["step"][here & (data["target"] == target)] - epoch * steps).bincount(minlength=steps)
                assert counts.tolist() == [min(width, max(0, size - step * width)) for step in range(steps)]
            assert sorted(data["x"][here, 0].tolist()) == sorted(federation.examples(ident)["x"][:, 0].tolist())
        q = data["q"][data["target"] == 1]
        assert q.shape == (2 * gone, 3) and not q.gather(1, data["y"][data["target"] == 1][:, None]).any()
        assert not data["q"][data["target"] == 0].any()


@pytest.mark.parametrize("engine", [Sequential, Vectorised])
def test_each_step_descends_both_losses_with_a_clipped_gradient(engine):
    federation, model = small()
    client = ForgetWhileTraining(model=model, lr=0.3, beta=0.7, batch_size=4, clip=0.4)
    here = engine(federation, {"train": client}, 3)
    task = Task("train", {"params": model.params}, round=1)
    replies = here.execute(task, Cohort([0, 1, 2, 3, 4]))
    assert replies.failed == {}
    for place, ident in enumerate(replies.ids):
        data = prepare(here, task, ident)
        params = {name: leaf.clone() for name, leaf in model.params.items()}
        for step in range(int(data["step"].max()) + 1 if len(data["step"]) else 0):
            free = {name: leaf.requires_grad_() for name, leaf in params.items()}
            kept, gone = ((data["step"] == step) & (data["target"] == target) for target in (0, 1))
            outputs = torch.func.functional_call(model.module, free, (data["x"],))
            loss = torch.zeros((), dtype=torch.float64)
            if kept.any():
                loss = loss + cross_entropy(outputs[kept], data["y"][kept])
            if gone.any():
                loss = loss - 0.7 * (data["q"][gone] * log_softmax(outputs[gone], 1)).sum(1).mean()
            slope = dict(zip(free, torch.autograd.grad(loss, list(free.values())), strict=True))
            size = torch.cat([leaf.flatten() for leaf in slope.values()]).norm()
            factor = min(1.0, 0.4 / float(size))
            params = {name: (leaf - 0.3 * factor * slope[name]).detach() for name, leaf in params.items()}
        for name, leaf in params.items():
            torch.testing.assert_close(replies.update["params"][name][place], leaf.detach(), rtol=1e-7, atol=1e-9)
    assert dict(zip(replies.ids, replies.weight.tolist(), strict=True)) == {0: 20, 1: 13, 2: 6, 3: 0, 4: 9}


def test_with_one_batch_and_nothing_to_forget_it_is_a_step_of_sgd():
    federation, model = small()
    task, cohort = Task("train", {"params": model.params}, round=1), Cohort([1])
    forgetting = ForgetWhileTraining(model=model, lr=0.1, batch_size=50, clip=1e9)
    one, other = (
        Sequential(federation, {"train": client}, 3).execute(task, cohort).update["params"]
        for client in (forgetting, Sgd(model=model, lr=0.1, batch_size=50))
    )
    for name, leaf in one.items():
        torch.testing.assert_close(leaf, other[name], rtol=1e-12, atol=1e-14)


def test_it_keeps_the_promises_of_a_client():
    federation, model = small(torch.float32)
    check_client(ForgetWhileTraining(model=model, lr=0.1, batch_size=4), {"params": model.params}, federation)


def test_an_ordered_client_must_say_the_order():
    class Silent(ForgetWhileTraining):
        def prepare(self, examples, rng):
            return examples

    federation, model = small()
    engine = Sequential(federation, {"train": Silent(model=model, lr=0.1)})
    failed = engine.execute(Task("train", {"params": model.params}), Cohort([0])).failed
    assert "Silent is `ordered`, so its `prepare` must make a column step" in failed[0]


# Digits, ten clients, Dirichlet(0.5).


@cache
def digits(seed):
    """(x, y) of each client, and of the test set."""
    x, y = load_digits(return_X_y=True)
    x, x_test, y, y_test = train_test_split(
        (x / 16).astype(np.float32), y, test_size=0.25, random_state=seed, stratify=y
    )
    rng = np.random.default_rng(seed)
    while True:
        pieces = [[] for _ in range(10)]
        for label in range(10):
            rows = rng.permutation(np.flatnonzero(y == label))
            cuts = (np.cumsum(rng.dirichlet([0.5] * 10))[:-1] * len(rows)).astype(int)
            for client, part in enumerate(np.split(rows, cuts)):
                pieces[client].append(part)
        rows = [np.concatenate(piece) for piece in pieces]
        if min(map(len, rows)) >= 20:
            break
    tensors = [(torch.tensor(x[part]), torch.tensor(y[part])) for part in rows]
    return tensors, (torch.tensor(x_test), torch.tensor(y_test))


def test_the_digits_are_spread_as_they_should_be():
    parts, _ = digits(0)
    assert [len(y) for _, y in parts] == [27, 141, 144, 131, 128, 128, 176, 217, 113, 142]
    assert [int((y == 3).sum()) for _, y in parts] == [2, 14, 1, 12, 29, 1, 30, 3, 8, 37]


def trained(model, parts, client, params, number, seed):
    federation = clients_of(parts)
    engine, strategy = Sequential(federation, {"train": client}, seed), FedAvg()
    start = begin(strategy, params, {"train": client}, 10, seed)
    *_, last = islice(rounds(strategy, engine, everyone(10), start), number)
    return last.snapshot.state["params"]


def accuracies(model, params, test, label):
    """On the class, and on the others."""
    x, y = test
    right = model.predict(params, {"x": x}).argmax(1) == y
    return float(right[y == label].double().mean()), float(right[y != label].double().mean())


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "label"), [(10, 1), (11, 9)])
def test_a_class_is_forgotten_in_five_rounds_and_stays_away(seed, label):
    parts, test = digits(seed)
    marked = [(x, y, (y == label).long()) for x, y in parts]
    retained = [
        (x[y != label], y[y != label], torch.zeros(int((y != label).sum()), dtype=torch.int64)) for x, y in parts
    ]
    torch.manual_seed(seed)
    model = Model(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)))
    plain = Sgd(model=model, lr=0.1, epochs=2, batch_size=32)
    original = trained(model, marked, plain, model.params, 40, seed)
    retrained = trained(model, retained, plain, model.params, 40, seed)
    assert accuracies(model, original, test, label)[0] >= 0.8
    on_class, on_others = accuracies(model, retrained, test, label)
    assert on_class == 0
    client = ForgetWhileTraining(model=model, lr=0.1, batch_size=32)
    forgotten = trained(model, marked, client, original, 5, seed)
    found = accuracies(model, forgotten, test, label)
    assert found[0] <= 0.02 and on_others - found[1] <= 0.08
    again = trained(model, retained, replace(plain, epochs=2), forgotten, 2, seed + 100)
    assert accuracies(model, again, test, label)[0] <= 0.05, "it does not come back"
    tuned = trained(model, retained, plain, original, 3, seed)
    assert accuracies(model, tuned, test, label)[0] > 0.3, "training on the rest alone does not forget it"
