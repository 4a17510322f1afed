"""Targets: which examples are to be forgotten, as an experiment declares it.

The column "target" that a federation gets here is 0 for what is kept and r for what the r-th request names, from 1 on;
of an example that several name, the first counts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedsim.data.dataset import Dataset
from fedsim.data.federation import Federation, Partition, divide
from fedsim.ranges import Natural, Probability, checked
from fedsim.task import Batch

Request = Mapping[str, Any]
Flags = NDArray[np.bool_]
Rows = NDArray[np.int64]
Names = Mapping[str, tuple[str, ...]]
BOUNDS = ("at_least", "at_most")
KEYS = ("class", "where", "samples", "client")


@checked
def marked(
    dataset: Dataset,
    partition: Partition,
    requests: Sequence[Request],
    leave_out: Natural = 0,
    validation: Probability = 0.0,
    test: Probability = 0.0,
    seed: Natural = 0,
) -> Federation:
    """As `fedsim.data.federation:divide`, with a column "target" that says what is to be forgotten.

    Args:
        dataset: the data.
        partition: of it among clients.
        requests: in the order in which they are made. Each is a table, all of whose conditions hold for the examples
            that it names: `class`, a label or a list of them, by name or number; `where`, a table of columns with the
            value, a list of values or the bounds `{ at_least, at_most }` that they have; `samples`, a list of row
            numbers of the data set, from 0 on, or the path of a file with one in each line; `client`, a number or a
            list of them, whose examples they are.
        leave_out: the examples that the first so many requests name are in no training part: what a model that never
            saw them is trained on.
        validation: as in `divide`.
        test: as in `divide`.
        seed: as in `divide`.

    The common test set is marked as well, by `class` and `where`; what samples or a client have there, nobody knows.

    Raises:
        ValueError: a request is not like this, or names no training example; nothing is left to be kept; or the data
            have a column "target" of their own.
    """
    if not requests:
        raise ValueError("requests must name something to forget, got none")
    if leave_out > len(requests):
        raise ValueError(f"leave_out must be at most the number of requests, {len(requests)}, got {leave_out}")
    if "target" in dataset.columns:
        raise ValueError(
            f"{dataset.name} has a column target itself, which is to say what is to be forgotten: rename it"
        )
    federation, sources = _apart(divide(dataset, partition, validation, test, seed))
    owner, trained = _owners(federation)
    target, common = np.zeros(len(sources), dtype=np.int64), np.zeros(_length(federation.test), dtype=np.int64)
    for number, request in enumerate(requests, start=1):
        where = f"requests[{number - 1}]"
        _check(request, where)
        named = _alike(request, where, federation.names, federation.columns, len(sources)) & (target == 0)
        named &= _sampled(request, where, len(dataset))[sources] & _owned(request, where, owner, federation.num_clients)
        if not (named & trained).any():
            before = " that no request before it names" if number > 1 else ""
            raise ValueError(f"{where} = {dict(request)}: no client trains on an example like this{before}")
        target[named] = number
        if not {"samples", "client"} & request.keys():
            alike = _alike(request, where, federation.names, federation.test, len(common))
            common[alike & (common == 0)] = number
    if not (trained & (target == 0)).any():
        raise ValueError("requests name all that clients train on: nothing would be left to keep; begin a new run")
    test_set = federation.test | ({"target": torch.from_numpy(common)} if federation.test else {})
    found = replace(
        federation,
        columns=federation.columns | {"target": torch.from_numpy(target)},
        test=test_set,
        names=federation.names | {"target": ("kept", *map(told, requests))},
    )
    return without(found, (target > 0) & (target <= leave_out)) if leave_out else found


def without(federation: Federation, left_out: Flags) -> Federation:
    """The same without some rows, (E,), in the training parts."""
    pieces, bounds, end = [], [], 0
    for start, *ends in federation.bounds.tolist():
        train, rest = federation.rows[start : ends[0]], federation.rows[ends[0] : ends[2]]
        kept = train[~left_out[train]]
        pieces += [kept, rest]
        first = end + len(kept)
        bounds.append((end, first, first + ends[1] - ends[0], first + len(rest)))
        end = first + len(rest)
    rows = np.concatenate(pieces) if pieces else federation.rows
    return replace(federation, rows=rows, bounds=np.array(bounds, dtype=np.int64).reshape(-1, 4))


def told(request: Request) -> str:
    """A request in words: "class Shirt, client 3"."""
    words = []
    for key, value in request.items():
        some = value.items() if isinstance(value, Mapping) else [("", value)]
        for name, part in some:
            part = _between(part) if isinstance(part, Mapping) else part
            part = f"{len(part)} of them" if isinstance(part, list) and len(part) > 5 else part
            part = ", ".join(map(str, part)) if isinstance(part, list) else part
            words.append(" ".join(filter(None, (key if key != "where" else "", name, str(part)))))
    return ", ".join(words)


def _between(bounds: Mapping[str, Any]) -> str:
    words = zip(("from", "to"), BOUNDS, strict=True)
    return " ".join(f"{word} {bounds[end]}" for word, end in words if end in bounds)


def _length(columns: Batch) -> int:
    return len(next(iter(columns.values()))) if columns else 0


def _apart(federation: Federation) -> tuple[Federation, Rows]:
    """The same, each example with a row of its own, where clients share some; and each row's in the data set, (E,)."""
    if len(np.unique(federation.rows)) == len(federation.rows):
        return federation, np.arange(_length(federation.columns))
    rows = torch.from_numpy(federation.rows)
    columns = {name: column.index_select(0, rows) for name, column in federation.columns.items()}
    return replace(federation, columns=columns, rows=np.arange(len(rows))), federation.rows


def _owners(federation: Federation) -> tuple[Rows, Flags]:
    """Whose each row is, -1 for nobody's, and whether it is in a training part, (E,) and (E,)."""
    size = _length(federation.columns)
    owner, trained = np.full(size, -1), np.zeros(size, dtype=np.bool_)
    for client, (start, end, _, last) in enumerate(federation.bounds):
        owner[federation.rows[start:last]] = client
        trained[federation.rows[start:end]] = True
    return owner, trained


def _check(request: Request, where: str) -> None:
    if not isinstance(request, Mapping) or not request:
        raise ValueError(f"{where} = {request!r}: must be a table with {', '.join(KEYS)}, one of them at least")
    if unknown := request.keys() - set(KEYS):
        raise ValueError(f"{where}.{min(unknown)}: unknown key; a request has {', '.join(KEYS)}")


def _alike(request: Request, where: str, names: Names, columns: Batch, size: int) -> Flags:
    """Which rows meet `class` and `where`, (n,)."""
    wanted = request.get("where", {})
    if not isinstance(wanted, Mapping):
        raise ValueError(f"{where}.where = {wanted!r}: must be a table of columns with the values that they have")
    conditions = [(f"{where}.where.{name}", name, value) for name, value in wanted.items()]
    if "class" in request:
        conditions.append((f"{where}.class", "y", request["class"]))
    found = np.ones(size, dtype=np.bool_)
    for place, name, value in conditions:
        found &= _meets(place, name, value, names, columns) if columns else True
    return found


def _meets(place: str, name: str, value: Any, names: Names, columns: Batch) -> Flags:
    """Which rows of a column have the value, one of the values, or one between the bounds."""
    if name not in columns or columns[name].ndim != 1:
        there = ", ".join(sorted(other for other, column in columns.items() if column.ndim == 1))
        raise ValueError(f"{place}: there is no column {name} with one value an example, only {there}")
    column = columns[name].cpu().numpy()
    if isinstance(value, Mapping):
        odd = [f"{key} = {bound!r}" for key, bound in value.items() if key not in BOUNDS or not _number(bound)]
        if odd or not value:
            raise ValueError(f"{place}: bounds are numbers called {' and '.join(BOUNDS)}, got {', '.join(odd) or '{}'}")
        return np.asarray((column >= value.get(BOUNDS[0], -np.inf)) & (column <= value.get(BOUNDS[1], np.inf)))
    numbers = []
    for one in value if isinstance(value, list | tuple) else [value]:
        named = names.get(name, ())
        if isinstance(one, str) and one in named:
            numbers.append(named.index(one))
        elif _number(one) and (not named or one in range(len(named))):
            numbers.append(one)
        else:
            allowed = f"one of {', '.join(named[:20])}, or its number" if named else "a number"
            raise ValueError(f"{place} = {one!r}: must be {allowed}")
    wanted = np.array(numbers)
    return np.isin(column, wanted.astype(column.dtype) if np.issubdtype(column.dtype, np.floating) else wanted)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _sampled(request: Request, where: str, size: int) -> Flags:
    """Which rows of the data set are among the samples, (size,)."""
    if "samples" not in request:
        return np.ones(size, dtype=np.bool_)
    given, place = request["samples"], f"{where}.samples"
    if isinstance(given, str):
        if not Path(given).is_file():
            raise ValueError(f"{place} = {given!r}: there is no such file")
        given = [int(line) if line.isdecimal() else line for line in Path(given).read_text("utf-8", "replace").split()]
    return _flags(given, place, size, "row", "rows of the data set")


def _owned(request: Request, where: str, owner: Rows, num_clients: int) -> Flags:
    """Which rows belong to the clients that are meant, (E,)."""
    if "client" not in request:
        return np.ones(len(owner), dtype=np.bool_)
    flags = _flags(request["client"], f"{where}.client", num_clients, "client", "clients")
    return np.append(flags, False)[owner]  # -1, nobody's, is the last


def _flags(given: Any, place: str, size: int, one: str, several: str) -> Flags:
    """True at the numbers that are given, (size,)."""
    found = np.zeros(size, dtype=np.bool_)
    for number in given if isinstance(given, list | tuple) else [given]:
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < size:
            raise ValueError(f"{place}: {number!r} is no {one}: {several} are numbered from 0 to {size - 1}")
        found[number] = True
    return found
