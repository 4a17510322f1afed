"""WassFFed on a task of which the best is known, its server's steps by hand, and the same bits however it is run."""

from functools import cache
from itertools import islice, pairwise

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord

from clients.wassffed import CountScores, TransportAdam
from fedsim.data.dataset import Dataset
from fedsim.data.federation import Partition, divide
from fedsim.data.generated import group_shift, group_shift_posterior
from fedsim.engines.local import Sequential, Vectorised
from fedsim.evaluation import Evaluate, evaluate
from fedsim.fairness import optimum
from fedsim.flower import ClientNodes, SimulationGrid
from fedsim.flower.codec import decode_reply, decode_task
from fedsim.networks import mlp
from fedsim.personal import Personal
from fedsim.runs import Run
from fedsim.sampling import everyone, uniform
from fedsim.simulation import begin, rounds
from fedsim.task import Cohort, Replies, Task
from fedsim.testing import check_strategy
from fedsim.transport import farthest, grid, transport_maps
from fedsim.tree import flatten
from strategies.fedavg import FedAvg
from strategies.wassffed import WassFFed, distances

SIZES = (0, 1, 7, 20, 33, 2)
N = len(SIZES)
BINS = 21


# Two groups and two classes in space: what is fair costs accuracy, and how much at least is known.

# The gap of demographic parity at each alpha, from reference runs (5 clients, 60 rounds): means over the seeds 0 and 1,
# which differ much at small alpha, because sizes of clients do. This is a replication of those two, no stable level.
FIGURES = {1.0: 0.280, 0.8: 0.267, 0.5: 0.213, 0.3: 0.097, 0.1: 0.027}


@cache
def shifted(seed):
    """8000 examples at 5 clients, shares of each group from a Dirichlet(0.5); 20 at least of each at every client."""
    dataset = group_shift(8000, 20_000, seed)
    groups = dataset.columns["a"].numpy()
    random = np.random.default_rng(seed)
    while True:
        owner = np.empty(len(groups), dtype=np.int64)
        for group in (0, 1):
            rows = random.permutation(np.flatnonzero(groups == group))
            ends = (np.cumsum(random.dirichlet(np.full(5, 0.5)))[:-1] * len(rows)).astype(int)
            for client, part in enumerate(np.split(rows, ends)):
                owner[part] = client
        if np.bincount(owner * 2 + groups, minlength=10).min() >= 20:
            break
    offsets = np.concatenate([[0], np.cumsum(np.bincount(owner, minlength=5))])
    return divide(dataset, Partition(np.argsort(owner, kind="stable"), offsets))


@cache
def trained(alpha, kind="quantile", warm_up=20, transport=40, seeds=(0, 1), **settings):
    """(accuracy, gap of demographic parity, W_1 between the groups' scores), means over seeds, on 20,000 examples."""
    found = []
    for seed in seeds:
        federation = shifted(seed)
        model = mlp(federation, seed, hidden=[64])
        client = TransportAdam(model, 2, lr=3e-3, weight_decay=1e-4, batch_size=128, **settings)
        counting = Evaluate(model=model, num_classes=2, num_groups=2, score_bins=101)
        clients = {"train": client, "measure": CountScores(model=model, num_groups=2), "evaluate": counting}
        strategy = WassFFed(2, 2, alpha=alpha, barycenter=kind, warm_up=warm_up)
        number = warm_up + transport * (1 if alpha == 1 else 2)
        *_, last = steps(strategy, Vectorised(federation, clients, seed), model, clients, number)
        test = federation.central()
        shared = strategy.shared(last.snapshot.state)
        pooled = evaluate(Vectorised(test, clients), shared, Cohort(range(test.num_clients)), number, "stack").pooled
        found.append([pooled[name] for name in ("accuracy", "demographic_parity_gap", "score_distance")])
    return tuple(np.mean(found, axis=0).tolist())


def best(gap):
    """The accuracy that no classifier that does not see the group exceeds within a gap of demographic parity."""
    columns = group_shift(4000, 0, 7).columns
    joint = group_shift_posterior(columns["x"].double().numpy()).transpose(1, 0, 2)[None] / 4000
    smaller = joint.sum((0, 2, 3)).min()
    return optimum(joint, "demographic parity", (1 - smaller) * gap, aware=False).accuracy


@pytest.mark.slow
def test_the_smaller_alpha_the_smaller_the_gap_as_in_the_reference_and_never_better_than_the_best():
    found = {alpha: trained(alpha) for alpha in FIGURES}
    for alpha, (accuracy, gap, _) in found.items():
        assert gap == pytest.approx(FIGURES[alpha], abs=0.02), alpha
        assert accuracy <= best(gap) + 0.01, alpha
    for one, other in pairwise(found.values()):
        assert one[1] > other[1] and one[2] > other[2], "gap and distance fall with alpha"
    assert found[1.0][0] > 0.905 and found[1.0][2] == pytest.approx(0.27, abs=0.03)
    assert found[0.3][2] == pytest.approx(0.0697, abs=0.03) and found[0.1][2] < 0.04


@pytest.mark.slow
def test_a_mixture_in_place_of_a_barycenter_does_about_the_same():
    for alpha, gap in ((0.3, 0.0969), (0.1, 0.0427)):
        assert trained(alpha, "cdf")[1] == pytest.approx(gap, abs=0.02)


@pytest.mark.slow
def test_targets_in_the_authors_order_leave_the_gap_where_it_was_though_scores_come_closer():
    accuracy, gap, distance = trained(0.3, "cdf", targets="argsort")
    assert gap > 0.25, "no less than without any fairness"
    assert distance < 0.15, "so the distance alone proves nothing"
    assert accuracy > 0.9


@pytest.mark.slow
def test_squared_distances_pull_less_and_one_client_gets_closest():
    assert trained(0.3, power=2.0, dead_zone=0.0)[1] == pytest.approx(0.2189, abs=0.03)
    assert trained(0.3)[1] < 0.2189 - 0.03


def test_a_few_steps_are_enough_to_see_it():
    fair, plain = (trained(alpha, warm_up=10, transport=12, seeds=(0,)) for alpha in (0.1, 1.0))
    assert fair[1] < plain[1] / 2 and fair[2] < plain[2] / 2
    assert plain[0] > 0.88


# The server's steps.


def method(classification, dtype=torch.float64, alpha=0.4, engine=Vectorised, **settings):
    """A strategy of 2 warm-up rounds, and the local side of six clients with two groups and three classes."""
    model, federation = classification(SIZES, dtype)
    clients = {
        "train": TransportAdam(model, 2, lr=0.03, epochs=2, batch_size=8),
        "measure": CountScores(model=model, num_groups=2, bins=BINS),
        "evaluate": Evaluate(model=model, num_classes=3, num_groups=2, score_bins=BINS, part="train"),
    }
    strategy = WassFFed(3, 2, **{"alpha": alpha, "bins": BINS, "warm_up": 2} | settings)
    return strategy, model, clients, engine(federation, clients, 3)


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


def asked(strategy, model, counts, number):
    """What is asked of the clients in each of so many rounds, if these are always the counts."""
    state, found = strategy.init(model.params), []
    for round in range(1, number + 1):
        task = strategy.configure(state, round)
        found.append(task)
        update = {"counts": counts} if task.action == "measure" else {"params": model.params}
        state, _ = strategy.aggregate(state, task, Replies([0], torch.ones(1), update))
    return found


@pytest.fixture
def counts():
    return torch.randint(9, (2, 3, BINS), generator=torch.Generator().manual_seed(0))


def test_after_the_warm_up_clients_count_and_train_in_turns(classification, counts):
    strategy, model, *_ = method(classification)
    tasks = asked(strategy, model, counts, 6)
    assert [task.action for task in tasks] == ["train", "train", "measure", "train", "measure", "train"]
    assert [task.reduce for task in tasks] == ["mean", "mean", "sum", "mean", "sum", "mean"]
    assert [sorted(task.shared) for task in tasks[:4]] == [["params"]] * 3 + [["alpha", "maps", "params"]]
    assert torch.equal(tasks[3].shared["maps"], transport_maps(counts).to(torch.float64))
    assert tasks[3].shared["alpha"] == 0.4


def test_alpha_falls_as_long_as_it_is_said_to(classification, counts):
    strategy, model, *_ = method(classification, warm_up=0, descent=3)
    alphas = [float(task.shared["alpha"]) for task in asked(strategy, model, counts, 12) if task.action == "train"]
    assert alphas == pytest.approx([0.85, 0.7, 0.55, 0.4, 0.4, 0.4])


def test_the_model_goes_a_part_of_the_way_to_the_mean(classification):
    strategy, model, *_ = method(classification, lr=0.95)
    mean = {name: leaf + 1 for name, leaf in model.params.items()}
    replies = Replies([0, 1], torch.ones(2), {"params": mean})
    state, _ = strategy.aggregate(strategy.init(model.params), Task("train", {"params": model.params}), replies)
    for name, leaf in model.params.items():
        torch.testing.assert_close(state["params"][name], leaf + 0.95)


def test_what_is_told_is_the_cost_of_transport_and_the_distance_of_the_farthest_groups(counts):
    maps = transport_maps(counts)
    told = distances(counts, maps)
    moved = [
        sum(float(counts[a, s, b]) * abs(b / (BINS - 1) - float(maps[a, s, b])) for a in range(2) for b in range(BINS))
        / float(counts[:, s].sum())
        for s in range(3)
    ]
    assert told["distance/barycenter"] == pytest.approx(max(moved))
    assert told["distance/groups"] == pytest.approx(farthest(counts))
    assert distances(counts[:1], transport_maps(counts[:1]))["distance/groups"] == 0
    nobody = torch.zeros_like(counts)
    assert set(distances(nobody, transport_maps(nobody)).values()) == {0.0}


@pytest.mark.parametrize("engine", [Sequential, Vectorised])
def test_with_all_weight_on_accuracy_it_is_fedavg_to_the_bit(classification, engine):
    strategy, model, clients, here = method(classification, torch.float32, alpha=1.0, engine=engine)
    *_, last = steps(strategy, here, model, clients, 5)
    *_, plain = steps(FedAvg(lr=strategy.lr), here, model, clients, 5)
    assert strategy.actions == ("train",)
    assert_near(last.snapshot.state["params"], plain.snapshot.state["params"], 0)
    less, *_ = method(classification, torch.float32, alpha=0.9)
    *_, fair = steps(less, here, model, clients, 5)
    assert not torch.equal(fair.snapshot.state["params"]["0.weight"], plain.snapshot.state["params"]["0.weight"])


def test_the_maps_are_those_of_the_pooled_scores_however_these_are_spread_over_clients(classification):
    strategy, model, clients, _ = method(classification, warm_up=0)
    _, one = classification((63,), torch.float64)
    found = []
    for federation in (one, classification(SIZES, torch.float64)[1], classification((20, 20, 20, 3), torch.float64)[1]):
        (step,) = steps(strategy, Vectorised(federation, clients, 3), model, clients, 1)
        found.append(step.snapshot.state["counts"])
    assert found[0].sum() == 63 * 3
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_the_order_of_clients_changes_nothing(classification):
    strategy, model, clients, here = method(classification)
    first, second = ([0, 1, 2, 3, 4, 5], [4, 2, 5, 0, 3, 1])
    tasks = [Task("measure", {"params": model.params}, ids, 1, "sum") for ids in (first, second)]
    one, other = (here.execute(task, Cohort(task.ids)).update["counts"] for task in tasks)
    assert torch.equal(one, other)


def test_a_group_that_nobody_has_is_left_out(classification):
    model, federation = classification(SIZES, torch.float64)
    columns = federation.columns | {"a": torch.zeros_like(federation.columns["a"])}
    alone = divide(Dataset("alone", columns), Partition(federation.rows, np.append(federation.bounds[:, 0], 63)))
    strategy, _, clients, _ = method(classification)
    *_, last = steps(strategy, Vectorised(alone, clients, 3), model, clients, 4)
    state, points = last.snapshot.state, grid(BINS)
    assert not state["counts"][1].any() and last.failed == {}
    assert torch.equal(transport_maps(state["counts"])[1], points.expand(3, BINS))
    assert all(torch.isfinite(leaf).all() for leaf in flatten(state["params"]).values())


def test_a_client_with_one_class_only_trains_on(classification):
    model, federation = classification(SIZES, torch.float64)
    labels = federation.columns["y"].clone()
    labels[:] = 1
    single = divide(
        Dataset("single", federation.columns | {"y": labels}),
        Partition(federation.rows, np.append(federation.bounds[:, 0], 63)),
    )
    strategy, _, clients, _ = method(classification)
    *_, last = steps(strategy, Vectorised(single, clients, 3), model, clients, 6)
    assert last.failed == {} and all(torch.isfinite(leaf).all() for leaf in last.snapshot.state["params"].values())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"alpha": 1.1}, "alpha must be >= 0 and <= 1, got 1.1"),
        ({"bins": 1}, "bins must be >= 2, got 1"),
        ({"barycenter": "mean"}, "barycenter must be one of 'quantile', 'median', 'cdf', got 'mean'"),
        ({"warm_up": -1}, "warm_up must be >= 0, got -1"),
    ],
)
def test_settings_out_of_range_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        WassFFed(2, 2, **wrong)


def test_clients_that_count_otherwise_are_told(classification):
    strategy, model, clients, engine = method(classification, bins=11, warm_up=0)
    with pytest.raises(ValueError, match=r"clients count scores as \(2, 3, 21\), the strategy as \(2, 3, 11\), groups"):
        list(steps(strategy, engine, model, clients, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_it_keeps_the_promises_of_a_strategy(classification, counts, dtype):
    strategy, model, *_ = method(classification, dtype)
    check_strategy(strategy, model.params, Replies([0, 1], torch.ones(2), {"params": model.params}))
    check_strategy(
        WassFFed(3, 2, bins=BINS, warm_up=0), model.params, Replies([0, 1], torch.ones(2), {"counts": counts})
    )


# However it is run.


@pytest.mark.parametrize(("dtype", "near"), [(torch.float64, 1e-10), (torch.float32, 1e-4)], ids=["float64", "float32"])
@pytest.mark.parametrize("kind", ["quantile", "median", "cdf"])
def test_six_rounds_are_the_same_whether_clients_run_alone_or_together(classification, kind, dtype, near):
    found = []
    for engine in (Sequential, Vectorised):
        strategy, model, clients, here = method(classification, dtype, engine=engine, barycenter=kind)
        *_, last = steps(strategy, here, model, clients, 6)
        found.append(everything(last.snapshot))
    assert_near(found[1], found[0], near)
    assert int(found[0]["transported"]) == 2


class Overheard(SimulationGrid):
    """A grid that keeps the messages that pass through it."""

    def send_and_receive(self, messages, *, timeout=None):
        sent = list(messages)
        replies = list(super().send_and_receive(sent, timeout=timeout))
        self.heard = [*getattr(self, "heard", []), (sent, replies)]
        return replies


@pytest.mark.parametrize("engine", [Sequential, Vectorised])
def test_through_flowers_grid_it_does_what_it_does_here_and_sends_histograms_only(classification, engine):
    strategy, model, clients, here = method(classification, engine=engine)
    *_, last = steps(strategy, here, model, clients, 6)
    grid = Overheard(ClientNodes(here, Personal(clients, N, 3)), N, 3)
    result = strategy.start(grid=grid, initial_arrays=ArrayRecord(model.module.state_dict()), num_rounds=6)
    found = {name: torch.from_numpy(array.numpy().copy()) for name, array in result.arrays.items()}
    assert_near(found, strategy.params(last.snapshot.state), 1e-12)

    params = {f"params/{name}" for name in model.params}
    kinds = []
    for sent, replies in grid.heard:
        kind = sent[0].metadata.message_type
        if kind == "evaluate":
            continue
        tasks = [decode_task(message.content, kind) for message in sent]
        answers = [decode_reply(message.content) for message in replies]
        fair = "maps" in tasks[0].shared
        kinds.append("train, fair" if fair else kind)
        assert all(task.shared.keys() == {"params"} | ({"maps", "alpha"} if fair else set()) for task in tasks)
        assert all(answer.personal == {} for answer in answers)
        if kind == "train":
            assert all(flatten(answer.update).keys() == params for answer in answers)
            continue
        assert kind == "train.measure"
        for answer, size in zip(sorted(answers, key=lambda one: float(one.weight)), sorted(SIZES), strict=True):
            assert answer.update.keys() == {"counts"} and answer.metrics == {}
            counts = answer.update["counts"]
            assert counts.dtype == torch.int64 and counts.shape == (2, 3, BINS)
            assert (counts.sum((0, 2)) == size).all(), (
                "every example is counted once for each class, and told no more of"
            )
    assert kinds == ["train", "train", "train.measure", "train, fair", "train.measure", "train, fair"]


def test_a_run_that_was_stopped_between_counting_and_training_goes_on_to_the_same_bits(classification, tmp_path):
    strategy, model, clients, engine = method(classification)
    sample = uniform(N, 3, count=4)
    whole, resumed = (Run.create(tmp_path, name, 3, "", {}) for name in ("whole", "resumed"))
    for step in islice(rounds(strategy, engine, sample, begin(strategy, model.params, clients, N, 3)), 6):
        whole.save(step.snapshot, "all")
    half = whole.load(whole.checkpoints()[2], begin(strategy, model.params, clients, N, 3))
    assert half.round == 3 and half.state["measured"] and half.state["counts"].any()
    for step in islice(rounds(strategy, engine, sample, half), 3):
        resumed.save(step.snapshot, "all")
    for one, other in zip(whole.checkpoints()[3:], resumed.checkpoints(), strict=True):
        assert one.read_bytes() == other.read_bytes()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning")  # Ray's daemons, till the end
@pytest.mark.filterwarnings("ignore:unclosed file .*/dev/null:ResourceWarning")
def test_one_worker_of_ray_and_two_give_the_bits_of_one_process(classification, monkeypatch):
    import ray

    from fedsim.engines.ray import Ray

    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    strategy, model, clients, here = method(classification)
    *_, last = steps(strategy, here, model, clients, 6)
    expected = everything(last.snapshot)
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    try:
        for workers in (1, 2):
            with Ray(here.federation, clients, 3, workers=workers, cpus=0.5, inner="vectorised") as engine:
                *_, last = steps(strategy, engine, model, clients, 6)
            assert_near(everything(last.snapshot), expected, 0)
    finally:
        ray.shutdown()
