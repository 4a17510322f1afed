"""What the command line tells about the machine, the data sets and an experiment before it is run."""

import inspect
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fedsim import tree
from fedsim.config import ConfigError, assemble, read
from fedsim.data import files
from fedsim.data.datasets import CATALOGUE
from fedsim.data.describe import describe, draw, draw_interactions
from fedsim.data.federation import SPLITS, Federation
from fedsim.data.sources import SOURCES
from fedsim.engines.local import Vectorised
from fedsim.environment import devices, memory, processors, versions
from fedsim.ranking import chosen, popularity, recommends
from fedsim.report.formats import amount

Pairs = list[tuple[str, str]]


def machine() -> Pairs:
    """Versions, processors, GPUs and memory."""
    free = memory()
    return [
        *versions().items(),
        ("processors", str(processors())),
        ("devices", ", ".join(devices())),
        ("free memory", "unknown" if free is None else amount(free)),
    ]


def outlook(experiment: str, changes: Sequence[str]) -> Pairs:
    """What an experiment would run where, and how large it is."""
    asked, folder = read(experiment, changes)
    parts = assemble(asked, folder)
    parts.engine.close()
    parameters = sum(leaf.numel() for leaf in parts.model.params.values())
    bytes_each = tree.count_bytes(parts.model.params.values())
    task = parts.strategy.configure(parts.strategy.init(parts.model.params), 1)
    ids = parts.sample(1).ids if task.ids is None else task.ids
    cohort = len(ids)
    held = cohort if task.reduce == "stack" else 1
    rows = [
        ("experiment", f"{asked.name}, {asked.rounds} rounds"),
        ("clients", f"{parts.federation.num_clients}, {cohort} in round 1"),
        ("model", f"{parameters:,} parameters, {amount(bytes_each)}"),
        ("engine", repr(parts.engine)),
        ("updates held at once", f"{held} of {amount(bytes_each)} (reduce = {task.reduce!r})"),
    ]
    if isinstance(parts.engine, Vectorised):
        sizes = parts.federation.sizes(parts.clients[task.action].split, ids)
        largest = int(sizes.argmax()) if sizes.size else 0
        block = parts.engine.block or parts.engine.width(task, int(sizes.max(initial=1)), ids[largest])
        rows.append(("block", f"{min(block, cohort)} clients at once"))
    return rows


def data_sets() -> list[tuple[str, str, str]]:
    """Name, where the files are, and source of each data set."""
    told = []
    for name, loader in CATALOGUE.items():
        where = files.whereabouts(SOURCES[name]) if name in SOURCES else "yours" if _yours(name) else "needs none"
        told.append((name, where, (loader.__doc__ or "").strip().splitlines()[0]))
    return told


def fetch(name: str) -> str:
    """Fetches the files of a data set into the cache, unless they are here, and says where they are."""
    if name not in CATALOGUE:
        raise ConfigError(f"data set {name!r}: must be one of {', '.join(CATALOGUE)}")
    if name not in SOURCES:
        return "reads a file of yours, path" if _yours(name) else "needs no files"
    files.load(SOURCES[name])
    return files.whereabouts(SOURCES[name])


def _yours(name: str) -> bool:
    """Whether a data set has a path that must be given."""
    path = inspect.signature(CATALOGUE[name]).parameters.get("path")
    return path is not None and path.default is inspect.Parameter.empty


def partition(
    experiment: str, changes: Sequence[str], column: str | None, plot: Path | None
) -> tuple[Pairs, Path | None]:
    """How an experiment's partition came out, what was left out, and the figure of it if one is asked for.

    Without a column that is who has how many items, where these are recommended, and else the shares of column "y".
    """
    asked, folder = read(experiment, changes)
    parts = assemble(asked, folder)
    parts.engine.close()
    federation = parts.federation
    if column is None and recommends(federation):
        rows = _interactions(federation, plot)
    else:
        rows = _shares(federation, column or "y", plot)
    return [*rows, *(("data", note) for note in federation.notes)], plot


def _interactions(federation: Federation, plot: Path | None) -> Pairs:
    """Who has how many items, those held out included; drawn is what there is to train on."""
    parts = {split: chosen(federation, split) for split in SPLITS}
    each = np.sum(list(parts.values()), axis=0)
    users, items, trained = len(each), len(federation.names["item"]), parts["train"]
    if plot is not None:
        draw_interactions(federation.name, trained, popularity(federation).numpy(), plot)
    return [
        ("users", f"{users:,}"),
        ("items", f"{items:,}"),
        ("interactions", f"{each.sum():,}, {trained.sum():,} of them to train on"),
        ("density", f"{each.sum() / (users * items):.3%}"),
        ("items of a user", f"{each.min():,} at least, {np.median(each):,.10g} in the median, {each.max():,} at most"),
        ("users with a validation item", f"{np.count_nonzero(parts['validation']):,}"),
        ("users with a test item", f"{np.count_nonzero(parts['test']):,}"),
    ]


def _shares(federation: Federation, column: str, plot: Path | None) -> Pairs:
    """How the values of a column, and the sensitive groups if there are any, are spread."""
    description = describe(federation, column)
    rows = [(name, f"{value:g}") for name, value in description.summary().items()]
    for split, sizes in zip(("training", "validation", "test"), description.sizes.T, strict=True):
        rows.append((f"{split} examples", f"{sizes.sum():,} ({np.median(sizes):g} a client)"))
    rows += [
        (f"{column} = {name}", f"{share:.3f}")
        for name, share in zip(description.values, description.pooled, strict=True)
    ]
    rows += [
        (f"a = {n}", f"{share:.3f}") for n, share in zip(description.groups, description.pooled_groups, strict=True)
    ]
    if plot is not None:
        draw(description, plot)
    return rows
