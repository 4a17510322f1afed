"""Each client has its own examples, divided once and visited in full: every one exactly once an epoch."""

import numpy as np
import pytest
import torch

from fedsim.data.dataset import Dataset, joint_labels
from fedsim.data.federation import Federation, Partition, divide, planned, schedule

SIZES = np.array([20, 0, 1, 2, 57, 10])
NAMES = {"y": ("no", "yes")}


def dataset(examples=200):
    columns = {
        "x": torch.arange(examples * 2, dtype=torch.float32).reshape(examples, 2),
        "y": torch.arange(examples) % 2,
    }
    test = {"x": torch.full((3, 2), -1.0), "y": torch.tensor([0, 1, 1])}
    return Dataset("toy", columns, test, NAMES)


def partition(sizes=SIZES, seed=0, examples=200):
    """Rows dealt out at random, without repetition."""
    rows = np.random.default_rng(seed).permutation(examples)[: sizes.sum()]
    return Partition(rows, np.concatenate([[0], np.cumsum(sizes)]))


def owned(federation, client, split):
    """The rows that a client has in a split."""
    start, size = federation.span([client], split)
    return federation.rows[start[0] : start[0] + size[0]].tolist()


# Dividing


@pytest.mark.parametrize("validation", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("test", [0.0, 0.2, 0.5])
def test_the_parts_of_a_client_are_disjoint_and_cover_what_it_owns(validation, test):
    parts = partition()
    federation = divide(dataset(), parts, validation, test)
    for client in range(len(SIZES)):
        split = [owned(federation, client, name) for name in ("train", "validation", "test")]
        rows = parts.rows[parts.offsets[client] : parts.offsets[client + 1]]
        assert sorted(sum(split, [])) == sorted(rows.tolist())


@pytest.mark.parametrize(("validation", "test"), [(0, 0), (0.1, 0.2), (0.5, 0.5), (1, 0), (0, 1), (0.25, 0.05)])
def test_parts_are_rounded_shares_and_one_example_is_always_left_for_training(validation, test):
    federation = divide(dataset(), partition(), validation, test)
    for client, size in enumerate(SIZES.tolist()):
        tested = min(round(test * size), max(0, size - 1))
        validated = min(round(validation * size), max(0, size - tested - 1))
        expected = [size - tested - validated, validated, tested]
        assert [federation.sizes(split)[client] for split in ("train", "validation", "test")] == expected
        assert expected[0] >= min(1, size)


def test_the_seed_decides_which_examples_go_where():
    first, again, other = (divide(dataset(), partition(), 0.2, 0.2, seed) for seed in (1, 1, 2))
    assert np.array_equal(first.rows, again.rows) and np.array_equal(first.bounds, other.bounds)
    assert not np.array_equal(first.rows, other.rows)
    for client in range(len(SIZES)):
        splits = ("train", "validation", "test")
        of_first, of_other = (sum((owned(f, client, split) for split in splits), []) for f in (first, other))
        assert sorted(of_first) == sorted(of_other)


def test_the_test_part_is_a_fair_sample_of_what_a_client_owns():
    size, seeds = 100, range(200)
    parts = Partition(np.arange(size), np.array([0, size]))
    counts = np.zeros(size)
    for seed in seeds:
        counts[owned(divide(dataset(), parts, test=0.3, seed=seed), 0, "test")] += 1
    assert counts.sum() == 30 * len(seeds)
    assert np.abs(counts / len(seeds) - 0.3).max() < 5 * np.sqrt(0.3 * 0.7 / len(seeds))


def test_what_is_not_divided_keeps_its_order():
    parts = partition()
    federation = divide(dataset(), parts)
    assert np.array_equal(federation.rows, parts.rows)
    assert np.array_equal(federation.sizes(), SIZES)


def test_dividing_leaves_the_partition_as_it_was_and_hands_on_the_rest():
    parts, data = partition(), dataset()
    before = parts.rows.copy()
    federation = divide(data, parts, 0.2, 0.2)
    assert np.array_equal(parts.rows, before)
    assert (federation.name, federation.names, federation.num_clients) == ("toy", NAMES, len(SIZES))
    assert federation.columns is data.columns and federation.test is data.test
    assert np.array_equal(parts.sizes, SIZES)


@pytest.mark.parametrize(
    ("build", "complaint"),
    [
        (lambda: divide(dataset(), partition(), 0.6, 0.5), r"validation \+ test must be at most 1, got 0.6 \+ 0.5"),
        (lambda: divide(dataset(), partition(), test=1.5), "test must be >= 0 and <= 1, got 1.5"),
        (lambda: divide(dataset(), partition(), validation=-0.1), "validation must be >= 0 and <= 1, got -0.1"),
        (lambda: divide(dataset(), partition(), seed=-1), "seed must be >= 0, got -1"),
        (
            lambda: divide(dataset(), partition(np.array([2, 1, 0])), test=0.2),
            "test = 0.2 leaves no client a test example: the largest client has 2 examples",
        ),
    ],
)
def test_what_cannot_be_divided_is_refused_with_the_numbers(build, complaint):
    with pytest.raises(ValueError, match=complaint):
        build()


# Reading


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_examples_are_the_rows_of_the_columns_that_a_client_owns(split):
    federation = divide(dataset(), partition(), 0.2, 0.3)
    for client in range(len(SIZES)):
        examples, rows = federation.examples(client, split), owned(federation, client, split)
        assert examples.keys() == {"x", "y"}
        assert examples["y"].tolist() == [row % 2 for row in rows]
        assert examples["x"].tolist() == [[2 * row, 2 * row + 1] for row in rows]
        assert examples["x"].shape == (len(rows), 2)


@pytest.mark.parametrize("ids", [[0, 1, 2, 3, 4, 5], [4], [1], [2, 1], [], np.array([5, 0])])
def test_a_table_holds_the_examples_of_each_client_padded_to_the_longest(ids):
    federation = divide(dataset(), partition(), 0.2, 0.3)
    table = federation.table(ids)
    sizes = federation.sizes(ids=ids)
    longest = max(sizes, default=0)
    assert table["x"].shape == (len(ids), longest, 2) and table["mask"].shape == (len(ids), longest)
    for place, client in enumerate(ids):
        examples = federation.examples(client)
        assert table["mask"][place].tolist() == [True] * sizes[place] + [False] * (longest - sizes[place])
        for name, column in examples.items():
            assert torch.equal(table[name][place, : sizes[place]], column)


def test_rows_that_follow_each_other_are_read_without_a_copy_and_others_are_not():
    data = dataset()
    federation = divide(
        data, Partition(np.array([3, 4, 5, 9, 10, 10, 12, 20, 19, 18, 7]), np.array([0, 3, 6, 7, 10, 11]))
    )

    def shares(client):
        return (
            federation.examples(client)["x"].untyped_storage().data_ptr()
            == data.columns["x"].untyped_storage().data_ptr()
        )

    assert [shares(client) for client in range(5)] == [True, False, True, False, True]
    for client in range(5):
        assert federation.examples(client)["x"][:, 0].tolist() == [
            2 * row for row in owned(federation, client, "train")
        ]


def test_rows_that_only_span_as_many_as_they_are_do_not_pass_for_consecutive():
    federation = divide(dataset(), Partition(np.array([4, 4, 6]), np.array([0, 3])))
    assert federation.examples(0)["x"][:, 0].tolist() == [8, 8, 12]


def test_a_row_may_be_owned_by_nobody_or_by_several():
    federation = divide(dataset(), Partition(np.array([1, 2, 2, 3]), np.array([0, 2, 4])))
    assert [federation.examples(client)["x"][:, 0].tolist() for client in (0, 1)] == [[2, 4], [4, 6]]


def test_sizes_are_of_all_clients_or_of_those_asked_for():
    federation = divide(dataset(), partition())
    assert federation.sizes().tolist() == SIZES.tolist()
    assert federation.sizes(ids=[4, 1]).tolist() == [57, 0]
    assert federation.sizes("test").tolist() == [0] * len(SIZES)


@pytest.mark.parametrize("read", ["examples", "table", "sizes"])
def test_a_client_or_a_split_that_does_not_exist_is_refused(read):
    federation = divide(dataset(), partition())
    calls = {
        "examples": lambda client, split: federation.examples(client, split),
        "table": lambda client, split: federation.table([0, client], split),
        "sizes": lambda client, split: federation.sizes(split, [client]),
    }
    for client in (-1, len(SIZES)):
        with pytest.raises(ValueError, match=f"client {client} does not exist: ids go from 0 to {len(SIZES) - 1}"):
            calls[read](client, "train")
    with pytest.raises(ValueError, match="split must be one of train, validation, test, got 'dev'"):
        calls[read](0, "dev")


def test_a_federation_without_any_example_has_empty_tables():
    federation = divide(dataset(), partition(np.array([0, 0])))
    assert federation.examples(1)["x"].shape == (0, 2)
    table = federation.table([0, 1])
    assert table["x"].shape == (2, 0, 2) and table["mask"].shape == (2, 0)


def test_the_common_test_set_is_a_client_of_its_own():
    central = divide(dataset(), partition()).central()
    assert central.num_clients == 1 and central.names == NAMES and central.name == "toy (test set)"
    assert central.sizes("test").tolist() == [3] and not central.sizes("train").any()
    examples = central.examples(0, "test")
    assert all(torch.equal(examples[name], column) for name, column in dataset().test.items())


def test_a_large_common_test_set_falls_into_several_clients():
    central = divide(dataset(), partition()).central(each=2)
    assert central.sizes("test").tolist() == [2, 1]
    together = [central.examples(client, "test")["y"] for client in (0, 1)]
    assert torch.equal(torch.cat(together), dataset().test["y"])


def test_without_a_common_test_set_it_has_no_examples():
    federation = Federation(dataset().columns, np.arange(3), np.array([[0, 3, 3, 3]]))
    assert federation.central().sizes("test").tolist() == [0]
    assert federation.central().examples(0, "test") == {}


def test_a_million_clients_cost_no_loop():
    federation = divide(
        Dataset("large", {"y": torch.zeros(2_000_000)}),
        Partition(np.arange(2_000_000), np.arange(0, 2_000_001, 2)),
        test=0.5,
    )
    assert federation.num_clients == 10**6 and (federation.sizes("test") == 1).all()
    assert federation.table([0, 999_999], "train")["y"].shape == (2, 1)


# Schedules


@pytest.mark.parametrize("epochs", [1, 3])
@pytest.mark.parametrize("batch_size", [1, 4, 10, 57, 1000])
def test_every_example_is_visited_exactly_once_an_epoch_in_full_batches_but_the_last(epochs, batch_size):
    plan = schedule(SIZES, epochs, batch_size, 0, 1, range(len(SIZES)))
    most = -(-SIZES.max() // batch_size)
    assert plan.shape == (len(SIZES), epochs * most, min(batch_size, SIZES.max()))
    for size, steps in zip(SIZES.tolist(), plan, strict=True):
        batches = -(-size // batch_size)
        for epoch in range(epochs):
            mine = steps[epoch * batches : (epoch + 1) * batches]
            assert sorted(mine[mine >= 0]) == list(range(size))
            lengths = (mine >= 0).sum(1).tolist()
            assert lengths == [batch_size] * (size // batch_size) + [size % batch_size] * (size % batch_size > 0)
        assert (steps[epochs * batches :] == -1).all(), "a client that is done has nothing left"
        filled = steps >= 0
        assert (np.diff(filled.astype(int), axis=1) <= 0).all(), "a short batch is filled up at its end"


def test_a_schedule_does_not_depend_on_the_rest_of_the_cohort():
    ids = np.array([7, 3, 10**9, 0, 4, 5])
    whole = schedule(SIZES, 2, 8, 5, 9, ids)
    for place in range(len(SIZES)):
        alone = schedule(SIZES[place : place + 1], 2, 8, 5, 9, ids[place : place + 1])[0]
        steps, width = alone.shape
        assert np.array_equal(whole[place, :steps, :width], alone)
        assert (whole[place, steps:] == -1).all() and (whole[place, :, width:] == -1).all()
    order = np.array([5, 0, 3, 1, 4, 2])
    assert np.array_equal(schedule(SIZES[order], 2, 8, 5, 9, ids[order]), whole[order])


def test_epochs_rounds_seeds_and_clients_have_orders_of_their_own():
    def order(seed, round, client):
        return schedule(np.array([40]), 2, 40, seed, round, [client])[0]

    orders = [*order(0, 1, 2), *order(0, 2, 2), *order(1, 1, 2), *order(0, 1, 3)]
    assert len({tuple(each) for each in orders}) == len(orders)
    assert np.array_equal(order(0, 1, 2), order(0, 1, 2))


def test_every_example_is_as_likely_to_come_first_as_every_other():
    clients, size = 20_000, 5
    first = schedule(np.full(clients, size), 1, size, 0, 1, range(clients))[:, 0, 0]
    share = np.bincount(first, minlength=size) / clients
    assert np.abs(share - 1 / size).max() < 5 * np.sqrt(1 / size * (1 - 1 / size) / clients)


@pytest.mark.parametrize("sizes", [[], [0], [0, 0]])
def test_without_examples_there_are_no_steps(sizes):
    plan = schedule(np.array(sizes, dtype=np.int64), 3, 8, 0, 1, range(len(sizes)))
    assert plan.shape[:2] == (len(sizes), 0)


def test_a_single_example_is_one_step_of_one():
    assert schedule(np.array([1]), 3, 8, 0, 1, [4]).tolist() == [[[0]] * 3]


@pytest.mark.parametrize("name", ["y", "a"])
@pytest.mark.parametrize(("value", "told"), [(-1, "values from -1 to 1"), (2, "values from 0 to 2")])
def test_labels_and_groups_with_names_are_all_named(name, value, told):
    good, names = torch.tensor([0, 1, 1, 0]), {name: ("no", "yes")}
    wrong = good.index_fill(0, torch.tensor([1]), value)
    Dataset("people", {name: good}, names=names)
    Dataset("people", {name: wrong})  # without names they are numbers like others
    Dataset("people", {"v": wrong}, names={"v": ("no", "yes")})
    Dataset("people", {name: good[:0]}, names=names)
    for columns, test, which in ((wrong, good, "columns"), (good, wrong, "test")):
        with pytest.raises(ValueError, match=f"people: column '{name}' of {which} has names for 0 to 1, and {told}"):
            Dataset("people", {name: columns}, {name: test}, names)


def test_a_column_must_be_a_tensor_and_not_be_called_mask():
    with pytest.raises(TypeError, match="numbers: column 'x' of columns must be a torch.Tensor, got a ndarray"):
        Dataset("numbers", {"x": np.arange(3)})
    with pytest.raises(ValueError, match="no column of columns may be called 'mask'"):
        Dataset("numbers", {"mask": torch.ones(3)})


def test_joint_labels_number_group_and_label_together():
    columns = {"a": torch.tensor([0, 1, 1, 2]), "y": torch.tensor([1, 0, 1, 0])}
    names = {"a": ("x", "y", "z"), "y": ("no", "yes")}
    made = joint_labels(Dataset("toy", columns, {name: column[:2] for name, column in columns.items()}, names))
    assert made.columns["ay"].tolist() == [1, 2, 3, 4] and made.test["ay"].tolist() == [1, 2]
    assert made.names["ay"] == ("x, no", "x, yes", "y, no", "y, yes", "z, no", "z, yes")
    with pytest.raises(ValueError, match="toy names no values of a: joint labels need both"):
        joint_labels(Dataset("toy", columns, names={"y": ("no", "yes")}))


def test_examples_are_visited_at_the_steps_that_they_name():
    steps = np.array([[0, 2, 0, 1, 9], [1, 1, 1, 0, 0], [5, 5, 5, 5, 5]])
    plan = planned(steps, np.array([4, 5, 0]))
    assert plan[0].tolist() == [[0, 2, -1], [3, -1, -1], [1, -1, -1]], "the fifth is padding"
    assert plan[1].tolist() == [[3, 4, -1], [0, 1, 2], [-1, -1, -1]]
    assert (plan[2] == -1).all()
    assert planned(np.zeros((2, 0), dtype=np.int64), np.array([0, 0])).shape == (2, 0, 0)
    with pytest.raises(ValueError, match="column step: steps are counted from 0, got -1"):
        planned(np.array([[0, -1]]), np.array([2]))
