"""Worker: the inner engine in a process of its own."""

import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import ray
import torch

from fedsim.data.federation import Federation
from fedsim.engines.device import confine, find
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


class Given(NamedTuple):
    """What a worker makes an inner engine of, when it is first asked to run something on it."""

    side: int  # whose it is
    inner: Inner
    data: list[Any]  # references to Tables and to the clients; in a list, so that nobody fetches them before
    seed: int


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

    def __init__(self, threads: int, gpus: float) -> None:
        torch.set_num_threads(threads)
        self.device = "cuda" if gpus else "cpu"
        place = find(self.device)
        if gpus:
            confine(place, gpus)
            torch.backends.cudnn.deterministic = True  # or the bits would differ from worker to worker
        self.engines: dict[int, Local] = {}
        self.tasks: dict[int, tuple[int, Task]] = {}  # side -> the number of its last task, and that

    def ready(self) -> int:
        """The process."""
        return os.getpid()

    def _engine(self, given: Given) -> Local:
        """The inner engine of a side."""
        if given.side not in self.engines:
            tables, clients = ray.get(given.data)
            rest = tables.rest
            federation = Federation(thaw(tables.columns, copy=False), rest.rows, rest.bounds, {}, rest.names, rest.name)
            self.engines[given.side] = given.inner(federation, clients, given.seed, device=self.device)
        return self.engines[given.side]

    def _receive(self, given: Given, shared: Frozen, work: Assignment) -> Task:
        """The task; only once its tensors are copied, for a client may try to write there."""
        number, task = self.tasks.get(given.side, (0, Task("", {})))
        if number != work.number:
            task = self._engine(given).receive(Task(work.action, thaw(shared), None, work.round, work.reduce))
            self.tasks[given.side] = work.number, task
        return task

    def run(self, given: Given, shared: Frozen, work: Assignment) -> Outcome:
        """What comes of some blocks, merged."""
        engine = self._engine(given)
        start = time.perf_counter()
        task = self._receive(given, shared, work)
        each = zip(work.blocks, work.personal, strict=True)
        parts = [engine.run_block(task, Cohort(ids, thaw(personal))) for ids, personal in each]
        forms = [part.form for part in parts if part.replies is not None]
        if len(parts) > 1 and all(form == forms[0] for form in forms):  # else whose form counts is not known here
            gathering = Gathering("", task._replace(shared={}), Cohort(sum(work.blocks, [])), {})
            for part in parts:
                gathering.take(part)
            fits = min((part.fits for part in parts if part.fits), default=0)
            parts = [gathering.part()._replace(fits=fits)]
        return Outcome([freeze_part(part) for part in parts], time.perf_counter() - start)

    def width(self, given: Given, shared: Frozen, action: str, longest: int, ident: int) -> int:
        """How many clients like this one fit into a block."""
        engine = self._engine(given)
        assert isinstance(engine, Vectorised)
        return engine.width(engine.receive(Task(action, thaw(shared))), longest, ident)

    def call(self, function: Callable[[Any, Any], Any], shared: Any, item: Any) -> Any:
        """What a function makes of an item."""
        return function(shared, item)
