"""Parcels: what an experiment of this machine needs in order to run in a container as it would run here."""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fedsim.config import (
    ConfigError,
    Experiment,
    assignment,
    fingerprints,
    locate,
    read,
    resolve,
    setting,
    variants,
)
from fedsim.data import files
from fedsim.data.sources import SOURCES
from fedsim.engines.ray.cluster import OURS, travelling

Table = Mapping[str, Any]
RAY = "fedsim.engines.ray:Ray"
INNER = {
    "fedsim.engines.local:auto": "auto",
    "fedsim.engines.local:Sequential": "sequential",
    "fedsim.engines.local:Vectorised": "vectorised",
}
KEPT = ("inner", "block", "threads", "deadline", "retries")  # of Ray's keys, those that say nothing of a machine


class Parcel(NamedTuple):
    """An experiment, checked, and what belongs to it on this machine."""

    path: Path  # of the experiment
    changes: tuple[str, ...]
    seeds: tuple[int, ...]
    engine: Table  # the experiment's own
    sources: tuple[Path, ...]  # the experiment, plug-in files, and their neighbours
    places: tuple[Path, ...]  # other files and folders that its values name
    data: Path | None  # the folder with the data sets
    modules: dict[str, str]  # that have to be in the image -> the key that names them

    def words(self, command: Sequence[str], marker: str, more: Sequence[str] = ()) -> list[str]:
        """A container's command, with this experiment in the place of a marker.

        Where the command sets an engine, it is that one, with what the experiment's own says of how clients run.

        Args:
            command: has the marker, and may have an engine.
            marker: what the experiment and its changes stand for.
            more: arguments besides.
        """
        given = [assignment(word)[1] for word in command if word.startswith("engine=")]
        changes = [*self.changes, *(setting("engine", placed(self.engine, cluster)) for cluster in given[:1])]
        words = [str(self.path), *more, *(word for change in changes for word in ("--set", change))]
        words += ["--seeds", *map(str, self.seeds)] if self.seeds else []
        there = command.index(marker)
        return [*command[:there], *words, *command[there + 1 :]]


def pack(experiment: str, changes: Sequence[str], seeds: Sequence[int]) -> Parcel:
    """The parcel of an experiment, as `fedsim run` would run it.

    Raises:
        ConfigError: the experiment is wrong, as for `fedsim run`.
        ConnectionError: its data could not be fetched.
    """
    chosen = [[f"seed={seed}"] for seed in seeds] or [[]]
    some = [resolve(*read(experiment, [*each, *seed])) for each in variants(experiment, changes) for seed in chosen]
    swept = read(experiment, changes)[0].sweep
    if over := [key for key in swept if key.partition(".")[0] == "engine"]:
        raise ConfigError(f"sweep: {over[0]}: where clients run is what launch decides: take it out of the sweep")
    tables = [one.model_dump() for one in some]
    named = dict(pair for table in tables for pair in _named(table))
    found = {Path(value) for table in tables for value in _texts(table) if os.path.isabs(value)}
    return Parcel(
        locate(experiment).resolve(),
        tuple(changes),
        tuple(seeds),
        some[0].engine,
        (locate(experiment).resolve(), *_sources(tables)),
        tuple(sorted(path for path in found if path.exists())),
        _data(some),
        {module: where for module, where in named.items() if module.partition(".")[0] not in (*OURS, "experiments")},
    )


def placed(own: Table, cluster: Table) -> Table:
    """A cluster's engine that gives the bits of an experiment's own.

    Args:
        own: the experiment's engine, resolved.
        cluster: Ray at an address, with its workers.

    Raises:
        ConfigError: no worker of a cluster runs clients like that.
    """
    use = own["use"]
    if use not in (*INNER, RAY):
        raise ConfigError(f"engine.use = {use!r}: a cluster has workers of Ray's: auto, sequential, vectorised or ray")
    for key, none in (("gpus", 0), ("device", "cpu")):
        if own.get(key, none) != none and not cluster.get("gpus"):
            raise ConfigError(
                f"engine.{key} = {own[key]!r}: the containers have no GPU: set engine.{key}={none}, or see "
                "docker/README.md on GPUs"
            )
    kept = {key: own[key] for key in KEPT if key in own}
    return kept | ({} if use == RAY else {"inner": INNER[use]}) | dict(cluster)


def _sources(tables: Sequence[Table]) -> list[Path]:
    """The plug-in files that tables name, and what they have imported of what lies beside them."""
    named = {Path(file) for table in tables for file in fingerprints(table)}
    folders = {file.parent for file in named}
    return sorted(named | {file for file in travelling().values() if not folders.isdisjoint(file.parents)})


def _named(value: Any, where: str = "") -> Iterator[tuple[str, str]]:
    """The modules that tables name, and the keys that do."""
    for key, inner in value.items():
        here = f"{where}.{key}".lstrip(".")
        if isinstance(inner, Mapping):
            yield from _named(inner, here)
        elif key == "use" and isinstance(inner, str) and not (module := inner.rpartition(":")[0]).endswith(".py"):
            yield module, here


def _texts(value: Any) -> Iterator[str]:
    """All strings in tables."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(inner)


def _data(some: Sequence[Experiment]) -> Path | None:
    """The folder with the data sets of these experiments, which are fetched if they are not here: containers cannot."""
    folders = set()
    for experiment in some:
        module, _, name = experiment.data["use"].rpartition(":")
        if module == "fedsim.data.datasets" and name in SOURCES and not experiment.data.get("path"):
            try:
                files.load(SOURCES[name])
            except ValueError as error:
                raise ConfigError(f"data: {error}") from error
            folders.add(Path(files.whereabouts(SOURCES[name])).parent.resolve())
    if len(folders) > 1:
        raise ConfigError(f"the data sets of one launch must lie in one folder, and are in {sorted(map(str, folders))}")
    yours = Path(os.environ["FEDSIM_DATA"]).resolve() if os.environ.get("FEDSIM_DATA") else None
    return next(iter(folders), yours if yours and yours.is_dir() else None)
