"""Descriptions count what is there, whatever the order in which a federation holds its rows."""

import numpy as np
import pytest
import torch

from fedsim.data.dataset import Dataset
from fedsim.data.datasets import canonical_joint, canonical_table
from fedsim.data.describe import describe, draw
from fedsim.data.federation import Federation, Partition, divide
from fedsim.data.partition import by_column, dirichlet, iid

PNG = b"\x89PNG"


def test_shares_of_the_canonical_joint_are_its_conditional_probabilities():
    dataset = canonical_joint()
    description = describe(divide(dataset, by_column(dataset.columns)))
    joint = canonical_table()
    p_client = joint.sum(axis=(1, 2, 3))
    assert description.shares == pytest.approx(joint.sum(axis=(1, 2)) / p_client[:, None])
    assert description.group_shares == pytest.approx(joint.sum(axis=(2, 3)) / p_client[:, None])
    assert description.pooled == pytest.approx(joint.sum(axis=(0, 1, 2)))
    assert description.summary()["examples"] == 4000


def test_clients_are_counted_by_their_own_rows_in_any_order_and_overlapping():
    columns = {"y": torch.tensor([0, 1, 1, 2])}
    # Client 0 has rows 3, 1 (training) and 0 (test); client 1 has rows 1 and 2; client 2 none; their places are mixed.
    federation = Federation(columns, np.array([1, 2, 3, 1, 0]), np.array([[2, 4, 4, 5], [0, 2, 2, 2], [5, 5, 5, 5]]))
    description = describe(federation)
    assert description.sizes.tolist() == [[2, 0, 1], [2, 0, 0], [0, 0, 0]]
    assert description.shares == pytest.approx(np.array([[1 / 3, 1 / 3, 1 / 3], [0, 1, 0], [0, 0, 0]]))
    pooled = np.array([1, 3, 1]) / 5
    distance = [abs(1 / 3 - pooled).sum() / 2, abs(np.array([0, 1, 0]) - pooled).sum() / 2]
    assert description.heterogeneity == pytest.approx(np.mean(distance))


def test_heterogeneity_is_nothing_for_equal_clients_and_most_for_clients_with_one_label_each():
    dataset = Dataset("labels", {"y": torch.arange(5).repeat(40)})
    rows = np.arange(200)
    equal = describe(divide(dataset, Partition(rows, np.arange(0, 201, 5))))
    single = describe(divide(dataset, by_column(dataset.columns, column="y")))
    assert equal.heterogeneity == pytest.approx(0)
    assert single.heterogeneity == pytest.approx(1 - 1 / 5)


def test_splits_of_a_client_are_counted_apart():
    dataset = Dataset("labels", {"y": torch.zeros(100, dtype=torch.int64)})
    description = describe(divide(dataset, iid(dataset.columns, 0, 10), validation=0.2, test=0.3))
    assert (description.sizes == [5, 2, 3]).all()
    assert description.groups == () and description.group_shares.shape == (10, 0)


def test_a_column_that_is_missing_or_not_of_small_integers_is_refused():
    federation = Federation({"x": torch.zeros(2), "z": torch.tensor([-1, 0])}, np.arange(2), np.array([[0, 2, 2, 2]]))
    with pytest.raises(ValueError, match="no column 'y'; there are x, z"):
        describe(federation)
    for column in ("x", "z"):
        with pytest.raises(ValueError, match=f"column '{column}' must hold one integer from 0"):
            describe(federation, column)
    with pytest.raises(ValueError, match="has no clients"):
        describe(Federation({"y": torch.zeros(0, dtype=torch.int64)}, np.arange(0), np.zeros((0, 4), dtype=np.int64)))


def test_a_hundred_thousand_clients_are_described_without_a_loop():
    dataset = Dataset("many", {"y": torch.arange(1_000_000) % 10})
    description = describe(divide(dataset, iid(dataset.columns, 0, 100_000)))
    assert description.summary() | {"heterogeneity": 0} == {
        "clients": 100_000,
        "examples": 1_000_000,
        "smallest": 10,
        "median": 10,
        "largest": 10,
        "heterogeneity": 0,
    }


def test_figures_are_drawn_with_groups_with_many_values_and_for_one_client(tmp_path):
    joint = canonical_joint()
    items = Dataset("items", {"item": torch.arange(600) % 30, "client": torch.arange(600) % 70})
    drawn = {
        "groups": describe(divide(joint, by_column(joint.columns))),
        "sensitive only": describe(divide(joint, by_column(joint.columns)), "a"),
        "values": describe(divide(items, by_column(items.columns)), "item"),
        "one": describe(divide(joint, iid(joint.columns, 0, 1))),
        "skewed": describe(divide(joint, dirichlet(joint.columns, 0, 12, alpha=0.1))),
    }
    for name, description in drawn.items():
        path = tmp_path / f"{name}.png"
        draw(description, path)
        assert path.read_bytes().startswith(PNG)


def test_values_that_are_few_and_far_between_are_told_by_what_they_are():
    columns = {"year": torch.tensor([0, 2_000_000_000, 1_000_000_000, 2_000_000_000])}
    found = describe(divide(Dataset("years", columns), Partition(np.arange(4), np.array([0, 2, 4]))), column="year")
    assert found.values == ("0", "1000000000", "2000000000")
    assert found.shares.tolist() == [[0.5, 0, 0.5], [0, 0.5, 0.5]]


def test_of_many_values_the_most_frequent_are_told_apart():
    column = torch.cat([torch.arange(100), torch.arange(20) * 5])  # every fifth value twice
    found = describe(divide(Dataset("many", {"v": column}), Partition(np.arange(120), np.array([0, 120]))), column="v")
    assert found.values == (*(str(5 * value) for value in range(20)), "80 others")
    assert found.pooled.tolist() == pytest.approx([2 / 120] * 20 + [80 / 120])


def test_heterogeneity_counts_every_value_also_those_that_are_told_together():
    dataset = Dataset("own", {"v": torch.arange(30).repeat_interleave(4) * 1_000_000})
    found = describe(divide(dataset, Partition(np.arange(120), np.arange(0, 121, 4))), column="v")
    assert found.shares.shape == (30, 21) and found.heterogeneity == pytest.approx(1 - 1 / 30)


def test_names_are_told_in_their_order_and_values_beyond_them_by_what_they_are():
    dataset = Dataset("named", {"v": torch.tensor([2, 2, 1_000_000_000])}, names={"v": ("none", "some", "many")})
    found = describe(divide(dataset, Partition(np.arange(3), np.array([0, 3]))), column="v")
    assert found.values == ("none", "some", "many", "1000000000")
    assert found.pooled.tolist() == pytest.approx([0, 0, 2 / 3, 1 / 3])
