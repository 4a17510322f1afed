"""FedMF: the gradients of a product, by hand, and a user's step down its own."""

from itertools import islice

import pytest
import torch

from clients.fedmf import factors
from clients.fedrecgel import DualSam
from clients.ncf import ModelScores
from fedsim import tree
from fedsim.data.datasets import latent_factor_ratings
from fedsim.data.partition import by_column
from fedsim.engines.local import Sequential, Vectorised
from fedsim.engines.sequential import prepare
from fedsim.evaluation import evaluate
from fedsim.model import Model
from fedsim.ranking import RankItems, leave_one_out
from fedsim.sampling import uniform
from fedsim.simulation import begin, rounds
from fedsim.task import Cohort, Task
from fedsim.testing import check_client
from strategies.fedrecgel import FedRecGel

USERS, ITEMS = 12, 90


def small(dtype=torch.float64, **settings):
    """Few users of few items."""
    data = latent_factor_ratings(users=USERS, items=ITEMS)
    federation = leave_one_out(data, by_column(data.columns, column="user"), negatives=9)
    model = factors(ITEMS, dim=3, spread=0.3)
    model = Model(model.module.to(dtype), model.criterion, "item", "y")
    return federation, model, DualSam(model=model, lr=0.5, rho_shared=0, rho_own=0, rule="sgd", **settings)


@pytest.mark.parametrize("engine", [Sequential, Vectorised])
def test_what_is_sent_and_kept_is_the_gradient_of_the_product(engine):
    federation, model, client = small()
    items = model.params["item_factors"]
    first = begin(FedRecGel(), model.params, {"train": client}, USERS, 1)
    ids = [0, 4, 7]
    kept = first.personal.gather(ids)
    here = engine(federation, {"train": client}, 1)
    task = Task("train", {"params": {"item_factors": items}}, round=1)
    replies = here.execute(task, Cohort(ids, kept))
    for place, ident in enumerate(replies.ids):
        rows, p = prepare(here, task, ident), kept["own"]["user_factors"][ids.index(ident)]
        q = items[rows["item"]]
        pull = rows["weight"] * (torch.sigmoid(q @ p) - rows["y"])  # of each row, dL / dscore
        expected = torch.zeros_like(items)
        expected[rows["item"]] = pull[:, None] * p
        sent = tree.take(replies.update, place)["params"]
        assert sent.keys() == {"item_factors"}, "its own factors stay"
        torch.testing.assert_close(sent["item_factors"].dense(), expected, rtol=1e-10, atol=1e-15)
        moved = replies.personal["own"]["user_factors"][place]
        torch.testing.assert_close(moved, p - 0.5 * pull @ q, rtol=1e-10, atol=1e-15)


def test_it_keeps_the_promises_of_a_client():
    federation, model, client = small(torch.float32)
    check_client(client, {"params": {"item_factors": model.params["item_factors"]}}, federation)


def test_it_scores_by_the_product():
    _, model, _ = small()
    p, q = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64), model.params["item_factors"]
    found = ModelScores(model)({"params": {"item_factors": q}}, {"own": {"user_factors": p}}, torch.tensor([5, 0, 5]))
    torch.testing.assert_close(found, q[[5, 0, 5]] @ p)


def test_its_first_factors_are_as_spread_as_asked_for_and_those_of_the_seed():
    one, same, other = (factors(1000, spread=0.2, seed=seed).params["item_factors"] for seed in (1, 1, 2))
    assert float(one.std()) == pytest.approx(0.2, rel=0.02)
    assert torch.equal(one, same) and not torch.equal(one, other)
    with pytest.raises(ValueError, match=r"spread must be > 0, got 0"):
        factors(10, spread=0)


@pytest.mark.slow
def test_it_learns_tastes_that_popularity_does_not_know():
    data = latent_factor_ratings()
    federation = leave_one_out(data, by_column(data.columns, column="user"), validation=False)
    model = factors(400, spread=0.1)
    clients = {
        "train": DualSam(model=model, lr=1.0, rho_shared=0, rho_own=0, rule="sgd"),
        "evaluate": RankItems(scorer=ModelScores(model)),
    }
    engine, strategy = Vectorised(federation, clients, 0), FedRecGel(lr=0.01)
    start = begin(strategy, model.params, clients, 300, 0)
    *_, last = islice(rounds(strategy, engine, uniform(300, 0, fraction=0.2), start), 200)
    kept = last.snapshot.personal.gather(range(300))
    found = evaluate(engine, strategy.shared(last.snapshot.state), Cohort(range(300), kept), 200).pooled["hr_10"]
    assert found > 0.29 + 0.3
