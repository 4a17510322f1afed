"""The command line, and whoever starts the contestants: each in a process of its own, one after the other, in turns."""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

from experiments.benchmarks.cases import CASES, CLIENTS, gap
from experiments.benchmarks.measuring import KEEP_MEMORY, ROOT, check_system, spread, start
from experiments.benchmarks.systems import drawing
from experiments.benchmarks.systems.contest import BESIDE, SYSTEMS
from experiments.benchmarks.systems.native import choices

TOLERANCE = 1e-4
PFL = ROOT / "build" / "benchmarks" / "pfl"
TORCH = torch.__version__.partition("+")[0]  # the same there as here
Run = dict[str, Any]


def pfl() -> Path:
    """The programs of an environment in which pfl is installed; it is made at first need."""
    wanted = [f"torch=={TORCH}", "pfl==0.6.0"]
    ready = PFL / "ready"
    if not ready.exists() or ready.read_text().split() != wanted:
        print(f"making {PFL.relative_to(ROOT)}, with {' and '.join(wanted)}", flush=True)
        try:
            subprocess.run([sys.executable, "-m", "venv", "--clear", PFL], check=True)
            subprocess.run([PFL / "bin" / "pip", "install", "-qq", *wanted], check=True)
        except subprocess.CalledProcessError as error:
            sys.exit(f"pfl cannot be installed, name the other systems with --systems: {error}")
        ready.write_text(" ".join(wanted))
    return PFL / "bin"


def run(system: str, name: str, folder: Path, work: dict[str, Any]) -> Run:
    """What one run of a contestant measured."""
    folder.mkdir()
    torch.save(work, folder / "work.pt")
    python = str(pfl() / "python") if system.startswith("pfl") else sys.executable
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"] if system == "pfl2" else []
    start([python, *several, "-m", f"{BESIDE}.contest", system, name, str(folder)], folder, **KEEP_MEMORY)
    found: Run = torch.load(folder / "found.pt")
    return found


def contest(system: str, name: str, work: dict[str, Any], reference: Run | None) -> Run:
    """What one run measured, and how far its last model is from the plain loop's over the same cohorts."""
    with tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True) as temporary:
        folder = Path(temporary)
        found = run(system, name, folder / "mine", work)
        if SYSTEMS[system].draws:  # the plain loop over whomever it has drawn
            reference = run("plain", name, folder / "check", work | {"cohorts": found["cohorts"], "rounded": True})
    found["gap"] = gap(found["model"], (reference or found)["model"])
    return found


def void(name: str, found: Run) -> str:
    """Why a run does not count; "" where it does."""
    asked = [CASES[name].cohort] * CASES[name].rounds
    if found["replies"] != asked:
        return f"{sum(found['replies'])} of {sum(asked)} replies"
    return "" if found["gap"] <= TOLERANCE else f"its model differs from the plain loop's by {found['gap']:.0g}"


def compare(name: str, systems: Iterable[str], repeat: int) -> tuple[dict[str, list[Run]], bool]:
    """The runs of each system, and whether all of them count."""
    case, work = CASES[name], choices(CASES[name])
    runs: dict[str, list[Run]] = {"plain": []}
    runs |= {system: [] for system in systems if system not in case.without}
    print(f"{name}: {case.title}, {case.cohort} of {CLIENTS:,} clients, {case.rounds - case.warm_up} rounds x {repeat}")
    reasons: dict[str, str] = {}
    for _ in range(repeat):
        reference = None
        for system, taken in runs.items():
            taken.append(contest(system, name, work, reference))
            reference = reference or taken[-1]  # the plain loop is the first
            if why := void(name, taken[-1]):
                reasons[system] = f"void: {why}"
    for system, taken in runs.items():
        print(f"    {SYSTEMS[system].title:<29} {reasons.get(system) or told(taken, runs['plain'])}", flush=True)
    return runs, not reasons


def told(taken: Sequence[Run], plain: Sequence[Run]) -> str:
    """One line on a system."""
    middle = {key: statistics.median(run[key] for run in taken) for key in drawing.FIGURES}
    ratio = spread([run["cpu"] / base["cpu"] for run, base in zip(taken, plain, strict=True)])
    memory = " / ".join(f"{middle[key]:.0f}" for key in drawing.MEMORY)
    return (
        f"{ratio:<24} x CPU; a round {1e3 * middle['cpu']:8.1f} ms CPU, {1e3 * middle['wall']:8.1f} ms wall; "
        f"start-up {middle['start_up']:5.1f} s; {memory} MB; model within {max(run['gap'] for run in taken):.0g}"
    )


def known(parser: argparse.ArgumentParser, kind: str, asked: list[str], there: Iterable[str]) -> list[str]:
    """What was asked for, or all; ends this process where there is no such thing."""
    if unknown := [name for name in asked if name not in there]:
        parser.error(f"no {kind} {', '.join(unknown)}: there are {', '.join(there)}")
    return asked or list(there)


def main() -> None:
    """`python -m experiments.benchmarks.systems [CASE ...] [--systems SYSTEM ...] [--repeat N] [--write]`."""
    parser = argparse.ArgumentParser(prog="python -m experiments.benchmarks.systems", description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; all, if none is named")
    parser.add_argument("--systems", nargs="+", default=[], metavar="SYSTEM", help=f"of {', '.join(SYSTEMS)}")
    parser.add_argument("--repeat", type=int, default=5, help="how often each contestant runs")
    parser.add_argument("--write", action="store_true", help="writes the figures down, and the tables and the plot")
    asked = parser.parse_args()
    cases, systems = known(parser, "case", asked.cases, CASES), known(parser, "system", asked.systems, SYSTEMS)
    if asked.repeat < 1:
        parser.error(f"--repeat must be at least 1, got {asked.repeat}")
    check_system()
    if any(name.startswith("pfl") for name in systems):
        pfl()  # now, and not between two measurements
    valid = True
    for name in cases:
        runs, counts = compare(name, systems, asked.repeat)
        valid = valid and counts
        if counts and asked.write:
            figures = {
                system: [{key: run[key] for key in (*drawing.FIGURES, "gap")} for run in taken]
                for system, taken in runs.items()
            }
            drawing.keep(name, {"date": str(date.today()), "cores": os.cpu_count(), "torch": TORCH, "runs": figures})
    if asked.write:
        drawing.draw()
    if not valid:
        sys.exit("void: there are models that differ, or clients that did not answer")


if __name__ == "__main__":
    main()
