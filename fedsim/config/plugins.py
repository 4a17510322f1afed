"""Plug-ins: from the `use` of a table to the callable that it names."""

import difflib
import hashlib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from datetime import date, time
from functools import cache
from importlib.machinery import SourceFileLoader
from importlib.metadata import entry_points
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

HOME = Path(__file__).resolve().parents[2]  # where fedsim, strategies, clients and experiments lie side by side
OURS = ("strategies", "clients", "experiments")


class ConfigError(ValueError):
    """An experiment asks for something that does not exist or is not allowed; says where, what, and what is."""


def find(use: Any, group: str, where: str, base: Path | None = None) -> Callable[..., Any]:
    """The callable that `use` names.

    Args:
        use: "package.module:name", "path/to/file.py:name", or the short name of an entry point.
        group: the entry points among which a short name is looked up, such as "fedsim.strategies".
        where: the key in the experiment, for messages.
        base: the folder that a file's path is relative to, besides the current one.
    """
    here = f"{where} = {shown(use)}"
    source, colon, name = use.rpartition(":") if isinstance(use, str) else ("", "", "")
    if not isinstance(use, str) or not use or (colon and not (source and name)):
        raise ConfigError(f"{here}: must be 'package.module:name', 'file.py:name' or a short name")
    if not colon:
        return _short(use, group, here)
    module = _load_file(source, here, base) if source.endswith(".py") else _load_module(source, name, here, base)
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            _refuse_hidden(source, here)
            raise ConfigError(f"{here}: {source} has no {name!r}{closest(name, _public(module))}")
        found = getattr(found, part)
    if not callable(found):
        raise ConfigError(f"{here}: {name} is {shown(found)}, a {type(found).__name__}; it must be callable")
    return found  # type: ignore[no-any-return]


def names(group: str) -> dict[str, str]:
    """Short name -> "module:name" of the entry points of a group, ours and other people's."""
    return dict(_declared(group, tuple(sys.path)))


@cache
def _declared(group: str, path: tuple[str, ...]) -> dict[str, str]:
    """As `names`; looking for them on this path reads a file of every package that is installed."""
    return {entry.name: entry.value for entry in sorted(entry_points(group=group), key=lambda entry: entry.name)}


def closest(word: str, words: Iterable[str]) -> str:
    """The end of a message: what may have been meant, or what there is."""
    known = sorted(words)
    near = difflib.get_close_matches(word, known, 1)
    if near:
        return f"; did you mean {near[0]}?"
    return f"; there are {', '.join(known)}" if known else ""


def shown(value: Any) -> str:
    """A value as an experiment has it, cut where it is long."""
    text = value.isoformat() if isinstance(value, date | time) else repr(value)
    return text if len(text) <= 120 else f"{text[:100]}... ({len(text)} characters)"


def _short(use: str, group: str, here: str) -> Callable[..., Any]:
    known = names(group)
    if use not in known:
        raise ConfigError(
            f"{here}: no entry point of that name in {group}{closest(use, known)} "
            "(or write 'package.module:name' or 'file.py:name')"
        )
    return find(known[use], group, here)


def _load_module(source: str, name: str, here: str, base: Path | None) -> ModuleType:
    try:
        module = importlib.import_module(source)
    except ModuleNotFoundError as error:
        _refuse_hidden(source, here)
        missing = str(error.name)
        if not (source == missing or source.startswith(f"{missing}.")):
            raise ConfigError(f"{here}: {source} needs the module {missing!r}, which is not installed") from error
        file = source.replace(".", "/") + ".py"
        hint = f"; for the file write '{file}:{name}'" if _place(file, base) else ""
        raise ConfigError(f"{here}: there is no module {missing!r}{hint}") from error
    except (Exception, SystemExit) as error:  # importing runs anybody's code
        raise ConfigError(f"{here}: importing {source!r} failed: {type(error).__name__}: {error}") from error
    _refuse_hidden(source, here)
    return module


def _refuse_hidden(source: str, here: str) -> None:
    """Raises when one of our packages is not ours, because a folder of the same name comes first on the path."""
    top = source.partition(".")[0]
    if top not in OURS or top not in sys.modules:
        return
    folders = [Path(folder).resolve() for folder in getattr(sys.modules[top], "__path__", [])]
    folders = folders or [Path(getattr(sys.modules[top], "__file__", None) or ".").resolve()]
    if HOME / top not in folders:
        raise ConfigError(
            f"{here}: {folders[0]} hides fedsim's own package {top!r}: rename it, or start fedsim from another folder"
        )


def _place(source: str, base: Path | None) -> Path | None:
    """The file that a `use` names, relative to `base` or to the current folder; None if there is none."""
    try:
        places = [folder / source for folder in (base, Path.cwd()) if folder is not None]
        return next((place.resolve() for place in places if place.is_file()), None)
    except OSError:  # a name that is too long, say
        return None


class _Source(SourceFileLoader):
    """Reads the source itself: bytecode of a file that is written twice in a second is that of the first."""

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self.get_data(self.path), self.path)


def _load_file(source: str, here: str, base: Path | None) -> ModuleType:
    """The module in a file; one and the same for as long as the file's content is."""
    path = _place(source, base)
    if path is None:
        looked = ", ".join(dict.fromkeys(str(folder) for folder in (base, Path.cwd()) if folder is not None))
        raise ConfigError(f"{here}: there is no file {shown(source)} (looked in {looked})")
    try:
        identity = hashlib.sha256(str(path).encode() + path.read_bytes()).hexdigest()[:8]
    except OSError as error:
        raise ConfigError(f"{here}: {path} cannot be read: {error.strerror}") from error
    name = f"fedsim_plugin_{path.stem}_{identity}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path, loader=_Source(name, str(path)))
    if spec is None or spec.loader is None:
        raise ConfigError(f"{here}: {path} cannot be read as Python")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up there
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # its neighbours can be imported; last, so that they hide nothing
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # importing runs anybody's code
        del sys.modules[name]
        told = f"{type(error).__name__}: {error}"
        raise ConfigError(f"{here}: importing {path}{_line(error, path)} failed: {told}") from error
    return module


def _line(error: BaseException, path: Path) -> str:
    """Where in a file an error arose: ", line 3", or "" if not in it."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    if isinstance(error, SyntaxError) and error.filename == str(path):
        lines.append(error.lineno)
    return f", line {lines[-1]}," if lines else ""


def absolute(use: str, base: Path | None) -> str:
    """A `use` that means the same from any folder: the path of a file made absolute."""
    source, colon, name = use.rpartition(":")
    if not (colon and source.endswith(".py")):
        return use
    return f"{_place(source, base) or source}:{name}"


def canonical(use: str, group: str, base: Path | None) -> str:
    """A `use` without a short name, and with the absolute path of a file."""
    return absolute(names(group).get(use, use), base)


def fingerprints(tables: Mapping[str, Any]) -> dict[str, str]:
    """The SHA-256 of each plug-in file that these tables name by its absolute path."""
    found: dict[str, str] = {}
    for key, value in tables.items():
        file = Path(value.rpartition(":")[0]) if key == "use" and isinstance(value, str) else Path()
        if isinstance(value, Mapping):
            found |= fingerprints(value)
        elif file.suffix == ".py":
            found[str(file)] = hashlib.sha256(file.read_bytes()).hexdigest()
    return found


def _public(module: ModuleType) -> list[str]:
    return [name for name, value in vars(module).items() if not name.startswith("_") and callable(value)]
