"""Accuracy and gaps of FedAvg, FairFed and FedFACT on real data, over seeds: `python -m experiments.fedfact.tables`.

Each case is a data set and the way it is divided. FedFACT after training starts from the very models that are FedAvg's
row. Demographic parity, tolerance 0.01 in each scope that is on; gaps are those between groups on the clients' test
parts: over all clients, and at the client where it is largest.
"""

import argparse
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import fedsim
from fedsim.config import read

CORRELATION = {"use": "fedsim.data.partition:correlation", "clients": 5, "min_size": 20}
CASES: dict[str, tuple[str, dict[str, Any]]] = {  # name -> which experiments, and another partition
    "Adult, Dirichlet 0.5": ("adult", {}),
    "Adult, correlation": ("adult", CORRELATION),
    "COMPAS, Dirichlet 0.5": ("compas", {}),
    "COMPAS, correlation": ("compas", CORRELATION | {"clients": 2}),
    "Drug consumption, Dirichlet 1": ("drugs", {}),
}
SCOPES = {"global": ("global",), "local": ("local",), "both": ("global", "local")}
MEASURES = ("clients/accuracy", "clients/demographic_parity_gap", "clients/local_demographic_parity_gap")
Numbers = tuple[float, ...]  # accuracy, global gap, largest local gap


def tables(name: str, partition: Mapping[str, Any], seed: int, **changes: Any) -> dict[str, Any]:
    """A bundled experiment with this seed, divided in this way."""
    found = read(name, [f"seed={seed}"])[0].model_dump(exclude_none=True)
    return found | ({"partition": dict(partition)} if partition else {}) | changes


def restricted(experiment: dict[str, Any], local: str, scopes: Sequence[str]) -> dict[str, Any]:
    """The same with constraints in these scopes only; `local` names the client that has the local ones."""
    for scope, table in (("global", experiment["strategy"]), ("local", experiment["clients"][local])):
        if scope not in scopes:
            del table[f"{scope}_tolerance"]
    return experiment


def last(result: fedsim.Result) -> Numbers:
    """What the last evaluation found."""
    return tuple(result.last(name) for name in MEASURES)


def methods(data: str, partition: Mapping[str, Any], seed: int, root: Path) -> Iterator[tuple[str, Numbers]]:
    """The row of each method, as it is done."""
    post = tables(f"fedfact/{data}-post", partition, seed, evaluate_every=1000)
    average = post | {
        "name": f"fedavg-{data}",
        "rounds": post["strategy"]["training"],
        "strategy": {"use": "strategies.fedavg:FedAvg"},
        "clients": {"train": post["clients"]["train"]},
    }
    trained = fedsim.run(average, root=root)
    yield "FedAvg", last(trained)
    fair = tables("fairfed/adult", partition or post["partition"], seed, evaluate_every=1000, data=post["data"])
    yield "FairFed", last(fedsim.run(fair, root=root))
    for scope, chosen in SCOPES.items():
        during = tables(f"fedfact/{data}", partition, seed, evaluate_every=1000)
        yield f"FedFACT in training, {scope}", last(fedsim.run(restricted(during, "train", chosen), root=root))
    for scope, chosen in SCOPES.items():
        after = tables(f"fedfact/{data}-post", partition, seed, evaluate_every=1000)
        after["strategy"] |= {"training": 0, "from_run": str(trained.path)}
        yield f"FedFACT after training, {scope}", last(fedsim.run(restricted(after, "calibrate", chosen), root=root))


def as_table(case: str, found: Mapping[str, Sequence[Numbers]]) -> str:
    """Mean and sample standard deviation over seeds, in Markdown."""
    lines = [f"| {case} | accuracy | global gap | local gap |", "|---|---|---|---|"]
    for method, rows in found.items():
        spread = [stdev(column) if len(rows) > 1 else math.nan for column in zip(*rows, strict=True)]
        cells = [f"{mean(column):.4f} ± {s:.4f}" for column, s in zip(zip(*rows, strict=True), spread, strict=True)]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Runs what is asked for, prints a table for each case, and writes all numbers down."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES), metavar="CASE")
    parser.add_argument("--out", type=Path, default=Path("runs/fedfact-tables"))
    asked = parser.parse_args()
    for case in asked.cases:
        found: dict[str, list[Numbers]] = {}
        for seed in asked.seeds:
            for method, numbers in methods(*CASES[case], seed, asked.out):
                found.setdefault(method, []).append(numbers)
        (asked.out / f"{case}.json").write_text(json.dumps(found, indent=1))
        print(as_table(case, found), end="\n\n", flush=True)


if __name__ == "__main__":
    main()
