"""Ray: blocks of clients on worker processes, on this machine or on a cluster.

The inner engine is the worker. It cuts the cohort into blocks, which does not depend on the number of workers; blocks
are placed longest first on whoever is free, and what comes back is folded in the order of the blocks. So the bits are
those of the inner engine in this process, however many workers there are, and whatever becomes of them meanwhile.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import ray
from ray import ObjectRef

from fedsim import tree
from fedsim.client import Client
from fedsim.data.federation import Federation
from fedsim.engines.engine import Answer, Engine, Item, Local, Shared, client_for, pick
from fedsim.engines.gathering import Gathering, Part
from fedsim.engines.local import Sequential, Vectorised, auto
from fedsim.engines.ray.carry import FrozenPart, freeze, thaw_part
from fedsim.engines.ray.cluster import attach, carry_plugins, check_room, surroundings
from fedsim.engines.ray.crew import Crew, Lost
from fedsim.engines.ray.worker import Assignment, Inner, Tables, Worker
from fedsim.ranges import Count, Natural, NonNegative, Positive, check_fields
from fedsim.task import Cohort, Replies, Reply, Task

INNER: dict[str, Inner] = {"auto": auto, "sequential": Sequential, "vectorised": Vectorised}


@dataclass(eq=False)
class Piece:
    """A block of the cohort, or one client of a block that is suspected to kill its workers."""

    block: int
    order: int  # among the pieces of its block
    places: Sequence[int]  # in the cohort
    deaths: int = 0  # of workers that were at it


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
        self.local: Local = self._make()(self.federation, self.clients, self.seed)
        self.crew: Crew[Any] | None = None
        self.owner = False  # of the connection to the cluster, and of the cluster if it has no address
        self.pace: dict[int, float] = {}  # client -> seconds, as measured: for placement alone

    def _make(self) -> Inner:
        if self.block is None:
            return INNER[self.inner]
        return _Blocks(self.block)

    def __repr__(self) -> str:
        share = f", gpus={self.gpus:g}" if self.gpus else ""
        return f"Ray({self.local!r}, workers={self.workers}{share})"

    def start(self) -> Crew[Any]:
        """The workers; they are started when they are first needed."""
        if self.crew is not None:
            return self.crew
        self.owner = attach(self.address, self.workers * self.cpus)
        check_room(self.workers, self.cpus, self.gpus)
        list(carry_plugins())
        part = self.federation
        tables = Tables(freeze(dict(part.columns)), Federation({}, part.rows, part.bounds, {}, part.names, part.name))
        given = [ray.put(tables), ray.put(dict(self.clients))]
        actor = ray.remote(num_cpus=self.cpus, num_gpus=self.gpus, runtime_env=surroundings())(Worker)
        self.crew = Crew(lambda: actor.remote(self._make(), *given, self.seed, self.threads), self.workers)
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
        blocks = [[Piece(number, 0, places)] for number, places in enumerate(self.local.blocks(task, cohort.ids))]
        found: dict[Piece, Part] = {}
        done = 0
        for piece, part in self._parts(task, cohort, blocks):
            found[piece] = part
            while done < len(blocks) and all(piece in found for piece in blocks[done]):
                gathering.take(_joined([found.pop(piece) for piece in blocks[done]], task, cohort))
                done += 1
        if len(gathering.parts) == 1:  # nothing was joined, so it lies in the object store still
            gathering.parts = [Reply(**tree.clone(gathering.parts[0]._asdict()))]
            if gathering.fold is not None:
                gathering.fold.update = tree.clone(gathering.fold.update)
        return gathering.replies()

    def _parts(self, task: Task, cohort: Cohort, blocks: list[list[Piece]]) -> Iterator[tuple[Piece, Part]]:
        """What comes of each piece, as it comes; a block whose clients are suspected falls into more pieces."""
        crew = self.start()  # first, or Ray would start, or join, a cluster of its own choice
        shared = ray.put(freeze(task.shared))
        waiting = deque(sorted((block[0] for block in blocks), key=self._length(task, cohort), reverse=True))

        def submit(worker: Any, piece: Piece) -> ObjectRef[FrozenPart]:
            some = pick(cohort, piece.places)
            block = Assignment(task.action, task.round, task.reduce, list(some.ids), freeze(some.personal))
            return worker.run.remote(shared, block)  # type: ignore[no-any-return]

        for piece, result in crew.carry_out(waiting, submit, self._patience):
            ids = [cohort.ids[place] for place in piece.places]
            if isinstance(result, Lost):
                piece.deaths += 1
                if not result.hung and piece.deaths <= self.retries:
                    waiting.append(piece)
                elif len(ids) > 1:
                    pieces = [Piece(piece.block, order, [place]) for order, place in enumerate(piece.places)]
                    blocks[piece.block] = pieces
                    waiting.extend(pieces)
                else:
                    told = result.reason if result.hung else f"{piece.deaths} workers died of it: {result.reason}"
                    yield piece, Part([], None, {}, {ids[0]: told}, {}, 0)
            elif isinstance(result, Exception):  # as in this process: the client cannot be run that way at all
                raise result
            else:
                self.pace |= dict.fromkeys(ids, result.seconds / len(ids))
                yield piece, thaw_part(result)

    def _length(self, task: Task, cohort: Cohort) -> Callable[[Piece], float]:
        """How long a piece will take: as its clients took before, else by their numbers of examples."""
        client = self.clients[task.action]
        sizes = self.federation.sizes(client.split, cohort.ids)
        guess = sum(self.pace.values()) / max(1, len(self.pace)) or 1.0
        mean = float(sizes.mean()) or 1.0
        likely = (guess / mean * sizes).tolist()

        def length(piece: Piece) -> float:
            return float(sum(self.pace.get(cohort.ids[place], likely[place]) for place in piece.places))

        return length

    def _patience(self, piece: Piece) -> float | None:
        return None if self.deadline is None else self.deadline * len(piece.places)

    def map(
        self, function: Callable[[Shared, Item], Answer], shared: Shared, items: Iterable[Item]
    ) -> Iterator[Answer | Exception]:
        """What the function makes of `shared` and each item, in order, or what it raised; on all workers at once."""
        crew = self.start()  # first, or Ray would start, or join, a cluster of its own choice
        given = [ray.put(function), ray.put(shared)]
        waiting: deque[Call] = deque(Call(number, item) for number, item in enumerate(items))
        found: dict[int, Any] = {}
        done = 0

        def submit(worker: Any, call: Call) -> Any:
            return worker.call.remote(*given, call.item)

        for call, result in crew.carry_out(waiting, submit, lambda call: self.deadline):
            if isinstance(result, Lost) and not result.hung and call.deaths < self.retries:
                call.deaths += 1
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


def _joined(parts: Sequence[Part], task: Task, cohort: Cohort) -> Part:
    """The pieces of a block, folded as the block would have been."""
    if len(parts) == 1:
        return parts[0]
    gathering = Gathering("", task, cohort, {})
    for part in parts:
        gathering.take(part)
    return gathering.part()


@dataclass(frozen=True)
class _Blocks:
    """A vectorised engine with a bound, as a function that can be sent to workers."""

    block: int

    def __call__(self, federation: Federation, clients: Mapping[str, Client], seed: int) -> Local:
        return Vectorised(federation, clients, seed, self.block)
