"""Options that several commands have."""

from pathlib import Path
from typing import Annotated

import typer

Changes = Annotated[list[str] | None, typer.Option("--set", help="Change a key, like strategy.lr=0.1.")]
Seeds = Annotated[list[int] | None, typer.Option("--seeds", help="One run for each of these seeds: 0 1 2, or 0,1,2.")]
Root = Annotated[Path, typer.Option("--out", help="Folder under which the run's directory is made.")]
TrackerName = Annotated[str | None, typer.Option("--tracker", help="tensorboard, wandb or mlflow.")]
FullTrace = Annotated[bool, typer.Option("--traceback", help="Show where an error came from.")]
