"""Sgd against a step by hand and torch's optimiser."""

import pytest
import torch

from clients.sgd import Sgd
from fedsim.engines.local import Sequential, Vectorised
from fedsim.task import Cohort, Task


def train(model, federation, client, engine=Sequential, ids=(0,)):
    task = Task("train", {"params": model.params}, round=1)
    return engine(federation, {"train": client}).execute(task, Cohort(list(ids)))


@pytest.mark.parametrize("engine", [Sequential, Vectorised])
def test_on_a_quadratic_it_goes_the_geometric_way_to_the_optimum(quadratics, engine):
    curvature, optimum = torch.tensor([[1.0, 4.0]]).double(), torch.tensor([[2.0, -3.0]]).double()
    model, federation = quadratics(curvature, optimum)
    found = train(model, federation, Sgd(model=model, lr=0.1, epochs=7, batch_size=2), engine).update["params"][
        "weight"
    ]
    torch.testing.assert_close(found[0], optimum * (1 - (1 - 0.1 * curvature) ** 7), rtol=1e-12, atol=0)


def test_momentum_and_weight_decay_are_those_of_two_steps_by_hand(quadratics):
    model, federation = quadratics([[2.0]], [[3.0]])
    client = Sgd(model=model, lr=0.1, momentum=0.5, weight_decay=0.2, epochs=2, batch_size=1)
    velocity = 2.0 * (0.0 - 3.0) + 0.2 * 0.0
    first = 0.0 - 0.1 * velocity
    velocity = 0.5 * velocity + 2.0 * (first - 3.0) + 0.2 * first
    found = float(train(model, federation, client).update["params"]["weight"])
    assert found == pytest.approx(first - 0.1 * velocity, rel=1e-12)


def test_the_loss_it_tells_is_the_mean_over_the_examples_met(quadratics):
    model, federation = quadratics([[2.0]], [[3.0]])
    replies = train(model, federation, Sgd(model=model, lr=0.1, epochs=2, batch_size=1))
    second = 0.1 * 2.0 * 3.0
    expected = (2.0 * 3.0**2 / 2 + 2.0 * (second - 3.0) ** 2 / 2) / 2
    assert float(replies.metrics["loss"]) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("engine", [Sequential, Vectorised])
def test_without_examples_it_sends_the_model_back_at_weight_zero(classification, engine):
    model, federation = classification((0, 4))
    replies = train(model, federation, Sgd(model=model, lr=0.1, momentum=0.9, weight_decay=0.5), engine, (0, 1))
    assert replies.weight.tolist() == [0.0, 4.0]
    for name, leaf in model.params.items():
        assert torch.equal(replies.update["params"][name][0], leaf)
        assert not torch.equal(replies.update["params"][name][1], leaf)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_weights_and_losses_have_one_type_whether_there_are_examples_or_not(classification, dtype):
    model, federation = classification((0, 4), dtype)
    for ids in ((0,), (1,), (0, 1)):
        for engine in (Sequential, Vectorised):
            replies = train(model, federation, Sgd(model=model, lr=0.1), engine, ids)
            assert (replies.weight.dtype, replies.metrics["loss"].dtype) == (torch.float64, torch.float64)


@pytest.mark.parametrize("settings", [{"lr": 0}, {"lr": 0.1, "momentum": 1.5}, {"lr": 0.1, "weight_decay": -1}])
def test_a_setting_out_of_range_is_refused_by_name(classification, settings):
    with pytest.raises(ValueError, match=list(settings)[-1]):
        Sgd(model=classification()[0], **settings)
