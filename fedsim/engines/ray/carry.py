"""Carry: tensors as what Ray's object store takes and gives without pickling, and without a copy where it matters."""

from collections.abc import Iterator
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
_BRANCH = ("branch", np.empty(0))  # stands for a branch without a leaf


def freeze(branch: Tree) -> Frozen:
    """A tree as arrays by name."""
    frozen = dict.fromkeys(_bare(branch), _BRANCH)
    for name, leaf in tree.flatten(branch).items():
        leaf = leaf.detach().cpu().contiguous()
        numbers = leaf.view(_BITS[leaf.dtype]) if leaf.dtype in _BITS else leaf
        frozen[name] = (str(leaf.dtype).removeprefix("torch."), numbers.numpy())
    return frozen


def _bare(branch: Tree, prefix: str = "") -> Iterator[str]:
    """The names of the branches without a leaf; that of the whole tree is empty."""
    if not branch:
        yield prefix
    for name, leaf in branch.items():
        if isinstance(leaf, dict):
            yield from _bare(leaf, f"{prefix}/{name}" if prefix else name)


def thaw(frozen: Frozen, copy: bool = True) -> Tree:
    """The tree; without a copy its leaves lie in the object store, where they must only be read."""
    flat, bare = {}, []
    for name, (kind, numbers) in frozen.items():
        if kind == _BRANCH[0]:
            bare.append(name)
            continue
        tensor = torch.from_numpy(np.array(numbers)) if copy else from_dlpack(numbers)
        dtype = getattr(torch, kind)
        flat[name] = tensor.view(dtype) if dtype in _BITS else tensor
    whole = tree.unflatten(flat)
    for name in filter(None, bare):
        branch = whole
        for part in name.split("/"):
            branch = branch.setdefault(part, {})
    return whole


class FrozenPart(NamedTuple):
    """What came of one block or several, on its way to the driver."""

    rest: Part  # without tensors
    replies: Frozen | None
    folded: Frozen


def freeze_part(part: Part) -> FrozenPart:
    """A part to send."""
    replies = None if part.replies is None else freeze(part.replies._asdict())
    return FrozenPart(part._replace(replies=None, folded={}), replies, freeze(part.folded))


def thaw_part(frozen: FrozenPart) -> Part:
    """A part that came; its leaves lie in the object store."""
    replies = None if frozen.replies is None else Reply(**thaw(frozen.replies, copy=False))
    return frozen.rest._replace(replies=replies, folded=thaw(frozen.folded, copy=False))
