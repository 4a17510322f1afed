"""Placing: what is expected of clients, and the order in which their answers are taken in."""

import math
import random
from dataclasses import dataclass

import numpy as np
import pytest
import torch

pytest.importorskip("ray")

from clients.sgd import Sgd  # noqa: E402
from fedsim import Cohort, Sequential, Task  # noqa: E402
from fedsim.engines.gathering import Gathering  # noqa: E402
from fedsim.engines.ray.placing import Line, Pace  # noqa: E402
from fedsim.tree import flatten  # noqa: E402

SIZES = (5, 1, 9, 20, 33, 2, 12, 7)


def test_clients_are_expected_to_take_as_many_steps_as_they_have_batches(classification):
    model, federation = classification(SIZES)
    pace = Pace(federation, {"train": Sgd(model=model, lr=0.1, batch_size=4, epochs=3)})
    assert pace.expect("train", range(8)).tolist() == [6, 3, 9, 15, 27, 3, 9, 6]


def test_what_was_measured_counts_and_stands_for_those_of_whom_nothing_is_known(classification):
    model, federation = classification(SIZES)
    pace = Pace(federation, {"train": Sgd(model=model, lr=0.1, batch_size=4), "other": Sgd(model=model, lr=0.1)})
    pace.learn("train", [0], 4.0)  # 2 steps of 2 s
    pace.learn("train", [3, 1], 1.2)  # 6 steps of 0.2 s
    mean = 5.2 / 8
    expected = [4.0, 0.2, 3 * mean, 1.0, 9 * mean, mean, 3 * mean, 2 * mean]
    np.testing.assert_allclose(pace.expect("train", range(8)), expected)
    assert pace.expect("other", [0]).tolist() == [1.0]  # another action, another pace


def parts(engine, task, cohort, piece):
    """What the blocks of a piece come to."""
    gathering = Gathering("", task, cohort, {})
    for block in piece.blocks:
        gathering.take(engine.run_block(task, Cohort([cohort.ids[place] for place in block])))
    return [gathering.part()]


@pytest.mark.parametrize("workers", [1, 2, 3, math.inf])
def test_answers_in_any_order_and_pieces_that_fall_apart_come_to_the_same_bits(classification, workers):
    model, federation = classification(SIZES * 5)
    clients = {"train": Sgd(model=model, lr=0.1, batch_size=4)}
    engine, task = Sequential(federation, clients, 3), Task("train", {"params": model.params}, round=1, reduce="mean")
    cohort, chance = Cohort(list(range(40))), random.Random(0)
    here = engine.execute(task, cohort)
    blocks = [list(range(start, min(start + 3, 40))) for start in range(0, 40, 3)]  # of three, to fall into clients
    three = Gathering("", task, cohort, {})
    for block in blocks:
        three.take(engine.run_block(task, Cohort(block)))
    expected = three.replies()
    for _ in range(5):
        line = Line(task, cohort, blocks, Pace(federation, clients).expect("train", cohort.ids), workers)
        assert [piece.length for piece in line.pieces] == sorted((p.length for p in line.pieces), reverse=True)
        waiting, whole, fallen = line.pieces, Gathering("", task, cohort, {}), 0
        chance.shuffle(waiting)
        while waiting:
            piece = waiting.pop(chance.randrange(len(waiting)))
            if fallen < 4 and len(piece.places) > 1:  # a block into clients, or several blocks into these
                fallen += 1
                waiting += line.divide(piece)
                continue
            for part in line.note(piece, parts(engine, task, cohort, piece)):
                whole.take(part)
        found = whole.replies()
        assert found.ids == expected.ids == here.ids and not line.slots and not line.found
        torch.testing.assert_close(found.update, expected.update, rtol=0, atol=0)
    assert any(not torch.equal(leaf, flatten(here.update)[name]) for name, leaf in flatten(expected.update).items())


@dataclass(frozen=True)
class Tenth(Sgd):
    """Weighs a tenth of its examples, so that the order in which weights are added up shows in the last bit."""

    def finish(self, shared, state, data):
        reply = super().finish(shared, state, data)
        return reply._replace(weight=reply.weight.double() / 10)


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_weights_that_are_no_whole_numbers_come_to_the_same_bits_too(classification, workers):
    model, federation = classification(SIZES * 5, torch.float64)
    clients = {"train": Tenth(model=model, lr=0.1, batch_size=4)}
    engine, task = Sequential(federation, clients, 3), Task("train", {"params": model.params}, round=1, reduce="mean")
    cohort = Cohort(list(range(40)))
    blocks = list(engine.blocks(task, cohort.ids))
    line, whole = Line(task, cohort, blocks, np.ones(40), workers), Gathering("", task, cohort, {})
    for piece in line.pieces:
        for part in line.note(piece, parts(engine, task, cohort, piece)):
            whole.take(part)
    torch.testing.assert_close(whole.replies().update, engine.execute(task, cohort).update, rtol=0, atol=0)
