"""Active forgetting and what it is compared with, on Fashion-MNIST or digits, each with its certificate.

`python -m experiments.forget.table` trains a model, trains it anew without what is to be forgotten, lets each method
forget, measures all of it, and prints the mean over seeds and classes. What is there already in the folder is not run
again, so that it can be broken off, and several can share the work.

A class is forgotten; with `--backdoor` it is the stamped copies said to be of that class.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

import fedsim
from fedsim.certificate import Certificate, certify, read_certificate

SGD = '{ use = "sgd", lr = 0.1, epochs = 1, batch_size = 32 }'
ALONE = ("strategy.alone=true", "strategy.until=0.0", "strategy.forgetting=20", "rounds=20")


class Method(NamedTuple):
    """How something is forgotten: changes to the experiment, and whether it begins with a model that is there."""

    changes: Sequence[str]
    experiment: str = ""  # a suffix of its name, where it has one of its own
    begins: bool = True


METHODS: Mapping[str, Method] = {
    "active forgetting": Method(()),
    "active forgetting, mix": Method(('clients.forget.memory="mix"', 'strategy.remember="model"')),
    "random labels": Method(('clients.forget.memory="random"',)),
    "uniform labels": Method(('clients.forget.memory="uniform"',)),
    "fine-tuning": Method((f'clients.forget={{ use = "retained", client = {SGD} }}',)),
    "active forgetting, alone": Method(('clients.forget={ use = "forget_alone", lr = 0.05, batch_size = 32 }', *ALONE)),
    "gradient ascent": Method(
        ('clients.forget={ use = "forget_alone", memory = "ascent", lr = 0.02, batch_size = 32 }', *ALONE)
    ),
    "pruning": Method(("strategy.repairing=4",), "-pruning"),
    "FedEraser": Method(("strategy.repairing=0",), "-federaser", begins=False),
}
TRAINING = {"fashion-mnist": 25, "digits": 40}  # rounds, of the first model and the retrained one
MEASURES = {
    "target": lambda found: found.models["after"].get("target_accuracy", np.nan),
    "rest": lambda found: found.models["after"]["retained_accuracy"],
    "gap": lambda found: found.models["retrained"]["retained_accuracy"] - found.models["after"]["retained_accuracy"],
    "target after 2": lambda found: found.models["relapsed"].get("target_accuracy", np.nan),
    "backdoor": lambda found: found.models["after"].get("attack_success", np.nan),
    "backdoor after 2": lambda found: found.models["relapsed"].get("attack_success", np.nan),
    "AUC, loss": lambda found: found.models["after"]["membership_loss"] - found.models["retrained"]["membership_loss"],
    "AUC, ratio": lambda found: (
        found.models["after"].get("membership_ratio", np.nan)
        - found.models["retrained"].get("membership_ratio", np.nan)
    ),
    "distance": lambda found: found.models["after"]["distance"],
    "client epochs": lambda found: (
        found.costs["forgetting"]["client_epochs"] / found.costs["retraining"]["client_epochs"]
    ),
    "bytes": lambda found: found.costs["forgetting"]["bytes"] / found.costs["retraining"]["bytes"],
    "seconds": lambda found: found.costs["forgetting"]["seconds"] / found.costs["retraining"]["seconds"],
}


class Case(NamedTuple):
    """A seed and a class, and where its runs lie."""

    seed: int
    label: int
    backdoor: bool
    root: Path
    data: str = "fashion-mnist"

    def run(self, name: str, changes: Sequence[str], experiment: str = "") -> Path:
        """The directory of a run, which is run if it is not there."""
        name = name.replace(",", "").replace(" ", "-")
        there = [path.parents[1] for path in (self.root / name).glob(f"*-{self.seed}/report/index.html")]
        if there:
            return max(there)
        about = (
            f'use = "backdoored", label = {self.label}'
            if self.backdoor
            else (f'use = "marked", requests = [{{ class = {self.label} }}]')
        )
        asked = (f"seed={self.seed}", f"name={name}", f"split={{ {about} }}", *changes)
        return fedsim.run(f"forget/{self.data}{experiment}", changes=asked, root=self.root).path

    def certificate(self, method: str, shadows: int) -> Certificate:
        """What a method has forgotten here."""
        only = ("strategy.forgetting=0", f"rounds={TRAINING[self.data]}")
        if self.backdoor:
            first = self.run(f"poisoned-{self.label}", only)
            without = self.run("clean-6", (*only, "split.poisoned=false"))
        else:
            first = self.run("original", only)
            without = self.run(f"retrain-{self.label}", (*only, "split.leave_out=1"))
        how = METHODS[method]
        begin = ("strategy.training=0", f"strategy.from_run={first}", "rounds=5") if how.begins else ()
        kind = "backdoor" if self.backdoor else "class"
        gone = self.run(f"{method}-{kind}-{self.label}", (*begin, *how.changes), how.experiment)
        known = read_certificate(gone)
        if known is not None and known.shadows == shadows and Path(known.against).name == without.name:
            return known
        return certify(gone, without, shadows=shadows)


def row(name: str, found: Sequence[Certificate]) -> str:
    """A line of the table."""
    cells = []
    for value in MEASURES.values():
        values = np.array([value(one) for one in found])
        cells.append("" if np.isnan(values).all() else f"{values.mean():.3f} ± {values.std():.3f}")
    passed = sum(all(check.holds for check in one.checks) for one in found)
    return f"| {name} | {' | '.join(cells)} | {passed} of {len(found)} |"


def main() -> None:
    """Runs what is not there, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", choices=list(TRAINING), default="fashion-mnist")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--classes", type=int, nargs="+", default=[6, 8])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--backdoor", action="store_true")
    parser.add_argument("--shadows", type=int, default=8)
    parser.add_argument("--out", type=Path, help="A folder for each data set; runs/forget-<data> if not said.")
    asked = parser.parse_args()
    asked.out = asked.out or Path(f"runs/forget-{asked.data}")
    print(f"| method | {' | '.join(MEASURES)} | as if retrained |")
    print(f"| --- |{' ---: |' * (len(MEASURES) + 1)}")
    for method in asked.methods:
        cases = [
            Case(seed, label, asked.backdoor, asked.out, asked.data) for seed in asked.seeds for label in asked.classes
        ]
        print(row(method, [case.certificate(method, asked.shadows) for case in cases]), flush=True)


if __name__ == "__main__":
    main()
