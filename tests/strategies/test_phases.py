"""Strategies of phases: what is planned, and silence after the last of them."""

import pytest
import torch
from torch import nn

from fedsim.model import Model
from strategies.federaser import FedEraser
from strategies.forget import Forget
from strategies.phases import Phase, planned
from strategies.pruning import Pruning

MODEL = Model(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)))


def serve(request, deleted):
    return Phase("forget", 2, request, deleted), Phase("repair", 0, request, request)


def test_requests_are_planned_one_by_one_or_together_and_phases_without_rounds_are_left_out():
    assert planned(0, 3, False, serve) == [Phase("forget", 2, 1, 0), Phase("forget", 2, 2, 1)]
    assert planned(5, 3, True, serve) == [Phase("train", 5), Phase("forget", 2, 2, 0)]


def test_requests_that_have_been_served_before_are_over():
    assert planned(0, 4, False, serve, served=1) == [Phase("forget", 2, 2, 1), Phase("forget", 2, 3, 2)]
    assert planned(0, 4, True, serve, served=1) == [Phase("forget", 2, 3, 1)]
    assert Forget(3, 3, served=1).plan == [Phase("forget", 5, 2, 1)]


@pytest.mark.parametrize(
    ("settings", "number"),
    [({"served": 2}, 2), ({"served": 1, "training": 1}, 2), ({"served": 1, "num_targets": 2}, 1)],
)
def test_what_cannot_have_been_served_is_refused(settings, number):
    told = f"served = {settings['served']}: must be below the number of requests, {number}, and training 0"
    with pytest.raises(ValueError, match=told):
        Forget(3, **({"num_targets": 3} | settings))


@pytest.mark.parametrize("strategy", [Forget(3, training=2), Pruning(MODEL, 3, training=2)])
def test_a_loop_that_goes_on_after_the_last_phase_asks_nobody(strategy):
    state = strategy.init(MODEL.params) | {"phase": torch.tensor(len(strategy.plan))}
    assert strategy.done(state) and list(strategy.configure(state, 99).ids) == []
    assert strategy.configure(strategy.init(MODEL.params), 1).ids is None


def test_so_does_one_that_has_replayed_its_history():
    strategy = FedEraser(3, training=2, interval=2)
    state = strategy.init(MODEL.params) | {"trained": torch.tensor(2), "calibrated": torch.tensor(1)}
    assert strategy.done(state) and list(strategy.configure(state, 99).ids) == []
