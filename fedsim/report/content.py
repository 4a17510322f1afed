"""What a report consists of, before it becomes a page or Markdown."""

from typing import NamedTuple

from fedsim.report.drawing import Plot


class Fact(NamedTuple):
    """One number with its name, and a remark in small print."""

    name: str
    value: str
    remark: str = ""
    bad: bool = False  # something went wrong


class Table(NamedTuple):
    """A table; the first column names the row."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    words: tuple[int, ...] = (0,)  # columns that hold words; the others hold numbers


class Fold(NamedTuple):
    """A text that is shown on demand."""

    title: str
    text: str


class Section(NamedTuple):
    """A part of a report; what is empty is left out."""

    title: str
    note: str = ""
    facts: tuple[Fact, ...] = ()
    plots: tuple[Plot, ...] = ()
    tables: tuple[Table, ...] = ()
    folds: tuple[Fold, ...] = ()
