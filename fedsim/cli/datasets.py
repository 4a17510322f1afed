"""`fedsim data`: the data sets, and how experiments divide them."""

from pathlib import Path
from typing import Annotated

import typer

from fedsim import doctor
from fedsim.cli.endings import ending, out, print_rows, reading
from fedsim.cli.options import Changes

data = typer.Typer(no_args_is_help=True, help="The data sets, and how experiments divide them.")


@data.command("list")
def data_list() -> None:
    """The data sets, and whether their files are here."""
    with ending():
        print_rows(("name", "files", "source"), doctor.data_sets())


@data.command("fetch")
def data_fetch(names: Annotated[list[str], typer.Argument(help="Names of data sets.")]) -> None:
    """Fetch data sets from their publishers into the cache."""
    with ending(), reading():
        for name in names:
            out.print(f"{name}: {doctor.fetch(name)}")


@data.command("describe")
def data_describe(
    experiment: Annotated[str, typer.Argument(help="An experiment.")],
    changes: Changes = None,
    column: Annotated[str | None, typer.Option(help="The column whose shares are shown, y if not said.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Where to draw it, a .png, .svg or .pdf file.")] = None,
) -> None:
    """How an experiment's partition came out: sizes, label and group shares by client, or interactions."""
    with ending(), reading():
        rows, drawn = doctor.partition(experiment, changes or [], column, plot)
        print_rows(("", ""), rows)
        if drawn:
            out.print(str(drawn))
