"""MostPop beside every other method: what RankItems tells of it is what MostPop gives when it is run."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import fedsim
from clients.mostpop import Popularity, TellItems, nothing
from fedsim import cli
from fedsim.config import ConfigError, assemble, read
from fedsim.data.datasets import latent_factor_ratings, movielens_100k
from fedsim.data.federation import Federation
from fedsim.data.partition import by_column
from fedsim.engines.local import Sequential, Vectorised
from fedsim.evaluation import evaluate, spread
from fedsim.ranking import (
    MOSTPOP,
    WANTED,
    Measure,
    RankItems,
    Scorer,
    beside,
    foremost,
    is_ranking,
    leave_one_out,
    popularity,
    ranked,
    users,
    usual,
)
from fedsim.sampling import everyone
from fedsim.simulation import begin, rounds
from fedsim.task import Cohort
from fedsim.testing import check_client
from strategies.mostpop import MostPop

ITEMS = 400


@dataclass(frozen=True)
class ByTable(Scorer):
    """An item's score stands in a table, (I,)."""

    def __call__(self, shared, personal, items):
        return shared["table"][items]


def split(data, **settings):
    return leave_one_out(data, by_column(data.columns, column="user"), **settings)


@pytest.fixture(scope="module")
def ratings():
    return split(latent_factor_ratings())


def evaluated(federation, shared, client, engine=Sequential):
    return evaluate(engine(federation, {"evaluate": client}), shared, Cohort(range(federation.num_clients)), 1)


def random(federation):
    number = len(federation.names["item"])
    return {"table": torch.randn(number, generator=torch.Generator().manual_seed(3), dtype=torch.float64)}


def popular(federation, **settings):
    """What MostPop, run as a strategy, tells its users; and what is measured of it."""
    number = len(federation.names["item"])
    clients = {"train": TellItems(num_items=number)}
    strategy = MostPop(number, federation.num_clients)
    start = begin(strategy, nothing().params, clients, 1)
    (step,) = rounds(strategy, Vectorised(federation, clients), everyone(federation.num_clients), start)
    shared = strategy.shared(step.snapshot.state)
    return shared, evaluated(federation, shared, RankItems(scorer=Popularity(), **settings)).pooled


def test_an_item_is_as_popular_as_users_train_with_it(ratings):
    by_hand = [0] * ITEMS
    for user in range(ratings.num_clients):
        for item in ratings.examples(user)["item"].tolist():
            by_hand[item] += 1
    assert popularity(ratings).tolist() == by_hand
    assert torch.equal(popularity(ratings), popular(ratings)[0]["popularity"].long())


@pytest.mark.parametrize("engine", [Sequential, Vectorised])
@pytest.mark.parametrize("part", ["validation", "test"])
@pytest.mark.parametrize("full", [True, False])
def test_beside_any_method_stands_what_mostpop_gives_when_it_is_run(ratings, engine, part, full):
    settings = {"num_items": ITEMS if full else None, "at": (1, 10, 37), "part": part}
    expected = popular(ratings, **settings)[1]
    own = RankItems(scorer=ByTable(), popularity=popularity(ratings), **settings)
    pooled = evaluated(ratings, random(ratings), own, engine).pooled
    told = {name.removeprefix(MOSTPOP): value for name, value in pooled.items() if name.startswith(MOSTPOP)}
    assert told == pytest.approx({name: value for name, value in expected.items() if name != "examples"})
    assert len(told) == (12 if full else 6)
    assert pooled["hr_10"] != told["hr_10"], "it is not the method's own"


def test_its_own_order_is_what_it_is_without_mostpop_beside_it(ratings):
    without, with_ = (
        evaluated(ratings, random(ratings), RankItems(scorer=ByTable(), num_items=ITEMS, popularity=told)).pooled
        for told in (None, popularity(ratings))
    )
    assert not any(name.startswith(MOSTPOP) for name in without)
    assert {name: value for name, value in with_.items() if not name.startswith(MOSTPOP)} == without


@pytest.mark.parametrize("validation", [True, False])
def test_on_the_generated_ratings_it_hits_29_in_100(validation):
    federation = split(latent_factor_ratings(), validation=validation)
    client = RankItems(scorer=ByTable(), popularity=popularity(federation))
    assert evaluated(federation, random(federation), client).pooled["mostpop_hr_10"] == pytest.approx(0.29, abs=1e-12)


def test_on_movielens_it_is_the_same_as_well():
    folder = os.environ.get("FEDSIM_DATA")
    if not folder or not (Path(folder) / "movielens-100k").is_dir():
        pytest.skip("FEDSIM_DATA names no folder with movielens-100k/")
    federation = split(movielens_100k())
    expected = popular(federation, num_items=1682)[1]
    client = RankItems(scorer=ByTable(), num_items=1682, popularity=popularity(federation))
    pooled = evaluated(federation, random(federation), client, Vectorised).pooled
    assert {name: pooled[MOSTPOP + name] for name in expected if name != "examples"} == pytest.approx(
        {name: value for name, value in expected.items() if name != "examples"}
    )


def test_ties_count_against_mostpop_too(ratings):
    same = RankItems(scorer=ByTable(), num_items=ITEMS, popularity=torch.ones(ITEMS, dtype=torch.int64))
    pooled = evaluated(ratings, random(ratings), same).pooled
    assert {value for name, value in pooled.items() if name.startswith(MOSTPOP)} == {0.0}


def test_promises_are_kept_with_it(ratings):
    ten = Federation(ratings.columns, ratings.rows, ratings.bounds[:10], names=ratings.names)
    check_client(RankItems(scorer=ByTable(), num_items=ITEMS, popularity=popularity(ratings)), random(ratings), ten)


@pytest.mark.parametrize(
    ("told", "items", "message"),
    [
        (torch.ones(7), 8, r"popularity must have the shape \(num_items = 8,\), got \(7,\)"),
        (torch.ones(7, 1), None, r"popularity must have the shape \(I,\), got \(7, 1\)"),
    ],
)
def test_a_popularity_of_other_items_is_refused(told, items, message):
    with pytest.raises(ValueError, match=message):
        RankItems(scorer=ByTable(), num_items=items, popularity=told)


def test_data_without_items_have_no_popularity():
    with pytest.raises(ValueError, match="some has no column item with names of its values"):
        popularity(Federation({"x": torch.ones(3)}, np.arange(3), np.array([[0, 3, 3, 3]]), name="some"))


# What is told of each user.


@pytest.mark.parametrize("part", ["validation", "test"])
def test_users_are_as_active_as_they_are_trained_and_held_out_items_as_popular_as_they_are(ratings, part):
    ids, counts = np.array([5, 0, 299, 17]), popularity(ratings)
    found = users(ratings, ids, part, counts)
    for place, user in enumerate(ids.tolist()):
        held = ratings.examples(user, part)
        (item,) = held["item"][held["y"] == WANTED].tolist()
        assert found["activity"][place] == len(ratings.examples(user)["item"])
        assert found["popularity"][place] == counts[item]
    assert list(users(ratings, ids, part, None)) == ["activity"]


def test_of_a_user_without_a_held_out_item_nobody_says_how_popular_it_is(ratings):
    federation = split(latent_factor_ratings(), validation=False)
    assert np.isnan(users(federation, [0, 1], "validation", popularity(federation))["popularity"]).all()


def test_mostpop_is_not_told_as_a_spread_over_users(ratings):
    client = RankItems(scorer=ByTable(), popularity=popularity(ratings))
    told = spread(evaluated(ratings, random(ratings), client))
    assert "hr_10/std" in told and not any(name.startswith(MOSTPOP) for name in told)


# Filled in, written down.

RAY = [
    pytest.mark.slow,  # it takes seconds to start
    pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning"),  # Ray's daemons, till the end
    pytest.mark.filterwarnings("ignore:unclosed file .*/dev/null:ResourceWarning"),  # theirs, too
]
SMALL = ["data.users=40", "data.items=100", "split.negatives=20", "model.dim=4", "rounds=2", "evaluate_every=1"]


def test_an_experiment_fills_it_in(tmp_path):
    parts = assemble(*read("fedrecgel/latent-factors", SMALL))
    client = parts.clients["evaluate"]
    assert isinstance(client, RankItems) and client.popularity is not None
    assert torch.equal(client.popularity, popularity(parts.federation))


@pytest.mark.parametrize("engine", ["sequential", "vectorised", pytest.param("ray", marks=RAY)])
def test_every_engine_tells_the_same_of_it_and_metrics_hold_what_is_pooled_alone(tmp_path, engine):
    uses = {
        "sequential": ["engine.use=fedsim.engines.local:Sequential"],
        "vectorised": ["engine.use=fedsim.engines.local:Vectorised", "engine.block=7"],
        "ray": ["engine.use=fedsim.engines.ray:Ray", "engine.workers=1"],
    }
    result = fedsim.run("fedrecgel/latent-factors", changes=[*SMALL, *uses[engine]], root=tmp_path)
    federation = assemble(*read("fedrecgel/latent-factors", SMALL)).federation
    expected = popular(federation, num_items=100)[1]
    for name in ("hr_5", "ndcg_10", "full_hr_20", "full_ndcg_10"):
        assert [line[f"clients/mostpop_{name}"] for line in result.metrics] == pytest.approx([expected[name]] * 2)
    assert not any("activity" in name or "popularity" in name for line in result.metrics for name in line)
    lines = (result.path / "clients.csv").read_text().splitlines()
    assert lines[0].split(",")[-2:] == ["activity", "popularity"] and len(lines) == 41


def test_a_client_that_needs_it_where_there_are_no_items_is_told_what_is_missing(tmp_path):
    plugin = tmp_path / "needy.py"
    plugin.write_text("def needy(popularity):\n    return popularity\n")
    with pytest.raises(ConfigError, match="needs popularity, and .* has no column item with names of its values"):
        assemble(*read("fedavg/digits", [f"clients.evaluate.use={plugin}:needy"]))


# Names.


def test_names_are_told_apart_and_put_in_order():
    names = ["full_ndcg_10", "hr_20", "mostpop_hr_5", "hr_5", "ndcg_5", "loss", "hr_05", "full_hr_10", "hr_10/min"]
    assert [m.name for m in ranked(names)] == ["hr_5", "ndcg_5", "hr_20", "full_hr_10", "full_ndcg_10"]
    assert [name for name in names if is_ranking(name)] == [
        *("full_ndcg_10", "hr_20", "mostpop_hr_5", "hr_5", "ndcg_5", "full_hr_10"),
    ]
    assert Measure(True, 10, "ndcg").label == "NDCG@10" and ranked([]) == []


def test_the_usual_measures_are_those_at_10_or_near_it():
    assert [m.name for m in usual(["hr_5", "hr_10", "ndcg_10", "hr_20", "full_hr_3", "full_hr_50"])] == [
        *("hr_10", "ndcg_10", "full_hr_3"),
    ]
    assert foremost(["test/hr_10", "clients/hr_15", "clients/hr_5", "clients/mostpop_hr_10"]) == ["clients/hr_5"]
    assert beside("clients/full_hr_10") == "clients/mostpop_full_hr_10"


def test_what_the_terminal_says_in_the_end_has_a_row_of_mostpop(tmp_path):
    told = CliRunner().invoke(cli.app, ["run", "mostpop/latent-factors", "--out", str(tmp_path)]).output.splitlines()
    (own,), (popular,) = ([line for line in told if line.startswith(start)] for start in ("clients/", "MostPop "))
    assert own.split("  ")[:2] == ["clients/hr_10 0.2900", "clients/ndcg_10 0.1328"]
    assert popular.removeprefix("MostPop ").split("  ") == own.split("  ")[:4], "for here it is what was run"
