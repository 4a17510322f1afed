"""Interactions in delimited text: which of its columns is what, and their cells as numbers."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedsim.data.delimited import Line, read
from fedsim.data.tables import Table

ROLES = ("user", "item", "rating", "time")
PASSED_OVER = "-"
BLOCK = 512  # lines whose text is held at once: so few that Python's search for garbage never comes upon them

_TIME = "a number, such as seconds since 1970 (Unix time; no dates)"
_LARGEST = float(np.finfo(np.float32).max)


def collect(
    path: Path, columns: Sequence[str] | Mapping[str, str] | None, header: bool, delimiter: str, encoding: str
) -> tuple[dict[str, NDArray[Any]], dict[str, list[str]]]:
    """The columns, (E,) each, with users and items numbered in the order in which they come; and what these are called.

    The arguments are those of `fedsim.data.ratings.ratings`.
    """
    lines = read(path, delimiter, encoding)
    first = next(lines, None)
    if first is None:
        raise ValueError(f"{path} is empty")
    layout = _layout(str(path), first, columns, header)
    lines = lines if header else chain([first], lines)
    numbers: dict[str, defaultdict[str, int]] = {role: defaultdict() for role in ("user", "item")}
    for known in numbers.values():
        known.default_factory = known.__len__  # an id that was not seen before gets the next number
    convert: dict[str, Callable[[Table, str], NDArray[Any]]] = {"rating": _ratings, "time": _times}
    parts: dict[str, list[NDArray[Any]]] = {role: [] for role in layout.places}
    while block := list(islice(lines, BLOCK)):
        table = _table(block, layout, delimiter)
        for role in layout.places:
            parts[role].append(convert[role](table, role) if role in convert else _codes(table, role, numbers[role]))
    if not parts["user"]:
        raise ValueError(f"{path} has no interactions, only a header")
    found = {role: np.concatenate(parts.pop(role)) for role in layout.places}  # a role at a time: they may be long
    return found, {role: list(known) for role, known in numbers.items()}


class _Layout(NamedTuple):
    """Where in a line what stands."""

    where: str  # the file
    places: dict[str, int]  # of user, item and what else there is
    width: int  # cells in a line


def _layout(where: str, first: Line, columns: Sequence[str] | Mapping[str, str] | None, header: bool) -> _Layout:
    """What the arguments and the first line say of the others."""
    line, cells = first[0], [cell.strip() for cell in first[1]]
    if header and (columns is None or isinstance(columns, Mapping)):
        return _Layout(where, _by_name(f"{where}, line {line}", cells, columns), len(cells))
    if isinstance(columns, Mapping):
        raise ValueError(f"columns = {dict(columns)} is what a header calls them: it needs header = true")
    names = ROLES if columns is None else tuple(columns)
    _check_roles(names, [name for name in names if name != PASSED_OVER])
    places = {name: place for place, name in enumerate(names) if name != PASSED_OVER}
    for name, cell in zip(names, cells, strict=False):
        if header and cell in ROLES and cell != name:
            raise ValueError(f"{where}, line {line}: the header has {cell!r} where columns = {names} has {name!r}")
        if not header and name in ("rating", "time") and cell and not _is_number(cell):
            wanted = _TIME if name == "time" else "a number"
            raise ValueError(
                f"{where}, line {line}, column {name}: expected {wanted}, got {cell!r}; if the line is a header, say "
                "header = true"
            )
    return _Layout(where, places, len(names))


def _check_roles(given: object, names: Sequence[str]) -> None:
    wrong = [name for name in names if name not in ROLES or list(names).count(name) > 1]
    if wrong or not {"user", "item"} <= set(names):
        raise ValueError(
            f"columns must have 'user' and 'item', and may have 'rating' and 'time', each once, and {PASSED_OVER!r} "
            f"for what is passed over, got {given}"
        )


def _by_name(here: str, header: Sequence[str], columns: Mapping[str, str] | None) -> dict[str, int]:
    """Where in a line each column is whose name the header has."""
    wanted = columns or {role: role for role in ROLES if role in header or role in ("user", "item")}
    _check_roles(dict(wanted), list(wanted))
    for role, name in wanted.items():
        if (number := header.count(name)) != 1:
            raise ValueError(
                f"{here}: the header has {number or 'no'} column {name!r} for the {role}, but {', '.join(header)}: "
                'say what it calls them, such as columns = {user = "userId", item = "itemId"}, or what the delimiter is'
            )
    return {role: header.index(name) for role, name in wanted.items()}


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _table(block: Sequence[Line], layout: _Layout, delimiter: str) -> Table:
    for line, row in block:
        if len(row) != layout.width:
            raise ValueError(
                f"{layout.where}, line {line}: {len(row)} columns with delimiter {delimiter!r}, expected "
                f"{layout.width}, among them {', '.join(layout.places)}"
            )
    columns: dict[str, NDArray[Any]] = {  # of objects: an array of text would give each as much room as the longest
        role: np.array([row[place].strip() for _, row in block], dtype=object) for role, place in layout.places.items()
    }
    return Table(layout.where, columns, np.array([line for line, _ in block]))


def _codes(table: Table, column: str, known: Mapping[str, int]) -> NDArray[np.int64]:
    cells = table.columns[column]
    table.refuse(column, cells == "", "an id")
    return np.fromiter(map(known.__getitem__, cells), np.int64, len(cells))


def _ratings(table: Table, column: str) -> NDArray[np.float32]:
    values = table.numbers(column)
    table.refuse(column, abs(values) > _LARGEST, f"a number of at most {_LARGEST:.2g}")
    return values.astype(np.float32)


def _times(table: Table, column: str) -> NDArray[np.int64] | NDArray[np.float64]:
    """Whole numbers if all are; those of 64 bits, such as nanoseconds, to the last digit."""
    try:
        return table.columns[column].astype(np.int64)
    except (ValueError, OverflowError):
        values = table.numbers(column, _TIME)
    return values.astype(np.int64) if (values == np.rint(values)).all() and abs(values).max() < 2**53 else values
