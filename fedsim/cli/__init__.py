"""The command line: run, launch, resume, report, certify, compare, list, data, doctor.

Exit codes: 0 done, 1 the run failed, 2 bad input, 130 interrupted.
"""

import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import typer

from fedsim import config, doctor
from fedsim.cli.certifying import certify
from fedsim.cli.datasets import data
from fedsim.cli.endings import ending, out, print_rows, reading
from fedsim.cli.launching import launch
from fedsim.cli.options import Changes, FullTrace, Root, Seeds, TrackerName
from fedsim.config import ConfigError
from fedsim.flower import Outcome
from fedsim.job import Result
from fedsim.launch import resume as resume_run
from fedsim.launch import run_app
from fedsim.launch import sweep as run_experiments
from fedsim.progress import display
from fedsim.ranking import beside, foremost
from fedsim.report import compare as compare_runs
from fedsim.report import write_report
from fedsim.report.comparison import as_table
from fedsim.report.formats import several
from fedsim.runs import Run

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)
app.add_typer(data, name="data")


@app.callback(invoke_without_command=True)
def fedsim(
    shown: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
) -> None:
    """Simulates federated learning."""
    if shown:
        out.print(f"fedsim {version('fedsim')}")
        raise typer.Exit


@app.command()
def run(
    experiment: Annotated[str | None, typer.Argument(help="A TOML file, or the name of a bundled experiment.")] = None,
    changes: Changes = None,
    seeds: Seeds = None,
    root: Root = Path("runs"),
    tracker: TrackerName = None,
    flower_app: Annotated[
        Path | None, typer.Option("--flower-app", help="Run the Flower app in this folder instead of an experiment.")
    ] = None,
    num_nodes: Annotated[
        int | None, typer.Option("--num-nodes", min=1, help="How many nodes the Flower app has; 10 if nothing says so.")
    ] = None,
    full: FullTrace = False,
) -> None:
    """Run an experiment, write its report, and say where it is. Or run somebody's Flower app."""
    with ending(full):
        if flower_app is not None:
            if experiment is not None or tracker is not None:
                raise ConfigError("--flower-app runs an app, no experiment: it takes --set, --seeds and --num-nodes")
            for number in seeds or [0]:
                _app_closing(run_app(flower_app, changes=changes or [], num_nodes=num_nodes, seed=number))
            return
        if experiment is None:
            raise ConfigError("name an experiment (`fedsim list` shows those that are here), or --flower-app FOLDER")
        if num_nodes is not None:
            raise ConfigError("--num-nodes is for --flower-app; how many clients there are, an experiment says")
        results = []
        for result in run_experiments(
            experiment, seeds=seeds or (), changes=changes or (), root=root, tracker=tracker, display=display
        ):
            results.append(result)
            _closing(result)
        if len(results) > 1:
            folder = results[0].path.parent / "comparison"
            _print_comparison([result.path for result in results], folder)
            out.print(f"comparison  {folder}")


app.command()(launch)


@app.command()
def resume(
    path: Annotated[Path, typer.Argument(help="A run's directory.")],
    rounds: Annotated[int | None, typer.Option(help="Let it run for this many rounds in all.", min=1)] = None,
    tracker: TrackerName = None,
    full: FullTrace = False,
) -> None:
    """Go on with a run from its last checkpoint."""
    with ending(full):
        with reading():
            Run.open(path)
        _closing(resume_run(path, rounds=rounds, tracker=tracker, display=display))


@app.command()
def report(path: Annotated[Path, typer.Argument(help="A run's directory.")]) -> None:
    """Write a run's report again: index.html, summary.md and plots."""
    with ending(), reading():
        out.print(str(write_report(path)))


app.command()(certify)


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Directories of runs; those that differ in seed are one row.")],
    folder: Annotated[Path | None, typer.Option("--out", help="Folder for comparison.md and the plots.")] = None,
    against: Annotated[
        list[str] | None, typer.Option("--against", help="A measure to draw the accuracy against.")
    ] = None,
) -> None:
    """Set runs side by side, with means and spreads over seeds."""
    with ending(), reading():
        _print_comparison(runs, folder, against or [])


@app.command("list")
def list_() -> None:
    """The bundled experiments, and the plug-ins that have a short name."""
    rows = [("experiments", "", ""), *(("", name, "") for name in config.bundled())]
    for part, (group, _) in config.PARTS.items():
        known = config.names(group)
        rows += [(part, "", "")] if known else []
        rows += [("", name, target) for name, target in known.items()]
    print_rows(("", "", ""), rows)


@app.command("doctor")
def doctor_(
    experiment: Annotated[str | None, typer.Argument(help="An experiment, to say what would run where.")] = None,
    changes: Changes = None,
) -> None:
    """Versions, devices, memory, and what would run where."""
    with ending():
        told = doctor.machine() + (doctor.outlook(experiment, changes or []) if experiment else [])
        print_rows(("", ""), told)


def _closing(result: Result) -> None:
    ranked = foremost({name for line in result.metrics for name in line})
    shown = [name for name in ("test/accuracy", "clients/accuracy", *ranked) if _has(result, name)]
    words = [f"{name} {result.last(name):.4f}" for name in shown]
    ended = ", converged" if result.metrics and "converged" in result.metrics[-1] else ""
    out.print(f"{'  '.join(words) or 'done'}  after {several(len(result.metrics), 'round')}{ended}")
    if popular := [f"{name} {result.last(beside(name)):.4f}" for name in ranked if _has(result, beside(name))]:
        out.print(f"MostPop {'  '.join(popular)}")
    out.print(f"run     {result.path}")
    out.print(f"report  {result.path / 'report' / 'index.html'}")


def _app_closing(outcome: Outcome) -> None:
    """The last metrics of each kind, and what failed."""
    kinds = {"train": "train_metrics_clientapp", "evaluate": "evaluate_metrics_clientapp"}
    for kind, name in (kinds | {"server": "evaluate_metrics_serverapp"}).items():
        rounds = getattr(outcome.result, name, {})
        if rounds:
            words = [
                f"{key} {value:.4f}" for key, value in rounds[max(rounds)].items() if isinstance(value, float | int)
            ]
            out.print(f"{kind:<9}round {max(rounds)}  {'  '.join(words)}")
    if outcome.result is None:
        out.print("done; the app has a loop of its own, so its metrics are where it puts them")
    if outcome.failed:
        last = outcome.failed[-1]
        where = f"{last.message_type} of partition {last.partition} in round {last.round}"
        out.print(f"failed   {several(len(outcome.failed), 'message')}; the last, {where}: {last.error}")


def _has(result: Result, name: str) -> bool:
    return any(name in line for line in result.metrics)


def _print_comparison(runs: list[Path], folder: Path | None, against: Sequence[str] = ()) -> None:
    found = compare_runs(runs, folder, against)
    table = as_table(found)
    print_rows(table.header, table.rows)
    if table.note:
        out.print(table.note)


def _spread_out(arguments: Sequence[str]) -> list[str]:
    """`--seeds 0 1 2`, `--seeds 0,1,2` and `--seeds=0 1 2` as `--seeds 0 --seeds 1 --seeds 2`.

    That is what the parser understands; what is no seed is left to it.
    """
    spread: list[str] = []
    for argument in arguments:
        if argument.startswith("--seeds="):
            spread.append("--seeds")
            argument = argument.removeprefix("--seeds=")
        seeds = [part for part in argument.split(",") if part]
        if not seeds or not all(part.isdigit() for part in seeds) or "--seeds" not in spread[-2:]:
            spread.append(argument)
            continue
        if spread[-1] == "--seeds":
            spread.pop()
        spread += [word for seed in seeds for word in ("--seeds", seed)]
    return spread


def main() -> None:
    """The command `fedsim`."""
    app(args=_spread_out(sys.argv[1:]), prog_name="fedsim")
