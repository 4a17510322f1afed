"""q-FedAvg against numpy, written from the paper's Algorithm 2, and what q is for."""

import numpy as np
import pytest
import torch

from clients.qfedavg import LossThenSgd
from fedsim.engines.local import Sequential
from fedsim.sampling import everyone
from fedsim.simulation import begin, rounds
from fedsim.task import Replies, Task
from strategies.qfedavg import QFedAvg


def aggregate(strategy, w, models, losses, lr=0.2, weight=None):
    loss = torch.from_numpy(losses)
    update = {"params": {"w": torch.from_numpy(models)}, "loss": loss, "lipschitz": torch.full_like(loss, 1 / lr)}
    weight = torch.arange(1.0, len(losses) + 1) if weight is None else torch.tensor(weight)
    replies = Replies(list(range(len(losses))), weight, update)
    state = {"params": {"w": torch.from_numpy(w)}}
    return strategy.aggregate(state, Task("train", state), replies)[0]["params"]["w"].numpy()


def algorithm_2(q, lr, w, models, losses):
    step, total = np.zeros_like(w), 0.0
    for model, loss in zip(models, losses, strict=True):
        delta = (w - model) / lr
        step = step + loss**q * delta
        total += q * loss ** (q - 1) * np.sum(delta**2) + loss**q / lr
    return w - step / total


def example(seed):
    random = np.random.default_rng(seed)
    return random.normal(size=7), random.normal(size=(4, 7)), random.uniform(0.1, 3, size=4)


@pytest.mark.parametrize("q", [0.0, 0.3, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("seed", range(3))
def test_a_step_is_that_of_algorithm_2(q, seed):
    w, models, losses = example(seed)
    found = aggregate(QFedAvg(q=q), w, models, losses)
    np.testing.assert_allclose(found, algorithm_2(q, 0.2, w, models, losses), rtol=1e-12)


def test_without_q_it_is_the_plain_mean_of_the_models_whatever_the_losses_weights_and_rate():
    w, models, losses = example(0)
    for lr in (0.01, 1.0):
        np.testing.assert_allclose(aggregate(QFedAvg(0.0), w, models, losses, lr), models.mean(0), rtol=1e-12)
    assert np.abs(aggregate(QFedAvg(1.0), w, models, losses) - models.mean(0)).max() > 0.01


@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("size", [1e-12, 1e-9, 1e-3, 1e3, 1e9])
@pytest.mark.parametrize("q", [0.5, 5.0, 15.0])
def test_losses_however_small_or_large_leave_the_model_finite(q, size, dtype):
    w, models, losses = example(0)
    found = aggregate(QFedAvg(q), w.astype(dtype), models.astype(dtype), (size * losses).astype(dtype))
    assert np.isfinite(found).all()


def test_the_order_of_the_clients_does_not_matter():
    w, models, losses = example(2)
    order = np.array([2, 0, 3, 1])
    one, other = (aggregate(QFedAvg(), w, models[o], losses[o]) for o in (np.arange(4), order))
    np.testing.assert_allclose(one, other, rtol=1e-12)


def losses_after(quadratics, q, number=300):
    """Each client's loss where training ends: three clients want one thing, the fourth another."""
    optimum = np.array([[0.0, 0.0], [0.1, 0.0], [0.0, 0.1], [3.0, 2.0]])
    model, federation = quadratics(np.ones((4, 2)), optimum)
    clients = {"train": LossThenSgd(model=model, lr=0.1, batch_size=2)}
    strategy = QFedAvg(q=q)
    loop = rounds(strategy, Sequential(federation, clients), everyone(4), begin(strategy, model.params, clients, 4))
    for _ in range(number):
        last = next(loop)
    w = last.snapshot.state["params"]["weight"].numpy()
    return ((w - optimum) ** 2).sum(1) / 2


def test_the_larger_q_the_less_the_clients_losses_differ(quadratics):
    found = [losses_after(quadratics, q) for q in (0.0, 1.0, 5.0)]
    spread = [losses.std() for losses in found]
    assert spread[0] > 1.1 * spread[1] > 1.1**2 * spread[2]
    assert found[0].max() > found[1].max() > found[2].max()
    assert found[0].mean() < found[1].mean() < found[2].mean(), "evenness has its price"


def test_metrics_name_the_least_and_the_largest_loss():
    update = {"params": {"w": torch.zeros(3, 2)}, "loss": torch.tensor([0.5, 2.0, 1.0]), "lipschitz": torch.ones(3)}
    state = {"params": {"w": torch.ones(2)}}
    replies = Replies([0, 1, 2], torch.ones(3), update)
    assert QFedAvg().aggregate(state, Task("train", state), replies)[1] == {"loss/min": 0.5, "loss/max": 2.0}


@pytest.mark.parametrize("q", [0.0, 1.0])
def test_a_client_without_examples_changes_nothing(q):
    w, models, losses = example(3)
    models[2], losses[2] = w, 0.0  # what a client without examples sends
    with_it = aggregate(QFedAvg(q), w, models, losses, weight=[1.0, 1.0, 0.0, 1.0])
    others = np.array([0, 1, 3])
    np.testing.assert_allclose(with_it, aggregate(QFedAvg(q), w, models[others], losses[others]), rtol=1e-12)
    assert np.array_equal(aggregate(QFedAvg(q), w, models, losses, weight=[0.0] * 4), w)
