"""Carry: tensors as what Ray's object store takes and gives without pickling, and without a copy where it matters."""

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.dlpack import from_dlpack

from fedsim import tree
from fedsim.engines.gathering import Part
from fedsim.task import Reply
from fedsim.tree import Tree

Frozen = dict[str, tuple[str, NDArray[Any]]]  # name of a leaf -> its torch type, its numbers
_BITS = {torch.bfloat16: torch.int16, torch.float8_e4m3fn: torch.uint8, torch.float8_e5m2: torch.uint8}


def freeze(branch: Tree) -> Frozen:
    """A tree as arrays by name."""
    frozen = {}
    for name, leaf in tree.flatten(branch).items():
        leaf = leaf.detach().cpu().contiguous()
        numbers = leaf.view(_BITS[leaf.dtype]) if leaf.dtype in _BITS else leaf
        frozen[name] = (str(leaf.dtype).removeprefix("torch."), numbers.numpy())
    return frozen


def thaw(frozen: Frozen, copy: bool = True) -> Tree:
    """The tree; without a copy its leaves lie in the object store, where they must only be read."""
    flat = {}
    for name, (kind, numbers) in frozen.items():
        tensor = torch.from_numpy(np.array(numbers)) if copy else from_dlpack(numbers)
        dtype = getattr(torch, kind)
        flat[name] = tensor.view(dtype) if dtype in _BITS else tensor
    return tree.unflatten(flat)


class FrozenPart(NamedTuple):
    """What came of a block, on its way to the driver."""

    ids: list[int]
    replies: Frozen | None
    folded: Frozen
    failed: dict[int, str]
    form: dict[str, tuple[int, ...]]
    up: int
    seconds: float  # that it took


def freeze_part(part: Part, seconds: float) -> FrozenPart:
    """A part to send."""
    replies = None if part.replies is None else freeze(part.replies._asdict())
    return FrozenPart(part.ids, replies, freeze(part.folded), part.failed, part.form, part.up, seconds)


def thaw_part(part: FrozenPart) -> Part:
    """A part that came; its leaves lie in the object store."""
    replies = None
    if part.replies is not None:
        whole = thaw(part.replies, copy=False)
        replies = Reply(whole.get("update", {}), whole["weight"], whole.get("personal", {}), whole.get("metrics", {}))
    return Part(part.ids, replies, thaw(part.folded, copy=False), part.failed, part.form, part.up)
