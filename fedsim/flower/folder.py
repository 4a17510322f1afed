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
    if where not in sys.path:
        sys.path.insert(0, where)
    return AppFolder(
        str(tables.get("project", {}).get("name", folder.resolve().name)),
        _component(components, "serverapp", ServerApp, path),
        _component(components, "clientapp", ClientApp, path),
        flattened(app.get("config", {})),
        _num_nodes(flower),
    )


def _table(tables: Mapping[str, Any], key: str, path: Path) -> Mapping[str, Any]:
    found = tables.get(key)
    if not isinstance(found, Mapping):
        raise ValueError(f"{path} has no [tool.flwr.app.components]: it is not a Flower app ({key} is missing)")
    return found


def _component(components: Mapping[str, Any], key: str, kind: type[Any], path: Path) -> Any:
    use = components.get(key)
    module, colon, name = use.partition(":") if isinstance(use, str) else ("", "", "")
    here = f"{path}: tool.flwr.app.components.{key} = {use!r}"
    if not (module and colon and name):
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
    return config | flattened(changes)


def _num_nodes(flower: Mapping[str, Any]) -> int | None:
    """As older pyproject files state it: [tool.flwr.federations.NAME] options.num-supernodes."""
    federations = flower.get("federations", {})
    default = federations.get(federations.get("default", ""), {}) if isinstance(federations, Mapping) else {}
    number = default.get("options", {}).get("num-supernodes") if isinstance(default, Mapping) else None
    return number if isinstance(number, int) else None
