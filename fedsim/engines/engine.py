"""Engine: where clients run."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from types import TracebackType
from typing import Self, TypeVar

import torch

from fedsim import tree
from fedsim.client import Client
from fedsim.data.federation import Federation
from fedsim.engines.device import CPU, find, keep_memory, moved, on
from fedsim.engines.gathering import Gathering, Part
from fedsim.task import Cohort, Replies, Task

Shared = TypeVar("Shared")
Item = TypeVar("Item")
Answer = TypeVar("Answer")


class Engine(ABC):
    """Runs a task on a cohort. Engines differ in how they do it, never in what comes out.

    Attributes:
        device: where this process computes.
    """

    device: str = "cpu"

    @abstractmethod
    def execute(self, task: Task, cohort: Cohort) -> Replies:
        """What the clients of the cohort answer to the task."""

    def map(
        self, function: Callable[[Shared, Item], Answer], shared: Shared, items: Iterable[Item]
    ) -> Iterator[Answer | Exception]:
        """What the function makes of `shared` and each item, in order, or what it raised; here, one after another.

        For work that is no task of fedsim's clients, such as somebody's ClientApp. Each is done when it is asked for.
        """
        for item in items:
            try:
                answer: Answer | Exception = function(shared, item)
            except Exception as error:  # whatever it raises costs this item alone, and is told
                answer = error
            yield answer

    def beside(self, federation: Federation, clients: Mapping[str, Client], seed: int) -> "Engine":
        """An engine for other clients on other data, with what this one has; here, one by one where this one is."""
        from fedsim.engines.sequential import Sequential  # which is an Engine itself

        return Sequential(federation, clients, seed, self.device)

    def close(self) -> None:  # noqa: B027 - most engines hold nothing
        """Gives back whatever the engine holds."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def client_for(task: Task, clients: Mapping[str, Client]) -> Client:
    """The client that is bound to the task's action."""
    if task.action not in clients:
        raise ValueError(f"no client is bound to the action {task.action!r}: there are {', '.join(clients) or 'none'}")
    return clients[task.action]


class Local(Engine):
    """An engine that runs clients where it is, block by block.

    How a cohort is cut into blocks depends on the task and the cohort alone. What a block's clients answer is folded
    first, and then the blocks pairwise: so whoever runs the blocks, here or on any number of workers, the sums are the
    same to the last bit.

    On a GPU, tables and models are moved once and `shared` once a round; what comes back is on the CPU. There `prepare`
    draws, and batches are drawn, on the CPU too, so both are the same on every device.
    """

    federation: Federation
    clients: Mapping[str, Client]
    seed: int

    @abstractmethod
    def blocks(self, task: Task, ids: Sequence[int]) -> Iterable[Sequence[int]]:
        """Places in the cohort, those of each block."""

    @abstractmethod
    def answer(self, task: Task, cohort: Cohort, gathering: Gathering) -> None:
        """Runs the clients of one block; what they answer, or raise, goes into the gathering."""

    @cached_property
    def place(self) -> torch.device:
        """The device."""
        return find(self.device)

    @cached_property
    def tables(self) -> Federation:
        """The federation, on the device."""
        return self.federation if self.place == CPU else self.federation.to(self.place)

    @cached_property
    def residents(self) -> dict[str, Client]:
        """The clients, on the device."""
        if self.place == CPU:
            return dict(self.clients)
        return {action: moved(client, self.place) for action, client in self.clients.items()}

    def receive(self, task: Task) -> Task:
        """The task with what it shares on the device."""
        return task if self.place == CPU else task._replace(shared=tree.to(task.shared, self.place))

    def run_block(self, task: Task, cohort: Cohort) -> Part:
        """What comes of one block; the task is one that was received."""
        who = type(client_for(task, self.clients)).__name__
        keep_memory()
        if self.place != CPU:
            cohort = Cohort(cohort.ids, tree.to(cohort.personal, self.place))
        gathering = Gathering(who, task, cohort, {"examples": self.tables.columns})
        with on(self.place):
            self.answer(task, cohort, gathering)
        return gathering.part().to(CPU)

    def execute(self, task: Task, cohort: Cohort) -> Replies:
        """What the clients of the cohort answer to the task."""
        gathering = Gathering(type(client_for(task, self.clients)).__name__, task, cohort, {})
        received = self.receive(task)
        for places in self.blocks(task, cohort.ids):
            gathering.take(self.run_block(received, pick(cohort, places)))
        return gathering.replies()


def pick(cohort: Cohort, places: Sequence[int]) -> Cohort:
    """Some of a cohort's clients, by their places in it."""
    ids = [cohort.ids[place] for place in places]
    return Cohort(ids, tree.take(cohort.personal, torch.as_tensor(places)) if cohort.personal else {})
