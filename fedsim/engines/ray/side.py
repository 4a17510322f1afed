"""Side: one federation and its clients, as the workers run them."""

import math
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from typing import Any, NamedTuple

import ray
from ray import ObjectRef

from fedsim import tree
from fedsim.data.federation import Federation
from fedsim.engines.engine import Engine, client_for, pick
from fedsim.engines.gathering import Gathering, Part
from fedsim.engines.local import Sequential, Vectorised
from fedsim.engines.ray.carry import Frozen, freeze, thaw_part
from fedsim.engines.ray.crew import Crew, Lost
from fedsim.engines.ray.placing import Line, Pace, Piece
from fedsim.engines.ray.worker import Assignment, Given, Inner, Outcome, Tables
from fedsim.task import Cohort, Replies, Reply, Task

# A cohort is cut into so many blocks at least where workers have GPUs: a block as large as memory allows would leave
# other GPUs without work.
GPU_BLOCKS = 8


class Policy(NamedTuple):
    """What the workers are, and how long one waits for them; see `Ray`."""

    workers: int
    gpus: float
    deadline: float | None
    retries: int


class Side(Engine):
    """One federation and its clients, on workers that may serve others too.

    Args:
        number: tells it from others on these workers.
        local: the inner engine. Here it cuts cohorts into blocks; on the workers it runs them.
        start: gives the workers.
    """

    def __init__(
        self,
        number: int,
        local: Sequential | Vectorised,
        policy: Policy,
        start: Callable[[], Crew[Any]],
    ) -> None:
        self.number, self.local, self.policy, self.start = number, local, policy, start
        self.federation, self.clients = local.federation, local.clients
        self.inner: Inner = type(local)
        self.pace = Pace(local.federation, local.clients)
        self.given: Given | None = None
        self.tasks = 0  # so far

    def _give(self) -> Given:
        """What a worker makes its inner engine of; put once, and read where it lies."""
        if self.given is None:
            part = self.federation
            rest = Federation({}, part.rows, part.bounds, {}, part.names, part.name)
            tables = ray.put(Tables(freeze(dict(part.columns)), rest))
            self.given = Given(self.number, self.inner, [tables, ray.put(dict(self.clients))], self.local.seed)
        return self.given

    def execute(self, task: Task, cohort: Cohort) -> Replies:
        """What the clients of the cohort answer to the task."""
        client = client_for(task, self.clients)
        gathering = Gathering(type(client).__name__, task, cohort, {})
        self.start()  # before anything is put, or Ray would start, or join, a cluster of its own choice
        self.tasks += 1
        shared = ray.put(freeze(task.shared))
        blocks = list(self._blocks(task, cohort, shared))
        # A worker that hangs is to be found out soon, so what it is given then is as little as possible.
        among = math.inf if self.policy.deadline else self.policy.workers
        line = Line(task, cohort, blocks, self.pace.expect(task.action, cohort.ids), among)
        with closing(self._parts(task, cohort, shared, line, gathering.incidents)) as pieces:
            for piece, parts in pieces:
                for part in line.note(piece, parts):
                    if part.fits and isinstance(self.local, Vectorised):
                        self.local.limit(task.action, part.fits)
                    gathering.take(part)
        return _kept(gathering)

    def _blocks(self, task: Task, cohort: Cohort, shared: ObjectRef[Frozen]) -> Iterable[Sequence[int]]:
        """The blocks, as the inner engine cuts them; how many clients fit onto a GPU only a worker can tell."""
        if not self.policy.gpus or not isinstance(self.local, Vectorised):
            return self.local.blocks(task, cohort.ids)
        widths = self.local.widths

        def width(task: Task, longest: int, ident: int) -> int:
            key = task.action, longest.bit_length()
            if key not in widths:
                widths[key] = self._ask(
                    lambda worker: worker.width.remote(self._give(), shared, task.action, longest, ident)
                )
            return min(widths[key], -(-len(cohort.ids) // GPU_BLOCKS))

        return self.local.blocks(task, cohort.ids, width)

    def _ask(self, question: Callable[[Any], Any]) -> Any:
        """What any worker answers; where one dies of it, another is asked, as often as work is run again."""
        asked = deque([0])  # how many have died
        with closing(self.start().carry_out(asked, lambda worker, _: question(worker), lambda _: None)) as answers:
            for deaths, answer in answers:
                if isinstance(answer, Lost) and deaths < self.policy.retries:
                    asked.append(deaths + 1)
                elif isinstance(answer, Lost):
                    raise RuntimeError(f"{answer.told}; it was measuring how many clients fit onto a GPU") from answer
                elif isinstance(answer, Exception):
                    raise answer
        return answer

    def _parts(
        self, task: Task, cohort: Cohort, shared: ObjectRef[Frozen], line: Line, incidents: list[str]
    ) -> Generator[tuple[Piece, list[Part]], None, None]:
        """What comes of each piece, as it comes; a piece that cannot be run falls into smaller ones."""
        waiting = deque(line.pieces)

        def submit(worker: Any, piece: Piece) -> ObjectRef[Outcome]:
            some = [pick(cohort, block) for block in piece.blocks]
            ids, personal = [list(each.ids) for each in some], [freeze(each.personal) for each in some]
            work = Assignment(task.action, task.round, task.reduce, self.tasks, ids, personal)
            return worker.run.remote(self._give(), shared, work)  # type: ignore[no-any-return]

        def patience(piece: Piece) -> float | None:
            return None if self.policy.deadline is None else self.policy.deadline * len(piece.places)

        with closing(self.start().carry_out(waiting, submit, patience)) as results:  # not when the garbage is collected
            for piece, result in results:
                ids = [cohort.ids[place] for place in piece.places]
                if isinstance(result, Lost):
                    incidents.append(f"{result.told}, and was replaced; it was at {named(ids)}")
                    piece.deaths += 1
                    again = not result.hung and piece.deaths <= self.policy.retries
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
