"""Worker: the inner engine in a process of its own."""

import os
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from fedsim.client import Client
from fedsim.data.federation import Federation
from fedsim.engines.engine import Local
from fedsim.engines.ray.carry import Frozen, FrozenPart, freeze_part, thaw
from fedsim.task import Cohort, Reduce, Task

Inner = Callable[[Federation, Mapping[str, Client], int], Local]


class Tables(NamedTuple):
    """A federation on its way to workers, which read its columns where they lie."""

    columns: Frozen
    rest: Federation  # without them


class Assignment(NamedTuple):
    """A block, without what all blocks of a round share."""

    action: str
    round: int
    reduce: Reduce
    ids: list[int]
    personal: Frozen


class Worker:
    """What stands in a worker process."""

    def __init__(self, inner: Inner, tables: Tables, clients: Mapping[str, Client], seed: int, threads: int) -> None:
        torch.set_num_threads(threads)
        rest = tables.rest
        federation = Federation(thaw(tables.columns, copy=False), rest.rows, rest.bounds, {}, rest.names, rest.name)
        self.engine = inner(federation, clients, seed)
        self.round = (-1, "")
        self.shared: Any = {}

    def ready(self) -> int:
        """The process."""
        return os.getpid()

    def run(self, shared: Frozen, block: Assignment) -> FrozenPart:
        """What comes of a block."""
        start = time.perf_counter()
        if self.round != (block.round, block.action):  # once a round; and a copy, for a client may try to write there
            self.round, self.shared = (block.round, block.action), thaw(shared)
        task = Task(block.action, self.shared, None, block.round, block.reduce)
        part = self.engine.run_block(task, Cohort(block.ids, thaw(block.personal)))
        return freeze_part(part, time.perf_counter() - start)

    def call(self, function: Callable[[Any, Any], Any], shared: Any, item: Any) -> Any:
        """What a function makes of an item."""
        return function(shared, item)
