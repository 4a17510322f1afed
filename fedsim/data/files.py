"""Where a data set's files come from: a folder of yours, FEDSIM_DATA, the cache, or the publisher.

A folder given as `path` is used as it is. A file found in FEDSIM_DATA/<data set>, in the cache (FEDSIM_CACHE, or the
platform's own) or at the publisher's must be, byte by byte, the one that fedsim was tested with. Any file may be
compressed with gzip. FEDSIM_MIRROR names a server to use in place of the publishers: it has a folder for each data set,
with what the publisher's address ends in.
"""

import csv
import gzip
import hashlib
import io
import logging
import os
import re
import tempfile
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import pooch

from fedsim.data.sources import Source

logger = logging.getLogger(__name__)


class File(NamedTuple):
    """What a file holds, uncompressed, and where it was found."""

    where: str
    content: bytes


def load(source: Source, path: str | Path | None = None) -> dict[str, File]:
    """The files of a data set by name: from `path`, or else FEDSIM_DATA, the cache or the publisher.

    Raises:
        FileNotFoundError: if `path` is given and lacks a file.
        ValueError: if a file is empty, damaged or not the expected one.
        ConnectionError: if the publisher cannot be reached or does not have the file.
    """
    if path is not None:
        files = _read(source, Path(path))
        if not files:
            raise FileNotFoundError(
                f"path must be a folder that has {_names(source)} (or .gz of it), got {str(path)!r}"
            )
        return files
    if data := os.environ.get("FEDSIM_DATA"):
        files = _read(source, Path(data) / source.folder)
        if files:
            return _verified(source, files)
    cache = _cache(source)
    try:
        files = _verified(source, _read(source, cache))
    except ValueError as error:
        logger.warning("The cache is damaged, so %s is fetched again: %s", source.folder, error)
        files = {}
    return files or _fetch(source, cache)


def whereabouts(source: Source) -> str:
    """The folder in which `load` would find the files, without reading them, or that they have to be fetched."""
    data = os.environ.get("FEDSIM_DATA")
    for folder in [*([Path(data) / source.folder] if data else []), _cache(source)]:
        if all((folder / name).is_file() or (folder / f"{name}.gz").is_file() for name in source.sha256):
            return str(folder)
    return "to be fetched"


def _cache(source: Source) -> Path:
    return Path(os.environ.get("FEDSIM_CACHE") or pooch.os_cache("fedsim")) / source.folder


def _names(source: Source) -> str:
    return ", ".join(source.sha256)


def _remedy(source: Source) -> str:
    return f"Set FEDSIM_DATA to a folder that has {source.folder}/ with {_names(source)}, or give that one as path"


def _read(source: Source, folder: Path) -> dict[str, File]:
    """The files in a folder; {} unless all are there."""
    files = {}
    for name in source.sha256:
        place = next((place for place in (folder / name, folder / f"{name}.gz") if place.is_file()), None)
        if place is None:
            return {}
        files[name] = _opened(source, str(place), place.read_bytes())
    return files


def _opened(source: Source, where: str, raw: bytes) -> File:
    """A file without its compression and without the columns that are not kept."""
    try:
        content = gzip.decompress(raw) if raw.startswith(b"\x1f\x8b") else raw
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{where}: the gzip file is truncated or damaged ({error}). {_remedy(source)}") from error
    if not content:
        raise ValueError(f"{where} is empty. {_remedy(source)}")
    return File(where, _only(source.columns, where, content) if source.columns else content)


def _only(columns: tuple[str, ...], where: str, content: bytes) -> bytes:
    """A CSV file of these columns alone, in this order; of two columns with one name the first.

    Whole numbers lose a trailing ".0", which depends on the program that wrote the copy.
    """
    rows = csv.reader(io.StringIO(content.decode("utf-8", "replace"), newline=""))
    header = next(rows)
    missing = [name for name in columns if name not in header]
    if missing:
        raise ValueError(f"{where}, line 1: there is no column {', '.join(missing)}")
    places = [header.index(name) for name in columns]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        if row and len(row) != len(header):
            raise ValueError(f"{where}, line {rows.line_num}: {len(row)} columns, the header has {len(header)}")
        if row:
            writer.writerow([re.sub(r"^(-?\d+)\.0$", r"\1", row[place]) for place in places])
    return text.getvalue().encode()


def _verified(source: Source, files: dict[str, File]) -> dict[str, File]:
    for name, file in files.items():
        found = hashlib.sha256(file.content).hexdigest()
        if found != source.sha256[name]:
            raise ValueError(
                f"{file.where}: the checksum (sha256) of {name} is {found}, expected {source.sha256[name]}: the file "
                f"is damaged or another version. {_remedy(source)}; a folder given as path is used as it is"
            )
    return files


def _fetch(source: Source, cache: Path) -> dict[str, File]:
    """The publisher's files, which are in the cache from now on; nothing is written there unless all are sound."""
    url = source.url
    if mirror := os.environ.get("FEDSIM_MIRROR"):
        url = f"{mirror.rstrip('/')}/{source.folder}/{url.rsplit('/', 1)[1]}"
    logger.info("Fetching %s from %s", source.folder, url)
    if url.endswith(".zip"):
        raw = _members(source, url, _download(source, url))
    else:
        raw = {name: _download(source, url.format(name=name)) for name in source.sha256}
    files = _verified(source, {name: _opened(source, f"{url.format(name=name)} ({name})", raw[name]) for name in raw})
    cache.mkdir(parents=True, exist_ok=True)
    for name, file in files.items():
        _store(cache / name, file.content)
    return files


def _download(source: Source, url: str) -> bytes:
    buffer = io.BytesIO()
    try:
        pooch.HTTPDownloader(progressbar=False)(url, buffer, None)
    except OSError as error:  # all that requests raises is an OSError
        raise ConnectionError(f"{url} could not be fetched. {_remedy(source)} ({error})") from error
    return buffer.getvalue()


def _members(source: Source, url: str, archive: bytes) -> dict[str, bytes]:
    """The files in a zip archive, in whichever of its folders they are."""
    try:
        with zipfile.ZipFile(io.BytesIO(archive)) as members:
            places = {Path(place).name: place for place in members.namelist()}
            return {name: members.read(places[name]) for name in source.sha256}
    except KeyError as error:
        raise ValueError(f"{url} holds {', '.join(places)}, but no {error.args[0]}. {_remedy(source)}") from error
    except (zipfile.BadZipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{url}: the zip archive is truncated or damaged ({error}). {_remedy(source)}") from error


def _store(place: Path, content: bytes) -> None:
    """Writes a file whole or not at all, whatever else is writing it at the same time."""
    with tempfile.NamedTemporaryFile(dir=place.parent, delete=False) as part:
        try:
            part.write(content)
            part.close()
            os.replace(part.name, place)
        except BaseException:
            Path(part.name).unlink(missing_ok=True)
            raise
