"""Digits at ten clients: a class, or what was taught with a trigger, is forgotten in five rounds and stays away."""

from functools import cache
from itertools import accumulate, islice
from typing import NamedTuple

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

from clients.forget import ForgetWhileTraining
from clients.forget_alone import ForgetAlone
from clients.retained import Retained
from clients.sgd import Sgd
from clients.weigh import Weigh
from fedsim.data.dataset import Dataset
from fedsim.data.federation import Partition
from fedsim.data.targets import marked
from fedsim.engines.local import Sequential
from fedsim.forgetting import gone_with
from fedsim.model import Model
from fedsim.sampling import everyone
from fedsim.simulation import begin, rounds
from strategies.forget import Forget

TRAINING = 40  # rounds


@cache
def digits(seed):
    """(x, y) to train on and to test on, and the rows of each of ten clients: Dirichlet(0.5) over the labels."""
    x, y = load_digits(return_X_y=True)
    x = (x / 16).astype(np.float32).reshape(-1, 1, 8, 8)
    x, x_test, y, y_test = train_test_split(x, y, test_size=0.25, random_state=seed, stratify=y)
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
            return (torch.tensor(x), torch.tensor(y)), (torch.tensor(x_test), torch.tensor(y_test)), rows


def test_the_digits_are_spread_as_they_should_be():
    (_, y), (_, y_test), rows = digits(0)
    assert (len(y), len(y_test)) == (1347, 450)
    assert [len(part) for part in rows] == [27, 141, 144, 131, 128, 128, 176, 217, 113, 142]
    assert [int((y[part] == 3).sum()) for part in rows] == [2, 14, 1, 12, 29, 1, 30, 3, 8, 37]
    assert [len(part) for part in digits(10)[2]] == [102, 114, 133, 210, 180, 104, 92, 170, 90, 152]


def stamped(x):
    """The images with a white corner."""
    x = x.clone()
    x[..., 6:, 6:] = 1.0
    return x


@cache
def federation(seed, label, poisoned, leave_out=0):
    """Ten clients who are to forget the label; or the copies with a white corner that three of them took for it."""
    (x, y), (x_test, y_test), rows = digits(seed)
    request = {"class": str(label)}
    if poisoned:
        rng, rows = np.random.default_rng(seed), list(rows)
        for client in np.argsort([-len(part) for part in rows], kind="stable")[:3]:
            others = rows[client][y[rows[client]].numpy() != label]
            drawn = rng.choice(others, round(0.6 * len(others)), replace=False)
            rows[client] = np.concatenate([rows[client], len(y) + np.arange(len(drawn))])
            x, y = torch.cat([x, stamped(x[drawn])]), torch.cat([y, torch.full((len(drawn),), label)])
        request = {"samples": list(range(1347, len(y)))}
    names = {"y": tuple(map(str, range(10)))}
    dataset = Dataset("digits", {"x": x, "y": y}, {"x": x_test, "y": y_test}, names)
    partition = Partition(np.concatenate(rows), np.array([0, *accumulate(map(len, rows))]))
    return marked(dataset, partition, [request], leave_out)


def network(kind, seed):
    torch.manual_seed(seed)
    if kind == "mlp":
        layers = [nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)]
    else:
        layers = [nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU()]
        layers += [nn.MaxPool2d(2), nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10)]
    return Model(nn.Sequential(*layers))


def after(strategy, forget, data, model, params, seed, number):
    """The model after some rounds from these parameters on."""
    plain = Sgd(model=model, lr=0.1, epochs=2, batch_size=32)
    clients = {"train": plain, "repair": Retained(client=plain), "weigh": Weigh(model=model)}
    clients |= {"forget": forget} if forget else {}
    start = begin(strategy, params, clients, 10, seed)
    *_, last = islice(rounds(strategy, Sequential(data, clients, seed), everyone(10), start), number)
    return last.snapshot.state["params"]


@cache
def original(kind, seed, label, poisoned, leave_out=0):
    """A model trained on everything, or on all but what is to be forgotten."""
    model = network(kind, seed)
    strategy = Forget(num_clients=10, training=TRAINING, forgetting=0)
    return after(strategy, None, federation(seed, label, poisoned, leave_out), model, model.params, seed, TRAINING)


class Measured(NamedTuple):
    """Accuracies on the test set, and how often a white corner is taken for the label."""

    on_class: float
    on_others: float
    everywhere: float
    attack: float


def measured(kind, seed, label, params):
    _, (x, y), _ = digits(seed)
    model = network(kind, seed)
    guess, other = model.predict(params, {"x": x}).argmax(1), y != label
    right, lured = (guess == y).double(), model.predict(params, {"x": stamped(x[other])}).argmax(1) == label
    return Measured(*(float(part.double().mean()) for part in (right[~other], right[other], right, lured)))


class Story(NamedTuple):
    """What is measured of each of these models."""

    before: Measured
    retrained: Measured
    forgotten: Measured
    relapsed: Measured  # after two plain rounds
    tuned: Measured  # three plain rounds, and nothing else


@cache
def story(kind, seed, label, poisoned):
    model, data = network(kind, seed), federation(seed, label, poisoned)
    before = original(kind, seed, label, poisoned)
    strategy = Forget(num_clients=10, forgetting=5, repairing=2)
    forget = ForgetWhileTraining(model=model, lr=0.1, batch_size=32)
    tune = Retained(client=Sgd(model=model, lr=0.1, epochs=2, batch_size=32))
    # Without the copies the examples of a poisoned federation are those of a clean one, in the same order.
    found = [before, original(kind, seed, label, False, 0 if poisoned else 1)]
    found += [after(strategy, forget, data, model, before, seed, number) for number in (5, 7)]
    found.append(after(Forget(num_clients=10, forgetting=3), tune, data, model, before, seed, 3))
    return Story(*(measured(kind, seed, label, params) for params in found))


# On (12, 2), (13, 6) and (14, 7), which are left out here for their time, the convolutions do as well.
CLASSES = [
    ("mlp", 10, 1),
    ("mlp", 11, 9),
    ("mlp", 12, 2),
    ("mlp", 13, 6),
    ("mlp", 14, 7),
    ("cnn", 10, 1),
    ("cnn", 11, 9),
]
TRIGGERS = [("mlp", 10, 1), ("mlp", 11, 9), ("cnn", 10, 1)]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "seed", "label"), CLASSES)
def test_a_class_is_forgotten_in_five_rounds_and_stays_away(kind, seed, label):
    told = story(kind, seed, label, poisoned=False)
    assert told.before.on_class >= 0.8
    assert told.retrained.on_class == 0, "what never saw the class never says it"
    assert told.forgotten.on_class <= 0.02
    assert told.retrained.on_others - told.forgotten.on_others <= (0.03 if kind == "cnn" else 0.08)
    assert told.relapsed.on_class <= 0.05, "two plain rounds do not bring it back"
    assert told.tuned.on_class > 0.3, "training on the rest alone does not forget it"


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "seed", "label"), TRIGGERS)
def test_what_poisoned_examples_taught_is_forgotten(kind, seed, label):
    told = story(kind, seed, label, poisoned=True)
    assert told.before.attack >= 0.95
    assert told.forgotten.attack <= (0.2 if kind == "cnn" else 0.4)
    assert told.retrained.everywhere - told.forgotten.everywhere <= 0.05
    assert told.tuned.attack >= 0.8, "training on clean data alone does not forget it"


@cache
def one_after_another(kind, seed, labels, known):
    """The classes of the test set that a model still predicts right, when each is forgotten by itself, in this order.

    Clients know of which classes nothing is kept, or they do not.
    """
    (x, y), (x_test, y_test), rows = digits(seed)
    dataset = Dataset("digits", {"x": x, "y": y}, {"x": x_test, "y": y_test}, {"y": tuple(map(str, range(10)))})
    partition = Partition(np.concatenate(rows), np.array([0, *accumulate(map(len, rows))]))
    data = marked(dataset, partition, [{"class": label} for label in labels])
    gone = gone_with(data)
    assert gone == tuple(labels.index(label) + 1 if label in labels else 3 for label in range(10))
    model = network(kind, seed)
    strategy = Forget(num_clients=10, num_targets=3, forgetting=5, gone_with=gone if known else ())
    forget = ForgetWhileTraining(model=model, lr=0.1, batch_size=32)
    params = after(strategy, forget, data, model, original(kind, seed, labels[0], False), seed, 10)
    return [measured(kind, seed, label, params).on_class for label in labels]


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "labels"), [(1, (3, 8)), (10, (1, 8)), (11, (9, 4))])
def test_a_class_forgotten_first_stays_away_while_another_is_forgotten(seed, labels):
    assert one_after_another("mlp", seed, labels, known=True) == [0, 0]
    first, second = one_after_another("mlp", seed, labels, known=False)
    assert first > 0.05 and second <= 0.02, "else the new memories of the second point to the first"


@pytest.mark.slow
def test_without_the_poisoned_copies_training_is_that_of_clean_clients_to_the_bit():
    model, strategy = network("mlp", 10), Forget(num_clients=10, training=2, forgetting=0)
    clean, cleaned = (
        after(strategy, None, federation(10, 1, *how), model, model.params, 10, 2) for how in ((False, 0), (True, 1))
    )
    assert all(torch.equal(leaf, cleaned[name]) for name, leaf in clean.items())


@pytest.mark.slow
def test_alone_it_costs_the_other_classes_the_less_the_more_of_the_model_before_is_remembered():
    model, data, before = network("mlp", 11), federation(11, 9, False), original("mlp", 11, 9, False)
    weigh = Forget(num_clients=10, forgetting=20, alone=True, until=0.0, remember="importance")
    found = []
    for settings in ({}, {"memory": "mix"}, {"memory": "self"}, {"strength": 10.0}):
        forget = ForgetAlone(model=model, lr=0.05, batch_size=32, **settings)
        found.append(measured("mlp", 11, 9, after(weigh, forget, data, model, before, 11, 22)))
    assert all(told.on_class <= 0.02 for told in found)
    teacher, mix, own, pulled = (told.on_others for told in found)
    assert teacher + 0.05 < mix < own - 0.05 and teacher + 0.05 < pulled
    assert own > measured("mlp", 11, 9, before).on_others - 0.03
