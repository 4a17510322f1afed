"""Histograms are counts, quantiles are what their definition says, and distances what POT and closed forms give."""

import math
from fractions import Fraction

import numpy as np
import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.transport import (
    apart,
    class_scores,
    distribution,
    farthest,
    grid,
    histogram,
    levels,
    midranks,
    nearest,
    quantiles,
    sample_quantiles,
    wasserstein,
)

search = settings(max_examples=60, deadline=None, derandomize=True, database=None)
NEAR = {"rtol": 0, "atol": 1e-12}
GROUPS = st.integers(-1, 2)
SCORES = st.floats(0, 1, width=32)


def law(scores, bins):
    """The histogram of one law, (bins,)."""
    groups = torch.zeros(len(scores), dtype=torch.int64)
    return histogram(torch.as_tensor(scores)[:, None], groups, 1, bins)[0, 0]


# Histograms


def test_the_grid_goes_from_zero_to_one_in_equal_steps():
    assert grid(5).tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert grid(2).tolist() == [0, 1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bins", [2, 3, 101, 1001])
def test_a_score_counts_at_the_nearest_point_of_the_grid(bins, dtype):
    scores = torch.rand(4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    away = (scores.double()[:, None] - grid(bins)).abs()
    torch.testing.assert_close(away.gather(1, nearest(scores, bins)[:, None])[:, 0], away.amin(1), rtol=0, atol=1e-15)
    assert nearest(grid(bins), bins).tolist() == list(range(bins))


def test_a_score_midway_counts_at_the_higher_point_and_the_ends_at_the_ends():
    assert nearest(torch.tensor([0, 0.125, 0.375, 0.5, 0.625, 0.875, 1]), 5).tolist() == [0, 1, 2, 2, 3, 4, 4]
    assert nearest(torch.tensor([[0.0], [1.0]]), 101).tolist() == [[0], [100]]


@pytest.mark.parametrize("bins", [1, 0, -3])
def test_fewer_than_two_points_are_refused(bins):
    with pytest.raises(ValueError, match=f"bins must be at least 2, one at either end of .0, 1., got {bins}"):
        nearest(torch.tensor([0.5]), bins)


@pytest.mark.parametrize("wrong", [-0.01, 1.01, math.nan, math.inf, -math.inf])
def test_a_score_outside_is_refused_and_named(wrong):
    for function in (lambda scores: nearest(scores, 11), lambda scores: law(scores, 11)):
        with pytest.raises(ValueError, match=rf"scores must lie in \[0, 1\], got {wrong}.* and 1 others outside"):
            function(torch.tensor([0.5, wrong, 0.2, 7.0], dtype=torch.float64))


def test_inside_vmap_where_nothing_can_be_refused_a_score_outside_counts_at_an_end():
    scores = torch.tensor([[-0.5, 0.5, 7.0], [math.inf, -math.inf, 1.0], [math.nan, 0.0, 0.25]])
    found = torch.func.vmap(lambda one: nearest(one, 5))(scores)
    assert found.tolist() == [[0, 2, 4], [4, 0, 4], [0, 0, 1]]
    counted = torch.func.vmap(lambda one: histogram(one[:, None], torch.zeros(3, dtype=torch.int64), 1, 5))(scores)
    assert counted.sum((1, 2, 3)).tolist() == [3, 3, 3]


@search
@given(st.lists(st.tuples(SCORES, SCORES, GROUPS), max_size=40), st.integers(2, 30))
def test_a_histogram_counts_example_by_example(examples, bins):
    scores = torch.tensor([example[:2] for example in examples]).reshape(-1, 2)
    groups = torch.tensor([example[2] for example in examples], dtype=torch.int64)
    expected = np.zeros((3, 2, bins), dtype=int)
    for *both, group in examples:
        for column, score in enumerate(both):
            if group >= 0:
                expected[group, column, math.floor(Fraction(score) * (bins - 1) + Fraction(1, 2))] += 1
    found = histogram(scores, groups, 3, bins)
    assert found.dtype == torch.int64 and found.tolist() == expected.tolist()


@search
@given(st.lists(st.tuples(SCORES, GROUPS, st.integers(0, 4)), max_size=60), st.integers(2, 30))
def test_the_histograms_of_clients_add_up_to_that_of_their_pooled_examples_however_these_are_divided(examples, bins):
    scores = torch.tensor([example[0] for example in examples]).reshape(-1, 1)
    groups, owners = (torch.tensor([example[n] for example in examples], dtype=torch.int64) for n in (1, 2))
    clients = [histogram(scores[owners == owner], groups[owners == owner], 3, bins) for owner in range(5)]
    assert torch.equal(sum(clients), histogram(scores, groups, 3, bins))


@pytest.mark.parametrize("outside", [-1, -7, 2, 1000])
def test_an_example_of_a_group_that_there_is_not_counts_for_none(outside):
    scores, groups = torch.tensor([0.0, 1.0, 1.0, 0.5])[:, None], torch.tensor([0, outside, 1, outside])
    expected = [[[1, 0, 0]], [[0, 0, 1]]]
    assert histogram(scores, groups, 2, 3).tolist() == expected
    both = torch.func.vmap(lambda scores: histogram(scores, groups, 2, 3))(torch.stack([scores, scores]))
    assert both.tolist() == [expected, expected]


def test_counts_are_the_same_inside_vmap_as_outside():
    generator = torch.Generator().manual_seed(3)
    scores = torch.rand(4, 50, 3, generator=generator)
    groups = torch.randint(-1, 2, (4, 50), generator=generator)
    together = torch.func.vmap(lambda scores, groups: histogram(scores, groups, 2, 11))(scores, groups)
    assert torch.equal(together, torch.stack([histogram(*one, 2, 11) for one in zip(scores, groups, strict=True)]))
    assert together.sum() == 3 * (groups >= 0).sum()


def test_of_two_classes_the_score_is_the_second_ones_chance_of_more_each_ones():
    outputs = torch.tensor([[0.0, math.log(3)], [2.0, 2.0]])
    assert class_scores(outputs).tolist() == [[pytest.approx(0.75)], [0.5]]
    outputs = torch.tensor([[0.0, math.log(2), math.log(5)]])
    torch.testing.assert_close(class_scores(outputs), torch.tensor([[1, 2, 5]]) / 8)


# Distribution and quantile functions


def test_the_distribution_function_is_the_share_at_or_below_and_zero_of_nobody():
    counts = torch.tensor([[1, 0, 3], [0, 0, 0]])
    assert distribution(counts).tolist() == [[0.25, 0.25, 1], [0, 0, 0]]


@search
@given(st.lists(st.integers(0, 5), min_size=1, max_size=8).filter(any))
def test_the_rank_of_ties_is_the_mean_of_the_ranks_that_they_share(counts):
    scores = np.repeat(np.arange(len(counts)), counts)
    found = midranks(torch.tensor(counts))
    ranks = (np.arange(len(scores)) + 0.5) / len(scores)
    for place, count in enumerate(counts):
        if count:
            assert float(found[place]) == pytest.approx(ranks[scores == place].mean())
    assert float((found * torch.tensor(counts)).sum() / sum(counts)) == pytest.approx(0.5)


def test_levels_are_the_middles_of_equal_parts():
    assert levels(4).tolist() == [0.125, 0.375, 0.625, 0.875]


def least(samples, weights, level):
    """The least sample at or below which lies this share of the weight, exactly."""
    weights = [Fraction(weight) for weight in weights]
    reached = [sum(w for s, w in zip(samples, weights, strict=True) if s <= sample) for sample in samples]
    there = [s for s, share in zip(samples, reached, strict=True) if share >= Fraction(level) * sum(weights)]
    return min(there)


LEVELS = torch.tensor([1 / 16, 0.25, 0.375, 0.5, 0.75, 1])


@search
@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(0, 4)), min_size=1, max_size=9))
def test_a_quantile_of_samples_is_the_least_with_so_much_weight_below(drawn):
    samples, weights = (torch.tensor(part, dtype=torch.float64) for part in zip(*drawn, strict=True))
    if weights.any():
        expected = [least(samples.tolist(), weights.tolist(), level) for level in LEVELS.tolist()]
        assert sample_quantiles(samples, LEVELS, weights).tolist() == expected
        assert sample_quantiles(samples, LEVELS, weights / 7).tolist() == expected  # only shares count
    expected = [least(samples.tolist(), [1] * len(samples), level) for level in LEVELS.tolist()]
    assert sample_quantiles(samples, LEVELS).tolist() == expected


@search
@given(st.lists(st.integers(0, 4), min_size=2, max_size=12).filter(any))
def test_a_quantile_on_the_grid_is_that_of_the_counted_scores(counts):
    counts = torch.tensor(counts)
    expected = sample_quantiles(grid(len(counts)), LEVELS, counts.double())
    torch.testing.assert_close(quantiles(distribution(counts), LEVELS), expected, **NEAR)
    scores = grid(len(counts)).repeat_interleave(counts)
    torch.testing.assert_close(expected, sample_quantiles(scores, LEVELS), **NEAR)


def test_a_sum_of_fractions_that_falls_short_of_one_by_rounding_has_reached_it():
    counts = torch.ones(10, dtype=torch.int64)
    reached = torch.full((10,), 0.1, dtype=torch.float64).cumsum(0)
    assert reached[2] > 0.3 and reached[-1] < 1
    at = torch.arange(1, 11, dtype=torch.float64) / 10
    torch.testing.assert_close(quantiles(reached, at), grid(10), **NEAR)
    assert sample_quantiles(grid(10), at, torch.full((10,), 0.1).double()).tolist() == grid(10).tolist()
    torch.testing.assert_close(quantiles(distribution(counts), at), grid(10), **NEAR)


def test_quantiles_of_many_laws_are_those_of_each_at_common_levels_and_at_its_own():
    generator = torch.Generator().manual_seed(2)
    counts = torch.randint(0, 5, (2, 3, 7), generator=generator)
    weights, samples = (torch.rand(2, 3, 9, generator=generator, dtype=torch.float64) for _ in range(2))
    own = torch.rand(2, 3, 4, generator=generator, dtype=torch.float64)
    reached, common, told = distribution(counts), levels(5), sample_quantiles(samples, levels(5), weights)
    for place in np.ndindex(2, 3):
        assert quantiles(reached, common)[place].tolist() == quantiles(reached[place], common).tolist()
        assert quantiles(reached, own)[place].tolist() == quantiles(reached[place], own[place]).tolist()
        assert told[place].tolist() == sample_quantiles(samples[place], common, weights[place]).tolist()


# Distances


@pytest.mark.parametrize("power", [1, 1.5, 2, 3])
def test_of_as_many_samples_the_distance_is_the_mean_of_the_sorted_differences(power, gaussians):
    first, second = gaussians[:, torch.randperm(3000, generator=torch.Generator().manual_seed(0))]
    expected = (gaussians[0] - gaussians[1]).abs().pow(power).mean()
    torch.testing.assert_close(wasserstein(first, second, power), expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize(("power", "metric"), [(1, "cityblock"), (2, "sqeuclidean")])
def test_of_any_weighted_samples_it_is_the_least_cost_of_a_plan(power, metric):
    random = np.random.default_rng(4)
    for n, m in ((1, 1), (1, 6), (7, 4), (40, 33)):
        x, y = random.normal(size=n), random.normal(1, 2, m)
        a, b = random.dirichlet(np.ones(n)), random.dirichlet(np.ones(m))
        found = wasserstein(*map(torch.from_numpy, (x, y)), power, *map(torch.from_numpy, (a, b)))
        assert float(found) == pytest.approx(ot.emd2_1d(x, y, a, b, metric=metric), rel=1e-9)
        assert float(found) == pytest.approx(ot.emd2(a, b, np.abs(x[:, None] - y) ** power), rel=1e-9)


def test_weights_may_be_given_to_one_law_alone():
    x, y = torch.tensor([0.0, 1.0], dtype=torch.float64), torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64)
    weights = torch.tensor([1 / 3, 2 / 3], dtype=torch.float64)
    assert float(wasserstein(x, y, 1, weights)) == pytest.approx(0, abs=1e-12)
    assert float(wasserstein(x, y, 1, None, torch.tensor([0.5, 0.25, 0.25]).double())) == pytest.approx(0, abs=1e-12)
    assert float(wasserstein(x, y, 1)) == pytest.approx(2 / 3 - 1 / 2)


def test_the_distance_of_gaussians_is_that_of_their_means_and_of_their_deviations(gaussians):
    expected = (-1 - 2) ** 2 + (1 - 0.5) ** 2
    assert float(wasserstein(*gaussians, 2)) == pytest.approx(expected, rel=0.02)
    (m0, m1), (s0, s1) = gaussians.mean(1), gaussians.std(1, correction=0)
    z = (gaussians - gaussians.mean(1, keepdim=True)) / gaussians.std(1, correction=0, keepdim=True)
    exact = (m0 - m1) ** 2 + s0**2 + s1**2 - 2 * s0 * s1 * (z[0] * z[1]).mean()
    assert float(wasserstein(*gaussians, 2)) == pytest.approx(float(exact), rel=1e-10)


def test_the_distance_of_points_is_theirs_and_a_law_is_at_none_from_itself():
    points = torch.tensor([[0.2], [0.9]], dtype=torch.float64)
    assert [float(wasserstein(*points, power)) for power in (1, 2)] == pytest.approx([0.7, 0.49])
    many = torch.rand(30, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert float(wasserstein(many, many.flip(0), 2)) == pytest.approx(0, abs=1e-15)
    assert float(wasserstein(many, many + 0.3)) == pytest.approx(0.3)


def test_many_distances_at_once_are_each_by_itself():
    generator = torch.Generator().manual_seed(5)
    x, y, a, b = (torch.rand(2, 3, size, generator=generator, dtype=torch.float64) for size in (5, 7, 5, 7))
    a, b = a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)
    together = wasserstein(x, y, 2, a, b)
    assert together.shape == (2, 3)
    for place in np.ndindex(2, 3):
        torch.testing.assert_close(together[place], wasserstein(x[place], y[place], 2, a[place], b[place]), **NEAR)


@pytest.mark.parametrize("power", [1, 2])
def test_gradients_flow_to_samples_and_weights(power):
    generator = torch.Generator().manual_seed(6)
    given = [torch.rand(2, size, generator=generator, dtype=torch.float64) for size in (5, 7, 5, 7)]

    def distance(x, y, a, b):
        return wasserstein(x, y, power, a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True))

    given = [part.requires_grad_() for part in given]
    assert torch.autograd.gradcheck(distance, given)
    assert torch.autograd.gradcheck(lambda x, y: wasserstein(x, y, power), given[:2])
    slopes = torch.autograd.grad(distance(*given).sum(), given)
    assert all(float(slope.abs().sum()) > 0 for slope in slopes)


def test_a_power_below_one_and_shapes_that_do_not_fit_are_refused():
    x = torch.rand(2, 5)
    for power in (0.5, 0, math.nan):
        with pytest.raises(ValueError, match=f"power must be at least 1, got {power}"):
            wasserstein(x, x, power)
    with pytest.raises(ValueError, match=r"first is \(2, 5\) and second \(3, 5\)"):
        wasserstein(x, torch.rand(3, 5))
    for weights in (torch.full((5,), 0.2), torch.full((2, 4), 0.25), torch.full((1, 5), 0.2)):
        with pytest.raises(ValueError, match=r"second_weights is \(.*\), and what it weighs \(2, 5\)"):
            wasserstein(x, x, 1, None, weights)


@search
@given(*[st.lists(st.integers(0, 4), min_size=6, max_size=6).filter(any)] * 2)
def test_laws_on_a_grid_are_as_far_apart_as_their_scores(counts, others):
    counts, others = torch.tensor(counts), torch.tensor(others)
    weights = [part.double() / part.sum() for part in (counts, others)]
    expected = wasserstein(grid(6), grid(6), 1, *weights)
    torch.testing.assert_close(apart(counts, others), expected, **NEAR)
    torch.testing.assert_close(apart(others, counts), expected, **NEAR)


def test_a_law_without_scores_is_not_apart_from_any():
    some, none = torch.tensor([0, 0, 4]), torch.zeros(3, dtype=torch.int64)
    assert [float(apart(*pair)) for pair in ((some, none), (none, some), (none, none))] == [0, 0, 0]


def test_of_many_laws_and_scores_the_two_that_are_farthest_count():
    ends = {0: [2, 0, 0, 0, 0], 0.25: [0, 3, 0, 0, 0], 0.75: [0, 0, 0, 9, 0]}
    counts = torch.tensor([[ends[0], ends[0.25]], [ends[0.25], ends[0.25]], [ends[0.25], ends[0.75]]])
    assert farthest(counts) == 0.5
    assert farthest(counts[:2]) == 0.25
    assert farthest(counts[:1]) == 0 and farthest(torch.zeros(0, 1, 5)) == 0
    assert farthest(torch.cat([counts, torch.zeros_like(counts[:1])])) == 0.5  # of nobody's scores there is no law
