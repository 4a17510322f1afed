"""SCAFFOLD's local side against Algorithm 1 written out, option II."""

import pytest
import torch

from clients.scaffold import ControlledSgd
from clients.sgd import Sgd
from fedsim.engines.local import Sequential, Vectorised
from fedsim.task import Cohort, Task

H, OPTIMUM = torch.tensor([[1.0, 4.0], [2.0, 0.5]]).double(), torch.tensor([[2.0, -3.0], [-1.0, 1.0]]).double()
X, C = torch.tensor([[0.5, 1.0]]).double(), torch.tensor([[0.3, -0.2]]).double()
KEPT = torch.tensor([[[0.1, 0.7]], [[-0.4, 0.0]]]).double()  # (C, 1, 2)
LR, STEPS = 0.1, 4


def train(model, federation, engine, client, personal, shared):
    replies = engine(federation, {"train": client}).execute(
        Task("train", shared, round=1), Cohort(range(federation.num_clients), personal)
    )
    assert not replies.failed
    return replies


def quadratic(quadratics, engine):
    model, federation = quadratics(H, OPTIMUM)
    client = ControlledSgd(model=model, lr=LR, epochs=STEPS, batch_size=2)
    shared = {"params": {"weight": X}, "control": {"weight": C}}
    return train(model, federation, engine, client, {"control": {"weight": KEPT}}, shared)


@pytest.mark.parametrize("engine", [Sequential, Vectorised])
def test_steps_and_control_variate_are_those_of_algorithm_1(quadratics, engine):
    replies = quadratic(quadratics, engine)
    for k in range(2):
        y = X[0].clone()
        for _ in range(STEPS):
            y = y - LR * (H[k] * (y - OPTIMUM[k]) - KEPT[k, 0] + C[0])
        new = KEPT[k, 0] - C[0] + (X[0] - y) / (STEPS * LR)
        torch.testing.assert_close(replies.update["params"]["weight"][k, 0], y, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(replies.personal["control"]["weight"][k, 0], new, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(replies.update["control"]["weight"][k, 0], new - KEPT[k, 0], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("engine", [Sequential, Vectorised])
def test_the_new_control_variate_is_the_mean_of_the_gradients_met(quadratics, engine):
    replies = quadratic(quadratics, engine)
    for k in range(2):
        y, gradients = X[0].clone(), []
        for _ in range(STEPS):
            gradients.append(H[k] * (y - OPTIMUM[k]))
            y = y - LR * (gradients[-1] - KEPT[k, 0] + C[0])
        expected = torch.stack(gradients).mean(0)
        torch.testing.assert_close(replies.personal["control"]["weight"][k, 0], expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("engine", [Sequential, Vectorised])
def test_with_control_variates_that_agree_it_is_sgd(classification, engine):
    model, federation = classification((1, 7, 33), torch.float64)
    control = {name: torch.full_like(leaf, 0.3) for name, leaf in model.params.items()}
    kept = {"control": {name: leaf.expand(3, *leaf.shape).clone() for name, leaf in control.items()}}
    settings = {"model": model, "lr": 0.1, "epochs": 2, "batch_size": 8}
    shared = {"params": model.params, "control": control}
    one = train(model, federation, engine, ControlledSgd(**settings), kept, shared).update["params"]
    other = train(model, federation, engine, Sgd(**settings), {}, shared).update["params"]
    for name, leaf in other.items():
        torch.testing.assert_close(one[name], leaf, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("engine", [Sequential, Vectorised])
def test_a_client_without_examples_keeps_its_control_variate_and_weighs_as_much_as_any(classification, engine):
    model, federation = classification((0, 5))
    kept = {name: torch.full((2, *leaf.shape), 0.25) for name, leaf in model.params.items()}
    control = {name: torch.full_like(leaf, 0.5) for name, leaf in model.params.items()}
    client, shared = ControlledSgd(model=model, lr=0.1), {"params": model.params, "control": control}
    replies = train(model, federation, engine, client, {"control": kept}, shared)
    assert replies.weight.tolist() == [1.0, 1.0]
    for name, leaf in model.params.items():
        assert torch.equal(replies.update["params"][name][0], leaf)
        assert not replies.update["control"][name][0].any()
        assert torch.equal(replies.personal["control"][name][0], kept[name][0])
        assert not torch.equal(replies.personal["control"][name][1], kept[name][1])


def test_it_starts_with_a_control_variate_of_zero(classification):
    model, _ = classification()
    first = ControlledSgd(model=model, lr=0.1).personal(torch.Generator())["control"]
    assert {name: leaf.shape for name, leaf in first.items()} == {n: leaf.shape for n, leaf in model.params.items()}
    assert not any(leaf.any() for leaf in first.values())
