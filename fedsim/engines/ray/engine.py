"""Ray: blocks of clients on worker processes, on this machine or on a cluster.

The inner engine is the worker. It cuts the cohort into blocks, which does not depend on the number of workers; blocks
are placed longest first on whoever is free, neighbours together, and what comes back is folded in the order of the
blocks. So the bits are those of the inner engine in this process, however many workers there are, and whatever becomes
of them meanwhile.
"""

import logging
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import ray
from ray import ObjectRef

from fedsim import tree
from fedsim.client import Client
from fedsim.data.federation import Federation
from fedsim.engines.engine import Answer, Engine, Item, Local, Shared, client_for, pick
from fedsim.engines.gathering import Gathering, Part
from fedsim.engines.local import Sequential, Vectorised, kind
from fedsim.engines.ray.carry import Frozen, freeze, thaw_part
from fedsim.engines.ray.cluster import attach, carry_plugins, check_room, surroundings
from fedsim.engines.ray.crew import Crew, Lost
from fedsim.engines.ray.placing import Line, Pace, Piece
from fedsim.engines.ray.worker import Assignment, Outcome, Tables, Worker
from fedsim.ranges import Count, Natural, NonNegative, Positive, check_fields
from fedsim.task import Cohort, Replies, Reply, Task

# A cohort is cut into so many blocks at least where workers have GPUs: a block as large as memory allows would leave
# other GPUs without work.
GPU_BLOCKS = 8

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Ray(Engine):
    """Clients on worker processes.

    Attributes:
        federation: the data by client. It is handed over once, and read without a copy.
        clients: action -> client.
        seed: of all that is drawn.
        workers: how many processes.
        cpus: how many processors each of them counts for.
        gpus: how much of a GPU each of them counts for, such as 0.25.
        threads: of torch, in each of them.
        inner: how a worker runs its blocks.
        block: for "vectorised", the most clients in a block.
        address: of a running cluster; None: one of its own, on this machine.
        deadline: seconds that a client may take; one that takes longer fails, and its worker is killed.
        retries: how often a block is run again whose worker died. A client that goes on killing its workers fails.
    """

    federation: Federation
    clients: Mapping[str, Client]
    seed: Natural = 0
    workers: Count = 2
    cpus: Positive = 1.0
    gpus: NonNegative = 0.0
    threads: Count = 1
    inner: Literal["auto", "sequential", "vectorised"] = "auto"
    block: Count | None = None
    address: str | None = None
    deadline: Positive | None = None
    retries: Natural = 2

    def __post_init__(self) -> None:
        check_fields(self)
        if self.block is not None and self.inner != "vectorised":
            raise ValueError(f'block = {self.block} needs inner = "vectorised", got {self.inner!r}')
        names = {"sequential": Sequential, "vectorised": Vectorised}
        self.kind = names.get(self.inner) or kind(self.clients, "cuda" if self.gpus else "cpu")
        self.settings = {} if self.block is None else {"block": self.block}
        # Cuts cohorts into blocks, and runs none of them: so it may stay on the CPU.
        self.local: Local = self.kind(self.federation, self.clients, self.seed, **self.settings)
        self.crew: Crew[Any] | None = None
        self.owner = False  # of the connection to the cluster, and of the cluster if it has no address
        self.pace = Pace(self.federation, self.clients)
        self.number = 0  # of tasks so far

    def __repr__(self) -> str:
        share = f", gpus={self.gpus:g}" if self.gpus else ""
        return f"Ray({self.local!r}, workers={self.workers}{share})"

    def start(self) -> Crew[Any]:
        """The workers; they are started when they are first needed."""
        if self.crew is not None:
            return self.crew
        self.owner = attach(self.address, self.workers * self.cpus)
        check_room(self.workers, self.cpus, self.gpus)
        carry_plugins()
        part = self.federation
        tables = Tables(freeze(dict(part.columns)), Federation({}, part.rows, part.bounds, {}, part.names, part.name))
        given = [ray.put(tables), ray.put(dict(self.clients))]
        actor = ray.remote(num_cpus=self.cpus, num_gpus=self.gpus, runtime_env=surroundings())(Worker)
        inner = partial(self.kind, **self.settings)
        self.crew = Crew(lambda: actor.remote(inner, *given, self.seed, self.threads, self.gpus), self.workers)
        return self.crew

    def close(self) -> None:
        """Ends the workers, the connection if it is this engine's own, and with it the cluster if it is on its own."""
        if self.crew is not None:
            self.crew.dismiss()
            self.crew = None
        if self.owner:
            ray.shutdown()
            self.owner = False

    def execute(self, task: Task, cohort: Cohort) -> Replies:
        """What the clients of the cohort answer to the task."""
        client = client_for(task, self.clients)
        gathering = Gathering(type(client).__name__, task, cohort, {})
        self.start()  # before anything is put, or Ray would start, or join, a cluster of its own choice
        self.number += 1
        shared = ray.put(freeze(task.shared))
        blocks = list(self._blocks(task, cohort, shared))
        # A worker that hangs is to be found out soon, so what it is given then is as little as possible.
        among = math.inf if self.deadline else self.workers
        line = Line(task, cohort, blocks, self.pace.expect(task.action, cohort.ids), among)
        for piece, parts in self._parts(task, cohort, shared, line, gathering.incidents):
            for part in line.note(piece, parts):
                if part.fits and isinstance(self.local, Vectorised):
                    self.local.limit(task.action, part.fits)
                gathering.take(part)
        return _kept(gathering)

    def _blocks(self, task: Task, cohort: Cohort, shared: ObjectRef[Frozen]) -> Iterable[Sequence[int]]:
        """The blocks, as the inner engine cuts them; how many clients fit onto a GPU only a worker can tell."""
        if not self.gpus or not isinstance(self.local, Vectorised):
            return self.local.blocks(task, cohort.ids)
        widths = self.local.widths

        def width(task: Task, longest: int, ident: int) -> int:
            key = task.action, longest.bit_length()
            if key not in widths:
                asked = deque([(task.action, longest, ident)])
                ask = self.start().carry_out(
                    asked, lambda worker, of: worker.width.remote(shared, *of), lambda of: None
                )
                for _, found in ask:
                    if isinstance(found, Exception):
                        raise found
                    widths[key] = found
            return min(widths[key], -(-len(cohort.ids) // GPU_BLOCKS))

        return self.local.blocks(task, cohort.ids, width)

    def _ask(self, question: Callable[[Any], Any]) -> Any:
        """What any worker answers."""
        for _, answer in self.start().carry_out(deque([None]), lambda worker, _: question(worker), lambda _: None):
            if isinstance(answer, Lost):
                raise RuntimeError(answer.told) from answer
            if isinstance(answer, Exception):
                raise answer
        return answer

    def _parts(
        self, task: Task, cohort: Cohort, shared: ObjectRef[Frozen], line: Line, incidents: list[str]
    ) -> Iterator[tuple[Piece, list[Part]]]:
        """What comes of each piece, as it comes; a piece that cannot be run falls into smaller ones."""
        waiting = deque(line.pieces)

        def submit(worker: Any, piece: Piece) -> ObjectRef[Outcome]:
            some = [pick(cohort, block) for block in piece.blocks]
            ids, personal = [list(each.ids) for each in some], [freeze(each.personal) for each in some]
            work = Assignment(task.action, task.round, task.reduce, self.number, ids, personal)
            return worker.run.remote(shared, work)  # type: ignore[no-any-return]

        def patience(piece: Piece) -> float | None:
            return None if self.deadline is None else self.deadline * len(piece.places)

        for piece, result in self.start().carry_out(waiting, submit, patience):
            ids = [cohort.ids[place] for place in piece.places]
            if isinstance(result, Lost):
                incidents.append(f"{result.told}, and was replaced; it was at {named(ids)}")
                piece.deaths += 1
                again = not result.hung and piece.deaths <= self.retries
                if again and len(piece.blocks) == 1:
                    waiting.append(piece)
                elif len(ids) > 1:
                    waiting.extend(line.divide(piece))
                else:
                    told = result.reason if result.hung else f"{piece.deaths} workers died of it: {result.reason}"
                    yield piece, [Part([], None, {}, {ids[0]: told})]
            elif isinstance(result, Exception):  # as in this process: the client cannot be run that way at all
                raise result
            else:
                self.pace.learn(task.action, ids, result.seconds)
                yield piece, [thaw_part(part) for part in result.parts]

    def map(
        self, function: Callable[[Shared, Item], Answer], shared: Shared, items: Iterable[Item]
    ) -> Iterator[Answer | Exception]:
        """What the function makes of `shared` and each item, in order, or what it raised; on all workers at once."""
        crew = self.start()  # before anything is put, or Ray would start, or join, a cluster of its own choice
        given = [ray.put(function), ray.put(shared)]
        waiting: deque[Call] = deque(Call(number, item) for number, item in enumerate(items))
        found: dict[int, Any] = {}
        done = 0

        def submit(worker: Any, call: Call) -> Any:
            return worker.call.remote(*given, call.item)

        for call, result in crew.carry_out(waiting, submit, lambda call: self.deadline):
            if isinstance(result, Lost):
                logger.warning("%s, and was replaced", result.told)
                call.deaths += 1
                if not result.hung and call.deaths <= self.retries:
                    waiting.append(call)
                    continue
            found[call.number] = result
            while done in found:
                yield found.pop(done)
                done += 1


@dataclass(eq=False)
class Call:
    """One item of a map."""

    number: int
    item: Any
    deaths: int = 0


def _kept(gathering: Gathering) -> Replies:
    """The replies, in this process's own memory."""
    if len(gathering.parts) == 1:  # nothing was joined, so it lies in the object store still
        gathering.parts = [Reply(**tree.clone(gathering.parts[0]._asdict()))]
    if gathering.folds is not None and not (whole := gathering.folds.whole()).own:
        whole.update = tree.clone(whole.update)
    return gathering.replies()


def named(ids: Sequence[int]) -> str:
    """Some clients, in words."""
    others = f" and {len(ids) - 1} more" if len(ids) > 1 else ""
    return f"client {ids[0]}{others}"
