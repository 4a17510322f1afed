"""The .npy format, in which Flower's arrays travel, written and read with half the copies and none of the parsing.

Byte for byte what numpy writes. Headers, of which a model has a handful, are made and understood once.
"""

import io
import math
import re
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

KINDS = {
    np.dtype(name).str[1:]: name
    for name in ("bool", "complex64", "complex128", "float16", "float32", "float64")
    + tuple(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))
}
_MOST_AXES = 64  # numpy has no more
_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00..\{'descr': '(?P<order>[<>|])(?P<kind>[a-z][0-9]{1,2})', "
    rb"'fortran_order': (?P<fortran>True|False), 'shape': \((?P<shape>(?:[0-9]{1,19}, ?)*(?:[0-9]{1,19})?)\), \} *\n",
    re.DOTALL,
)


def dump(values: NDArray[Any]) -> bytes:
    """An array, in C's order, as .npy."""
    values = np.asarray(values, order="C")
    if values.dtype.hasobject:
        raise ValueError("objects are never written")
    return b"".join((_header(values.dtype.str, values.shape), values.data if values.size else b""))


@lru_cache(maxsize=1024)
def _header(dtype: str, shape: tuple[int, ...]) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": dtype, "fortran_order": False, "shape": shape})
    return buffer.getvalue()


def view(data: bytes) -> NDArray[Any]:
    """The array in .npy data, which it is a read-only view of; nothing is pickled, nothing is allocated.

    Raises:
        ValueError: it is not in this format (version 1.0), or not as long as its header says.
    """
    start = 10 + int.from_bytes(data[8:10], "little")
    dtype, shape, fortran = _layout(bytes(data[:start]))
    if len(data) - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"it says {dtype} {shape} and holds {len(data) - start} bytes")
    return np.frombuffer(data, dtype, offset=start).reshape(shape, order="F" if fortran else "C")


@lru_cache(maxsize=1024)
def _layout(header: bytes) -> tuple[np.dtype[Any], tuple[int, ...], bool]:
    """What a header says: type, shape, whether in Fortran's order.

    Read as numpy writes it, and not by numpy, whose reader evaluates what it is given.
    """
    found = _HEADER.fullmatch(header)
    if found is None or found["kind"].decode() not in KINDS:
        raise ValueError(f"it begins with {header[:100]!r}")
    shape = tuple(int(size) for size in found["shape"].split(b",") if size.strip())
    dtype = np.dtype(found["order"].decode() + found["kind"].decode())
    if len(shape) > _MOST_AXES or math.prod(filter(None, shape)) * dtype.itemsize >= 2**63:
        raise ValueError(f"it says {len(shape)} axes of {header[:100]!r}")
    return dtype, shape, found["fortran"] == b"True"
