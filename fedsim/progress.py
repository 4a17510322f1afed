"""What the terminal shows during a run: a live bar where there is a terminal, plain lines where there is none."""

import time
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from fedsim.task import Metrics

SHOWN = ("test/accuracy", "clients/accuracy", "train/loss")  # first, where there are any


class Display(AbstractContextManager["Display"], Protocol):
    """Something that is told of every round."""

    def show(self, metrics: Metrics) -> None: ...  # noqa: D102


class Silent:
    """Shows nothing."""

    def show(self, metrics: Metrics) -> None:
        """Nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        return None


class Live(Silent):
    """A progress bar with the current metrics, clients per second and the time left."""

    def __init__(self, console: Console, label: str, rounds: int, done: int = 0) -> None:
        self.latest: Metrics = {}
        self.progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", style="bold", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[told]}", markup=False),
            TimeRemainingColumn(),
            console=console,
        )
        self.bar = self.progress.add_task(label, total=rounds, completed=done, told="")

    def show(self, metrics: Metrics) -> None:
        """Moves the bar."""
        self.latest |= metrics
        self.progress.update(self.bar, completed=int(metrics["round"]), told=told(self.latest))

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.progress.stop()


class Lines(Silent):
    """A line for a round with an evaluation, for the first and the last, and at least one every ten seconds."""

    def __init__(self, console: Console, label: str, rounds: int, done: int = 0) -> None:
        self.console, self.label, self.rounds = console, label, rounds
        self.before = done
        self.began = self.last = time.monotonic()

    def show(self, metrics: Metrics) -> None:
        """Writes the line, if it is time for one."""
        round, now = int(metrics["round"]), time.monotonic()
        evaluated = any(name in metrics for name in SHOWN[:2])
        if evaluated or round in (self.before + 1, self.rounds) or now - self.last > 10:
            left = (now - self.began) / (round - self.before) * (self.rounds - round)
            self.console.print(
                f"{self.label}  round {round}/{self.rounds}  {told(metrics)}  {left:.0f} s left",
                highlight=False,
                markup=False,
                soft_wrap=True,
            )
            self.last = now


def told(metrics: Metrics) -> str:
    """The metrics that matter most, in a few words."""
    words = [f"{name} {metrics[name]:.4f}" for name in SHOWN if name in metrics]
    others = [name for name in metrics if name.startswith("test/") and name not in SHOWN and name != "test/loss"]
    words += [f"{name} {metrics[name]:.4f}" for name in others[:2]]
    if metrics.get("seconds"):
        words.append(f"{metrics['clients'] / metrics['seconds']:.0f} clients/s")
    if metrics.get("failed"):
        words.append(f"{metrics['failed']:.0f} failed")
    return "  ".join(words)


def display(label: str, rounds: int, done: int = 0) -> Display:
    """The display that suits where the output goes."""
    console = Console()
    return (Live if console.is_terminal else Lines)(console, label, rounds, done)
