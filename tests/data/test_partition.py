"""Every row has one owner, and the owners' shares are those that each partitioner promises."""

from itertools import product

import numpy as np
import pytest
import torch

from fedsim.data.federation import Partition
from fedsim.data.partition import (
    apportion,
    by_column,
    correlation,
    dirichlet,
    dirichlet_balanced,
    iid,
    quantity_skew,
    shards,
)
from fedsim.randomness import rng


def table(examples=2000, classes=5, seed=3):
    random = rng(seed, "table")
    return {
        "x": torch.zeros(examples, 2),
        "y": torch.from_numpy(random.integers(classes, size=examples)),
        "a": torch.from_numpy(random.integers(2, size=examples)),
    }


def counts(columns, partition, column="y"):
    """How often each client has each value, (N, K)."""
    values = columns[column].numpy()
    return np.stack(
        [
            np.bincount(values[partition.rows[start:end]], minlength=values.max() + 1)
            for start, end in zip(partition.offsets[:-1], partition.offsets[1:], strict=True)
        ]
    )


ALL = {
    "iid": lambda c, seed: iid(c, seed, 7),
    "dirichlet": lambda c, seed: dirichlet(c, seed, 7, alpha=0.5),
    "dirichlet_balanced": lambda c, seed: dirichlet_balanced(c, seed, 7, alpha=0.5),
    "shards": lambda c, seed: shards(c, seed, 7),
    "quantity_skew": lambda c, seed: quantity_skew(c, seed, 7),
    "correlation": lambda c, seed: correlation(c, seed, 7),
}


@pytest.mark.parametrize("name", ALL)
def test_every_row_has_exactly_one_owner_and_a_clients_rows_ascend(name):
    columns = table()
    partition = ALL[name](columns, 0)
    assert np.array_equal(np.sort(partition.rows), np.arange(2000))
    assert partition.offsets[0] == 0 and partition.offsets[-1] == 2000
    for start, end in zip(partition.offsets[:-1], partition.offsets[1:], strict=True):
        assert (np.diff(partition.rows[start:end]) > 0).all()


@pytest.mark.parametrize("name", ALL)
def test_the_seed_alone_decides(name):
    columns = table()
    first, again, other = (ALL[name](columns, seed) for seed in (1, 1, 2))
    assert np.array_equal(first.rows, again.rows) and np.array_equal(first.offsets, again.offsets)
    assert not np.array_equal(first.rows, other.rows)


@pytest.mark.parametrize("name", ["dirichlet", "dirichlet_balanced", "shards", "correlation"])
def test_a_missing_column_is_named_with_those_there_are(name):
    with pytest.raises(ValueError, match=r"no column '[ya]'; there are x"):
        ALL[name]({"x": torch.zeros(2000, 2)}, 0)


def test_a_column_of_floats_or_vectors_is_refused():
    with pytest.raises(ValueError, match=r"column 'x' must hold one integer.*float32 of shape \(2000, 2\)"):
        dirichlet(table(), 0, 3, alpha=1.0, column="x")


@pytest.mark.parametrize("name", ["iid", "dirichlet", "quantity_skew", "shards", "correlation"])
def test_more_clients_than_examples_is_an_error_with_the_numbers(name):
    with pytest.raises(ValueError, match=rf"{name}: 3 examples are too few for (7|14)"):
        ALL[name](table(3), 0)


def test_ranges_of_arguments_are_checked():
    for wrong in (
        lambda: iid(table(), 0, 0),
        lambda: dirichlet(table(), 0, 3, alpha=0.0),
        lambda: correlation(table(), 0, 3, high=1.5),
        lambda: iid(table(), -1, 3),
    ):
        with pytest.raises(ValueError, match="must be"):
            wrong()


def test_iid_sizes_differ_by_one_and_shares_are_the_pooled_ones():
    columns = table(20_003)
    partition = iid(columns, 0, 10)
    assert sorted(set(partition.sizes)) == [2000, 2001]
    shares = counts(columns, partition) / partition.sizes[:, None]
    assert np.abs(shares - 0.2).max() < 5 * np.sqrt(0.2 * 0.8 / 2000)


def test_dirichlet_shares_have_the_moments_of_the_distribution():
    clients, alpha, columns = 20, 0.5, {"y": torch.arange(400).repeat_interleave(500)}
    shares = counts(columns, dirichlet(columns, 0, clients, alpha)) / 500  # (N, 400): 400 draws of 20 shares
    mean = 1 / clients
    variance = mean * (1 - mean) / (alpha * clients + 1)
    assert shares.sum(axis=0) == pytest.approx(1)
    assert shares.mean() == pytest.approx(mean)
    assert shares.var(axis=1).mean() == pytest.approx(variance, rel=0.1)
    assert np.abs(shares.mean(axis=1) - mean).max() < 5 * np.sqrt(variance / 400)


def test_a_large_alpha_gives_everybody_the_same_and_a_small_one_gives_values_away_whole():
    columns = table()
    even = counts(columns, dirichlet(columns, 0, 4, alpha=1e9))
    assert (np.ptp(even, axis=0) <= 2).all()  # both ends of a client's cut are rounded down
    whole = counts(columns, dirichlet(columns, 0, 4, alpha=1e-6, min_size=0))
    assert (np.sort(whole, axis=0)[:-1] == 0).all()


@pytest.mark.parametrize("alpha", [1e308, float("inf")])
def test_an_alpha_that_cannot_be_drawn_is_refused(alpha):
    with pytest.raises(ValueError, match="alpha = .* is too extreme"):
        dirichlet(table(), 0, 4, alpha=alpha)


def test_the_minimum_is_kept_by_drawing_again_and_given_up_with_the_numbers():
    columns = table()
    loose = dirichlet(columns, 0, 10, alpha=0.1, min_size=0)
    more = int(loose.sizes.min()) + 1
    assert dirichlet(columns, 0, 10, alpha=0.1, min_size=more).sizes.min() >= more
    with pytest.raises(ValueError, match=r"50 draws of 2000 examples for 10 clients.*at best \d+ where min_size = 190"):
        dirichlet(columns, 0, 10, alpha=0.1, min_size=190)


def test_balanced_dirichlet_with_two_clients_and_a_small_alpha_gives_a_group_to_each():
    columns = {"a": torch.arange(2).repeat_interleave(torch.tensor([1952, 2121]))}
    held = counts(columns, dirichlet_balanced(columns, 0, 2, alpha=0.01), "a")
    assert sorted(held.max(axis=1)) == pytest.approx([1952, 2121], abs=60)
    assert set(held.argmax(axis=1)) == {0, 1}


def test_a_client_that_is_full_gets_nothing_more_which_plain_dirichlet_ignores():
    columns = table(4000, classes=10)
    capped = counts(columns, dirichlet_balanced(columns, 0, 8, alpha=0.3, column="y", min_size=0))
    before = np.cumsum(capped, axis=1) - capped
    assert (capped[before >= 4000 / 8] == 0).all()
    free = counts(columns, dirichlet(columns, 0, 8, alpha=0.3, min_size=0))
    before = np.cumsum(free, axis=1) - free
    assert (free[before >= 4000 / 8] > 0).any()


def test_balanced_dirichlet_keeps_a_minimum_of_every_group_in_every_client():
    columns = table(4000)
    held = counts(columns, dirichlet_balanced(columns, 0, 5, alpha=1.0, min_cell=20), "a")
    assert held.min() >= 20
    assert counts(columns, dirichlet_balanced(columns, 0, 5, alpha=1.0), "a").min() < 20
    with pytest.raises(ValueError, match=r"of some value where min_cell = 390"):
        dirichlet_balanced(columns, 0, 5, alpha=0.1, min_cell=390)


def test_balanced_dirichlet_draws_as_often_as_it_may_and_then_gives_up_with_the_numbers():
    columns = table(4000)

    def drawn(draws, min_cell=180):
        return dirichlet_balanced(columns, 0, 5, alpha=1.0, min_cell=min_cell, draws=draws)

    with pytest.raises(ValueError, match=r"in 50 draws of 4000 examples.*at best \d+ of some value where min_cell"):
        drawn(50)
    found = drawn(500)
    assert counts(columns, found, "a").min() >= 180
    again = drawn(5000)  # the first that is good enough, however many there could have been
    assert np.array_equal(found.rows, again.rows) and np.array_equal(found.offsets, again.offsets)
    first = drawn(1, min_cell=0)
    assert np.array_equal(first.rows, dirichlet_balanced(columns, 0, 5, alpha=1.0).rows)
    with pytest.raises(ValueError, match="in 1 draws"):
        drawn(1)
    with pytest.raises(ValueError, match="draws must be >= 1, got 0"):
        drawn(0)


def test_shards_leave_each_client_few_labels_in_equal_numbers():
    columns = {"y": torch.arange(10).repeat(100)}
    partition = shards(columns, 0, 50, shards_per_client=2)
    assert (partition.sizes == 20).all()
    assert ((counts(columns, partition) > 0).sum(axis=1) <= 2).all()


def test_quantity_skew_changes_sizes_but_not_shares():
    columns = table(50_000)
    partition = quantity_skew(columns, 0, 10, alpha=0.5, min_size=300)
    assert partition.sizes.min() >= 300 and partition.sizes.max() > 2 * np.median(partition.sizes)
    shares = counts(columns, partition) / partition.sizes[:, None]
    assert (np.abs(shares - 0.2) < 5 * np.sqrt(0.16 / partition.sizes[:, None])).all()
    assert np.ptp(quantity_skew(columns, 0, 10, alpha=1e9).sizes) <= 2


def test_by_column_has_a_client_for_each_value_in_order():
    columns = {"client": torch.tensor([7, -2, 7, 40, -2])}
    partition = by_column(columns)
    assert isinstance(partition, Partition)
    assert partition.rows.tolist() == [1, 4, 0, 2, 3]
    assert partition.offsets.tolist() == [0, 2, 4, 5]


def test_correlation_divides_each_cell_by_the_stated_weights():
    columns = table(6000, classes=3)
    partition = correlation(columns, 5, 4, low=0.1, high=0.9)
    gamma = rng(5, "correlation", 0).uniform(0.1, 0.9, size=4)
    a, y = columns["a"].numpy(), columns["y"].numpy()
    cell = counts(columns | {"cell": torch.from_numpy(a * 3 + y)}, partition, "cell")
    for i, j in product(range(2), range(3)):
        weight = gamma if i == j else 1 - gamma
        quota = weight / weight.sum() * ((a == i) & (y == j)).sum()
        assert (np.abs(cell[:, i * 3 + j] - quota) < 1).all()


def test_correlation_at_one_half_is_an_even_split_and_bounds_must_be_in_order():
    columns = table(6000, classes=2)
    assert np.ptp(counts(columns, correlation(columns, 0, 4, low=0.5, high=0.5)), axis=0).max() <= 2
    with pytest.raises(ValueError, match=r"low = 0.7, high = 0.3"):
        correlation(columns, 0, 4, low=0.7, high=0.3)


def test_largest_remainders_get_what_rounding_down_leaves():
    # Quotas of 10 examples: 4.5, 3.2, 2.3; one is left, and the largest remainder is the first one's.
    assert apportion(np.array([0.45, 0.32, 0.23]), 10).tolist() == [5, 3, 2]
    assert apportion(np.zeros(3), 10).tolist() == [4, 3, 3]


def test_a_hundred_thousand_clients_each_get_their_rows():
    columns = {"y": torch.arange(1_000_000) % 10}
    assert (iid(columns, 0, 100_000).sizes == 10).all()
    assert len(dirichlet(columns, 0, 100_000, alpha=0.5, min_size=0).sizes) == 100_000
