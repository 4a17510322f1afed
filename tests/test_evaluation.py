"""Clients count, the server divides: what comes out is what counting all their examples at once would give."""

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix
from torch import nn

from fedsim.data.federation import Federation
from fedsim.engines.local import Sequential, Vectorised
from fedsim.evaluation import Evaluate, Evaluation, evaluate, spread
from fedsim.model import Model, squared_error
from fedsim.task import Cohort

K = 4
SIZES = (30, 0, 1, 400, 7)
ENGINES = {
    "alone": Sequential,
    "all at once": Vectorised,
    "two at once": lambda *arguments: Vectorised(*arguments, block=2),
}


def columns(dtype=torch.float32):
    torch.manual_seed(0)
    examples = sum(SIZES) + 2 * len(SIZES)
    return {
        "x": torch.randn(examples, 3).to(dtype),
        "y": torch.randint(K, (examples,)),
        "rating": torch.randn(examples).to(dtype),
    }


def federation(split="test", dtype=torch.float32):
    """Clients that own SIZES examples of one split, and one of each other."""
    number = ("train", "validation", "test").index(split)
    sizes = np.ones((len(SIZES), 3), dtype=np.int64)
    sizes[:, number] = SIZES
    ends = np.cumsum(sizes.ravel()).reshape(-1, 3)
    bounds = np.column_stack([ends[:, 0] - sizes[:, 0], ends])
    rows = torch.randperm(int(ends[-1, -1]), generator=torch.Generator().manual_seed(1)).numpy()
    return Federation(columns(dtype), rows, bounds)


def linear(dtype=torch.float32):
    torch.manual_seed(3)
    return Model(nn.Sequential(nn.Linear(3, K), nn.Dropout(0.9)).to(dtype))


def pooled(data, split="test"):
    parts = [data.examples(client, split) for client in range(data.num_clients)]
    return {name: torch.cat([part[name] for part in parts]) for name in data.columns}


def found(model, data, engine="alone", ids=None, **arguments):
    client = Evaluate(model=model, **{"num_classes": K} | arguments)
    ids = list(range(data.num_clients)) if ids is None else ids
    return evaluate(ENGINES[engine](data, {"evaluate": client}), {"params": model.params}, Cohort(ids), 1)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("batch_size", [1000, 256, 13])
def test_the_confusion_is_that_of_the_pooled_examples(engine, batch_size):
    model, data = linear(), federation()
    evaluation, everything = found(model, data, engine, batch_size=batch_size), pooled(data)
    predicted = model.predict(model.params, everything).argmax(1)
    expected = confusion_matrix(everything["y"], predicted, labels=range(K))
    assert evaluation.confusion.tolist() == expected.tolist()
    assert evaluation.confusion.dtype == torch.int64


@pytest.mark.parametrize("engine", ENGINES)
def test_accuracy_and_loss_are_those_of_the_pooled_examples(engine):
    model, data = linear(), federation()
    evaluation, everything = found(model, data, engine), pooled(data)
    outputs = model.predict(model.params, everything)
    assert evaluation.pooled == {
        "examples": sum(SIZES),
        "accuracy": float((outputs.argmax(1) == everything["y"]).double().mean()),
        "loss": pytest.approx(float(nn.functional.cross_entropy(outputs, everything["y"])), rel=1e-6),
    }


@pytest.mark.parametrize("engine", ENGINES)
def test_each_clients_measures_are_those_of_its_own_examples(engine):
    model, data = linear(), federation()
    clients = found(model, data, engine).clients
    assert clients["client"].tolist() == list(range(len(SIZES)))
    assert clients["examples"].tolist() == list(SIZES)
    for client, size in enumerate(SIZES):
        if not size:
            assert np.isnan(clients["accuracy"][client]) and np.isnan(clients["loss"][client])
            continue
        own = data.examples(client, "test")
        outputs = model.predict(model.params, own)
        assert clients["accuracy"][client] == (outputs.argmax(1) == own["y"]).double().mean()
        loss = float(nn.functional.cross_entropy(outputs, own["y"]))
        assert clients["loss"][client] == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_any_part_of_the_examples_can_be_evaluated(split):
    model, data = linear(), federation(split)
    evaluation = found(model, data, part=split)
    everything = pooled(data, split)
    correct = (model.predict(model.params, everything).argmax(1) == everything["y"]).sum()
    assert evaluation.pooled["examples"] == sum(SIZES)
    assert evaluation.pooled["accuracy"] == float(correct) / sum(SIZES)


def test_a_part_of_another_name_fails_with_those_that_there_are():
    with pytest.raises(ValueError, match="part must be one of 'train', 'validation', 'test', got 'tests'"):
        Evaluate(model=linear(), part="tests")


def test_the_cohort_alone_is_evaluated():
    model, data = linear(), federation()
    evaluation = found(model, data, ids=[4, 0])
    assert evaluation.clients["client"].tolist() == [4, 0]
    assert evaluation.clients["examples"].tolist() == [SIZES[4], SIZES[0]]
    assert evaluation.confusion.sum() == evaluation.pooled["examples"] == SIZES[4] + SIZES[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_counts_are_exact_in_low_precision_too(dtype):
    model, data = linear(dtype), federation(dtype=dtype)
    model.params["0.weight"].zero_()
    model.params["0.bias"].copy_(torch.tensor([0.0, 0.0, 1.0, 0.0]))
    data.columns["y"].fill_(2)
    evaluation = found(model, data, batch_size=1000)
    assert evaluation.confusion[2, 2] == evaluation.confusion.sum() == sum(SIZES)
    assert evaluation.clients["accuracy"][[0, 2, 3, 4]].tolist() == [1.0] * 4


def test_a_label_or_a_prediction_beyond_the_classes_is_wrong_not_lost():
    model, data = linear(), federation()
    evaluation = found(model, data, num_classes=2)
    everything = pooled(data)
    predicted = model.predict(model.params, everything).argmax(1)
    inside = (everything["y"] < 2) & (predicted < 2)
    assert evaluation.confusion.sum() == inside.sum() < evaluation.pooled["examples"]
    correct = (inside & (everything["y"] == predicted)).sum()
    assert evaluation.pooled["accuracy"] == float(correct) / sum(SIZES)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_regression_has_a_loss_and_no_classes(engine):
    torch.manual_seed(2)
    model, data = Model(nn.Linear(3, 1), squared_error, target="rating"), federation()
    evaluation, everything = found(model, data, engine, num_classes=None), pooled(data)
    difference = model.predict(model.params, everything)[:, 0] - everything["rating"]
    assert evaluation.confusion is None
    assert evaluation.pooled.keys() == {"examples", "loss"}
    assert evaluation.pooled["loss"] == pytest.approx(float((difference**2).mean() / 2), rel=1e-6)
    assert evaluation.clients.keys() == {"client", "examples", "loss"}
    assert spread(evaluation) == {}


@pytest.mark.parametrize("engine", ENGINES)
def test_clients_without_examples_are_no_error(engine):
    evaluation = found(linear(), federation(), engine, ids=[1])
    assert evaluation.pooled == {"examples": 0.0}
    assert np.isnan(evaluation.clients["accuracy"]).all() and not evaluation.confusion.any()
    assert spread(evaluation) == {} and evaluation.failed == {}


@pytest.mark.parametrize("engine", ENGINES)
def test_nobody_is_no_error_either(engine):
    evaluation = found(linear(), federation(), engine, ids=[])
    assert evaluation.pooled == {"examples": 0.0} and evaluation.confusion is None
    assert spread(evaluation) == {}


def test_a_client_that_fails_is_named_and_the_others_count():
    model, data = linear(), federation()
    data.columns["y"][torch.from_numpy(data.rows[data.bounds[4, 2] : data.bounds[4, 3]])] = K  # no output for it
    evaluation = found(model, data)
    assert list(evaluation.failed) == [4] and "out of bounds" in evaluation.failed[4]
    assert evaluation.pooled["examples"] == sum(SIZES) - SIZES[4]


def test_evaluating_changes_nothing_and_draws_nothing():
    model, data = linear(), federation()
    before, state = {name: leaf.clone() for name, leaf in model.params.items()}, torch.get_rng_state()
    first, again = found(model, data), found(model, data)
    assert first.pooled == again.pooled
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(leaf, before[name]) for name, leaf in model.params.items())


def test_the_spread_is_over_clients_with_examples_each_as_important_as_the_others():
    accuracy = np.array([0.5, np.nan, 1.0, 0.8, 0.6])
    clients = {"client": np.arange(5.0), "examples": np.array(SIZES, dtype=float), "accuracy": accuracy}
    clients["loss"] = np.ones(5)
    evaluation = Evaluation({"examples": 438.0, "accuracy": 0.7, "loss": 1.0}, clients, None, {})
    values = sorted([0.5, 1.0, 0.8, 0.6])
    place = 0.1 * (len(values) - 1)  # between the least value and the next
    average = sum(values) / len(values)
    assert spread(evaluation) == {
        "accuracy/min": 0.5,
        "accuracy/p10": pytest.approx(values[0] + place * (values[1] - values[0])),
        "accuracy/std": pytest.approx((sum((v - average) ** 2 for v in values) / len(values)) ** 0.5),
    }


def test_a_single_client_has_no_spread():
    evaluation = found(linear(), federation(), ids=[0])
    measures = spread(evaluation)
    assert measures["accuracy/std"] == 0
    assert measures["accuracy/min"] == measures["accuracy/p10"] == evaluation.pooled["accuracy"]
