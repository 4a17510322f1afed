"""Files of a run, each whole at any moment, wherever the process is killed: written anew, or grown by whole lines."""

import csv
import io
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np


def replace(path: Path, content: bytes) -> None:
    """Writes a file so that at any moment either the old or the new one is there, whole."""
    replace_by(path, lambda temporary: temporary.write_bytes(content))


def replace_by(path: Path, write: Callable[[Path], object]) -> None:
    """The same for what `write` writes into the path that it is given."""
    temporary = path.with_name(f".{path.name}.part")
    with temporary.open("wb"):  # with the rights that a file gets here, which another program may change
        rights = temporary.stat().st_mode
    write(temporary)
    temporary.chmod(rights)
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def append(path: Path, objects: list[dict[str, Any]]) -> None:
    """Appends one JSON line an object, and hands them to the operating system."""
    if objects:
        with path.open("a") as file:
            file.write("".join(json.dumps(entry) + "\n" for entry in objects))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON lines of a file, without a last one that was cut off in the middle of writing."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8", errors="replace")
    lines = []
    for number, line in enumerate(text[: text.rfind("\n") + 1].splitlines(), start=1):
        try:
            lines.append(json.loads(line))
            lines[-1]["round"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}, line {number} is damaged: it must be an object with a round, got {line[:80]!r}"
            ) from error
    return lines


def as_csv(columns: Mapping[str, np.ndarray[Any, Any]]) -> str:
    """Columns of numbers as CSV; whole numbers without a point, what is not a number empty."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(columns)
    for row in zip(*(values.tolist() for values in columns.values()), strict=True):
        writer.writerow("" if math.isnan(v) else int(v) if v.is_integer() else repr(v) for v in row)
    return file.getvalue()
