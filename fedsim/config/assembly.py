"""Assembly: an experiment's tables made into the objects of a simulation."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fedsim.client import Client
from fedsim.config.experiment import PARTS, Experiment
from fedsim.config.plugins import ConfigError, closest, shown
from fedsim.config.recipe import COUNTED, Recipe, recipe
from fedsim.data.dataset import Dataset
from fedsim.data.federation import Federation, Partition
from fedsim.engines.engine import Engine
from fedsim.flower.guest import is_flower
from fedsim.foreign import Foreign, adopt
from fedsim.forgetting import gone_with
from fedsim.model import Model
from fedsim.ranking import popularity
from fedsim.strategy import Strategy
from fedsim.task import Sampler, Task


class Assembly(NamedTuple):
    """All that a simulation consists of."""

    federation: Federation
    model: Model
    strategy: Strategy
    clients: dict[str, Client]
    sample: Sampler
    engine: Engine


def _recipes(experiment: Experiment, folder: Path | None) -> tuple[dict[str, Recipe], dict[str, Recipe]]:
    """The recipe of each part but the clients, and of each action's client."""
    tables: dict[str, Any] = {name: getattr(experiment, name) for name in PARTS if name != "clients"}
    parts = {name: recipe(table, name, *PARTS[name], folder) for name, table in tables.items()}
    actions = {"evaluate": {"use": "fedsim.evaluation:Evaluate"}} | experiment.clients
    for name, table in actions.items():
        if "use" not in table:
            there = closest(name, [other for other, table in actions.items() if "use" in table])
            raise ConfigError(f"clients.{name}.use is missing: it names what a client does on {name!r}{there}")
    clients = {name: recipe(table, f"clients.{name}", *PARTS["clients"], folder) for name, table in actions.items()}
    return parts, clients


def resolve(experiment: Experiment, folder: Path | None = None) -> Experiment:
    """The same experiment with nothing left to say: no short names, absolute paths, every argument's default.

    Raises:
        ConfigError: a table is wrong.
    """
    parts, clients = _recipes(experiment, folder)
    tables: dict[str, Any] = {name: part.table for name, part in parts.items()}
    return experiment.model_copy(update=tables | {"clients": {name: client.table for name, client in clients.items()}})


class Supplies(NamedTuple):
    """What the local side of a simulation consists of."""

    federation: Federation
    model: Model
    clients: dict[str, Client]


def assemble(experiment: Experiment, folder: Path | None = None) -> Assembly:
    """Checks every table of an experiment, then makes its objects.

    Raises:
        ConfigError: a table is wrong. No data has been read if a key or a value is to blame.
        ConnectionError: the data could not be fetched.
    """
    recipes, locals_ = _recipes(experiment, folder)
    context, supplies = _supply(experiment, recipes, locals_)
    federation, model, clients = supplies
    use = recipes["strategy"].use
    strategy = recipes["strategy"].make(context)
    if not is_flower(strategy):
        raise ConfigError(
            f"strategy: {use} gives a {type(strategy).__name__}, it must give a Strategy, ours or Flower's"
        )
    sample = recipes["sample"].make(context)
    if not callable(sample):
        raise ConfigError(f"sample: {recipes['sample'].use} gives {shown(sample)}, it must give a sampler (a function)")
    strategy, sample = adopt(strategy, sample, federation.num_clients, experiment.seed)
    # One of Flower's has a memory, and may be asked once a round only.
    first = Task("train", {"params": {}}) if isinstance(strategy, Foreign) else _first(strategy, model, use)
    for asked in dict.fromkeys((first.action, *strategy.actions)):
        if asked not in clients:
            raise ConfigError(
                f"clients.{asked} is missing: {use} asks the clients to {asked}; "
                f"there are clients.{', clients.'.join(clients)}"
            )
        shared = first.shared.keys() if asked == first.action else strategy.shares(asked)
        for name, remedy in clients[asked].expects.items():
            if shared is not None and name not in shared:
                told = f"clients.{asked}: {locals_[asked].use} expects {name} of the server"
                raise ConfigError(f"{told}, and {use}, as it is set, does not share it: {remedy}")
    return Assembly(federation, model, strategy, clients, sample, _made(recipes["engine"], context, Engine))


def _first(strategy: Strategy, model: Model, use: str) -> Task:
    """What the clients are asked in the first round."""
    try:
        return strategy.configure(strategy.init(model.params), 1)
    except (ValueError, OSError) as error:  # such as a run to begin from that is not there
        raise ConfigError(f"strategy: {use}: {error}") from error


def supply(experiment: Experiment, folder: Path | None = None) -> Supplies:
    """The local side alone, for a node that has nothing to do with the server's; raises as `assemble`."""
    return _supply(experiment, *_recipes(experiment, folder))[1]


def _supply(
    experiment: Experiment, recipes: Mapping[str, Recipe], locals_: Mapping[str, Recipe]
) -> tuple[dict[str, Any], Supplies]:
    """The local side, and the arguments to fill in for the rest."""
    context: dict[str, Any] = {"seed": experiment.seed}
    dataset = context["dataset"] = _made(recipes["data"], context, Dataset)
    context["columns"] = dataset.columns
    context["partition"] = _made(recipes["partition"], context, Partition)
    federation = context["federation"] = _made(recipes["split"], context, Federation)
    context["num_clients"] = federation.num_clients
    for name, column in COUNTED.items():
        if column in federation.names:
            context[name] = len(federation.names[column])
    if "item" in federation.names:
        context["popularity"] = popularity(federation)
    model = context["model"] = _made(recipes["model"], context, Model)
    if "target" in federation.names:
        context["gone_with"] = gone_with(federation, model.target)
    clients = context["clients"] = {name: _made(part, context, Client) for name, part in locals_.items()}
    for name, client in clients.items():
        if missing := [column for column in client.needs if column not in federation.columns]:
            ratings = {"user", "item"} <= federation.columns.keys()
            raise ConfigError(
                f"clients.{name}: {locals_[name].use} needs a column {' and a column '.join(missing)}; "
                f"{federation.name}, split by {recipes['split'].use}, has {', '.join(sorted(federation.columns))}"
                + (': set split.use = "leave_one_out"' if ratings else "")
            )
    return context, Supplies(federation, model, clients)


def _made(part: Recipe, context: Mapping[str, Any], kind: type[Any]) -> Any:
    """What a recipe makes, which must be of this kind."""
    made = part.make(context)
    if not isinstance(made, kind):
        raise ConfigError(f"{part.where}: {part.use} gives a {type(made).__name__}, it must give a {kind.__name__}")
    return made
