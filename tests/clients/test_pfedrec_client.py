"""PFedRec's local side: the same as plain torch with whole tables, of which few rows are touched, sent or kept."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from clients.ncf import OWN
from clients.pfedrec import TABLE, DualPersonal, OwnScores, placed, scorer
from fedsim import tree
from fedsim.data.federation import Federation, schedule
from fedsim.engines.local import Sequential, Vectorised
from fedsim.engines.sequential import prepare
from fedsim.model import Model
from fedsim.personal import Personal
from fedsim.task import Cohort, Task
from fedsim.testing import check_client

ITEMS = [0, 3, 5, 3, 7]  # item 3 occurs twice
LABELS = [1, 0, 0, 0, 1]
SIZES = (0, 1, 7, 20, 2)
NUM_ITEMS = 60
NEAR = {torch.float32: 1e-4, torch.float64: 1e-10}


@dataclass(frozen=True, kw_only=True)
class AsTold(DualPersonal):
    """Takes rows and labels as they are, instead of drawing them."""

    def prepare(self, examples, rng):
        return {"y": examples["y"]} | placed(examples["item"], self.num_items)


def double(model, dtype=torch.float64):
    return Model(model.module.to(dtype), model.criterion, "item", "y")


def halves(model):
    """(the user's own parameters, the shared ones)."""
    own = {name: leaf for name, leaf in model.params.items() if name.startswith(OWN)}
    return own, {name: leaf for name, leaf in model.params.items() if name not in own}


def users(sizes=SIZES, num_items=NUM_ITEMS, dtype=torch.float64, **settings):
    """A model, users with so many items each, and what they do."""
    drawn = [torch.randperm(num_items, generator=torch.Generator().manual_seed(u))[:n] for u, n in enumerate(sizes)]
    items, ends = torch.cat(drawn), torch.tensor(sizes).cumsum(0)
    bounds = torch.stack([ends - torch.tensor(sizes), ends, ends, ends], 1).numpy()
    federation = Federation({"item": items, "y": torch.ones_like(items)}, np.arange(len(items)), bounds)
    model = double(scorer(num_items, dim=4), dtype)
    return model, federation, DualPersonal(**{"model": model, "lr": 0.1, "lr_eta": 0.7, "batch_size": 8} | settings)


def answer(engine, ids=None, round=1):
    """What users send and keep after one round from the first parameters."""
    client = engine.clients["train"]
    ids = list(range(engine.federation.num_clients)) if ids is None else ids
    kept = Personal(engine.clients, engine.federation.num_clients, engine.seed).gather(ids)
    shared = {"params": halves(client.model)[1]}
    replies = engine.execute(Task("train", shared, round=round), Cohort(ids, kept))
    assert not replies.failed
    return replies


def by_hand(engine, ident, round=1):
    """(score layer, whole table) of a user after the round, by torch's own modules and optimisers."""
    client = engine.clients["train"]
    data = prepare(engine, Task("train", {}, round=round), ident)
    item = data["touched"][data["place"]]
    plan = schedule(np.array([len(item)]), client.epochs, client.batch_size, engine.seed, round, [ident])[0]
    layer, table = torch.nn.Linear(4, 1).double(), torch.nn.Embedding(NUM_ITEMS, 4).double()
    layer.load_state_dict({name.removeprefix("user_score."): leaf for name, leaf in halves(client.model)[0].items()})
    table.weight.data.copy_(client.model.params[TABLE])
    optimisers = (
        torch.optim.SGD(layer.parameters(), client.lr),
        torch.optim.SGD(table.parameters(), client.lr * NUM_ITEMS * client.lr_eta),
    )
    for step in plan:
        rows = torch.from_numpy(step[step >= 0])
        for optimiser in optimisers:  # the second with the layer that the first has made
            layer.zero_grad(), table.zero_grad()
            logits = layer(table(item[rows]))[:, 0]
            binary_cross_entropy_with_logits(logits, data["y"][rows].double()).backward()
            optimiser.step()
    return layer, table.weight.detach()


def scores(model, shared, kept, items=None):
    """A user's scores of items; of all of them, if none are named."""
    return OwnScores(model)({"params": shared}, kept, torch.arange(len(shared[TABLE])) if items is None else items)


def test_one_step_is_that_of_the_formula_and_an_item_that_occurs_twice_moves_twice():
    model = double(scorer(12, dim=4))
    federation = Federation(
        {"item": torch.tensor(ITEMS), "y": torch.tensor(LABELS)}, np.arange(5), np.array([[0, 5, 5, 5]])
    )
    client = AsTold(model=model, lr=0.3, lr_eta=2.0)
    replies = answer(Sequential(federation, {"train": client}))
    weight, bias, table = (model.params[name] for name in ("user_score.weight", "user_score.bias", TABLE))
    label, rows = torch.tensor(LABELS, dtype=torch.float64), table[ITEMS]
    error = torch.sigmoid(rows @ weight[0] + bias) - label
    moved = weight[0] - 0.3 * (error @ rows) / 5, bias - 0.3 * error.mean()
    torch.testing.assert_close(replies.personal["layer"]["user_score.weight"][0, 0], moved[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(replies.personal["layer"]["user_score.bias"][0], moved[1], rtol=1e-12, atol=0)

    error = torch.sigmoid(rows @ moved[0] + moved[1]) - label
    change = torch.zeros(12, 4, dtype=torch.float64)
    for item, part in zip(ITEMS, error, strict=True):
        change[item] -= 0.3 * 12 * 2.0 * part * moved[0] / 5
    found = replies.update["change"][TABLE].dense()
    torch.testing.assert_close(found, change, rtol=1e-10, atol=1e-14)
    old = -0.3 * 12 * 2.0 / 5 * (torch.sigmoid(rows @ weight[0] + bias) - label)[0] * weight[0]
    assert float((found[0] - old).abs().max()) > 1e-3, "the score layer as it was would give something else"


@pytest.mark.parametrize("engine", [Sequential, Vectorised])
@pytest.mark.parametrize("settings", [{}, {"epochs": 3}, {"batch_size": 1}, {"batch_size": 256, "lr_eta": 80}], ids=str)
def test_rows_alone_give_what_whole_tables_give_in_plain_torch(engine, settings):
    model, federation, client = users(**settings)
    here, shared = engine(federation, {"train": client}, 3), halves(model)[1]
    replies = answer(here)
    for place, ident in enumerate(replies.ids):
        layer, table = by_hand(here, ident)
        kept = tree.take(replies.personal, place)
        rows = replies.update["change"][TABLE]
        change = tree.Rows(rows.index[place], rows.values[place], rows.size).dense()
        largest = max(1.0, float(table.abs().max()))
        torch.testing.assert_close(shared[TABLE] + change, table, rtol=0, atol=1e-10 * largest)
        torch.testing.assert_close(kept["layer"]["user_score.weight"], layer.weight.detach(), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(kept["layer"]["user_score.bias"], layer.bias.detach(), rtol=1e-9, atol=1e-12)
        expected = layer(table)[:, 0].detach()
        near = 1e-10 * max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(scores(model, shared, kept), expected, rtol=0, atol=near)


def test_the_loss_is_that_of_the_second_pass_averaged_over_rows():
    model, federation, client = users(sizes=(5,), batch_size=256)
    here = Sequential(federation, {"train": client}, 3)
    replies = answer(here)
    data = prepare(here, Task("train", {}, round=1), 0)
    rows = model.params[TABLE][data["touched"][data["place"]]]
    own = tree.take(replies.personal["layer"], 0)
    logits = rows @ own["user_score.weight"][0] + own["user_score.bias"]
    expected = binary_cross_entropy_with_logits(logits, data["y"].double())
    torch.testing.assert_close(replies.metrics["loss"][0], expected, rtol=1e-12, atol=0)


# What is sent and kept.


def test_nothing_of_the_score_layer_travels_and_of_the_table_the_rows_of_the_round():
    _, federation, client = users()
    here = Sequential(federation, {"train": client}, 3)
    for ident in range(len(SIZES)):
        replies = answer(here, [ident])
        assert tree.flatten(replies.update).keys() == {f"change/{TABLE}@{part}" for part in ("index", "values", "size")}
        data = prepare(here, Task("train", {}, round=1), ident)
        different = data["touched"][data["touched"] < NUM_ITEMS]
        index = replies.update["change"][TABLE].index
        assert index[index >= 0].tolist() == different.tolist() == sorted(set(different.tolist()))
        assert replies.traffic.up == len(different) * (8 + 4 * 8) + 2 * 8, "rows with their numbers; weight and loss"


def test_what_a_user_works_on_and_sends_is_as_large_with_ten_items_as_with_a_hundred_thousand():
    sizes = {}
    for num_items in (200, 100_000):
        model, federation, client = users((3, 7), num_items, capacity=35)
        here, data = Sequential(federation, {"train": client}), {"mask": torch.ones(15, dtype=torch.bool)}
        data |= prepare(here, Task("train", {}, round=1), 0)
        personal = client.personal(torch.Generator())
        state = client.start({"params": halves(model)[1]}, personal, data)
        reply = client.finish({"params": halves(model)[1]}, state, data)
        rows = reply.update["change"][TABLE]
        leaves = [state["rows"], rows.index, rows.values, *tree.leaves(personal), *tree.leaves(reply.personal)]
        sizes[num_items] = [tuple(leaf.shape) for leaf in leaves]
    assert sizes[200] == sizes[100_000]


def test_scores_are_kept_of_as_many_items_as_there_is_room_for_and_a_user_with_more_is_told():
    model, federation, client = users((2, 7))
    shared = halves(model)[1]
    whole = answer(Sequential(federation, {"train": client}))
    _, _, client = users((2, 7), capacity=35)
    small = answer(Sequential(federation, {"train": client}))
    assert whole.personal["score"].shape == (2, NUM_ITEMS) and small.personal["score"].shape == (2, 35)
    for place in (0, 1):
        first, second = (scores(model, shared, tree.take(replies.personal, place)) for replies in (whole, small))
        assert torch.equal(first, second)
    _, federation, client = users((2, 7), capacity=10)
    here = Sequential(federation, {"train": client})
    replies = here.execute(Task("train", {"params": shared}, round=1), Cohort([0, 1], {}))
    different = prepare(Sequential(federation, {"train": users((2, 7))[2]}), Task("train", {}, round=1), 1)
    number = int((different["touched"] < NUM_ITEMS).sum())
    assert f"capacity = 10: a user's round has {number} different items" in replies.failed[1]


def test_before_its_first_round_a_user_scores_by_what_all_begin_with():
    model, _, client = users()
    kept = client.personal(torch.Generator())
    own, shared = halves(model)
    expected = (shared[TABLE] @ own["user_score.weight"][0]) + own["user_score.bias"]
    torch.testing.assert_close(scores(model, shared, kept), expected)
    assert all(torch.equal(leaf, kept["layer"][name]) for name, leaf in own.items())


def test_items_that_a_user_has_touched_keep_their_scores_whatever_table_is_sent_later():
    model, federation, client = users()
    kept = tree.take(answer(Sequential(federation, {"train": client})).personal, 2)
    later = {TABLE: model.params[TABLE] + 1}
    touched = kept["item"][kept["item"] < NUM_ITEMS]
    others = torch.tensor([item for item in range(NUM_ITEMS) if item not in touched])
    assert len(touched) and len(others)
    assert torch.equal(scores(model, later, kept, touched), kept["score"][: len(touched)])
    layer = kept["layer"]["user_score.weight"][0], kept["layer"]["user_score.bias"]
    torch.testing.assert_close(scores(model, later, kept, others), later[TABLE][others] @ layer[0] + layer[1])


def test_a_user_without_items_counts_nothing_and_changes_nothing():
    model, federation, client = users()
    replies = answer(Sequential(federation, {"train": client}), [0])
    assert replies.weight.tolist() == [0] and replies.metrics["loss"].tolist() == [0]
    assert not replies.update["change"][TABLE].dense().any()
    assert torch.equal(replies.personal["layer"]["user_score.weight"][0], model.params["user_score.weight"])


# Drawing.


def test_each_round_has_every_item_once_and_negatives_that_are_drawn_anew():
    _, federation, client = users()
    here, rounds = Sequential(federation, {"train": client}, 3), []
    has = federation.examples(3)["item"]
    for round in (1, 2):
        data = prepare(here, Task("train", {}, round=round), 3)
        item = data["touched"][data["place"]].reshape(len(has), 5)
        assert torch.equal(item[:, 0], has) and data["y"].reshape(len(has), 5).tolist() == [[1, 0, 0, 0, 0]] * len(has)
        assert not torch.isin(item[:, 1:], has).any()
        rounds.append(item)
    assert not torch.equal(*rounds)


# However it is run.


@pytest.mark.parametrize("dtype", NEAR, ids=str)
@pytest.mark.parametrize("settings", [{}, {"epochs": 2, "batch_size": 256}, {"capacity": 58}], ids=str)
def test_users_answer_together_what_they_answer_alone(dtype, settings):
    found = []
    for engine in (Sequential, Vectorised):
        _, federation, client = users(dtype=dtype, **settings)
        replies = answer(engine(federation, {"train": client}, 3))
        rows = replies.update["change"][TABLE]
        tables = [tree.Rows(i, v, rows.size).dense() for i, v in zip(rows.index, rows.values, strict=True)]
        found.append({"change": torch.stack(tables)} | tree.flatten(replies.personal))
    for name, leaf in found[0].items():
        near = NEAR[dtype] * max(1.0, float(leaf.abs().max()))
        torch.testing.assert_close(found[1][name], leaf, rtol=0, atol=near, msg=name)


def test_it_keeps_the_promises_of_a_client():
    model, federation, client = users(dtype=torch.float32)
    check_client(client, {"params": halves(model)[1]}, federation)


def test_a_learning_rate_must_be_more_than_zero():
    for name in ("lr", "lr_eta"):
        with pytest.raises(ValueError, match=f"{name} must be > 0, got 0"):
            users(**{name: 0})


def test_after_one_mini_batch_every_row_that_is_sent_is_a_multiple_of_the_users_weights():
    _, federation, client = users(sizes=(9,), batch_size=256, lr_eta=80)
    replies = answer(Sequential(federation, {"train": client}))
    rows, weight = replies.update["change"][TABLE].values[0], replies.personal["layer"]["user_score.weight"][0, 0]
    assert float(rows.abs().max()) > 0.1
    along = (rows @ weight / weight.square().sum())[:, None] * weight
    torch.testing.assert_close(rows, along, rtol=0, atol=1e-12)
