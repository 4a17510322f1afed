"""What clients keep stays theirs: gathered, scattered, written down and taken back row by row."""

from dataclasses import dataclass

import pytest
import torch

from fedsim import tree
from fedsim.client import Client
from fedsim.personal import Personal
from fedsim.task import Reply

N, SEED = 50, 3


@dataclass(frozen=True)
class Keeper(Client):
    """Keeps a vector drawn by chance, and a count in a branch of its own."""

    key: str = "own"
    width: int = 2

    def personal(self, rng):
        return {
            self.key: {"vector": torch.rand(self.width, generator=rng), "count": torch.tensor(0)},
            "shared": torch.full((1,), self.width, dtype=torch.float64),
        }

    def start(self, shared, personal, data):
        return {}

    def step(self, state, batch):
        return state

    def finish(self, shared, state, data):
        return Reply({}, torch.tensor(1.0))


@dataclass(frozen=True)
class Forgetful(Keeper):
    """Keeps nothing: what `Client` says."""

    personal = Client.personal


def store(**clients):
    return Personal(clients or {"train": Keeper()}, N, SEED)


def rows(ids, value):
    """What these clients keep when every number of client i is i + value."""
    numbers = torch.tensor(ids) + value
    return {
        "own": {"vector": numbers[:, None].expand(-1, 2).float(), "count": numbers},
        "shared": numbers[:, None].double(),
    }


def assert_same(one, other):
    assert_equal(tree.flatten(one), tree.flatten(other))


def assert_equal(one, other):
    """Named tensors, the same to the bit and in type."""
    assert one.keys() == other.keys()
    for name, leaf in one.items():
        assert torch.equal(leaf, other[name]) and leaf.dtype == other[name].dtype


def test_before_its_first_round_a_client_has_what_it_is_made_with_whoever_else_asks():
    kept = store()
    together = kept.gather([4, 9, 7])
    assert together["own"]["vector"].shape == (3, 2)
    for place, client in enumerate([4, 9, 7]):
        assert_same(tree.take(together, place), kept.first(client))
        assert_same(tree.take(store().gather([client]), 0), kept.first(client))
    assert not torch.equal(kept.first(4)["own"]["vector"], kept.first(9)["own"]["vector"])


def test_another_seed_makes_other_first_values():
    other = Personal({"train": Keeper()}, N, SEED + 1)
    assert not torch.equal(other.first(4)["own"]["vector"], store().first(4)["own"]["vector"])


def test_what_was_kept_is_there_again_in_any_order_and_among_the_unseen():
    kept = store()
    kept.scatter([4, 9, 7], rows([4, 9, 7], 100))
    assert_same(kept.gather([7, 4, 9]), rows([7, 4, 9], 100))
    mixed = kept.gather([1, 9, 2, 4])
    assert_same(tree.take(mixed, torch.tensor([1, 3])), rows([9, 4], 100))
    assert_same(tree.take(mixed, 0), kept.first(1))
    assert_same(tree.take(mixed, 2), kept.first(2))


def test_those_who_did_not_answer_are_untouched():
    kept = store()
    kept.scatter([4, 9], rows([4, 9], 100))
    kept.scatter([9], rows([9], 200))
    assert_same(kept.gather([4]), rows([4], 100))
    assert_same(kept.gather([9]), rows([9], 200))
    assert_same(tree.take(kept.gather([5]), 0), kept.first(5))


def test_gathering_copies():
    kept = store()
    kept.scatter([4, 9], rows([4, 9], 100))
    for ids in ([4, 9], [4, 1], [1, 2]):
        before = kept.gather(ids)
        for leaf in tree.leaves(kept.gather(ids)):
            leaf.zero_()
        assert_same(kept.gather(ids), before)


def test_keys_that_are_missing_stay_as_they_were():
    kept = store()
    kept.scatter([4], rows([4], 100))
    kept.scatter([4, 9], {"shared": torch.zeros(2, 1, dtype=torch.float64)})
    assert_same(kept.gather([4]), rows([4], 100) | {"shared": torch.zeros(1, 1, dtype=torch.float64)})
    assert_same(tree.take(kept.gather([9]), 0)["own"], kept.first(9)["own"])


def test_rows_survive_growing_one_by_one_and_many_at_once():
    kept, order = store(), torch.randperm(N, generator=torch.Generator().manual_seed(0)).tolist()
    for client in order[:20]:
        kept.scatter([client], rows([client], 100))
    kept.scatter(order[15:], rows(order[15:], 200))
    assert_same(kept.gather(order[:15]), rows(order[:15], 100))
    assert_same(kept.gather(range(N)), tree.stack([tree.take(kept.gather([c]), 0) for c in range(N)]))
    assert_same(kept.gather(order[15:]), rows(order[15:], 200))


def test_memory_grows_with_the_clients_seen_not_with_all_of_them():
    kept = Personal({"train": Keeper()}, 10**6, SEED)
    for client in range(0, 10**6, 10**5):
        kept.scatter([client], rows([client], 0))
    flat = kept.flat()
    assert sum(leaf.numel() for name, leaf in flat.items() if name.startswith("rows/")) == 10 * (2 + 1 + 1)


def test_several_clients_keep_side_by_side_whatever_the_order_of_their_actions():
    one = store(train=Keeper(), idle=Forgetful(), tune=Keeper(key="tuned"))
    first = one.first(4)
    assert sorted(tree.flatten(first)) == ["own/count", "own/vector", "shared", "tuned/count", "tuned/vector"]
    assert_same({"own": first["own"]}, {"own": store().first(4)["own"]})
    other = store(tune=Keeper(key="tuned"), train=Keeper()).first(4)
    assert all(torch.equal(leaf, tree.flatten(other)[name]) for name, leaf in tree.flatten(first).items())


def test_two_clients_that_begin_the_same_thing_differently_are_refused():
    with pytest.raises(
        ValueError, match="two clients of the experiment keep 'shared', and do not begin it with the same"
    ):
        store(train=Keeper(), tune=Keeper(key="tuned", width=3)).first(4)


def test_where_nobody_keeps_anything_there_is_nothing():
    kept = store(train=Forgetful())
    assert kept.gather([1, 2]) == {} and kept.flat() == {}
    kept.scatter([1, 2], {})
    kept.load({})
    with pytest.raises(ValueError, match=r"keeps \['own'\], but its personal\(\) makes only \[\]"):
        kept.scatter([1], {"own": torch.zeros(1, 1)})


def test_nobody_at_all_gathers_and_scatters_nothing():
    kept = store()
    assert kept.gather([]) == {}
    kept.scatter([], {"own": torch.zeros(0, 2)})
    assert kept.flat() == {}


# Checkpoints


def test_what_is_written_down_is_taken_back_by_an_empty_and_by_a_full_store():
    kept = store()
    kept.scatter([4, 9, 7], rows([4, 9, 7], 100))
    kept.scatter([9], rows([9], 200))
    flat = {name: leaf.clone() for name, leaf in kept.flat().items()}
    assert flat["ids"].tolist() == [4, 9, 7]
    for other in (store(), kept):
        other.scatter([1, 4], rows([1, 4], 300))
        other.load(flat)
        assert_same(other.gather(range(N)), _reference(flat))
        assert_equal(other.flat(), flat)


def _reference(flat):
    """What all clients keep: the rows of `flat`, and first values for everybody else."""
    by_client = {client: place for place, client in enumerate(flat["ids"].tolist())}
    rows = tree.unflatten({name.removeprefix("rows/"): leaf for name, leaf in flat.items() if name != "ids"})
    return tree.stack([tree.take(rows, by_client[c]) if c in by_client else store().first(c) for c in range(N)])


def test_loading_nothing_forgets_everything():
    kept = store()
    kept.scatter([4], rows([4], 100))
    kept.load({})
    assert kept.flat() == {} and torch.equal(kept.gather([4])["own"]["vector"][0], kept.first(4)["own"]["vector"])


def test_loading_goes_on_where_it_stood_and_keeps_growing():
    kept, other = store(), store()
    kept.scatter([4, 9, 7], rows([4, 9, 7], 100))
    other.load(kept.flat())
    for each in (kept, other):
        each.scatter([7, 1, 2, 3], rows([7, 1, 2, 3], 200))
    assert_equal(kept.flat(), other.flat())


def test_what_does_not_fit_is_refused_with_every_name():
    kept = store()
    kept.scatter([4, 9], rows([4, 9], 100))
    flat = kept.flat() | {"rows/other": torch.zeros(2), "rows/own/vector": torch.zeros(2, 5)}
    del flat["rows/shared"]
    with pytest.raises(ValueError) as caught:
        store().load(flat)
    assert str(caught.value) == (
        "what clients keep does not fit: missing shared; own/vector has shape (2, 5), expected (2, 2); surplus other"
    )


# Answers that do not fit


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"new": torch.zeros(2)}, r"a client keeps \['new'\], but its personal\(\) makes only \['own', 'shared'\]"),
        ({"shared": torch.zeros(2, 3, dtype=torch.float64)}, r"a tensor \(3,\) of torch.float64 where it had \(1,\)"),
        ({"shared": torch.zeros(2, 1)}, r"\(1,\) of torch.float32 where it had \(1,\) of torch.float64"),
        ({"own": {"vector": torch.zeros(2, 2)}}, r"trees differ: \['count', 'vector'\] against \['vector'\]"),
    ],
)
def test_an_answer_that_does_not_fit_is_refused_and_changes_nothing(change, complaint):
    kept = store()
    kept.scatter([4], rows([4], 100))
    before = {name: leaf.clone() for name, leaf in kept.flat().items()}
    with pytest.raises(ValueError, match=complaint):
        kept.scatter([4, 9], rows([4, 9], 200) | change)
    assert_equal(kept.flat(), before)
    assert_same(tree.take(kept.gather([9]), 0), kept.first(9))


def test_what_is_kept_for_a_client_that_does_not_exist_is_refused():
    kept = Personal({"train": Keeper()}, 5, 0)
    kept.scatter([4], kept.gather([4]))
    with pytest.raises(ValueError, match="client 4 keeps something, but the ids go from 0 to 3"):
        Personal({"train": Keeper()}, 4, 0).load(kept.flat())
