"""PFedRec: whole rounds as in plain torch with a table for each user, and tastes that popularity does not know."""

from itertools import islice

import numpy as np
import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from clients.ncf import OWN
from clients.pfedrec import TABLE, DualPersonal, OwnScores, scorer
from fedsim import tree
from fedsim.data.datasets import latent_factor_ratings
from fedsim.data.federation import schedule
from fedsim.data.partition import by_column
from fedsim.engines.local import Sequential, Vectorised
from fedsim.engines.sequential import prepare
from fedsim.evaluation import evaluate
from fedsim.model import Model
from fedsim.ranking import RankItems, leave_one_out, rank
from fedsim.runs import Run
from fedsim.sampling import everyone, uniform
from fedsim.simulation import begin, rounds
from fedsim.task import Cohort, Replies, Task
from fedsim.testing import check_strategy
from strategies.pfedrec import PFedRec

USERS, ITEMS = 12, 90


def method(engine=Vectorised, **settings):
    """Server, model and users, few of them small, in float64."""
    data = latent_factor_ratings(users=USERS, items=ITEMS)
    federation = leave_one_out(data, by_column(data.columns, column="user"), negatives=9)
    small = scorer(ITEMS, dim=4)
    model = Model(small.module.double(), small.criterion, "item", "y")
    clients = {
        "train": DualPersonal(**{"model": model, "lr": 0.1, "lr_eta": 1.0, "batch_size": 32} | settings),
        "evaluate": RankItems(scorer=OwnScores(model), num_items=ITEMS),
    }
    return PFedRec(), model, clients, engine(federation, clients, 3)


def after(strategy, engine, model, clients, number, sample=None):
    """The snapshot after so many rounds."""
    size = engine.federation.num_clients
    start = begin(strategy, model.params, clients, size, engine.seed)
    *_, last = islice(rounds(strategy, engine, sample or everyone(size), start), number)
    return last.snapshot


def by_hand(engine, number):
    """(the server's table, each user's score layer and table) after rounds of everybody, with whole tables in torch."""
    client = engine.clients["train"]
    server = client.model.params[TABLE].clone()
    layers = [torch.nn.Linear(4, 1).double() for _ in range(USERS)]
    for layer in layers:
        layer.load_state_dict({name: client.model.params[f"user_score.{name}"] for name in ("weight", "bias")})
    for round in range(1, number + 1):
        tables = []
        for user, layer in enumerate(layers):
            data = prepare(engine, Task("train", {}, round=round), user)
            item, table = data["touched"][data["place"]], server.clone().requires_grad_()
            sizes = np.array([len(item)])
            for step in schedule(sizes, client.epochs, client.batch_size, engine.seed, round, [user])[0]:
                rows = torch.from_numpy(step[step >= 0])
                for rate, parts in (
                    (client.lr, list(layer.parameters())),
                    (client.lr * ITEMS * client.lr_eta, [table]),
                ):
                    logits = layer(table[item[rows]])[:, 0]
                    loss = binary_cross_entropy_with_logits(logits, data["y"][rows].double())
                    for part, slope in zip(parts, torch.autograd.grad(loss, parts), strict=True):
                        part.data -= rate * slope
            tables.append(table.detach())
        server = torch.stack(tables).mean(0)
    return server, layers, tables


@pytest.mark.slow
def test_it_learns_tastes_that_popularity_does_not_know():
    data = latent_factor_ratings()
    federation = leave_one_out(data, by_column(data.columns, column="user"), validation=False)
    model = scorer(400)
    clients = {
        "train": DualPersonal(model=model, lr=0.1, lr_eta=80),
        "evaluate": RankItems(scorer=OwnScores(model)),
    }
    engine = Vectorised(federation, clients, 0)
    snapshot = after(PFedRec(), engine, model, clients, 80)
    cohort = Cohort(range(300), snapshot.personal.gather(range(300)))
    own = evaluate(engine, PFedRec().shared(snapshot.state), cohort, 80).pooled["hr_10"]
    assert own >= 0.29 + 0.2, "popularity's is 0.29"


@pytest.mark.parametrize("engine", [Sequential, Vectorised])
def test_three_rounds_are_those_of_whole_tables_and_users_are_evaluated_with_their_own(engine):
    strategy, model, clients, here = method(engine)
    snapshot = after(strategy, here, model, clients, 3)
    server, layers, tables = by_hand(here, 3)
    torch.testing.assert_close(snapshot.state["params"][TABLE], server, rtol=1e-8, atol=1e-10)
    kept = snapshot.personal.gather(range(USERS))
    ranks = []
    for user in range(USERS):
        expected = layers[user](tables[user])[:, 0].detach()
        found = OwnScores(model)(strategy.shared(snapshot.state), tree.take(kept, user), torch.arange(ITEMS))
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)
        part = here.federation.examples(user, "test")
        ranks.append(int(rank(expected[part["item"]], part["y"] == 1, part["y"] != -1)))
        mean = layers[user](server)[:, 0].detach()
        assert float((expected - mean).abs().max()) > 1e-2, "the mean of the tables would give other scores"
    pooled = evaluate(here, strategy.shared(snapshot.state), Cohort(range(USERS), kept), 3).pooled
    assert pooled["hr_5"] == pytest.approx(np.mean(np.array(ranks) < 5))


def test_the_mean_of_the_changes_makes_the_mean_of_the_tables():
    strategy, model, clients, engine = method()
    state, ids = strategy.init(model.params), [0, 3, 5]
    kept = begin(strategy, model.params, clients, USERS, 3).personal.gather(ids)
    task = Task("train", {"params": state["params"]}, ids, 1)
    each = engine.execute(task, Cohort(ids, kept)).update["change"][TABLE]
    tables = [
        state["params"][TABLE] + tree.Rows(i, v, ITEMS).dense() for i, v in zip(each.index, each.values, strict=True)
    ]
    assert len({int((table != state["params"][TABLE]).any(1).sum()) for table in tables}) > 1, "some touched more"
    moved, _ = strategy.aggregate(state, task, engine.execute(task._replace(reduce="mean"), Cohort(ids, kept)))
    torch.testing.assert_close(moved["params"][TABLE], torch.stack(tables).mean(0), rtol=1e-12, atol=1e-14)
    assert torch.equal(moved["sent"][TABLE], state["params"][TABLE])


def test_the_servers_state_holds_nothing_of_a_score_layer():
    strategy, model, _, _ = method()
    state = strategy.init(model.params)
    assert not any(OWN in name for name in tree.flatten(state))
    assert {OWN in name for name in model.params} == {True, False}


def test_a_user_who_is_not_asked_keeps_its_first_score_layer_and_no_scores():
    strategy, model, clients, engine = method()
    before = begin(strategy, model.params, clients, USERS, 3).personal.gather(range(USERS))
    sample = uniform(6, 3, count=2)
    kept = after(strategy, engine, model, clients, 3, lambda round, among=None: sample(round)).personal.gather(
        range(USERS)
    )
    for name, leaf in tree.flatten(before).items():
        assert torch.equal(tree.flatten(kept)[name][6:], leaf[6:]), name
    trained = (kept["item"] < ITEMS).any(1)
    assert 2 <= int(trained[:6].sum()) <= 6 and not trained[6:].any()


def test_where_nobody_has_an_item_nothing_moves():
    strategy = PFedRec()
    state = strategy.init({"table": torch.ones(3)})
    nothing = tree.Rows(torch.zeros(0, dtype=torch.int64), torch.zeros(0), 3)
    moved, _ = strategy.aggregate(
        state, Task("train", {}), Replies([0], torch.zeros(1), {"change": {"table": nothing}})
    )
    assert torch.equal(moved["params"]["table"], torch.ones(3))


def test_it_keeps_the_promises_of_a_strategy():
    params = {"table": torch.ones(3), "user_score": torch.ones(2)}
    change = tree.Rows(torch.tensor([0, 2]), torch.ones(2), 3)
    check_strategy(PFedRec(), params, Replies([0], torch.ones(1), {"change": {"table": change}}))


def test_a_run_that_was_stopped_goes_on_to_the_same_bits(tmp_path):
    strategy, model, clients, engine = method()
    sample = uniform(USERS, 3, count=5)
    whole, resumed = (Run.create(tmp_path, name, 3, "", {}) for name in ("whole", "resumed"))
    for step in islice(rounds(strategy, engine, sample, begin(strategy, model.params, clients, USERS, 3)), 4):
        whole.save(step.snapshot, "all")
    half = whole.load(whole.checkpoints()[1], begin(strategy, model.params, clients, USERS, 3))
    for step in islice(rounds(strategy, engine, sample, half), 2):
        resumed.save(step.snapshot, "all")
    for one, other in zip(whole.checkpoints()[2:], resumed.checkpoints(), strict=True):
        assert one.read_bytes() == other.read_bytes()
