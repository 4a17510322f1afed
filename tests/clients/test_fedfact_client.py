"""FedFACT's local side against Algorithm 1 written out in numpy, and what it does where somebody is missing."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from clients.fedfact import Ensemble, FairSgd
from clients.sgd import Sgd
from fedsim import tree
from fedsim.data.dataset import Dataset
from fedsim.data.federation import Partition, divide
from fedsim.engines.local import Sequential, Vectorised
from fedsim.evaluation import Evaluate, evaluate
from fedsim.model import Model
from fedsim.personal import Personal
from fedsim.task import Cohort, Task
from fedsim.testing import check_client, ragged

G, K, F = 2, 3, 4
EVERY = tuple(range(K))
EVENTS = {  # what each notion compares: whether labels of an event are taken for a class
    "demographic parity": [(EVERY, j) for j in EVERY],
    "equal opportunity": [((j,), j) for j in EVERY],
    "equalised odds": [((i,), j) for i in EVERY for j in EVERY],
    "mean equalised odds": [((j,), j) for j in EVERY] + [(tuple({*EVERY} - {j}), j) for j in EVERY],
}
ENGINES = {"sequential": Sequential, "vectorised": Vectorised}
every_notion = pytest.mark.parametrize("notion", EVENTS)
both_engines = pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)


def linear():
    module = nn.Linear(F, K, bias=False).double()
    nn.init.zeros_(module.weight)
    return Model(module)


def federation(*clients, seed=0):
    """Clients that own these pairs of a group and a label, with random features."""
    pairs = np.array([pair for pairs in clients for pair in pairs], dtype=np.int64).reshape(-1, 2)
    x = np.random.default_rng(seed).normal(size=(len(pairs), F))
    columns = {"x": x, "a": pairs[:, 0].copy(), "y": pairs[:, 1].copy()}
    dataset = Dataset("pairs", {name: torch.from_numpy(column) for name, column in columns.items()})
    offsets = np.concatenate([[0], np.cumsum([len(pairs) for pairs in clients])]).astype(np.int64)
    return divide(dataset, Partition(np.arange(len(pairs)), offsets))


def mixed(size, seed):
    """So many pairs, all of them there."""
    random = np.random.default_rng(seed)
    some = [(a, y) for a in range(G) for y in EVERY]
    return some + [some[number] for number in random.choice(len(some), size - len(some), p=np.arange(1, 7) / 21)]


FEW = mixed(14, 0), mixed(11, 1)


def kept_before(client, seed=5):
    """What two clients keep that have taken part already: numbers of which none is like another."""
    random = np.random.default_rng(seed)
    rows = Personal({"train": client}, 2, 0).gather([0, 1])
    some = tree.map(lambda leaf: torch.from_numpy(random.normal(size=leaf.shape)), rows) | {"rounds": torch.tensor(7)}
    duals = torch.from_numpy(random.exponential(0.05, size=rows["dual"].shape))
    return some | {"rounds": torch.tensor([7, 1]), "dual": duals, "weight": torch.tensor([0.3, 0.6]).double()}


def train(data, client, shared, kept, engine=Sequential):
    """The stacked replies of all clients."""
    task = Task("train", shared, round=3)
    replies = engine(data, {"train": client}).execute(task, Cohort(range(data.num_clients), kept))
    assert not replies.failed
    return replies


def softmax(scores):
    return np.exp(scores) / np.exp(scores).sum(1, keepdims=True)


def project(dual, bound):
    """On non-negative numbers that sum to the bound at most, by bisection."""
    if np.maximum(dual, 0).sum() <= bound:
        return np.maximum(dual, 0)
    low, high = 0.0, dual.max()
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if np.maximum(dual - middle, 0).sum() > bound else (low, middle)
    return np.maximum(dual - low, 0)


def by_hand(client, examples, theta, price, kept):
    """What one client makes of a round, steps 1 to 6 of the client's docstring."""
    x, a, y = (examples[name].numpy() for name in ("x", "a", "y"))
    phi, w, dual = (kept[name].numpy() for name in ("own", "weight", "dual"))
    pairs = EVENTS[client.notion]
    guess = (w * softmax(x @ theta.T) + (1 - w) * softmax(x @ phi.T)).argmax(1)
    of = [[(a == g) & np.isin(y, event) for event, _ in pairs] for g in range(G)]
    among = np.array([[rows.mean() for rows in of[g]] for g in range(G)])
    taken = np.array([[(rows & (guess == pairs[v][1])).mean() for v, rows in enumerate(of[g])] for g in range(G)])
    apart = taken / among - taken.sum(0) / among.sum(0)

    reward = np.stack([np.eye(K)] * G)
    for v, (event, j) in enumerate(pairs):
        for g in range(G):  # D_u / p(a, k) is 1[a = a'] / p(a', E) - 1 / p(E), given the client
            own = sum((dual[0] - dual[1])[h, v] * ((g == h) / among[h, v] - 1 / among[:, v].sum()) for h in range(G))
            reward[g, list(event), j] -= price[g, v] + own
    kappa = max(0.0, 1e-3 - reward.min())
    cost = (reward + kappa)[a, y]  # (n, K)

    def loss(params):
        return -(cost * np.log(softmax(x @ params.T))).sum(1).mean()

    odds = (1 - w) / w * np.exp(-client.weight_rate * (loss(phi) - loss(theta)))
    slack = np.stack([apart - client.local_tolerance, -apart - client.local_tolerance])
    scaled, losses, trained = cost / (1 + K * kappa), [], []
    for params in (theta, phi):
        velocity = np.zeros_like(params)
        for _ in range(client.epochs):
            losses.append(loss(params) / (1 + K * kappa))
            slope = (softmax(x @ params.T) * scaled.sum(1, keepdims=True) - scaled).T @ x / len(x)
            velocity = client.momentum * velocity + slope + client.weight_decay * params
            params = params - client.lr * velocity
        trained.append(params)
    return {
        "update": {"params": {"weight": trained[0]}, "taken": taken, "among": among},
        "weight": len(x),
        "metrics": {"loss": np.mean(losses[: client.epochs])},
        "personal": {
            "rounds": kept["rounds"].numpy() + 1,
            "own": {"weight": trained[1]},
            "weight": np.clip(1 / (1 + odds), 1e-3, 1 - 1e-3),
            "dual": project(dual + client.dual_step * slack, client.bound),
            "recent": {
                "shared": {"weight": np.concatenate([kept["recent"]["shared"]["weight"][1:], [theta]])},
                "own": {"weight": np.concatenate([kept["recent"]["own"]["weight"][1:], [phi]])},
                "weight": np.concatenate([kept["recent"]["weight"][1:], [w]]),
            },
        },
    }


def fair(**settings):
    usual = {"lr": 0.4, "momentum": 0.5, "weight_decay": 0.01, "local_tolerance": 0.05, "epochs": 3, "batch_size": 64}
    return FairSgd(**{"model": linear(), "num_classes": K, "num_groups": G, "average": 3} | usual | settings)


def sent(notion, seed=3):
    random = np.random.default_rng(seed)
    price = random.normal(size=(G, len(EVENTS[notion]))) * 0.4
    return {"params": {"weight": torch.from_numpy(random.normal(size=(K, F)))}, "price": torch.from_numpy(price)}


@pytest.mark.parametrize("bound", [5.0, 0.3], ids=["free", "at the bound"])
@both_engines
@every_notion
def test_a_round_is_that_of_algorithm_1(notion, engine, bound):
    client, data = fair(notion=notion, bound=bound), federation(*FEW)
    kept, shared = kept_before(client), sent(notion)
    replies = train(data, client, shared, kept, engine)
    for k in range(2):
        row, told = tree.take(kept, torch.tensor(k)), (shared["params"]["weight"].numpy(), shared["price"].numpy())
        expected = by_hand(client, data.examples(k), *told, row | {"own": row["own"]["weight"]})
        found = {name: tree.take(getattr(replies, name), torch.tensor(k)) for name in ("update", "personal", "metrics")}
        for name in found:
            tree.map(partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-12), found[name], expected[name])
        assert replies.weight[k] == expected["weight"]
        dual = found["personal"]["dual"]
        assert float(dual.sum()) == pytest.approx(0.3) if bound == 0.3 else (dual - row["dual"]).abs().max() > 0.01


@both_engines
def test_the_numbers_of_examples_do_not_matter_only_their_shares(engine):
    client = fair(notion="equalised odds", weight_rate=2.0)
    kept, once = kept_before(client), federation(*FEW)
    twice = replace(once, rows=np.concatenate([np.tile(once.rows[s:e], 2) for s, _, _, e in once.bounds]))
    twice = replace(twice, bounds=2 * once.bounds)
    one, other = (train(data, client, sent(client.notion), kept, engine) for data in (once, twice))
    for name, leaf in tree.flatten({"u": one.update, "p": one.personal}).items():
        found = tree.flatten({"u": other.update, "p": other.personal})[name]
        torch.testing.assert_close(found, leaf, rtol=1e-12, atol=1e-13)
    assert other.weight.tolist() == [28, 22]


def test_the_weight_goes_to_the_better_model_and_stays_within_its_limits():
    client, data = fair(weight_rate=1e6), federation(*FEW)
    kept, shared = kept_before(client) | {"weight": torch.tensor([0.5, 0.5]).double()}, sent(client.notion)
    one = tree.take(kept["own"], torch.tensor(0))
    kept["own"] = tree.stack([one, one])
    swapped = kept | {"own": tree.stack([shared["params"]] * 2)}
    for rate, limits in ((1e6, [1e-3, 1 - 1e-3]), (0.5, None), (0.0, [0.5, 0.5])):
        client = fair(weight_rate=rate)
        here = train(data, client, shared, kept).personal["weight"]
        there = train(data, client, shared | {"params": one}, swapped).personal["weight"]
        torch.testing.assert_close(here + there, torch.ones(2).double())
        assert limits is None or sorted([float(here[0]), float(there[0])]) == pytest.approx(limits, abs=1e-12)
        assert rate == 0 or not torch.equal(here, kept["weight"])


@pytest.mark.parametrize("personalised", [True, False])
@both_engines
def test_without_constraints_it_is_sgd_with_a_trace_of_label_smoothing(engine, personalised):
    """M = I: costs of 1 + kappa and kappa, divided by 1 + K kappa."""
    smoothing = K * 1e-3 / (1 + K * 1e-3)
    criterion = partial(nn.functional.cross_entropy, reduction="none", label_smoothing=smoothing)
    client = fair(local_tolerance=None, personalised=personalised, average=1, batch_size=4)
    settings = {name: getattr(client, name) for name in ("lr", "momentum", "weight_decay", "epochs", "batch_size")}
    plain = Sgd(model=Model(linear().module, criterion), **settings)
    data, shared = federation(*FEW), sent(client.notion)
    shared["price"].zero_()
    kept = Personal({"train": client}, 2, 0).gather([0, 1])
    found, expected = train(data, client, shared, kept, engine), train(data, plain, shared, {}, engine)
    torch.testing.assert_close(found.update["params"], expected.update["params"], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(found.metrics, expected.metrics, rtol=1e-6, atol=0)
    charged = train(data, client, sent(client.notion), kept, engine)
    assert (charged.update["params"]["weight"] - found.update["params"]["weight"]).abs().max() > 0.01


@pytest.mark.parametrize("tolerance", [None, float("inf"), 0.0])
@both_engines
def test_only_what_is_not_tolerated_is_charged(tolerance, engine):
    client, data = fair(local_tolerance=tolerance), federation(*FEW)
    kept = Personal({"train": client}, 2, 0).gather([0, 1])
    replies = train(data, client, sent(client.notion), kept, engine)
    assert ("dual" in replies.personal) == (tolerance is not None), "what is not answered stays as it was: zero"
    if tolerance == 0:
        rate = replies.update["taken"] / replies.update["among"]
        apart = rate - (replies.update["taken"].sum(1) / replies.update["among"].sum(1))[:, None]
        expected = torch.stack([apart.clamp(min=0), (-apart).clamp(min=0)], 1) * client.dual_step
        torch.testing.assert_close(replies.personal["dual"], expected)
        assert expected.max() > 0.01
    elif tolerance is not None:
        assert not replies.personal["dual"].any()


def test_what_leaves_a_client_is_the_model_and_two_counts_of_groups_and_events():
    client, data = fair(), federation(*FEW)
    kept, shared = kept_before(client), sent(client.notion)
    replies = train(data, client, shared, kept)
    assert tree.flatten(replies.update).keys() == {"params/weight", "taken", "among"}
    assert replies.personal.keys() == {"rounds", "dual", "own", "weight", "recent"}
    assert replies.metrics.keys() == {"loss"}
    assert replies.traffic.down == 2 * 8 * (K * F + G * K), "float64: the model, and a price of each"
    assert replies.traffic.up == 2 * 8 * (K * F + 2 * G * K + 2), "the model, both counts, the weight and the loss"
    alone = fair(personalised=False, average=1)
    assert Personal({"train": alone}, 2, 0).gather([0]).keys() == {"rounds", "dual"}


# What it decides.


def decided(x, mixtures):
    """The mean of what mixtures (theta, phi, w) decide."""
    scores = [w * softmax(x @ theta.T) + (1 - w) * softmax(x @ phi.T) for theta, phi, w in mixtures]
    return np.mean([np.eye(K)[score.argmax(1)] for score in scores], 0)


@pytest.mark.parametrize("personalised", [True, False], ids=["personalised", "not"])
@pytest.mark.parametrize("average", [1, 2, 4])
def test_the_ensemble_is_the_mean_of_the_classifiers_of_a_clients_last_rounds(average, personalised):
    client, data = fair(average=average, lr=2.0, personalised=personalised), federation(*FEW)
    ensemble, personal = Ensemble(client.model), Personal({"train": client}, 2, 0)
    past, undecided = {0: [], 1: []}, 0
    for number in range(8):
        shared, asked = sent(client.notion, number), [0, 1] if number % 3 else [0]
        theta = shared["params"]["weight"].numpy()
        for k in (0, 1):
            kept, examples = tree.take(personal.gather([k]), torch.tensor(0)), data.examples(k)
            phi, w = (kept["own"]["weight"].numpy(), float(kept["weight"])) if personalised else (theta, 1.0)
            latest = theta, phi if past[k] else theta, w
            found = ensemble(shared, kept, examples)
            np.testing.assert_allclose(found, decided(examples["x"].numpy(), [*past[k], latest][-average:]), atol=1e-12)
            undecided += int(((found > 0) & (found < 1)).any())
            past[k] += [latest] if k in asked else []
        task = Task("train", shared, round=number + 1)
        replies = Sequential(data, {"train": client}).execute(task, Cohort(asked, personal.gather(asked)))
        personal.scatter(replies.ids, replies.personal)
    assert (undecided > 8) == (average > 1), "classifiers that are all alike would prove nothing"


@both_engines
def test_a_client_new_to_the_federation_decides_as_the_servers_model_and_starts_its_own_as_a_copy(engine):
    client, data = fair(), federation(*FEW)
    shared, kept = sent(client.notion), Personal({"train": client}, 2, 0).gather([0, 1])
    replies = train(data, client, shared, kept, engine)
    assert torch.equal(replies.personal["own"]["weight"], replies.update["params"]["weight"])
    assert replies.personal["weight"].tolist() == [0.5, 0.5], "none of the two is better yet"
    for k, examples in enumerate(map(data.examples, range(2))):
        found = Ensemble(client.model)(shared, tree.take(kept, torch.tensor(k)), examples)
        plain = client.model.predict(shared["params"], examples).argmax(1)
        assert torch.equal(found, torch.eye(K).double()[plain])
        among = replies.update["among"][k]
        taken = torch.stack([found[examples["a"] == g].sum(0) for g in range(G)]) / len(found)
        torch.testing.assert_close(replies.update["taken"][k], taken)
        assert not torch.equal(among, taken)


@both_engines
def test_an_ensemble_is_counted_by_its_probabilities(engine):
    client, data = fair(average=4, lr=2.0), federation(*FEW)
    kept, shared, ensemble = kept_before(client), sent(client.notion), Ensemble(client.model)
    count = Evaluate(model=client.model, num_classes=K, num_groups=G, classifier=ensemble, part="train", batch_size=4)
    found = evaluate(engine(data, {"evaluate": count}), shared, Cohort([0, 1], kept), 1, "stack")
    right = 0.0
    for k in range(2):
        examples = data.examples(k)
        predicted = ensemble(shared, tree.take(kept, torch.tensor(k)), examples)
        for g in range(G):
            for i in range(K):
                rows = predicted[(examples["a"] == g) & (examples["y"] == i)].sum(0)
                torch.testing.assert_close(found.groups[k, g, i], rows)
        right += float(predicted[torch.arange(len(predicted)), examples["y"]].sum())
    assert found.pooled["accuracy"] == pytest.approx(right / sum(map(len, FEW)))
    assert (found.groups % 1).any(), "a classifier that is certain would prove nothing"


# Where somebody is missing.

MISSING = {
    "nobody": [],
    "one example": [(1, 2)],
    "one group": [(0, 0), (0, 1), (0, 2), (0, 2), (0, 1)],
    "one class": [(0, 1), (1, 1), (1, 1), (0, 1)],
    "an empty cell": [(0, 0), (0, 1), (0, 2), (1, 0), (1, 2), (1, 2), (0, 1)],
    "all": mixed(12, 4),
}


@both_engines
@every_notion
def test_where_somebody_is_missing_numbers_stay_finite_and_nobody_is_charged_for(notion, engine):
    client, data = fair(notion=notion, local_tolerance=0.0, dual_step=0.5), federation(*MISSING.values())
    personal, ids = Personal({"train": client}, len(MISSING), 0), list(range(len(MISSING)))
    for number in range(4):
        shared = sent(notion, number)
        replies = train(data, client, shared, personal.gather(ids), engine)
        parts = {"update": replies.update, "personal": replies.personal, "metrics": replies.metrics}
        assert all(leaf.isfinite().all() for leaf in tree.leaves(parts))
        personal.scatter(ids, replies.personal)
        there, dual = replies.update["among"] > 0, replies.personal["dual"].sum(1)
        expected = [
            [[any((g, i) in own for i in e) for e, _ in EVENTS[notion]] for g in (0, 1)] for own in MISSING.values()
        ]
        assert there.tolist() == expected
        assert not dual[~there].any(), "a constraint about nobody has no multiplier"
    lonely = there.sum(1, keepdim=True).expand_as(there) < 2
    assert dual[lonely].abs().max() < 1e-12, "nor has one that compares a group with itself"
    assert dual[-1].max() > 0.01
    assert not replies.weight[0] and torch.equal(replies.update["params"]["weight"][0], shared["params"]["weight"])
    row = tree.take(personal.gather([0]), torch.tensor(0))
    assert Ensemble(client.model)(shared, row, data.examples(0)).shape == (0, K)


def test_a_group_that_is_not_there_does_not_change_how_its_client_trains():
    """Prices for the group would ask for a larger kappa, and so for smoother targets."""
    client, data = fair(local_tolerance=None, average=1), federation(MISSING["one group"])
    kept, shared = Personal({"train": client}, 1, 0).gather([0]), sent("demographic parity")
    shared["price"] = torch.tensor([[0.1, 0.0, -0.1], [0.0, 0.0, 0.0]]).double()
    usual = train(data, client, shared, kept)
    shared["price"] = torch.tensor([[0.1, 0.0, -0.1], [9.0, 5.0, -9.0]]).double()
    assert torch.equal(train(data, client, shared, kept).update["params"]["weight"], usual.update["params"]["weight"])
    shared["price"] = torch.tensor([[0.9, 0.0, -0.9], [0.0, 0.0, 0.0]]).double()
    other = train(data, client, shared, kept).update["params"]["weight"]
    assert (other - usual.update["params"]["weight"]).abs().max() > 1e-3


# What fedsim asks of every client.


@pytest.mark.parametrize(
    ("settings", "dtype"),
    [
        ({}, torch.float64),
        ({}, torch.float32),
        ({"personalised": False}, torch.float64),
        ({"local_tolerance": None, "average": 1}, torch.float64),
        ({"local_tolerance": None, "average": 1, "personalised": False, "momentum": 0.0}, torch.float64),
    ],
    ids=["all of it", "in single precision", "no model of its own", "no local constraints", "hardly more than SGD"],
)
@every_notion
def test_it_keeps_the_promises_of_a_client(classification, notion, settings, dtype):
    model, _ = classification(dtype=dtype)
    random = torch.Generator().manual_seed(0)
    x = torch.randn(63, 5, generator=random, dtype=torch.float64).to(dtype)
    y, a = (torch.randint(high, (63,), generator=random) for high in (K, G))
    client = fair(model=model, notion=notion, batch_size=16, **settings)
    shared = {"params": model.params, "price": sent(notion)["price"].to(dtype)}
    check_client(client, shared, ragged({"x": x, "y": y, "a": a}))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"notion": "equality"}, "notion must be one of 'demographic parity'"),
        ({"local_tolerance": -0.1}, "local_tolerance must be >= 0"),
        ({"lr": 0.0}, "lr must be > 0"),
        ({"average": 0}, "average must be >= 1"),
        ({"dual_step": 0.0}, "dual_step must be > 0"),
        ({"bound": 0.0}, "bound must be > 0"),
    ],
)
def test_settings_out_of_range_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        fair(**wrong)
