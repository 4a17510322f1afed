"""WassFFed below the best that any classifier could have, where the distribution is known.

`python -m experiments.wassffed.frontier` runs wassffed/synthetic-frontier and draws its comparison with the optimum of
a linear program for classifiers that do not see the group either.
"""

import argparse
from pathlib import Path

import numpy as np

import fedsim
from fedsim.data.generated import group_shift, group_shift_posterior
from fedsim.fairness import optimum
from fedsim.report import Bound, compare
from fedsim.report.comparison import as_markdown


def best(gaps: list[float]) -> list[float]:
    """The best accuracy within each gap of demographic parity, where x is that of the common test set."""
    x = group_shift(examples=1).test["x"].double().numpy()
    joint = group_shift_posterior(x).transpose(1, 0, 2)[None] / len(x)  # (1, G, X, K)
    smaller = joint.sum((0, 2, 3)).min()  # of two groups the deviation is one minus this times the gap
    return [optimum(joint, "demographic parity", (1 - smaller) * gap, aware=False).accuracy for gap in gaps]


def main() -> None:
    """Runs every alpha with every seed, prints the comparison, and says where the plot is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--out", type=Path, default=Path("runs"))
    asked = parser.parse_args()
    results = list(fedsim.sweep("wassffed/synthetic-frontier", seeds=asked.seeds, root=asked.out))
    gaps = np.linspace(0, 0.31, 32).tolist()
    folder = results[0].path.parent / "comparison"
    bound = Bound("best of any classifier", gaps, best(gaps))
    print(as_markdown(compare([result.path for result in results], folder, bound=bound)))
    print(folder)


if __name__ == "__main__":
    main()
