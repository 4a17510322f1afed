"""Stability: by hand, by brute force, and what a rotation leaves alone."""

import pytest
import torch

from fedsim import stability
from fedsim.stability import mean_cosine, neighbour_overlap, relative_change


def table(rows, width=6, seed=0):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def rotation(width, seed=5):
    return torch.linalg.qr(table(width, width, seed).double()).Q


def test_by_hand():
    before = torch.tensor([[3.0, 0.0], [0.0, 4.0], [0.0, 0.0]])
    after = torch.tensor([[3.0, 4.0], [0.0, 1.0], [7.0, 0.0]])
    # The difference is (0, 4), (0, -3), (7, 0); |before| = 5.
    assert relative_change(before, after) == pytest.approx((16 + 9 + 49) ** 0.5 / 5)
    assert mean_cosine(before, after) == pytest.approx((3 / 5 + 1) / 2), "the third row has no direction at first"


def test_nothing_changed_and_everything_turned_around():
    q = table(30)
    assert relative_change(q, q) == 0 and mean_cosine(q, q) == pytest.approx(1) and neighbour_overlap(q, q) == 1
    assert relative_change(q, -q) == pytest.approx(2) and mean_cosine(q, -q) == pytest.approx(-1)
    assert neighbour_overlap(q, -q) == 1, "the same rows are near each other"


def test_a_rotation_of_all_rows_and_the_length_of_each_change_no_neighbour():
    q = table(200).double()
    turned = q @ rotation(6)
    assert neighbour_overlap(q, turned) == 1
    assert relative_change(q, turned) > 0.5 and abs(mean_cosine(q, turned)) < 0.5, "but the other two see it"
    longer = q * torch.linspace(0.1, 9, 200)[:, None]
    assert neighbour_overlap(q, longer) == 1 and mean_cosine(q, longer) == pytest.approx(1)
    assert neighbour_overlap(q, table(200, seed=1).double()) < 0.2, "negative control: another table"


def test_tables_that_have_nothing_to_do_with_each_other_share_neighbours_by_chance_alone():
    found = [neighbour_overlap(table(201, 20, s), table(201, 20, 100 + s), 10) for s in range(20)]
    assert sum(found) / 20 == pytest.approx(10 / 200, rel=0.1)


def neighbours(q, row, k):
    cosines = [-2.0 if other == row else float(torch.cosine_similarity(q[row], q[other], 0)) for other in range(len(q))]
    return set(sorted(range(len(q)), key=lambda other: -cosines[other])[:k])


@pytest.mark.parametrize("k", [1, 3, 10])
def test_overlap_by_brute_force_in_blocks_of_any_size(k, monkeypatch):
    before = table(40).double()
    after = before + 0.5 * table(40, seed=3)
    shares = [len(neighbours(before, row, k) & neighbours(after, row, k)) / k for row in range(40)]
    expected = sum(shares) / 40
    assert 0.1 < expected < 0.9
    for rows in (1024, 40, 16, 1, 0):
        monkeypatch.setattr(stability, "AT_ONCE", 40 * rows)
        assert neighbour_overlap(before, after, k) == pytest.approx(expected, rel=1e-12)


def test_a_row_is_no_neighbour_of_its_own():
    # Rows 0 and 1 are each other's nearest, and so are 2 and 3; afterwards 0 and 2, and 1 and 3.
    before = torch.tensor([[1.0, 0.1], [1.0, -0.1], [-1.0, 0.1], [-1.0, -0.1]])
    after = torch.tensor([[1.0, 0.1], [-1.0, 0.1], [1.0, -0.1], [-1.0, -0.1]])
    assert neighbour_overlap(before, after, 1) == 0 and neighbour_overlap(before, after, 3) == 1


def test_what_cannot_be_compared_is_refused():
    for function in (relative_change, mean_cosine, neighbour_overlap):
        with pytest.raises(
            ValueError, match=r"two tables of one shape \(I, D\) are compared, got \(3, 6\) and \(4, 6\)"
        ):
            function(table(3), table(4))
        with pytest.raises(ValueError, match="two tables of one shape"):
            function(torch.zeros(3), torch.zeros(3))
    with pytest.raises(ValueError, match="before is zero everywhere"):
        relative_change(torch.zeros(3, 2), torch.ones(3, 2))
    with pytest.raises(ValueError, match="k = 10: a table of 10 rows has 9 neighbours for each of them"):
        neighbour_overlap(table(10), table(10))
    with pytest.raises(ValueError, match="k must be >= 1, got 0"):
        neighbour_overlap(table(10), table(10), 0)
