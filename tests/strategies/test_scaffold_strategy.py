"""SCAFFOLD reaches the optimum of the mean loss where clients differ, and FedAvg does not."""

import numpy as np
import pytest
import torch

from clients.scaffold import ControlledSgd
from clients.sgd import Sgd
from fedsim.engines.local import Sequential, Vectorised
from fedsim.sampling import everyone, uniform
from fedsim.simulation import begin, rounds
from fedsim.task import Replies, Task
from strategies.fedavg import FedAvg
from strategies.scaffold import Scaffold

LR, STEPS = 0.05, 10
CURVATURE = np.array([[1.0, 4.0], [8.0, 0.5], [3.0, 2.0]])
OPTIMUM = np.array([[2.0, -1.0], [-1.0, 3.0], [0.5, 0.5]])
BEST = (CURVATURE * OPTIMUM).sum(0) / CURVATURE.sum(0)  # of the mean of the clients' losses
KEPT = 1 - (1 - LR * CURVATURE) ** STEPS  # how much of the way to its own optimum a client goes in a round
DRIFTED = (KEPT * OPTIMUM).sum(0) / KEPT.sum(0)  # where the mean of the clients' models stands still


def run(quadratics, strategy, client, number, engine=Sequential, sample=None):
    model, federation = quadratics(CURVATURE, OPTIMUM)
    clients = {"train": client(model=model, lr=LR, epochs=STEPS, batch_size=2)}
    snapshot = begin(strategy, model.params, clients, 3)
    loop = rounds(strategy, engine(federation, clients), sample or everyone(3), snapshot)
    for _ in range(number):
        last = next(loop)
    return last.snapshot


def error(snapshot, point):
    return float(np.abs(snapshot.state["params"]["weight"].numpy()[0] - point).max())


@pytest.mark.parametrize("engine", [Sequential, Vectorised])
def test_it_converges_to_the_optimum_of_the_mean_where_fedavg_stops_elsewhere(quadratics, engine):
    controlled = run(quadratics, Scaffold(num_clients=3), ControlledSgd, 100, engine)
    plain = run(quadratics, FedAvg(), Sgd, 100, engine)
    assert error(controlled, BEST) < 1e-8
    assert error(plain, DRIFTED) < 1e-8
    assert error(plain, BEST) > 0.1


def test_with_some_of_the_clients_it_still_converges_to_the_optimum(quadratics):
    snapshot = run(quadratics, Scaffold(3), ControlledSgd, 180, sample=uniform(3, 1, count=2))
    assert error(snapshot, BEST) < 1e-6


def test_at_the_optimum_a_clients_control_variate_is_its_gradient(quadratics):
    snapshot = run(quadratics, Scaffold(3), ControlledSgd, 100)
    kept = snapshot.personal.gather([0, 1, 2])["control"]["weight"][:, 0]
    np.testing.assert_allclose(kept.numpy(), CURVATURE * (BEST - OPTIMUM), atol=1e-7)


def test_the_servers_control_variate_is_the_mean_of_the_clients_when_all_take_part(quadratics):
    for number in (1, 2, 7):
        snapshot = run(quadratics, Scaffold(3), ControlledSgd, number)
        kept = snapshot.personal.gather([0, 1, 2])["control"]["weight"].mean(0)
        torch.testing.assert_close(snapshot.state["control"]["weight"], kept, rtol=1e-10, atol=1e-12)
        assert float(kept.abs().max()) > 0.01, "a mean of zeros would prove nothing"


def test_it_is_the_mean_of_all_clients_when_some_take_part_too(quadratics):
    snapshot = run(quadratics, Scaffold(3), ControlledSgd, 9, sample=uniform(3, 1, count=2))
    kept = snapshot.personal.gather([0, 1, 2])["control"]["weight"].mean(0)
    torch.testing.assert_close(snapshot.state["control"]["weight"], kept, rtol=1e-10, atol=1e-12)


def test_a_step_is_that_of_algorithm_1():
    state = {"params": {"w": torch.tensor([1.0, 2.0])}, "control": {"w": torch.tensor([0.5, 0.0])}}
    mean = {"params": {"w": torch.tensor([3.0, 0.0])}, "control": {"w": torch.tensor([1.0, -2.0])}}
    after, metrics = Scaffold(10, lr=0.5).aggregate(state, Task("train", state), Replies([4, 7], torch.ones(2), mean))
    assert after["params"]["w"].tolist() == [1 + 0.5 * (3 - 1), 2 + 0.5 * (0 - 2)]
    torch.testing.assert_close(after["control"]["w"], torch.tensor([0.5 + 2 / 10 * 1.0, 2 / 10 * -2.0]))
    assert metrics["control/norm"] == pytest.approx(float(after["control"]["w"].norm()))
