"""Duals: the projection against a quadratic program; steps, momentum and slackness by what they are for."""

import numpy as np
import pytest
import torch
from scipy.optimize import linprog, minimize
from torch.func import vmap

from fedsim.fairness import accelerated, ascend, project, slackness

INFINITY = float("inf")


def drawn(shape, seed, scale=1.0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def nearest(values, bound):
    """The nearest non-negative point with a sum of at most `bound`, by a general solver."""
    v = values.flatten().numpy()
    found = minimize(
        lambda x: ((x - v) ** 2).sum() / 2,
        np.full(v.size, bound / (2 * v.size)),
        jac=lambda x: x - v,
        bounds=[(0, None)] * v.size,
        constraints={"type": "ineq", "fun": lambda x: bound - x.sum(), "jac": lambda x: -np.ones(v.size)},
        method="SLSQP",
        options={"ftol": 1e-15, "maxiter": 500},
    )
    return torch.from_numpy(found.x).reshape(values.shape)


@pytest.mark.parametrize("bound", [0.1, 1.0, 5.0])
@pytest.mark.parametrize("shape", [(1,), (6,), (2, 4), (2, 3, 3)])
def test_the_projection_solves_its_quadratic_program(shape, bound):
    sums = []
    for seed in range(10):
        values = drawn(shape, seed, scale=4.0)
        found = project(values, bound)
        torch.testing.assert_close(found, nearest(values, bound), rtol=0, atol=1e-6)
        assert found.min() >= 0 and found.sum() <= bound + 1e-12
        sums.append(float(values.clamp(min=0).sum()))
    assert max(sums) > bound  # it had something to do


def test_what_is_in_the_ball_stays_to_the_bit():
    values = drawn((2, 3, 4), 0).abs()
    assert torch.equal(project(values, float(values.sum())), values)
    assert torch.equal(project(-values, 1.0), torch.zeros_like(values))


@pytest.mark.parametrize("bound", [0.1, 1.0, 5.0])
def test_projecting_twice_is_projecting_once(bound):
    for seed in range(20):
        once = project(drawn((2, 3, 3), seed, scale=3.0), bound)
        torch.testing.assert_close(project(once, bound), once, rtol=0, atol=1e-15)


def test_projections_of_many_at_once_are_those_of_each():
    values = torch.stack([drawn((2, 3, 4), seed, scale=0.1 + 0.3 * seed) for seed in range(12)])
    inside = values.clamp(min=0).sum((1, 2, 3)) <= 2
    assert 0 < inside.sum() < 12  # both kinds in one batch
    together = vmap(project, (0, None))(values, 2.0)
    assert torch.equal(together, torch.stack([project(each, 2.0) for each in values]))
    twice = vmap(vmap(project, (0, None)), (0, None))(values.reshape(3, 4, 2, 3, 4), 2.0)
    assert torch.equal(twice.flatten(0, 1), together)


def test_corners_of_the_projection():
    assert project(torch.tensor([3.0, 3, 3, 3]), 2.0).tolist() == [0.5] * 4  # ties
    assert project(torch.tensor([9.0, 8.5, 1]), 1.0).tolist() == [0.75, 0.25, 0]
    assert project(torch.tensor([1e12, -1e12, 0]), 5.0).tolist() == [5, 0, 0]  # beside which the bound is nothing
    assert project(torch.tensor([3e7, 3e7, 1]), 1.0).tolist() == [0.5, 0.5, 0]
    assert project(torch.tensor([2.0, -torch.inf]), 1.0).tolist() == [1, 0]
    assert project(torch.tensor([2.0, 1.0]), 0.0).tolist() == [0, 0]
    single = drawn((2, 5), 0, 2.0).float()
    torch.testing.assert_close(project(single, 1.0), project(single.double(), 1.0).float())


def test_an_infinite_tolerance_leaves_no_multiplier():
    apart = drawn((3, 4), 0)
    apart[0, 0] = 0.0
    dual = torch.zeros(2, 3, 4, dtype=torch.float64)
    for step in (0.1, torch.tensor(1e9)):
        for _ in range(3):
            dual = ascend(dual, apart, INFINITY, step, 5.0)
            assert torch.equal(dual, torch.zeros_like(dual))
    assert not vmap(ascend, (0, 0, None, None, None))(dual[None], apart[None], INFINITY, 0.1, 5.0).any()
    assert slackness(dual, apart, INFINITY, 5.0) == 0


def test_without_tolerance_one_of_each_pair_rises_by_the_deviation():
    apart = drawn((3, 4), 1)
    dual = ascend(torch.zeros(2, 3, 4, dtype=torch.float64), apart, 0.0, 0.1, 100.0)
    assert torch.equal(dual[0] - dual[1], 0.1 * apart)
    assert not (dual[0] * dual[1]).any()


def test_multipliers_accumulate_and_fall_again():
    first, second = drawn((2, 3), 2, 0.1) + 0.5, drawn((2, 3), 3, 0.1) + 0.5
    start = torch.zeros(2, 2, 3, dtype=torch.float64)
    dual = ascend(ascend(start, first, 0.1, 0.2, 100.0), second, 0.1, 0.3, 100.0)
    torch.testing.assert_close(dual[0], 0.2 * (first - 0.1) + 0.3 * (second - 0.1), rtol=0, atol=1e-15)
    assert not dual[1].any()
    relaxed = ascend(dual, torch.zeros_like(first), 0.1, 0.2, 100.0)
    torch.testing.assert_close(relaxed[0], dual[0] - 0.2 * 0.1, rtol=0, atol=1e-15)
    for _ in range(50):
        relaxed = ascend(relaxed, torch.zeros_like(first), 0.1, 0.2, 100.0)
    assert not relaxed.any()


def test_a_step_follows_the_slope_of_what_is_charged():
    dual, apart = project(drawn((2, 3, 4), 4).abs(), 3.0), drawn((3, 4), 5)
    free = dual.clone().requires_grad_()
    (free * torch.stack([apart - 0.1, -apart - 0.1])).sum().backward()
    for bound in (3.0, 100.0):
        found = ascend(dual, apart, 0.1, 0.7, bound)
        torch.testing.assert_close(found, project(dual + 0.7 * free.grad, bound), rtol=0, atol=1e-15)
        assert found.sum() <= bound + 1e-12


def test_slackness_is_what_the_best_multipliers_would_charge_more():
    for seed in range(20):
        dual, apart = project(drawn((2, 2, 3), seed), 1.5), drawn((2, 3), 100 + seed, 0.3)
        slack = torch.stack([apart - 0.2, -apart - 0.2]).flatten().numpy()
        best = linprog(-slack, A_ub=np.ones((1, slack.size)), b_ub=[1.5])
        charged = float(dual.flatten().numpy() @ slack)
        assert float(slackness(dual, apart, 0.2, 1.5)) == pytest.approx(-best.fun - charged, abs=1e-12)


def test_slackness_is_never_negative():
    generator = torch.Generator().manual_seed(0)
    for tolerance in (0.0, 0.05, 0.5):
        raw = torch.randn(2000, 2, 2, 3, generator=generator, dtype=torch.float64)
        dual = vmap(project, (0, None))(raw * torch.logspace(-2, 2, 2000)[:, None, None, None], 2.0)
        apart = torch.rand(2000, 2, 3, generator=generator, dtype=torch.float64) * 2 - 1
        found = vmap(slackness, (0, 0, None, None))(dual, apart, tolerance, 2.0)
        assert found.min() > -1e-12 and found.max() > 0.1
        each = [slackness(*pair, tolerance, 2.0) for pair in zip(dual[:5], apart[:5], strict=True)]
        assert torch.equal(found[:5], torch.stack(each))


def test_slackness_is_zero_at_complementary_slackness_alone():
    dual = torch.zeros(2, 1, 4, dtype=torch.float64)
    dual[0, 0, 0], dual[1, 0, 1] = 0.5, 1.25
    apart = torch.tensor([[0.25, -0.25, 0.125, 0.0]], dtype=torch.float64)
    assert slackness(dual, apart, 0.25, 4.0) == 0  # multipliers where |D| is the tolerance; the others have slack
    assert slackness(dual, apart, 0.3125, 4.0) == 1.75 * 0.0625  # multipliers where there is slack
    assert slackness(dual, apart, 0.125, 4.0) == (4 - 1.75) * 0.125  # a violation that could be charged more
    assert slackness(dual, -apart, 0.25, 4.0) == 1.75 * 0.5  # multipliers on the wrong side
    # At the bound nothing more can be charged, whatever remains of the violation.
    assert slackness(dual, apart, 0.125, 1.75) == 0
    assert slackness(torch.zeros_like(dual), apart, 0.25, 4.0) == 0  # fair without being charged


def test_momentum_extrapolates_more_and_more_and_never_out_of_the_ball():
    bound = 1.0
    start = torch.zeros(2, 1, 3, dtype=torch.float64)
    start[0, 0] = torch.tensor([0.3, 0.2, 0.1])
    new = start.clone()
    new[0, 0, 0] = 0.6
    far, momentum, overs = [], torch.tensor(1.0).double(), []
    for _ in range(5):  # the same move each time
        state = accelerated(start, start, momentum, new, bound)
        momentum = state["momentum"]
        assert torch.equal(state["dual"], new)
        assert state["ahead"].min() >= 0 and state["ahead"].sum() <= bound + 1e-12
        far.append(float(state["ahead"][0, 0, 0]))
        overs.append(float(slackness(state["ahead"], torch.full((1, 3), 0.3).double(), 0.1, bound)))
    assert far[0] == 0.6 and far == sorted(far) and far[-1] > 0.65
    assert min(overs) > -1e-12
    assert float(momentum) > 3


def test_momentum_that_led_uphill_begins_anew():
    dual, new = torch.zeros(2, 1, 1).double(), torch.full((2, 1, 1), 0.2).double()
    momentum = torch.tensor(20.0).double()
    beyond, short = torch.full_like(new, 0.3), torch.full_like(new, 0.1)
    state = accelerated(dual, beyond, momentum, new, 5.0)  # the step led back from where momentum had led
    assert torch.equal(state["ahead"], new) and float(state["momentum"]) == pytest.approx((1 + 5**0.5) / 2)
    state = accelerated(dual, short, momentum, new, 5.0)
    assert (state["ahead"] > new).all() and state["momentum"] > 20


def test_momentum_gets_to_the_best_multipliers_sooner():
    # Deviations that fall as multipliers rise: D = c - A (z1 - z2), A positive semi-definite, badly conditioned.
    factor = drawn((6, 6), 0) * torch.logspace(0, -1, 6)
    matrix, height = factor @ factor.T, drawn((6,), 1)
    step, tolerance, bound = float(0.5 / torch.linalg.eigvalsh(matrix)[-1]), 0.05, 50.0

    def left(dual):
        return float(slackness(dual, height - matrix @ (dual[0] - dual[1]), tolerance, bound))

    plain = dual = ahead = torch.zeros(2, 6, dtype=torch.float64)
    momentum = torch.tensor(1.0).double()
    for _ in range(300):
        plain = ascend(plain, height - matrix @ (plain[0] - plain[1]), tolerance, step, bound)
        new = ascend(ahead, height - matrix @ (ahead[0] - ahead[1]), tolerance, step, bound)
        dual, ahead, momentum = accelerated(dual, ahead, momentum, new, bound).values()
    assert 0 < left(dual) < left(plain) / 10
