"""What was asked and where it ran, as tables."""

import shlex
from collections.abc import Mapping
from typing import Any

from fedsim.report.content import Fold, Section, Table
from fedsim.report.formats import count, plain, setting
from fedsim.report.reading import RunRecord

_NUMBERS = ("num_clients", "parameters", "cpus")
_NAMES = {"num_clients": "clients", "parameters": "parameters of the model", "git_commit": "commit", "notes": "data"}
_FIRST = (
    "started",
    "command",
    "engine",
    "num_clients",
    "notes",
    "parameters",
    "git_commit",
    "platform",
    "cpus",
    "devices",
)


def flat(tables: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of nested tables by their dotted names."""
    found: dict[str, Any] = {}
    for key, value in tables.items():
        name = f"{prefix}{key}"
        found |= flat(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return found


def configuration(record: RunRecord) -> Section:
    """The experiment, a table for each of its tables."""
    tables = {"experiment": {k: v for k, v in record.experiment.items() if not isinstance(v, Mapping)}}
    for key, value in record.experiment.items():
        if key == "clients" and isinstance(value, Mapping) and all(isinstance(v, Mapping) for v in value.values()):
            tables |= {f"clients.{action}": table for action, table in value.items()}
        elif isinstance(value, Mapping):
            tables[key] = dict(value)
    made = [
        Table(
            plain(name), ("key", "value"), tuple((plain(k), setting(v)) for k, v in flat(table).items()), words=(0, 1)
        )
        for name, table in tables.items()
        if table
    ]
    text = (record.path / "experiment.toml").read_text(encoding="utf-8")
    return Section("Configuration", tables=tuple(made), folds=(Fold("experiment.toml", text),))


def surroundings(record: RunRecord) -> Section | None:
    """Where and with what it ran."""
    if not record.environment:
        return None
    order = [key for key in _FIRST if key in record.environment]
    order += [key for key in record.environment if key not in _FIRST]
    rows = tuple((plain(_NAMES.get(key, key)), _told(key, record.environment[key])) for key in order)
    return Section("Environment", tables=(Table("", ("key", "value"), rows, words=(0, 1)),))


def _told(key: str, value: Any) -> str:
    if key == "command" and isinstance(value, list):
        return plain(shlex.join(map(str, value)))
    if key == "notes" and isinstance(value, list):
        return plain("; ".join(map(str, value)))
    if key in _NUMBERS and isinstance(value, int):
        return count(value)
    return setting(value)
