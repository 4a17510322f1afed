"""Plug-ins: from the `use` of a table to the callable that it names."""

import difflib
import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
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
    if not isinstance(use, str) or not use:
        raise ConfigError(f"{where} = {use!r}: must be 'package.module:name', 'file.py:name' or a short name")
    source, colon, name = use.rpartition(":")
    if not colon:
        return _short(use, group, where)
    if source.endswith(".py"):
        module = _load_file(source, where, base)
    else:
        module = _load_module(source, where)
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            _refuse_hidden(source, where)
            raise ConfigError(f"{where} = {use!r}: {source} has no {name!r}{closest(name, _public(module))}")
        found = getattr(found, part)
    if not callable(found):
        raise ConfigError(f"{where} = {use!r}: {name} is a {type(found).__name__}, it must be callable")
    return found  # type: ignore[no-any-return]


def names(group: str) -> dict[str, str]:
    """Short name -> "module:name" of the entry points of a group, ours and other people's."""
    return {entry.name: entry.value for entry in sorted(entry_points(group=group), key=lambda entry: entry.name)}


def closest(word: str, words: Iterable[str]) -> str:
    """ ", did you mean ...?" or a list of what there is, to end a message with."""
    known = sorted(words)
    near = difflib.get_close_matches(word, known, 1)
    if near:
        return f"; did you mean {near[0]}?"
    return f"; there are {', '.join(known)}" if known else ""


def _short(use: str, group: str, where: str) -> Callable[..., Any]:
    known = names(group)
    if use not in known:
        raise ConfigError(
            f"{where} = {use!r}: no entry point of that name in {group}{closest(use, known)} "
            "(or write 'package.module:name' or 'file.py:name')"
        )
    return find(known[use], group, where)


def _load_module(source: str, where: str) -> ModuleType:
    try:
        return importlib.import_module(source)
    except ModuleNotFoundError as error:
        _refuse_hidden(source, where)
        missing = str(error.name)
        if source == missing or source.startswith(f"{missing}."):
            raise ConfigError(f"{where}: there is no module {missing!r} (asked for: {source!r})") from error
        raise ConfigError(f"{where}: {source} needs the module {missing!r}, which is not installed") from error
    except Exception as error:  # importing runs anybody's code
        raise ConfigError(f"{where}: importing {source!r} failed: {type(error).__name__}: {error}") from error


def _refuse_hidden(source: str, where: str) -> None:
    """Raises when one of our packages is not ours, because a folder of the same name comes first on the path."""
    top = source.partition(".")[0]
    if top not in OURS or top not in sys.modules:
        return
    folders = [Path(folder).resolve() for folder in getattr(sys.modules[top], "__path__", [])]
    folders = folders or [Path(getattr(sys.modules[top], "__file__", None) or ".").resolve()]
    if HOME / top not in folders:
        raise ConfigError(
            f"{where}: {folders[0]} hides fedsim's own package {top!r}: rename it, or start fedsim from another folder"
        )


def _load_file(source: str, where: str, base: Path | None) -> ModuleType:
    places = [folder / source for folder in (base, Path.cwd()) if folder is not None]
    path = next((place.resolve() for place in places if place.is_file()), None)
    if path is None:
        raise ConfigError(
            f"{where}: there is no file {source!r} (looked in {', '.join(str(p.parent) for p in places)})"
        )
    name = f"fedsim_plugin_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{where}: {path} cannot be read as Python")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # importing runs anybody's code
        del sys.modules[name]
        raise ConfigError(f"{where}: importing {path} failed: {type(error).__name__}: {error}") from error
    return module


def absolute(use: str, base: Path | None) -> str:
    """A `use` that means the same from any folder: the path of a file made absolute."""
    source, colon, name = use.rpartition(":")
    if not (colon and source.endswith(".py")):
        return use
    path = next((f / source for f in (base, Path.cwd()) if f is not None and (f / source).is_file()), Path(source))
    return f"{path.resolve()}:{name}"


def _public(module: ModuleType) -> list[str]:
    return [name for name, value in vars(module).items() if not name.startswith("_") and callable(value)]
