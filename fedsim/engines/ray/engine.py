"""Ray: blocks of clients on worker processes, on this machine or on a cluster.

The inner engine is the worker. It cuts the cohort into blocks, which does not depend on the number of workers; blocks
are placed longest first on whoever is free, neighbours together, and what comes back is folded in the order of the
blocks. So the bits are those of the inner engine in this process, however many workers there are, and whatever becomes
of them meanwhile. Only where a vectorised block goes on killing its workers, or hangs, do its clients run one by one,
and then the same comes out up to rounding.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Literal

import ray

from fedsim.client import Client
from fedsim.data.federation import Federation
from fedsim.engines.engine import Answer, Engine, Item, Shared
from fedsim.engines.local import Sequential, Vectorised, kind
from fedsim.engines.ray.cluster import attach, carry_plugins, check_room, surroundings
from fedsim.engines.ray.crew import Crew, Lost
from fedsim.engines.ray.side import Policy, Side
from fedsim.engines.ray.worker import Worker
from fedsim.ranges import Count, Natural, NonNegative, Positive, check_fields
from fedsim.task import Cohort, Replies, Task

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
        deadline: seconds that a client may take, and a block of several for each of them; what a worker has to fetch
            before its first one counts. A client that takes longer fails, and its worker is killed.
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
        self.crew: Crew[Any] | None = None
        self.owner = False  # of the connection to the cluster, and of the cluster if it has no address
        names: dict[str, type[Sequential] | type[Vectorised]] = {"sequential": Sequential, "vectorised": Vectorised}
        inner = names.get(self.inner) or kind(self.clients, "cuda" if self.gpus else "cpu")
        arguments = (self.federation, self.clients, self.seed)
        local = Vectorised(*arguments, self.block) if inner is Vectorised else Sequential(*arguments)
        self.sides: list[Side] = []
        self.main = self._side(local)

    def _side(self, local: Sequential | Vectorised) -> Side:
        policy = Policy(self.workers, self.gpus, self.deadline, self.retries)
        self.sides.append(Side(len(self.sides), local, policy, self.start))
        return self.sides[-1]

    def __repr__(self) -> str:
        share = f", gpus={self.gpus:g}" if self.gpus else ""
        return f"Ray({self.main.local!r}, workers={self.workers}{share})"

    def start(self) -> Crew[Any]:
        """The workers; they are started when they are first needed."""
        if self.crew is not None:
            return self.crew
        self.owner = attach(self.address, self.workers * self.cpus) or self.owner  # a start may have failed before
        check_room(self.workers, self.cpus, self.gpus)
        carry_plugins()
        actor = ray.remote(num_cpus=self.cpus, num_gpus=self.gpus, runtime_env=surroundings())(Worker)
        self.crew = Crew(lambda: actor.remote(self.threads, self.gpus), self.workers)
        return self.crew

    def close(self) -> None:
        """Ends the workers, the connection if it is this engine's own, and with it the cluster if it is on its own."""
        for side in self.sides:
            side.given = None
        if self.crew is not None:
            self.crew.dismiss()
            self.crew = None
        if self.owner:
            ray.shutdown()
            self.owner = False

    def execute(self, task: Task, cohort: Cohort) -> Replies:
        """What the clients of the cohort answer to the task."""
        return self.main.execute(task, cohort)

    def beside(self, federation: Federation, clients: Mapping[str, Client], seed: int) -> Engine:
        """Runs other clients on other data, one by one, on these workers."""
        return self._side(Sequential(federation, clients, seed))

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

        with closing(crew.carry_out(waiting, submit, lambda call: self.deadline)) as results:
            for call, result in results:
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
