"""Arrays: tensors and trees as Flower's arrays, and back, to the bit.

What comes from outside is checked before anything is made of it; what is wrong raises MalformedMessage.
"""

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from torch import Tensor

from fedsim import tree
from fedsim.flower import npy
from fedsim.tree import Tree

NUMPY = "numpy.ndarray"  # how Flower names arrays in .npy format
BITS = "fedsim.bits"  # for types that numpy does not have: .npy of integers with the same bits
_BITS = {torch.bfloat16: torch.int16, torch.float8_e4m3fn: torch.uint8, torch.float8_e5m2: torch.uint8}
_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in _BITS}
_ROWS = ("index", "values", "size")
_DEEPEST = 64  # branches in one another; trees are walked by functions that call themselves


class MalformedMessage(ValueError):  # noqa: N818 - says what it is
    """A message does not hold what it must; says what is wrong and where."""


def to_array(tensor: Tensor) -> Array:
    """A tensor as Flower's array."""
    tensor = tensor.detach().cpu().resolve_conj().resolve_neg()
    bits = _BITS.get(tensor.dtype)
    values = (tensor if bits is None else tensor.contiguous().view(bits)).numpy()
    name = str(values.dtype) if bits is None else str(tensor.dtype).removeprefix("torch.")
    return Array(name, tuple(values.shape), NUMPY if bits is None else BITS, npy.dump(values))


def to_tensor(array: Array, where: str = "array") -> Tensor:
    """A tensor of one's own out of Flower's array; raises MalformedMessage where it is not what it says."""
    try:
        values = npy.view(array.data)
    except ValueError as error:
        raise MalformedMessage(f"{where} is not in .npy format: {error}") from None
    shape, dtype = values.shape, values.dtype.newbyteorder("=")
    stored = str(dtype)
    special = _NAMES.get(array.dtype) if array.stype == BITS else None
    if special is None and (array.stype != NUMPY or stored not in npy.KINDS.values()):
        raise MalformedMessage(f"{where} is {stored} serialised as {array.stype!r}: not among the types that travel")
    told = "" if special is None else str(_BITS[special]).removeprefix("torch.")
    # numpy, and with it Flower, names a type whose bytes stand in the other order ">f4"
    said = (array.dtype in (stored, str(values.dtype))) if special is None else stored == told
    if not said or tuple(array.shape) != shape:
        raise MalformedMessage(f"{where} says {array.dtype} {tuple(array.shape)} and holds {stored} {shape}")
    tensor = torch.from_numpy(np.array(values, dtype, order="C"))
    return tensor if special is None else tensor.view(special)


def flatten(branch: Tree) -> dict[str, Tensor]:
    """Tensors by name, as `fedsim.tree.flatten`; a branch without a leaf is an empty tensor whose name ends in "/"."""
    return tree.flatten(branch) | {f"{name}/": torch.empty(0) for name in _bare(branch)}


def _bare(branch: Tree, prefix: str = "") -> Iterator[str]:
    for name, leaf in branch.items():
        if not name or "/" in name or "@" in name:  # of branches without a leaf, tree.flatten looks at no name
            raise ValueError(f"{prefix}{name!r}: a key must be a string without '/' and '@', and not empty")
        if isinstance(leaf, dict):
            yield from _bare(leaf, f"{prefix}{name}/") if leaf else [prefix + name]


def _base(name: str) -> str:
    """The leaf or the empty branch that an array of this name belongs to."""
    base, at, _ = name.rpartition("@")
    return base if at else name.removesuffix("/")


def unflatten(flat: Mapping[str, Tensor], where: str = "tree") -> Tree:
    """The tree that `flatten` took apart; raises MalformedMessage for names or rows that no tree has."""
    ends: dict[str, str] = {}
    for name, leaf in flat.items():
        base = _base(name)
        if not all(base.split("/")) or "@" in base or base.count("/") >= _DEEPEST:
            raise MalformedMessage(f"{where}: {name[:200]!r} is no name of a leaf")
        if base in ends and not ("@" in name and "@" in ends[base]):
            raise MalformedMessage(f"{where}: {base!r} is both {ends[base]!r} and {name!r}")
        if name.endswith("/") and leaf.numel():
            raise MalformedMessage(f"{where}: {name!r} is an empty branch, and there is something in it")
        ends[base] = name
    for base, name in ends.items():
        parts = base.split("/")
        above = ("/".join(parts[:depth]) for depth in range(1, len(parts)))
        if inside := next((end for end in above if end in ends), None):
            raise MalformedMessage(f"{where}: {ends[inside]!r} is a leaf or empty, and {name!r} is in it")
        if "@" in name:
            _check_rows(flat, base, where)
    made = tree.unflatten({name: leaf for name, leaf in flat.items() if not name.endswith("/")})
    for name in flat:
        if name.endswith("/"):
            branch = made
            for part in name.removesuffix("/").split("/"):
                branch = branch.setdefault(part, {})
    return made


def _check_rows(flat: Mapping[str, Tensor], base: str, where: str) -> None:
    index, values, size = (flat.get(f"{base}@{part}") for part in _ROWS)
    here = f"{where}: rows of {base!r}"
    others = {name for name in flat if name.startswith(f"{base}@")} - {f"{base}@{part}" for part in _ROWS}
    if others or index is None or values is None or size is None:
        raise MalformedMessage(f"{here} need @index, @values and @size, and nothing else")
    if index.dtype != torch.int64 or size.dtype != torch.int64 or size.numel() != 1 or index.ndim not in (1, 2):
        raise MalformedMessage(f"{here}: index and size must be int64, index (R,) or (C, R), size one number")
    if values.shape[: index.ndim] != index.shape:
        raise MalformedMessage(f"{here}: {tuple(index.shape)} indices for values {tuple(values.shape)}")
    if int(size) < 0 or (index.numel() and not -1 <= int(index.min()) <= int(index.max()) < int(size)):
        raise MalformedMessage(f"{here}: an index must be from -1 to {int(size) - 1}, the table's size less one")


def pack(branch: Tree) -> ArrayRecord:
    """A tree as arrays by name."""
    record = ArrayRecord()
    for name, leaf in flatten(branch).items():
        record[name] = to_array(leaf)
    return record


def unpack(record: ArrayRecord, where: str = "arrays") -> Tree:
    """The tree that `pack` made arrays of."""
    return unflatten({name: to_tensor(array, f"{where}: {name!r}") for name, array in record.items()}, where)
