"""Federation: data by client, as columns and row numbers, so that a million clients cost two arrays."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsim.data.dataset import Dataset
from fedsim.randomness import keys, shuffled
from fedsim.ranges import Natural, Probability, checked
from fedsim.task import Batch

Ids = Sequence[int] | NDArray[np.integer]
SPLITS = ("train", "validation", "test")


class Partition(NamedTuple):
    """Which rows each client owns: client i has rows[offsets[i]:offsets[i + 1]]."""

    rows: NDArray[np.int64]  # (E,) rows of the columns; a row may be absent, or owned by several clients
    offsets: NDArray[np.int64]  # (N + 1,)

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Examples of each client, (N,)."""
        return np.diff(self.offsets)


@dataclass(frozen=True, eq=False)
class Federation:
    """The data of N clients, each with a training, a validation and a test part.

    Client i trains on rows[bounds[i, 0]:bounds[i, 1]], validates on the rows up to bounds[i, 2] and tests on those up
    to bounds[i, 3].
    """

    columns: Batch  # leaves (E, ...)
    rows: NDArray[np.int64]  # (E,)
    bounds: NDArray[np.int64]  # (N, 4)
    test: Batch = field(default_factory=dict)  # leaves (E', ...): a common test set that no client owns; {} for none
    names: dict[str, tuple[str, ...]] = field(default_factory=dict)
    name: str = "federation"
    notes: tuple[str, ...] = ()  # what was left out of the data, a sentence each

    @property
    def num_clients(self) -> int:
        """N."""
        return len(self.bounds)

    def span(self, ids: Ids, split: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """First position in `rows` and number of examples of each client's part, (C,) and (C,)."""
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
        chosen = np.asarray(ids, dtype=np.int64)
        part = SPLITS.index(split)
        outside = chosen[(chosen < 0) | (chosen >= self.num_clients)]
        if outside.size:
            raise ValueError(f"client {outside[0]} does not exist: ids go from 0 to {self.num_clients - 1}")
        bounds = self.bounds[chosen]
        return bounds[:, part], bounds[:, part + 1] - bounds[:, part]

    def sizes(self, split: str = "train", ids: Ids | None = None) -> NDArray[np.int64]:
        """Number of examples of each client, (C,); of all of them when `ids` is None."""
        return self.span(np.arange(self.num_clients) if ids is None else ids, split)[1]

    def examples(self, client: int, split: str = "train") -> Batch:
        """What one client owns: leaves (n, ...)."""
        start, size = (int(value[0]) for value in self.span([client], split))
        rows = self.rows[start : start + size]
        if size and rows[-1] - rows[0] == size - 1 and bool((np.diff(rows) == 1).all()):
            return {name: column[rows[0] : rows[0] + size] for name, column in self.columns.items()}  # no copy
        return self._rows(rows)

    def _rows(self, rows: NDArray[np.int64]) -> Batch:
        """Some rows of the columns, leaves (*rows.shape, ...)."""
        flat = torch.from_numpy(rows.reshape(-1))

        def pick(column: Tensor) -> Tensor:  # which copies whole rows, as indexing does not
            return column.index_select(0, flat.to(column.device)).view(*rows.shape, *column.shape[1:])

        return {name: pick(column) for name, column in self.columns.items()}

    def to(self, device: torch.device) -> "Federation":
        """The same federation with its columns on a device."""
        return replace(self, columns={name: column.to(device) for name, column in self.columns.items()})

    def table(self, ids: Ids, split: str = "train") -> Batch:
        """What several clients own, padded to the longest: leaves (C, n, ...), with "mask" (C, n)."""
        start, size = self.span(ids, split)
        position = np.arange(int(size.max(initial=0)))
        mask = position < size[:, None]  # (C, n)
        rows = self.rows[np.where(mask, start[:, None] + position, 0)] if self.rows.size else np.zeros_like(mask, int)
        padded = self._rows(rows)
        device = next((column.device for column in padded.values()), torch.device("cpu"))
        return padded | {"mask": torch.from_numpy(mask).to(device)}

    def central(self, each: int = 1024) -> "Federation":
        """The common test set as a federation of clients with `each` examples at most, whose test parts they are."""
        size = len(next(iter(self.test.values()))) if self.test else 0
        start = np.arange(0, max(size, 1), each)
        bounds = np.stack([start, start, start, np.minimum(start + each, size)], axis=1)
        return Federation(self.test, np.arange(size), bounds, names=self.names, name=f"{self.name} (test set)")


@checked
def divide(
    dataset: Dataset,
    partition: Partition,
    validation: Probability = 0.0,
    test: Probability = 0.0,
    seed: Natural = 0,
) -> Federation:
    """The federation in which each client's rows are shuffled, then cut into a training, validation and test part.

    A client with n examples has round(test * n) of them for testing and round(validation * n) for validation, but
    keeps at least one for training if it has any.
    """
    if validation + test > 1:
        raise ValueError(f"validation + test must be at most 1, got {validation} + {test}")
    sizes = partition.sizes
    if validation or test:  # otherwise the order matters to nobody, and contiguous rows can be read without a copy
        order = np.repeat(np.arange(len(sizes)), sizes)
        chance = keys(seed, "divide", np.arange(len(partition.rows)))
        rows = partition.rows[np.lexsort((chance, order))]
    else:
        rows = partition.rows
    tested = np.minimum(np.rint(test * sizes), np.maximum(sizes - 1, 0)).astype(np.int64)
    validated = np.minimum(np.rint(validation * sizes), np.maximum(sizes - tested - 1, 0)).astype(np.int64)
    if test and not tested.any():
        raise ValueError(
            f"test = {test} leaves no client a test example: the largest client has {sizes.max()} examples"
        )
    start, end = partition.offsets[:-1], partition.offsets[1:]
    bounds = np.stack([start, end - tested - validated, end - tested, end], axis=1)
    return Federation(dataset.columns, rows, bounds, dataset.test, dataset.names, dataset.name, dataset.notes)


def schedule(
    sizes: NDArray[np.int64], epochs: int, batch_size: int, seed: int, round: int, ids: Ids
) -> NDArray[np.int64]:
    """Which example each client visits at which step: (C, T, B), -1 where none.

    Every epoch visits a client's examples in a fresh order, in batches of `batch_size`; the last batch of an epoch may
    be short. A client's rows depend on (seed, round, client) and its own size alone, never on the rest of the cohort.
    """
    longest = int(sizes.max(initial=0))
    batches = -(-longest // batch_size)
    width = min(batch_size, longest)
    plan = np.full((len(sizes), epochs * batches, width), -1, dtype=np.int64)
    steps = -(-sizes // batch_size)  # (C,) batches an epoch
    client = np.asarray(ids, dtype=np.int64)
    for epoch in range(epochs):
        order = shuffled(sizes, keys(seed, "schedule", round, epoch, client))  # (C, n), -1 behind each client's end
        order = np.pad(order, ((0, 0), (0, batches * width - longest)), constant_values=-1)
        for index, cut in enumerate(order.reshape(len(sizes), batches, width).swapaxes(0, 1)):
            alive = index < steps
            plan[alive, epoch * steps[alive] + index] = cut[alive]
    return plan[:, : epochs * int(steps.max(initial=0))]


def planned(steps: NDArray[np.int64], sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """The same where it is said of each example at which step it is visited, (C, n), of each client's first `sizes`.

    Raises:
        ValueError: a step is below 0.
    """
    there = np.arange(steps.shape[1]) < sizes[:, None]
    if (steps[there] < 0).any():
        raise ValueError(f"column step: steps are counted from 0, got {steps[there].min()}")
    client, example = np.nonzero(there)
    step = steps[client, example]
    order = np.lexsort((example, step, client))
    client, example, step = client[order], example[order], step[order]
    begins = np.flatnonzero(np.diff(client, prepend=-1) | np.diff(step, prepend=-1))
    length = np.diff(begins, append=len(step))
    place = np.arange(len(step)) - np.repeat(begins, length)  # in its batch
    plan = np.full((len(sizes), step.max(initial=-1) + 1, length.max(initial=0)), -1, dtype=np.int64)
    plan[client, step, place] = example
    return plan
