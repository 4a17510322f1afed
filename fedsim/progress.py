"""What the terminal shows during a run: a live bar where there is a terminal, plain lines where there is none."""

import time
from contextlib import AbstractContextManager, suppress
from types import TracebackType
from typing import Protocol, Self

from rich import live
from rich.console import Console, Group
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.status import Status
from rich.text import Text

from fedsim.ranking import beside, foremost
from fedsim.task import Metrics

SHOWN = ("test/accuracy", "clients/accuracy", "train/loss")  # first, where there are any


class Display(AbstractContextManager["Display"], Protocol):
    """Something that is told of every round, and of what went wrong in it."""

    def show(self, metrics: Metrics) -> None: ...  # noqa: D102

    def warn(self, told: str) -> None: ...  # noqa: D102


class Silent:
    """Shows nothing."""

    def show(self, metrics: Metrics) -> None:
        """Nothing."""

    def warn(self, told: str) -> None:
        """Nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        return None


class Live(Silent):
    """A progress bar with the time left, and below it the latest metrics and clients per second."""

    def __init__(self, console: Console, label: str, rounds: int, done: int = 0) -> None:
        self.latest: Metrics = {}
        self.progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", style="bold", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        self.bar = self.progress.add_task(label, total=rounds, completed=done)
        self.words = Text(no_wrap=True, overflow="ellipsis")
        self.live = live.Live(Group(self.progress, self.words), console=console)

    def show(self, metrics: Metrics) -> None:
        """Moves the bar."""
        self.latest |= metrics
        self.words.plain = f"  {told(self.latest)}"
        self.progress.update(self.bar, completed=int(metrics["round"]))

    def warn(self, told: str) -> None:
        """Writes it above the bar, where it stays."""
        self.live.console.print(told, style="yellow", highlight=False, markup=False, soft_wrap=True)

    def __enter__(self) -> Self:
        self.live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.live.stop()


class Lines(Silent):
    """A line for a round with an evaluation, for the first and the last, and at least one every ten seconds."""

    def __init__(self, console: Console, label: str, rounds: int, done: int = 0) -> None:
        self.console, self.label, self.rounds = console, label, rounds
        self.before = done
        self.began = self.last = time.monotonic()

    def show(self, metrics: Metrics) -> None:
        """Writes the line, if it is time for one."""
        round, now = int(metrics["round"]), time.monotonic()
        evaluated = any(name in metrics for name in SHOWN[:2]) or bool(foremost(metrics))
        if evaluated or round in (self.before + 1, self.rounds) or now - self.last > 10:
            left = (now - self.began) / (round - self.before) * (self.rounds - round)
            self.console.print(
                f"{self.label}  round {round}/{self.rounds}  {told(metrics)}  {left:.0f} s left",
                highlight=False,
                markup=False,
                soft_wrap=True,
            )
            self.last = now

    def warn(self, told: str) -> None:
        """Writes it."""
        self.console.print(f"{self.label}  {told}", highlight=False, markup=False, soft_wrap=True)


class Steps:
    """What is going on before and after, with a spinner, as long as it is going on; nothing without a terminal."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.status: Status | None = None

    def say(self, told: str) -> None:
        """Shows this step in place of the one before; "" is none."""
        with suppress(OSError):  # the terminal may have been closed
            if self.status is not None:
                self.status.stop()
            self.status = self.console.status(Text(told)) if told and self.console.is_terminal else None
            if self.status is not None:
                self.status.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.say("")


def told(metrics: Metrics) -> str:
    """The metrics that matter most, in a few words."""
    words = [f"{name} {number(metrics[name])}" for name in SHOWN if name in metrics]
    others = [name for name in metrics if name.startswith("test/") and name not in SHOWN and name != "test/loss"]
    words += [f"{name} {number(metrics[name])}" for name in others[:2]]
    for name in foremost(metrics)[:2]:
        popular = f" (MostPop {number(metrics[beside(name)])})" if beside(name) in metrics else ""
        words.append(f"{name} {number(metrics[name])}{popular}")
    if metrics.get("seconds"):
        words.append(f"{metrics['clients'] / metrics['seconds']:.0f} clients/s")
    if metrics.get("failed"):
        words.append(f"{metrics['failed']:.0f} failed")
    return "  ".join(words)


def number(value: float) -> str:
    """A number with four decimals, or in few digits where these would be too many or would all be zero."""
    return f"{value:g}" if abs(value) > 1e4 or 0 < abs(value) < 1e-3 else f"{value:.4f}"


def display(label: str, rounds: int, done: int = 0) -> Display:
    """The display that suits where the output goes."""
    console = Console()
    return (Live if console.is_terminal else Lines)(console, label, rounds, done)
