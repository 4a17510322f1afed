"""FedFACT after training on finite joint distributions, and a solver that sees all clients' data at once.

On a finite joint distribution with its exact scores, calibration has one right answer at a temperature: the soft
optimum. `Problem` writes its dual down in another way than the method does, from the definitions of the constraints.
"""

from dataclasses import dataclass
from functools import cache, cached_property
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import logsumexp, softmax
from torch import nn

from clients.fedfact_post import Calibrate, Calibrated, Measure
from fedsim.data.federation import Federation
from fedsim.data.generated import canonical_table, random_joint
from fedsim.engines.local import Sequential
from fedsim.fairness import optimum
from fedsim.model import Model
from fedsim.sampling import everyone
from fedsim.simulation import Snapshot, begin, rounds
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


def faint(name, cell, expected, axes=(3,)):
    """One of JOINTS with that many examples expected in a cell, the others along the axes having the rest."""
    joint, size = JOINTS[name]
    there = np.zeros_like(joint)
    there[cell] = 1
    part, whole_of_it = joint * there, joint.sum(axes, keepdims=True)
    kept = part * expected / (size * part.sum())
    others = joint - part
    grown = (whole_of_it - kept.sum(axes, keepdims=True)) / (whole_of_it - part.sum(axes, keepdims=True))
    return kept + others * grown, size


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
for expected in (0.0, 2e-4, 0.95, 1.05):
    JOINTS |= {
        f"a label, {expected}": faint("central", np.s_[0, 0, :, 2], expected),
        f"a label of the first, {expected}": faint("canonical", np.s_[0, 0, :, 0], expected),
        f"a group, {expected}": faint("four", np.s_[0, 2], expected, (1, 3)),
    }
JOINTS |= {f"a label of all, {expected}": faint("canonical", np.s_[:, 0, :, 0], expected) for expected in (0.8, 1.2)}


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
    compared: np.ndarray | None = None  # the joint without the cells that are left out of all rates

    @cached_property
    def share(self):
        """P(client), (N,)."""
        return self.joint.sum((1, 2, 3))

    @cached_property
    def rows(self):
        """(1 + N, G V, N, G, X, K)."""
        joint = self.joint if self.compared is None else self.compared
        scopes = [constraints(joint, self.notion)]
        for client in range(len(joint)):
            part = np.zeros_like(joint)
            part[client] = joint[client]
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

    @property
    def limit(self):
        """The accuracy of the best classifier within the tolerances, by the linear program."""
        at_large, at_home = self.tolerances[0], self.tolerances[1]
        return optimum(self.joint, NOTIONS[self.notion], at_large, at_home, aware=self.aware).accuracy

    def pairs(self, shared, personal):
        """Multipliers as they are here, (2, 1 + N, G V): those of client k times its share."""
        own = personal.gather(range(len(self.joint)))["dual"] * torch.from_numpy(self.share)[:, None, None, None]
        return torch.cat([shared[:, None], own.swapaxes(0, 1)], 1).flatten(2).numpy()


class Outcome(NamedTuple):
    """What a run came to."""

    snapshot: Snapshot
    rounds: list[Any]
    strategy: FedFactPost
    calibrate: Calibrate
    problem: Problem

    @property
    def pairs(self):
        """The multipliers, as Problem has them."""
        return self.problem.pairs(self.snapshot.state["ahead"], self.snapshot.personal)

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

    def assert_optimal(self, near=1e-6):
        """The soft optimum: its value, deviations within tolerances, an accuracy as near to the best as it can be."""
        problem, there = self.problem, self.problem.joint.sum(3) > 0
        assert problem.objective(self.pairs) == pytest.approx(problem.objective(problem.best), abs=near)
        soft, _ = problem.classifier(self.pairs[0] - self.pairs[1])
        held = self.classifier()
        np.testing.assert_allclose(held[there], soft[there], atol=1e-9)
        apart = np.abs(problem.deviations(held)).max(1)
        assert (apart <= np.array(problem.tolerances) + 5e-4).all(), apart
        lowest = problem.limit - problem.temperature * np.log(held.shape[-1])
        assert lowest <= problem.accuracy(held) <= problem.limit + 1e-3


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


class Listening(Sequential):
    """Remembers what was said."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        object.__setattr__(self, "heard", [])

    def execute(self, task, cohort):
        replies = super().execute(task, cohort)
        self.heard.append((task, replies))
        return replies


@pytest.fixture(scope="session")
def finite():
    """Everything above that tests ask for."""
    return SimpleNamespace(
        joints=JOINTS, federation=federation, prepare=prepare, play=play, calibrated=calibrated, whole=whole,
        without=without, Problem=Problem, Outcome=Outcome, Listening=Listening,
    )  # fmt: skip
