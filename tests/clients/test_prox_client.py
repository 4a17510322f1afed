"""FedProx: without mu it is Sgd, with it a known distance from the server's model."""

import pytest
import torch

from clients.prox import Prox
from clients.sgd import Sgd
from fedsim.engines.local import Sequential, Vectorised
from fedsim.task import Cohort, Task

SIZES = (0, 1, 7, 20, 33, 2)


def train(model, federation, client, engine=Sequential, start=None):
    task = Task("train", {"params": start or model.params}, round=1)
    replies = engine(federation, {"train": client}).execute(task, Cohort(range(federation.num_clients)))
    assert not replies.failed
    return replies


@pytest.mark.parametrize("engine", [Sequential, Vectorised])
def test_without_mu_it_is_sgd_to_the_bit(classification, engine):
    model, federation = classification(SIZES)
    prox = train(model, federation, Prox(model=model, lr=0.1, mu=0.0, epochs=2, batch_size=8), engine)
    plain = train(model, federation, Sgd(model=model, lr=0.1, epochs=2, batch_size=8), engine)
    assert all(torch.equal(leaf, prox.update["params"][name]) for name, leaf in plain.update["params"].items())
    assert torch.equal(prox.metrics["loss"], plain.metrics["loss"]) and torch.equal(prox.weight, plain.weight)
    held = train(model, federation, Prox(model=model, lr=0.1, mu=0.5, epochs=2, batch_size=8), engine)
    assert not torch.equal(held.update["params"]["0.weight"], plain.update["params"]["0.weight"])


@pytest.mark.parametrize("engine", [Sequential, Vectorised])
@pytest.mark.parametrize("steps", [1, 2, 9])
def test_on_a_quadratic_it_follows_the_closed_form(quadratics, engine, steps):
    h, o = torch.tensor([[1.0, 4.0], [2.0, 0.5]]).double(), torch.tensor([[2.0, -3.0], [-1.0, 1.0]]).double()
    model, federation = quadratics(h, o)
    anchor, mu, lr = torch.tensor([[0.5, 1.0]]).double(), 1.5, 0.1
    client = Prox(model=model, lr=lr, mu=mu, epochs=steps, batch_size=2)
    found = train(model, federation, client, engine, {"weight": anchor}).update["params"]["weight"][:, 0]
    rest = (h * o + mu * anchor) / (h + mu)  # where h (w - o) + mu (w - anchor) = 0
    torch.testing.assert_close(found, rest + (1 - lr * (h + mu)) ** steps * (anchor - rest), rtol=1e-12, atol=1e-14)


def test_the_larger_mu_the_nearer_it_stays_to_the_servers_model(quadratics):
    model, federation = quadratics([[1.0]], [[3.0]])
    ends = [
        float(
            train(model, federation, Prox(model=model, lr=0.005, mu=mu, epochs=2000, batch_size=1)).update["params"][
                "weight"
            ]
        )
        for mu in (0.0, 1.0, 100.0)
    ]
    assert ends == pytest.approx([3.0 / (1 + mu) for mu in (0.0, 1.0, 100.0)], rel=1e-3)


def test_a_negative_mu_is_refused(quadratics):
    with pytest.raises(ValueError, match="mu must be >= 0, got -1"):
        Prox(model=quadratics([[1.0]], [[3.0]])[0], lr=0.1, mu=-1)
