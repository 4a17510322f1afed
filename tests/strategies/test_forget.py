"""Forgetting, phase by phase: who is asked what, with which model, on which examples, and when it is over."""

from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord

from clients.forget import ForgetWhileTraining
from clients.forget_alone import ForgetAlone
from clients.retained import Retained
from clients.sgd import Sgd
from clients.weigh import Weigh
from fedsim import tree
from fedsim.engines.local import Sequential, Vectorised
from fedsim.flower import ClientNodes, SimulationGrid
from fedsim.forgetting import Evidence, at_hand, importance
from fedsim.personal import Personal
from fedsim.sampling import everyone, uniform
from fedsim.simulation import begin, rounds
from fedsim.task import Cohort, Draw, Replies, Task
from fedsim.testing import check_strategy
from strategies.fedavg import FedAvg
from strategies.forget import Forget

SIZES = (0, 1, 7, 20, 33, 2)
N = len(SIZES)
SEED = 3
HOLDERS = {1: [3, 4], 2: [3, 5]}  # of examples that are to be forgotten
NUMBERS = {0: 54, 1: 4, 2: 5}  # examples that no request names, that the first names, that the second names


@dataclass(frozen=True, eq=False)
class Listening(Sequential):
    """Keeps what was asked and answered."""

    heard: list[tuple[Task, Cohort, Replies]] = field(default_factory=list)

    def execute(self, task, cohort):
        replies = super().execute(task, cohort)
        assert not replies.failed
        self.heard.append((task, cohort, replies))
        return replies

    def asked(self):
        """(action, request, deleted) of each round."""
        return [
            (task.action, *(int(task.shared.get(name, -1)) for name in ("request", "deleted")))
            for task, *_ in self.heard
        ]


@pytest.fixture
def setting(classification):
    """A model, and clients some of whom have something to forget."""
    model, federation = classification(SIZES)
    size = sum(SIZES)
    columns = {name: column[torch.arange(size) % 70] for name, column in federation.columns.items()}
    target = torch.zeros(size, dtype=torch.int64)
    target[torch.tensor([8, 9, 30, 31])] = 1  # of the clients 3 and 4
    target[torch.tensor([10, 11, 12, 61, 62])] = 2  # of the clients 3 and 5, who has nothing else
    return model, replace(federation, columns=columns | {"target": target, "named": target}, rows=np.arange(size))


def clients_for(model, forget=ForgetWhileTraining, **settings):
    plain = Sgd(model=model, lr=0.1, epochs=2, batch_size=8)
    own = {"lr": 0.1, "batch_size": 8} | settings
    return {
        "train": plain,
        "weigh": Weigh(model=model),
        "forget": forget(model=model, **own),
        "repair": Retained(client=plain),
    }


def play(strategy, setting, clients=None, engine=Listening, sample=None, number=30):
    """(the rounds, the engine)."""
    model, federation = setting
    clients = clients or clients_for(model)
    here = engine(federation, clients, SEED)
    start = begin(strategy, model.params, clients, N, SEED)
    return list(islice(rounds(strategy, here, sample or everyone(N), start), number)), here


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(leaf, other[name]) for name, leaf in one.items())


def last(steps):
    return steps[-1].snapshot.state["params"]


# Phases.

TRAIN = ("train", -1, -1)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"training": 2, "forgetting": 2, "repairing": 1}, [TRAIN] * 2 + [("forget", 1, 0)] * 2 + [("repair", 1, 1)]),
        ({"forgetting": 1}, [("forget", 1, 0)]),
        ({"forgetting": 0, "repairing": 2}, [("repair", 1, 1)] * 2),
        ({"forgetting": 0, "training": 2}, [TRAIN] * 2),
        (
            {"num_targets": 3, "training": 1, "forgetting": 2, "repairing": 1},
            [TRAIN, *[("forget", 1, 0)] * 2, ("repair", 1, 1), *[("forget", 2, 1)] * 2, ("repair", 2, 2)],
        ),
        (
            {"num_targets": 3, "training": 1, "forgetting": 2, "repairing": 1, "together": True},
            [TRAIN, *[("forget", 2, 0)] * 2, ("repair", 2, 2)],
        ),
        (
            {"num_targets": 3, "forgetting": 1, "remember": "importance"},
            [("weigh", 1, 0), ("forget", 1, 0), ("weigh", 2, 1), ("forget", 2, 1)],
        ),
        ({"forgetting": 0, "repairing": 1, "remember": "importance"}, [("repair", 1, 1)]),
    ],
)
def test_phases_come_in_their_order_and_then_it_is_done(setting, settings, expected):
    strategy = Forget(num_clients=N, **settings)
    steps, engine = play(strategy, setting)
    assert engine.asked() == expected
    assert [step.done for step in steps] == [False] * (len(expected) - 1) + [True]
    assert set(strategy.actions) == {action for action, *_ in expected}
    assert [step.metrics.get("request", 0) for step in steps] == [max(0, request) for _, request, _ in expected]
    assert not same(last(steps), setting[0].params)


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("kind", [ForgetWhileTraining, ForgetAlone])
def test_what_a_request_has_named_never_comes_back(setting, kind, together):
    model, _ = setting

    def seeing(kind):
        @dataclass(frozen=True, kw_only=True)
        class Seeing(kind):
            """Tells how many examples it sees of those that no request names, that the first and the second name."""

            def finish(self, shared, state, data):
                reply = kind.finish(self, shared, state, data)
                seen = {f"seen{mark}": ((data["named"] == mark) & data["mask"]).sum() for mark in NUMBERS}
                return reply._replace(metrics=reply.metrics | seen)

        return Seeing

    plain = seeing(Sgd)(model=model, lr=0.1)
    clients = {"train": plain, "weigh": seeing(Weigh)(model=model), "forget": seeing(kind)(model=model, lr=0.1)}
    clients["repair"] = seeing(Retained)(client=plain)
    strategy = Forget(N, 3, 2, forgetting=2, repairing=2, together=together, remember="importance")
    _, engine = play(strategy, setting, clients)
    assert len(engine.heard) == (7 if together else 12)
    for (action, request, deleted), (*_, replies) in zip(engine.asked(), engine.heard, strict=True):
        meant = {
            "train": {0, 1, 2},
            "weigh": {mark for mark in NUMBERS if not 0 < mark <= deleted},
            "forget": {mark for mark in NUMBERS if not 0 < mark <= deleted}
            if kind is ForgetWhileTraining
            else {mark for mark in NUMBERS if deleted < mark <= request},
            "repair": {mark for mark in NUMBERS if not 0 < mark <= request},
        }[action]
        seen = {mark: int(replies.metrics[f"seen{mark}"].sum()) for mark in NUMBERS}
        assert seen == {mark: NUMBERS[mark] if mark in meant else 0 for mark in NUMBERS}


def test_training_is_federated_averaging_to_the_bit(setting):
    sample = uniform(N, 5, fraction=0.7)
    forget, _ = play(Forget(N, training=4, forgetting=2), setting, sample=sample, number=4)
    plain, _ = play(FedAvg(), setting, sample=sample, number=4)
    for one, other in zip(forget, plain, strict=True):
        assert same(one.snapshot.state["params"], other.snapshot.state["params"]) and one.traffic == other.traffic
        assert one.metrics["train/loss"] == other.metrics["train/loss"]


def test_the_sampler_says_who_takes_part_but_for_weighing_which_all_do(setting):
    sample = uniform(N, 5, count=3)
    _, engine = play(Forget(N, 2, 2, repairing=1, remember="importance"), setting, sample=sample)
    for number, (task, cohort, _) in enumerate(engine.heard, start=1):
        assert list(cohort.ids) == (list(range(N)) if task.action == "weigh" else sample(number).ids)
        assert task.round == number


def test_what_was_before_and_what_matters_are_those_of_the_request_at_hand(setting):
    model, _ = setting
    clients = clients_for(model, memory="mix", strength=2.0)
    strategy = Forget(N, 3, training=2, forgetting=3, repairing=1, remember="importance")
    steps, engine = play(strategy, setting, clients)
    after = {step.snapshot.round: step.snapshot.state["params"] for step in steps}
    for weigh, before in ((3, after[2]), (8, after[7])):  # rounds: 2 of training, then for each request 1 + 3 + 1
        task, _, replies = engine.heard[weigh - 1]
        assert task.action == "weigh" and same(task.shared["params"], before)
        omega = importance(*(Evidence(**replies.update[name]) for name in ("retained", "forgotten")))
        for number in range(weigh + 1, weigh + 4):
            shared = engine.heard[number - 1][0].shared
            assert same(shared["before"], before) and same(shared["omega"], omega)
            assert same(shared["params"], before) == (number == weigh + 1)
        assert not same(after[weigh + 3], after[weigh + 4])
    assert not same(engine.heard[3][0].shared["omega"], engine.heard[8][0].shared["omega"])
    sent = [engine.heard[number - 1][0].shared.keys() for number in (1, 3, 4, 7)]
    asked = {"params", "request", "deleted"}
    assert sent == [{"params"}, asked, asked | {"before", "omega"}, asked]


def test_the_model_before_is_sent_alone_where_nothing_else_is_wanted(setting):
    _, engine = play(Forget(N, 3, 1, forgetting=1, remember="model"), setting)
    first, second = (task.shared for task, *_ in engine.heard[1:])
    assert first.keys() == {"params", "before", "request", "deleted"}
    assert same(first["before"], first["params"]) and same(second["before"], second["params"])
    assert not same(first["before"], second["before"])


def test_clients_that_forget_are_told_of_which_classes_nothing_is_kept(setting):
    gone_with = (2, 3, 1)  # the last of class 0 goes with the second request, of class 1 something is kept
    for together, expected in ((False, [[False, False, True], [True, False, True]]), (True, [[True, False, True]])):
        _, engine = play(Forget(N, 3, 1, None, 1, 1, together, gone_with=gone_with), setting)
        told = {task.action: [] for task, *_ in engine.heard}
        for task, *_ in engine.heard:
            told[task.action] += [task.shared["gone"].tolist()] if "gone" in task.shared else []
        assert told == {"train": [], "forget": expected, "repair": []}


# Alone.


def test_those_who_have_nothing_to_forget_are_asked_in_the_first_round_only(setting):
    clients = clients_for(setting[0], ForgetAlone, lr=0.01)
    strategy = Forget(N, 3, forgetting=3, alone=True, remember="importance")
    _, engine = play(strategy, setting, clients, sample=uniform(N, 5, count=2))
    found = [(task.action, int(task.shared["request"]), list(cohort.ids)) for task, cohort, _ in engine.heard]
    everybody = list(range(N))
    assert found == [
        (action, request, ids)
        for request, own in HOLDERS.items()
        for action, ids in (("weigh", everybody), ("forget", everybody), ("forget", own), ("forget", own))
    ]


@pytest.mark.parametrize(("until", "most", "expected"), [(0.0, 40, 4), (0.5, 40, 1), (0.0, 2, 2), (1.0, 40, 0)])
def test_it_stops_as_if_the_model_were_tested_before_each_round(setting, until, most, expected):
    model, federation = setting
    x, gone = federation.columns["x"], federation.columns["target"] == 1
    # What is to be forgotten is what the model says, so that it has something to unlearn.
    y = torch.where(gone, model.predict(model.params, {"x": x}).argmax(1), federation.columns["y"])
    federation = replace(federation, columns=federation.columns | {"y": y})
    clients = clients_for(model, ForgetAlone, lr=0.1)
    params, number, ids = model.params, 0, list(range(N))
    while number < most:
        if float((model.predict(params, {"x": x[gone]}).argmax(1) == y[gone]).double().mean()) <= until:
            break
        number += 1
        task = Task("forget", {"params": params} | at_hand(1, 0), round=number, reduce="mean")
        params = Sequential(federation, clients, SEED).execute(task, Cohort(ids)).update["params"]
        ids = HOLDERS[1]
    steps, _ = play(Forget(N, forgetting=most, alone=True, until=until), (model, federation), clients, number=50)
    assert same(last(steps), params)
    assert len(steps) == min(most, number + 1), "the round that tells is taken back"
    assert number == expected


def test_what_travels_alone_is_one_model_for_each_client_and_round_and_two_to_weigh(setting):
    model, _ = setting
    size, small = 4 * sum(leaf.numel() for leaf in model.params.values()), 2 * 8  # two numbers say which request it is
    clients = clients_for(model, ForgetAlone, lr=0.01)
    steps, engine = play(Forget(N, forgetting=3, alone=True), setting, clients)
    assert [step.traffic.down for step in steps] == [number * (size + small) for number in (N, 2, 2)]
    assert [step.traffic.up for step in steps] == [number * (size + 3 * 8) for number in (N, 2, 2)]  # weight, 2 metrics
    clients = clients_for(model, ForgetAlone, lr=0.01, strength=2.0)
    steps, engine = play(Forget(N, forgetting=2, alone=True, remember="importance"), setting, clients)
    assert steps[0].traffic.up == N * (2 * size + 2 * 8 + 4 + 8)  # sums, counts, weight, metric
    assert [step.traffic.up for step in steps[1:]] == [number * (size + 3 * 8) for number in (N, 2)]
    assert [step.traffic.down for step in steps[1:]] == [number * (3 * size + small) for number in (N, 2)]
    assert all(task.shared.keys() <= {"params", "before", "omega", "request", "deleted"} for task, *_ in engine.heard)


def without_targets(setting):
    model, federation = setting
    return model, replace(federation, columns=federation.columns | {"target": torch.zeros(63, dtype=torch.int64)})


@pytest.mark.parametrize("until", [None, 0.0])
def test_where_nobody_has_anything_to_forget_it_is_over_after_one_round(setting, until):
    clients = clients_for(setting[0], ForgetAlone)
    strategy = Forget(N, training=1, forgetting=5, repairing=1, alone=True, until=until)
    steps, engine = play(strategy, without_targets(setting), clients)
    assert [task.action for task, *_ in engine.heard] == ["train", "forget", "repair"]
    assert same(steps[0].snapshot.state["params"], steps[1].snapshot.state["params"])


@pytest.mark.parametrize("until", [None, 0.0])
def test_a_cohort_with_nothing_to_forget_changes_nothing_and_tells_nothing(setting, until):
    model, _ = setting
    clients = clients_for(model, ForgetAlone, lr=0.01)

    def sample(round, among=None):
        return Draw([1, 2] if round < 3 else [3, 4])

    steps, _ = play(Forget(N, forgetting=3, until=until), setting, clients, sample=sample)
    assert [same(step.snapshot.state["params"], model.params) for step in steps] == [True, True, False]


def test_a_holder_that_does_not_answer_is_asked_again(setting):
    model, _ = setting

    @dataclass(frozen=True, kw_only=True)
    class Shy(ForgetAlone):
        """Does not answer as long as the model is the first one."""

        def start(self, shared, personal, data):
            if len(data["y"]) and torch.equal(shared["params"]["0.bias"], self.model.params["0.bias"]):
                raise ConnectionError("not there")
            return super().start(shared, personal, data)

    strategy = Forget(N, forgetting=4, alone=True, until=0.0)
    steps, engine = play(strategy, setting, clients_for(model, Shy), engine=Sequential, number=1)
    assert sorted(steps[0].failed) == HOLDERS[1] and not steps[0].done
    assert steps[0].snapshot.state["holders"].nonzero().flatten().tolist() == HOLDERS[1]
    assert strategy.configure(steps[0].snapshot.state, 2).ids == HOLDERS[1]


def test_clients_that_do_not_tell_their_accuracy_cannot_say_when_to_stop(setting):
    with pytest.raises(ValueError, match='until needs clients that tell their "accuracy" on what is to be forgotten'):
        play(Forget(N, until=0.0), setting)


# Engines, loops, promises.

SETTINGS = {"num_targets": 3, "training": 1, "forgetting": 2, "repairing": 1, "remember": "importance"}
SETTINGS |= {"gone_with": (2, 3, 1)}


@pytest.mark.parametrize("kind", [ForgetWhileTraining, ForgetAlone])
def test_engines_agree_and_one_of_them_with_itself_to_the_bit(setting, kind):
    strategy = Forget(N, **SETTINGS, alone=kind is ForgetAlone)
    clients = clients_for(setting[0], kind, memory="mix", strength=2.0)
    first, again, vectorised = (
        tree.flatten(play(strategy, setting, clients, engine)[0][-1].snapshot.state)
        for engine in (Sequential, Sequential, Vectorised)
    )
    assert same(first, again)
    for name, leaf in first.items():
        torch.testing.assert_close(
            vectorised[name], leaf, rtol=1e-4, atol=1e-5, msg=lambda told, name=name: name + told
        )


@pytest.mark.parametrize("number", [9, 20])
def test_under_flowers_loop_it_forgets_the_same_and_rounds_after_it_is_done_ask_nobody(setting, number):
    model, federation = setting
    clients = clients_for(model, memory="mix", strength=2.0)
    strategy = Forget(N, **SETTINGS)
    nodes = ClientNodes(Sequential(federation, clients, SEED), Personal(clients, N, SEED))
    result = strategy.start(SimulationGrid(nodes, N, SEED), ArrayRecord(model.module.state_dict()), number)
    steps, _ = play(strategy, setting, clients)
    assert len(steps) == 9 and steps[-1].done
    assert list(result.train_metrics_clientapp) == list(range(1, 10))
    arrays = {name: torch.from_numpy(array.numpy().copy()) for name, array in result.arrays.items()}
    for name, leaf in last(steps).items():
        torch.testing.assert_close(arrays[name], leaf, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("settings", [{"training": 1}, {"forgetting": 1}, {"alone": True, "until": 0.5}])
def test_it_keeps_the_promises_of_a_strategy(setting, settings):
    model, _ = setting
    for remember in ("nothing", "model", "importance"):
        strategy = Forget(N, 3, **settings, remember=remember)
        action = strategy.configure(strategy.init(model.params), 1).action
        sums = {"sums": model.params, "examples": torch.tensor(5.0, dtype=torch.float64)}
        update = {"retained": sums, "forgotten": sums} if action == "weigh" else {"params": model.params}
        replies = Replies([0, 3], torch.tensor([0.0, 2.0]), update, metrics={"accuracy": torch.tensor([0.0, 1.0])})
        check_strategy(strategy, model.params, replies)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"num_targets": 1}, "num_targets must be at least 2, what is kept and a request: nothing is to be forgotten"),
        ({"forgetting": 0}, "training, forgetting and repairing are all 0: no round would do anything"),
        (
            {"training": 3, "from_run": Path("runs/one")},
            "training = 3 and from_run = 'runs/one': there can be one only",
        ),
        ({"until": 1.5}, "until must be >= 0 and <= 1, got 1.5"),
        ({"remember": "all"}, "remember must be one of 'nothing', 'model', 'importance', got 'all'"),
        ({"forgetting": -1}, "forgetting must be >= 0, got -1"),
        ({"num_clients": 0}, "num_clients must be >= 1, got 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, told):
    with pytest.raises(ValueError, match=told):
        Forget(**{"num_clients": N} | settings)
