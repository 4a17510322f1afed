"""Accuracy and gaps of FedAvg, penalties, FedFACT and WassFFed: `python -m experiments.wassffed.tables`.

Adult and COMPAS, divided by Dirichlet draws over the sensitive attribute. All methods train the same perceptron, with
the same Adam and equally many steps; FedFACT after training starts from the very model that is FedAvg's row. Measured
on the clients' test parts: accuracy, the gap of demographic parity, and EOD, the sum of the gaps of the true and of the
false positive rate.
"""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch

import fedsim
from fedsim.config import read
from fedsim.fairness import events, unfairness

DATA = ("adult", "compas")
CONCENTRATIONS = (0.1, 0.5, 5.0, 100.0)
ALPHAS = (0.6, 0.5, 0.4, 0.3)
PENALTIES = (0.3, 0.5, 0.7, 1.0, 1.5, 2.0)
Numbers = tuple[float, float, float]  # accuracy, gap of demographic parity, EOD


def tables(data: str, concentration: float, seed: int) -> dict[str, Any]:
    """The bundled experiment with this seed, divided in this way."""
    changes = [f"seed={seed}", f"partition.alpha={concentration}", "partition.min_cell=0", "evaluate_every=1000"]
    return read(f"wassffed/{data}", changes)[0].model_dump(exclude_none=True)


def last(result: fedsim.Result) -> Numbers:
    """What the last evaluation found."""
    groups = json.loads((result.path / "evaluation.json").read_text())["clients"]["groups"]
    rates = unfairness(events("equal opportunity", 2), torch.tensor(groups))  # TPR; and TNR, as far apart as FPR is
    names = ("clients/accuracy", "clients/demographic_parity_gap")
    return (*(result.last(name) for name in names), float(rates.gap.sum()))


def methods(data: str, concentration: float, seed: int, root: Path) -> Iterator[tuple[str, Numbers]]:
    """The row of each method, as it is done."""
    plain = tables(data, concentration, seed)
    warm_up, transport = plain["strategy"]["warm_up"], (plain["rounds"] - plain["strategy"]["warm_up"]) // 2
    trained = None
    for alpha in (1.0, *ALPHAS):
        fair = tables(data, concentration, seed)
        fair["strategy"]["alpha"] = alpha
        if alpha == 1:  # no round is needed to measure
            fair |= {"rounds": warm_up + transport, "name": f"fedavg-{data}"}
        found = fedsim.run(fair, root=root)
        trained = trained or found
        yield "FedAvg" if alpha == 1 else f"WassFFed, alpha {alpha:g}", last(found)
    for penalty in PENALTIES:
        table = {"use": "clients.penalty:PenalisedAdam", "penalty": penalty}
        table |= {name: plain["clients"]["train"][name] for name in ("lr", "weight_decay", "epochs", "batch_size")}
        average = plain | {
            "name": f"penalty-{data}",
            "rounds": warm_up + transport,
            "strategy": {"use": "strategies.fedavg:FedAvg", "lr": plain["strategy"].get("lr", 0.95)},
            "clients": {"train": table},
        }
        yield f"FedAvg with penalty {penalty:g}", last(fedsim.run(average, root=root))
    assert trained is not None
    after = read(f"fedfact/{data}-post", [f"seed={seed}", "evaluate_every=1000"])[0].model_dump(exclude_none=True)
    after |= {"partition": plain["partition"], "model": plain["model"]}
    after["strategy"] |= {"training": 0, "from_run": str(trained.path)}
    del after["clients"]["calibrate"]["local_tolerance"]
    yield "FedFACT after training, global", last(fedsim.run(after, root=root))


def as_table(case: str, found: Mapping[str, Sequence[Numbers]]) -> str:
    """Mean and sample standard deviation over seeds, in Markdown."""
    lines = [f"| {case} | accuracy | gap | EOD |", "|---|---:|---:|---:|"]
    for method, rows in found.items():
        columns = list(zip(*rows, strict=True))
        spreads = [f" ± {stdev(column):.3f}" if len(column) > 1 else "" for column in columns]
        cells = [f"{mean(column):.3f}{spread}" for column, spread in zip(columns, spreads, strict=True)]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def at_equal_accuracy(found: Mapping[str, Sequence[Numbers]]) -> Iterator[str]:
    """By how much WassFFed's gap and EOD are above those of a penalty that costs as much accuracy, as rows of a table.

    Seed by seed, between the two penalties (or FedAvg) next to it in accuracy; where there are none, it is left out.
    """
    penalties = [rows for method, rows in found.items() if method.startswith("FedAvg")]
    for method, rows in found.items():
        if not method.startswith("WassFFed"):
            continue
        differences = []
        for seed, (accuracy, *unfair) in enumerate(rows):
            points = np.array(sorted(row[seed] for row in penalties))  # (methods, 3)
            if points[0, 0] <= accuracy <= points[-1, 0]:
                differences.append(
                    [own - np.interp(accuracy, points[:, 0], points[:, 1 + k]) for k, own in enumerate(unfair)]
                )
        columns = list(zip(*differences, strict=True))
        spreads = [f" ± {stdev(column):.3f}" if len(column) > 1 else "" for column in columns]
        cells = [f"{mean(column):+.3f}{spread}" for column, spread in zip(columns, spreads, strict=True)] or ["-", "-"]
        yield f"| {method}, less a penalty at equal accuracy | {len(differences)} seeds | {' | '.join(cells)} |"


def main() -> None:
    """Runs what is asked for, prints a table for each case, and writes all numbers down."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--data", nargs="+", choices=DATA, default=DATA)
    parser.add_argument("--concentrations", type=float, nargs="+", default=CONCENTRATIONS)
    parser.add_argument("--out", type=Path, default=Path("runs/wassffed-tables"))
    asked = parser.parse_args()
    for data, concentration in product(asked.data, asked.concentrations):
        found: dict[str, list[Numbers]] = {}
        for seed in asked.seeds:
            for method, numbers in methods(data, concentration, seed, asked.out):
                found.setdefault(method, []).append(numbers)
        (asked.out / f"{data}-{concentration:g}.json").write_text(json.dumps(found, indent=1))
        print(
            as_table(f"{data}, Dirichlet {concentration:g}", found), *at_equal_accuracy(found), "", sep="\n", flush=True
        )


if __name__ == "__main__":
    main()
