"""Multipliers that rise where rates deviate find what the linear program finds, and nothing better is to be had."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from scipy.optimize import linprog, minimize
from scipy.special import logsumexp, softmax
from torch import Tensor

from fedsim.fairness import accelerated, ascend, belonging, curvature, slackness

INFINITY = float("inf")
NOTIONS = ["DP", "EOP", "EO"]


# The dual problem


@pytest.mark.parametrize("aware", [False, True])
@pytest.mark.parametrize("personal", [False, True])
@pytest.mark.parametrize("notion", NOTIONS)
@pytest.mark.parametrize("name", ["canonical", "R1"])
def test_the_best_multipliers_charge_down_to_the_best_accuracy(problem, name, notion, personal, aware):
    case = problem(name, notion, 0.02, 0.05, aware, personal)
    slope = case.slope.flatten(0, 2).numpy()  # (cells, K, multipliers)
    cells, classes, _ = slope.shape
    # min sum_c t_c + sum_u tolerance_u (z+_u + z-_u)   where t_c is at least the worth of each decision in cell c
    charge = case.charge.flatten().numpy()
    rows = [np.concatenate([-np.eye(cells), slope[:, j], -slope[:, j]], 1) for j in range(classes)]
    found = linprog(
        np.concatenate([np.ones(cells), charge, charge]),
        A_ub=np.concatenate(rows),
        b_ub=-case.rewards(case.none).flatten(0, 2).T.flatten().numpy(),
        bounds=[(None, None)] * cells + [(0, None)] * (2 * charge.size),
    )
    assert found.fun == pytest.approx(case.best, abs=1e-6)
    for seed in range(20):  # no multipliers charge further down
        z = 0.05 * seed * torch.from_numpy(np.random.default_rng(seed).normal(size=case.none.shape))
        assert case.rewards(z).amax(-1).sum() + (case.charge * z.abs()).sum() >= case.best - 1e-9


def test_decisions_lose_by_a_multiplier_what_they_deviate(problem):
    for notion in NOTIONS:
        case = problem("R1", notion, 0.02, 0.05)
        slope = case.slope.flatten(0, 3).T  # (multipliers, classifier)
        weighted = case.effect * case.share[:, None, None, None]
        torch.testing.assert_close(slope, -weighted.flatten(0, 2), rtol=0, atol=1e-12)


def softened(case, temperature: float) -> tuple[Tensor, float]:
    """The classifier at the best multipliers for a temperature, and the value of the smooth dual problem there."""
    weight, base = (part.flatten(0, 2).numpy() for part in (case.weight, case.rewards(case.none)))  # (cells, ...)
    slope, charge = case.slope.flatten(0, 3).numpy(), case.charge.flatten().numpy()
    size = charge.size
    most = torch.where(case.tolerance.isinf(), 0.0, INFINITY)[:, None, None].expand(case.none.shape).flatten().tolist()

    def worth(pair):
        return (base + (slope @ (pair[:size] - pair[size:])).reshape(base.shape)) / (weight * temperature)

    def value(pair):
        found = worth(pair)
        smooth = temperature * (weight * logsumexp(found, -1, keepdims=True)).sum()
        steep = softmax(found, -1).ravel() @ slope
        return smooth + charge @ (pair[:size] + pair[size:]), np.concatenate([charge + steep, charge - steep])

    pair = np.zeros(2 * size)
    for _ in range(5):  # it may get stuck, which a new start mends
        found = minimize(
            value,
            pair,
            jac=True,
            method="L-BFGS-B",
            bounds=[(0, limit) for limit in most * 2],
            options={"maxiter": 5000, "maxfun": 10000, "ftol": 1e-16, "gtol": 1e-9, "maxcor": 30},
        )
        pair = found.x
        if np.abs(pair - (pair - found.jac).clip(0, most * 2)).max() < 1e-7:
            break
    return torch.from_numpy(softmax(worth(pair), -1)).reshape(case.rewards(case.none).shape), float(found.fun)


def entropy(case, classifier: Tensor) -> float:
    """Of its decisions, on average."""
    return float((case.weight * torch.special.entr(classifier)).sum())


@pytest.mark.parametrize("notion", NOTIONS)
@pytest.mark.parametrize("name", ["canonical", "R1", "R5"])
def test_soft_decisions_are_fair_exactly_and_almost_the_best(problem, name, notion):
    case = problem(name, notion, 0.02, 0.05, aware=True)
    for temperature in (0.1, 0.02):
        classifier, value = softened(case, temperature)
        accuracy = case.accuracy(classifier)
        assert case.excess(classifier) <= 4e-7
        assert value == pytest.approx(accuracy + temperature * entropy(case, classifier), abs=4e-7)
        assert -4e-7 <= case.best - accuracy <= temperature * np.log(3)


def test_how_much_softness_costs(problem):
    case = problem("canonical", "DP", 0.02, 0.05, aware=True)
    lost = [case.best - case.accuracy(softened(case, temperature)[0]) for temperature in (0.1, 0.02, 0.005)]
    assert lost == pytest.approx([0.0135, 0.0004, 0], abs=5e-5)
    for notion, values in {"DP": (0.57771593, 0.54561826), "EO": (0.60519883, 0.57416306)}.items():
        case = problem("canonical", notion, 0.02, 0.05, aware=True)
        assert [softened(case, each)[1] for each in (0.1, 0.02)] == pytest.approx(values, abs=1e-7)


@pytest.mark.parametrize(("bound", "deviation"), [(0.05, 0.212), (0.2, 0.200), (0.5, 0.198), (5.0, 0.010)])
def test_a_bound_that_is_too_small_lets_so_much_unfairness_pass(problem, bound, deviation):
    case, temperature = problem("canonical", "DP", 0.01, INFINITY, personal=False), 0.02
    weight = case.weight.flatten()
    scores = case.joint.sum(0).transpose(0, 1) / weight[:, None, None]  # P(group, label | x), (X, G, K)
    belongs = belonging(case.events, scores)
    second = torch.einsum("x,xgv,xhw->gvhw", weight, belongs, belongs)
    step = temperature / curvature(case.events, second, torch.einsum("x,xgv->gv", weight, belongs))
    base, slope = case.rewards(case.none), case.slope[..., : case.none[0].numel()]

    def response(dual: Tensor) -> Tensor:
        return ((base + slope @ (dual[0] - dual[1]).flatten()) / (case.weight * temperature)).softmax(-1)

    dual = ahead = torch.stack([case.none[0]] * 2)
    momentum = torch.ones((), dtype=torch.float64)
    for _ in range(1000):
        assert ahead.sum() <= bound + 1e-12  # beyond the bound `slackness` would not be the duality gap
        new = ascend(ahead, case.effect[0] @ response(ahead).flatten(), 0.01, step, bound)
        dual, ahead, momentum = accelerated(dual, ahead, momentum, new, bound).values()
    classifier = response(dual)
    apart = case.apart(classifier)[0]
    assert float(apart.abs().max()) == pytest.approx(deviation, abs=1e-3)
    assert -1e-12 <= slackness(dual, apart, 0.01, bound) <= 1e-5  # no multipliers within the bound charge more
    excess = max(case.excess(classifier), 0.0)
    bayes = float(base.amax(-1).sum())
    assert excess <= (bayes + temperature * np.log(3) - softened(case, temperature)[1]) / bound + 1e-6
    if bound < 1:
        assert float(dual.sum()) == pytest.approx(bound) and excess > 0.1
    else:
        assert float(dual.sum()) == pytest.approx(0.98, abs=0.01) and excess < 1e-4


# The game: multipliers rise against the best response to them


class Played(NamedTuple):
    """How it went."""

    average: Tensor  # of all best responses: a randomised classifier
    apart: Tensor  # how each of them deviated, (T, 1 + N, G, V)
    dual: Tensor  # the multipliers after the last, (1 + N, 2, G, V)

    def late(self, case) -> Tensor:
        """By how much each of the last hundred exceeded the tolerance where it did most."""
        return (self.apart[-100:].abs().amax((2, 3)) - case.tolerance).amax(1)


STEP = 0.01  # on the multipliers of the whole problem


def play(case, rounds: int, sign: float = 1.0, tolerance: Tensor | None = None) -> Played:
    """Plays it, with this sign of the local term in the costs, and what is subtracted of deviations."""
    tolerance = case.tolerance if tolerance is None else tolerance
    base = case.rewards(case.none)
    slope = case.slope.unflatten(-1, case.none.shape).clone()
    slope[..., 1:, :, :] *= sign
    slope = slope.flatten(4)
    duals = list(torch.stack([case.none, case.none], 1))
    total, apart, every = torch.zeros_like(base), [], torch.arange(base.shape[-1])
    for _ in range(rounds):
        worth = base + slope @ torch.stack([dual[0] - dual[1] for dual in duals]).flatten()
        response = (worth.argmax(-1, keepdim=True) == every).to(base.dtype)
        total += response
        apart.append(case.effect @ response.flatten())
        steps = STEP / case.share
        duals = [ascend(*each, 5.0) for each in zip(duals, apart[-1], tolerance, steps, strict=True)]
    return Played(total / rounds, torch.stack(apart), torch.stack(duals))


def promised(case, played: Played) -> tuple[float, float]:
    """The least accuracy and the most excess that can come out where no bound is met."""
    slack = torch.stack([played.apart, -played.apart], 2) - case.tolerance[:, None, None, None]
    risen = played.dual.amax((1, 2, 3)) * case.share / (STEP * len(played.apart))
    return case.best - STEP / 2 * float(slack.square().sum((1, 2, 3, 4)).max()), float(risen.max())


@pytest.mark.parametrize("notion", NOTIONS)
@pytest.mark.parametrize("name", ["canonical", "R1"])
def test_the_average_of_best_responses_is_as_good_and_as_fair_as_promised(problem, name, notion):
    case = problem(name, notion, 0.05, 0.1)
    played = play(case, 1000)
    accuracy, excess = promised(case, played)
    assert case.accuracy(played.average) >= accuracy
    assert 0.01 < case.excess(played.average) <= excess + 1e-9
    assert played.dual.sum((1, 2, 3)).max() < 4.9  # no bound is met
    torch.testing.assert_close(played.apart.mean(0), case.apart(played.average), rtol=0, atol=1e-12)
    if (name, notion) == ("canonical", "DP"):
        assert case.excess(played.average) == pytest.approx(0.0288, abs=2e-4)


AVERAGES = {  # accuracy and excess after 20 000 rounds
    ("canonical", "DP"): (0.4940, 0.0020),
    ("canonical", "EOP"): (0.5286, 0.0023),
    ("canonical", "EO"): (0.4998, 0.0016),
    ("R1", "DP"): (0.5483, 0.0012),
    ("R1", "EOP"): (0.5445, 0.0007),
    ("R1", "EO"): (0.5289, 0.0008),
}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "notion"), AVERAGES)
def test_in_the_long_run_the_average_is_the_best(problem, name, notion):
    case = problem(name, notion, 0.05, 0.1)
    played = play(case, 20_000)
    assert case.accuracy(played.average) == pytest.approx(case.best, abs=0.002)
    found = case.accuracy(played.average), case.excess(played.average)
    assert found == pytest.approx(AVERAGES[name, notion], abs=1e-4)
    assert found[1] <= promised(case, played)[1] + 1e-9
    # Each response is deterministic, and goes on being unfair: what converges is their average.
    assert played.late(case).max() > 0.08 and played.late(case).mean() > 0.05


@pytest.mark.slow
@pytest.mark.parametrize(("notion", "excess"), [("DP", 0.00405), ("EO", 0.00308)])
def test_what_is_promised_of_the_excess_is_met_with_equality(problem, notion, excess):
    case = problem("canonical", notion, 0.05, 0.05)
    played = play(case, 10_000)
    assert case.excess(played.average) == pytest.approx(excess, abs=1e-5)
    assert promised(case, played)[1] == pytest.approx(excess, abs=1e-5)


def test_the_last_response_does_not_converge(problem):
    for notion in NOTIONS:
        case = problem("canonical", notion, 0.05, 0.1)
        played = play(case, 2000)
        assert case.excess(played.average) < 0.02
        assert played.late(case).min() > 0.015 and played.late(case).mean() > 0.1


@pytest.mark.parametrize(
    ("rounds", "accuracy", "excess"),
    [pytest.param(20_000, 0.5269, 0.0520, marks=pytest.mark.slow), (2000, 0.5343, 0.0641)],
)
def test_a_tolerance_subtracted_once_for_each_client_is_one_that_is_as_often_as_large(
    problem, rounds, accuracy, excess
):
    case = problem("canonical", "DP", 0.05, 0.1)
    wrong = case.tolerance * torch.tensor([len(case.joint), 1, 1])  # sum_k (D_k - tolerance) = D - N tolerance
    played = play(case, rounds, tolerance=wrong)
    assert case.excess(played.average) == pytest.approx(excess, abs=1e-4)
    assert case.excess(played.average) >= (len(case.joint) - 1) * 0.05
    assert case.accuracy(played.average) == pytest.approx(accuracy, abs=1e-4)
    assert case.accuracy(played.average) > case.best + 0.03  # which is no feat, but unfair


def test_the_opposite_sign_of_the_local_term_drives_local_multipliers_to_their_bound(problem):
    case = problem("canonical", "DP", 0.05, 0.1)
    right, wrong = play(case, 2000), play(case, 2000, sign=-1.0)
    sums = wrong.dual.sum((1, 2, 3))[1:]
    assert sums.tolist() == pytest.approx([5, 5])
    assert right.dual.sum((1, 2, 3)).max() < 1
    assert float(wrong.apart.mean(0)[1:].abs().max()) == pytest.approx(0.350, abs=1e-3)  # for a tolerance of .1
    assert case.excess(right.average) < 0.02
    assert case.accuracy(wrong.average) < case.best - 0.03
