"""The .npy format, in which Flower's arrays travel, written and read with half the copies and none of the parsing.

Byte for byte what numpy writes. Headers, of which a model has a handful, are made and understood once.
"""

import io
import math
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray


def dump(values: NDArray[Any]) -> bytes:
    """An array, in C's order, as .npy."""
    values = np.asarray(values, order="C")
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
    """What a header says: type, shape, whether in Fortran's order."""
    buffer = io.BytesIO(header)
    version = np.lib.format.read_magic(buffer)
    if version != (1, 0):
        raise ValueError(f"version {version}, must be (1, 0)")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(buffer)
    if dtype.hasobject or not dtype.itemsize or any(size < 0 for size in shape):
        raise ValueError(f"it says {dtype} {shape}")
    return dtype, tuple(shape), fortran
