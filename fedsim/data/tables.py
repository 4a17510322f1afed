"""Delimited text as columns, with errors that name the file, the line and the column."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedsim.data.files import File


@dataclass(frozen=True)
class Table:
    """The cells of a file by column."""

    where: str
    columns: dict[str, NDArray[np.str_]]  # (E,) each
    lines: NDArray[np.int64]  # (E,) where in the file each row stands

    def numbers(self, column: str, wanted: str = "a number") -> NDArray[np.float64]:
        """A column of finite numbers, (E,); `wanted` says in the error what they are."""
        cells = self.columns[column]
        try:
            values = cells.astype(np.float64)
        except ValueError:
            values = np.array([_number(cell) for cell in cells])
        self.refuse(column, ~np.isfinite(values), wanted)
        return values

    def integers(self, column: str) -> NDArray[np.int64]:
        """A column of whole numbers, (E,)."""
        values = self.numbers(column)
        self.refuse(column, values != np.rint(values), "a whole number")
        return values.astype(np.int64)

    def codes(self, column: str, values: Sequence[str]) -> NDArray[np.int64]:
        """Which of these values each cell is, (E,)."""
        matches = self.columns[column][:, None] == np.array(values)  # (E, number of values)
        self.refuse(column, ~matches.any(1), f"one of {', '.join(values)}")
        return np.asarray(matches.argmax(1))

    def rows(self, chosen: NDArray[np.bool_] | NDArray[np.int64]) -> "Table":
        """The chosen rows alone."""
        return Table(self.where, {name: cells[chosen] for name, cells in self.columns.items()}, self.lines[chosen])

    def refuse(self, column: str, wrong: NDArray[np.bool_], wanted: str) -> None:
        """Raises ValueError for the first of the rows that are wrong, (E,)."""
        if wrong.any():
            row = int(wrong.argmax())
            cell = str(self.columns[column][row])
            raise ValueError(f"{self.where}, line {self.lines[row]}, column {column}: expected {wanted}, got {cell!r}")


def parse(file: File, columns: Sequence[str], delimiter: str = ",", skip: str = "") -> Table:
    """The table in a file without a header; empty lines, and those that begin with `skip`, are left out.

    Raises:
        ValueError: if a line does not have this many columns.
    """
    reader = csv.reader(
        io.StringIO(file.content.decode("utf-8", "replace"), newline=""), delimiter=delimiter, skipinitialspace=True
    )
    rows, lines = [], []
    try:
        for row in reader:
            if not row or (skip and row[0].startswith(skip)):
                continue
            if len(row) != len(columns):
                raise ValueError(f"{file.where}, line {reader.line_num}: {len(row)} columns, expected {len(columns)}")
            rows.append(row)
            lines.append(reader.line_num)
    except csv.Error as error:
        raise ValueError(f"{file.where}, line {reader.line_num}: {error}") from error
    if not rows:
        raise ValueError(f"{file.where} has no rows")
    cells = {name: np.array(column) for name, column in zip(columns, zip(*rows, strict=True), strict=True)}
    return Table(file.where, cells, np.array(lines))


def _number(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        return np.nan
