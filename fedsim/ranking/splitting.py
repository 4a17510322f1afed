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

from fedsim.data.dataset import Dataset, left_out
from fedsim.data.federation import Federation, Partition
from fedsim.ranges import Count, Natural, checked

WANTED, DRAWN, KNOWN = 1, 0, -1  # what column "y" says of an item: held out or chosen, drawn as a negative, had before
RANDOM_TIME = 42  # the seed of times, where there are none

Ints = NDArray[np.int64]


class _Users(NamedTuple):
    """Interactions of N users, each user's in the order of time."""

    items: Ints  # (E,) numbered from 0
    sizes: Ints  # (N,) how many of them are each user's
    names: tuple[str, ...]  # what the items are called in the data, I
    called: tuple[str, ...]  # what the users are called in the data, N
    notes: tuple[str, ...]  # which users and interactions are not among them

    @property
    def first(self) -> Ints:
        """Where each user's items begin, (N,)."""
        return self.sizes.cumsum() - self.sizes


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
    for one of the `negatives` drawn for it; -1 for one that the user had before, all of which stand there too. Where
    the data names users, names["user"] tells who the clients are.

    Users with fewer than `min_items` different items are left out. Where the data names items, all of these may be
    drawn, also those that only users had who are left out; else the items are the ones that somebody has then,
    numbered anew in their order. Of two interactions of a user with an item the first in the data counts, and of two at
    the same time the first is the later one. Without a column "time" a random item is held out. The notes say how many
    users and interactions were left out, and why.

    Args:
        dataset: columns "user", "item" and, if known, "time".
        partition: whose interactions are a client's: those of one user.
        negatives: how many items are drawn for each held-out one, uniformly among those the user never touched.
        validation: whether the second latest item is held out as well; else it is one to train on.
        min_items: how many different items a user must have.
        drawn_by: the seed of the negatives; not that of the run, so that all runs put the same items in order.

    Raises:
        ValueError: a column is missing or not of that kind, a client has several users or a user several clients, no
            user has enough items, or there are not so many negatives.
    """
    held = 2 if validation else 1
    if min_items <= held:
        raise ValueError(f"min_items must be more than the {held} that are held out, got {min_items}")
    users = _in_time(dataset, partition, min_items)
    most, num_items = int(users.sizes.argmax()), len(users.names)
    if num_items - users.sizes[most] < negatives:
        raise ValueError(
            f"{dataset.name}: negatives = {negatives}: must be at most {num_items - users.sizes[most]}, as "
            f"user {users.called[most]} has {users.sizes[most]} of {num_items} items"
        )
    random = np.random.default_rng(drawn_by), np.random.default_rng([drawn_by, 1])
    item, y, bounds = _parts(users, [_negatives(users, negatives, rng) for rng in random[:held]])
    columns: dict[str, Tensor] = {"item": torch.from_numpy(item), "y": torch.from_numpy(y)}
    names = {"item": users.names} | ({"user": users.called} if "user" in dataset.names else {})
    notes = dataset.notes + users.notes
    return Federation(columns, np.arange(len(item)), bounds, names=names, name=dataset.name, notes=notes)


def _negatives(users: _Users, negatives: int, random: np.random.Generator) -> Ints:
    """Distinct items that each user never touched, (N, negatives).

    For each user this is random.choice(np.setdiff1d(np.arange(I), own), negatives, replace=False), to the last number,
    but without listing the I items: what is drawn are places p in the list of untouched items, and before the p-th of
    these there are as many own items as have at most p untouched ones below.
    """
    num_items, count = len(users.names), len(users.sizes)
    places = np.array([random.choice(free, negatives, replace=False) for free in num_items - users.sizes])
    owner = np.repeat(np.arange(count), users.sizes)
    below = users.items[np.lexsort((users.items, owner))] - _spans(np.zeros(count, dtype=np.int64), users.sizes)
    # All users in one ascending list: each user's numbers, which are at most I, are moved behind those of the last one.
    shift = np.arange(count) * (num_items + 1)
    own = np.searchsorted(below + shift[owner], places + shift[:, None], side="right") - users.first[:, None]
    return np.asarray(places + own)


def _parts(users: _Users, drawn: list[Ints]) -> tuple[Ints, Ints, Ints]:
    """Items and y of all users' parts, and the bounds of these; `drawn` (N, negatives) for the test items first."""
    held, first, size = len(drawn), users.first, users.sizes
    sizes = np.zeros((len(size), 3), dtype=np.int64)
    sizes[:, 0] = size - held
    for place, negatives in enumerate(drawn):  # the latest item is tested, in part 2; the one before validated, in 1
        sizes[:, 2 - place] = size - place + negatives.shape[1]
    ends = sizes.ravel().cumsum().reshape(sizes.shape)
    begins = ends - sizes
    item, y = np.empty(ends[-1, -1], dtype=np.int64), np.full(ends[-1, -1], KNOWN, dtype=np.int64)
    train = _spans(begins[:, 0], sizes[:, 0])
    item[train], y[train] = users.items[_spans(first, sizes[:, 0])], WANTED
    for place, negatives in enumerate(drawn):
        start, known = begins[:, 2 - place], size - 1 - place
        item[start], y[start] = users.items[first + known], WANTED
        among = start[:, None] + 1 + np.arange(negatives.shape[1])
        item[among], y[among] = negatives, DRAWN
        item[_spans(start + 1 + negatives.shape[1], known)] = users.items[_spans(first, known)]
    return item, y, np.column_stack([begins[:, 0], ends])


def _spans(start: Ints, size: Ints) -> Ints:
    """start[0], start[0] + 1, ... (size[0] numbers), then start[1], ..."""
    return np.arange(size.sum()) + np.repeat(start - (size.cumsum() - size), size)


def _in_time(dataset: Dataset, partition: Partition, min_items: int) -> _Users:
    """The users with enough items, and their items in the order of time."""
    if missing := [name for name in ("user", "item") if name not in dataset.columns]:
        has = ", ".join(sorted(dataset.columns)) or "none"
        raise ValueError(f"{dataset.name} has no column {' and no column '.join(missing)}, only {has}")
    item, time = _numbered(dataset, "item"), _times(dataset)
    user = _owners(dataset, partition)
    rows, client = partition.rows, np.repeat(np.arange(len(partition.sizes)), partition.sizes)
    order = np.lexsort((rows, item[rows], client))  # each client's rows by item, the first in the data first
    rows, client = rows[order], client[order]
    new = (np.diff(client, prepend=-1) != 0) | (np.diff(item[rows], prepend=-1) != 0)
    rows, client = rows[new], client[new]
    sizes = np.bincount(client, minlength=len(partition.sizes))
    enough = sizes >= min_items
    if not enough.any():
        raise ValueError(f"{dataset.name}: no user has min_items = {min_items} different items")
    notes = _left_out(partition, sizes, enough, min_items)
    rows, client = rows[enough[client]], client[enough[client]]
    items = item[rows[np.lexsort((-rows, time[rows], client))]]  # ascending; of equal times the first stands last
    called = _called(dataset, "user", user[enough])
    if "item" in dataset.names:
        return _Users(items, sizes[enough], dataset.names["item"], called, notes)
    numbers, items = np.unique(items, return_inverse=True)
    return _Users(items, sizes[enough], tuple(map(str, numbers.tolist())), called, notes)


def _left_out(partition: Partition, sizes: Ints, enough: NDArray[np.bool_], min_items: int) -> tuple[str, ...]:
    """What the split leaves out, of clients with `sizes` different items of which some have `enough`, (N,) each."""
    again, few = "one that is there already", f"fewer than min_items = {min_items} different items"
    users = left_out(int(enough.sum()), int((sizes > 0).sum()), "users", f"has {few}", f"have {few}")
    rows = left_out(int(sizes.sum()), len(partition.rows), "interactions", f"repeats {again}", f"repeat {again}")
    return rows + users


def _owners(dataset: Dataset, partition: Partition) -> Ints:
    """Which user each client is, (N,); -1 for a client without interactions."""
    user, sizes = _numbered(dataset, "user")[partition.rows], partition.sizes
    owner = np.full(len(sizes), -1)
    owner[sizes > 0] = user[partition.offsets[:-1][sizes > 0]]
    if len(strange := np.flatnonzero(user != np.repeat(owner, sizes))):
        client = int(np.searchsorted(partition.offsets, strange[0], side="right")) - 1
        number = len(np.unique(user[partition.offsets[client] : partition.offsets[client + 1]]))
        raise ValueError(f"{dataset.name}: client {client} has {number} users; partition by_column 'user'")
    users, clients = np.unique(owner[sizes > 0], return_counts=True)
    if (clients > 1).any():
        (name,) = _called(dataset, "user", users[[clients.argmax()]])
        raise ValueError(f"{dataset.name}: user {name} is {clients.max()} clients; partition by_column 'user'")
    return owner


def _called(dataset: Dataset, column: str, values: Ints) -> tuple[str, ...]:
    names = dataset.names.get(column)
    return tuple(names[value] if names else str(value) for value in values.tolist())


def _numbered(dataset: Dataset, name: str) -> Ints:
    """A column of users or items, (E,): whole numbers from 0, each with a name if the data has names of them."""
    values = dataset.columns[name].numpy()
    if values.ndim != 1 or not np.issubdtype(values.dtype, np.integer):
        kind = f"{values.dtype} of shape {values.shape}"
        raise ValueError(f"{dataset.name}: column {name!r} must hold one integer for each example, got {kind}")
    most = len(dataset.names[name]) - 1 if name in dataset.names else np.iinfo(np.int64).max
    if len(wrong := values[(values < 0) | (values > most)]):
        allowed = f"0 to {most}, which have names" if name in dataset.names else "0 or more"
        raise ValueError(f"{dataset.name}: column {name!r} must hold {allowed}, got {wrong[0]}")
    return np.asarray(values, dtype=np.int64)


def _times(dataset: Dataset) -> NDArray[np.int64] | NDArray[np.float64]:
    if "time" not in dataset.columns:
        random = np.random.default_rng(RANDOM_TIME)
        return random.integers(10**9, size=len(dataset), endpoint=True)
    time = np.asarray(dataset.columns["time"].numpy())
    if time.ndim != 1 or not np.isfinite(time).all():
        told = f"{time[~np.isfinite(time)][0]}" if time.ndim == 1 else f"shape {time.shape}"
        raise ValueError(f"{dataset.name}: column 'time' must hold one finite number for each example, got {told}")
    return time
