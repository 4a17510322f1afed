"""FedRecGEL's local side: plain gradients at radius zero, one block climbed at a time, and few rows that travel."""

import math
import re
from dataclasses import dataclass, replace

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from clients.fedrecgel import DualSam, climbed, once
from clients.ncf import OWN, scorer
from fedsim import tree
from fedsim.data.federation import Federation
from fedsim.engines.local import Sequential, Vectorised
from fedsim.engines.sequential import prepare
from fedsim.model import Model, gradient
from fedsim.optim import adam
from fedsim.personal import Personal
from fedsim.ranking import draw_negatives, draw_others
from fedsim.task import Cohort, Task
from fedsim.testing import check_client

ITEMS = [0, 3, 5, 3, 7]  # item 3 occurs twice
LABELS = [1, 0, 0, 0, 1]
TABLES = ("item_gmf", "item_mlp")


@dataclass(frozen=True, kw_only=True)
class AsTold(DualSam):
    """Takes rows and labels as they are, instead of drawing them."""

    def prepare(self, examples, rng):
        return once(examples | {"weight": torch.full((5,), 0.2, dtype=torch.float64)})


class Tiny:
    """Twelve items, one user, five rows, in float64."""

    def __init__(self, **settings):
        base = scorer(12)
        module = base.module.double()
        generator = torch.Generator().manual_seed(0)
        for name, parameter in module.named_parameters():
            noise = 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data.copy_(noise if name.startswith(OWN) else parameter.data + noise)
        self.model = Model(module, base.criterion, "item", "y")
        self.own = {name: leaf for name, leaf in self.model.params.items() if name.startswith(OWN)}
        self.shared = {name: leaf for name, leaf in self.model.params.items() if name not in self.own}
        self.client = AsTold(**{"model": self.model, "lr": 0.1, "rho_shared": 0.0, "rho_own": 0.0} | settings)
        columns = {"item": torch.tensor(ITEMS), "y": torch.tensor(LABELS)}
        bounds = torch.tensor([[0, 5, 5, 5]]).numpy()
        self.federation = Federation(columns, torch.arange(5).numpy(), bounds)

    def loss(self, shared, own):
        """By dense tables, in plain torch."""
        logits = torch.func.functional_call(self.model.module, shared | own, (torch.tensor(ITEMS),))
        return binary_cross_entropy_with_logits(logits, torch.tensor(LABELS, dtype=torch.float64))

    def slopes(self, shared, own):
        at = {"shared": shared, "own": own}
        return gradient(lambda part: self.loss(part["shared"], part["own"]), at)[1]

    def answer(self, **settings):
        """What the user sends, tables dense, and keeps."""
        client = replace(self.client, **settings)
        personal = tree.stack([{"own": self.own, "optimiser": client.optimiser.init(self.own)}])
        engine = Sequential(self.federation, {"train": client})
        replies = engine.execute(Task("train", {"params": self.shared}), Cohort([0], personal))
        sent = {
            name: leaf.dense() if isinstance(leaf, tree.Rows) else leaf[0]
            for name, leaf in replies.update["params"].items()
        }
        return sent, tree.take(replies.personal, 0), replies


@pytest.fixture(scope="module")
def tiny():
    return Tiny()


def distance(one, other):
    return float(tree.norm(tree.map(torch.sub, one, other)))


def test_radii_of_zero_are_the_plain_gradient_and_a_plain_step_of_adam(tiny):
    sent, kept, _ = tiny.answer()
    slope = tiny.slopes(tiny.shared, tiny.own)
    for name, leaf in slope["shared"].items():
        torch.testing.assert_close(sent[name], leaf, rtol=1e-12, atol=1e-15)
    expected, _ = adam(0.1).update(slope["own"], adam(0.1).init(tiny.own), tiny.own)
    for name, leaf in expected.items():
        torch.testing.assert_close(kept["own"][name], leaf, rtol=1e-9, atol=1e-12)


def test_each_block_is_climbed_alone_by_the_distance_that_was_asked_for(tiny):
    slope = tiny.slopes(tiny.shared, tiny.own)
    stacked = {block: tree.stack([part]) for block, part in {"shared": tiny.shared, "own": tiny.own}.items()}
    along = {block: tree.stack([part]) for block, part in slope.items()}
    up = [
        tree.take(climbed(stacked[block], along[block], radius), 0)
        for block, radius in (("shared", 0.05), ("own", 0.07))
    ]
    assert distance(up[0], tiny.shared) == pytest.approx(0.05, rel=1e-10)
    assert distance(up[1], tiny.own) == pytest.approx(0.07, rel=1e-10)
    sent, kept, _ = tiny.answer(rho_shared=0.05, rho_own=0.07)
    for name, leaf in tiny.slopes(up[0], tiny.own)["shared"].items():
        torch.testing.assert_close(sent[name], leaf, rtol=1e-10, atol=1e-14)
    step = tiny.slopes(tiny.shared, up[1])["own"]
    expected, _ = adam(0.1).update(step, adam(0.1).init(tiny.own), tiny.own)
    for name, leaf in expected.items():
        torch.testing.assert_close(kept["own"][name], leaf, rtol=1e-9, atol=1e-12)
    joint = tiny.slopes(*up)["shared"]  # what perturbing both together would give
    assert distance(joint, {name: sent[name] for name in joint}) > 1e-6


def test_what_is_sent_does_not_depend_on_the_own_radius_nor_what_is_kept_on_the_shared_one(tiny):
    sent, kept, _ = tiny.answer(rho_shared=0.05, rho_own=0.0)
    other, _, _ = tiny.answer(rho_shared=0.05, rho_own=0.3)
    _, same, _ = tiny.answer(rho_shared=0.3, rho_own=0.0)
    assert all(torch.equal(leaf, other[name]) for name, leaf in sent.items())
    assert all(torch.equal(leaf, tree.flatten(same)[name]) for name, leaf in tree.flatten(kept).items())


def test_to_first_order_it_adds_the_curvature_in_the_direction_of_the_gradient(tiny):
    plain, _, _ = tiny.answer()
    norm = tree.norm(plain)
    direction = tree.map(lambda g: g / norm, plain)

    def shift(t):
        return {name: leaf + t * direction[name] for name, leaf in tiny.shared.items()}

    ahead, behind = (tiny.slopes(shift(t), tiny.own)["shared"] for t in (1e-6, -1e-6))
    curved = tree.map(lambda a, b: (a - b) / 2e-6, ahead, behind)
    errors = {}
    for radius in (1e-3, 1e-4):  # within which no unit is switched on or off
        sent, _, _ = tiny.answer(rho_shared=radius)
        found = {name: (sent[name] - plain[name]) / radius for name in curved}
        errors[radius] = distance(found, curved) / float(tree.norm(curved))
    assert errors[1e-3] < 0.05
    assert errors[1e-3] / errors[1e-4] == pytest.approx(10, abs=1)


def test_items_of_no_row_have_no_gradient_and_do_not_travel(tiny):
    sent, _, replies = tiny.answer(rho_shared=0.05, rho_own=0.05)
    others = [item for item in range(12) if item not in ITEMS]
    for name in TABLES:
        assert not sent[name][others].any() and sent[name][sorted(set(ITEMS))].any()
        rows = replies.update["params"][name]
        assert sorted(rows.index[rows.index >= 0].tolist()) == sorted(set(ITEMS))


def test_no_embedding_of_a_user_travels_and_as_many_bytes_do_as_there_are_numbers(tiny):
    _, kept, replies = tiny.answer()
    names = {name.removeprefix("params/").partition("@")[0] for name in tree.flatten(replies.update)}
    assert not any(name.startswith(OWN) for name in names) and names == tiny.shared.keys()
    network = sum(leaf.numel() for name, leaf in tiny.shared.items() if name not in TABLES)
    assert network == 43_297
    rows = len(set(ITEMS)) * 160
    expected = 8 * (network + rows) + 2 * 8 * len(set(ITEMS)) + 16  # numbers; which rows, twice; weight and loss
    assert replies.traffic.up == expected
    assert replies.traffic.down == 8 * (12 * 160 + 43_297)
    assert kept["own"].keys() == tiny.own.keys()


def test_a_sum_of_means_weighs_the_rows_of_a_short_last_piece_more():
    client = Tiny().client
    assert replace(client, piece=3)._weights(7).tolist() == pytest.approx([1 / 3] * 6 + [1.0])
    assert replace(client, reduction="mean")._weights(7).tolist() == pytest.approx([1 / 7] * 7)


# Drawing.


def test_negatives_are_not_the_users_items_and_not_the_same_twice_and_all_others_are_drawn_as_often():
    generator = torch.Generator().manual_seed(0)
    has = torch.tensor([3, 8, 1])
    drawn = torch.cat([draw_negatives(has, 4, 20, generator) for _ in range(2000)])
    assert not torch.isin(drawn, has).any()
    assert (drawn.sort(1).values.diff() > 0).all()
    often = drawn.flatten().bincount(minlength=20)[[i for i in range(20) if i not in (1, 3, 8)]].double()
    expected = drawn.numel() / 17
    assert ((often - expected) ** 2 / expected).sum() < 40, "chi-squared with 16 degrees of freedom"
    with pytest.raises(ValueError, match="negatives = 4: a user has 3 of 6 items, there are not so many others"):
        draw_negatives(has, 4, 6, generator)


def test_others_are_drawn_down_to_the_last_one():
    generator = torch.Generator().manual_seed(0)
    half = torch.stack([draw_others(torch.tensor([9]), 1, 6, 10, generator)[0] for _ in range(900)])
    often = half.flatten().bincount(minlength=9).double()
    assert (half.sort().values.diff() > 0).all() and often[9:].sum() == 0
    assert ((often[:9] - 600) ** 2 / 600).sum() < 30, "chi-squared with 8 degrees of freedom, and more even than that"
    for _ in range(50):
        assert draw_others(torch.tensor([0, 2, 2, 5]), 1, 3, 6, generator).sort().values.tolist() == [[1, 3, 4]]
    assert draw_others(torch.arange(0), 2, 0, 6, generator).shape == (2, 0)
    with pytest.raises(ValueError, match="4 items other than 3 of 6 cannot be drawn"):
        draw_others(torch.tensor([0, 2, 2, 5]), 1, 4, 6, generator)


def test_each_round_has_its_items_and_negatives_each_once_and_weighing_what_its_rows_do():
    client = DualSam(model=scorer(14), lr=0.1, negatives=4, piece=6)
    has = torch.tensor([7, 9, 3])
    found = client.prepare({"item": has, "y": torch.ones(3)}, torch.Generator().manual_seed(1))
    rng = torch.Generator().manual_seed(1)
    order = has[torch.randperm(3, generator=rng)]
    rows = torch.cat([order[:, None], draw_negatives(order, 4, 14, rng)], 1).flatten().tolist()
    weights = [1 / 6] * 12 + [1 / 3] * 3
    assert found["item"].tolist() == sorted(set(rows)) and len(set(rows)) < len(rows)
    for item, y, weight in zip(*(found[name].tolist() for name in ("item", "y", "weight")), strict=True):
        assert y == (item in (7, 9, 3))
        assert weight == pytest.approx(sum(w for row, w in zip(rows, weights, strict=True) if row == item))


# However it is run.


def users(sizes=(0, 1, 7, 20, 2), num_items=60, dtype=torch.float32, **settings):
    model = scorer(num_items, dim=4, layers=2)
    model = Model(model.module.to(dtype), model.criterion, "item", "y")
    items = torch.cat(
        [torch.randperm(num_items, generator=torch.Generator().manual_seed(u))[:n] for u, n in enumerate(sizes)]
    )
    ends = torch.tensor(sizes).cumsum(0)
    bounds = torch.stack([ends - torch.tensor(sizes), ends, ends, ends], 1).numpy()
    federation = Federation({"item": items, "y": torch.ones_like(items)}, torch.arange(len(items)).numpy(), bounds)
    return model, federation, DualSam(model=model, lr=0.1, **settings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("rho_shared", "rho_own"), [(0.0, 0.0), (0.05, 0.1)])
def test_users_answer_together_what_they_answer_alone(dtype, rho_shared, rho_own):
    model, federation, client = users(dtype=dtype, rho_shared=rho_shared, rho_own=rho_own, piece=16)
    shared = {name: leaf for name, leaf in model.params.items() if not name.startswith(OWN)}
    ids = list(range(5))
    found = []
    for engine in (Sequential, Vectorised):
        here = engine(federation, {"train": client}, 3)
        kept = Personal({"train": client}, 5, 3).gather(ids)
        replies = here.execute(Task("train", {"params": shared}, round=1), Cohort(ids, kept))
        order = torch.tensor(replies.ids).argsort()
        update = {
            n: leaf.dense() if isinstance(leaf, tree.Rows) else leaf[order]
            for n, leaf in replies.update["params"].items()
        }
        found.append(update | tree.flatten(tree.take(replies.personal, order)))
    near = 1e-4 if dtype == torch.float32 else 1e-9
    for name, leaf in found[0].items():
        torch.testing.assert_close(found[1][name], leaf, rtol=near, atol=near * max(float(leaf.abs().max()), 1e-3))


def test_it_keeps_the_promises_of_a_client():
    model, federation, client = users()
    shared = {name: leaf for name, leaf in model.params.items() if not name.startswith(OWN)}
    check_client(client, {"params": shared}, federation)


def test_a_user_begins_with_an_embedding_of_its_own():
    _, _, client = users()
    kept = Personal({"train": client}, 5, 3).gather([0, 1])
    assert not torch.equal(kept["own"]["user_gmf"][0], kept["own"]["user_gmf"][1])
    assert kept["optimiser"]["steps"].tolist() == [0, 0]
    wide = DualSam(model=scorer(5, dim=256), lr=0.1).personal(torch.Generator().manual_seed(0))["own"]["user_gmf"]
    assert float(wide.std()) == pytest.approx(0.01, rel=4 / math.sqrt(2 * 256))


# What it hides.


def sent_by(client, federation, model, seed=3, engine=Sequential):
    shared = {name: leaf for name, leaf in model.params.items() if not name.startswith(OWN)}
    kept = Personal({"train": client}, 5, seed).gather([2])
    return engine(federation, {"train": client}, seed).execute(
        Task("train", {"params": shared}, round=1), Cohort([2], kept)
    )


def test_decoys_are_rows_of_other_items_whose_gradient_is_zero_and_change_nothing_else():
    model, federation, plain = users(dtype=torch.float64)
    one, other = (sent_by(client, federation, model) for client in (plain, replace(plain, decoys=15)))
    for name in TABLES:
        few, many = one.update["params"][name], other.update["params"][name]
        assert (
            set(few.index[0].tolist()) < set(many.index[0].tolist()) and many.index.shape[1] == few.index.shape[1] + 15
        )
        assert many.index[0].tolist() == sorted(set(many.index[0].tolist())), "their place does not tell them apart"
        assert not many.values[0][~torch.isin(many.index[0], few.index[0])].any()
        torch.testing.assert_close(many.dense(), few.dense(), rtol=1e-9, atol=1e-15)
    for name, leaf in tree.flatten(one.personal).items():
        torch.testing.assert_close(tree.flatten(other.personal)[name], leaf, rtol=1e-9, atol=1e-12)


def test_more_decoys_than_there_are_items_are_refused():
    model, federation, plain = users()
    failed = sent_by(replace(plain, decoys=60), federation, model).failed
    assert re.search(r"decoys = 60: only \d+ of 60 items are not in a user's round", failed[2])


def test_who_has_no_item_weighs_nothing_with_decoys_either():
    _, federation, client = users(decoys=3)
    shared = {name: leaf for name, leaf in client.model.params.items() if not name.startswith(OWN)}
    for noise in (0.0, 0.1):
        here = replace(client, noise=noise)
        kept = Personal({"train": here}, 5, 3).gather([0, 1])
        for engine in (Sequential, Vectorised):
            task = Task("train", {"params": shared}, round=1)
            replies = engine(federation, {"train": here}, 3).execute(task, Cohort([0, 1], kept))
            assert dict(zip(replies.ids, replies.weight.tolist(), strict=True)) == {0: 0.0, 1: 1.0}


def test_what_is_sent_is_clipped_to_a_norm_and_never_stretched():
    model, federation, plain = users(dtype=torch.float64)
    whole = sent_by(plain, federation, model).update["params"]
    size = float(tree.norm(whole))
    short = sent_by(replace(plain, clip=size / 3), federation, model).update["params"]
    assert float(tree.norm(short)) == pytest.approx(size / 3, rel=1e-9)
    for name, leaf in tree.flatten(whole).items():
        if leaf.is_floating_point():
            torch.testing.assert_close(3 * tree.flatten(short)[name], leaf, rtol=1e-9, atol=1e-15)
    long = sent_by(replace(plain, clip=3 * size), federation, model).update["params"]
    assert all(torch.equal(leaf, tree.flatten(long)[name]) for name, leaf in tree.flatten(whole).items())


@pytest.mark.parametrize("engine", [Sequential, Vectorised])
def test_noise_is_gaussian_with_its_deviation_on_every_number_and_decoys_are_not_told_by_zeros(engine):
    model, federation, plain = users(dtype=torch.float64, decoys=20)
    noisy = replace(plain, noise=0.5)
    whole, answer = (sent_by(client, federation, model, engine=engine) for client in (plain, noisy))
    assert "loss" in whole.metrics and answer.metrics == {}, "which would tell of the gradient"
    numbers = {name: leaf for name, leaf in tree.flatten(answer.update).items() if leaf.is_floating_point()}
    added = torch.cat([(leaf - tree.flatten(whole.update)[name]).flatten() for name, leaf in numbers.items()])
    assert float(added.std()) == pytest.approx(0.5, rel=4 / math.sqrt(2 * len(added)))
    assert abs(float(added.mean())) < 4 * 0.5 / math.sqrt(len(added))
    assert all((answer.update["params"][name].values != 0).all() for name in TABLES)
    again = sent_by(noisy, federation, model, engine=engine).update
    assert all(torch.equal(leaf, tree.flatten(again)[name]) for name, leaf in tree.flatten(answer.update).items())


def test_a_users_noise_does_not_depend_on_who_runs_beside_it_nor_on_where():
    model, federation, plain = users(dtype=torch.float64, decoys=5, noise=0.5)
    alone = sent_by(plain, federation, model).update["params"]
    shared = {name: leaf for name, leaf in model.params.items() if not name.startswith(OWN)}
    ids = [3, 2, 1]
    kept = Personal({"train": plain}, 5, 3).gather(ids)
    task = Task("train", {"params": shared}, round=1)
    replies = Vectorised(federation, {"train": plain}, 3).execute(task, Cohort(ids, kept))
    beside = tree.take(replies.update, replies.ids.index(2))["params"]
    for name, leaf in alone.items():
        one, other = (part.dense() if isinstance(part, tree.Rows) else part for part in (leaf, beside[name]))
        torch.testing.assert_close(other, one[0] if one.ndim > other.ndim else one, rtol=1e-9, atol=1e-12)


def test_a_model_without_tables_of_items_is_refused():
    with pytest.raises(
        ValueError, match=r"must have tables of one length whose names begin with 'item_', it has 0.weight"
    ):
        DualSam(model=Model(torch.nn.Sequential(torch.nn.Linear(2, 1))), lr=0.1)


def test_a_users_parameters_are_as_spread_at_first_as_was_asked_for():
    client = DualSam(model=scorer(5, dim=256), lr=0.1, spread=0.3)
    own = client.personal(torch.Generator().manual_seed(0))["own"]["user_mlp"]
    assert float(own.std()) == pytest.approx(0.3, rel=4 / math.sqrt(2 * len(own)))


# Rows or tables.


@pytest.mark.parametrize("rule", ["adam", "sgd"])
def test_a_round_by_rows_is_one_by_dense_tables(rule):
    model, federation, client = users(dtype=torch.float64, rho_shared=0.05, rho_own=0.1, piece=16, rule=rule)
    shared = {name: leaf for name, leaf in model.params.items() if not name.startswith(OWN)}
    kept = Personal({"train": client}, 5, 3).gather([2, 3])
    engine = Vectorised(federation, {"train": client}, 3)
    task = Task("train", {"params": shared}, round=1, reduce="mean")
    found = engine.execute(task, Cohort([2, 3], kept)).update["params"]
    expected = {name: torch.zeros_like(leaf) for name, leaf in shared.items()}
    for place, user in enumerate((2, 3)):
        rows = prepare(engine, task, user)

        def loss(at, rows=rows):  # of whole tables
            logits = torch.func.functional_call(model.module, at["shared"] | at["own"], (rows["item"],))
            each = binary_cross_entropy_with_logits(logits, rows["y"].double(), reduction="none")
            return (rows["weight"] * each).sum()

        at = {"shared": shared, "own": tree.take(kept["own"], place)}
        slope = gradient(loss, at)[1]["shared"]
        length = tree.norm(slope)
        up = {name: leaf + 0.05 * slope[name] / length for name, leaf in shared.items()}
        for name, leaf in gradient(loss, at | {"shared": up})[1]["shared"].items():
            expected[name] += leaf / 2
    for name, leaf in expected.items():
        mean = found[name].dense() if isinstance(found[name], tree.Rows) else found[name]
        assert float((mean - leaf).abs().max()) < 1e-6 * float(leaf.abs().max())
