"""Devices and memory: what runs on a device of one's own, and blocks that do not fit."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from clients.fedfact import Ensemble
from clients.scaffold import ControlledSgd
from clients.sgd import Sgd
from fedsim import Cohort, Sequential, Task, Vectorised, tree
from fedsim.client import Client
from fedsim.engines.device import SPARE, fitting, moved
from fedsim.engines.local import auto
from fedsim.evaluation import Evaluate
from fedsim.model import Model
from fedsim.personal import Personal

SIZES = (5, 1, 9, 20, 33, 2, 12, 7)


@dataclass(frozen=True)
class Noisy(ControlledSgd):
    """Draws when its examples are prepared."""

    def prepare(self, examples, rng):
        assert all(leaf.device == torch.device("cpu") for leaf in examples.values())
        return examples | {"x": examples["x"] + torch.randn(examples["x"].shape, generator=rng)}


def run(engine, client, model, ids):
    """What an engine makes of SCAFFOLD's client, flat."""
    zeros = tree.map(torch.zeros_like, model.params)
    task = Task("train", {"params": model.params, "control": zeros}, round=2, reduce="mean")
    replies = engine.execute(task, Cohort(ids, Personal({"train": client}, len(SIZES), 0).gather(ids)))
    assert not replies.failed
    return tree.flatten({"update": replies.update, "personal": replies.personal, "metrics": replies.metrics})


@pytest.mark.parametrize("make", [Sequential, Vectorised])
def test_a_device_of_its_own_changes_no_bit(classification, make):
    # "cpu:0" is another name than "cpu", so all that is done for a GPU is done: moved, run there, brought back.
    model, federation = classification(SIZES)
    client = Noisy(model=model, lr=0.1, batch_size=4)
    ids = [3, 0, 4, 7]
    here = run(make(federation, {"train": client}, 1), client, model, ids)
    there = run(make(federation, {"train": client}, 1, device="cpu:0"), client, model, ids)
    assert here.keys() == there.keys()
    assert all(torch.equal(leaf, there[name]) for name, leaf in here.items())


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("tpu", "Expected one"),
        ("meta", 'must be "cpu" or "cuda"'),
        ("cuda:99", "device = 'cuda:99': torch .* finds"),
    ],
)
def test_a_device_that_is_not_there_is_refused_at_once(classification, name, told):
    _, federation = classification(SIZES)
    for make in (Sequential, Vectorised, auto):
        with pytest.raises(ValueError, match=told):
            make(federation, {}, device=name)


def test_a_client_is_moved_with_its_model_and_its_tensors():
    @dataclass(frozen=True, kw_only=True)
    class Weighing(Sgd):
        weights: torch.Tensor

    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    module[0].requires_grad_(False)
    client = Weighing(model=Model(module), lr=0.1, weights=torch.ones(3))
    there = moved(client, torch.device("meta"))
    assert there.weights.is_meta and there.model.module[0].weight.is_meta
    assert not client.weights.is_meta and not client.model.module[0].weight.is_meta  # the other stays
    assert there.lr == client.lr and type(there) is Weighing


def test_what_a_client_is_made_of_is_moved_with_it():
    client = Evaluate(model=Model(nn.Linear(2, 2)), num_classes=2, classifier=Ensemble(Model(nn.Linear(2, 2))))
    there = moved(client, torch.device("meta"))
    assert there.classifier.model.module.weight.is_meta and type(there.classifier) is Ensemble
    assert not client.classifier.model.module.weight.is_meta
    plain = Evaluate(model=client.model)
    assert moved(plain, torch.device("meta")).classifier is None


def test_a_gpu_takes_the_vectorised_engine_for_convolutions_too(classification):
    from fedsim.engines.local import kind

    client = Sgd(model=Model(nn.Conv2d(1, 1, 1)), lr=0.1)
    assert kind({"train": client}, "cpu") is Sequential
    assert kind({"train": client}, "cuda") is Vectorised
    assert kind({}, "cuda") is Sequential


@pytest.mark.parametrize(("constant", "each"), [(0, 10), (1000, 10), (7, 1)])
def test_as_many_clients_fit_as_two_and_four_of_them_tell(constant, each):
    room = 5000
    found = fitting(room, constant + 2 * each, constant + 4 * each)
    assert constant + found * each <= SPARE * room < constant + (found + 1) * each


def test_at_least_one_client_fits_whatever_was_measured():
    assert fitting(0, 10, 20) == 1
    assert fitting(100, 80, 60) == 2  # noise: four took less than two
    assert fitting(100, 0, 0) == 80


@dataclass(frozen=True)
class Greedy(Sgd):
    """Runs out of memory where it runs with more than `most` others."""

    most: int = 3

    def run_cohort(self, shared, personal, data, rows):
        if len(rows) > self.most:
            raise torch.OutOfMemoryError(f"tried to allocate {len(rows)} GiB")
        return super().run_cohort(shared, personal, data, rows)


def test_a_block_without_enough_memory_runs_as_two_halves_and_later_ones_are_no_larger(classification):
    model, federation = classification((8,) * 8)
    task = Task("train", {"params": model.params}, round=1, reduce="mean")
    engine = Vectorised(federation, {"train": Greedy(model=model, lr=0.1, most=4)})
    replies = engine.execute(task, Cohort(list(range(8))))
    assert replies.ids == list(range(8)) and not replies.failed
    (told,) = replies.incidents
    assert "block of 8 clients did not fit into memory (tried to allocate 8 GiB)" in told and "at most 4" in told
    plain = Vectorised(federation, {"train": Sgd(model=model, lr=0.1)}).execute(task, Cohort(list(range(8))))
    for name, leaf in plain.update["params"].items():
        torch.testing.assert_close(replies.update["params"][name], leaf)
    assert [len(places) for places in engine.blocks(task, range(8))] == [4, 4]
    assert not engine.execute(task._replace(round=2), Cohort(list(range(8)))).incidents  # once


def test_blocks_of_alike_clients_are_equally_large(classification):
    model, federation = classification((8,) * 50)
    engine = Vectorised(federation, {"train": Sgd(model=model, lr=0.1)}, block=40)
    blocks = list(engine.blocks(Task("train", {"params": model.params}), range(50)))
    assert [len(places) for places in blocks] == [25, 25] and sorted(sum(blocks, [])) == list(range(50))


def test_halves_that_do_not_fit_either_are_halved_again(classification):
    model, federation = classification((8,) * 8)
    engine = Vectorised(federation, {"train": Greedy(model=model, lr=0.1, most=1)})
    replies = engine.execute(Task("train", {"params": model.params}, reduce="mean"), Cohort(list(range(8))))
    assert replies.ids == list(range(8)) and not replies.failed
    assert engine.limits == {"train": 1} and "at most 1" in replies.incidents[-1]


@dataclass(frozen=True)
class Full(Client):
    """Has no room even by itself."""

    def start(self, shared, personal, data):
        raise torch.OutOfMemoryError("tried to allocate everything")

    def step(self, state, batch):
        return state

    def finish(self, shared, state, data):
        raise AssertionError


def test_one_that_has_no_room_by_itself_fails_by_itself(classification):
    _, federation = classification(SIZES)
    replies = Sequential(federation, {"train": Full()}).execute(Task("train", {}), Cohort([1, 2]))
    assert replies.failed.keys() == {1, 2} and "tried to allocate everything" in replies.failed[1]
