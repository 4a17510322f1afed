"""Gathering: what a cohort answers, taken in as it comes; what all engines share."""

import traceback
from collections.abc import Sequence
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from fedsim import tree
from fedsim.engines.folding import Fold, Folds
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


def _all_finite(replies: Reply) -> bool:
    """Whether there is neither NaN nor infinity in any of them, nor in their fold if that stands for the updates."""
    for leaf in tree.leaves({"weight": replies.weight, "update": replies.update, "personal": replies.personal}):
        values = leaf.values if isinstance(leaf, Rows) else leaf
        # A sum is the cheaper one to look at, but may overflow where no number is infinite.
        if values.is_floating_point() and not (torch.isfinite(values.sum()) or torch.isfinite(values).all()):
            return False
    return True


class Part(NamedTuple):
    """What came of a block of a cohort, or of several."""

    ids: list[int]  # those that answered
    replies: Reply | None  # stacked, leaves (C, ...), without the updates where these are folded; None if nobody did
    folded: Tree  # the updates' mean or sum
    failed: dict[int, str]
    form: dict[str, tuple[int, ...]] = {}  # name and shape of all that one of them answered
    up: int = 0  # bytes
    blocks: int = 1  # how many it was made of
    incidents: list[str] = []  # what went wrong, and was made good
    fits: int = 0  # the most clients in a block from now on, where more did not fit into memory
    weight: float = 0.0  # of the fold, added up in its order: another order would be another last bit

    def to(self, device: torch.device) -> "Part":
        """The same on a device."""
        replies = None if self.replies is None else Reply(**tree.to(self.replies._asdict(), device))
        return self._replace(replies=replies, folded=tree.to(self.folded, device))


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
        self.incidents: list[str] = []
        self.folds = None if task.reduce == "stack" else Folds(task.reduce)
        self.form: dict[str, tuple[int, ...]] = {}  # name and shape of all that the first one answered
        self.first = -1
        given = {"shared": task.shared, "personal": cohort.personal} | given
        self.given = [(name, leaf, leaf._version) for name, leaf in tree.flatten(given).items()]

    def fail(self, client: int, error: BaseException) -> None:
        """Notes that a client raised, with its traceback."""
        self._check_given()
        told = "".join(traceback.format_exception(error)).strip()
        if isinstance(error, KeyError):  # on the same line, of which there is more to be seen than of a traceback
            told += f" (it was sent {', '.join(name for name, _ in tree.items(self.task.shared)) or 'nothing'})"
        self.failed[client] = told

    def add(self, ids: Sequence[int], replies: Reply) -> None:
        """Takes in the stacked replies of some clients, leaves (C, ...); refuses those that are wrong."""
        self._check_given()
        sent = {"update": replies.update, "weight": replies.weight, "metrics": replies.metrics}
        every = tree.flatten(sent | {"personal": replies.personal})
        form = {name: tuple(leaf.shape[1:]) for name, leaf in every.items() if "@" not in name}
        rows = {name: leaf for name, leaf in tree.items({"update": replies.update}) if isinstance(leaf, Rows)}
        form |= {name: (leaf.size, *leaf.values.shape[2:]) for name, leaf in rows.items()}
        if self._odd(ids, form):
            return
        self.up += tree.count_bytes(tree.leaves(sent))
        fold = self._folded(replies)
        # A mean or a sum with NaN or infinity in it is neither finite, so it is enough to look at that.
        if not _all_finite(replies if fold is None else replies._replace(update=fold.update)):
            good = finite(replies)
            bad = [client for client, fine in zip(ids, good.tolist(), strict=True) if not fine]
            self.failed |= dict.fromkeys(bad, "its update holds NaN or infinity")
            ids = [client for client in ids if client not in bad]
            if not ids:
                return
            if bad:  # else it was the fold alone that overflowed
                replies = Reply(**tree.take(replies._asdict(), good))
                fold = self._folded(replies)
        self.ids += ids
        if self.folds is not None and fold is not None:
            self.folds.last.merge(fold)
            replies = replies._replace(update={})
        self.parts.append(replies)

    def add_block(self, ids: Sequence[int], replies: Reply) -> None:
        """Takes in the stacked replies of some clients as the next block of the cohort."""
        block = Gathering(self.who, self.task, Cohort(ids), {})
        block.add(ids, replies)
        self.take(block.part())

    def _folded(self, replies: Reply) -> Fold | None:
        """The fold of these replies; None where none is wanted."""
        if self.folds is None:
            return None
        fold = Fold(self.task.reduce)
        fold.add(replies.update, replies.weight)
        return fold

    def part(self) -> Part:
        """All of it, for the gathering of a larger cohort to take in."""
        replies = Reply(**tree.concatenate([part._asdict() for part in self.parts])) if self.parts else None
        whole = self.folds.whole() if self.folds else Fold("mean")
        blocks = self.folds.blocks if self.folds else 1
        told = self.failed, self.form, self.up, blocks, self.incidents
        return Part(self.ids, replies, whole.update, *told, weight=whole.weight)

    def take(self, part: Part) -> None:
        """Takes in what came of the next block of the cohort, or of the next blocks."""
        fold = self._accept(part)
        if self.folds is not None:
            self.folds.push(fold, part.blocks)

    def join(self, part: Part) -> None:
        """Takes in what came of some more clients of the block that is being gathered."""
        fold = self._accept(part)
        if self.folds is not None:
            self.folds.last.merge(fold)

    def _accept(self, part: Part) -> Fold:
        """Takes in all but the updates, of which the fold is given back, empty if there are none to take in."""
        self.failed |= part.failed
        self.incidents += part.incidents
        self.up += part.up
        if part.replies is None or self._odd(part.ids, part.form):
            return Fold(self.task.reduce)
        self.ids += part.ids
        self.parts.append(part.replies)
        return Fold(self.task.reduce, part.folded, part.weight, len(part.ids))

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
            traffic = Traffic(down, self.up)
            return Replies([], torch.zeros(0), {}, failed=failed, traffic=traffic, incidents=self.incidents)
        merged: dict[str, Any] = tree.concatenate([part._asdict() for part in self.parts])
        if order != list(range(len(order))):
            merged = tree.take(merged, torch.tensor(order))
        update = merged.pop("update") if self.folds is None else self.folds.whole().update
        return Replies(
            [self.ids[position] for position in order],
            merged["weight"],
            update,
            merged["personal"],
            merged["metrics"],
            failed,
            Traffic(down, self.up),
            self.incidents,
        )
