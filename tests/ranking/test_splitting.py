"""Leave one out: who is trained on what, what is held out, and who is left out."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fedsim.data.dataset import Dataset
from fedsim.data.datasets import filmtrust, latent_factor_ratings, movielens_100k
from fedsim.data.federation import Partition
from fedsim.data.partition import by_column, iid
from fedsim.ranking import DRAWN, KNOWN, WANTED, chosen, leave_one_out


def dataset(rows, **others):
    """Interactions (user, item, time)."""
    columns = dict(zip(("user", "item", "time"), torch.tensor(rows).T, strict=True))
    return Dataset("some", columns | others)


def split(data, **settings):
    return leave_one_out(data, by_column(data.columns, column="user"), **settings)


def part(federation, user, name, y):
    """The items of a part that are said to be y."""
    found = federation.examples(user, name)
    return found["item"][found["y"] == y].tolist()


@pytest.fixture(scope="module")
def small():
    """Three users with 3, 4 and 3 of 8 items, in no order."""
    rows = [
        [0, 3, 50],
        [1, 7, 1],
        [0, 1, 10],
        [1, 2, 9],
        [2, 0, 5],
        [1, 0, 4],
        [0, 5, 20],
        [2, 6, 6],
        [1, 4, 2],
        [2, 1, 7],
    ]
    return dataset(rows)


def test_the_latest_is_tested_the_one_before_validated_and_the_others_are_trained_on(small):
    found = split(small, negatives=3, min_items=3)
    assert [part(found, user, "train", WANTED) for user in range(3)] == [[1], [7, 4], [0]]
    assert [part(found, user, "validation", WANTED) for user in range(3)] == [[5], [0], [6]]
    assert [part(found, user, "test", WANTED) for user in range(3)] == [[3], [2], [1]]


def test_what_a_user_is_known_to_have_stands_where_its_held_out_item_does(small):
    found = split(small, negatives=3, min_items=3)
    for user in range(3):
        train = part(found, user, "train", WANTED)
        assert part(found, user, "validation", KNOWN) == train
        assert part(found, user, "test", KNOWN) == train + part(found, user, "validation", WANTED)


def test_negatives_are_distinct_items_that_the_user_never_touched_and_the_same_in_every_run(small):
    found, again, other = (split(small, negatives=3, min_items=3, drawn_by=seed) for seed in (1, 1, 2))
    for user in range(3):
        touched = set(part(found, user, "test", KNOWN) + part(found, user, "test", WANTED))
        for name in ("validation", "test"):
            drawn = part(found, user, name, DRAWN)
            assert len(set(drawn)) == 3 and not touched & set(drawn)
            assert drawn == part(again, user, name, DRAWN)
    assert [part(found, user, "test", DRAWN) for user in range(3)] != [part(other, u, "test", DRAWN) for u in range(3)]


def test_without_validation_the_second_latest_is_one_to_train_on(small):
    found = split(small, negatives=3, min_items=3, validation=False)
    assert [part(found, user, "train", WANTED) for user in range(3)] == [[1, 5], [7, 4, 0], [0, 6]]
    assert found.sizes("validation").tolist() == [0, 0, 0]
    with_it = split(small, negatives=3, min_items=3)
    for user in range(3):
        assert part(found, user, "test", DRAWN) == part(with_it, user, "test", DRAWN), "the test is the same one"


def test_users_with_too_few_items_are_left_out_and_items_that_nobody_has_then(small):
    found = split(small, negatives=0, min_items=4)
    assert found.num_clients == 1
    assert found.names["item"] == ("0", "2", "4", "7")
    assert part(found, 0, "test", WANTED) == [1], "item 2, numbered anew"


def test_who_is_left_out_is_noted_behind_what_the_data_notes(small):
    assert split(small, negatives=0, min_items=3).notes == ()
    noted = replace(small, notes=("half of the users",))
    few = "1 of 3 users: 2 have fewer than min_items = 4 different items"
    assert split(noted, negatives=0, min_items=4).notes == ("half of the users", few)
    twice = dataset([[0, 0, 1], [0, 1, 2], [0, 2, 3], [0, 0, 9], [0, 1, 8], [4, 2, 1], [4, 2, 2]])
    assert split(twice, negatives=0, min_items=3).notes == (
        "4 of 7 interactions: 3 repeat one that is there already",  # item 0 and 1 of user 0, and item 2 of user 4
        "1 of 2 users: 1 has fewer than min_items = 3 different items",
    )


def test_clients_without_interactions_are_no_users_that_are_left_out(small):
    owned = by_column(small.columns, column="user")
    empty = Partition(owned.rows, np.append(owned.offsets, owned.offsets[-1]))
    assert leave_one_out(small, empty, negatives=0, min_items=3).notes == ()


def test_what_users_chose_is_counted_without_what_they_had_before_or_was_drawn(small):
    found = split(small, negatives=3, min_items=3)
    counted = [chosen(found, part).tolist() for part in ("train", "validation", "test")]
    assert counted == [[1, 2, 1], [1, 1, 1], [1, 1, 1]], "of 3, 4 and 3 items two are held out"
    without = split(small, negatives=3, min_items=3, validation=False)
    counted = [chosen(without, part).tolist() for part in ("train", "validation", "test")]
    assert counted == [[2, 3, 2], [0, 0, 0], [1, 1, 1]]


def test_items_that_the_data_names_stay(small):
    named = Dataset("some", small.columns, names={"item": tuple("abcdefgh")})
    found = split(named, negatives=1, min_items=4)
    assert found.names["item"] == tuple("abcdefgh")
    assert part(found, 0, "test", WANTED) == [2]


def test_an_item_that_occurs_twice_counts_once_where_it_occurs_first():
    found = split(
        dataset([[0, 0, 1], [0, 1, 2], [0, 2, 3], [0, 0, 9], [1, 3, 1], [1, 4, 2], [1, 5, 3]]), negatives=1, min_items=3
    )
    assert part(found, 0, "test", WANTED) == [2] and part(found, 0, "train", WANTED) == [0]


def test_of_two_at_the_same_time_the_first_is_the_later_one():
    found = split(dataset([[0, 0, 5], [0, 1, 5], [0, 2, 1], [1, 3, 1], [1, 4, 2], [1, 5, 3]]), negatives=1, min_items=3)
    assert part(found, 0, "test", WANTED) == [0] and part(found, 0, "validation", WANTED) == [1]


def test_without_times_a_random_item_is_held_out_always_the_same():
    columns = {"user": torch.arange(40) // 10, "item": torch.arange(40)}
    found, again = (split(Dataset("timeless", columns), negatives=5) for _ in range(2))
    tests = [part(found, user, "test", WANTED)[0] for user in range(4)]
    assert tests == [part(again, user, "test", WANTED)[0] for user in range(4)]
    assert tests != [9, 19, 29, 39]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"min_items": 2}, "min_items must be more than the 2 that are held out, got 2"),
        ({"min_items": 9}, "some: no user has min_items = 9 different items"),
        ({"min_items": 3, "negatives": 99}, "negatives = 99: must be at most 4, as user 1 has 4 of 8 items"),
        ({"negatives": -1}, "negatives must be >= 0, got -1"),
    ],
)
def test_what_cannot_be_split_is_refused(small, change, message):
    with pytest.raises(ValueError, match=message):
        split(small, **change)


def test_data_without_users_or_of_clients_with_several_is_refused(small):
    with pytest.raises(ValueError, match="lonely has no column user, only item"):
        leave_one_out(Dataset("lonely", {"item": torch.arange(4)}), iid({"item": torch.arange(4)}, 0, 2))
    with pytest.raises(ValueError, match="client 0 has . users; partition by_column 'user'"):
        leave_one_out(small, iid(small.columns, 0, 2), min_items=3, negatives=1)


def test_as_many_negatives_as_there_are_untouched_items_are_all_of_them_and_one_more_is_refused(small):
    found = split(small, negatives=4, min_items=3)
    assert sorted(part(found, 1, "test", DRAWN)) == [1, 3, 5, 6], "user 1 has 0, 2, 4 and 7 of 8"
    with pytest.raises(ValueError, match="negatives = 5: must be at most 4, as user 1 has 4 of 8 items"):
        split(small, negatives=5, min_items=3)


def plainly(data, partition, negatives, held, min_items, drawn_by):
    """Leave one out as a loop over users: what each trains on, its held-out items and what was drawn for them."""
    item, time = (data.columns[name].tolist() for name in ("item", "time"))
    kept = []
    for rows in np.split(partition.rows, partition.offsets[1:-1]):
        first = {}
        for row in sorted(rows.tolist()):
            first.setdefault(item[row], row)
        if len(first) >= min_items:
            kept.append([item[row] for row in sorted(first.values(), key=lambda row: (time[row], -row))])
    catalogue = sorted({one for items in kept for one in items})
    random = np.random.default_rng(drawn_by), np.random.default_rng([drawn_by, 1])
    users = []
    for items in kept:
        own = [catalogue.index(one) for one in items]
        never = np.setdiff1d(np.arange(len(catalogue)), own)
        drawn = [random[place].choice(never, negatives, replace=False).tolist() for place in range(held)]
        users.append((own[:-held], own[::-1][:held], drawn))
    return tuple(str(one) for one in catalogue), users


@pytest.mark.parametrize("seed", range(20))
def test_any_data_is_split_as_by_a_plain_loop_over_users(seed):
    """Ids with gaps, users with few interactions or none, duplicates, equal times, and rows in any order."""
    random = np.random.default_rng(seed)
    examples = int(random.integers(150, 300))
    columns = {
        "user": random.choice(
            [3, 5, 900, 10**12, 17, 18, 19, 20], examples, p=[0.2, 0.2, 0.2, 0.15, 0.2, 0.02, 0.02, 0.01]
        ),
        "item": random.choice(10**9, 60)[random.integers(60, size=examples)],
        "time": random.integers(20, size=examples),
    }
    data = Dataset("random", {name: torch.from_numpy(column) for name, column in columns.items()})
    owned = by_column(data.columns, column="user")
    clients = np.split(owned.rows, owned.offsets[1:-1])
    clients = [*map(random.permutation, clients), owned.rows[:0]]  # and a client without any
    partition = Partition(np.concatenate(clients), np.cumsum([0, *map(len, clients)]))
    held = 1 + seed % 2
    found = leave_one_out(data, partition, negatives=9, validation=held == 2, min_items=4, drawn_by=seed)
    names, users = plainly(data, partition, 9, held, 4, seed)
    assert found.names == {"item": names} and found.num_clients == len(users) > 3
    for user, (train, out, drawn) in enumerate(users):
        assert part(found, user, "train", WANTED) == train
        assert not set(train) & set(out) and len(set(out)) == held
        for place, name in zip(range(held), ("test", "validation"), strict=False):
            assert part(found, user, name, WANTED) == [out[place]]
            assert part(found, user, name, DRAWN) == drawn[place]
            assert part(found, user, name, KNOWN) == train + out[:place:-1]


@pytest.mark.parametrize("items", [9_990, 10_030, 300_000])
@pytest.mark.parametrize("negatives", [99, 400])
def test_negatives_are_those_of_a_choice_among_all_untouched_items(items, negatives):
    """On both sides of 10,000, where numpy goes another way, as it does for more than a fiftieth of them."""
    random = np.random.default_rng(items)
    own = [random.choice(items, size, replace=False) for size in (5, 40, 20)]
    columns = {
        "user": torch.arange(3).repeat_interleave(torch.tensor([5, 40, 20])),
        "item": torch.from_numpy(np.concatenate(own)),
        "time": torch.arange(65),
    }
    found = split(Dataset("wide", columns, names={"item": tuple(map(str, range(items)))}), negatives=negatives)
    random = np.random.default_rng(42)
    for user in range(3):
        never = np.setdiff1d(np.arange(items), own[user])
        assert part(found, user, "test", DRAWN) == random.choice(never, negatives, replace=False).tolist()


def test_items_that_only_users_had_who_are_left_out_may_be_drawn_where_the_data_names_them():
    columns = {"user": torch.tensor([0, 0, 0, 1]), "item": torch.tensor([0, 1, 2, 3]), "time": torch.arange(4)}
    named = Dataset("some", columns, names={"item": tuple("abcd")})
    assert part(split(named, negatives=1, min_items=3), 0, "test", DRAWN) == [3]
    with pytest.raises(ValueError, match="user 0 has 3 of 3 items"):
        split(Dataset("some", columns), negatives=1, min_items=3)


def test_clients_are_called_what_the_data_calls_the_users():
    columns = {"user": torch.tensor([0, 1, 1, 2, 2, 2]), "item": torch.tensor([0, 0, 1, 0, 1, 2])}
    named = Dataset("some", columns, names={"user": ("Ann", "Bob", "Cy")})
    assert split(named, negatives=0, min_items=2, validation=False).names["user"] == ("Bob", "Cy")
    assert "user" not in split(Dataset("some", columns), negatives=0, min_items=2, validation=False).names
    with pytest.raises(ValueError, match="negatives = 1: must be at most 0, as user Cy has 3 of 3 items"):
        split(named, negatives=1, min_items=2, validation=False)


def test_times_may_have_fractions_but_must_be_numbers():
    rows = {"user": torch.zeros(3, dtype=torch.int64), "item": torch.arange(3)}
    times = torch.tensor([0.25, 0.75, 0.5], dtype=torch.float64)
    assert part(split(Dataset("some", rows | {"time": times}), negatives=0, min_items=3), 0, "test", WANTED) == [1]
    for wrong in (torch.nan, torch.inf):
        times = torch.tensor([0.25, wrong, 0.5])
        with pytest.raises(ValueError, match="some: column 'time' must hold one finite number .*, got (nan|inf)"):
            split(Dataset("some", rows | {"time": times}), negatives=0, min_items=3)


@pytest.mark.parametrize(
    ("columns", "names", "message"),
    [
        ({"item": [0, 1, 3]}, {"item": ("a", "b", "c")}, "column 'item' must hold 0 to 2, which have names, got 3"),
        ({"item": [0, -1, 2]}, {}, "column 'item' must hold 0 or more, got -1"),
        ({"item": [0.0, 1.5, 2.0]}, {}, "column 'item' must hold one integer for each example, got float32"),
        ({"user": [0, 0, 1]}, {"user": ("Ann",)}, "column 'user' must hold 0 to 0, which have names, got 1"),
    ],
)
def test_users_and_items_that_are_no_numbers_or_have_no_names_are_refused(columns, names, message):
    three = {"user": [0, 0, 0], "item": [0, 1, 2]} | columns
    data = Dataset("some", {name: torch.tensor(column) for name, column in three.items()}, names=names)
    with pytest.raises(ValueError, match=message):
        leave_one_out(data, Partition(np.arange(3), np.array([0, 3])), negatives=0, min_items=3)


def test_a_user_who_is_several_clients_is_refused(small):
    rows = by_column(small.columns, column="user").rows
    with pytest.raises(ValueError, match="some: user 1 is 2 clients; partition by_column 'user'"):
        leave_one_out(small, Partition(rows, np.array([0, 3, 5, 7, 10])), min_items=3, negatives=1)


# Known data.


def test_the_generated_ratings_are_split_as_published():
    found = split(latent_factor_ratings(), validation=False)
    assert found.num_clients == 300 and len(found.names["item"]) == 400
    assert found.sizes().sum() == 7174 and (found.sizes().min(), found.sizes().max()) == (7, 40)
    assert sorted(part(found, 0, "train", WANTED))[:6] == [90, 95, 120, 161, 168, 213]
    assert len(part(found, 0, "train", WANTED)) == 12
    assert [part(found, user, "test", WANTED) for user in range(5)] == [[283], [41], [93], [380], [293]]
    assert part(found, 0, "test", DRAWN)[:5] == [22, 59, 127, 116, 330]


def real(name):
    folder = os.environ.get("FEDSIM_DATA")
    if not folder or not (Path(folder) / name).is_dir():
        pytest.skip(f"FEDSIM_DATA names no folder with {name}/")


def test_movielens_has_as_many_users_and_items_as_it_says():
    real("movielens-100k")
    found = split(movielens_100k(), validation=False)
    assert (found.num_clients, len(found.names["item"]), int(found.sizes().sum())) == (943, 1682, 99_057)
    sizes = np.array([len(part(found, user, "test", DRAWN)) for user in range(0, 943, 100)])
    assert (sizes == 99).all()


def test_filmtrust_has_as_many_users_and_items_as_are_active():
    real("filmtrust")
    found = split(filmtrust(), validation=False)
    assert (found.num_clients, len(found.names["item"]), int(found.sizes().sum())) == (1227, 2059, 33_659)
