"""FedAvg is the weighted mean, and with one client it is ordinary training."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional

from clients.sgd import Sgd
from fedsim.data.dataset import Dataset
from fedsim.data.federation import Partition, divide, schedule
from fedsim.engines.local import Sequential, Vectorised
from fedsim.model import Model, squared_error
from fedsim.sampling import everyone
from fedsim.simulation import begin, rounds
from fedsim.task import Replies, Task
from strategies.fedavg import FedAvg


def replies(params, weight):
    """Stacked models folded as an engine folds them."""
    share = torch.tensor(weight) / sum(weight)
    mean = {name: torch.tensordot(share.to(leaf.dtype), leaf, 1) for name, leaf in params.items()}
    return Replies(list(range(len(weight))), torch.tensor(weight), {"params": mean})


def train(model, federation, client, engine, number, seed=3):
    clients = {"train": client}
    loop = rounds(
        FedAvg(), engine(federation, clients, seed), everyone(federation.num_clients),
        begin(FedAvg(), model.params, clients, federation.num_clients, seed),
    )  # fmt: skip
    for _ in range(number):
        last = next(loop)
    return last.snapshot.state["params"]


def centralised(model, federation, momentum, weight_decay, number, epochs, batch, seed=3, restart=True):
    """The same training with torch's optimiser, made anew in every round, on the same batches."""
    params = {name: leaf.clone().requires_grad_() for name, leaf in model.params.items()}
    optimiser = torch.optim.SGD(params.values(), lr=0.1, momentum=momentum, weight_decay=weight_decay)
    examples = federation.examples(0)
    for round in range(1, number + 1):
        if restart:
            optimiser = torch.optim.SGD(params.values(), lr=0.1, momentum=momentum, weight_decay=weight_decay)
        for step in schedule(federation.sizes(), epochs, batch, seed, round, [0])[0]:
            rows = torch.from_numpy(step[step >= 0])
            outputs = functional_call(model.module, params, (examples["x"][rows],))
            losses = functional.cross_entropy(outputs, examples["y"][rows], reduction="none")
            optimiser.zero_grad()
            (losses.sum() / torch.tensor(len(rows))).backward()
            optimiser.step()
    return {name: leaf.detach() for name, leaf in params.items()}


@pytest.mark.parametrize("momentum, weight_decay", [(0.0, 0.0), (0.9, 0.0), (0.9, 0.05)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_one_client_alone_is_centralised_training_to_the_bit(classification, momentum, weight_decay, dtype):
    model, federation = classification((33,), dtype)
    client = Sgd(model=model, lr=0.1, momentum=momentum, weight_decay=weight_decay, epochs=2, batch_size=8)
    expected = centralised(model, federation, momentum, weight_decay, 4, 2, 8)
    found = train(model, federation, client, Sequential, 4)
    assert all(torch.equal(found[name], leaf) for name, leaf in expected.items())
    together = train(model, federation, client, Vectorised, 4)
    for name, leaf in expected.items():
        near = {torch.float32: 1e-5, torch.float64: 1e-10}[dtype]
        torch.testing.assert_close(together[name], leaf, rtol=near, atol=near)


def test_momentum_carried_over_rounds_would_have_been_noticed(classification):
    model, federation = classification((33,))
    client = Sgd(model=model, lr=0.1, momentum=0.9, epochs=2, batch_size=8)
    found = train(model, federation, client, Sequential, 4)
    carried = centralised(model, federation, 0.9, 0.0, 4, 2, 8, restart=False)
    assert not torch.allclose(found["0.weight"], carried["0.weight"], atol=1e-3)


def test_the_server_goes_lr_of_the_way_to_the_weighted_mean():
    params = {"w": torch.tensor([[1.0, 2.0], [5.0, -2.0]])}
    start = {"params": {"w": torch.tensor([4.0, 4.0])}}
    mean = (1 * params["w"][0] + 3 * params["w"][1]) / 4
    for lr in (0.25, 1.0, 1.5):
        state, _ = FedAvg(lr).aggregate(start, Task("train", start), replies(params, [1.0, 3.0]))
        torch.testing.assert_close(state["params"]["w"], start["params"]["w"] + lr * (mean - start["params"]["w"]))


def test_at_lr_one_nothing_of_the_servers_own_model_is_left():
    start = {"params": {"w": torch.tensor([1e8, -1e8])}}
    params = {"w": torch.tensor([[0.1, 0.3]])}
    state, _ = FedAvg().aggregate(start, Task("train", start), replies(params, [2.0]))
    assert torch.equal(state["params"]["w"], params["w"][0])


@pytest.mark.parametrize("engine", [Sequential, Vectorised])
def test_clients_weigh_as_many_examples_as_they_have(engine):
    target = torch.tensor([[0.0], [0.0], [0.0], [4.0]], dtype=torch.float64)
    columns = {"x": torch.ones(4, 1, dtype=torch.float64), "y": target}
    federation = divide(Dataset("uneven", columns), Partition(np.arange(4), np.array([0, 3, 4])))
    module = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(module.weight, 2.0)
    model = Model(module, squared_error)
    found = train(model, federation, Sgd(model=model, lr=0.5, batch_size=8), engine, 1)
    ends = [2.0 - 0.5 * (2.0 - 0.0), 2.0 - 0.5 * (2.0 - 4.0)]
    assert float(found["weight"]) == pytest.approx((3 * ends[0] + 1 * ends[1]) / 4, rel=1e-12)


@pytest.mark.parametrize("lr", [0.0, -1.0])
def test_a_rate_that_is_not_positive_is_refused(lr):
    with pytest.raises(ValueError, match=f"lr must be > 0, got {lr}"):
        FedAvg(lr)
