"""Experiments: read from a file, checked, made into the objects of a simulation."""

import copy
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedsim.client import Client
from fedsim.config.plugins import HOME, ConfigError, absolute, closest
from fedsim.config.recipe import explain, recipe
from fedsim.data.federation import Federation
from fedsim.engines.engine import Engine
from fedsim.model import Model
from fedsim.sampling import Sampler
from fedsim.strategy import Strategy

Table = dict[str, Any]
EXPERIMENTS = HOME / "experiments"


class Experiment(BaseModel):
    """An experiment file: plain values, and a table for each part."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    rounds: Annotated[int, Field(ge=1)]
    evaluate_every: Annotated[int, Field(ge=0)] = 1  # 0: never
    evaluate_clients: Annotated[int, Field(ge=1)] | None = None  # how many clients evaluate; None: all with a test part
    checkpoint_every: Annotated[int, Field(ge=1)] = 10
    keep_checkpoints: Annotated[int, Field(ge=1)] | Literal["all"] = 2  # the last so many
    min_replies: Annotated[int, Field(ge=1)] = 1
    threads: Annotated[int, Field(ge=1)] = 1  # of torch; more change the last bits of a sum
    data: Table
    partition: Table
    split: Table = {"use": "fedsim.data.federation:divide"}
    model: Table
    strategy: Table
    clients: Annotated[dict[str, Table], Field(min_length=1)]
    sample: Table = {"use": "fedsim.sampling:everyone"}
    engine: Table = {"use": "fedsim.engines.local:auto"}

    def toml(self) -> str:
        """The experiment as it is resolved, defaults included."""
        return tomli_w.dumps(self.model_dump(exclude_none=True))


# For each part: the entry points of its short names, and the arguments that are filled in.
PARTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "data": ("fedsim.datasets", ("seed",)),
    "partition": ("fedsim.partitions", ("columns", "seed")),
    "split": ("fedsim.splits", ("dataset", "partition", "seed")),
    "model": ("fedsim.models", ("federation", "num_classes", "seed")),
    "strategy": ("fedsim.strategies", ("federation", "model", "num_classes", "num_clients", "seed")),
    "clients": ("fedsim.clients", ("federation", "model", "num_classes", "num_clients", "seed")),
    "sample": ("fedsim.samplers", ("federation", "num_clients", "seed")),
    "engine": ("fedsim.engines", ("federation", "clients", "seed")),
}


def read(source: str | Path | Mapping[str, Any], changes: Sequence[str] = ()) -> tuple[Experiment, Path | None]:
    """An experiment and the folder it lies in.

    Args:
        source: a TOML file, the name of a bundled experiment ("fedavg/digits"), or the tables themselves.
        changes: "strategy.lr=0.1", in TOML's notation; a value that is not TOML is a string.
    """
    if isinstance(source, Mapping):
        tables, folder, label = copy.deepcopy(dict(source)), None, "experiment"
    else:
        path = locate(source)
        tables, folder, label = _parse(path), path.resolve().parent, str(path)
    for change in changes:
        _change(tables, change)
    try:
        experiment = Experiment.model_validate(tables)
    except ValidationError as error:
        raise ConfigError(f"{label}: {explain(error, '', keys=Experiment.model_fields)}") from None
    return experiment.model_copy(update=_absolute(experiment, folder)), folder


def locate(source: str | Path) -> Path:
    """The file of an experiment given by its path or by the name of a bundled one."""
    for path in (Path(source), Path(f"{source}.toml"), EXPERIMENTS / f"{source}.toml", EXPERIMENTS / source):
        if path.is_file():
            return path
    known = bundled()
    raise ConfigError(
        f"experiment {str(source)!r}: no such file, nor a bundled experiment{closest(str(source), known)}"
    )


def bundled() -> list[str]:
    """The names of the bundled experiments."""
    return sorted(path.relative_to(EXPERIMENTS).with_suffix("").as_posix() for path in EXPERIMENTS.rglob("*.toml"))


def _parse(path: Path) -> Table:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not TOML: {error}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None


def _change(tables: Table, change: str) -> None:
    key, equals, text = change.partition("=")
    if not equals or not all(key.strip().split(".")):
        raise ConfigError(f"--set {change}: must be like strategy.lr=0.1")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *path, last = key.strip().split(".")
    branch = tables
    for part in path:
        branch = branch.setdefault(part, {})
        if not isinstance(branch, dict):
            raise ConfigError(f"--set {change}: {part} is {branch!r}, not a table")
    branch[last] = value


def _absolute(experiment: Experiment, folder: Path | None) -> dict[str, Any]:
    """The tables, with the paths of plug-in files made absolute."""

    def fix(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {k: absolute(v, folder) if k == "use" and isinstance(v, str) else fix(v) for k, v in value.items()}

    return {name: fix(getattr(experiment, name)) for name in PARTS}


class Assembly(NamedTuple):
    """All that a simulation consists of."""

    federation: Federation
    model: Model
    strategy: Strategy
    clients: dict[str, Client]
    sample: Sampler
    engine: Engine


def assemble(experiment: Experiment, folder: Path | None = None) -> Assembly:
    """Checks every table of an experiment, then makes its objects.

    Raises:
        ConfigError: a table is wrong. No data has been read if a key or a value is to blame.
    """
    tables: dict[str, Any] = {name: getattr(experiment, name) for name in PARTS if name != "clients"}
    recipes = {name: recipe(table, name, *PARTS[name], folder) for name, table in tables.items()}
    actions = {"evaluate": {"use": "fedsim.evaluation:Evaluate"}} | experiment.clients
    locals_ = {name: recipe(table, f"clients.{name}", *PARTS["clients"], folder) for name, table in actions.items()}
    context: dict[str, Any] = {"seed": experiment.seed}
    dataset = context["dataset"] = recipes["data"].make(context)
    context["columns"] = dataset.columns
    context["partition"] = recipes["partition"].make(context)
    federation = context["federation"] = recipes["split"].make(context)
    context["num_clients"] = federation.num_clients
    context["num_classes"] = len(federation.names["y"]) if "y" in federation.names else None
    context["model"] = recipes["model"].make(context)
    context["clients"] = {name: part.make(context) for name, part in locals_.items()}
    strategy, sample, engine = (recipes[name].make(context) for name in ("strategy", "sample", "engine"))
    return Assembly(federation, context["model"], strategy, context["clients"], sample, engine)
