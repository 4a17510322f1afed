"""Columns of whole numbers, such as labels and groups, as they are and numbered."""

import numpy as np
from numpy.typing import NDArray

from fedsim.task import Batch

Ints = NDArray[np.int64]


def integers(columns: Batch, column: str) -> Ints:
    """A column, (E,); raises ValueError where there is none, or it does not hold one integer for each example."""
    if column not in columns:
        raise ValueError(f"there is no column {column!r}; there are {', '.join(sorted(columns)) or 'none'}")
    values = columns[column]
    if values.ndim != 1 or values.is_floating_point() or values.is_complex():
        kind = f"{values.dtype} of shape {tuple(values.shape)}"
        raise ValueError(f"column {column!r} must hold one integer for each example, got {kind}")
    return np.asarray(values.numpy(), dtype=np.int64)


def numbered(columns: Batch, column: str) -> Ints:
    """The column with its distinct values numbered from 0 in ascending order, (E,)."""
    return np.unique(integers(columns, column), return_inverse=True)[1]
