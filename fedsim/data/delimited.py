"""Delimited text of any length, a line at a time, with errors that name the file and the line."""

import codecs
import csv
import gzip
import io
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, cast

QUOTED = (",", ";")  # after which a cell may stand in quotes; elsewhere a quote is a character as any other

Line = tuple[int, list[str]]  # its number in the file, from 1, and its cells


def read(path: Path, delimiter: str, encoding: str) -> Iterator[Line]:
    """The lines of a file, which may be compressed with gzip; blank ones are left out.

    With "," and ";" a cell may stand in quotes, which end on the same line. With " " cells are any spaces or tabs
    apart. A mark that says that the file is UTF-8 (a BOM) is no part of it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is a folder, or damaged, or not of this encoding; or the delimiter or encoding makes no sense.
    """
    if not delimiter or set(delimiter) & set('"\r\n'):
        raise ValueError(f"delimiter must be a text without quotes and ends of lines, such as ',', got {delimiter!r}")
    if path.is_dir():
        raise ValueError(f"path must be a file, {str(path)!r} is a folder")
    if not path.is_file():
        raise FileNotFoundError(f"path must be a file, there is no {str(path)!r}")
    known = _encoding(encoding)
    try:
        with path.open("rb") as raw:
            text = io.TextIOWrapper(_unzipped(raw), encoding=known, newline="")
            rows = _quoted(text, delimiter, str(path)) if delimiter in QUOTED else _split(text, delimiter)
            for number, row in enumerate(rows, 1):
                if len(row) > 1 or (row and row[0].strip()):
                    yield number, row
    except UnicodeDecodeError as error:
        raise ValueError(_undecodable(path, encoding)) from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: the gzip file is truncated or damaged ({error})") from error


def _quoted(text: Iterable[str], delimiter: str, where: str) -> Iterator[list[str]]:
    reader = csv.reader(text, delimiter=delimiter, skipinitialspace=True, strict=True)
    before = 0
    try:
        for row in reader:
            if reader.line_num > before + 1:
                break
            before = reader.line_num
            yield row
        else:
            return
    except csv.Error as error:
        if reader.line_num == before + 1 and "unexpected end" not in str(error):
            raise ValueError(f"{where}, line {before + 1}: {error}") from error
    raise ValueError(f"{where}, line {before + 1}: a quote begins that does not end on the line")


def _split(text: Iterable[str], delimiter: str) -> Iterator[list[str]]:
    if delimiter == " ":
        return (line.split() for line in text)
    return (line.rstrip("\r\n").split(delimiter) for line in text)


def _unzipped(raw: BinaryIO) -> BinaryIO:
    zipped = raw.read(2) == b"\x1f\x8b"
    raw.seek(0)
    return cast(BinaryIO, gzip.GzipFile(fileobj=raw)) if zipped else raw


def _encoding(encoding: str) -> str:
    """What Python calls it; for UTF-8 the one that passes over a BOM."""
    try:
        "".encode(encoding)
        name = codecs.lookup(encoding).name
    except LookupError:
        raise ValueError(
            f"encoding must be one that Python knows, such as 'utf-8', 'latin-1' or 'cp1252', got {encoding!r}"
        ) from None
    return "utf-8-sig" if name == "utf-8" else name


def _undecodable(path: Path, encoding: str) -> str:
    """Which byte it is: the reader itself tells only where in the block that it has just read."""
    with path.open("rb") as raw:
        content = _unzipped(raw).read()
    remedy = "say which encoding the file has, such as encoding = 'latin-1'"
    try:
        content.decode(encoding)
    except UnicodeDecodeError as error:
        place, line = error.start, content.count(b"\n", 0, error.start) + 1
        return f"{path}, line {line}: byte {content[place]:#04x} at place {place} is not {encoding}: {remedy}"
    return f"{path} is not {encoding}: {remedy}"
