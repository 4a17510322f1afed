"""Where a held-out item stands: measures by hand, scorers of which it is known, and MostPop on known data."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

import fedsim
from clients.mostpop import Popularity, TellItems, nothing
from fedsim.data.datasets import filmtrust, latent_factor_ratings, movielens_100k
from fedsim.data.partition import by_column
from fedsim.engines.local import Sequential, Vectorised
from fedsim.evaluation import evaluate
from fedsim.ranking import KNOWN, WANTED, RankItems, Scorer, hit_rate, leave_one_out, ndcg, rank
from fedsim.sampling import everyone
from fedsim.simulation import begin, rounds
from fedsim.task import Cohort, Replies
from fedsim.testing import check_client, check_strategy
from fedsim.tree import Rows
from strategies.mostpop import MostPop

ITEMS = 400


def split(data, **settings):
    return leave_one_out(data, by_column(data.columns, column="user"), **settings)


@pytest.fixture(scope="module")
def ratings():
    return split(latent_factor_ratings(), validation=False)


@dataclass(frozen=True)
class ByTable(Scorer):
    """An item's score stands in a table, (ITEMS,)."""

    def __call__(self, shared, personal, items):
        return shared["table"][items]


def found(federation, shared, scorer=None, engine=Vectorised, part="test", ids=None):
    """What is measured over all users, or some."""
    client = RankItems(scorer=scorer or ByTable(), num_items=len(federation.names["item"]), part=part)
    ids = range(federation.num_clients) if ids is None else ids
    return evaluate(engine(federation, {"evaluate": client}), shared, Cohort(ids), 1).pooled


def test_ranks_are_pessimistic_and_only_candidates_count():
    scores = torch.tensor([2.0, 3.0, 2.0, 1.0, 9.0])
    wanted = torch.tensor([True, False, False, False, False])
    assert int(rank(scores, wanted, torch.ones(5, dtype=torch.bool))) == 3
    assert int(rank(scores, wanted, torch.tensor([True, True, True, True, False]))) == 2
    assert int(rank(scores - 5, wanted, ~torch.tensor([False, True, False, False, True]))) == 1


def test_a_score_that_is_no_number_is_never_above_and_as_the_wanted_ones_is_last():
    wanted, candidate = torch.tensor([True, False, False]), torch.ones(3, dtype=torch.bool)
    assert int(rank(torch.tensor([1.0, torch.nan, 0.5]), wanted, candidate)) == 0
    assert int(rank(torch.tensor([torch.nan, torch.nan, 0.5]), wanted, candidate)) == 2


def test_hit_rate_and_ndcg_by_hand():
    ranks = torch.tensor([0, 1, 9, 10])
    assert hit_rate(ranks, 10).tolist() == [1, 1, 1, 0]
    assert ndcg(ranks, 10).tolist() == pytest.approx([1, 1 / np.log2(3), 1 / np.log2(11), 0])


def test_a_constant_scorer_hits_nothing_and_an_oracle_everything(ratings):
    constant = found(ratings, {"table": torch.zeros(ITEMS)})
    assert {value for name, value in constant.items() if "hr" in name or "ndcg" in name} == {0.0}
    assert constant["examples"] == 300

    @dataclass(frozen=True)
    class Oracle(Scorer):
        def __call__(self, shared, personal, items):
            return (items == shared["item"]).double()

    for user in (0, 17, 299):
        item = ratings.examples(user, "test")["item"][:1]
        sure = found(ratings, {"item": item}, Oracle(), ids=[user])
        assert {value for name, value in sure.items() if "hr" in name or "ndcg" in name} == {1.0}


def test_a_random_scorer_hits_as_often_as_chance(ratings):
    hits, gains = [], []
    for seed in range(10):
        random = torch.rand(ITEMS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        pooled = found(ratings, {"table": random})
        hits.append(pooled["hr_10"])
        gains.append(pooled["ndcg_10"])
    expected = sum(1 / np.log2(r + 2) for r in range(10)) / 100
    assert np.mean(hits) == pytest.approx(0.1, abs=4 * np.std(hits) / np.sqrt(10) + 0.01)
    assert np.mean(gains) == pytest.approx(expected, abs=4 * np.std(gains) / np.sqrt(10) + 0.005)


@pytest.mark.parametrize("engine", [Sequential, Vectorised])
def test_all_of_it_equals_a_plain_loop_over_users(ratings, engine):
    table = torch.randn(ITEMS, generator=torch.Generator().manual_seed(1), dtype=torch.float64).round(
        decimals=1
    )  # ties
    pooled = found(ratings, {"table": table}, engine=engine)
    ranks, full = [], []
    for user in range(300):
        data = ratings.examples(user, "test")
        own = table[data["item"][data["y"] == WANTED]]
        ranks.append(int((table[data["item"][data["y"] == 0]] >= own).sum()))
        known = set(data["item"][data["y"] == KNOWN].tolist()) | set(data["item"][data["y"] == WANTED].tolist())
        full.append(sum(bool(table[item] >= own) for item in range(ITEMS) if item not in known))
    for name, each in (("", np.array(ranks)), ("full_", np.array(full))):
        for k in (5, 10, 20):
            assert pooled[f"{name}hr_{k}"] == pytest.approx(np.mean(each < k))
            assert pooled[f"{name}ndcg_{k}"] == pytest.approx(np.mean(np.where(each < k, 1 / np.log2(each + 2), 0)))


def popular(federation):
    """MostPop, run; and what it measures."""
    model = nothing()
    clients = {"train": TellItems(num_items=len(federation.names["item"]))}
    strategy = MostPop(len(federation.names["item"]), federation.num_clients)
    engine = Vectorised(federation, clients)
    steps = list(rounds(strategy, engine, everyone(federation.num_clients), begin(strategy, model.params, clients, 1)))
    assert len(steps) == 1, "it is done when all have been asked"
    shared = strategy.shared(steps[0].snapshot.state)
    return shared, found(federation, shared, Popularity())


def test_mostpop_counts_the_items_that_are_trained_on(ratings):
    shared, pooled = popular(ratings)
    items = torch.cat([ratings.examples(user)["item"] for user in range(300)])
    assert torch.equal(shared["popularity"].long(), items.bincount(minlength=ITEMS))
    assert pooled["hr_10"] == pytest.approx(0.29, abs=1e-12)
    assert pooled["ndcg_10"] == pytest.approx(0.1328, abs=5e-5)


def test_ties_counted_the_other_way_would_make_it_look_better(ratings):
    shared, _ = popular(ratings)
    counts = shared["popularity"]
    hits = []
    for user in range(300):
        data = ratings.examples(user, "test")
        own = counts[data["item"][data["y"] == WANTED]]
        hits.append(int((counts[data["item"][data["y"] == 0]] > own).sum()) < 10)
    assert np.mean(hits) == pytest.approx(0.2967, abs=5e-5)


@pytest.mark.parametrize(
    ("name", "load", "least", "most"),
    [("filmtrust", filmtrust, 0.905, 0.920), ("movielens-100k", movielens_100k, 0.40, 0.435)],
)
def test_on_real_ratings_mostpop_is_as_good_as_it_is_known_to_be(name, load, least, most):
    folder = os.environ.get("FEDSIM_DATA")
    if not folder or not (Path(folder) / name).is_dir():
        pytest.skip(f"FEDSIM_DATA names no folder with {name}/")
    _, pooled = popular(split(load(), validation=False))
    assert least <= pooled["hr_10"] <= most


def test_promises_are_kept(ratings):
    check_client(TellItems(num_items=ITEMS), {}, ratings)
    rows = Rows(torch.tensor([2, 5]), torch.ones(2), ITEMS)
    check_strategy(MostPop(ITEMS, 300), {}, Replies([0], torch.ones(1), {"popularity": rows}))
    small = RankItems(scorer=ByTable(), num_items=ITEMS)
    assert small.split == "test" and RankItems(scorer=ByTable(), part="validation").split == "validation"


def test_an_experiment_of_it_runs_by_name_and_its_report_tells_the_measures(tmp_path):
    result = fedsim.run("mostpop/latent-factors", root=tmp_path)
    assert result.last("clients/hr_10") == pytest.approx(0.29)
    assert result.last("clients/full_hr_10") < 0.15
    assert "HR@10: **0.290** (MostPop 0.290)" in (result.path / "report" / "summary.md").read_text()


def test_users_without_anything_held_out_are_not_counted(ratings):
    empty = RankItems(scorer=ByTable(), num_items=ITEMS, part="validation")
    engine = Sequential(ratings, {"evaluate": empty})
    pooled = evaluate(engine, {"table": torch.zeros(ITEMS)}, Cohort([0, 1]), 1).pooled
    assert pooled["examples"] == 0 and "hr_10" not in pooled
