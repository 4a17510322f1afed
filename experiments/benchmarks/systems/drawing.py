"""The figures that were measured, as tables in the README and as a plot.

`python -m experiments.benchmarks.systems.drawing` makes them anew of what `systems.json` holds.
"""

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from experiments.benchmarks.cases import CASES
from experiments.benchmarks.measuring import spread
from experiments.benchmarks.systems.contest import SYSTEMS

FOLDER = Path(__file__).parents[1]
FILE, PLOT, README = FOLDER / "systems.json", FOLDER / "systems.svg", FOLDER / "README.md"
BEGIN, END = "<!-- tables: systems/drawing.py -->\n", "<!-- end of tables -->\n"
MEMORY = ("driver", "worker", "all")
FIGURES = ("cpu", "wall", "start_up", *MEMORY)
PAIRS = {  # what is divided by what
    "fedsim / pfl": ("auto", "pfl", "cpu"),
    "Flower's simulation / fedsim": ("flower", "auto", "cpu"),
    "Flower's simulation / Flower app on fedsim": ("flower", "grid", "cpu"),
    "wall time, Ray, 2 workers / 1 worker": ("ray2", "ray1", "wall"),
}
Runs = Mapping[str, Sequence[Mapping[str, float]]]  # by system, one a repetition


def kept() -> dict[str, Any]:
    """What was measured, by case."""
    found: dict[str, Any] = json.loads(FILE.read_text()) if FILE.exists() else {}
    return {name: found[name] for name in CASES if name in found}


def keep(name: str, measured: Mapping[str, Any]) -> None:
    """Writes a case down, in place of what was measured before."""
    FILE.write_text(json.dumps(kept() | {name: measured}, indent=1) + "\n")


def ratios(runs: Runs, above: str, below: str, figure: str = "cpu") -> list[float]:
    """One system's figures as multiples of another's, those of the same repetition."""
    return [mine[figure] / base[figure] for mine, base in zip(runs[above], runs[below], strict=True)]


def matrix(cases: Mapping[str, Any], columns: Mapping[str, str], cell: Callable[[Runs, str], str]) -> str:
    """A table with a row a case and a column a system, or something else that there is of a case."""
    lines = [f"| case | {' | '.join(columns.values())} |", f"|{'---|' * (len(columns) + 1)}"]
    for name, measured in cases.items():
        cells = [cell(measured["runs"], column) for column in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def tables(cases: Mapping[str, Any]) -> str:
    """All tables."""
    titles = {name: system.title for name, system in SYSTEMS.items()}
    others = {name: title for name, title in titles.items() if name != "plain"}

    def multiple(runs: Runs, system: str) -> str:
        return spread(ratios(runs, system, "plain")) if system in runs else "-"

    def pair(runs: Runs, name: str) -> str:
        above, below, figure = PAIRS[name]
        return spread(ratios(runs, above, below, figure)) if above in runs and below in runs else "-"

    def middle(figure: str, form: str) -> Callable[[Runs, str], str]:
        scale = 1_000 if figure in ("cpu", "wall") else 1

        def cell(runs: Runs, system: str) -> str:
            return f"{scale * statistics.median(run[figure] for run in runs[system]):{form}}" if system in runs else "-"

        return cell

    def memory(runs: Runs, system: str) -> str:
        return " / ".join(middle(figure, ".0f")(runs, system) for figure in MEMORY) if system in runs else "-"

    rounds = "; ".join(f"{name}: {CASES[name].rounds - CASES[name].warm_up}" for name in cases)
    told = sorted(
        {
            f"{len(case['runs']['plain'])} repetitions, {case['date']}, {case['cores']} cores, torch {case['torch']}"
            for case in cases.values()
        }
    )
    parts = [
        f"{'; '.join(told)}. Rounds a repetition, without those that warm up: {rounds}.\n",
        "CPU time of all processes a round, as a multiple of the plain loop's; median, least and largest:\n",
        matrix(cases, others, multiple),
        "The same between two systems:\n",
        matrix(cases, {name: name for name in PAIRS}, pair),
        "Wall time of a round, ms, median:\n",
        matrix(cases, titles, middle("wall", ".1f")),
        "Start-up, from the process's start to the end of the first round, s, median:\n",
        matrix(cases, titles, middle("start_up", ".1f")),
        "Memory, MB: the driver's peak / the largest other process's peak / all processes at the end, pages that they "
        "share counted once; medians:\n",
        matrix(cases, titles, memory),
    ]
    return "\n".join(parts)


def plot(cases: Mapping[str, Any]) -> None:
    """CPU time as multiples of the plain loop's, by case; where nothing is learnt, that loop is hardly anything."""
    cases = {name: case for name, case in cases.items() if CASES[name].learns}
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    axes = figure.subplots()
    systems = [name for name in SYSTEMS if name != "plain" and any(name in case["runs"] for case in cases.values())]
    width = 0.8 / max(1, len(systems))
    for place, system in enumerate(systems):
        there = [
            (row, ratios(case["runs"], system, "plain"))
            for row, case in enumerate(cases.values())
            if system in case["runs"]
        ]
        at = [row + (place - (len(systems) - 1) / 2) * width for row, _ in there]
        middles = [statistics.median(values) for _, values in there]
        low = [middle - min(values) for middle, (_, values) in zip(middles, there, strict=True)]
        high = [max(values) - middle for middle, (_, values) in zip(middles, there, strict=True)]
        error = {"elinewidth": 0.8, "capsize": 1.5}
        bottom = [middle - 1 for middle in middles]  # bars begin at 1: shorter than the plain loop hangs down
        axes.bar(at, bottom, width, bottom=1, yerr=(low, high), label=SYSTEMS[system].title, error_kw=error)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_yscale("log")
    axes.set_yticks(ticks := [0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20], [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_ylim(0.03, 30)
    axes.set_xticks(range(len(cases)), list(cases))
    axes.set_ylabel("CPU time / plain loop's")
    figure.legend(loc="outside upper center", fontsize="small", ncols=4)
    figure.savefig(PLOT, metadata={"Date": None})


def draw() -> None:
    """Puts the tables into the README, and makes the plot."""
    cases = kept()
    before, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    README.write_text(f"{before}{BEGIN}\n{tables(cases)}\n{END}{after}", encoding="utf-8")
    plot(cases)


if __name__ == "__main__":
    draw()
