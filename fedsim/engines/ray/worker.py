"""Worker: the inner engine in a process of its own."""

import os
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from fedsim.client import Client
from fedsim.data.federation import Federation
from fedsim.engines.device import confine
from fedsim.engines.engine import Local
from fedsim.engines.gathering import Gathering
from fedsim.engines.ray.carry import Frozen, FrozenPart, freeze_part, thaw
from fedsim.engines.vectorised import Vectorised
from fedsim.task import Cohort, Reduce, Task

Inner = Callable[..., Local]  # (federation, clients, seed, device=...)


class Tables(NamedTuple):
    """A federation on its way to workers, which read its columns where they lie."""

    columns: Frozen
    rest: Federation  # without them


class Assignment(NamedTuple):
    """Neighbouring blocks, without what all blocks of a round share."""

    action: str
    round: int
    reduce: Reduce
    number: int  # of the task: the same for all of its assignments, and no other's
    blocks: list[list[int]]  # the ids of each
    personal: list[Frozen]


class Outcome(NamedTuple):
    """What came of an assignment."""

    parts: list[FrozenPart]  # one, or one for each block where they are not of one form
    seconds: float  # that it took


class Worker:
    """What stands in a worker process."""

    def __init__(
        self, inner: Inner, tables: Tables, clients: Mapping[str, Client], seed: int, threads: int, gpus: float
    ) -> None:
        torch.set_num_threads(threads)
        rest = tables.rest
        federation = Federation(thaw(tables.columns, copy=False), rest.rows, rest.bounds, {}, rest.names, rest.name)
        self.engine = inner(federation, clients, seed, device="cuda" if gpus else "cpu")
        if gpus:
            confine(self.engine.place, gpus)
            torch.backends.cudnn.deterministic = True  # or the bits would differ from worker to worker
        self.number, self.task = 0, Task("", {})

    def ready(self) -> int:
        """The process."""
        return os.getpid()

    def _receive(self, shared: Frozen, number: int, action: str, round: int, reduce: Reduce) -> Task:
        """The task; only once its tensors are copied, for a client may try to write there."""
        if self.number != number:
            self.task = self.engine.receive(Task(action, thaw(shared), None, round, reduce))
            self.number = number
        return self.task

    def run(self, shared: Frozen, work: Assignment) -> Outcome:
        """What comes of some blocks, merged."""
        start = time.perf_counter()
        task = self._receive(shared, work.number, work.action, work.round, work.reduce)
        given = zip(work.blocks, work.personal, strict=True)
        parts = [self.engine.run_block(task, Cohort(ids, thaw(personal))) for ids, personal in given]
        forms = [part.form for part in parts if part.replies is not None]
        if len(parts) > 1 and all(form == forms[0] for form in forms):  # else whose form counts is not known here
            gathering = Gathering("", task._replace(shared={}), Cohort(sum(work.blocks, [])), {})
            for part in parts:
                gathering.take(part)
            fits = min((part.fits for part in parts if part.fits), default=0)
            parts = [gathering.part()._replace(fits=fits)]
        return Outcome([freeze_part(part) for part in parts], time.perf_counter() - start)

    def width(self, shared: Frozen, action: str, longest: int, ident: int) -> int:
        """How many clients like this one fit into a block."""
        assert isinstance(self.engine, Vectorised)
        return self.engine.width(self.engine.receive(Task(action, thaw(shared))), longest, ident)

    def call(self, function: Callable[[Any, Any], Any], shared: Any, item: Any) -> Any:
        """What a function makes of an item."""
        return function(shared, item)
