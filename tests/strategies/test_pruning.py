"""Class-discriminative pruning: the channels that serve a class go, stay away, and nothing else goes."""

import math
from itertools import islice

import numpy as np
import pytest
import torch
from torch import nn

from clients.activations import MeasureActivations
from clients.retained import Retained
from clients.sgd import Sgd
from fedsim import tree
from fedsim.config import assemble, read
from fedsim.data.federation import Federation
from fedsim.engines.local import Sequential, Vectorised
from fedsim.layers import chain, hidden_outputs
from fedsim.model import Model
from fedsim.networks import seeded
from fedsim.personal import Personal
from fedsim.runs import Run
from fedsim.sampling import everyone, uniform
from fedsim.simulation import Snapshot, begin, rounds
from fedsim.task import Replies
from fedsim.testing import check_strategy
from strategies import pruning
from strategies.fedavg import FedAvg
from strategies.pruning import Pruning, discrimination

SIZES = (30, 0, 1, 23, 26)
N = len(SIZES)


def federation(columns):
    ends = np.cumsum(SIZES)
    return Federation(columns, np.arange(sum(SIZES)), np.stack([ends - SIZES, ends, ends, ends], 1))


def images(target=lambda y: (y == 1).long(), dtype=torch.float64, classes=3):
    """Clients with small images, each a faint sign of its label; by the label some are to be forgotten."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(classes, (sum(SIZES),), generator=generator)
    x = torch.randn(len(y), 1, 4, 4, generator=generator, dtype=dtype)
    x[torch.arange(len(y)), 0, y] += 1
    return federation({"x": x, "y": y, "target": target(y)})


def convolutional():
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 3, padding=1), nn.GroupNorm(1, 6), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.LayerNorm(32)),
        *(nn.Linear(32, 10), nn.ReLU(), nn.Linear(10, 3)),
    )


def perceptron():
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 10), nn.ReLU(), nn.Linear(10, 3))


def made(build, dtype=torch.float64):
    return Model(seeded(1, build).to(dtype))


def clients_of(model):
    plain = Sgd(model=model, lr=0.3, epochs=2, batch_size=8)
    measure = MeasureActivations(model=model, batch_size=8)
    return {"train": plain, "measure": measure, "repair": Retained(client=plain)}


def play(strategy, engine, clients, model, sample=None, number=1000):
    start = begin(strategy, model.params, clients, N, 3)
    return list(islice(rounds(strategy, engine, sample or everyone(N), start), number))


def assert_near(found, expected, near=1e-12):
    for name, leaf in tree.flatten(expected).items():
        torch.testing.assert_close(tree.flatten(found)[name], leaf, rtol=near, atol=near)


# The score.


def test_the_score_is_how_often_a_word_is_in_a_document_times_how_rare_it_is_in_all():
    generator = torch.Generator().manual_seed(0)
    for examples, forgotten in (
        ([4, 5, 6, 7, 8], [0, 0, 6, 0, 0]),
        ([4, 5, 6, 7, 8], [0, 5, 0, 0, 2]),
        ([4, 0, 6, 0, 8], [4, 0, 0, 0, 0]),
    ):
        sums = torch.rand(5, 7, generator=generator, dtype=torch.float64) ** 3
        sums[torch.tensor(examples) == 0] = 0
        found = discrimination(sums, torch.tensor(examples).double(), torch.tensor(forgotten).double())
        active = {y: [float(sums[y, j]) / size for j in range(7)] for y, size in enumerate(examples) if size}
        for j in range(7):
            common = sum(row[j] >= sum(row) / 7 for row in active.values())
            rare = math.log((1 + len(active)) / (1 + common))
            often = {y: row[j] / sum(row) for y, row in active.items()}
            expected = sum(forgotten[y] / sum(forgotten) * often[y] * rare for y in active)
            assert float(found[j]) == pytest.approx(expected, rel=1e-12)


def test_a_channel_of_one_class_alone_scores_most_for_it_and_one_of_all_classes_nothing():
    sums = torch.tensor([[9.0, 0, 0, 9], [0, 9, 0, 9], [0, 0, 9, 9]], dtype=torch.float64)
    for label in range(3):
        score = discrimination(sums, torch.full((3,), 3.0), torch.eye(3)[label].double())
        assert int(score.argmax()) == label and score[3] == 0
        others = [j for j in range(3) if j != label]
        assert not score[others].any()


def test_no_activation_at_all_is_no_score():
    assert not discrimination(torch.zeros(3, 4), torch.ones(3), torch.ones(3)).any()


# A network in which each channel serves one class.


def one_for_each(classes):
    network = nn.Sequential(nn.Linear(classes, classes), nn.ReLU(), nn.Linear(classes, classes))
    for layer in (network[0], network[2]):
        nn.init.eye_(layer.weight)
        nn.init.zeros_(layer.bias)
    return network


@pytest.mark.parametrize("label", range(4))
def test_exactly_the_class_is_lost_whose_channel_goes(label):
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(4, (sum(SIZES),), generator=generator)
    x = nn.functional.one_hot(y, 4).float() * (1 + torch.rand(len(y), 1, generator=generator))
    fed = federation({"x": x, "y": y, "target": (y == label).long()})
    model = Model(one_for_each(4))
    strategy = Pruning(model, N, share=0.25, repairing=0)
    (step,) = play(strategy, Sequential(fed, clients_of(model), 3), clients_of(model), model)
    assert step.metrics["pruned"] == 1 and step.done
    after = step.snapshot.state["params"]
    before, logits = (model.predict(params, {"x": x}) for params in (model.params, after))
    assert torch.equal(before.argmax(1), y)
    assert torch.equal(logits[y != label], before[y != label])
    assert not logits[y == label].any(), "of the class nothing is left"


# What is pruned.


@pytest.mark.parametrize("build", [perceptron, convolutional])
def test_a_share_of_zero_is_federated_averaging_on_what_is_kept(build):
    fed, model = images(), made(build)
    clients = clients_of(model)
    strategy = Pruning(model, N, share=0.0, training=3, repairing=2)
    steps = play(strategy, Sequential(fed, clients, 3), clients, model)
    assert len(steps) == 6 and steps[3].metrics.items() >= {"request": 1, "pruned": 0}.items()
    averaged = play(FedAvg(), Sequential(fed, clients, 3), clients, model, number=3)[-1].snapshot.state["params"]
    for step in steps[2:4]:
        assert all(torch.equal(leaf, step.snapshot.state["params"][name]) for name, leaf in averaged.items())
    retained = {"train": clients["repair"]}

    class AfterDeletion(FedAvg):
        def configure(self, state, round):
            task = super().configure(state, round)
            return task._replace(shared=task.shared | {"request": torch.tensor(1), "deleted": torch.tensor(1)})

    start = Snapshot(4, {"params": averaged}, Personal(retained, N, 3))
    *_, expected = islice(rounds(AfterDeletion(), Sequential(fed, retained, 3), everyone(N), start), 2)
    assert_near(steps[-1].snapshot.state["params"], expected.snapshot.state["params"])


def rows_of(name, channel, channels, params):
    """The entries of a parameter that are a channel's, counted one by one."""
    each = len(params[name]) // channels
    return [params[name][channel * each + part] for part in range(each)]


BELONGS = {  # written down here: the layer, its channels, and the parameters with rows for them
    perceptron: {"1.weight": (10, ["1.weight", "1.bias"])},
    convolutional: {
        "0.weight": (6, ["0.weight", "0.bias", "1.weight", "1.bias"]),
        "4.weight": (8, ["4.weight", "4.bias", "7.weight", "7.bias"]),
        "8.weight": (10, ["8.weight", "8.bias"]),
    },
}


@pytest.mark.parametrize("share", [0.2, 0.5, 0.99])
@pytest.mark.parametrize("build", [perceptron, convolutional])
def test_the_channels_of_the_highest_scores_are_zero_from_then_on_and_nothing_else_is_touched(build, share):
    fed, model = images(), made(build)
    clients = clients_of(model)
    strategy = Pruning(model, N, share=share, training=2, repairing=2)
    steps = play(strategy, Sequential(fed, clients, 3), clients, model)
    trained, pruned, *repaired = [step.snapshot.state for step in steps[1:]]
    others = set(model.params) - {name for _, names in BELONGS[build].values() for name in names}
    inner, y = Model(hidden_outputs(model.module)), fed.columns["y"]
    activations = dict(zip(BELONGS[build], inner.predict(trained["params"], fed.columns), strict=True))
    for layer, (channels, names) in BELONGS[build].items():
        alive = pruned["alive"][layer].tolist()
        assert alive.count(False) == min(int(share * channels), channels - 1)
        active = activations[layer].relu().reshape(len(y), channels, -1).mean(2)
        sums = torch.stack([active[y == label].sum(0) for label in range(3)])
        score = discrimination(sums, y.bincount().double(), torch.tensor([0.0, 1, 0]).double())
        lowest = min(float(score[j]) for j in range(channels) if not alive[j])
        assert lowest >= max(float(score[j]) for j in range(channels) if alive[j]) - 1e-12
        for channel, left in enumerate(alive):
            for name in names:
                here = rows_of(name, channel, channels, pruned["params"])
                if left:
                    before = rows_of(name, channel, channels, trained["params"])
                    assert all(torch.equal(one, other) for one, other in zip(here, before, strict=True))
                for state in (pruned, *repaired) if not left else ():
                    assert not any(row.any() for row in rows_of(name, channel, channels, state["params"]))
    assert len(others) == 2  # those of the outputs
    for name in others:
        assert torch.equal(pruned["params"][name], trained["params"][name]), name
        assert name.endswith("weight") or not torch.equal(repaired[-1]["params"][name], pruned["params"][name])
    assert all(
        torch.equal(state["alive"][layer], pruned["alive"][layer]) for state in repaired for layer in BELONGS[build]
    )
    assert steps[2].metrics["pruned"] == sum(int((~left).sum()) for left in pruned["alive"].values())


def test_what_is_behind_a_pruned_channel_hears_nothing_of_the_input():
    fed, model = images(), made(convolutional)
    clients = clients_of(model)
    strategy = Pruning(model, N, share=0.5, repairing=1)
    state = play(strategy, Sequential(fed, clients, 3), clients, model)[-1].snapshot.state
    params = state["params"]
    told = {name: leaf.clone() for name, leaf in params.items()}
    behind = {"0.weight": "4.weight", "4.weight": "8.weight", "8.weight": "10.weight"}
    for layer in chain(model.module)[1:-1]:
        columns = told[behind[layer.weight]].reshape(len(told[behind[layer.weight]]), layer.neurons, -1)
        columns[:, ~state["alive"][layer.weight]] = 1e3  # listens to pruned channels all the more
    one, other = (model.predict(leaves, fed.columns) for leaves in (params, told))
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_requests_are_dealt_with_one_by_one_or_together_and_what_is_pruned_stays_so():
    fed, model = images(lambda y: y), made(perceptron)  # the labels 1 and 2 are to be forgotten
    clients = clients_of(model)
    one_by_one = Pruning(model, N, 3, share=0.3, training=1, repairing=2)
    assert one_by_one.plan == [
        ("train", 1, 0, 0),
        *[("measure", 1, 1, 0), ("repair", 2, 1, 1)],
        *[("measure", 1, 2, 1), ("repair", 2, 2, 2)],
    ]
    steps = play(one_by_one, Sequential(fed, clients, 3), clients, model)
    assert [step.metrics.get("request", 0) for step in steps] == [0, 1, 1, 1, 2, 2, 2]
    assert [step.metrics["pruned"] for step in steps if "pruned" in step.metrics] == [3, 6]
    first, second = (steps[number].snapshot.state["alive"]["1.weight"] for number in (1, 4))
    assert not (second & ~first).any()
    together = Pruning(model, N, 3, share=0.3, training=1, repairing=2, together=True)
    assert together.plan == [("train", 1, 0, 0), ("measure", 1, 2, 0), ("repair", 2, 2, 2)]


def measured(forgotten=(0, 4, 0)):
    sums = torch.rand(3, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    counts = [torch.tensor(part, dtype=torch.float64) for part in ([4, 4, 4], forgotten)]
    return {"sums": {"1.weight": sums}, "examples": counts[0], "forgotten": counts[1]}


def test_one_channel_of_a_layer_always_stays():
    model = made(perceptron)
    strategy = Pruning(model, N, 4, share=0.7, repairing=0)
    state, counts = strategy.init(model.params), []
    for number in range(3):
        task = strategy.configure(state, number + 1)
        state, told = strategy.aggregate(state, task, Replies([0], torch.ones(1), measured()))
        counts.append(told["pruned"])
    assert counts == [7, 9, 9]


def test_where_nobody_has_anything_to_forget_nothing_is_pruned():
    model = made(perceptron)
    strategy = Pruning(model, N, share=0.5)
    state = strategy.init(model.params)
    replies = Replies([0], torch.ones(1), measured((0, 0, 0)))
    after, told = strategy.aggregate(state, strategy.configure(state, 1), replies)
    assert told["pruned"] == 0 and after["params"] == state["params"]


def test_the_model_may_come_from_another_run(tmp_path):
    model = made(perceptron)
    run = Run.create(tmp_path, "fedavg", 3, "", {})
    run.save(Snapshot(7, {"params": tree.map(torch.ones_like, model.params)}, Personal({}, N, 3)), "all")
    strategy = Pruning(model, N, from_run=tmp_path / "fedavg", seed=3)
    assert all((leaf == 1).all() for leaf in strategy.init(model.params)["params"].values())
    assert strategy.configure(strategy.init(model.params), 1).action == "measure"


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"num_targets": 1}, "num_targets must be at least 2"),
        ({"share": 1.0}, "share must be >= 0 and < 1, got 1.0"),
        ({"training": 3, "from_run": "runs"}, "training = 3 and from_run = 'runs': there can be one only"),
    ],
)
def test_a_setting_that_cannot_be_is_named(settings, told):
    with pytest.raises(ValueError, match=told):
        Pruning(**{"model": made(perceptron), "num_clients": N} | settings)


@pytest.mark.parametrize(
    ("build", "told"),
    [
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), "the network has no hidden layer"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 4), nn.PReLU(4), nn.Linear(4, 3)), "no chain of layers"),
        (lambda: nn.Sequential(nn.Linear(16, 4), nn.Linear(4, 3).requires_grad_(False)), "not among the parameters"),
    ],
)
def test_a_network_that_cannot_be_pruned_is_refused(build, told):
    model = made(build)
    with pytest.raises(ValueError, match=told):
        Pruning(model, N).init(model.params)


# As a strategy.


def test_all_clients_at_once_are_what_one_after_another_are():
    fed, model = images(), made(convolutional)
    clients, strategy = clients_of(model), Pruning(model, N, share=0.3, training=2, repairing=2)
    one, other = (
        play(strategy, engine(fed, clients, 3), clients, model)[-1].snapshot.state
        for engine in (Sequential, Vectorised)
    )
    assert_near(one, other, 1e-8)


@pytest.mark.parametrize("stop", range(1, 6))
def test_a_run_that_goes_on_from_a_checkpoint_ends_with_the_same_bits(tmp_path, stop):
    fed, model = images(dtype=torch.float32), made(perceptron, torch.float32)
    clients, strategy = clients_of(model), Pruning(model, N, share=0.3, training=2, repairing=3)
    sample = uniform(N, fraction=0.8)
    engine = Sequential(fed, clients, 3)
    steps = play(strategy, engine, clients, model, sample)
    assert len(steps) == 6
    run = Run.create(tmp_path, "pruning", 3, "", {})
    path = run.save(steps[stop - 1].snapshot, "all")
    like = Snapshot(0, strategy.init(tree.map(torch.zeros_like, model.params)), Personal(clients, N, 3))
    again = list(rounds(strategy, engine, sample, run.load(path, like)))
    assert len(again) == 6 - stop
    for name, leaf in tree.flatten(steps[-1].snapshot.state).items():
        assert torch.equal(leaf, tree.flatten(again[-1].snapshot.state)[name]), name


@pytest.mark.parametrize("when", range(4))
def test_it_is_pure_in_every_phase(when):
    fed, model = images(), made(perceptron)
    clients, strategy = clients_of(model), Pruning(model, N, share=0.3, training=2, repairing=2)
    engine, heard = Sequential(fed, clients, 3), []

    class Listening(Sequential):
        def execute(self, task, cohort):
            heard.append(engine.execute(task, cohort))
            return heard[-1]

    steps = play(strategy, Listening(fed, clients, 3), clients, model)
    states = [strategy.init(model.params), *(step.snapshot.state for step in steps)]

    class Midway(Pruning):
        def init(self, params):
            return states[when]

    check_strategy(Midway(model, N, share=0.3, training=2, repairing=2), model.params, heard[when])


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_a_class_of_digits_is_forgotten_and_stays_away_but_not_where_other_channels_go(seed, monkeypatch):
    experiment, folder = read("forget/digits-pruning")
    whole = assemble(experiment.model_copy(update={"seed": seed}), folder)
    test = whole.federation.test

    def accuracies(numbers):
        """On the class and on the others, after these rounds."""
        start = begin(whole.strategy, whole.model.params, whole.clients, 10, seed)
        steps = list(rounds(whole.strategy, whole.engine, whole.sample, start))
        for number in numbers:
            right = whole.model.predict(steps[number - 1].snapshot.state["params"], test).argmax(1) == test["y"]
            yield [float(right[test["target"] == part].double().mean()) for part in (1, 0)]

    before, *after = accuracies((40, 41, 44, 46))
    assert before[0] >= 0.8 and before[1] >= 0.85
    assert all(found[0] <= 0.05 for found in after)
    assert all(found[1] >= before[1] - 0.05 for found in after[1:])
    monkeypatch.setattr(pruning, "discrimination", lambda *told: -discrimination(*told))
    cut, repaired = accuracies((41, 44))
    assert cut[0] >= 0.8 and repaired[0] >= 0.4, "the channels of the lowest scores serve others"
