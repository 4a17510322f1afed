"""FedFACT below the best that any classifier could do, where the distribution is known.

`python -m experiments.fedfact.frontier` runs fedfact/canonical-frontier and draws its comparison with the optimum of a
linear program, for the same tolerance over all clients and at each.
"""

import argparse
from pathlib import Path

import numpy as np

import fedsim
from fedsim.data.generated import canonical_table
from fedsim.fairness import optimum
from fedsim.report import Bound, compare
from fedsim.report.comparison import as_markdown

NOTION = "demographic parity"


def main() -> None:
    """Runs every tolerance with every seed, prints the comparison, and says where the plot is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--out", type=Path, default=Path("runs"))
    asked = parser.parse_args()
    results = list(fedsim.sweep("fedfact/canonical-frontier", seeds=asked.seeds, root=asked.out))
    tolerances = np.linspace(0, 0.45, 46)
    best = [optimum(canonical_table(), NOTION, tolerance, tolerance).accuracy for tolerance in tolerances]
    folder = results[0].path.parent / "comparison"
    bound = Bound("best of any classifier", tolerances.tolist(), best)
    print(as_markdown(compare([result.path for result in results], folder, bound=bound)))
    print(folder)


if __name__ == "__main__":
    main()
