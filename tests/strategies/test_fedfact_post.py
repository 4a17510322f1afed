"""FedFACT after training, as a whole: against the linear program, and a solver that sees all clients' data at once.

On a finite joint distribution with its exact scores, calibration has one right answer at a temperature: the soft
optimum. `Problem` writes its dual down in another way than the method does, from the definitions of the constraints.
"""

import os
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import logsumexp, softmax
from torch import nn

from clients.fedfact_post import Calibrate, Calibrated, Measure
from clients.sgd import Sgd
from fedsim import tree
from fedsim.data.federation import Federation
from fedsim.data.generated import canonical_table, gaussian_task, random_joint
from fedsim.engines.engine import pick
from fedsim.engines.local import Sequential, Vectorised
from fedsim.evaluation import Evaluate, evaluate
from fedsim.fairness import optimum
from fedsim.model import Model
from fedsim.personal import Personal
from fedsim.runs import Run
from fedsim.sampling import everyone
from fedsim.simulation import Snapshot, begin, rounds
from fedsim.task import Cohort
from fedsim.testing import check_strategy
from strategies.fedavg import FedAvg
from strategies.fedfact_post import FedFactPost

NOTIONS = {"DP": "demographic parity", "EOP": "equal opportunity", "EO": "equalised odds"}
INFINITE = float("inf")


# Finite joint distributions P(client, group, x, label), and federations that have exactly their frequencies.


def whole(joint, size, hidden=()):
    """(the joint with P(client, group, x) rounded to what that many examples can have, how many these are)."""
    mass = joint.sum((*hidden, 3), keepdims=True)  # of an example as far as it is seen
    counts = np.rint(mass * size)
    return joint * (counts / counts.sum() / np.where(mass > 0, mass, 1)), int(counts.sum())


def without(joint, *cells):
    """The joint without some cells."""
    joint = joint.copy()
    for cell in cells:
        joint[cell] = 0
    return joint / joint.sum()


def alike(joint):
    """The joint in which, at every client, x and label do not depend on the group."""
    group = joint.sum((2, 3)) / joint.sum((1, 2, 3))[:, None]  # P(group | client)
    return group[:, :, None, None] * joint.sum(1, keepdims=True)


DRAWN = random_joint(3, 2, 4, 3, 1)
FOUR = random_joint(2, 3, 12, 4, 1).sum(0, keepdims=True)  # one client, three groups, four labels
JOINTS = {
    "canonical": (canonical_table(), 200),
    "central": (canonical_table().sum(0, keepdims=True), 200),
    "alike": (alike(canonical_table()), 2000),
    "four": whole(FOUR, 6000, (1,)),
    "a group is absent": whole(without(DRAWN, (0, 1), (2, 0)), 200),
    "labels are absent": whole(without(DRAWN, np.s_[0, 1, :, 2], np.s_[1, 0, :, :2], np.s_[:, 0, :, 0]), 200),
    "one group": whole(DRAWN.sum(1, keepdims=True), 200),
    "one label in use": whole(without(DRAWN, np.s_[..., 1:]), 200),
    "one class": whole(DRAWN.sum(3, keepdims=True), 200),
}


def federation(joint, size, aware=True, labelled=False):
    """Its clients, and the model of its exact scores: of the label, or (blind) of group and label together.

    There is no column with the label, nor, for the blind, one with the group, unless `labelled`.
    """
    clients, groups, points, classes = joint.shape
    if aware:
        scores, place = joint.reshape(-1, classes), np.indices((clients, groups, points)).reshape(3, -1)
    else:
        scores, place = joint.swapaxes(1, 2).reshape(-1, groups * classes), np.indices((clients, points)).reshape(2, -1)
    mass = scores.sum(1, keepdims=True)
    columns = {"x": torch.eye(len(scores), dtype=torch.float64)}
    if labelled:
        cell, label = np.indices(scores.shape).reshape(2, -1)
        counts, columns = scores.ravel() * size, {"x": columns["x"][cell], "y": torch.from_numpy(label)}
    else:
        cell, counts = np.arange(len(scores)), mass[:, 0] * size
    if aware:
        columns["a"] = torch.from_numpy(place[1][cell])
    np.testing.assert_allclose(counts, np.rint(counts), atol=1e-6)
    counts = np.rint(counts).astype(int)
    end = np.cumsum(np.bincount(place[0][cell], counts, clients)).astype(int)
    bounds = np.stack([np.concatenate([[0], end[:-1]]), end, end, end], axis=1)
    module = nn.Linear(*reversed(scores.T.shape), bias=False).double()
    # A label that is never met has a score of exactly zero.
    logits = np.log(scores, where=scores > 0, out=np.full_like(scores, -2000.0))
    module.weight.data = torch.from_numpy(logits.T.copy())
    return Federation(columns, np.repeat(np.arange(len(cell)), counts), bounds), Model(module)


# Its soft optimum, by other means.


def constraints(joint, notion):
    """What each classifier's deviations are, (G V, N, G, X, K): P(y | E, group) - P(y | E) is <row, P(y | k, a, x)>."""
    groups, classes = joint.shape[1], joint.shape[3]
    every, rows = range(classes), []
    rates = {
        "DP": [(list(every), y) for y in every],
        "EOP": [([y], y) for y in every],
        "EO": [([i], y) for i in every for y in every],
    }[notion]
    for group in range(groups):
        for labels, predicted in rates:
            mass = joint[..., labels].sum(-1)  # P(client, group, x, label in E)
            row = np.zeros_like(joint)
            if mass[:, group].any():
                row[:, group, :, predicted] = mass[:, group] / mass[:, group].sum()
                row[..., predicted] -= mass / mass.sum()
            rows.append(row)
    return np.stack(rows)


@dataclass(frozen=True)
class Problem:
    """Most accurate and most random, subject to deviations: scope 0 those of all clients, scope 1 + k of client k."""

    joint: np.ndarray
    notion: str
    tolerances: tuple[float, ...]  # of each scope
    temperature: float
    aware: bool = True

    @cached_property
    def share(self):
        """P(client), (N,)."""
        return self.joint.sum((1, 2, 3))

    @cached_property
    def rows(self):
        """(1 + N, G V, N, G, X, K)."""
        scopes = [constraints(self.joint, self.notion)]
        for client in range(len(self.joint)):
            part = np.zeros_like(self.joint)
            part[client] = self.joint[client]
            scopes.append(constraints(part, self.notion))
        return np.stack(scopes)

    def classifier(self, multipliers):
        """(its P(predicted), the value of the dual but for what tolerances add) at signed multipliers (1 + N, G V)."""
        hidden = () if self.aware else (1,)
        worth = (self.joint - np.tensordot(multipliers, self.rows, 2)).sum(hidden, keepdims=True)
        mass = self.joint.sum((*hidden, 3), keepdims=True)
        f = worth / np.where(mass > 0, mass, 1) / self.temperature
        value = self.temperature * (mass * logsumexp(f, axis=-1, keepdims=True)).sum()
        return np.broadcast_to(softmax(f, axis=-1), self.joint.shape), float(value)

    def accuracy(self, classifier):
        return float((self.joint * classifier).sum())

    def deviations(self, classifier):
        """(1 + N, G V)."""
        return np.einsum("sukaxj,kaxj->su", self.rows, classifier)

    def objective(self, pairs):
        """The dual at pairs of multipliers, (2, 1 + N, G V)."""
        sums = pairs.sum((0, 2))
        assert not sums[np.isinf(self.tolerances)].any()
        charged = sum(t * s for t, s in zip(self.tolerances, sums, strict=True) if np.isfinite(t))
        return self.classifier(pairs[0] - pairs[1])[1] + charged

    @cached_property
    def best(self):
        """The multipliers that a solver finds which sees all of the data, (2, 1 + N, G V)."""
        active = np.isfinite(self.tolerances)
        shape = (2, int(active.sum()), self.rows.shape[1])
        tolerance = np.array(self.tolerances)[active][:, None]

        def both(flat):
            pairs = np.zeros((2, len(active), shape[2]))
            pairs[:, active] = flat.reshape(shape)
            apart = self.deviations(self.classifier(pairs[0] - pairs[1])[0])[active]
            return self.objective(pairs), np.stack([tolerance - apart, tolerance + apart]).ravel()

        found = np.zeros(np.prod(shape))
        for _ in range(3):  # again from where it stopped: it takes a line that is flat to rounding for the end
            settings = {"ftol": 1e-16, "gtol": 1e-11, "maxiter": 20_000, "maxfun": 20_000}
            found = minimize(both, found, jac=True, bounds=[(0, None)] * len(found), options=settings).x
        pairs = np.zeros((2, len(active), shape[2]))
        pairs[:, active] = found.reshape(shape)
        return pairs


class Outcome(NamedTuple):
    """What a run came to."""

    snapshot: Snapshot
    rounds: list[Any]
    strategy: FedFactPost
    calibrate: Calibrate
    problem: Problem

    @property
    def pairs(self):
        """The multipliers, as Problem has them: those of client k times its share."""
        return pairs_of(self.snapshot.state["ahead"], self.snapshot.personal, self.problem)

    def classifier(self, randomised=True):
        """What is predicted, (N, G, X, K)."""
        clients, groups, points, classes = self.problem.joint.shape
        aware = self.problem.aware
        rule = Calibrated(self.calibrate.model, classes, groups, randomised, self.strategy.temperature)
        cells = self.calibrate.model.module.in_features
        x = torch.eye(cells, dtype=torch.float64).reshape(clients, -1, cells)
        batch = {"a": torch.arange(groups).repeat_interleave(points)} if aware else {}
        shared = self.strategy.shared(self.snapshot.state)
        cost = self.snapshot.personal.gather(range(clients))["cost"]
        found = [rule(shared, {"cost": cost[k]}, batch | {"x": x[k]}).numpy() for k in range(clients)]
        return np.broadcast_to(np.stack(found).reshape(clients, -1, points, classes), self.problem.joint.shape)


def pairs_of(shared, personal, problem):
    clients = len(problem.joint)
    own = personal.gather(range(clients))["dual"] * torch.from_numpy(problem.share)[:, None, None, None]
    both = torch.cat([shared[:, None], own.swapaxes(0, 1)], 1)
    return both.flatten(2).numpy()


def prepare(fed, model, notion, at_large, at_home, classes, groups, temperature, gap, bound, smoothing="log-sum-exp"):
    settings = {"model": model, "num_classes": classes, "num_groups": groups, "notion": NOTIONS[notion]}
    calibrate = Calibrate(
        **settings, local_tolerance=at_home, temperature=temperature, bound=bound, smoothing=smoothing
    )
    clients = {"measure": Measure(**settings), "calibrate": calibrate}
    strategy = FedFactPost(
        classes, groups, fed.num_clients, NOTIONS[notion], at_large, temperature=temperature, gap=gap, bound=bound
    )
    return strategy, clients


def play(strategy, engine, clients, model, number, num_clients, each=None):
    """The rounds, at most so many, and the snapshot after them; `each` is called after every round."""
    snapshot, done = begin(strategy, model.params, clients, num_clients), []
    for step in rounds(strategy, engine, everyone(num_clients), snapshot):
        done.append(step)
        if each:
            each(step)
        if step.snapshot.round == number:
            break
    return done


@cache
def calibrated(
    name, notion, at_large=0.02, at_home=0.05, temperature=0.1, gap=1e-5, bound=5.0, aware=True, number=3000
):
    """A run on one of JOINTS."""
    joint, size = JOINTS[name]
    fed, model = federation(joint, size, aware)
    clients, groups, _, classes = joint.shape
    strategy, bodies = prepare(fed, model, notion, at_large, at_home, classes, groups, temperature, gap, bound)
    done = play(strategy, Sequential(fed, bodies), bodies, model, number, clients)
    tolerances = tuple(INFINITE if t is None else t for t in (at_large, *[at_home] * clients))
    problem = Problem(joint, notion, tolerances, temperature, aware)
    return Outcome(done[-1].snapshot, done, strategy, bodies["calibrate"], problem)


def linear_program(problem):
    at_large, at_home = problem.tolerances[0], problem.tolerances[1]
    return optimum(problem.joint, NOTIONS[problem.notion], at_large, at_home, aware=problem.aware).accuracy


def assert_optimal(outcome, near=1e-6):
    """The soft optimum: its dual value, deviations within tolerances, an accuracy as near to the best as it can be."""
    problem = outcome.problem
    assert outcome.problem.objective(outcome.pairs) == pytest.approx(problem.objective(problem.best), abs=near)
    soft, _ = problem.classifier(outcome.pairs[0] - outcome.pairs[1])
    held = outcome.classifier()
    np.testing.assert_allclose(held[problem.joint.sum(3) > 0], soft[problem.joint.sum(3) > 0], atol=1e-9)
    apart = np.abs(problem.deviations(held)).max(1)
    assert (apart <= np.array(problem.tolerances) + 5e-4).all(), apart
    best = linear_program(problem)
    assert best - problem.temperature * np.log(held.shape[-1]) <= problem.accuracy(held) <= best + 1e-3


# 1. The canonical joint distribution, of which every number is known.

SOFT = [
    ("DP", 0.1, 0.52593, 0.57771593),
    ("EOP", 0.1, 0.56149, None),
    ("EO", 0.1, 0.55636, 0.60519883),
    ("DP", 0.02, 0.53906, 0.54561826),
    pytest.param("EOP", 0.02, 0.57853, None, marks=pytest.mark.slow),
    pytest.param("EO", 0.02, 0.56820, 0.57416306, marks=pytest.mark.slow),  # slow to converge: 1768 rounds
]


@pytest.mark.parametrize(("notion", "temperature", "accuracy", "minimum"), SOFT)
def test_calibration_ends_at_the_soft_optimum(notion, temperature, accuracy, minimum):
    outcome = calibrated("canonical", notion, temperature=temperature)
    assert_optimal(outcome)
    assert outcome.problem.accuracy(outcome.classifier()) == pytest.approx(accuracy, abs=1e-5)
    if minimum:
        assert outcome.problem.objective(outcome.pairs) == pytest.approx(minimum, abs=1e-6)
    assert linear_program(outcome.problem) == pytest.approx({"DP": 0.539434, "EOP": 0.579033, "EO": 0.568886}[notion])


SCOPES = [
    ("canonical", "DP", 0.02, None, True),
    ("canonical", "EO", None, 0.05, True),
    ("canonical", "DP", 0.0, 0.0, True),
    ("canonical", "DP", 0.05, 0.1, False),
    ("canonical", "EOP", 0.05, None, False),
    ("a group is absent", "DP", 0.01, 0.02, True),
    pytest.param("a group is absent", "EO", 0.01, 0.02, True, marks=pytest.mark.slow),
    pytest.param("labels are absent", "EO", 0.01, 0.02, True, marks=pytest.mark.slow),
    ("labels are absent", "EOP", 0.02, 0.0, True),
    ("one group", "EO", 0.0, 0.0, True),
    ("one label in use", "EO", 0.0, 0.0, True),
    ("one class", "EOP", 0.0, 0.0, True),
]


@pytest.mark.parametrize(("name", "notion", "at_large", "at_home", "aware"), SCOPES)
def test_so_it_does_with_either_kind_of_constraint_and_where_nobody_is_compared(name, notion, at_large, at_home, aware):
    assert_optimal(calibrated(name, notion, at_large, at_home, gap=1e-4, aware=aware), 1e-4)


def test_what_local_constraints_ask_of_the_only_client_the_global_ones_ask_already():
    both, alone = (calibrated("central", "DP", 0.02, at_home) for at_home in (0.05, None))
    assert_optimal(both)
    assert linear_program(both.problem) == pytest.approx(0.54, abs=1e-6)
    for outcome in (both, alone):
        assert not outcome.pairs[:, 1].any()
    assert both.problem.objective(both.pairs) == pytest.approx(alone.problem.objective(alone.pairs), abs=1e-6)


@pytest.mark.parametrize("loose", [None, 1.0])
def test_without_tolerances_multipliers_stay_zero_and_it_predicts_what_the_model_does(loose):
    outcome = calibrated("canonical", "EO", loose, loose)
    assert len(outcome.rounds) == 2  # to measure, and to see that there is nothing to do
    assert not outcome.pairs.any()
    sharp = outcome.classifier(randomised=False)
    own = outcome.problem.joint.argmax(-1)[..., None] == np.arange(3)
    assert outcome.problem.accuracy(sharp) == pytest.approx(0.6255, abs=1e-9)
    assert (sharp == own).all()


def test_where_groups_are_alike_at_every_client_local_parity_costs_nothing():
    outcome = calibrated("alike", "DP", None, 0.0, 0.02)
    assert linear_program(outcome.problem) == pytest.approx(0.6205, abs=1e-9)
    assert np.abs(outcome.pairs).max() < 1e-9
    assert outcome.problem.accuracy(outcome.classifier(randomised=False)) == pytest.approx(0.6205, abs=1e-9)


def test_evaluation_counts_what_the_classifier_does():
    fed, model = federation(canonical_table(), 4000, labelled=True)
    strategy, clients = prepare(fed, model, "DP", 0.02, 0.05, 3, 2, 0.1, 0.0, 5.0)
    settings = {"model": model, "num_classes": 3, "num_groups": 2, "part": "train"}
    clients["evaluate"] = Evaluate(**settings, classifier=Calibrated(model, 3, 2, True, 0.1))
    engine = Vectorised(fed, clients)
    snapshot = play(strategy, engine, clients, model, 20, 2)[-1].snapshot
    found = evaluate(
        engine, strategy.shared(snapshot.state), Cohort([0, 1], snapshot.personal.gather([0, 1])), 1, "stack"
    )
    same = calibrated("canonical", "DP", gap=0.0, number=20)  # on 200 examples of which nobody knows the label
    held = same.classifier()
    apart = np.abs(same.problem.deviations(held)).max(1)
    assert found.pooled["accuracy"] == pytest.approx(same.problem.accuracy(held), abs=1e-9)
    assert found.pooled["demographic_parity_deviation"] == pytest.approx(apart[0], abs=1e-9)
    np.testing.assert_allclose(found.clients["demographic_parity_deviation"], apart[1:], atol=1e-9)


# 2. The duality gap.


def test_the_gap_bounds_what_is_missing_from_the_optimum_and_what_is_too_much_of_a_deviation():
    fed, model = federation(*JOINTS["canonical"])
    strategy, clients = prepare(fed, model, "DP", 0.02, 0.05, 3, 2, 0.1, 1e-4, 5.0)
    problem = Problem(JOINTS["canonical"][0], "DP", (0.02, 0.05, 0.05), 0.1)
    best = problem.objective(problem.best)
    left = 5.0 - problem.best.sum((0, 2)) / np.concatenate([[1], problem.share])  # of the bounds, at the optimum
    assert (left > 3).all()
    asked, gaps = [strategy.init(model.params)], []

    def check(step):
        before, state = asked[0], step.snapshot.state
        asked[0] = state
        if step.snapshot.round == 1:
            return
        pairs = pairs_of(before["ahead"], step.snapshot.personal, problem)  # where the round was
        gap = step.metrics["duality_gap"]
        missing = problem.objective(pairs) - best
        apart = np.abs(problem.deviations(problem.classifier(pairs[0] - pairs[1])[0])).max(1)
        excess = np.maximum(apart - np.array(problem.tolerances), 0) * np.concatenate([[1], problem.share])
        assert -1e-12 <= missing <= gap + 1e-12
        assert (left * excess).sum() <= gap + 1e-12
        assert gap == pytest.approx(float(state["gap"]), abs=1e-15)
        assert step.metrics["deviation"] == pytest.approx(apart[0], abs=1e-12)
        assert step.metrics["multipliers"] == pytest.approx(float(before["ahead"].sum()), abs=1e-12)
        gaps.append(gap)

    done = play(strategy, Sequential(fed, clients), clients, model, 400, 2, check)
    assert gaps[0] > 0.1 and gaps[-1] <= 1e-4  # it said much, and was small in the end
    assert [step.done for step in done] == [False] * (len(done) - 1) + [True]
    assert torch.equal(asked[0]["ahead"], done[-1].snapshot.state["ahead"])
    assert min(gaps[:-1]) > 1e-4


def test_with_a_gap_of_zero_it_goes_on():
    outcome = calibrated("canonical", "DP", gap=0.0, number=20)
    assert len(outcome.rounds) == 20 and not outcome.rounds[-1].done


def test_a_bound_that_is_too_small_leaves_it_unfair_at_the_optimum_within_the_bound():
    for bound, apart in ((0.05, 0.212), (0.2, 0.200), (0.5, 0.198), (5.0, 0.010)):
        outcome = calibrated("central", "DP", 0.01, None, 0.02, 1e-6, bound, aware=False)
        found = np.abs(outcome.problem.deviations(outcome.classifier())).max()
        assert found == pytest.approx(apart, abs=5e-4)
        assert outcome.pairs.sum() == pytest.approx(min(bound, 0.98), abs=5e-3)
        assert outcome.rounds[-1].done
        for step in outcome.rounds[1:]:
            assert step.metrics["duality_gap"] >= -1e-12 and step.metrics["multipliers"] <= bound + 1e-12


# 3. Models of group and label together, which need not know the group (OptFair), at one client.

BLIND = [
    ("central", "DP", 0.05, 0.48599, 0.48628),
    ("central", "DP", 0.01, 0.44862, 0.44963),
    ("central", "EOP", 0.05, 0.44505, 0.44788),
    ("central", "EOP", 0.01, 0.38268, 0.38467),
    ("central", "EO", 0.05, 0.44482, 0.44631),
    ("central", "EO", 0.01, 0.37952, 0.38173),
    ("four", "DP", 0.05, 0.45969, 0.46109),
    pytest.param("four", "DP", 0.01, 0.43477, 0.43524, marks=pytest.mark.slow),
    pytest.param("four", "EOP", 0.05, 0.44679, 0.44783, marks=pytest.mark.slow),
    pytest.param("four", "EOP", 0.01, 0.42107, 0.42168, marks=pytest.mark.slow),
    pytest.param("four", "EO", 0.05, 0.43990, 0.44024, marks=pytest.mark.slow),
    pytest.param("four", "EO", 0.01, 0.37281, 0.37329, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "notion", "tolerance", "accuracy", "best"), BLIND)
def test_who_does_not_see_the_group_is_as_fair_and_nearly_as_accurate_as_can_be(
    name, notion, tolerance, accuracy, best
):
    outcome = calibrated(name, notion, tolerance, None, 0.02, 1e-4, 100.0, aware=False)
    held = outcome.classifier()
    assert (held == held[:, :1]).all()  # whatever the group
    assert outcome.problem.accuracy(held) == pytest.approx(accuracy, abs=1e-4)
    assert linear_program(outcome.problem) == pytest.approx(best, abs=1e-4)
    assert np.abs(outcome.problem.deviations(held)[0]).max() == pytest.approx(tolerance, abs=5e-5)
    assert outcome.pairs.sum() < 5


def test_the_looser_the_tolerance_the_better_and_the_less_so_the_looser_it_is():
    tolerances = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3)
    found = [calibrated("central", "DP", t, None, 0.02, 1e-4, aware=False) for t in tolerances]
    accuracies = [outcome.problem.accuracy(outcome.classifier()) for outcome in found]
    np.testing.assert_allclose(accuracies, (0.43884, 0.44862, 0.45811, 0.48599, 0.53198, 0.61846, 0.61924), atol=1e-4)
    values = np.array([outcome.problem.objective(outcome.pairs) for outcome in found])
    slopes = np.diff(values) / np.diff(tolerances)
    assert (slopes >= 0).all() and (np.diff(slopes) <= 1e-6).all() and slopes[0] > 0.9
    loosest = found[-1]  # above what the soft classifier itself deviates by
    assert not loosest.pairs.any() and np.abs(loosest.problem.deviations(loosest.classifier())).max() < 0.3


# 4. What travels.


class Listening(Sequential):
    """Remembers what was said."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        object.__setattr__(self, "heard", [])

    def execute(self, task, cohort):
        replies = super().execute(task, cohort)
        self.heard.append((task, replies))
        return replies


@pytest.mark.parametrize(("notion", "rates"), [("DP", 3), ("EOP", 3), ("EO", 9)])
def test_nothing_travels_but_the_model_the_moments_and_then_numbers_for_each_group_and_rate(notion, rates):
    fed, model = federation(*JOINTS["canonical"])
    strategy, clients = prepare(fed, model, notion, 0.02, 0.05, 3, 2, 0.1, 0.0, 5.0)
    engine = Listening(fed, clients)
    done = play(strategy, engine, clients, model, 6, 2)

    def shape(part):
        return {name: tuple(leaf.shape) for name, leaf in tree.flatten(part).items()}

    shapes = [(shape(task.shared), shape(replies.update)) for task, replies in engine.heard]
    pair = (2, rates)
    assert shapes[0] == ({"params/weight": (3, 16)}, {"among": pair, "second": pair + pair})
    assert shapes[1:] == [({"price": pair}, {"taken": pair, "among": pair})] * 5
    assert [task.action for task, _ in engine.heard] == ["measure"] + ["calibrate"] * 5
    assert [set(r.metrics) for _, r in engine.heard] == [set()] + [{"duality_gap"}] * 5
    number = 2 * rates
    for step in done[1:]:
        assert step.traffic.down == 2 * 8 * number
        assert step.traffic.up == 2 * 8 * (2 * number + 2)  # and the weight and the gap
    assert done[-1].snapshot.personal.gather([0, 1])["dual"].any()  # of which nothing travelled


def test_the_steps_follow_from_the_curvature():
    expected = {
        "DP": (51.01010101, (108.333, 138.095)),
        "EOP": (121.99197595, (222.294, 522.623)),
        "EO": (200.00772285, (376.345, 633.559)),
    }
    for notion, (at_large, at_home) in expected.items():
        snapshot = calibrated("canonical", notion, temperature=0.02, number=1).snapshot
        assert float(snapshot.state["curvature"]) / 0.04 == pytest.approx(at_large, abs=1e-6)
        own = snapshot.personal.gather([0, 1])["curvature"] / 0.04
        share = [0.5, 0.5]  # the reference's multipliers are the client's times its share
        np.testing.assert_allclose(own / torch.tensor(share), at_home, atol=1e-3)


# 5. Clients that are not there.


def some(joint, seats):
    """A federation in which some of the joint's clients have no examples."""
    fed, model = federation(*joint)
    bounds = fed.bounds.copy()
    bounds[seats, 1:] = bounds[seats, :1]
    return Federation(fed.columns, fed.rows, bounds), model


def final(fed, model, engine=Sequential, number=40, **changed):
    """What a short run on the canonical joint comes to, as named tensors; `changed` are other clients."""
    strategy, clients = prepare(fed, model, "DP", 0.02, 0.05, 3, 2, 0.1, 0.0, 5.0)
    clients |= {action: make(**vars_of(clients[action])) for action, make in changed.items()}
    with engine(fed, clients, 0) as runner:
        done = play(strategy, runner, clients, model, number, fed.num_clients)
    return done, tree.flatten(done[-1].snapshot.state) | done[-1].snapshot.personal.flat()


def vars_of(client):
    return {name: getattr(client, name) for name in client.__dataclass_fields__}


def test_a_client_without_examples_changes_nothing():
    fed, model = federation(*JOINTS["canonical"])
    bounds = np.insert(fed.bounds, 1, 0, axis=0)
    _, with_it = final(Federation(fed.columns, fed.rows, bounds), model)
    _, without_it = final(fed, model)
    for name in ("dual", "ahead", "among", "gap"):
        assert torch.equal(with_it[name], without_it[name]), name
    assert not with_it["rows/dual"][1].any() and torch.isfinite(with_it["rows/cost"]).all()
    assert torch.equal(with_it["rows/dual"][[0, 2]], without_it["rows/dual"])


class Broken(Measure):
    """Cannot measure where group 0 is the larger one, which is at client 0 of the canonical joint."""

    def start(self, shared, personal, data):
        if data["a"].double().mean() < 0.5:
            raise ArithmeticError("it cannot")
        return super().start(shared, personal, data)


def test_a_client_that_cannot_measure_is_left_out_and_the_others_go_on():
    fed, model = federation(*JOINTS["canonical"])
    done, found = final(fed, model, measure=Broken)
    assert done[0].failed.keys() == {0} and "it cannot" in done[0].failed[0]
    assert all(not step.failed and step.answered == 1 for step in done[1:])
    assert found["measured"].tolist() == [False, True]
    _, alone = final(*some(JOINTS["canonical"], [0]))
    for name in ("dual", "ahead", "among", "gap", "curvature"):
        torch.testing.assert_close(found[name], alone[name], rtol=1e-12, atol=1e-14)
    assert found["dual"].any()


def losing(lost):
    """An engine that in some rounds hears nothing of client 0."""

    class Losing(Sequential):
        def execute(self, task, cohort):
            if task.round not in lost or 0 not in cohort.ids:
                return super().execute(task, cohort)
            there = [place for place, client in enumerate(cohort.ids) if client != 0]
            return super().execute(task, pick(cohort, there))._replace(failed={0: "it is gone"})

    return Losing


def interrupted(lost):
    fed, model = federation(*JOINTS["canonical"])
    strategy, clients = prepare(fed, model, "DP", 0.02, 0.05, 3, 2, 0.1, 1e-4, 5.0)
    done = play(strategy, losing(lost)(fed, clients), clients, model, 200, 2)
    problem = Problem(canonical_table(), "DP", (0.02, 0.05, 0.05), 0.1)
    return Outcome(done[-1].snapshot, done, strategy, clients["calibrate"], problem)


def test_a_client_that_is_gone_for_a_moment_costs_no_more_than_time():
    outcome = interrupted([30, 60])
    assert outcome.rounds[-1].done and [step.snapshot.round for step in outcome.rounds if step.failed] == [30, 60]
    assert_optimal(outcome)


def test_after_a_client_is_gone_for_good_the_others_are_fair_among_themselves_and_it_does_not_claim_to_be_done():
    outcome = interrupted(range(30, 1000))
    assert len(outcome.rounds) == 200 and outcome.rounds[-1].metrics["duality_gap"] == INFINITE
    alone = Problem(without(canonical_table(), 0), "DP", outcome.problem.tolerances, 0.1)
    assert np.abs(alone.deviations(outcome.classifier())).max() <= 0.02 + 1e-4
    assert outcome.rounds[-1].metrics["multipliers"] < 1


# 6. Engines.


def test_all_clients_at_once_are_what_one_after_another_are():
    for joint in ("canonical", "a group is absent"):
        fed, model = federation(*JOINTS[joint])
        alone, together = final(fed, model)[1], final(fed, model, Vectorised)[1]
        assert alone.keys() == together.keys()
        for name, leaf in alone.items():
            torch.testing.assert_close(leaf, together[name], rtol=0, atol=1e-10, msg=lambda text, n=name: n + text)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning")  # Ray's daemons, till the end
@pytest.mark.filterwarnings("ignore:unclosed file .*/dev/null:ResourceWarning")  # theirs, too
def test_any_number_of_workers_gives_the_same_bits():
    import ray

    from fedsim.engines.ray import Ray

    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    try:
        fed, model = federation(*JOINTS["labels are absent"])
        here = final(fed, model, number=6)[1]
        for workers in (1, 2):

            def engine(*arguments, workers=workers):
                return Ray(*arguments, workers=workers, cpus=0.5, inner="sequential")

            there = final(fed, model, engine, 6)[1]
            assert here.keys() == there.keys()
            assert all(torch.equal(leaf, there[name]) for name, leaf in here.items()), workers
    finally:
        ray.shutdown()


def test_the_strategy_is_pure_in_every_phase():
    fed, model = federation(*JOINTS["canonical"])
    strategy, clients = prepare(fed, model, "EO", 0.02, 0.05, 3, 2, 0.1, 0.0, 5.0)
    engine = Listening(fed, clients)
    done = play(strategy, engine, clients, model, 3, 2)
    check_strategy(strategy, model.params, engine.heard[0][1])  # measures

    class Midway(FedFactPost):
        def init(self, params):
            return done[1].snapshot.state

    check_strategy(Midway(**vars_of(strategy)), model.params, engine.heard[2][1])  # calibrates
    trained = engine.heard[0][1]._replace(update={"params": tree.map(torch.zeros_like, model.params)})
    check_strategy(FedFactPost(3, 2, 2, training=1), model.params, trained)


# 7. Where the model comes from.


def sample(examples=300, dtype=torch.float32, outputs=3):
    """Three clients with two numbers and a group, and a small network."""
    columns = gaussian_task(examples, 3).columns
    order = columns["client"].argsort(stable=True)
    end = columns["client"].bincount().cumsum(0).numpy()
    bounds = np.stack([np.concatenate([[0], end[:-1]]), end, end, end], axis=1)
    chosen = {name: columns[name][order] for name in ("x", "y", "a")}
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, outputs)).to(dtype)
    return Federation(chosen | {"x": chosen["x"].to(dtype)}, np.arange(examples), bounds), Model(module)


def test_it_trains_first_as_federated_averaging_does_then_measures_and_calibrates_that_model():
    fed, model = sample()
    _, clients = prepare(fed, model, "DP", 0.02, 0.05, 3, 2, 0.1, 0.0, 5.0)
    clients["train"] = Sgd(model=model, lr=0.1, batch_size=16)
    strategy = FedFactPost(3, 2, 3, "demographic parity", 0.02, temperature=0.1, training=4)
    engine = Listening(fed, clients)
    done = play(strategy, engine, clients, model, 7, 3)
    assert [task.action for task, _ in engine.heard] == ["train"] * 4 + ["measure"] + ["calibrate"] * 2
    averaged = play(FedAvg(), engine, clients, model, 4, 3)[-1].snapshot.state["params"]
    kept = done[-1].snapshot.personal.gather([0, 1, 2])["params"]
    for name, leaf in averaged.items():
        assert torch.equal(done[-1].snapshot.state["params"][name], leaf)
        assert all(torch.equal(own, leaf) for own in kept[name])
        assert not torch.equal(leaf, model.params[name])
    assert not done[3].snapshot.state["measured"].any() and done[-1].snapshot.state["ahead"].any()


def save(folder, params, seed, round=3):
    """A run that ended with this model."""
    run = Run.create(folder, "fedavg", seed, "", {})
    run.save(Snapshot(round, {"params": params}, Personal({}, 3, seed)), "all")
    return run.path


def strategy_from(path, **settings):
    return FedFactPost(3, 2, 3, from_run=path, **settings)


def test_the_model_may_come_from_another_run_or_from_the_one_with_the_same_seed(tmp_path):
    _, model = sample()
    paths = [save(tmp_path, tree.map(lambda leaf, s=s: torch.full_like(leaf, s), model.params), s) for s in (1, 2, 12)]
    for path, seed, expected in ((paths[0], 2, 1), (tmp_path / "fedavg", 2, 2), (tmp_path / "fedavg", 12, 12)):
        found = strategy_from(path, seed=seed).init(model.params)["params"]
        assert found.keys() == model.params.keys()
        assert all((leaf == expected).all() for leaf in found.values())
    save(tmp_path, tree.map(torch.zeros_like, model.params), 2)  # a later one
    later = strategy_from(tmp_path / "fedavg", seed=2).init(model.params)["params"]
    assert not any(leaf.any() for leaf in later.values())


def test_it_is_measured_from_the_first_round_on(tmp_path):
    fed, model = sample()
    trained = tree.map(lambda leaf: leaf + 0.5, model.params)
    _, clients = prepare(fed, model, "DP", 0.02, 0.05, 3, 2, 0.02, 0.0, 5.0)
    done = play(strategy_from(save(tmp_path, trained, 0)), Sequential(fed, clients), clients, model, 2, 3)
    kept = done[-1].snapshot.personal.gather([0, 1, 2])["params"]
    assert all(torch.equal(kept[name][k], leaf) for name, leaf in trained.items() for k in range(3))


def test_what_is_no_run_or_another_model_is_refused_and_so_is_to_train_as_well(tmp_path):
    _, model = sample()
    run = save(tmp_path, model.params, 1)
    with pytest.raises(FileNotFoundError, match="nowhere is no run, nor does it hold one with the seed 0"):
        strategy_from(tmp_path / "nowhere").init(model.params)
    with pytest.raises(FileNotFoundError, match="fedavg is no run, nor does it hold one with the seed 7"):
        strategy_from(tmp_path / "fedavg", seed=7).init(model.params)
    _, blind = sample(outputs=6)
    with pytest.raises(ValueError, match=r"the model of .*-1 does not fit: 2\.bias has shape \(3,\), expected \(6,\)"):
        strategy_from(run).init(blind.params)
    with pytest.raises(ValueError, match="training = 2 and from_run = '.*-1': there can be one only"):
        strategy_from(run, training=2)
    bare = Run.create(tmp_path, "bare", 0, "", {}).path
    with pytest.raises(FileNotFoundError, match="has no checkpoint to take a model from"):
        strategy_from(bare).init(model.params)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"global_tolerance": -0.1}, "global_tolerance"),
        ({"bound": 0.0}, "bound"),
        ({"temperature": 0.0}, "temperature"),
        ({"gap": -1.0}, "gap"),
        ({"notion": "fairness"}, "notion must be one of"),
    ],
)
def test_settings_out_of_range_are_refused(settings, told):
    with pytest.raises(ValueError, match=told):
        FedFactPost(3, 2, 3, **settings)
