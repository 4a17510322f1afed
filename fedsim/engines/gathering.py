"""Gathering: what a cohort answers, taken in as it comes; what all engines share."""

import traceback
from collections.abc import Sequence
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from fedsim import tree
from fedsim.task import Cohort, Reduce, Replies, Reply, Task, Traffic
from fedsim.tree import Rows, Tree


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
        self.own = False  # whether nobody else has these tensors, so that they may be changed in place

    def add(self, update: Tree, weight: Tensor) -> None:
        """Takes in the updates of C clients, leaves (C, ...)."""
        weight = weight.double()  # shares in float32 would cost a float64 update half of its digits
        block = tree.total(update) if self.reduce == "sum" else tree.weighted_mean(update, weight)
        self.merge(block, float(weight.sum()), len(weight))

    def merge(self, update: Tree, weight: float, count: int) -> None:
        """Takes in what another fold made of `count` clients of this weight together."""
        # The share of what is new. A running mean, unlike a sum divided at the end, gives one client back exactly.
        total = self.weight + weight
        share = weight / total if total else count / (self.count + count)
        if not self.count:
            self.update = update
        elif self.reduce == "sum":
            self.update = tree.map(torch.Tensor.add_ if self.own else torch.add, self.update, update)
        else:
            lerp = torch.Tensor.lerp_ if self.own else torch.lerp
            self.update = tree.map(lambda a, b: lerp(a, b, share), self.update, update)
        self.own = self.count > 0
        self.weight += weight
        self.count += count


class Part(NamedTuple):
    """What came of one block of a cohort."""

    ids: list[int]  # those that answered
    replies: Reply | None  # stacked, leaves (C, ...), without the updates where these are folded; None if nobody did
    folded: Tree  # the updates' mean or sum
    failed: dict[int, str]
    form: dict[str, tuple[int, ...]]  # name and shape of all that one of them answered
    up: int  # bytes


class Gathering:
    """The replies of a cohort, taken in block by block, in an order that does not depend on the machine.

    Args:
        who: the name of what answers, for messages.
        task: what was asked.
        cohort: of whom.
        given: what else all clients are given, and none may change in place.
    """

    def __init__(self, who: str, task: Task, cohort: Cohort, given: Tree) -> None:
        if task.reduce not in get_args(Reduce):
            raise ValueError(f"task.reduce must be one of {', '.join(get_args(Reduce))}, got {task.reduce!r}")
        if len(set(cohort.ids)) < len(cohort.ids):
            raise ValueError(f"a client takes part once in a round, got the ids {list(cohort.ids)}")
        self.who, self.task, self.cohort = who, task, cohort
        self.ids: list[int] = []
        self.parts: list[Reply] = []
        self.failed: dict[int, str] = {}
        self.up = 0
        self.fold = None if task.reduce == "stack" else Fold(task.reduce)
        self.form: dict[str, tuple[int, ...]] = {}  # name and shape of all that the first one answered
        self.first = -1
        given = {"shared": task.shared, "personal": cohort.personal} | given
        self.given = [(name, leaf, leaf._version) for name, leaf in tree.flatten(given).items()]

    def fail(self, client: int, error: BaseException) -> None:
        """Notes that a client raised, with its traceback."""
        self._check_given()
        if isinstance(error, KeyError):
            error.add_note(f"It was sent {', '.join(name for name, _ in tree.items(self.task.shared)) or 'nothing'}.")
        self.failed[client] = "".join(traceback.format_exception(error)).strip()

    def add(self, ids: Sequence[int], replies: Reply) -> None:
        """Takes in the stacked replies of some clients, leaves (C, ...); refuses those that are wrong."""
        self._check_given()
        sent = {"update": replies.update, "weight": replies.weight, "metrics": replies.metrics}
        form = {name: tuple(leaf.shape[1:]) for name, leaf in tree.flatten(sent).items() if "@" not in name}
        if self._odd(ids, form):
            return
        self.up += tree.count_bytes(tree.leaves(sent))
        good = finite(replies)
        if not good.all():
            bad = [client for client, fine in zip(ids, good.tolist(), strict=True) if not fine]
            self.failed |= dict.fromkeys(bad, "its update holds NaN or infinity")
            ids = [client for client in ids if client not in bad]
            if not ids:
                return
            replies = Reply(**tree.take(replies._asdict(), good))
        self.ids += ids
        if self.fold is not None:
            self.fold.add(replies.update, replies.weight)
            replies = replies._replace(update={})
        self.parts.append(replies)

    def part(self) -> Part:
        """All of it, for the gathering of a larger cohort to take in."""
        replies = Reply(**tree.concatenate([part._asdict() for part in self.parts])) if self.parts else None
        folded = self.fold.update if self.fold else {}
        return Part(self.ids, replies, folded, self.failed, self.form, self.up)

    def take(self, part: Part) -> None:
        """Takes in what came of a block of the cohort."""
        self.failed |= part.failed
        self.up += part.up
        if part.replies is None or self._odd(part.ids, part.form):
            return
        self.ids += part.ids
        self.parts.append(part.replies)
        if self.fold is not None:
            self.fold.merge(part.folded, float(part.replies.weight.double().sum()), len(part.ids))

    def _odd(self, ids: Sequence[int], form: dict[str, tuple[int, ...]]) -> bool:
        """Whether these answered in another form than the first; they have failed then."""
        if not self.form:
            self.form, self.first = form, ids[0]
        if form == self.form:
            return False
        odd = sorted(name for name in form.keys() | self.form.keys() if form.get(name) != self.form.get(name))
        told = "; ".join(f"{name} is {form.get(name, 'missing')}, not {self.form.get(name, 'there')}" for name in odd)
        self.failed |= dict.fromkeys(ids, f"it answered in another form than client {self.first}: {told}")
        return True

    def _check_given(self) -> None:
        """Raises where a client has changed in place what others are given too: from there on, all would be wrong."""
        for name, leaf, version in self.given:
            if leaf._version != version:
                raise TypeError(
                    f"{self.who} changes {name} in place, which other clients are given too: "
                    "it must make a new tensor (fedsim.testing.check_client finds such mistakes)"
                )

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
