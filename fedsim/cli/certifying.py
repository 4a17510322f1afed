"""`fedsim certify`: the unlearning certificate of a run."""

from pathlib import Path
from typing import Annotated

import typer

from fedsim.certificate import certify as certify_run
from fedsim.cli.endings import ending, out, reading
from fedsim.runs import Run


def certify(
    run: Annotated[Path, typer.Argument(help="A run that forgot: its directory, or a folder of runs: the latest.")],
    against: Annotated[
        Path, typer.Option("--against", help="The run that never saw what was to be forgotten, likewise.")
    ],
    shadows: Annotated[
        int, typer.Option(min=0, help="Models that an attack on membership trains: 0, or an even number from 4 on.")
    ] = 8,
    plain_rounds: Annotated[int, typer.Option(min=0, help="Rounds of clients.repair before it is looked again.")] = 2,
) -> None:
    """Measure what a run has forgotten, against a retrained model: certificate.json, and its section in the report."""
    with ending(), reading():
        run = Run.latest(run).path
        found = certify_run(run, against, shadows=shadows, plain_rounds=plain_rounds)
        for check in found.checks:
            told = f"{check.value:.4f}, at most {check.allowed:g}"
            out.print(f"{'holds' if check.holds else 'FAILS'}  {check.name}: {told}")
        out.print(found.verdict)
        out.print(f"report  {run / 'report' / 'index.html'}")
