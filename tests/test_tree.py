"""What is taken apart comes together again, means are means, and every fault of a tree is named."""

import math

import pytest
import torch

from fedsim import tree
from fedsim.tree import Rows


def example(dtype=torch.float32):
    return {
        "params": {"0.weight": torch.arange(6).reshape(2, 3).to(dtype), "0.bias": torch.ones(2, dtype=dtype)},
        "items": Rows(torch.tensor([4, 1, 4]), torch.arange(6).reshape(3, 2).to(dtype), 5),
        "steps": torch.tensor(3),
        "nothing": {},
        "deep": {"empty": {}, "leaf": torch.tensor([True, False])},
    }


def assert_same(one, other):
    """Same branches in the same order, same leaves to the bit."""
    assert list(one) == list(other)
    for name, leaf in one.items():
        if isinstance(leaf, dict):
            assert_same(leaf, other[name])
        elif isinstance(leaf, Rows):
            assert leaf.size == other[name].size
            assert torch.equal(leaf.index, other[name].index) and torch.equal(leaf.values, other[name].values)
            assert leaf.values.dtype == other[name].values.dtype
        else:
            assert torch.equal(leaf, other[name]) and leaf.dtype == other[name].dtype


def ragged_rows():
    """Rows of a table of 6 for four clients, one of whom has none and one the same row twice."""
    return [
        Rows(torch.tensor(index, dtype=torch.int64), torch.randn(len(index), 2, dtype=torch.float64), 6)
        for index in ([3, 0], [5], [], [1, 1, 2])
    ]


# Rows


def test_rows_named_twice_add_up_and_all_others_are_zero():
    rows = Rows(torch.tensor([4, 1, 4]), torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), 5)
    expected = torch.zeros(5, 2)
    for index, value in zip(rows.index, rows.values, strict=True):
        expected[index] += value
    assert torch.equal(rows.dense(), expected)


def test_padding_belongs_to_no_row_and_stacked_rows_add_up_over_clients():
    index = torch.tensor([[0, 2, -1], [2, -1, -1]])
    values = torch.tensor([[1.0, 2.0, 99.0], [4.0, 99.0, 99.0]])
    assert Rows(index, values, 3).dense().tolist() == [1.0, 0.0, 2.0 + 4.0]


@pytest.mark.parametrize("shape", [(0,), (2, 0)])
def test_no_rows_are_a_table_of_zeros(shape):
    rows = Rows(torch.zeros(shape, dtype=torch.int64), torch.zeros(*shape, 3, dtype=torch.bfloat16), 4)
    assert torch.equal(rows.dense(), torch.zeros(4, 3, dtype=torch.bfloat16))


# Names


def test_names_are_paths_and_rows_become_three_tensors():
    assert list(tree.flatten(example())) == [
        "params/0.weight",
        "params/0.bias",
        "items@index",
        "items@values",
        "items@size",
        "steps",
        "deep/leaf",
    ]
    assert [name for name, _ in tree.items(example())] == [
        "params/0.weight",
        "params/0.bias",
        "items",
        "steps",
        "deep/leaf",
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_flattening_and_restoring_gives_the_tree_back_empty_branches_included(dtype):
    whole = example(dtype)
    assert_same(tree.restore(tree.flatten(whole), whole), whole)


def test_unflattening_gives_the_tree_back_save_for_empty_branches():
    expected = example()
    del expected["nothing"], expected["deep"]["empty"]
    assert_same(tree.unflatten(tree.flatten(example())), expected)


def test_rows_below_a_branch_and_stacked_rows_survive_too():
    rows = Rows(torch.tensor([[0, -1], [1, 2]]), torch.randn(2, 2, 3), 7)
    assert_same(tree.unflatten(tree.flatten({"a": {"b": rows}})), {"a": {"b": rows}})


def test_flattening_inside_vmap_keeps_the_size_of_a_table():
    def one(values):
        return tree.flatten({"items": Rows(torch.tensor([1, 2]), values, 9)})

    back = tree.unflatten(torch.func.vmap(one)(torch.ones(4, 2)))["items"]
    assert back.size == 9 and back.index.shape == (4, 2) and back.values.shape == (4, 2)


def test_the_empty_tree_goes_through_everything():
    assert tree.flatten({}) == tree.unflatten({}) == tree.restore({}, {}) == tree.map(torch.neg, {}) == {}
    assert tree.leaves({}) == [] and tree.count_bytes([]) == 0 and tree.norm({}) == 0


@pytest.mark.parametrize("key", ["a/b", "a@b", 3])
def test_a_key_that_would_be_ambiguous_is_refused_with_its_place(key):
    with pytest.raises(ValueError, match=rf"params/{key!r}: a key must be a string without '/' and '@'"):
        tree.flatten({"params": {key: torch.zeros(1)}})


@pytest.mark.parametrize("leaf", [1.0, None, [torch.zeros(1)]])
def test_a_leaf_that_is_no_tensor_is_refused_with_its_place_and_type(leaf):
    with pytest.raises(TypeError, match=rf"params/w: a leaf must be a tensor or Rows, got {type(leaf).__name__}"):
        tree.flatten({"params": {"w": leaf}})


def test_restoring_names_what_is_missing_surplus_and_of_another_shape_at_once():
    flat = tree.flatten(example())
    del flat["params/0.bias"], flat["items@values"]
    flat |= {"extra": torch.zeros(1), "deep/leaf": torch.zeros(3), "steps": torch.zeros(1)}
    with pytest.raises(ValueError) as caught:
        tree.restore(flat, example(), "checkpoint.safetensors")
    message = str(caught.value)
    assert message.startswith("checkpoint.safetensors does not fit: ")
    assert set(message.split(": ", 1)[1].split("; ")) == {
        "missing params/0.bias",
        "missing items@values",
        "surplus extra",
        "deep/leaf has shape (3,), expected (2,)",
        "steps has shape (1,), expected ()",
    }


def test_a_leaf_where_a_branch_is_expected_is_named():
    with pytest.raises(ValueError, match="missing a/b; surplus a$"):
        tree.restore({"a": torch.zeros(1)}, {"a": {"b": torch.zeros(1)}})


def test_rows_may_be_more_or_fewer_than_those_of_the_pattern():
    longer = {"items": Rows(torch.arange(4), torch.zeros(4, 2), 5)}
    assert_same(tree.restore(tree.flatten(longer), {"items": example()["items"]}), longer)


# Mapping


def test_mapping_pairs_leaves_by_name_not_by_order():
    one = {"a": torch.tensor(1), "b": {"c": torch.tensor(2)}}
    other = {"b": {"c": torch.tensor(20)}, "a": torch.tensor(10)}
    assert_same(tree.map(torch.add, one, other), {"a": torch.tensor(11), "b": {"c": torch.tensor(22)}})


def test_mapping_over_trees_that_differ_says_how():
    with pytest.raises(ValueError, match=r"trees differ: \['c'\] against \['d'\]"):
        tree.map(torch.add, {"b": {"c": torch.tensor(1)}}, {"b": {"d": torch.tensor(1)}})


def test_where_chooses_whole_trees_one_per_client_inside_vmap():
    this, other = {"a": {"b": torch.ones(3, 2)}}, {"a": {"b": torch.zeros(3, 2)}}
    condition = torch.tensor([True, False, True])
    chosen = torch.func.vmap(tree.where)(condition, this, other)
    assert torch.equal(chosen["a"]["b"], condition[:, None].expand(3, 2).float())


# Stacking


def test_stacking_and_taking_are_inverse():
    trees = [{"a": torch.randn(2), "b": {"c": torch.tensor(client)}} for client in range(3)]
    whole = tree.stack(trees)
    assert whole["a"].shape == (3, 2) and whole["b"]["c"].tolist() == [0, 1, 2]
    for client, alone in enumerate(trees):
        assert_same(tree.take(whole, client), alone)


def test_ragged_rows_are_padded_and_the_table_of_all_is_the_sum_of_the_tables_of_each():
    rows = ragged_rows()
    stacked = tree.stack([{"items": leaf} for leaf in rows])["items"]
    assert stacked.index.tolist() == [[3, 0, -1], [5, -1, -1], [-1, -1, -1], [1, 1, 2]]
    assert stacked.values.shape == (4, 3, 2)
    assert torch.allclose(stacked.dense(), sum(leaf.dense() for leaf in rows))


def test_concatenating_blocks_is_stacking_their_clients_at_once():
    clients = [
        {"a": torch.randn(2), "items": Rows(torch.arange(length), torch.randn(length, 2), 9)} for length in (1, 4, 2, 3)
    ]
    blocks = [tree.stack(clients[:1]), tree.stack(clients[1:3]), tree.stack(clients[3:])]
    joined, whole = tree.concatenate(blocks), tree.stack(clients)
    assert torch.equal(joined["a"], whole["a"])
    assert torch.equal(joined["items"].index, whole["items"].index)
    for client, alone in enumerate(clients):
        assert torch.equal(tree.take(joined, client)["items"].dense(), alone["items"].dense())


def test_one_block_concatenated_is_that_block():
    block = tree.stack([example()])
    assert_same(tree.concatenate([block]), block)


def test_taking_by_a_mask_keeps_those_clients_in_order():
    whole = tree.stack(
        [{"a": torch.tensor(c), "items": Rows(torch.tensor([c]), torch.tensor([1.0 * c]), 4)} for c in range(4)]
    )
    kept = tree.take(whole, torch.tensor([False, True, False, True]))
    assert kept["a"].tolist() == [1, 3] and kept["items"].index.tolist() == [[1], [3]]


# Means and sums


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weight", [1.0, 3.0, 1e-30, 7e20, 0.0])
def test_the_mean_of_one_client_is_that_client_to_the_bit(dtype, weight):
    torch.manual_seed(0)
    client = {"a": torch.randn(50, 3).to(dtype), "b": {"c": torch.randn(()).to(dtype)}}
    assert_same(tree.weighted_mean(tree.stack([client]), torch.tensor([weight])), client)


def test_the_mean_weighs_each_client_by_its_share():
    torch.manual_seed(0)
    leaf, weight = torch.randn(4, 3, 2, dtype=torch.float64), torch.tensor([1.0, 0.0, 2.0, 5.0], dtype=torch.float64)
    expected = sum(w * client for w, client in zip(weight, leaf, strict=True)) / weight.sum()
    assert torch.allclose(tree.weighted_mean({"a": leaf}, weight)["a"], expected, rtol=1e-14)


def test_a_client_of_weight_zero_does_not_count():
    leaf = torch.tensor([[1.0, 2.0], [1e30, -1e30]])
    assert torch.equal(tree.weighted_mean({"a": leaf}, torch.tensor([3.0, 0.0]))["a"], leaf[0])


def test_where_all_weights_are_zero_the_mean_is_the_plain_one():
    torch.manual_seed(0)
    leaf = torch.randn(5, 3, dtype=torch.float64)
    assert torch.allclose(tree.weighted_mean({"a": leaf}, torch.zeros(5))["a"], leaf.mean(0), rtol=1e-6)


def test_counts_have_means_with_a_fraction_and_weights_may_be_counts():
    counts = [
        {"a": torch.tensor([count]), "items": Rows(torch.tensor([row]), torch.tensor([count]), 2)}
        for row, count in enumerate((4, 5))
    ]
    mean = tree.weighted_mean(tree.stack(counts), torch.tensor([1, 3]))
    assert mean["a"].tolist() == [(4 * 1 + 5 * 3) / 4]
    assert mean["items"].dense().tolist() == [4 * 1 / 4, 5 * 3 / 4]


def test_the_mean_of_rows_is_the_mean_of_the_tables_that_they_are_rows_of():
    torch.manual_seed(0)
    rows = ragged_rows()
    weight = torch.tensor([2.0, 1.0, 0.5, 4.0], dtype=torch.float64)
    sparse = tree.weighted_mean(tree.stack([{"items": leaf} for leaf in rows]), weight)
    dense = tree.weighted_mean(tree.stack([{"items": leaf.dense()} for leaf in rows]), weight)
    assert torch.allclose(sparse["items"].dense(), dense["items"], rtol=1e-14)


def test_the_order_of_clients_changes_a_mean_by_no_more_than_rounding():
    torch.manual_seed(0)
    leaf, weight = torch.randn(20, 4, dtype=torch.float64), torch.rand(20, dtype=torch.float64)
    order = torch.randperm(20)
    assert torch.allclose(
        tree.weighted_mean({"a": leaf}, weight)["a"],
        tree.weighted_mean({"a": leaf[order]}, weight[order])["a"],
        rtol=1e-12,
    )


def test_the_total_adds_clients_up():
    whole = tree.stack(
        [{"a": torch.tensor([c, 1]), "items": Rows(torch.tensor([c]), torch.tensor([[2.0]]), 3)} for c in (0, 2, 2)]
    )
    total = tree.total(whole)
    assert total["a"].tolist() == [0 + 2 + 2, 3] and not total["a"].is_floating_point()
    assert total["items"].dense().tolist() == [[2.0], [0.0], [2 * 2.0]]
    assert total["items"].index.tolist() == [0, 2], "rows that nobody named are not there"


def test_the_norm_is_that_of_all_numbers_in_one_vector():
    leaves = {"a": torch.tensor([[3.0, 0.0]]), "b": {"c": torch.tensor(4.0)}}
    assert float(tree.norm(leaves)) == math.hypot(3, 4)
    twice = {"items": Rows(torch.tensor([1, 1]), torch.tensor([[3.0], [4.0]]), 2)}
    assert float(tree.norm(twice)) == 3 + 4  # rows named twice are one row


def test_means_and_sums_change_none_of_their_arguments():
    whole, weight = tree.stack([example(), example()]), torch.tensor([1.0, 2.0])
    before = {name: leaf.clone() for name, leaf in tree.flatten(whole).items()}
    floats = {name: leaf for name, leaf in whole.items() if name != "steps"}
    tree.weighted_mean(floats, weight), tree.total(whole), tree.norm(tree.take(whole, 0))
    assert all(torch.equal(leaf, before[name]) for name, leaf in tree.flatten(whole).items())
    assert weight.tolist() == [1.0, 2.0]


# Bytes


def test_bytes_are_those_of_the_numbers_and_padding_does_not_travel():
    assert (
        tree.count_bytes([torch.zeros(3, 2, dtype=torch.bfloat16), torch.tensor(1.0, dtype=torch.float64)]) == 6 * 2 + 8
    )
    rows = Rows(torch.tensor([[0, 3], [2, -1]]), torch.zeros(2, 2, 5), 100)
    assert tree.count_bytes([rows]) == 3 * (8 + 5 * 4)
    alone = Rows(torch.tensor([0, 3]), torch.zeros(2), 100)
    assert tree.count_bytes([alone]) == 2 * (8 + 4)


def test_rows_merged_added_or_put_together_are_the_tables_that_they_stand_for():
    torch.manual_seed(0)
    one, other = ragged_rows()[:2]
    table = torch.randn(one.size, *one.values.shape[1:], dtype=one.values.dtype)
    assert torch.allclose(one.added(table), table + one.dense(), rtol=1e-14)
    assert torch.allclose(one.merged().dense(), one.dense(), rtol=1e-14)
    assert one.merged().index.tolist() == sorted({row for row in one.index.tolist() if row >= 0})
    both = one.merged().plus(other.merged(), 2, 0.5)
    assert torch.allclose(both.dense(), 2 * one.dense() + 0.5 * other.dense(), rtol=1e-14)
    assert both.index.tolist() == sorted({row for row in [*one.index.tolist(), *other.index.tolist()] if row >= 0})
