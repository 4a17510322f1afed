"""FedRecGEL: the server's step by hand, users who are left alone, and tastes that popularity does not know."""

import math
from functools import cache
from itertools import islice

import pytest
import torch
from flwr.app import ArrayRecord
from torch.nn.functional import binary_cross_entropy_with_logits

from clients.fedrecgel import DualSam
from clients.ncf import OWN, ModelScores, scorer
from fedsim import tree
from fedsim.data.datasets import latent_factor_ratings
from fedsim.data.partition import by_column
from fedsim.engines.local import Sequential, Vectorised
from fedsim.engines.sequential import prepare
from fedsim.evaluation import evaluate
from fedsim.flower import ClientNodes
from fedsim.flower.codec import decode_reply
from fedsim.personal import Personal
from fedsim.ranking import RankItems, leave_one_out
from fedsim.runs import Run
from fedsim.sampling import everyone, uniform
from fedsim.simulation import begin, rounds
from fedsim.task import Cohort, Replies, Task
from fedsim.testing import check_strategy
from strategies.fedrecgel import FedRecGel

USERS, ITEMS = 300, 400


@cache
def ratings(validation=False):
    data = latent_factor_ratings()
    return leave_one_out(data, by_column(data.columns, column="user"), validation=validation)


def method(dim=4, layers=2, engine=Vectorised, **settings):
    """Server, model and users, few of them small."""
    data = latent_factor_ratings(users=12, items=90)
    federation = leave_one_out(data, by_column(data.columns, column="user"), negatives=9)
    model = scorer(90, dim, layers)
    clients = {
        "train": DualSam(model=model, lr=0.1, **settings),
        "evaluate": RankItems(scorer=ModelScores(model), num_items=90),
    }
    return FedRecGel(lr=0.01), model, clients, engine(federation, clients, 3)


def steps(strategy, engine, model, clients, number, sample=None):
    """So many rounds."""
    size = engine.federation.num_clients
    start = begin(strategy, model.params, clients, size, 3)
    return islice(rounds(strategy, engine, sample or everyone(size), start), number)


@cache
def learned(rho, seed=0, number=150):
    """HR@10 of the test items in the last round."""
    federation, model = ratings(), scorer(ITEMS, seed=seed)
    clients = {
        "train": DualSam(model=model, lr=0.1, rho_shared=rho, rho_own=rho),
        "evaluate": RankItems(scorer=ModelScores(model)),
    }
    engine, strategy = Vectorised(federation, clients, seed), FedRecGel(lr=0.003)
    start = begin(strategy, model.params, clients, USERS, seed)
    *_, last = islice(rounds(strategy, engine, uniform(USERS, seed, fraction=0.2), start), number)
    kept = last.snapshot.personal.gather(range(USERS))
    return evaluate(engine, strategy.shared(last.snapshot.state), Cohort(range(USERS), kept), number).pooled["hr_10"]


@pytest.mark.slow
@pytest.mark.parametrize("rho", [0.0, 0.05])
def test_it_learns_tastes_that_popularity_does_not_know(rho):
    assert learned(rho) >= 0.72 and learned(rho) >= 0.29 + 0.4


@pytest.mark.slow
def test_too_large_a_radius_slows_learning():
    assert sum(learned(0.5, seed) for seed in range(3)) / 3 < 0.6


def test_the_server_takes_a_step_of_adam_on_the_plain_mean():
    strategy, model, clients, engine = method(engine=Sequential, rho_shared=0.0, rho_own=0.0)
    state = strategy.init(model.params)
    assert not any(name.startswith(OWN) for name in state["params"])
    ids = [0, 3, 5]
    kept = begin(strategy, model.params, clients, 12, 3).personal.gather(ids)
    one_by_one = [
        engine.execute(
            Task("train", {"params": state["params"]}, [i], 1), Cohort([i], tree.take(kept, torch.tensor([k])))
        )
        for k, i in enumerate(ids)
    ]
    slopes = [
        tree.map(lambda leaf: leaf.dense() if isinstance(leaf, tree.Rows) else leaf[0], r.update["params"])
        for r in one_by_one
    ]
    mean = {name: sum(slope[name] for slope in slopes) / 3 for name in state["params"]}
    task = Task("train", {"params": state["params"]}, ids, 1, "mean")
    before = tree.clone(state["params"])
    after, _ = strategy.aggregate(state, task, engine.execute(task, Cohort(ids, kept)))
    for name, leaf in before.items():
        parameter = leaf.clone().requires_grad_()
        optimiser = torch.optim.Adam([parameter], lr=0.01)
        parameter.grad = mean[name]
        optimiser.step()
        torch.testing.assert_close(after["params"][name], parameter.detach(), rtol=1e-4, atol=1e-6)


def test_with_everybody_it_is_a_centralised_step_on_the_mean_loss():
    strategy, model, clients, engine = method(engine=Sequential, rho_shared=0.0, rho_own=0.0, reduction="mean")
    shared = strategy.init(model.params)["params"]
    kept = begin(strategy, model.params, clients, 12, 3).personal.gather(range(12))
    found = engine.execute(Task("train", {"params": shared}, range(12), 1, "mean"), Cohort(range(12), kept)).update[
        "params"
    ]
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in shared.items()}
    total = 0.0
    for user in range(12):
        rows = prepare(engine, Task("train", {}, round=1), user)
        own = tree.take(kept, user)["own"]
        logits = torch.func.functional_call(model.module, leaves | own, (rows["item"],))
        losses = binary_cross_entropy_with_logits(logits, rows["y"].float(), reduction="none")
        total = total + (losses * rows["weight"]).sum() / 12
    total.backward()
    for name, leaf in leaves.items():
        mean = found[name].dense() if isinstance(found[name], tree.Rows) else found[name]
        torch.testing.assert_close(mean, leaf.grad, rtol=1e-4, atol=1e-7)


def test_a_user_who_is_not_asked_keeps_its_first_embedding_and_adam_at_rest():
    strategy, model, clients, engine = method()
    before = begin(strategy, model.params, clients, 12, 3).personal.gather(range(12))
    *_, last = steps(strategy, engine, model, clients, 3, lambda round, among=None: uniform(6, 3, count=2)(round))
    after = last.snapshot.personal.gather(range(12))
    for name, leaf in tree.flatten(before).items():
        assert torch.equal(tree.flatten(after)[name][6:], leaf[6:])
    assert after["optimiser"]["steps"].sum() == 6, "three rounds of two users each"


def test_no_message_holds_anything_of_the_shape_of_a_users_embedding():
    _, model, clients, engine = method(dim=32, layers=3, engine=Sequential)
    kept = begin(FedRecGel(), model.params, clients, 12, 3).personal.gather([4])
    shared = FedRecGel().init(model.params)["params"]
    replies = engine.execute(Task("train", {"params": shared}, [4], 1), Cohort([4], kept))
    flat = tree.flatten(replies.update)
    assert not any(OWN in name for name in flat)
    assert not any(
        tuple(leaf.shape[1:]) in {(32,), (128,)} and "weight" in name for name, leaf in flat.items() if "@" not in name
    )


def test_items_that_nobody_touched_move_on_by_momentum():
    strategy = FedRecGel(lr=0.01)
    params = {"table": torch.zeros(3)}
    state = strategy.init(params)
    task = Task("train", {"params": params})
    first, _ = strategy.aggregate(
        state, task, Replies([0], torch.ones(1), {"params": {"table": torch.tensor([1.0, 0, 0])}})
    )
    once = first["params"]["table"].clone()
    second, _ = strategy.aggregate(first, task, Replies([0], torch.ones(1), {"params": {"table": torch.zeros(3)}}))
    assert second["params"]["table"][0] < once[0] < 0
    assert second["params"]["table"][1:].tolist() == [0, 0]


def test_it_tells_how_far_the_items_moved_by_what_they_were():
    strategy = FedRecGel(lr=0.01)
    params = {"item_a": torch.tensor([3.0, 0.0]), "item_b": torch.tensor([4.0]), "other": torch.tensor([100.0])}
    state = strategy.init(params)
    sent = {"item_a": torch.tensor([1.0, -1.0]), "item_b": torch.zeros(1), "other": torch.ones(1)}
    _, metrics = strategy.aggregate(state, Task("train", {}), Replies([0], torch.ones(1), {"params": sent}))
    assert metrics["item_shift"] == pytest.approx(0.01 * math.sqrt(2) / 5, rel=1e-4)


def test_where_nobody_has_an_item_nothing_moves():
    strategy = FedRecGel()
    state = strategy.init({"table": torch.ones(3)})
    after, _ = strategy.aggregate(
        state, Task("train", {}), Replies([0], torch.zeros(1), {"params": {"table": torch.ones(3)}})
    )
    assert after is state


def test_it_keeps_the_promises_of_a_strategy():
    params = {"table": torch.ones(3), "user_gmf": torch.ones(2)}
    check_strategy(FedRecGel(), params, Replies([0], torch.ones(1), {"params": {"table": torch.ones(3)}}))


def test_three_rounds_are_the_same_whether_users_run_alone_or_together():
    found = []
    for engine in (Sequential, Vectorised):
        strategy, model, clients, here = method(engine=engine)
        *_, last = steps(strategy, here, model, clients, 3)
        kept = last.snapshot.personal.gather(range(12))
        found.append((last.snapshot.state["params"], kept["own"]))
    for one, other in zip(*found, strict=True):
        for name, leaf in one.items():
            assert float((other[name] - leaf).abs().max()) < 1e-3, name


def test_a_run_that_was_stopped_goes_on_to_the_same_bits(tmp_path):
    strategy, model, clients, engine = method()
    sample = uniform(12, 3, count=5)
    whole, resumed = (Run.create(tmp_path, name, 3, "", {}) for name in ("whole", "resumed"))
    for step in islice(rounds(strategy, engine, sample, begin(strategy, model.params, clients, 12, 3)), 4):
        whole.save(step.snapshot, "all")
    half = whole.load(whole.checkpoints()[1], begin(strategy, model.params, clients, 12, 3))
    for step in islice(rounds(strategy, engine, sample, half), 2):
        resumed.save(step.snapshot, "all")
    for one, other in zip(whole.checkpoints()[2:], resumed.checkpoints(), strict=True):
        assert one.read_bytes() == other.read_bytes()


# However it is run.


@pytest.mark.parametrize("engine", [Sequential, Vectorised])
def test_through_flowers_grid_it_does_what_it_does_here_and_sends_rows_of_the_round_only(engine, overheard):
    strategy, model, clients, here = method(engine=engine)
    *_, last = steps(strategy, here, model, clients, 3)
    grid = overheard(ClientNodes(here, Personal(clients, 12, 3)), 12, 3)
    result = strategy.start(grid=grid, initial_arrays=ArrayRecord(model.module.state_dict()), num_rounds=3)
    found = {name: torch.from_numpy(array.numpy().copy()) for name, array in result.arrays.items()}
    for name, leaf in last.snapshot.state["params"].items():
        # Adam's steps are far from linear where gradients are small.
        assert float((found[name] - leaf).abs().mean()) < 1e-4, name
        assert float((found[name] - strategy.init(model.params)["params"][name]).abs().max()) > 1e-2, name
    trained = [replies for replies in grid.heard if replies[0].metadata.message_type == "train"]
    assert len(trained) == 3
    answers = [decode_reply(message.content) for message in trained[0]]
    for answer in answers:
        assert answer.personal == {} and not any(OWN in name for name in tree.flatten(answer.update))
        for name in ("item_gmf", "item_mlp"):
            rows = answer.update["params"][name]
            assert 0 < len(rows.index) < 90 and (rows.index >= 0).all()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning")  # Ray's daemons, till the end
@pytest.mark.filterwarnings("ignore:unclosed file .*/dev/null:ResourceWarning")  # theirs, too
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_on_any_number_of_workers_it_gives_the_bits_of_one_process(monkeypatch, noise):
    import ray

    from fedsim.engines.ray import Ray

    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    strategy, model, clients, here = method(noise=noise, decoys=3)
    *_, last = steps(strategy, here, model, clients, 3)
    expected = tree.flatten(last.snapshot.state) | last.snapshot.personal.flat()
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    try:
        for workers in (1, 2):
            with Ray(here.federation, clients, 3, workers=workers, cpus=0.5, inner="vectorised") as engine:
                *_, last = steps(strategy, engine, model, clients, 3)
            found = tree.flatten(last.snapshot.state) | last.snapshot.personal.flat()
            assert found.keys() == expected.keys()
            assert all(torch.equal(leaf, found[name]) for name, leaf in expected.items())
    finally:
        ray.shutdown()
