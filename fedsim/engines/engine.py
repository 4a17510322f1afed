"""Engine: where clients run. One method, and what all engines share in answering it."""

import traceback
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self, get_args

import torch
from torch import Tensor

from fedsim import tree
from fedsim.client import Client
from fedsim.randomness import generator
from fedsim.task import Cohort, Reduce, Replies, Reply, Task, Traffic
from fedsim.tree import Rows, Tree


class Engine(ABC):
    """Runs a task on a cohort. Engines differ in how they do it, never in what comes out."""

    @abstractmethod
    def execute(self, task: Task, cohort: Cohort) -> Replies:
        """What the clients of the cohort answer to the task."""

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


@contextmanager
def drawing(client: Client, *path: int | str) -> Iterator[None]:
    """Inside, torch's generator is seeded by the path if the client draws from it; afterwards it is as before."""
    if not client.stochastic:
        yield
        return
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(generator(*path).initial_seed())
        yield


def finite(replies: Reply) -> Tensor:
    """Which of the C stacked replies hold neither NaN nor infinity, (C,)."""
    good = torch.isfinite(replies.weight)
    for leaf in tree.leaves({"update": replies.update, "personal": replies.personal}):
        values = leaf.values if isinstance(leaf, Rows) else leaf
        if not values.is_floating_point():
            continue
        flat = values.reshape(len(values), -1)
        fine = torch.isfinite(flat.sum(1))  # one cheap pass; a sum may overflow where no number is infinite
        good &= fine if fine.all() else torch.isfinite(flat).all(1)
    return good


class Fold:
    """The mean (by weight) or the sum of updates, taken in as they come, in memory for one of them."""

    def __init__(self, reduce: Reduce) -> None:
        self.reduce = reduce
        self.update: Tree = {}
        self.weight = 0.0
        self.count = 0

    def add(self, update: Tree, weight: Tensor) -> None:
        """Takes in the updates of C clients, leaves (C, ...)."""
        weight = weight.double()  # shares in float32 would cost a float64 update half of its digits
        if self.reduce == "sum":
            block = tree.total(update)
            self.update = tree.map(torch.add, self.update, block) if self.count else block
        else:
            block = tree.weighted_mean(update, weight)
            # The share of what is new. A running mean, unlike a sum divided at the end, gives one client back exactly.
            total = self.weight + float(weight.sum())
            share = float(weight.sum()) / total if total else len(weight) / (self.count + len(weight))
            self.update = tree.map(lambda a, b: torch.lerp(a, b, share), self.update, block) if self.count else block
        self.weight += float(weight.sum())
        self.count += len(weight)


class Gathering:
    """The replies of a cohort, taken in block by block, in an order that does not depend on the machine."""

    def __init__(self, task: Task, cohort: Cohort) -> None:
        if task.reduce not in get_args(Reduce):
            raise ValueError(f"task.reduce must be one of {', '.join(get_args(Reduce))}, got {task.reduce!r}")
        if len(set(cohort.ids)) < len(cohort.ids):
            raise ValueError(f"a client takes part once in a round, got the ids {list(cohort.ids)}")
        self.task, self.cohort = task, cohort
        self.ids: list[int] = []
        self.parts: list[Reply] = []
        self.failed: dict[int, str] = {}
        self.up = 0
        self.fold = None if task.reduce == "stack" else Fold(task.reduce)

    def fail(self, client: int, error: BaseException) -> None:
        """Notes that a client raised, with its traceback."""
        self.failed[client] = "".join(traceback.format_exception(error)).strip()

    def add(self, ids: list[int], replies: Reply) -> None:
        """Takes in the stacked replies of some clients, leaves (C, ...); refuses those with NaN or infinity."""
        sent = {"update": replies.update, "weight": replies.weight, "metrics": replies.metrics}
        self.up += tree.count_bytes(tree.leaves(sent))
        good = finite(replies)
        if not good.all():
            for client, fine in zip(ids, good.tolist(), strict=True):
                if not fine:
                    self.failed[client] = "its update holds NaN or infinity"
            ids = [client for client, fine in zip(ids, good.tolist(), strict=True) if fine]
            if not ids:
                return
            replies = Reply(**tree.take(replies._asdict(), good))
        self.ids += ids
        if self.fold is not None:
            self.fold.add(replies.update, replies.weight)
            replies = replies._replace(update={})
        self.parts.append(replies)

    def replies(self) -> Replies:
        """All of them, in the cohort's order."""
        place = {client: position for position, client in enumerate(self.cohort.ids)}
        order = sorted(range(len(self.ids)), key=lambda position: place[self.ids[position]])
        down = len(self.cohort.ids) * tree.count_bytes(tree.leaves(self.task.shared))
        failed = dict(sorted(self.failed.items(), key=lambda item: place[item[0]]))
        if not order:
            return Replies([], torch.zeros(0), {}, failed=failed, traffic=Traffic(down, self.up))
        merged: dict[str, Any] = tree.concatenate([part._asdict() for part in self.parts])
        if order != list(range(len(order))):
            merged = tree.take(merged, torch.tensor(order))
        update = merged.pop("update") if self.fold is None else self.fold.update
        return Replies(
            [self.ids[position] for position in order],
            merged["weight"],
            update,
            merged["personal"],
            merged["metrics"],
            failed,
            Traffic(down, self.up),
        )
