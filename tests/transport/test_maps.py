"""Barycenters are what costs least, and maps carry every law to theirs."""

import numpy as np
import ot
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fedsim.transport import (
    apart,
    barycenter_quantiles,
    distribution,
    grid,
    histogram,
    levels,
    midranks,
    nearest,
    quantile_average,
    quantile_median,
    quantiles,
    sample_quantiles,
    transport_maps,
    wasserstein,
)

search = settings(max_examples=60, deadline=None, derandomize=True, database=None)
KINDS = ("quantile", "median", "cdf")
LEVELS = levels(2000)
NEAR = {"rtol": 0, "atol": 1e-12}
LAWS = st.lists(st.lists(st.integers(0, 4), min_size=7, max_size=7).filter(any), min_size=1, max_size=4)


def counted(groups, bins=101):
    """Histograms (G, bins) of the scores of each group."""
    return torch.stack([histogram(s[:, None], torch.zeros(len(s), dtype=torch.int64), 1, bins)[0, 0] for s in groups])


def carried(groups, kind, bins):
    """Where the maps send each score."""
    maps = transport_maps(counted(groups, bins), kind)
    return [own[nearest(scores, bins)] for own, scores in zip(maps, groups, strict=True)]


def cost(functions, weights, target, power):
    """sum_a w_a W_p^p, out of quantile functions (G, L) at the same levels."""
    return float(weights @ (functions - target).abs().pow(power).mean(1))


@pytest.fixture(scope="module")
def known(betas):
    """Histograms of the Beta laws, their quantile functions (2, L), and their weights .4 and .6."""
    counts = counted(betas)
    weights = counts.sum(1).double() / counts.sum()
    assert weights.tolist() == [0.4, 0.6]
    return counts, quantiles(distribution(counts), LEVELS), weights


# Barycenters


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
def test_the_barycenter_of_gaussians_is_gaussian_with_mean_mean_and_mean_deviation(gaussians, dtype):
    weights = torch.tensor([3, 7]).to(dtype)
    found = quantile_average(gaussians, weights)
    assert float(found.mean()) == pytest.approx(0.3 * -1 + 0.7 * 2, abs=0.03)
    assert float(found.std()) == pytest.approx(0.3 * 1 + 0.7 * 0.5, abs=0.03)
    torch.testing.assert_close(found, 0.3 * gaussians[0] + 0.7 * gaussians[1], **NEAR)
    distances = torch.stack([wasserstein(own, found, 2) for own in gaussians])
    # W_2^2(mu_0, nu) = w_1^2 W_2^2(mu_0, mu_1), as nu lies on the way from one to the other.
    expected = torch.tensor([0.7**2, 0.3**2], dtype=torch.float64) * wasserstein(*gaussians, 2)
    torch.testing.assert_close(distances, expected, rtol=1e-9, atol=0)
    mixture = sample_quantiles(gaussians.flatten(), LEVELS, torch.tensor([0.3, 0.7]).double().repeat_interleave(3000))
    assert float(mixture.std()) > 1.4  # of which the variance between the means is .3 .7 3^2


def test_the_barycenter_of_points_is_a_point():
    points = torch.tensor([0.1, 0.4, 1.0], dtype=torch.float64)[:, None].expand(3, 50)
    weights = torch.tensor([5, 3, 2])
    assert quantile_average(points, weights).tolist() == pytest.approx([0.5 * 0.1 + 0.3 * 0.4 + 0.2 * 1] * 50)
    assert set(quantile_median(points, torch.tensor([2, 3, 4])).tolist()) == {0.4}
    counts = torch.tensor([[0, 6, 0, 0, 0], [0, 0, 0, 0, 2]])  # at .25 and 1
    assert set(barycenter_quantiles(counts, LEVELS).tolist()) == {(6 * 0.25 + 2 * 1) / 8}
    assert set(barycenter_quantiles(counts, LEVELS, "median").tolist()) == {0.25}
    assert barycenter_quantiles(counts, levels(4), "cdf").tolist() == [0.25, 0.25, 0.25, 1]


@search
@given(LAWS)
def test_what_the_barycenter_costs_is_what_its_quantile_function_lacks_in_length(laws):
    counts = torch.tensor(laws)
    weights = counts.sum(1).double() / counts.sum()
    at = levels(840 * 2)  # finer than all their steps, and some
    functions, centre = quantiles(distribution(counts), at), barycenter_quantiles(counts, at)
    spent = cost(functions, weights, centre, 2)
    assert spent == pytest.approx(float(weights @ functions.square().mean(1) - centre.square().mean()), abs=1e-12)
    if len(laws) == 2:
        between = float((functions[0] - functions[1]).square().mean())
        assert spent == pytest.approx(float(weights.prod()) * between, abs=1e-12)


@search
@given(LAWS, st.lists(st.integers(0, 4), min_size=7, max_size=7).filter(any))
def test_no_other_law_costs_less_than_the_barycenter(laws, other):
    counts = torch.tensor(laws)
    weights, at = counts.sum(1).double() / counts.sum(), levels(500)
    functions = quantiles(distribution(counts), at)
    others = [quantiles(distribution(torch.tensor(other)), at), barycenter_quantiles(counts, at, "cdf"), *functions]
    for power, kind in ((2, "quantile"), (1, "median")):
        least = cost(functions, weights, barycenter_quantiles(counts, at, kind), power)
        assert all(least <= cost(functions, weights, one, power) + 1e-12 for one in others)


def test_the_mixture_is_no_barycenter(known):
    counts, functions, weights = known
    found = {kind: cost(functions, weights, barycenter_quantiles(counts, LEVELS, kind), 2) for kind in KINDS}
    between = float(wasserstein(grid(101), grid(101), 2, *(own.double() / own.sum() for own in counts)))
    assert found["quantile"] == pytest.approx(0.4 * 0.6 * between, rel=1e-3)
    # F = sum w_a F_a: the cost of each is an integral that POT knows.
    mixture = counts.sum(0).double() / counts.sum()
    each = [wasserstein(grid(101), grid(101), 2, own / own.sum(), mixture) for own in counts.double()]
    assert found["cdf"] == pytest.approx(float(0.4 * each[0] + 0.6 * each[1]), rel=1e-3)
    assert [found["quantile"], found["cdf"]] == pytest.approx([0.04438, 0.05663], abs=5e-5)
    assert found["median"] > found["cdf"]


def test_the_barycenter_is_the_one_that_a_linear_program_finds(known):
    counts, _, weights = known
    shares = (counts / counts.sum(1, keepdim=True)).double().numpy()
    metric = ot.dist(grid(101)[:, None].numpy(), metric="sqeuclidean")
    found = torch.from_numpy(ot.lp.barycenter(shares.T.copy(), metric, weights.numpy())).clamp(min=0)
    centre = barycenter_quantiles(counts, LEVELS)
    away = wasserstein(grid(101), centre, 1, found / found.sum())
    mixture = wasserstein(grid(101), barycenter_quantiles(counts, LEVELS, "cdf"), 1, found / found.sum())
    assert float(away) <= 0.01 / 2 < 0.05 < float(mixture)  # half of a bin


def test_the_median_of_two_is_the_heavier_one_and_costs_the_lighter_ones_way(known):
    counts, functions, weights = known
    median = barycenter_quantiles(counts, LEVELS, "median")
    assert torch.equal(median, functions[1])
    found = {kind: cost(functions, weights, barycenter_quantiles(counts, LEVELS, kind), 1) for kind in KINDS}
    assert found["median"] == pytest.approx(0.4 * float(apart(*counts)), rel=1e-3)
    assert found["median"] < 0.9 * min(found["quantile"], found["cdf"])


def test_of_medians_where_there_are_several_the_midmost_is_taken_and_costs_no_more():
    functions = torch.tensor([[0.0, 0.2], [0.4, 1.0]], dtype=torch.float64)
    middle = quantile_median(functions, torch.tensor([5, 5]))
    assert middle.tolist() == pytest.approx([0.2, 0.6])
    half = torch.tensor([0.5, 0.5], dtype=torch.float64)
    assert cost(functions, half, middle, 1) == pytest.approx(cost(functions, half, functions[0], 1))
    four = torch.tensor([[0.9], [0.1], [0.3], [0.6]], dtype=torch.float64)
    assert quantile_median(four, torch.tensor([1, 1, 2, 2])).item() == pytest.approx((0.3 + 0.6) / 2)
    assert quantile_median(four, torch.tensor([1, 2, 2, 2])).item() == 0.3
    thirds = torch.full((3,), 0.1, dtype=torch.float64)  # .1 + .1 + .1 is not .3
    assert quantile_median(torch.tensor([[0.1], [0.5], [0.9]]).double(), thirds).item() == 0.5


@search
@given(
    st.lists(st.tuples(st.integers(-4, 4), st.integers(0, 5)), min_size=1, max_size=6).filter(
        lambda drawn: any(weight for _, weight in drawn)
    )
)
def test_the_weighted_median_is_in_the_middle_of_all_that_cost_least(drawn):
    values, weights = (torch.tensor(part) for part in zip(*drawn, strict=True))
    costs = torch.stack([weights @ (values - value).abs() for value in values[weights > 0]])
    best = values[weights > 0][costs == costs.min()]
    assert quantile_median(values[:, None].double(), weights).item() == float(best.min() + best.max()) / 2


@pytest.mark.parametrize("kind", KINDS)
def test_one_law_is_its_own_barycenter(kind, known):
    counts, functions, _ = known
    assert torch.equal(barycenter_quantiles(counts[:1], LEVELS, kind), functions[0])
    alike = torch.stack([counts[0], 3 * counts[0], counts[0]])
    torch.testing.assert_close(barycenter_quantiles(alike, LEVELS, kind), functions[0], **NEAR)


@pytest.mark.parametrize("kind", KINDS)
def test_a_law_without_scores_has_no_part_in_the_barycenter(kind, known):
    counts = known[0]
    with_nobody = torch.stack([torch.zeros_like(counts[0]), counts[0], torch.zeros_like(counts[0]), counts[1]])
    assert torch.equal(barycenter_quantiles(with_nobody, LEVELS, kind), barycenter_quantiles(counts, LEVELS, kind))
    halves = torch.stack([counts[0], counts[0].flip(0), torch.zeros_like(counts[0])])  # of equal weight
    assert torch.equal(barycenter_quantiles(halves, LEVELS, kind), barycenter_quantiles(halves[:2], LEVELS, kind))


def test_what_is_no_barycenter_is_refused_and_one_of_nobody():
    with pytest.raises(ValueError, match="barycenter must be quantile, median or cdf, got 'mean'"):
        barycenter_quantiles(torch.ones(2, 5), LEVELS, "mean")
    with pytest.raises(ValueError, match=r"counts must hold at least one score, got \(2, 5\) zeros"):
        barycenter_quantiles(torch.zeros(2, 5), LEVELS)


# Maps


@search
@given(LAWS, st.sampled_from(KINDS))
def test_maps_are_monotone_and_stay_on_the_line(laws, kind):
    maps = transport_maps(torch.tensor(laws), kind)
    assert maps.shape == (len(laws), 7) and maps.dtype == torch.float64
    assert (maps.diff(dim=1) >= -1e-12).all() and float(maps.min()) >= 0 and float(maps.max()) <= 1


@search
@given(LAWS, st.sampled_from(KINDS))
def test_a_map_sends_all_ties_to_the_barycenters_quantile_at_their_rank(laws, kind):
    counts = torch.tensor(laws)
    maps = transport_maps(counts, kind)
    for own, sent in zip(counts, maps, strict=True):
        scores = np.repeat(np.arange(7), own)
        ranks = (np.arange(len(scores)) + 0.5) / len(scores)
        for place in range(7):
            if own[place]:
                rank = torch.tensor([ranks[scores == place].mean()])
                assert sent[place].item() == pytest.approx(barycenter_quantiles(counts, rank, kind).item(), abs=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bins", [2, 11, 101])
def test_identical_groups_stay_where_they_are_up_to_half_a_bin(kind, bins):
    scores = torch.from_numpy(np.random.default_rng(0).beta(2, 2, 5000))
    both = counted([scores, scores], bins)
    for own in transport_maps(both, kind):
        assert float((own[nearest(scores, bins)] - scores).abs().max()) <= 0.5 / (bins - 1) + 1e-9
    (alone,) = transport_maps(both[:1], kind)
    assert torch.equal(alone, transport_maps(both, kind)[0])
    other = carried([scores, scores**2], kind, bins)
    assert max(float((sent - s).abs().max()) for sent, s in zip(other, (scores, scores**2), strict=True)) > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_two_halves_of_the_same_law_hardly_move(kind):
    scores = torch.from_numpy(np.random.default_rng(0).beta(2, 2, 5000))
    halves = list(scores.chunk(2))
    noise = float((halves[0].sort().values - halves[1].sort().values).abs().max())
    moved = max(float((sent - s).abs().max()) for sent, s in zip(carried(halves, kind, 101), halves, strict=True))
    assert moved <= noise + 2 * 0.01 < 0.1


THRESHOLDS = torch.linspace(0.053, 0.953, 19, dtype=torch.float64)


def exceedance(groups):
    """The largest gap in how many of two groups are above a threshold."""
    shares = [(scores[:, None] >= THRESHOLDS).double().mean(0) for scores in groups]
    return float((shares[0] - shares[1]).abs().max())


@pytest.mark.parametrize(("kind", "seen"), [("quantile", 0.0108), ("median", 0.0132), ("cdf", 0.0193)])
def test_carried_scores_do_not_tell_the_groups_apart(kind, seen, betas):
    assert exceedance(betas) > 0.6
    ranks = 1 / len(betas[0]) + 1 / len(betas[1])
    assert exceedance(carried(betas, kind, 100_001)) <= 1.7e-4 < ranks
    rough = exceedance(carried(betas, kind, 101))
    largest = max(float((own / own.sum()).max()) for own in counted(betas))  # all ties go to one place
    assert rough == pytest.approx(seen, abs=6e-4)
    assert rough <= 0.0195 < largest + ranks


def test_carried_by_rank_scores_are_the_barycenters_own(betas):
    at = [(torch.arange(len(own), dtype=torch.float64) + 0.5) / len(own) for own in betas]
    sent = [quantile_average(torch.stack([sample_quantiles(s, u) for s in betas]), torch.tensor([4, 6])) for u in at]
    assert exceedance(sent) <= 1.7e-4
    fine = carried([own.sort().values for own in betas], "quantile", 100_001)
    for one, other in zip(sent, fine, strict=True):
        assert float((one - other).abs().mean()) < 1e-5  # there are ties on the grid, which share their ranks


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_stay_as_they_are(kind, betas):
    for scores, sent in zip(betas, carried(betas, kind, 101), strict=True):
        order = scores.argsort()
        assert (sent[order].diff() >= -1e-12).all()
        assert len(set(sent.tolist())) > 50


@search
@given(LAWS, st.sampled_from(KINDS), st.randoms(use_true_random=False))
def test_the_order_of_the_groups_does_not_matter(laws, kind, random):
    order = random.sample(range(len(laws)), len(laws))
    counts = torch.tensor(laws)
    torch.testing.assert_close(transport_maps(counts[order], kind), transport_maps(counts, kind)[order], **NEAR)


@search
@given(LAWS, st.sampled_from(KINDS), st.integers(2, 5))
def test_only_the_shares_of_the_scores_count(laws, kind, times):
    counts = torch.tensor(laws)
    torch.testing.assert_close(transport_maps(times * counts, kind), transport_maps(counts, kind), **NEAR)


@pytest.mark.parametrize("kind", KINDS)
def test_a_group_without_examples_stays_and_the_others_do_not_notice(kind, known):
    counts = known[0]
    with_nobody = torch.stack([counts[0], torch.zeros_like(counts[0]), counts[1]])
    maps = transport_maps(with_nobody, kind)
    assert torch.equal(maps[1], grid(101)) and torch.equal(maps[[0, 2]], transport_maps(counts, kind))
    assert torch.equal(transport_maps(torch.zeros_like(with_nobody), kind), grid(101).expand(3, 101))


@pytest.mark.parametrize("kind", KINDS)
def test_several_scores_are_carried_each_by_itself(kind):
    generator = torch.Generator().manual_seed(0)
    scores, groups = torch.rand(90, 4, generator=generator), torch.randint(3, (90,), generator=generator)
    counts = histogram(scores, groups, 3, 11)
    maps = transport_maps(counts, kind)
    for score in range(4):
        torch.testing.assert_close(maps[:, score], transport_maps(counts[:, score], kind), **NEAR)


def test_ties_that_fill_half_of_a_group_are_sent_to_the_middle_of_their_ranks():
    counts = torch.tensor([[2, 0, 0, 0, 2], [1, 1, 1, 1, 0]])
    assert midranks(counts)[0, [0, 4]].tolist() == [0.25, 0.75]
    # At 1/4, Q_0 = 0 and Q_1 = 0; at 3/4, Q_0 = 1 and Q_1 = 1/2.
    assert transport_maps(counts)[0, [0, 4]].tolist() == [0, 0.75]


@search
@given(LAWS)
def test_what_the_maps_move_is_the_distance_to_the_barycenter(laws):
    counts = torch.tensor(laws)
    assume(len(laws) > 1)
    maps = transport_maps(counts)
    for own, sent in zip(counts, maps, strict=True):
        share = own.double() / own.sum()
        moved = float(share @ (sent - grid(7)).abs())
        after = float(wasserstein(grid(7), sent, 1, share, share))
        assert moved == pytest.approx(after, abs=1e-9)  # a monotone map is an optimal plan


def test_scores_beyond_those_that_were_counted_go_to_the_ends_of_the_barycenter():
    counts = torch.zeros(2, 101, dtype=torch.int64)
    counts[0, 40:60] = counts[1, 50:70] = 5
    maps = transport_maps(counts)
    assert maps[0, 0].item() == maps[0, 39].item() == pytest.approx(0.45) == maps[0, 40].item()
    assert maps[0, 60:].tolist() == pytest.approx([0.64] * 41)
    assert (maps.diff(dim=1) >= 0).all()


@pytest.mark.parametrize("kind", ["quantile", "median"])
def test_rare_scores_among_many_are_not_lost(kind):
    counts = torch.zeros(2, 101, dtype=torch.int64)
    counts[:, 50], counts[:, 20], counts[:, 80] = 4 * 10**5, 1, 1
    assert transport_maps(counts, kind)[0, [20, 50, 80]].tolist() == pytest.approx([0.2, 0.5, 0.8])
