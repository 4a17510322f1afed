"""Plans and barycenters against closed forms, worked out here."""

from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.optimize import minimize

from fedsim.transport.discrete import barycenter, entropic_barycenter, free_support, plan
from fedsim.transport.medians import ordinal_barycenter, uniform_barycenter

GRID = np.linspace(0, 1, 101)
SQUARED = (GRID[:, None] - GRID) ** 2


def ordinal(size):
    return np.abs(np.subtract.outer(np.arange(size), np.arange(size))).astype(float)


def uniform(size):
    return 1 - np.eye(size)


def random_laws(count, size, seed=0):
    rng = np.random.default_rng(seed)
    return rng.dirichlet(np.full(size, 0.5), count), rng.dirichlet(np.ones(count))


def spent(laws, cost, weights, law):
    """sum_c w_c W(p_c, q), by plans."""
    shares = np.asarray(weights) / np.sum(weights)
    return sum(w * (plan(cost, p, law) * cost).sum() for w, p in zip(shares, laws, strict=True))


# Plans.


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_a_plan_has_the_marginals_that_it_was_asked_for(m, n, seed):
    rng = np.random.default_rng(seed)
    source, target, cost = rng.dirichlet(np.ones(m)), rng.dirichlet(np.ones(n)), rng.random((m, n))
    found = plan(cost, source, target)
    assert found.min() >= 0 and np.count_nonzero(found > 1e-12) <= m + n - 1
    np.testing.assert_allclose(found.sum(1), source, atol=1e-12)
    np.testing.assert_allclose(found.sum(0), target, atol=1e-12)


def test_no_permutation_of_uniform_points_is_cheaper_than_the_plan():
    cost = np.random.default_rng(1).random((6, 6))
    found = plan(cost, np.full(6, 1 / 6), np.full(6, 1 / 6))
    best = min(cost[np.arange(6), list(order)].mean() for order in permutations(range(6)))
    assert (found * cost).sum() == pytest.approx(best, abs=1e-12)


@pytest.mark.parametrize("size", [1, 2, 49, 200])
def test_the_plan_to_a_permuted_copy_is_that_permutation(size):
    rng = np.random.default_rng(2)
    points, order = rng.normal(size=(size, 20)), rng.permutation(size)
    cost = ((points[:, None] - points[order]) ** 2).sum(-1)
    found = plan(torch.from_numpy(cost), np.full(size, 1 / size), np.full(size, 1 / size))
    np.testing.assert_allclose(found * size, np.eye(size)[order].T, atol=1e-9)


# Barycenters on a common support.


def beta_histograms():
    rng = np.random.default_rng(0)
    samples = (rng.beta(2, 5, 4000), rng.beta(5, 2, 6000))
    bins = [np.clip(np.floor(100 * sample + 0.5), 0, 100).astype(int) for sample in samples]
    return np.stack([np.bincount(each, minlength=101) / len(each) for each in bins])


def quantiles(law, levels):
    return GRID[np.searchsorted(law.cumsum() + 1e-9, levels).clip(max=100)]


@pytest.mark.parametrize(
    "found",
    [barycenter, lambda laws, cost, weights: entropic_barycenter(laws, cost, weights, 1e-3)],
    ids=["exact", "entropic"],
)
def test_the_barycenter_of_two_laws_on_a_line_averages_their_quantiles(found):
    laws, levels = beta_histograms(), (np.arange(2000) + 0.5) / 2000
    law = found(laws, SQUARED, [0.4, 0.6])
    expected = 0.4 * quantiles(laws[0], levels) + 0.6 * quantiles(laws[1], levels)
    assert np.abs(quantiles(law, levels) - expected).mean() < 0.01  # W1, less than a bin
    mixture = 0.4 * laws[0] + 0.6 * laws[1]
    assert np.abs(quantiles(mixture, levels) - expected).mean() > 0.05


@pytest.mark.parametrize("weights", [(1, 1), (1, 3), (2, 0), (5, 5)])
@pytest.mark.parametrize("temperature", [0, 1e-2, 1e-3])
def test_of_two_point_masses_it_is_the_one_between_them(weights, temperature):
    laws = np.eye(101)[[10, 50]]
    mean = (weights[0] * GRID[10] + weights[1] * GRID[50]) / sum(weights)
    if temperature:
        law = entropic_barycenter(laws, SQUARED, weights, temperature)
        assert law @ GRID == pytest.approx(mean, abs=0.005 + temperature)  # blurred beyond the end of the grid
    else:
        law = barycenter(laws, SQUARED, weights)
        np.testing.assert_allclose(law, np.eye(101)[round(100 * mean)], atol=1e-9)
    assert law.argmax() == round(100 * mean)


@pytest.mark.parametrize("cost", [ordinal(5), uniform(5), ordinal(5) ** 2], ids=["ordinal", "uniform", "squared"])
def test_of_identical_laws_it_is_that_law_and_blurred_less_the_lower_the_temperature(cost):
    law = np.array([0.5, 0.0, 0.2, 0.3, 0.0])
    laws = np.stack([law] * 3)
    np.testing.assert_allclose(barycenter(laws, cost, [1, 2, 3]), law, atol=1e-9)
    blur = [np.abs(entropic_barycenter(laws, cost, [1, 2, 3], t) - law).sum() for t in (1.0, 0.3, 0.1)]
    assert blur[0] > blur[1] > blur[2] and blur[2] < 0.05


@given(st.integers(1, 5), st.integers(2, 5), st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_it_is_a_law_better_than_each_of_them_and_than_their_mean_in_whatever_order(count, size, seed):
    laws, weights = random_laws(count, size, seed)
    cost = np.random.default_rng(seed).random((size, size)) * (1 - np.eye(size))
    order = np.random.default_rng(seed + 1).permutation(count)
    found = barycenter(laws, cost, weights)
    assert found.min() >= 0 and found.sum() == pytest.approx(1, abs=1e-12)
    least = spent(laws, cost, weights, found)
    assert all(least <= spent(laws, cost, weights, other) + 1e-6 for other in (*laws, weights @ laws))
    again = spent(laws, cost, weights, barycenter(laws[order], cost, weights[order]))
    assert again == pytest.approx(least, abs=1e-6)  # there may be several
    blurred = entropic_barycenter(laws, cost, weights, 0.5)
    np.testing.assert_allclose(entropic_barycenter(laws[order], cost, weights[order], 0.5), blurred, atol=1e-6)


def test_weights_count_by_their_shares_and_tensors_are_taken():
    laws, weights = random_laws(3, 4)
    found = barycenter(laws, uniform(4), weights)
    np.testing.assert_allclose(barycenter(torch.from_numpy(laws), uniform(4), 7 * weights), found, atol=1e-9)
    single = torch.from_numpy(laws).float()  # sums are 1 to 1e-7
    np.testing.assert_allclose(barycenter(single, uniform(4), weights), found, atol=1e-6)


def test_the_entropic_one_is_what_a_minimiser_finds_whatever_the_weights():
    laws, cost, temperature = random_laws(3, 4, 1)[0], ordinal(4), 0.5
    kernel = np.exp(-cost / temperature)

    def dual(potentials):
        """The negative dual value for g (C - 1, K): W_c is max_g <g_c, q> + <f_c, p_c>, and sum_c w_c g_c = 0."""
        g = np.concatenate([potentials.reshape(2, 4), np.zeros((1, 4))])
        g[2] = -(weights[:2] @ g[:2]) / weights[2]
        soft = -temperature * np.log(np.exp(g / temperature) @ kernel.T)  # f up to what p alone decides
        return -(weights * (laws * soft).sum(1)).sum()

    for weights in (np.array([0.1, 0.2, 0.7]), np.full(3, 1 / 3)):
        g = minimize(dual, np.zeros(8), tol=1e-14, options={"gtol": 1e-9}).x.reshape(2, 4)
        scaled = np.exp(g[0] / temperature)
        expected = scaled * (kernel.T @ (laws[0] / (kernel @ scaled)))  # the second marginal of the first plan
        np.testing.assert_allclose(entropic_barycenter(laws, cost, weights, temperature), expected, atol=1e-6)


# In closed form.

CLOSED = {"uniform": (uniform_barycenter, uniform), "ordinal": (ordinal_barycenter, ordinal)}
closed = pytest.mark.parametrize(("found", "cost"), CLOSED.values(), ids=CLOSED)


@closed
@given(st.integers(1, 6), st.integers(2, 6), st.booleans(), st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_the_closed_form_costs_what_the_linear_program_does(found, cost, count, size, even, seed):
    laws, weights = random_laws(count, size, seed)
    laws[count // 2 :] = laws[-1]  # several may be the same
    weights = np.ones(count) if even else weights
    law = found(laws[:, None], weights)[0]
    least = spent(laws, cost(size), weights, barycenter(laws, cost(size), weights))
    assert law.min() >= 0 and law.sum() == pytest.approx(1, abs=1e-12)
    assert spent(laws, cost(size), weights, law) == pytest.approx(least, abs=1e-6)


@closed
@given(arrays(float, (3, 4, 5), elements=st.sampled_from([0.0, 1.0, 2.0])))
@settings(max_examples=50, deadline=None)
def test_a_majority_decides_and_many_at_once_are_each_alone(found, cost, parts):
    parts[..., 0] += 1  # none is without mass
    laws = parts / parts.sum(-1, keepdims=True)
    laws[2] = laws[1]
    weights = [0.45, 0.25, 0.3]
    np.testing.assert_allclose(found(laws, weights), laws[1], atol=1e-12)
    laws = parts / parts.sum(-1, keepdims=True)
    alone = np.concatenate([found(laws[:, i : i + 1], weights) for i in range(4)])
    np.testing.assert_array_equal(found(laws, weights), alone)


@closed
def test_two_that_weigh_the_same_meet_halfway(found, cost):
    laws, _ = random_laws(2, 5, seed=4)
    np.testing.assert_allclose(found(laws[:, None], [1, 1])[0], laws.mean(0), atol=1e-12)
    np.testing.assert_allclose(found(laws[:1, None], [2])[0], laws[0], atol=1e-15)


# Clouds of points.


def nearest(points, others):
    return np.sqrt(((points[:, None] - others) ** 2).sum(-1)).min(0).max()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_of_translated_clouds_it_is_the_cloud_at_the_mean_translation(seed):
    rng = np.random.default_rng(seed)
    cloud, shifts, weights = rng.normal(size=(12, 3)), rng.normal(size=(4, 3)), np.array([1.0, 2.0, 3.0, 0.0])
    found = free_support([cloud + shift for shift in shifts], weights, 12, seed)
    assert found.shape == (12, 3)
    assert nearest(found, cloud + weights @ shifts / 6) < 1e-9


def test_one_point_is_the_weighted_mean_and_the_seed_alone_decides_the_start():
    rng = np.random.default_rng(3)
    clouds, laws = [rng.normal(size=(n, 2)) for n in (4, 7)], [rng.dirichlet(np.ones(n)) for n in (4, 7)]
    mean = 0.25 * laws[0] @ clouds[0] + 0.75 * laws[1] @ clouds[1]
    np.testing.assert_allclose(free_support(clouds, [1, 3], 1, laws=laws)[0], mean, atol=1e-9)
    one, same, other = (free_support(clouds, [1, 3], 3, seed) for seed in (5, 5, 6))
    assert np.array_equal(one, same) and not np.array_equal(one, other)


# What is not right is refused.

HALF = np.array([0.5, 0.5])
LAWS = np.array([[0.5, 0.5], [1.0, 0.0]])
BAD = {
    "negative mass": (lambda f: f([[1.5, -0.5], HALF], uniform(2), [1, 1]), "laws must not be negative, got -0.5"),
    "no law": (lambda f: f([[0.5, 0.4], HALF], uniform(2), [1, 1]), "laws must sum to 1, got a sum of 0.9"),
    "all zero": (lambda f: f([[0.0, 0.0], HALF], uniform(2), [1, 1]), "laws must sum to 1, got a sum of 0.0"),
    "NaN": (lambda f: f([[np.nan, 1], HALF], uniform(2), [1, 1]), "laws must be finite, got nan"),
    "one law without its axis": (lambda f: f(HALF, uniform(2), [1]), r"laws must have 2 axes.*got shape \(2,\)"),
    "no laws": (lambda f: f(np.zeros((0, 2)), uniform(2), []), r"none of length 0; got shape \(0, 2\)"),
    "a cost of other points": (lambda f: f(LAWS, uniform(3), [1, 1]), r"cost must have shape \(2, 2\).*got \(3, 3\)"),
    "a negative cost": (lambda f: f(LAWS, -uniform(2), [1, 1]), "cost must not be negative, got -1.0"),
    "an infinite cost": (lambda f: f(LAWS, [[0, np.inf], [1, 0]], [1, 1]), "cost must be finite, got inf"),
    "too few weights": (lambda f: f(LAWS, uniform(2), [1]), "weights must be 2, one for each law; got 1"),
    "a negative weight": (lambda f: f(LAWS, uniform(2), [2, -1]), r"weights must not be negative.*got \[2.0, -1.0\]"),
    "weights of zero": (lambda f: f(LAWS, uniform(2), [0, 0]), r"not all zero; got \[0.0, 0.0\]"),
}


def entropic(laws, cost, weights):
    return entropic_barycenter(laws, cost, weights, 0.1)


@pytest.mark.parametrize("found", [barycenter, entropic])
@pytest.mark.parametrize("wrong", BAD)
def test_a_barycenter_of_what_is_no_law_is_refused(found, wrong):
    call, message = BAD[wrong]
    with pytest.raises(ValueError, match=message):
        call(found)


@closed
def test_the_closed_forms_refuse_the_same(found, cost):
    with pytest.raises(ValueError, match="laws must sum to 1, got a sum of 0.9"):
        found([[[0.5, 0.4]], [HALF]], [1, 1])
    with pytest.raises(ValueError, match="weights must be 2, one for each law; got 3"):
        found(LAWS[:, None], [1, 1, 1])


@pytest.mark.parametrize("temperature", [0.0, -1.0, np.nan, np.inf])
def test_a_temperature_that_is_none_is_refused(temperature):
    with pytest.raises(ValueError, match="temperature must be > 0, got"):
        entropic_barycenter(LAWS, uniform(2), [1, 1], temperature)


@pytest.mark.parametrize("temperature", [1e-4, 1e-5, 1e-300])
def test_a_temperature_too_low_for_floats_is_refused(temperature):
    told = f"temperature = {temperature} is too low for costs up to 1: the projections did not converge"
    with pytest.raises(ValueError, match=told):
        entropic_barycenter(beta_histograms(), SQUARED, [0.4, 0.6], temperature)


def test_plans_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"cost must have shape \(2, 3\), source by target; got \(3, 2\)"):
        plan(np.ones((3, 2)), HALF, np.full(3, 1 / 3))
    with pytest.raises(ValueError, match="target must sum to 1, got a sum of 2.0"):
        plan(np.ones((2, 2)), HALF, [1, 1])
    with pytest.raises(ValueError, match="cost must be finite, got nan"):
        plan([[np.nan]], [1], [1])


def test_clouds_that_do_not_fit_are_refused():
    clouds = [np.ones((3, 2)), np.ones((4, 2))]
    for points, size, message in (
        ([], 1, "got 0 clouds"),
        (clouds, 0, "size = 0"),
        ([clouds[0], np.ones((4, 3))], 2, r"points must be of one dimension, got \[2, 3\]"),
        ([clouds[0], np.full((1, 2), np.nan)], 2, r"points\[1\] must be finite"),
    ):
        with pytest.raises(ValueError, match=message):
            free_support(points, np.ones(len(points)), size)
    with pytest.raises(ValueError, match="weights must be 2"):
        free_support(clouds, [1], 2)
    with pytest.raises(ValueError, match=r"as long as their clouds \[3, 4\], got \[3, 3\]"):
        free_support(clouds, [1, 1], 2, laws=[np.full(3, 1 / 3)] * 2)
    with pytest.raises(ValueError, match=r"laws\[0\] must sum to 1"):
        free_support(clouds, [1, 1], 2, laws=[np.ones(3), np.full(4, 0.25)])
