"""A Flower app as it lies in a folder, with a pyproject.toml that names its parts."""

import sys
import tomllib
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from flwr.app import UserConfig
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

OURS = ("strategies", "clients", "experiments")


class AppFolder(NamedTuple):
    """What a folder holds."""

    name: str
    server_app: ServerApp
    client_app: ClientApp
    run_config: UserConfig  # the defaults that [tool.flwr.app.config] states
    num_nodes: int | None  # what its default federation states, where it has one


def load(folder: Path) -> AppFolder:
    """The app in a folder. The folder is put at the front of Python's path, where the app expects it.

    Raises:
        ValueError: it is no Flower app; says what is missing where.
    """
    path = folder / "pyproject.toml"
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{folder} is not a Flower app: there is no {path.name} in it") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    flower = _table(_table(tables, "tool", path), "flwr", path)
    app = _table(flower, "app", path)
    components = _table(app, "components", path)
    where = str(folder.resolve())
    if sys.path[:1] != [where]:
        sys.path[:] = [where, *(entry for entry in sys.path if entry != where)]
    _forget(folder.resolve())
    for use in components.values():
        _check_origin(str(use).partition(".")[0].partition(":")[0], folder.resolve(), path)
    return AppFolder(
        str(_inner(tables, "project", path).get("name", folder.resolve().name)),
        _component(components, "serverapp", ServerApp, path),
        _component(components, "clientapp", ClientApp, path),
        flattened(_inner(app, "config", path)),
        _num_nodes(flower, path),
    )


def _forget(folder: Path) -> None:
    """Has the folder's modules imported anew: what they keep from an earlier run is none of the next one's business."""
    for name, module in list(sys.modules.items()):
        origin = Path(getattr(module, "__file__", None) or "/").resolve()
        own = origin.is_relative_to(folder) and "site-packages" not in origin.parts
        if own and name.partition(".")[0] not in ("fedsim", *OURS):
            del sys.modules[name]


def _table(tables: Mapping[str, Any], key: str, path: Path) -> Mapping[str, Any]:
    found = tables.get(key)
    if not isinstance(found, Mapping):
        raise ValueError(f"{path} has no [tool.flwr.app.components]: it is not a Flower app ({key} is missing)")
    return found


def _inner(tables: Mapping[str, Any], key: str, path: Path) -> Mapping[str, Any]:
    """A table that need not be there."""
    found = tables.get(key, {})
    if not isinstance(found, Mapping):
        raise ValueError(f"{path}: {key} = {found!r}: must be a table")
    return found


def _check_origin(name: str, folder: Path, path: Path) -> None:
    """Raises where the app's module of this name is another's already: Python imports a name once."""
    origin = getattr(sys.modules.get(name), "__file__", None)
    ours = name and ((folder / name).is_dir() or (folder / f"{name}.py").exists())
    if ours and origin is not None and not Path(origin).resolve().is_relative_to(folder):
        raise ValueError(f"{path}: {name!r} is imported already, from {origin}: run each app in a process of its own")


def _component(components: Mapping[str, Any], key: str, kind: type[Any], path: Path) -> Any:
    use = components.get(key)
    module, colon, name = use.partition(":") if isinstance(use, str) else ("", "", "")
    here = f"{path}: tool.flwr.app.components.{key} = {use!r}"
    if not (module and colon and name) or module.startswith("."):
        raise ValueError(f"{here}: must be 'package.module:name'")
    try:
        found: Any = import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{here}: {error}") from error
    if not isinstance(found, kind):
        raise ValueError(f"{here}: is a {type(found).__name__}, must be a {kind.__name__}")
    return found


def flattened(config: Mapping[str, Any], prefix: str = "") -> UserConfig:
    """A run's configuration as apps see it: keys of nested tables joined by dots."""
    flat: UserConfig = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= flattened(value, f"{prefix}{key}.")
        elif isinstance(value, bool | int | float | str):
            flat[prefix + key] = value
        else:
            raise ValueError(f"run config {prefix}{key} = {value!r}: must be a number, a string, true or false")
    return flat


def changed(config: UserConfig, changes: Mapping[str, Any]) -> UserConfig:
    """The configuration with some values changed; as in Flower, only of keys that there are."""
    unknown = sorted(changes.keys() - config.keys())
    if unknown:
        known = ", ".join(sorted(config)) or "no keys"
        raise ValueError(f"unknown key of the app's run config: {', '.join(unknown)}; it has {known}")
    if nested := [key for key, value in changes.items() if isinstance(value, Mapping)]:
        raise ValueError(f"run config {nested[0]} = {changes[nested[0]]!r}: must be a number, a string, true or false")
    return config | flattened(changes)


def _num_nodes(flower: Mapping[str, Any], path: Path) -> int | None:
    """As older pyproject files state it: [tool.flwr.federations.NAME] options.num-supernodes."""
    federations = _inner(flower, "federations", path)
    name = federations.get("default", "")
    if not isinstance(name, str):
        raise ValueError(f"{path}: tool.flwr.federations.default = {name!r}: must be a name")
    number = _inner(_inner(federations, name, path), "options", path).get("num-supernodes")
    if number is not None and (type(number) is not int or number < 1):
        raise ValueError(f"{path}: num-supernodes = {number!r}: must be a number >= 1")
    return number
