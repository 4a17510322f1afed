"""Folding: the same bits whoever merges which blocks, and the mean and the sum that they should be."""

import random

import pytest
import torch

from fedsim.engines.folding import Fold, Folds, pieces
from fedsim.tree import Rows


def fold(reduce, generator, clients):
    """The fold of a block of some clients, and what it was made of."""
    update = {"w": torch.randn(clients, 3, 2, generator=generator)}
    weight = torch.randint(0, 5, (clients,), generator=generator).double()
    made = Fold(reduce)
    made.add(update, weight)
    return made, update["w"], weight


def copied(one):
    return Fold(one.reduce, {"w": one.update["w"].clone()}, one.weight, one.count)


@pytest.mark.parametrize("reduce", ["mean", "sum"])
@pytest.mark.parametrize("blocks", [1, 2, 3, 7, 16, 25])
def test_blocks_merged_elsewhere_give_the_same_bits(reduce, blocks):
    generator, chance = torch.Generator().manual_seed(0), random.Random(1)
    made = [fold(reduce, generator, 1 + number % 4) for number in range(blocks)]
    alone = Folds(reduce)
    for one, *_ in made:
        alone.push(copied(one))
    whole = alone.whole()
    for _ in range(10):
        split = Folds(reduce)
        for some in pieces([chance.random() for _ in range(blocks)], chance.choice([1, 2, 3, 100])):
            part = Folds(reduce)
            for number in some:
                part.push(copied(made[number][0]))
            assert part.blocks == len(some)
            split.push(part.whole(), len(some))
        other = split.whole()
        assert torch.equal(whole.update["w"], other.update["w"])
        assert (whole.weight, whole.count) == (other.weight, other.count)


def test_the_order_of_blocks_does_matter_to_the_bits():
    generator = torch.Generator().manual_seed(0)
    made = [fold("mean", generator, 2)[0] for _ in range(8)]
    one, other = Folds("mean"), Folds("mean")
    for number in range(8):
        one.push(copied(made[number]))
        other.push(copied(made[7 - number]))
    assert not torch.equal(one.whole().update["w"], other.whole().update["w"])  # so the test above can fail


@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_it_is_the_mean_by_weight_or_the_sum(reduce):
    generator = torch.Generator().manual_seed(2)
    made = [fold(reduce, generator, 1 + number % 3) for number in range(13)]
    folds = Folds(reduce)
    for number, (one, *_) in enumerate(made):
        folds.push(one if number != 4 else Fold(reduce))  # a block in which nobody answered
    updates = torch.cat([update for number, (_, update, _) in enumerate(made) if number != 4]).double()
    weights = torch.cat([weight for number, (*_, weight) in enumerate(made) if number != 4])
    expected = updates.sum(0) if reduce == "sum" else torch.tensordot(weights / weights.sum(), updates, 1)
    whole = folds.whole()
    torch.testing.assert_close(whole.update["w"].double(), expected, rtol=1e-5, atol=1e-6)
    assert whole.count == len(weights) and whole.weight == float(weights.sum())


def test_what_is_given_is_not_changed():
    mine = [Fold("sum", {"w": torch.ones(2)}, 1.0, 1) for _ in range(4)]
    given = [one.update["w"] for one in mine]
    folds = Folds("sum")
    for one in mine:
        folds.push(one)
    assert torch.equal(folds.whole().update["w"], torch.full((2,), 4.0))
    assert all(torch.equal(leaf, torch.ones(2)) for leaf in given)


@pytest.mark.parametrize("workers", [1, 2, 3, 8, float("inf")])
@pytest.mark.parametrize("blocks", [0, 1, 2, 5, 25, 64, 1000])
def test_pieces_cover_all_blocks_once_in_aligned_powers_of_two(blocks, workers):
    lengths = [1.0 + number % 3 for number in range(blocks)]
    found = pieces(lengths, workers)
    assert [number for some in found for number in some] == list(range(blocks))
    for some in found:
        assert len(some).bit_count() == 1 and some.start % len(some) == 0
        assert len(some) == 1 or sum(lengths[n] for n in some) <= sum(lengths[some.start :]) / workers
    if workers == float("inf"):
        assert len(found) == blocks
    elif blocks == 1000:
        assert len(found) < 200  # few results travel


def test_a_block_that_takes_long_is_not_bound_to_others():
    assert pieces([1.0, 1.0, 100.0, 1.0], 2) == [range(2), range(2, 3), range(3, 4)]


# Rows of tables.


@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_rows_stay_rows_and_stand_for_the_same_table(reduce):
    generator = torch.Generator().manual_seed(0)
    sparse, dense = Folds(reduce), Folds(reduce)
    named = set()
    for clients in (2, 1, 3):
        index = torch.randint(-1, 9, (clients, 4), generator=generator)
        rows = Rows(index, torch.randn(clients, 4, 2, generator=generator, dtype=torch.float64), 20)
        tables = torch.stack([Rows(i, v, 20).dense() for i, v in zip(rows.index, rows.values, strict=True)])
        weight = torch.rand(clients, generator=generator, dtype=torch.float64)
        for folds, leaf in ((sparse, rows), (dense, tables)):
            one = Fold(reduce)
            one.add({"items": leaf}, weight)
            folds.push(one)
        named |= set(index[index >= 0].tolist())
    found = sparse.whole().update["items"]
    assert found.index.tolist() == sorted(named), "each row that somebody named, once"
    torch.testing.assert_close(found.dense(), dense.whole().update["items"], rtol=1e-12, atol=1e-14)


def test_the_mean_of_one_clients_rows_are_its_rows_to_the_bit():
    rows = Rows(torch.tensor([[4, 1, -1]]), torch.randn(1, 3, 2), 6)
    one = Fold("mean")
    one.add({"items": rows}, torch.tensor([0.3]))
    assert torch.equal(one.update["items"].values, rows.values[0, [1, 0]])
