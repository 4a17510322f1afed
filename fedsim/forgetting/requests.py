"""Requests: what of a client's examples a server speaks of that has some requests carried out.

The column "target" of an example says which request names it, 0 for none (`fedsim.data.targets:marked`). The server
shares "request", the number of the one at hand, and "deleted", up to which requests have been carried out: the examples
that these name are never touched again. Where "request" is the larger, those in between are to be forgotten now.
"""

import numpy as np
import torch
from torch import Tensor

from fedsim import tree
from fedsim.data.federation import Federation
from fedsim.task import Batch
from fedsim.tree import Tree

_KNOWN = "use a strategy that knows of requests, such as `forget`"
AT_HAND = {"request": _KNOWN, "deleted": _KNOWN}  # what a client of such a strategy expects


def at_hand(request: int, deleted: int) -> Tree:
    """What the server shares besides its model, two numbers."""
    return {"request": torch.tensor(request), "deleted": torch.tensor(deleted)}


def gone_with(federation: Federation, label: str = "y") -> tuple[int, ...]:
    """For each of K classes the request with which the last of its training examples goes.

    It is the number of requests plus one where some are kept, and 0 where there never were any. Those that an earlier
    request named and that are left out of all training parts count as if they were there. Empty where no request can
    name a class, as there is no such column of classes.

    Args:
        federation: with the column "target".
        label: the column of classes, which the model tells apart.
    """
    y, target = (federation.columns.get(name) for name in (label, "target"))
    if y is None or target is None or y.ndim != 1 or y.is_floating_point() or not len(y):
        return ()
    trained = np.zeros(len(y), dtype=np.bool_)
    for start, end in federation.bounds[:, :2]:
        trained[federation.rows[start:end]] = True
    never = len(federation.names["target"]) if "target" in federation.names else int(target.max()) + 1
    last = torch.where(target > 0, target, torch.where(torch.from_numpy(trained), never, 0))
    classes = max(len(federation.names.get(label, ())), int(y.max()) + 1)
    return tuple(last.new_zeros(classes).scatter_reduce(0, y.long(), last, "amax").tolist())


def remaining(examples: Batch, shared: Tree) -> Batch:
    """The examples that are still there, "target" 1 for those that are to be forgotten now, 0 for all others."""
    if "target" not in examples:
        raise ValueError(f"no column target says what is to be forgotten, only {', '.join(sorted(examples))}")
    target = examples["target"]
    request, deleted = (_number(shared, name) for name in ("request", "deleted"))
    there = (target == 0) | (target > deleted)
    now = (target > deleted) & (target <= request)
    left = examples | {"target": now.to(target.dtype)}
    return left if bool(there.all()) else tree.take(left, there.nonzero().flatten())


def kept(examples: Batch, shared: Tree) -> Batch:
    """Those of them that are not to be forgotten now."""
    left = remaining(examples, shared)
    return tree.take(left, (left["target"] == 0).nonzero().flatten())


def _number(shared: Tree, name: str) -> int:
    value = shared.get(name)
    if not isinstance(value, Tensor):
        raise ValueError(f"the server does not say {name!r}: {AT_HAND[name]}")
    return int(value)
