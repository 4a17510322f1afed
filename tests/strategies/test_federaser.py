"""FedEraser: history is kept and replayed, its lengths in directions that know nothing of what is to be forgotten."""

from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch
from torch import nn

from clients.retained import Retained
from clients.sgd import Sgd
from fedsim import tree
from fedsim.config import assemble, read
from fedsim.data.federation import Federation
from fedsim.engines.local import Sequential, Vectorised
from fedsim.model import Model
from fedsim.personal import Personal
from fedsim.runs import Run
from fedsim.sampling import everyone, uniform
from fedsim.simulation import Snapshot, begin, rounds
from fedsim.task import Cohort, Draw, Replies, Task
from fedsim.testing import check_strategy
from strategies.fedavg import FedAvg
from strategies.federaser import FedEraser, calibrated

SIZES = ((20, 5), (13, 0), (6, 6), (0, 0), (9, 2))  # examples of each client, and how many of these are to be forgotten
N = len(SIZES)


def small(gone=True, spoilt=0.0, dtype=torch.float64):
    """Clients, and a model; in what is to be forgotten something may be spoilt."""
    generator = torch.Generator().manual_seed(0)
    size = sum(examples for examples, _ in SIZES)
    target = torch.cat([(torch.arange(examples) < some).long() for examples, some in SIZES])
    x = torch.randn(size, 4, generator=generator, dtype=dtype) + spoilt * target[:, None]
    y = torch.randint(3, (size,), generator=generator)
    ends = np.cumsum([examples for examples, _ in SIZES])
    bounds = np.stack([ends - [examples for examples, _ in SIZES], ends, ends, ends], 1)
    torch.manual_seed(1)
    model = Model(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype))
    columns = {"x": x, "y": y, "target": target if gone else torch.zeros_like(target)}
    return Federation(columns, np.arange(size), bounds), model


def clients_of(model, **settings):
    plain = Sgd(model=model, **{"lr": 0.3, "epochs": 2, "batch_size": 4} | settings)
    return {"train": plain, "calibrate": Retained(client=plain), "repair": Retained(client=plain)}


class Listening(Sequential):
    """An engine that keeps what was asked and answered."""

    def execute(self, task, cohort):
        replies = super().execute(task, cohort)
        self.__dict__.setdefault("heard", []).append((task, replies))
        return replies


def play(strategy, engine, clients, model, sample=None, seed=3, number=1000):
    start = begin(strategy, model.params, clients, N, seed)
    return list(islice(rounds(strategy, engine, sample or everyone(N), start, 0), number))


def assert_near(found, expected, near=1e-12):
    for name, leaf in tree.flatten(expected).items():
        torch.testing.assert_close(tree.flatten(found)[name], leaf, rtol=near, atol=near)


# The formula.


def test_a_calibrated_update_is_as_long_as_what_was_kept_and_goes_where_the_new_one_goes():
    generator = torch.Generator().manual_seed(0)
    for shape in ((), (3,), (2, 3), (2, 3, 4, 4)):
        kept, now = (torch.randn(5, *shape, generator=generator, dtype=torch.float64) for _ in range(2))
        found = calibrated(kept, now)
        for k in range(5):
            length, direction = (float(leaf[k].square().sum().sqrt()) for leaf in (kept, now))
            torch.testing.assert_close(found[k], length / direction * now[k], rtol=1e-12, atol=0)
            assert float(found[k].norm()) == pytest.approx(length, rel=1e-12)


def test_an_update_that_goes_nowhere_is_calibrated_to_one_that_goes_nowhere():
    kept, now = torch.ones(3, 2), torch.tensor([[0.0, 0.0], [3.0, 4.0], [1.0, 1.0]])
    kept[2] = 0
    expected = torch.tensor([[0.0, 0.0], [0.6, 0.8], [0.0, 0.0]]) * 2**0.5
    torch.testing.assert_close(calibrated(kept, now), expected)


# History.


def test_it_trains_as_federated_averaging_does_and_keeps_what_clients_sent_in_every_so_many_th_round():
    federation, model = small()
    clients, strategy = clients_of(model), FedEraser(N, training=8, interval=3)
    engine = Listening(federation, clients, 3)
    done = play(strategy, engine, clients, model, number=8)
    averaged = play(FedAvg(), Sequential(federation, clients, 3), clients, model, number=8)
    before = model.params
    assert [task.reduce for task, _ in engine.heard] == ["stack", *["mean"] * 2, "stack", *["mean"] * 4]  # 2 = 8 // 3
    for number, (one, other) in enumerate(zip(done, averaged, strict=True)):
        assert_near(one.snapshot.state["params"], other.snapshot.state["params"])
        assert one.metrics["train/loss"] == pytest.approx(other.metrics["train/loss"], rel=1e-12)
        if number in (0, 3):
            task = Task("train", {"params": before}, round=number + 1)
            sent = Sequential(federation, clients, 3).execute(task, Cohort(range(N))).update["params"]
            for name, leaf in sent.items():
                kept = done[-1].snapshot.state["updates"][name]
                assert kept.shape == (2, N, *before[name].shape)
                torch.testing.assert_close(kept[number // 3], leaf - before[name], rtol=1e-12, atol=1e-12)
        before = one.snapshot.state["params"]
    assert done[-1].snapshot.state["present"].tolist() == [[True, True, True, False, True]] * 2
    assert done[-1].snapshot.state["rebuilt"] is model.params


def test_updates_in_old_directions_replay_history_to_the_letter():
    federation, model = small()
    clients, strategy = clients_of(model), FedEraser(N, training=5, interval=1)
    steps = play(strategy, Sequential(federation, clients, 3), clients, model, number=5)
    state, factor = steps[-1].snapshot.state, torch.Generator().manual_seed(0)
    weight = torch.tensor([float(size) for size, _ in SIZES], dtype=torch.float64)
    for slot in range(5):
        task = strategy.configure(state, 6 + slot)
        ids = torch.tensor(task.ids)
        times = torch.rand(len(ids), generator=factor, dtype=torch.float64) + 0.1  # Uhat_k is some times U_k
        params = tree.map(
            lambda base, kept, s=slot, i=ids, t=times: base + t.reshape(-1, *[1] * base.ndim) * kept[s, i],
            task.shared["params"],
            state["updates"],
        )
        replies = Replies(task.ids, weight[ids], {"params": params})
        state, _ = strategy.aggregate(state, task, replies)
        assert_near(state["params"], steps[slot].snapshot.state["params"], 1e-10)
    assert strategy.done(state)


def test_where_nothing_is_to_be_forgotten_and_as_much_is_trained_the_rebuilt_model_is_the_trained_one():
    federation, model = small(gone=False)
    clients = clients_of(model, epochs=1, batch_size=100)  # of which no order can make another step
    strategy = FedEraser(N, training=4, interval=1)
    steps = play(strategy, Sequential(federation, clients, 3), clients, model)
    assert len(steps) == 8 and steps[-1].done
    for one, again in zip(steps[:4], steps[4:], strict=True):
        assert_near(one.snapshot.state["params"], again.snapshot.state["params"], 1e-10)
    federation, _ = small(gone=True)  # and with something to forget it is another
    other = play(strategy, Sequential(federation, clients, 3), clients, model)[-1].snapshot.state["params"]
    assert (
        max(float((leaf - other[name]).abs().max()) for name, leaf in steps[-1].snapshot.state["params"].items()) > 0.01
    )


# What is to be forgotten.


def test_a_calibrated_round_is_the_mean_by_what_is_left_of_lengths_from_history_in_new_directions():
    federation, model = small()
    clients, strategy = clients_of(model), FedEraser(N, training=4, interval=2)
    engine = Listening(federation, clients, 3)
    steps = play(strategy, engine, clients, model)
    assert [task.action for task, _ in engine.heard] == ["train"] * 4 + ["calibrate"] * 2
    base = model.params  # the initial model, not the trained one
    for slot in (0, 1):
        task, replies = engine.heard[4 + slot]
        assert task.reduce == "stack" and task.shared["request"] == task.shared["deleted"] == 1
        assert_near(task.shared["params"], base)
        left = {0: 15, 1: 13, 2: 0, 4: 7}
        assert dict(zip(replies.ids, replies.weight.tolist(), strict=True)) == left
        expected = {}
        for name, leaf in base.items():
            kept, total = steps[3].snapshot.state["updates"][name][slot], torch.zeros_like(leaf)
            for place, client in enumerate(replies.ids):
                now = replies.update["params"][name][place] - leaf
                if left[client]:
                    total += left[client] / 35 * kept[client].norm() / now.norm() * now
            expected[name] = leaf + total
        base = steps[4 + slot].snapshot.state["params"]
        assert_near(base, expected)


def test_all_requests_are_deleted_together_before_anything_is_rebuilt():
    task = FedEraser(2, training=1, num_targets=4, interval=1)
    state = task.init({"w": torch.zeros(3)}) | {"trained": torch.tensor(1), "present": torch.ones(1, 2).bool()}
    shared = task.configure(state, 2).shared
    assert (int(shared["request"]), int(shared["deleted"])) == (3, 3)


def test_the_directions_know_nothing_of_the_target_whatever_it_is():
    strategy = FedEraser(N, training=4, repairing=2)
    found = []
    for spoilt in (0.0, 100.0):
        federation, model = small(spoilt=spoilt)
        clients = clients_of(model)
        trained = play(strategy, Sequential(small()[0], clients, 3), clients, model, number=4)[-1].snapshot
        after = list(rounds(strategy, Sequential(federation, clients, 3), everyone(N), trained))
        found.append(after[-1].snapshot.state["params"])
    assert all(torch.equal(leaf, found[1][name]) for name, leaf in found[0].items())


# Clients that are not there.


def test_those_who_took_part_calibrate_and_rounds_in_which_nobody_did_are_skipped():
    federation, model = small()
    clients, strategy = clients_of(model), FedEraser(N, training=6, interval=1)
    who = {1: [0, 1], 2: [3], 3: [1, 3, 4], 4: [3], 5: [2, 0], 6: [3]}  # the client 3 has no examples
    engine = Listening(federation, clients, 3)
    steps = play(strategy, engine, clients, model, lambda round, among=None: Draw(who[round]))
    assert [replies.ids for task, replies in engine.heard if task.action == "calibrate"] == [[0, 1], [1, 4], [0, 2]]
    assert len(steps) == 9 and steps[-1].done
    assert_near(steps[1].snapshot.state["params"], steps[0].snapshot.state["params"])


def test_a_round_of_clients_that_have_nothing_left_changes_nothing():
    federation, model = small()
    clients, strategy = clients_of(model), FedEraser(N, training=2, interval=1)
    who = {1: [2], 2: [0]}
    steps = play(
        strategy, Sequential(federation, clients, 3), clients, model, lambda round, among=None: Draw(who[round])
    )
    assert_near(steps[2].snapshot.state["params"], model.params)
    assert_near(steps[2].snapshot.state["params"], steps[2].snapshot.state["rebuilt"])


def test_without_any_history_there_is_nothing_to_rebuild():
    federation, model = small()
    clients = clients_of(model)
    with pytest.raises(ValueError, match="in none of the rounds that are kept a client had examples"):
        play(
            FedEraser(N, training=2),
            Sequential(federation, clients, 3),
            clients,
            model,
            lambda round, among=None: Draw([3]),
        )


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"num_targets": 1}, "num_targets must be at least 2"),
        ({"interval": 5}, "interval must be at most training = 4, got 5"),
        ({"interval": 0}, "interval must be >= 1, got 0"),
        ({"training": 0}, "training must be >= 1, got 0"),
    ],
)
def test_a_setting_that_cannot_be_is_named(settings, told):
    with pytest.raises(ValueError, match=told):
        FedEraser(**{"num_clients": N, "training": 4} | settings)


# As a strategy.


def test_all_clients_at_once_are_what_one_after_another_are():
    federation, model = small()
    clients, strategy = clients_of(model), FedEraser(N, training=4, repairing=1)
    one, other = (
        play(strategy, engine(federation, clients, 3), clients, model)[-1].snapshot.state
        for engine in (Sequential, Vectorised)
    )
    assert_near(one, other, 1e-9)


@pytest.mark.parametrize("stop", range(1, 9))
def test_a_run_that_goes_on_from_a_checkpoint_ends_with_the_same_bits(tmp_path, stop):
    federation, model = small(dtype=torch.float32)
    clients, strategy = clients_of(model), FedEraser(N, training=5, interval=2, repairing=2)
    sample = uniform(N, fraction=0.8)
    engine = Sequential(federation, clients, 3)
    steps = play(strategy, engine, clients, model, sample)
    assert len(steps) == 9
    run = Run.create(tmp_path, "federaser", 3, "", {})
    path = run.save(steps[stop - 1].snapshot, "all")
    like = Snapshot(0, strategy.init(tree.map(torch.zeros_like, model.params)), Personal(clients, N, 3))
    again = list(rounds(strategy, engine, sample, run.load(path, like), 0))
    assert len(again) == 9 - stop
    for name, leaf in tree.flatten(steps[-1].snapshot.state).items():
        assert torch.equal(leaf, tree.flatten(again[-1].snapshot.state)[name]), name


@pytest.mark.parametrize("when", [0, 1, 4, 5, 6])
def test_it_is_pure_in_every_phase(when):
    federation, model = small()
    clients, strategy = clients_of(model), FedEraser(N, training=4, repairing=2)
    engine = Listening(federation, clients, 3)
    states = [strategy.init(model.params)]
    states += [step.snapshot.state for step in play(strategy, engine, clients, model)]
    assert Counter(task.action for task, _ in engine.heard) == {"train": 4, "calibrate": 2, "repair": 2}

    class Midway(FedEraser):
        def init(self, params):
            return states[when]

    midway = Midway(N, training=4, repairing=2)
    check_strategy(midway, model.params, engine.heard[when][1])


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_a_class_of_digits_is_forgotten_and_stays_away_but_not_where_directions_know_it(seed):
    experiment, folder = read("forget/digits-federaser")
    made = assemble(experiment.model_copy(update={"seed": seed}), folder)
    test = made.federation.test

    def accuracies(clients, numbers):
        """On the class and on the others, after these rounds."""
        start = begin(made.strategy, made.model.params, clients, 10, seed)
        steps = list(rounds(made.strategy, Vectorised(made.federation, clients, seed), made.sample, start))
        for number in numbers:
            right = made.model.predict(steps[number - 1].snapshot.state["params"], test).argmax(1) == test["y"]
            yield [float(right[test["target"] == part].double().mean()) for part in (1, 0)]

    before, after, later = accuracies(made.clients, (40, 60, 62))
    assert before[0] >= 0.8 and before[1] >= 0.85
    for found in (after, later):
        assert found[0] == 0 and found[1] >= 0.7
    ((control, _),) = accuracies(made.clients | {"calibrate": made.clients["calibrate"].client}, (60,))
    assert control >= 0.5, "with the class in the data, its lengths and directions bring it back"
