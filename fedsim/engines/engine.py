"""Engine: where clients run."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Self, TypeVar

import torch

from fedsim import tree
from fedsim.client import Client
from fedsim.data.federation import Federation
from fedsim.engines.gathering import Gathering, Part
from fedsim.task import Cohort, Replies, Task

Shared = TypeVar("Shared")
Item = TypeVar("Item")
Answer = TypeVar("Answer")


class Engine(ABC):
    """Runs a task on a cohort. Engines differ in how they do it, never in what comes out."""

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
    first, and then the blocks in their order: so whoever runs the blocks, here or on any number of workers, the sums
    are the same to the last bit.
    """

    federation: Federation
    clients: Mapping[str, Client]

    @abstractmethod
    def blocks(self, task: Task, ids: Sequence[int]) -> Iterable[Sequence[int]]:
        """Places in the cohort, those of each block."""

    @abstractmethod
    def run_block(self, task: Task, cohort: Cohort) -> Part:
        """What comes of one block."""

    def execute(self, task: Task, cohort: Cohort) -> Replies:
        """What the clients of the cohort answer to the task."""
        client = client_for(task, self.clients)
        gathering = Gathering(type(client).__name__, task, cohort, {})
        for places in self.blocks(task, cohort.ids):
            gathering.take(self.run_block(task, pick(cohort, places)))
        return gathering.replies()


def pick(cohort: Cohort, places: Sequence[int]) -> Cohort:
    """Some of a cohort's clients, by their places in it."""
    ids = [cohort.ids[place] for place in places]
    return Cohort(ids, tree.take(cohort.personal, torch.as_tensor(places)) if cohort.personal else {})
