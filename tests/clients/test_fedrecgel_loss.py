"""A user's loss: what DualSam descends, on rows that do not depend on what is sent, and few of them that travel."""

from dataclasses import dataclass

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from clients.fedrecgel import DualSam
from clients.fedrecgel_loss import UserLoss, user_losses
from clients.ncf import ITEM, OWN, scorer
from fedsim import tree
from fedsim.data.federation import Federation
from fedsim.engines.local import Sequential, Vectorised
from fedsim.engines.sequential import prepare
from fedsim.model import Model
from fedsim.personal import Personal
from fedsim.sharpness import Surface, ascent, random_direction, scattered
from fedsim.task import Cohort, Task
from fedsim.testing import check_client

SIZES = (3, 0, 1, 20, 8)
ITEMS = 60


@dataclass(frozen=True, kw_only=True)
class WithEmbedding(UserLoss):
    """Begins with an embedding of its own, large enough to matter, where no DualSam has made one."""

    def personal(self, rng):
        own = {name: leaf for name, leaf in self.model.params.items() if name.startswith(OWN)}
        return {"own": tree.map(lambda leaf: torch.randn(leaf.shape, generator=rng).to(leaf.dtype), own)}


class Users:
    """Five users with 3, 0, 1, 20 and 8 of 60 items; everything is well away from zero."""

    def __init__(self, dtype=torch.float64, **settings):
        base = scorer(ITEMS, dim=4, layers=2)
        module = base.module.to(dtype)
        generator = torch.Generator().manual_seed(1)
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data.add_(0.4 * noise.to(dtype))
        self.model = Model(module, base.criterion, "item", "y")
        self.params = {name: leaf for name, leaf in self.model.params.items() if not name.startswith(OWN)}
        items = [torch.randperm(ITEMS, generator=generator)[:n] for n in SIZES]
        ends = torch.tensor(SIZES).cumsum(0)
        bounds = torch.stack([ends - torch.tensor(SIZES), ends, ends, ends], 1).numpy()
        columns = {"item": torch.cat(items), "y": torch.ones(sum(SIZES), dtype=torch.int64)}
        self.federation = Federation(columns, torch.arange(sum(SIZES)).numpy(), bounds)
        self.client = WithEmbedding(model=self.model, **settings)
        self.kept = Personal({"loss": self.client}, len(SIZES), 3).gather(range(len(SIZES)))

    def surface(self, engine=Sequential, ids=(0, 1, 2, 3, 4), **settings):
        ids = list(ids)
        clients = user_losses(self.model, self.client.negatives)
        return Surface(
            engine(self.federation, clients, 3, **settings), Cohort(ids, tree.take(self.kept, torch.tensor(ids)))
        )

    def central(self, surface):
        """The mean over users of their mean losses, in plain torch on whole tables; and its gradient."""
        leaves = {name: leaf.clone().requires_grad_() for name, leaf in self.params.items()}
        means = []
        for user in (0, 2, 3, 4):
            rows = prepare(surface.engine, Task("loss", {}, round=0), user)
            own = tree.take(self.kept, user)["own"]
            logits = torch.func.functional_call(self.model.module, leaves | own, (rows["item"],))
            losses = binary_cross_entropy_with_logits(logits, rows["y"].to(logits.dtype), reduction="none")
            means.append(losses @ rows["weight"])
        loss = torch.stack(means).mean()
        loss.backward()
        return loss.item(), {name: leaf.grad for name, leaf in leaves.items()}


def assert_near(one, other, **how):
    assert one.keys() == other.keys()
    for name, leaf in one.items():
        torch.testing.assert_close(leaf, other[name], **how, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("engine", [Sequential, Vectorised])
def test_loss_and_gradient_are_the_means_over_users_who_have_items_whatever_their_number(engine):
    users = Users()
    here = users.surface(engine)
    loss, slope = users.central(here)
    assert here.loss({"params": users.params}) == pytest.approx(loss, rel=1e-12)
    assert_near(here.gradient({"params": users.params}), slope, rtol=1e-9, atol=1e-14)


def test_without_negatives_the_gradient_is_what_dual_sam_sends_at_radius_zero():
    users = Users(negatives=0)
    sam = DualSam(model=users.model, lr=0.1, rho_shared=0.0, rho_own=0.0, negatives=0, reduction="mean")
    rest = tree.stack([sam.optimiser.init(tree.take(users.kept, 0)["own"])] * len(SIZES))
    task = Task("train", {"params": users.params}, reduce="mean")
    replies = Sequential(users.federation, {"train": sam}).execute(
        task, Cohort(range(5), users.kept | {"optimiser": rest})
    )
    sent = tree.map(lambda leaf: leaf.dense() if isinstance(leaf, tree.Rows) else leaf, replies.update["params"])
    assert_near(users.surface().gradient({"params": users.params}), sent, rtol=1e-9, atol=1e-14)


def test_items_and_labels_are_the_same_for_all_parameters_and_others_in_another_round():
    users = Users()
    engine = users.surface().engine
    first, again, asked_for_slope, later = (
        prepare(engine, Task(action, {}, round=round), 3)
        for action, round in (("loss", 0), ("loss", 0), ("gradient", 0), ("loss", 1))
    )
    assert all(torch.equal(leaf, again[name]) for name, leaf in first.items())
    assert all(torch.equal(leaf, asked_for_slope[name]) for name, leaf in first.items())
    assert not torch.equal(first["item"], later["item"])
    has = users.federation.examples(3, "train")["item"]
    often = first["weight"] * 100
    assert sorted(first["item"][first["y"] == 1].tolist()) == sorted(has.tolist())
    torch.testing.assert_close(often[first["y"] == 1], torch.ones(20, dtype=torch.float64))
    torch.testing.assert_close(often, often.round())
    assert float(often.sum()) == pytest.approx(100) and often.max() > 1.5, "four negatives for each of 20 items"


def test_only_rows_of_items_that_were_drawn_travel_and_nothing_of_the_users():
    users = Users()
    here = users.surface(ids=[3])
    replies = here.engine.execute(Task("gradient", {"params": users.params}), here.cohort)
    rows = prepare(here.engine, Task("gradient", {}), 3)["item"].tolist()
    assert 20 < len(rows) < 60, "of 100 some are the same, and others are not there at all"
    for name, leaf in replies.update["params"].items():
        assert not name.startswith(OWN)
        if name.startswith(ITEM):
            assert sorted(leaf.index[leaf.index >= 0].tolist()) == sorted(set(rows)), "each once"
    assert replies.personal == {}


def test_the_rises_are_the_same_on_both_engines_and_in_any_order_of_users():
    users = Users()
    shared = {"params": users.params}
    expected = ascent(users.surface(), shared, [0.0, 0.1, 0.5]), scattered(users.surface(), shared, [0.5], 3).each
    assert expected[0][0] == 0 and (expected[0][1:] > 0).all() and expected[0][2] > expected[0][1]
    for here in (users.surface(Vectorised), users.surface(Vectorised, [4, 1, 0, 3, 2], block=2)):
        torch.testing.assert_close(ascent(here, shared, [0.0, 0.1, 0.5]), expected[0], rtol=1e-9, atol=1e-14)
        torch.testing.assert_close(scattered(here, shared, [0.5], 3).each, expected[1], rtol=1e-9, atol=1e-14)


def test_to_first_order_it_rises_by_the_norm_of_the_gradient():
    users = Users()
    here, shared = users.surface(), {"params": users.params}
    norm = float(tree.norm(here.gradient(shared)))
    errors = [abs(float(ascent(here, shared, [rho])) / rho - norm) / norm for rho in (1e-3, 1e-4)]
    assert errors[0] < 0.05 and errors[0] / errors[1] == pytest.approx(10, abs=1)


def test_each_items_embedding_is_a_row_of_its_own():
    users = Users()
    direction = random_direction(users.params, 0)
    for name, leaf in users.params.items():
        norms = leaf.norm(dim=1) if leaf.ndim == 2 else torch.zeros(len(leaf), dtype=leaf.dtype)
        found = direction[name].norm(dim=1) if leaf.ndim == 2 else direction[name]
        torch.testing.assert_close(found, norms)


@pytest.mark.parametrize("slope", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_it_keeps_the_promises_of_a_client(slope, dtype):
    users = Users(dtype, slope=slope)
    check_client(users.client, {"params": users.params}, users.federation)
