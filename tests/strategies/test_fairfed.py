"""FairFed against numpy, written from the paper's Algorithm 1."""

import numpy as np
import pytest
import torch

from clients.fairfed import ReweightedSgd
from fedsim.engines.local import Sequential
from fedsim.sampling import everyone
from fedsim.simulation import begin, rounds
from fedsim.task import Replies, Task
from fedsim.testing import check_client, check_strategy
from strategies.fairfed import FairFed

MODELS = np.array([[1.0, 2.0], [3.0, 5.0], [-1.0, 0.5]])
SIZES = np.array([10.0, 30.0, 60.0])
AMONG = np.array([[4.0, 6.0], [20.0, 10.0], [30.0, 30.0]])  # examples of each group
TAKEN = np.array([[1.0, 3.0], [15.0, 2.0], [12.0, 18.0]])  # of these, taken for class 1
CORRECT = np.array([5.0, 21.0, 48.0])


def replies(among=AMONG, taken=TAKEN, correct=CORRECT, ids=(0, 1, 2), sizes=SIZES):
    both = np.stack([among - taken, taken], axis=-1)  # classes 0 and 1: (C, G, V)
    update = {
        "params": {"w": torch.from_numpy(MODELS[: len(ids)])},
        "taken": torch.from_numpy(both),
        "among": torch.from_numpy(np.stack([among, among], axis=-1)),
        "correct": torch.from_numpy(correct),
    }
    return Replies(list(ids), torch.from_numpy(sizes), update)


def aggregate(strategy, state, answers):
    return strategy.aggregate(state, Task("train", {"params": state["params"]}), answers)[0]


def first(strategy):
    return strategy.init({"w": torch.zeros(2, dtype=torch.float64)})


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_two_rounds_are_those_of_algorithm_1(beta):
    strategy = FairFed(2, 3, beta=beta)
    state, weight = first(strategy), SIZES / SIZES.sum()
    local = TAKEN[:, 0] / AMONG[:, 0] - TAKEN[:, 1] / AMONG[:, 1]
    whole = TAKEN[:, 0].sum() / AMONG[:, 0].sum() - TAKEN[:, 1].sum() / AMONG[:, 1].sum()
    distance = np.abs(local - whole)
    for _ in range(2):
        state = aggregate(strategy, state, replies())
        weight = weight - beta * (distance - distance.mean())
        weight = np.maximum(weight, 1e-6)
        np.testing.assert_allclose(state["weight"].numpy(), weight, atol=1e-12)
        np.testing.assert_allclose(state["params"]["w"].numpy(), weight @ MODELS / weight.sum(), atol=1e-12)


def test_where_a_rate_is_not_defined_accuracy_stands_in_for_it():
    among, taken = AMONG.copy(), TAKEN.copy()
    among[0, 1] = taken[0, 1] = 0  # client 0 has nobody of group 1
    state = aggregate(FairFed(2, 3, beta=0.5), first(FairFed(2, 3)), replies(among, taken))
    local = taken[1:, 0] / among[1:, 0] - taken[1:, 1] / among[1:, 1]
    whole = taken[:, 0].sum() / among[:, 0].sum() - taken[:, 1].sum() / among[:, 1].sum()
    accuracy = CORRECT / SIZES
    distance = np.concatenate([[abs(accuracy[0] - accuracy.mean())], np.abs(local - whole)])
    expected = SIZES / SIZES.sum() - 0.5 * (distance - distance.mean())
    np.testing.assert_allclose(state["weight"].numpy(), np.maximum(expected, 1e-6), atol=1e-12)


def test_who_is_not_asked_keeps_the_weight_and_who_has_no_examples_does_not_count():
    strategy = FairFed(2, 3)
    before = aggregate(strategy, first(strategy), replies())
    after = aggregate(strategy, before, replies(AMONG[:2], TAKEN[:2], CORRECT[:2], (2, 1), np.array([60.0, 0.0])))
    assert torch.equal(after["weight"][:2], before["weight"][:2])
    np.testing.assert_allclose(after["params"]["w"].numpy(), MODELS[0])


def fair_data(classification, **arguments):
    model, federation = classification(dtype=torch.float64, **arguments)
    federation.columns["a"] = (federation.columns["x"][:, 0] > 0).long()
    return model, federation


def client(model, **arguments):
    return ReweightedSgd(model=model, num_classes=3, num_groups=2, lr=0.3, batch_size=8, **arguments)


@pytest.mark.parametrize("debias", [True, False])
@pytest.mark.parametrize("notion", ["demographic parity", "equalised odds"])
def test_its_client_keeps_the_promises_of_clients(classification, debias, notion):
    model, federation = fair_data(classification)
    check_client(client(model, debias=debias, notion=notion), {"params": model.params}, federation)


def test_the_weights_make_label_and_group_independent(classification):
    model, federation = fair_data(classification, sizes=(50,))
    data = federation.examples(0) | {"mask": torch.ones(50, dtype=torch.bool)}
    state = client(model).start({"params": model.params}, {}, data)
    weighted = torch.zeros(2, 3, dtype=torch.float64)
    weighted.index_put_((data["a"], data["y"]), state["weight"][data["a"], data["y"]], accumulate=True)
    table = weighted / weighted.sum()
    torch.testing.assert_close(table, table.sum(1, keepdim=True) * table.sum(0))
    plain = torch.zeros(2, 3, dtype=torch.float64)
    plain.index_put_((data["a"], data["y"]), torch.ones(50, dtype=torch.float64), accumulate=True)
    torch.testing.assert_close(weighted.sum(), plain.sum())  # a mean loss stays a mean


def test_with_a_beta_of_zero_and_no_debiasing_it_is_fedavg(classification):
    from clients.sgd import Sgd
    from strategies.fedavg import FedAvg

    model, federation = fair_data(classification, sizes=(7, 20, 33))
    made = []
    for strategy, local in (
        (FairFed(3, 3, beta=0.0), client(model, debias=False)),
        (FedAvg(), Sgd(model=model, lr=0.3, batch_size=8)),
    ):
        snapshot = begin(strategy, model.params, {"train": local}, 3)
        loop = rounds(strategy, Sequential(federation, {"train": local}), everyone(3), snapshot)
        made.append([next(loop) for _ in range(3)][-1].snapshot.state["params"])
    for name, leaf in made[0].items():
        torch.testing.assert_close(leaf, made[1][name], rtol=0, atol=1e-12)


def test_it_keeps_the_promises_of_strategies():
    check_strategy(FairFed(2, 3), {"w": torch.zeros(2, dtype=torch.float64)}, replies())
