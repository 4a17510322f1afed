"""Running an experiment: from a file, from where a run was left, or from objects."""

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import tomli_w
import torch

from fedsim.client import Client
from fedsim.config import Assembly, ConfigError, assemble, assignment, fingerprints, read, resolve, variants
from fedsim.data.federation import Federation
from fedsim.engines.engine import Engine
from fedsim.engines.local import auto
from fedsim.environment import environment
from fedsim.evaluation import Evaluate
from fedsim.flower import Outcome
from fedsim.flower import folder as app_folder
from fedsim.flower import run as run_flower
from fedsim.flower.guest import FlowerStrategy
from fedsim.foreign import adopt
from fedsim.job import DisplayFor, Job, Plan, Result, drive, prepare
from fedsim.model import Model
from fedsim.randomness import seeding
from fedsim.ranges import Count, Natural, check
from fedsim.runs import Run, trained
from fedsim.sampling import everyone
from fedsim.task import Sampler

logger = logging.getLogger(__name__)
NODES = 10  # of a Flower app that does not say how many
EngineFor = Callable[[Federation, Mapping[str, Client], int], Engine]  # (federation, clients, seed)


def run(
    experiment: str | Path | Mapping[str, Any],
    *,
    changes: Sequence[str] = (),
    root: str | Path = "runs",
    tracker: str | None = None,
    display: DisplayFor | None = None,
    engine: EngineFor | None = None,
) -> Result:
    """Runs an experiment: a TOML file, the name of a bundled one ("fedavg/digits"), or the tables themselves.

    Args:
        experiment: what to run.
        changes: "strategy.lr=0.1", applied to the tables.
        root: the folder under which the run's directory is made.
        tracker: "tensorboard", "wandb" or "mlflow", to send the metrics there too.
        display: what to show meanwhile; nothing if None.
        engine: where clients run, as for `simulate`; None: as the experiment says.

    Raises:
        ConfigError: the experiment is wrong; nothing was run.
        ConnectionError: its data could not be fetched; nothing was run.
        TooFewReplies: the run ended early; its directory holds a checkpoint.
    """
    asked = resolve(*read(experiment, changes))
    if asked.sweep:
        raise ConfigError(f"sweep: {asked.name} is several runs, over {', '.join(asked.sweep)}: fedsim.sweep runs them")
    with threads(asked.threads):
        parts = assemble(asked)
        if engine is not None:
            parts.engine.close()
            parts = parts._replace(engine=engine(parts.federation, parts.clients, asked.seed))
        job = prepare(parts, Plan.of(asked), asked.model_dump(), tracker)
        return drive(job, _create(Path(root), job, asked.toml()), False, display)


def sweep(
    experiment: str | Path | Mapping[str, Any],
    *,
    seeds: Sequence[int] = (),
    changes: Sequence[str] = (),
    root: str | Path = "runs",
    tracker: str | None = None,
    display: DisplayFor | None = None,
) -> Iterator[Result]:
    """Runs every variant of an experiment, with every seed; without a sweep in it, the experiment itself.

    Args:
        experiment: what to run; its `sweep` says which values which keys take.
        seeds: of the runs; none: the experiment's own.
        changes: as for `run`, and so are the others.

    Raises:
        ConfigError: a variant is wrong; nothing was run.
    """
    for variant in variants(experiment, changes):
        for chosen in [[f"seed={seed}"] for seed in seeds] or [[]]:
            yield run(experiment, changes=[*variant, *chosen], root=root, tracker=tracker, display=display)


def load(path: str | Path, seed: int | None = None) -> Result:
    """What `run` gave back of a run that is there; of one that goes on, or was broken off, what there is so far.

    Args:
        path: the run's directory; or a folder of runs: of these, the latest.
        seed: of the run, where there are several.

    Raises:
        FileNotFoundError: there is no such run, or it has no checkpoint yet.
        ValueError: its last checkpoint is damaged, or holds no model.
    """
    directory = Run.latest(Path(path), seed)
    return Result(directory.metrics(), trained(directory.path), directory.path)


def resume(
    path: str | Path, *, rounds: int | None = None, tracker: str | None = None, display: DisplayFor | None = None
) -> Result:
    """Goes on with a run from its last checkpoint, as if it had never stopped; `rounds` lets it run longer.

    Raises:
        FileNotFoundError: there is no run in this directory.
        ConfigError: its experiment or its last checkpoint cannot be read, or it has had more `rounds` than that.
        TooFewReplies: as for `run`.
    """
    directory = Run.open(Path(path))
    experiment = directory.path / "experiment.toml"
    if "\n[objects]" in experiment.read_text(encoding="utf-8", errors="replace"):
        raise ConfigError(f"{directory.path} was made of objects: go on with it by fedsim.simulate(..., resume=...)")
    asked = resolve(*read(experiment, () if rounds is None else (f"rounds={rounds}",)))
    _compare(directory, fingerprints(asked.model_dump()))
    with threads(asked.threads):
        job = prepare(assemble(asked), Plan.of(asked), asked.model_dump(), tracker)
        return drive(job, directory, True, display, asked.toml())


def simulate(
    *,
    federation: Federation,
    model: Model,
    strategy: FlowerStrategy,
    clients: Mapping[str, Client],
    plan: Plan,
    sample: Sampler | None = None,
    engine: EngineFor = auto,
    root: str | Path = "runs",
    resume: str | Path | None = None,
    display: DisplayFor | None = None,
) -> Result:
    """Runs a simulation made of objects instead of tables.

    Args:
        federation: the data by client.
        model: the model, whose parameters are the first ones.
        strategy: the server's side, fedsim's or Flower's.
        clients: action -> the local side. Without "evaluate" the model's accuracy is counted.
        plan: how long, and what is written down when.
        sample: who takes part; None: everyone.
        engine: where clients run: a class of engines such as `Sequential`, or another function of the federation, the
            clients and the seed; `functools.partial(Vectorised, block=8)` sets more.
        root: the folder under which the run's directory is made.
        resume: the directory of a run of the same objects, to go on with.
        display: what to show meanwhile; nothing if None.
    """
    classes, groups = (len(federation.names[name]) if name in federation.names else None for name in ("y", "a"))
    actions = {"evaluate": Evaluate(model=model, num_classes=classes, num_groups=groups)} | dict(clients)
    adopted, sample = adopt(strategy, sample or everyone(federation.num_clients), federation.num_clients, plan.seed)
    assembly = Assembly(federation, model, adopted, actions, sample, engine(federation, actions, plan.seed))
    told = {name: repr(value) for name, value in {"strategy": strategy, **clients}.items()}
    tables = {name: value for name, value in asdict(plan).items() if value is not None} | {"objects": told}
    with threads(plan.threads):
        job, written = prepare(assembly, plan, tables), tomli_w.dumps(tables)
        directory = _create(Path(root), job, written) if resume is None else Run.open(Path(resume))
        return drive(job, directory, resume is not None, display, written)


def run_app(folder: str | Path, *, changes: Sequence[str] = (), num_nodes: int | None = None, seed: int = 0) -> Outcome:
    """Runs the Flower app in a folder, as it is.

    Args:
        folder: has a pyproject.toml with [tool.flwr.app.components].
        changes: "local-epochs=2", applied to the app's run config.
        num_nodes: how many nodes; None: as the app's own default federation says, and 10 if it says nothing.
        seed: of all that is drawn.

    Raises:
        ConfigError: there is no app, or it has no such configuration; nothing was run.
        ClientAppsFailed: not one message of some type was answered without an error.
        Exception: what the server's app raised.
    """
    try:
        check("seed", seed, Natural)
        check("num_nodes", num_nodes, Count | None)
        with seeding(seed, "import"):  # some apps make their model when they are imported
            app = app_folder.load(Path(folder))
        config = app_folder.changed(app.run_config, dict(assignment(change) for change in changes))
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return run_flower(
        app.server_app, app.client_app, num_nodes=num_nodes or app.num_nodes or NODES, seed=seed, run_config=config
    )


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Inside, torch uses this many threads: their number changes the last bits of a sum, so an experiment states it."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _compare(directory: Run, now: Mapping[str, str]) -> None:
    """Warns of plug-in files that are not what they were when the run began."""
    try:
        before = json.loads((directory.path / "environment.json").read_text(encoding="utf-8"))["plugins"]
    except (OSError, ValueError, KeyError, TypeError):  # nothing to compare with
        return
    for file, content in now.items():
        if before.get(file, content) != content:
            logger.warning(
                "%s was changed since the run in %s began: the run may not be of one piece", file, directory.path
            )


def _create(root: Path, job: Job, experiment: str) -> Run:
    """A new directory for this job."""
    parts = job.assembly
    told = environment() | {
        "plugins": fingerprints(job.tables),
        "engine": repr(parts.engine),
        "num_clients": parts.federation.num_clients,
        **({"notes": list(parts.federation.notes)} if parts.federation.notes else {}),
        "parameters": sum(leaf.numel() for leaf in parts.model.params.values()),
    }
    try:
        return Run.create(root, job.plan.name, job.plan.seed, experiment, told)
    except OSError as error:
        raise ConfigError(f"no directory can be made for the run in {root}: {error}") from error
