"""FedFACT on a task of which the optimum is known, its server's step by hand, and the same bits however it is run."""

import math
from functools import cache
from itertools import islice

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord
from torch import nn

from clients.fedfact import Ensemble, FairSgd
from fedsim.data.dataset import Dataset
from fedsim.data.federation import Partition, divide
from fedsim.data.generated import canonical_table, gaussian_task, random_joint
from fedsim.data.partition import by_column
from fedsim.engines.local import Sequential, Vectorised
from fedsim.evaluation import Evaluate, evaluate
from fedsim.fairness import constraints, costs, events, max_deviation, optimum
from fedsim.flower import ClientNodes, SimulationGrid
from fedsim.flower.codec import decode_reply, decode_task
from fedsim.model import Model
from fedsim.networks import mlp
from fedsim.personal import Personal
from fedsim.runs import Run
from fedsim.sampling import everyone, uniform
from fedsim.simulation import begin, rounds
from fedsim.task import Cohort, Replies
from fedsim.testing import check_strategy, ragged
from fedsim.tree import flatten, take
from strategies.fedfact import FedFact

K, G = 3, 2
NOTIONS = {"demographic parity": 3, "equal opportunity": 3, "equalised odds": 9, "mean equalised odds": 6}  # V of each
SIZES = (0, 1, 7, 20, 33, 2)
N = len(SIZES)
every_notion = pytest.mark.parametrize("notion", NOTIONS)


# Three clients, two groups and three classes in the plane: how accurate a classifier can be within tolerances is known.

# By linear programs over 2000 points and their exact posteriors, for classifiers that do not see the group.
OPTIMUM = {(0.02, 0.05): 0.6398, (0.02, None): 0.6548, (None, 0.05): 0.6389}


def counting(model, groups=G, classes=K):
    """An evaluation of what the clients decide, on the examples that they have to train on."""
    ensemble = Ensemble(model)
    return Evaluate(model=model, num_classes=classes, num_groups=groups, classifier=ensemble, part="train")


@cache
def plane(examples, seed):
    """The Gaussian task, its groups far apart."""
    found = gaussian_task(examples, seed, 2.5)
    dataset = Dataset(found.name, found.columns, names={"y": ("0", "1", "2"), "a": ("0", "1")})
    return divide(dataset, by_column(dataset.columns, 0, "client"))


@cache
def trained(at_large, at_home, notion="demographic parity", number=60, step=0.1, average=10, count=3):
    """(accuracy, largest deviation over all clients, largest at one, multipliers there and here) after training."""
    train, test = plane(9000, 0), plane(60_000, 1)
    model = mlp(train, 0, hidden=[32])
    own = {"local_tolerance": at_home, "dual_step": step, "average": average, "notion": notion}
    client = FairSgd(model, K, G, lr=0.02, momentum=0.9, batch_size=256, **own)
    strategy = FedFact(K, G, notion, at_large)
    clients = {"train": client, "evaluate": counting(model)}
    start = begin(strategy, model.params, clients, 3)
    *_, last = islice(rounds(strategy, Vectorised(train, clients), uniform(3, count=count), start), number)
    kept, shared = last.snapshot.personal.gather([0, 1, 2]), strategy.shared(last.snapshot.state)
    found = evaluate(Vectorised(test, clients), shared, Cohort([0, 1, 2], kept), number, "stack")
    name = notion.replace(" ", "_") + "_deviation"
    duals = float(last.snapshot.state["dual"].sum()), float(kept["dual"].sum())
    return found.pooled["accuracy"], found.pooled[name], found.clients[name].max(), *duals


def unconstrained():
    """FedAvg, in effect, and a model of each client's own."""
    return trained(None, None, number=25, average=1)


def test_it_is_as_fair_as_asked_and_almost_as_accurate_as_can_be():
    accuracy, at_large, at_home, *duals = trained(0.02, 0.05)
    assert accuracy >= OPTIMUM[0.02, 0.05] - 0.02
    assert at_large <= 0.035
    assert at_large <= unconstrained()[1] / 2
    assert at_home <= 0.1 < 0.14 < unconstrained()[2]
    assert min(duals) > 0


def test_without_tolerances_nothing_is_fair_and_accuracy_is_that_of_bayes():
    accuracy, at_large, at_home, *duals = unconstrained()
    assert accuracy == pytest.approx(0.673, abs=0.015)
    assert at_large > 0.08
    assert duals == [0, 0]


def test_the_global_constraints_alone_leave_clients_unfair_and_are_cheaper():
    accuracy, at_large, at_home, here, there = trained(0.02, None)
    assert at_large <= 0.035
    assert at_home > 0.095
    assert OPTIMUM[0.02, None] - 0.02 <= accuracy
    assert accuracy > trained(0.02, 0.05)[0] + 0.005
    assert here > 0 and there == 0


def test_the_local_constraints_alone_make_clients_fair():
    accuracy, at_large, at_home, here, there = trained(None, 0.05, step=0.5)
    assert at_home <= 0.085
    assert accuracy >= OPTIMUM[None, 0.05] - 0.02
    assert here == 0 and there > 0


@pytest.mark.parametrize("average", [1, 4])
@pytest.mark.parametrize("personalised", [False, True], ids=["one model", "personalised"])
def test_all_clients_decide_alike_unless_they_have_models_of_their_own(personalised, average):
    train, examples = plane(900, 0), {"x": plane(900, 1).columns["x"]}
    model = mlp(train, 0, hidden=[32])
    own = {"local_tolerance": 0.0, "personalised": personalised, "average": average}
    clients = {"train": FairSgd(model, K, G, lr=0.1, momentum=0.9, batch_size=32, **own)}
    strategy = FedFact(K, G, global_tolerance=0.0)
    start = begin(strategy, model.params, clients, 3)
    *_, last = islice(rounds(strategy, Vectorised(train, clients), everyone(3), start), 6)
    kept, shared = last.snapshot.personal.gather([0, 1, 2]), strategy.shared(last.snapshot.state)
    found = [Ensemble(model)(shared, take(kept, torch.tensor(k)), examples) for k in range(3)]
    assert kept["dual"].flatten(1).any(1).all(), "each has constraints of its own"
    assert (torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])) == (not personalised)


def test_two_clients_a_round_are_enough():
    accuracy, at_large, *_ = trained(0.02, 0.05, count=2)
    assert accuracy >= OPTIMUM[0.02, 0.05] - 0.02
    assert at_large <= unconstrained()[1] / 2


def test_equalised_odds_run():
    """What comes out of few rounds is not close to fair yet."""
    found = trained(0.02, 0.05, "equalised odds", number=5, average=3)
    assert all(math.isfinite(value) for value in found)
    assert min(found[3:]) > 0


# With one client whose features are a table it is OptFair: what comes of multipliers can be said in advance.

TABLES = {"canonical": (canonical_table(), 400), "random": (random_joint(2, 3, 12, 4, 1), 1000)}


@pytest.mark.parametrize(
    ("table", "notion", "tolerance"),
    [
        ("random", "demographic parity", 0.01),
        ("canonical", "demographic parity", 0.05),
        ("canonical", "equal opportunity", 0.05),
        ("canonical", "equalised odds", 0.05),
    ],
)
def test_the_mean_of_all_rounds_classifiers_is_as_unfair_as_the_multipliers_say(table, notion, tolerance):
    """The multipliers add up what is not tolerated, so their largest bounds its mean: largest / (step rounds)."""
    (joint, examples), number, step = TABLES[table], 100, 0.05
    counts = np.rint(joint.sum(0) * examples).astype(np.int64)  # (G, X, K)
    a, x, y = np.repeat(np.indices(counts.shape).reshape(3, -1), counts.ravel(), axis=1)
    columns = {"x": np.eye(counts.shape[1])[x], "a": a, "y": y}
    dataset = Dataset("table", {name: torch.from_numpy(column) for name, column in columns.items()})
    federation = divide(dataset, Partition(np.arange(len(a)), np.array([0, len(a)])))

    groups, values, classes = counts.shape
    model = Model(nn.Linear(values, classes, bias=False).double())  # free scores
    nn.init.zeros_(model.module.weight)
    settings = {"lr": 10.0, "momentum": 0.9, "epochs": 25, "batch_size": len(a)}
    client = FairSgd(model, classes, groups, notion=notion, personalised=False, average=number, **settings)
    clients = {"train": client, "evaluate": counting(model, groups, classes)}
    strategy, engine = FedFact(classes, groups, notion, tolerance, step), Sequential(federation, clients)
    loop = rounds(strategy, engine, everyone(1), begin(strategy, model.params, clients, 1))
    *_, before = islice(loop, number - 1)
    kept, shared = before.snapshot.personal.gather([0]), strategy.shared(before.snapshot.state)
    found = evaluate(engine, shared, Cohort([0], kept), number, "stack").pooled  # of the rounds up to the next
    dual = next(loop).snapshot.state["dual"]

    deviation = found[notion.replace(" ", "_") + "_deviation"]
    assert float(dual.sum()) < strategy.bound
    assert deviation <= tolerance + float(dual.max()) / (step * number) + 1e-9
    blind = {"aware": False, "personal": False}
    assert found["accuracy"] >= optimum(counts[None], notion, tolerance, **blind).accuracy - 0.005
    assert found["accuracy"] <= optimum(counts[None], notion, deviation, **blind).accuracy + 1e-9
    assert deviation < 0.75 * bayes(counts, notion), "as unfair as without constraints would prove nothing"


def bayes(counts, notion):
    """How unfair the most accurate classifier is."""
    best = np.eye(counts.shape[2])[counts.sum(0).argmax(1)]  # (X, K)
    return max_deviation(events(notion, counts.shape[2]), torch.from_numpy(np.einsum("axi,xj->aij", counts, best)))


# The server's step.


def answers(taken, among, weight, params):
    """What three clients answer, folded as the task asks for."""
    share = weight / weight.sum()
    update = {"taken": torch.tensordot(share, taken, 1), "among": torch.tensordot(share, among, 1)}
    return Replies([4, 0, 9], weight, {"params": params} | update)


def three(notion, seed=0):
    """Which share of three clients' examples each group and event is, and how much of that is taken for the class."""
    random = np.random.default_rng(seed)
    joint = torch.from_numpy(random.dirichlet(np.ones(G * K), size=3).reshape(3, G, K))
    among = joint @ events(notion, K).labels.double().T  # (3, G, V)
    return joint, torch.from_numpy(random.uniform(size=among.shape)) * among, among


@pytest.mark.parametrize("bound", [5.0, 0.06], ids=["free", "at the bound"])
@every_notion
def test_a_step_of_the_server_is_that_of_algorithm_1(notion, bound):
    strategy = FedFact(K, G, notion, global_tolerance=0.03, dual_step=0.2, bound=bound, lr=0.5)
    start, mean = torch.tensor([1.0, 2.0]).double(), torch.tensor([3.0, 0.0]).double()
    state, dual, total, people = strategy.init({"w": start}), 0.0, 0.0, 0
    for number, weight in enumerate(([10.0, 30.0, 20.0], [5.0, 1.0, 2.0], [8.0, 8.0, 0.0])):
        weight = torch.tensor(weight).double()
        _, taken, among = three(notion, number)
        task = strategy.configure(state, number + 1)
        assert task.reduce == "mean"
        state, metrics = strategy.aggregate(state, task, answers(taken, among, weight, {"w": mean}))
        sums = [(weight[:, None, None] * part).sum(0).numpy() for part in (taken, among)]  # examples
        apart = sums[0] / sums[1] - sums[0].sum(0) / sums[1].sum(0)
        dual = np.maximum(dual + 0.2 * np.stack([apart - 0.03, -apart - 0.03]), 0)  # the tolerance once, not thrice
        dual = simplex(dual, min(dual.sum(), bound))
        total, people = total + sums[1], people + float(weight.sum())
        np.testing.assert_allclose(state["dual"], dual, rtol=1e-10, atol=1e-14)
        np.testing.assert_allclose(state["among"], total, rtol=1e-12)
        assert float(state["examples"]) == pytest.approx(people)
        assert metrics == pytest.approx({"deviation": np.abs(apart).max(), "multipliers": dual.sum()})
    assert dual.sum() == pytest.approx(0.06) if bound == 0.06 else dual.sum() > 0.1
    torch.testing.assert_close(state["params"]["w"], mean + (start - mean) / 8)


def simplex(values, radius):
    """The nearest non-negative numbers with this sum."""
    largest = np.sort(values.ravel())[::-1]
    threshold = (largest.cumsum() - radius) / np.arange(1, len(largest) + 1)
    return np.maximum(values - threshold[np.nonzero(largest > threshold)[0][-1]], 0)


@every_notion
def test_the_prices_that_are_sent_make_every_clients_costs_what_the_constraints_say(notion):
    """M(a, k) = I - sum_u z_u D_u[a, k] / p(a, k)."""
    joint, _, among = three(notion)
    size = torch.tensor([10.0, 30.0, 20.0]).double()
    own = joint * (size / size.sum())[:, None, None]  # P(client, group, label)
    dual = torch.rand(2, *among.shape[1:], generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    counted = torch.tensordot(size, among, 1)
    state = {"params": {}, "dual": dual, "among": counted, "examples": size.sum()}
    price = FedFact(K, G, notion).configure(state, 1).shared["price"]
    for client in range(3):
        matrices = constraints(events(notion, K), own[client], own.sum(0)) / own[client].sum(1)[:, None, None]
        expected = torch.einsum("gv,gvaij->aij", dual[0] - dual[1], matrices)
        torch.testing.assert_close(costs(events(notion, K), price), expected)


@pytest.mark.parametrize("tolerance", [None, math.inf, 0.0, 0.05])
def test_only_what_is_not_tolerated_is_charged(tolerance):
    strategy = FedFact(K, G, global_tolerance=tolerance, bound=50.0)
    _, taken, among = three(strategy.notion)
    state = strategy.init({"w": torch.zeros(2).double()})
    for number in (1, 2):
        task = strategy.configure(state, number)
        state, metrics = strategy.aggregate(
            state, task, answers(taken, among, torch.ones(3).double(), {"w": torch.ones(2).double()})
        )
    expected = {None: 0.0, math.inf: 0.0}.get(tolerance, 2 * 0.1 * (metrics["deviation"] - (tolerance or 0)))
    assert float(state["dual"].max()) == pytest.approx(expected)
    assert bool(strategy.configure(state, 3).shared["price"].any()) == (expected > 0)
    assert metrics["deviation"] > 0.06


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "settings", [{}, {"global_tolerance": 0.01}, {"global_tolerance": 0.0, "lr": 0.5, "bound": 0.01}]
)
@every_notion
def test_it_keeps_the_promises_of_a_strategy(notion, settings, dtype):
    _, taken, among = three(notion)
    params = {"w": torch.linspace(-1, 1, 5, dtype=dtype)}
    replies = answers(taken, among, torch.tensor([10.0, 0.0, 3.0]).double(), {"w": params["w"] + 1})
    replies.update.update({name: replies.update[name].to(dtype) for name in ("taken", "among")})
    check_strategy(FedFact(K, G, notion, **settings), params, replies)


def test_examples_are_counted_exactly_whatever_the_type_of_the_model():
    strategy, params = FedFact(K, G), {"w": torch.zeros(2, dtype=torch.bfloat16)}
    state, among = strategy.init(params), torch.tensor([[0.25] * K, [0.75] * K], dtype=torch.bfloat16)
    for number in range(1, 601):
        update = {"params": params, "taken": among / 2, "among": among}
        replies = Replies([0], torch.tensor([1000.0]), update)
        state, _ = strategy.aggregate(state, strategy.configure(state, number), replies)
    assert float(state["examples"]) == 600_000
    assert (state["among"] / state["examples"])[:, 0].tolist() == [0.25, 0.75]
    assert strategy.configure(state, 601).shared["price"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"notion": "equality"}, "notion must be one of"), ({"global_tolerance": -1.0}, "global_tolerance must be >= 0")],
)
def test_settings_out_of_range_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        FedFact(K, G, **wrong)


# Server and clients together, however they are run.


def method(classification, dtype=torch.float64, sizes=SIZES, notion="equalised odds", average=3, **settings):
    """A strategy with a federation of two groups, its model and its clients."""
    model, _ = classification(dtype=dtype)
    random = torch.Generator().manual_seed(2)
    x = torch.randn(sum(sizes), 5, generator=random, dtype=torch.float64).to(dtype)
    y, a = (torch.randint(high, (sum(sizes),), generator=random) for high in (K, G))
    local = {"local_tolerance": 0.05, "lr": 0.3, "momentum": 0.5, "epochs": 2, "batch_size": 8}
    client = FairSgd(model, K, G, notion=notion, average=average, **local | settings)
    clients = {"train": client, "evaluate": counting(model)}
    return FedFact(K, G, notion, 0.02, dual_step=0.2), ragged({"x": x, "y": y, "a": a}, sizes), model, clients


def steps(strategy, engine, model, clients, number, sample=None):
    """So many rounds."""
    size = engine.federation.num_clients
    start = begin(strategy, model.params, clients, size, 3)
    return islice(rounds(strategy, engine, sample or everyone(size), start), number)


def everything(snapshot):
    """All that the next round depends on."""
    return flatten(snapshot.state) | snapshot.personal.flat()


def assert_near(found, expected, near):
    assert found.keys() == expected.keys()
    for name, leaf in expected.items():
        torch.testing.assert_close(found[name], leaf, rtol=near, atol=near, msg=lambda text, name=name: name + text)


@pytest.mark.parametrize(("dtype", "near"), [(torch.float64, 1e-10), (torch.float32, 1e-4)], ids=["float64", "float32"])
@every_notion
def test_three_rounds_are_the_same_whether_clients_run_alone_or_together(classification, notion, dtype, near):
    strategy, federation, model, clients = method(classification, dtype, notion=notion)
    found = []
    for engine in (Sequential, Vectorised):
        *_, last = steps(strategy, engine(federation, clients, 3), model, clients, 3)
        found.append(everything(last.snapshot))
    assert_near(found[1], found[0], near)
    assert found[0]["dual"].any() and found[0]["rows/dual"].any() and (found[0]["rows/weight"] != 0.5).any()


def test_the_deviation_that_the_server_charges_for_is_that_of_what_clients_decide(classification):
    strategy, federation, model, clients = method(classification, average=1)
    engine, found = Sequential(federation, clients, 3), events(strategy.notion, K)
    snapshot = begin(strategy, model.params, clients, N, 3)
    for step in steps(strategy, engine, model, clients, 3):
        cohort = Cohort(range(N), snapshot.personal.gather(range(N)))
        groups = evaluate(engine, strategy.shared(snapshot.state), cohort, 1, "stack").groups.sum(0)
        assert step.metrics["deviation"] == pytest.approx(max_deviation(found, groups))
        assert step.metrics["multipliers"] == pytest.approx(float(step.snapshot.state["dual"].sum()))
        snapshot = step.snapshot._replace(personal=copied(step.snapshot.personal, clients))


def copied(personal, clients):
    """What clients keep, which the loop goes on changing."""
    copy = Personal(clients, N, 3)
    copy.load({name: leaf.clone() for name, leaf in personal.flat().items()})
    return copy


def test_the_two_tolerances_are_set_apart(classification):
    for at_large, at_home in ((None, None), (None, 0.0), (0.0, None), (0.0, 0.0)):
        _, federation, model, clients = method(classification, local_tolerance=at_home)
        strategy = FedFact(K, G, "equalised odds", at_large)
        *_, last = steps(strategy, Sequential(federation, clients, 3), model, clients, 2)
        kept = everything(last.snapshot)
        assert bool(kept["dual"].any()) == (at_large is not None)
        assert bool(kept["rows/dual"].any()) == (at_home is not None)


# Cohorts drawn at random.


def test_the_server_counts_those_whom_it_has_asked_so_far(classification):
    strategy, federation, model, clients = method(classification)
    sample, found = uniform(N, 1, count=2), events(strategy.notion, K).labels
    among, people, asked = np.zeros((G, len(found))), 0, set()
    for step in steps(strategy, Sequential(federation, clients, 3), model, clients, 6, sample):
        for client in sample(step.snapshot.round).ids:
            a, y = (federation.examples(client)[name].numpy() for name in "ay")
            asked, people = asked | {client}, people + len(a)
            among += np.array([[(found.numpy()[v, y] & (a == g)).sum() for v in range(len(found))] for g in range(G)])
        state = step.snapshot.state
        np.testing.assert_allclose(state["among"], among, rtol=1e-12, atol=1e-12)
        assert float(state["examples"]) == people
        assert all(leaf.isfinite().all() for leaf in everything(step.snapshot).values())
    assert len(asked) > 3 and state["dual"].any()


def test_whoever_is_asked_later_starts_a_model_of_its_own_from_the_servers(classification):
    strategy, federation, model, clients = method(classification, sizes=(9, 7, 20, 12))
    sample, seen = uniform(4, 2, count=1), set()
    for step in steps(strategy, Sequential(federation, clients, 3), model, clients, 12, sample):
        (client,) = sample(step.snapshot.round).ids
        kept = take(step.snapshot.personal.gather([client]), torch.tensor(0))
        same = torch.equal(kept["own"]["0.weight"], step.snapshot.state["params"]["0.weight"])
        assert same == (client not in seen), "alone in its round, a newcomer makes the same of both"
        assert int(kept["rounds"]) == 1 or client in seen
        seen.add(client)
    assert len(seen) == 4 and sample(1).ids != sample(2).ids


# Elsewhere.


class Overheard(SimulationGrid):
    """A grid that keeps the messages that pass through it."""

    def send_and_receive(self, messages, *, timeout=None):
        sent = list(messages)
        replies = list(super().send_and_receive(sent, timeout=timeout))
        self.heard = [*getattr(self, "heard", []), (sent, replies)]
        return replies


@pytest.mark.parametrize("engine", [Sequential, Vectorised])
def test_through_flowers_grid_it_does_what_it_does_here_and_nothing_private_travels(classification, engine):
    strategy, federation, model, clients = method(classification)
    *_, last = steps(strategy, engine(federation, clients, 3), model, clients, 3)
    here = engine(federation, clients, 3)
    grid = Overheard(ClientNodes(here, Personal(clients, N, 3)), N, 3)
    result = strategy.start(grid=grid, initial_arrays=ArrayRecord(model.module.state_dict()), num_rounds=3)
    found = {name: torch.from_numpy(array.numpy().copy()) for name, array in result.arrays.items()}
    assert_near(found, strategy.params(last.snapshot.state), 1e-12)
    expected = {name.removeprefix("train/"): value for name, value in last.metrics.items()}
    told = {name.removeprefix("train/"): value for name, value in result.train_metrics_clientapp[3].items()}
    assert told == pytest.approx(expected, rel=1e-9)
    cohort = Cohort(range(N), last.snapshot.personal.gather(range(N)))
    pooled = evaluate(here, strategy.shared(last.snapshot.state), cohort, 3, "stack").pooled
    assert result.evaluate_metrics_clientapp[3]["accuracy"] == pytest.approx(pooled["accuracy"], rel=1e-9)

    params = {f"params/{name}" for name in model.params}
    travels = {  # there, back, and what is measured
        "train": (params | {"price"}, params | {"taken", "among"}, {"loss"}),
        "evaluate": (params, set(), {"loss", "accuracy"}),
    }
    for sent, replies in grid.heard:
        down, up, measured = travels[sent[0].metadata.message_type]
        tasks = [decode_task(message.content, message.metadata.message_type) for message in sent]
        answers = [message.content for message in replies if message.has_content()]  # an empty one does not evaluate
        assert all(message.content.keys() == {"arrays", "config"} for message in sent)
        assert all(content.keys() == {"arrays", "metrics", "fedsim"} for content in answers)
        assert all(flatten(task.shared).keys() == down for task in tasks)
        assert all(flatten(decode_reply(content).update).keys() == up for content in answers)
        assert all(decode_reply(content).metrics.keys() == measured for content in answers)
    assert len(grid.heard) == 6


def test_a_run_that_was_stopped_goes_on_to_the_same_bits(classification, tmp_path):
    strategy, federation, model, clients = method(classification)
    sample, engine = uniform(N, 3, count=4), Vectorised(federation, clients, 3)
    whole, resumed = (Run.create(tmp_path, name, 3, "", {}) for name in ("whole", "resumed"))
    for step in islice(rounds(strategy, engine, sample, begin(strategy, model.params, clients, N, 3)), 5):
        whole.save(step.snapshot, "all")
    half = whole.load(whole.checkpoints()[1], begin(strategy, model.params, clients, N, 3))
    assert half.round == 2 and half.state["dual"].any()
    for step in islice(rounds(strategy, engine, sample, half), 3):
        resumed.save(step.snapshot, "all")
    for one, other in zip(whole.checkpoints()[2:], resumed.checkpoints(), strict=True):
        assert one.read_bytes() == other.read_bytes()
    assert b"personal/rows/recent/own/0.weight" in one.read_bytes()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning")  # Ray's daemons, till the end
@pytest.mark.filterwarnings("ignore:unclosed file .*/dev/null:ResourceWarning")
def test_one_worker_of_ray_and_two_give_the_bits_of_one_process(classification, monkeypatch):
    import ray

    from fedsim.engines.ray import Ray

    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    strategy, federation, model, clients = method(classification)
    *_, last = steps(strategy, Vectorised(federation, clients, 3), model, clients, 3)
    expected = everything(last.snapshot)
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    try:
        for workers in (1, 2):
            with Ray(federation, clients, 3, workers=workers, cpus=0.5, inner="vectorised") as engine:
                *_, last = steps(strategy, engine, model, clients, 3)
            assert_near(everything(last.snapshot), expected, 0)
    finally:
        ray.shutdown()
