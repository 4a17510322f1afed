"""Leave one out: what each user is trained on, and which items it is asked to put in order.

Every user is a client. Its latest item is for testing, the one before for validation, the others are for training. In
the two held-out parts stand, besides the item that is held out, items drawn among those that the user never touched,
and those that it is known to have, which nobody should propose to it.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsim.data.dataset import Dataset
from fedsim.data.federation import Federation, Partition
from fedsim.ranges import Count, Natural, checked

WANTED, DRAWN, KNOWN = 1, 0, -1  # what column "y" says of an item: held out or chosen, drawn as a negative, had before
RANDOM_TIME = 42  # the seed of times, where there are none

Ints = NDArray[np.int64]


class _Users(NamedTuple):
    """Interactions of N users, each user's in the order of time."""

    items: Ints  # (E,) numbered from 0
    offsets: Ints  # (N + 1,)
    names: tuple[str, ...]  # what the items are called in the data, I

    def of(self, user: int) -> Ints:
        return self.items[self.offsets[user] : self.offsets[user + 1]]


@checked
def leave_one_out(
    dataset: Dataset,
    partition: Partition,
    negatives: Natural = 99,
    validation: bool = True,
    min_items: Count = 5,
    drawn_by: Natural = 42,
) -> Federation:
    """The federation in which each user's latest item is for testing and, with `validation`, the one before for that.

    Its columns are "item" and "y": 1 for an item that the user chose, in a held-out part the one that is held out; 0
    for one of the `negatives` drawn for it; -1 for one that the user had before, all of which stand there too.

    Users with fewer than `min_items` different items are left out. Where the data names no items, these are the ones
    that somebody has then, numbered anew in their order. Of two interactions of a user with an item the first in the
    data counts, and of two at the same time the first is the later one. Without a column "time" a random item is held
    out.

    Args:
        dataset: columns "user", "item" and, if known, "time".
        partition: whose interactions are a client's: those of one user.
        negatives: how many items are drawn for each held-out one, uniformly among those the user never touched.
        validation: whether the second latest item is held out as well; else it is one to train on.
        min_items: how many different items a user must have.
        drawn_by: the seed of the negatives; not that of the run, so that all runs put the same items in order.

    Raises:
        ValueError: a column is missing, no user has enough items, or there are not so many negatives.
    """
    held = 2 if validation else 1
    if min_items <= held:
        raise ValueError(f"min_items must be more than the {held} that are held out, got {min_items}")
    users = _in_time(dataset, partition, min_items)
    num_items = len(users.names)
    random = np.random.default_rng(drawn_by), np.random.default_rng([drawn_by, 1])
    parts: list[list[Ints]] = []
    for user in range(len(users.offsets) - 1):
        items = users.of(user)
        if num_items - len(items) < negatives:
            raise ValueError(
                f"{dataset.name}: user {user} has {len(items)} of {num_items} items, so there are not {negatives} "
                "negatives to draw: ask for fewer"
            )
        never = np.setdiff1d(np.arange(num_items), items)
        drawn = [rng.choice(never, negatives, replace=False) for rng in random[:held]]
        parts.append(_parts(items, drawn))
    return _federation(dataset, users.names, parts)


def _parts(items: Ints, drawn: list[Ints]) -> list[Ints]:
    """(item, y) of a user's training, validation and test part, (n, 2) each; `drawn` for the test item first."""
    train = items[: -len(drawn)]
    parts = [np.stack([train, np.full_like(train, WANTED)], 1), np.zeros((0, 2), dtype=np.int64)]
    for place in range(len(drawn) - 1, -1, -1):  # of validation, if there is one, and of testing
        known = items[: len(items) - 1 - place]
        item = np.concatenate([items[len(known) : len(known) + 1], drawn[place], known])
        y = np.repeat([WANTED, DRAWN, KNOWN], [1, len(drawn[place]), len(known)])
        parts.append(np.stack([item, y], 1))
    return parts if len(drawn) == 1 else [parts[0], *parts[2:]]


def _federation(dataset: Dataset, names: tuple[str, ...], parts: list[list[Ints]]) -> Federation:
    table = np.concatenate([part for user in parts for part in user])
    sizes = np.array([[len(part) for part in user] for user in parts])  # (N, 3)
    ends = sizes.ravel().cumsum().reshape(sizes.shape)
    bounds = np.column_stack([ends[:, 0] - sizes[:, 0], ends])
    columns: dict[str, Tensor] = {
        "item": torch.from_numpy(np.ascontiguousarray(table[:, 0])),
        "y": torch.from_numpy(np.ascontiguousarray(table[:, 1])),
    }
    return Federation(columns, np.arange(len(table)), bounds, names={"item": names}, name=dataset.name)


def _in_time(dataset: Dataset, partition: Partition, min_items: int) -> _Users:
    """The users with enough items, and their items in the order of time."""
    if missing := [name for name in ("user", "item") if name not in dataset.columns]:
        has = ", ".join(sorted(dataset.columns)) or "none"
        raise ValueError(f"{dataset.name} has no column {' and no column '.join(missing)}, only {has}")
    item = dataset.columns["item"].numpy()
    time = _times(dataset)
    kept = []
    for client in range(len(partition.sizes)):
        rows = partition.rows[partition.offsets[client] : partition.offsets[client + 1]]
        if len(owners := np.unique(dataset.columns["user"].numpy()[rows])) > 1:
            raise ValueError(f"{dataset.name}: client {client} has {len(owners)} users; partition by_column 'user'")
        rows = rows[np.sort(np.unique(item[rows], return_index=True)[1])]
        if len(rows) >= min_items:
            # Ascending; of equal times the first in the data stands last.
            kept.append(item[rows[np.lexsort((-np.arange(len(rows)), time[rows]))]])
    if not kept:
        raise ValueError(f"{dataset.name}: no user has min_items = {min_items} different items")
    items, offsets = np.concatenate(kept), np.concatenate([[0], np.cumsum([len(part) for part in kept])])
    if "item" in dataset.names:
        return _Users(items, offsets, dataset.names["item"])
    numbers, items = np.unique(items, return_inverse=True)
    return _Users(items, offsets, tuple(str(number) for number in numbers))


def _times(dataset: Dataset) -> Ints:
    if "time" in dataset.columns:
        return np.asarray(dataset.columns["time"].numpy())
    random = np.random.default_rng(RANDOM_TIME)
    return random.integers(10**9, size=len(dataset), endpoint=True)
