"""Random numbers are a function of the path, and of nothing else."""

from itertools import permutations

import numpy as np
import pytest
import torch
from scipy import stats

from fedsim.randomness import generator, keys, rng, shuffled

PATHS = [
    (0, "draw", 1, 2),
    (1, "draw", 1, 2),
    (0, "prepare", 1, 2),
    (0, "draw", 2, 1),
    (0, "draw", 1, 3),
    (2**62, "draw", 1, 2),
]


def test_a_path_draws_the_same_again_and_every_other_path_something_else():
    for draw in (lambda path: rng(*path).random(), lambda path: float(torch.rand((), generator=generator(*path)))):
        first, again = ([draw(path) for path in PATHS] for _ in range(2))
        assert first == again and len(set(first)) == len(PATHS)


def test_fresh_generators_do_not_advance_each_other():
    one = generator(3, "a")
    torch.rand(10, generator=one)
    assert torch.equal(torch.rand(4, generator=generator(3, "a")), torch.rand(4, generator=generator(3, "a")))
    assert not torch.equal(torch.rand(4, generator=one), torch.rand(4, generator=generator(3, "a")))


def test_nobody_touches_or_reads_the_global_generators():
    torch.manual_seed(5)
    np_state, state = np.random.get_state()[1].copy(), torch.get_rng_state()
    generator(1), rng(1), keys(1, np.arange(3))
    assert torch.equal(torch.get_rng_state(), state) and np.array_equal(np.random.get_state()[1], np_state)
    before = torch.rand(3, generator=generator(1))
    torch.manual_seed(6)
    assert torch.equal(torch.rand(3, generator=generator(1)), before)


def test_generators_are_on_the_cpu():
    assert generator(1).device == torch.device("cpu")


def test_a_negative_seed_is_refused():
    with pytest.raises(ValueError, match="non-negative"):
        rng(-1)


# Keys


def test_the_keys_of_many_clients_are_those_of_each_alone():
    clients, epochs = np.array([0, 3, 10**12, 2**62]), np.array([[0], [7]])
    together = keys(5, "schedule", epochs, 4, clients)
    assert together.shape == (2, 4) and together.dtype == np.uint64
    for row, epoch in enumerate(epochs[:, 0]):
        for column, client in enumerate(clients):
            assert together[row, column] == keys(5, "schedule", int(epoch), 4, int(client))[0]


@pytest.mark.parametrize(
    "path",
    [
        (np.array([1, 2]), "x", 3),
        (np.array(1), "x", np.array([3])),
        (1, np.array(-2), 3),
        (1, np.array([2]), -3),
        (np.int64(1), np.array([], dtype=np.int64)),
    ],
)
def test_arrays_may_stand_anywhere_have_no_axis_and_hold_negative_numbers(path):
    first = [part.flat[0] if isinstance(part, np.ndarray) and part.size else part for part in path]
    drawn = keys(*path)
    if all(np.size(part) for part in path):
        assert drawn[0] == keys(*(part if isinstance(part, str) else int(part) for part in first))[0]
    else:
        assert drawn.shape == (0,)


def test_keys_depend_on_every_part_and_on_its_place():
    parts = list(permutations((0, 1, "a"))) + [(0, 1), (0, 1, "a", 0), (0,), (0, 0), (1,)]
    drawn = [int(keys(*path)[0]) for path in parts]
    assert len(set(drawn)) == len(parts)


def test_keys_of_neighbours_are_uniform_in_all_their_bits():
    drawn = keys(1, "uniform", 3, np.arange(100_000))
    assert len(np.unique(drawn)) == len(drawn)
    for byte in range(8):
        counts = np.bincount((drawn >> np.uint64(8 * byte) & np.uint64(255)).astype(np.int64), minlength=256)
        assert stats.chisquare(counts).pvalue > 1e-6
    together = np.histogram2d(drawn[:-1] / 2.0**64, drawn[1:] / 2.0**64, bins=16, range=[(0, 1), (0, 1)])[0]
    assert stats.chisquare(together.ravel()).pvalue > 1e-6


def test_keys_of_two_seeds_have_nothing_in_common():
    one, other = (keys(seed, np.arange(50_000)) / 2.0**64 for seed in (1, 2))
    assert abs(np.corrcoef(one, other)[0, 1]) < 5 / np.sqrt(50_000)
    half = one < 0.5
    assert abs(other[half].mean() - other[~half].mean()) < 5 * np.sqrt(4 / 12 / 50_000)


# Orders


def test_each_client_gets_its_own_numbers_in_some_order_with_filling_behind():
    sizes = np.array([4, 0, 1, 7])
    order = shuffled(sizes, keys(0, np.arange(4)))
    assert order.shape == (4, 7)
    for size, row in zip(sizes, order, strict=True):
        assert sorted(row[:size]) == list(range(size)) and (row[size:] == -1).all()


def test_an_order_does_not_depend_on_who_else_is_there():
    sizes, key = np.array([4, 9, 1, 30, 9]), keys(0, np.arange(5))
    whole = shuffled(sizes, key)
    for client in range(5):
        alone = shuffled(sizes[client : client + 1], key[client : client + 1])[0]
        assert np.array_equal(alone, whole[client, : sizes[client]])
    assert not np.array_equal(whole[1, :9], whole[4, :9])  # clients of one size have orders of their own


def test_all_orders_are_equally_likely():
    order = shuffled(np.full(60_000, 4), keys(2, "orders", np.arange(60_000)))
    _, counts = np.unique(order @ np.array([64, 16, 4, 1]), return_counts=True)
    assert len(counts) == len(list(permutations(range(4))))
    assert stats.chisquare(counts).pvalue > 1e-6


def test_no_clients_and_no_examples_have_an_empty_order():
    assert shuffled(np.array([], dtype=np.int64), keys(0, np.array([], dtype=np.int64))).shape == (0, 0)
    assert shuffled(np.array([0, 0]), keys(0, np.arange(2))).shape == (2, 0)


def test_a_trailing_zero_is_another_path():
    assert rng(1, "x").random() != rng(1, "x", 0).random()
    assert generator(1, "x").initial_seed() != generator(1, "x", 0).initial_seed()
