"""How sharp the solutions of FedRecGEL's runs are, and how much their item embeddings still change.

`python -m experiments.fedrecgel.landscape runs/fedrecgel-latent-factors` measures every run in these folders at its
last checkpoint, and prints a row for each configuration: mean and sample standard deviation over its seeds. Runs
without a checkpoint and those of other methods are left out, which stderr tells.

The loss is the mean over all users of their mean losses on the items that they were trained on and four negatives for
each, the same for all theta and all runs; every user has the embedding that it keeps. All is computed in float64.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import torch
from torch import Tensor

from clients.fedrecgel import DualSam
from clients.fedrecgel_loss import user_losses
from clients.ncf import ITEM
from fedsim import tree
from fedsim.config import assemble, read
from fedsim.engines.local import auto
from fedsim.report.reading import find_runs, read_run
from fedsim.report.rows import grouped, separating, settings
from fedsim.runs import Run, read_checkpoint
from fedsim.sharpness import Surface, ascent, scattered
from fedsim.simulation import begin
from fedsim.stability import mean_cosine, neighbour_overlap, relative_change
from fedsim.task import Cohort, Params
from fedsim.tree import Tree

RADII = (0.02, 0.05, 0.1, 0.5)
STEPS = (0.1, 0.25, 0.5)
DIRECTIONS = 10
NEIGHBOURS = 10
SEED = 0  # of negatives and directions; not the run's, so that all runs are measured by the same


def landscape(path: Path, radii: Sequence[float] = RADII, steps: Sequence[float] = STEPS) -> dict[str, float]:
    """All numbers of one run, by the names of their columns."""
    surface, shared = solution(path)
    slope, random = surface.gradient(shared), scattered(surface, shared, steps, DIRECTIONS, SEED)
    found = {"loss": surface.loss(shared), "gradient": float(tree.norm(slope))}
    found |= {f"rho {rho:g}": float(rise) for rho, rise in zip(radii, ascent(surface, shared, radii), strict=True)}
    for place, step in enumerate(steps):
        found[f"t {step:g}"] = float(random.mean[place])
        found[f"t {step:g}, sd over d"] = float(random.deviation[place])
    return found | stability(path) | {"HR@10": last_metric(path, "clients/hr_10")}


def solution(path: Path) -> tuple[Surface, Tree]:
    """The loss of a run's users with what they keep, and what they were sent, at the run's last checkpoint."""
    experiment, folder = read(path / "experiment.toml")
    parts = assemble(experiment, folder)
    parts.engine.close()
    train = parts.clients["train"]
    if not isinstance(train, DualSam):
        raise ValueError(f"{path}: clients.train is a {type(train).__name__}, must be a DualSam: FedRecGEL's")
    users = np.flatnonzero(parts.federation.sizes("train")).tolist()
    start = begin(parts.strategy, parts.model.params, parts.clients, parts.federation.num_clients, experiment.seed)
    snapshot = Run.open(path).load(checkpoints(path)[-1], start)
    own = tree.map(torch.Tensor.double, {"own": snapshot.personal.gather(users)["own"]})
    engine = auto(parts.federation, user_losses(train.model, train.negatives), SEED)
    return Surface(engine, Cohort(users, own)), tree.map(torch.Tensor.double, parts.strategy.shared(snapshot.state))


def checkpoints(path: Path) -> list[Path]:
    found = Run.open(path).checkpoints()
    if not found:
        raise FileNotFoundError(f"{path} has no checkpoint: there is nothing to measure yet")
    return found


def stability(path: Path) -> dict[str, float]:
    """How much the items' embeddings changed between the last two checkpoints; {} where there is only one."""
    last = checkpoints(path)[-2:]
    if len(last) < 2:
        return {}
    (before, start), (after, end) = map(items, last)
    return {
        "rounds": end - start,
        "change": relative_change(before, after),
        "cosine": mean_cosine(before, after),
        f"{NEIGHBOURS} nearest": neighbour_overlap(before, after, NEIGHBOURS),
    }


def items(checkpoint: Path) -> tuple[Tensor, int]:
    """All that is known of each item, side by side, (I, D), and the round."""
    flat, round = read_checkpoint(checkpoint)
    tables: Params = {name: leaf for name, leaf in flat.items() if name.startswith(f"state/params/{ITEM}")}
    return torch.cat(list(tables.values()), 1), round


def last_metric(path: Path, name: str) -> float:
    return next((line[name] for line in reversed(Run.open(path).metrics()) if name in line), math.nan)


def configurations(folders: Sequence[Path]) -> Iterator[tuple[str, list[Path]]]:
    """The runs that differ in their seed only, under what tells them from others."""
    paths = {found.resolve(): found for folder in folders for found in find_runs(folder)}
    groups, _ = grouped([read_run(path) for path in paths.values()])
    names, asked = [group[0].name for group in groups], [settings(group[0]) for group in groups]
    telling = sorted(separating(names, asked, sorted(set().union(*asked))))
    for name, keys, group in zip(names, asked, groups, strict=True):
        told = (f"{key.rpartition('.')[2]} {keys[key]}" for key in telling if key in keys)
        yield ", ".join([name, *told]), [record.path for record in group]


def measurable(paths: Sequence[Path], radii: Sequence[float], steps: Sequence[float]) -> dict[str, dict[str, float]]:
    """The numbers of each run; those that failed early, or are of another method, are left out, which stderr tells."""
    found = {}
    for path in paths:
        try:
            found[str(path)] = landscape(path, radii, steps)
        except (FileNotFoundError, ValueError) as error:
            print(f"left out: {error if str(path) in str(error) else f'{path}: {error}'}", file=sys.stderr)
    return found


def as_table(found: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """Mean and sample standard deviation over seeds, in Markdown."""
    columns = list(dict.fromkeys(column for rows in found.values() for row in rows for column in row))
    lines = [f"| | runs | {' | '.join(columns)} |", "|---|" + "---:|" * (1 + len(columns))]
    for name, rows in found.items():
        cells = [cell([row[column] for row in rows if column in row]) for column in columns]
        lines.append(f"| {name} | {len(rows)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def cell(values: Sequence[float]) -> str:
    if not values:
        return "-"
    return f"{mean(values):.4g}" + (f" ± {stdev(values):.2g}" if len(values) > 1 else "")


def main() -> None:
    """Measures all runs, prints the table, and writes all numbers down if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", help="directories of runs, or folders of them")
    parser.add_argument("--radii", type=float, nargs="+", default=RADII)
    parser.add_argument("--steps", type=float, nargs="+", default=STEPS)
    parser.add_argument("--out", type=Path, help="a JSON file for the numbers of each run")
    asked = parser.parse_args()
    each = {name: measurable(paths, asked.radii, asked.steps) for name, paths in configurations(asked.runs)}
    found = {name: rows for name, rows in each.items() if rows}
    if not found:
        sys.exit("none of the runs can be measured")
    if asked.out is not None:
        asked.out.write_text(json.dumps(found, indent=1))
    print(as_table({name: list(rows.values()) for name, rows in found.items()}))


if __name__ == "__main__":
    main()
