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


@pytest.mark.parametrize("strategy", [Forget(3, training=2), Pruning(MODEL, 3, training=2)])
def test_a_loop_that_goes_on_after_the_last_phase_asks_nobody(strategy):
    state = strategy.init(MODEL.params) | {"phase": torch.tensor(len(strategy.plan))}
    assert strategy.done(state) and list(strategy.configure(state, 99).ids) == []
    assert strategy.configure(strategy.init(MODEL.params), 1).ids is None


def test_so_does_one_that_has_replayed_its_history():
    strategy = FedEraser(3, training=2, interval=2)
    state = strategy.init(MODEL.params) | {"trained": torch.tensor(2), "calibrated": torch.tensor(1)}
    assert strategy.done(state) and list(strategy.configure(state, 99).ids) == []
