"""FedOpt's four rules against numpy, written from the paper's Algorithm 2."""

import numpy as np
import pytest
import torch

from fedsim.task import Replies, Task
from strategies.fedavg import FedAvg
from strategies.fedopt import FedOpt

RULES = ["adam", "yogi", "adagrad", "momentum"]


def answers(seed, number=5, size=6):
    """What the clients' models are on average, in each round; the changes have zeros and both signs."""
    random = np.random.default_rng(seed)
    means = random.normal(size=(number, size))
    means[:, 0] = 0.7
    return means


def ours(strategy, start, means):
    state = strategy.init({"w": torch.from_numpy(start)})
    for round, mean in enumerate(means, 1):
        replies = Replies([0], torch.ones(1), {"params": {"w": torch.from_numpy(mean)}})
        state, _ = strategy.aggregate(state, strategy.configure(state, round), replies)
    return state


def theirs(rule, start, means, lr, beta1, beta2, tau):
    w, m = start.copy(), np.zeros_like(start)
    v = np.full_like(start, tau**2)
    for mean in means:
        delta = mean - w
        if rule == "momentum":
            m = beta1 * m + delta
            w = w + lr * m
            continue
        m = beta1 * m + (1 - beta1) * delta
        if rule == "adagrad":
            v = v + delta**2
        elif rule == "yogi":
            v = np.where(v > delta**2, v - (1 - beta2) * delta**2, v + (1 - beta2) * delta**2)
        else:
            v = beta2 * v + (1 - beta2) * delta**2
        w = w + lr * m / (np.sqrt(v) + tau)
    return w, m, v


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("rule", RULES)
def test_a_rule_takes_the_steps_of_the_paper_for_five_rounds(rule, seed):
    start, means = np.full(6, 0.7), answers(seed)
    settings = {"lr": 0.05, "beta1": 0.8, "beta2": 0.95, "tau": 0.01}
    state = ours(FedOpt(rule, **settings), start, means)
    w, m, v = theirs(rule, start, means, **settings)
    np.testing.assert_allclose(state["params"]["w"].numpy(), w, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(state["first"]["w"].numpy(), m, rtol=1e-12, atol=1e-14)
    if rule != "momentum":
        np.testing.assert_allclose(state["second"]["w"].numpy(), v, rtol=1e-12, atol=1e-14)


def test_the_rules_differ_so_that_one_could_not_pass_for_another():
    start, means = np.full(6, 0.7), answers(0)
    ends = [ours(FedOpt(rule, 0.05, 0.8, 0.95, 0.01), start, means)["params"]["w"] for rule in RULES]
    for place, one in enumerate(ends):
        assert all(float((one - other).abs().max()) > 1e-3 for other in ends[place + 1 :])


def test_momentum_without_memory_at_rate_one_is_fedavg():
    start, means = np.full(6, 0.3), answers(1)
    found, expected = ours(FedOpt("momentum", lr=1.0, beta1=0.0), start, means), ours(FedAvg(), start, means)
    torch.testing.assert_close(found["params"]["w"], expected["params"]["w"], rtol=1e-14, atol=1e-15)
    remembering = ours(FedOpt("momentum", lr=1.0, beta1=0.5), start, means)
    assert not torch.allclose(remembering["params"]["w"], expected["params"]["w"], atol=1e-2)


@pytest.mark.parametrize("rule", RULES)
def test_a_model_that_no_client_changes_stays(rule):
    start = np.linspace(-1, 1, 6)
    state = ours(FedOpt(rule), start, np.stack([start] * 5))
    assert torch.equal(state["params"]["w"], torch.from_numpy(start))


def test_the_task_is_to_train_and_to_send_what_can_be_averaged():
    strategy = FedOpt()
    task = strategy.configure(strategy.init({"w": torch.ones(2)}), 1)
    assert isinstance(task, Task) and (task.action, task.reduce) == ("train", "mean")
    assert set(task.shared) == {"params"}, "moments stay at the server"


@pytest.mark.parametrize("settings", [{"lr": 0.0}, {"beta1": 1.1}, {"beta2": -0.1}, {"tau": 0.0}])
def test_a_setting_out_of_range_is_refused_by_name(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        FedOpt(**settings)
