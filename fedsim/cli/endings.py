"""How a command ends: in tables and words on a console, and with errors as a message and an exit code."""

import logging
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedsim.config import ConfigError
from fedsim.simulation import TooFewReplies

out = Console(soft_wrap=True, highlight=False, markup=False, emoji=False)
errors = Console(stderr=True, soft_wrap=True, highlight=False, markup=False, emoji=False)


class Warnings(logging.Handler):
    """Shows what the library warns of, in plain words."""

    def emit(self, record: logging.LogRecord) -> None:
        """One line."""
        errors.print(f"Warning: {record.getMessage()}")


@contextmanager
def ending(full: bool = False) -> Iterator[None]:
    """Shows warnings, and turns what goes wrong into a message and an exit code."""
    warnings = Warnings(logging.WARNING)
    logger = logging.getLogger("fedsim")
    logger.addHandler(warnings)
    try:
        with _exits(full):
            yield
    finally:
        logger.removeHandler(warnings)


@contextmanager
def _exits(full: bool) -> Iterator[None]:
    try:
        yield
    except typer.Exit:
        raise
    except ConfigError as error:
        if full:
            errors.print(traceback.format_exc().rstrip())
        errors.print(f"Error: {error}")
        raise typer.Exit(2) from None
    except ConnectionError as error:
        if full:
            errors.print(traceback.format_exc().rstrip())
        errors.print("\n".join([f"Error: {error}", *_notes(error)]))
        raise typer.Exit(1) from None
    except TooFewReplies as error:
        if full:
            errors.print(traceback.format_exc().rstrip())
        errors.print("\n".join([f"The run failed: {error}", *_notes(error)]))
        raise typer.Exit(1) from None
    except KeyboardInterrupt as error:
        errors.print("\n".join(["Interrupted.", *_notes(error)]))
        raise typer.Exit(130) from None
    except Exception as error:
        errors.print(traceback.format_exc().rstrip())
        errors.print(f"The run failed: {type(error).__name__}: {error}")
        raise typer.Exit(1) from None


def _notes(error: BaseException) -> list[str]:
    return getattr(error, "__notes__", [])


@contextmanager
def reading() -> Iterator[None]:
    """What cannot be read is bad input."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError) as error:
        raise ConfigError(str(error)) from error


def print_rows(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table without lines."""
    table = Table(*header, box=None, show_header=any(header), pad_edge=False)
    for row in rows:
        table.add_row(*map(Text, row))
    if not out.is_terminal:
        out.width = 1000  # a file or a pipe has no width
    out.print(table)
