"""`fedsim launch`: an experiment in containers."""

from pathlib import Path
from typing import Annotated

import typer

from fedsim.cli.endings import ending, errors, out
from fedsim.cli.options import Changes, FullTrace, Root, Seeds
from fedsim.containers import Launched, Order
from fedsim.containers import launch as launch_run
from fedsim.containers.docker import DockerError
from fedsim.containers.project import Screen
from fedsim.progress import Steps


def launch(
    where: Annotated[str, typer.Argument(help="ray (a Ray cluster) or flower (a SuperLink and SuperNodes).")],
    experiment: Annotated[str, typer.Argument(help="A TOML file, or the name of a bundled experiment.")],
    workers: Annotated[
        int | None, typer.Option(min=1, help="How many containers work: 2 of Ray's if not said, 3 nodes of Flower's.")
    ] = None,
    changes: Changes = None,
    seeds: Seeds = None,
    root: Root = Path("runs"),
    image: Annotated[str, typer.Option(envvar="FEDSIM_IMAGE", help="The image of fedsim.")] = "fedsim",
    full: FullTrace = False,
) -> None:
    """Run an experiment in containers, on a Ray cluster (ray) or on Flower's nodes (flower), and bring the run back.

    What `fedsim run` refuses is refused here, too, before anything starts, and so is what Docker lacks. Nothing but the
    image stays in Docker. Ctrl-C ends the run, and brings back what there is of it; after that, `fedsim resume` goes on
    with a run that was on Ray.
    """
    with ending(full):
        screen = Screen(out.width, out.height) if out.is_terminal else None
        order = Order(where, experiment, changes or (), seeds or (), workers, image, root, screen)
        try:
            with Steps(errors) as steps:
                found = launch_run(order, steps.say)
        except DockerError as error:
            errors.print(f"The run failed: {error}")
            raise typer.Exit(1) from None
        _closing(found)
        if found.code:
            raise typer.Exit(found.code)


def _closing(found: Launched) -> None:
    if found.code == 130 and not found.runs:
        errors.print("Interrupted before there was anything to bring back.")
    for line in found.told:
        errors.print(f"{'The run failed' if found.code else 'Warning'}: {line}")
    for path in found.runs:
        if not found.code:
            out.print(f"here    {path}")
            continue
        further = f"; `fedsim resume {path}` goes on with it." if found.whole else "."
        errors.print(f"The run is here, in {path}{further}")
