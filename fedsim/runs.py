"""A run's directory: what was asked, what came out round by round, and the checkpoints to go on from."""

import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from fedsim import tree
from fedsim.checkpoints import read_checkpoint, write_checkpoint
from fedsim.evaluation import Evaluation
from fedsim.files import append, as_csv, read_lines, replace
from fedsim.simulation import Snapshot
from fedsim.task import Metrics, Params

try:
    import fcntl
except ImportError:  # not a Unix: nothing is locked
    fcntl = None  # type: ignore[assignment]

CLASSES = 100  # at most, of which each evaluation is kept


@dataclass(frozen=True)
class Run:
    """The directory of one run. Every file is whole at any moment, wherever the process is killed."""

    path: Path

    @classmethod
    def create(cls, root: Path, name: str, seed: int, experiment: str, environment: Mapping[str, Any]) -> "Run":
        """A new directory root/name/date-seed with the experiment (TOML) and its environment in it."""
        stem = f"{datetime.now():%Y%m%d-%H%M%S}-{seed}"
        for number in range(1, 1000):
            path = root / name / (stem if number == 1 else f"{stem}-{number}")
            try:
                path.mkdir(parents=True)
                break
            except FileExistsError:  # another run began in the same second
                continue
        else:
            raise FileExistsError(f"{root / name} holds a thousand runs of this very second")
        run = cls(path)
        replace(path / "environment.json", json.dumps(environment, indent=2).encode())
        run.describe(experiment)
        return run

    @classmethod
    def open(cls, path: Path) -> "Run":
        """The run in a directory that `create` made."""
        if not (path / "experiment.toml").is_file():
            raise FileNotFoundError(f"{path} is not a run: it holds no experiment.toml")
        return cls(path)

    @classmethod
    def latest(cls, path: Path, seed: int | None = None) -> "Run":
        """The run in a directory, or in a folder of runs the one that began last, with this seed if one is given."""
        if (path / "experiment.toml").is_file():
            return cls(path)
        # They are called date-time-seed, and a number where several began in one second.
        number = r"\d+" if seed is None else str(seed)
        name = rf"\d+-\d+-{number}(-\d+)?"
        some = [run for run in path.glob("*/") if re.fullmatch(name, run.name) and (run / "experiment.toml").is_file()]
        if not some:
            one = "one" if seed is None else f"one with the seed {seed}"
            raise FileNotFoundError(f"{path} is no run, nor does it hold {one}")
        return cls(max(some, key=lambda run: [int(part) for part in run.name.split("-")]))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Inside, no other process may do the same; where the system has no such locks, nothing is locked.

        Raises:
            BlockingIOError: another process does.
        """
        with open(self.path / ".lock", "rb", opener=_opened) as file:
            try:
                if fcntl is not None:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise BlockingIOError(f"{self.path} is being written by another process") from None
            yield

    def describe(self, experiment: str) -> None:
        """Writes the experiment (TOML) down, in place of what stood there."""
        replace(self.path / "experiment.toml", experiment.encode())

    @property
    def metrics_file(self) -> Path:
        """One JSON object a round."""
        return self.path / "metrics.jsonl"

    @property
    def failures_file(self) -> Path:
        """One JSON object for each client that failed in a round; its "client" is null if none did."""
        return self.path / "failures.jsonl"

    @property
    def scores_file(self) -> Path:
        """One JSON object for each evaluation that counted scores."""
        return self.path / "scores.jsonl"

    @property
    def classes_file(self) -> Path:
        """One JSON object for each evaluation that told classes apart."""
        return self.path / "classes.jsonl"

    def record(self, metrics: Mapping[str, float]) -> None:
        """Appends one round."""
        numbers = {name: v if isinstance(v, int | float) else float(v) for name, v in metrics.items()}  # () tensors too
        whole = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        append(self.metrics_file, [whole])

    def record_failures(self, round: int, failed: Mapping[int, str]) -> None:
        """Appends the clients that failed in a round."""
        append(self.failures_file, [{"round": round, "client": ident, "reason": why} for ident, why in failed.items()])

    def record_incidents(self, round: int, incidents: Sequence[str]) -> None:
        """Appends what else went wrong in a round, and was made good: it cost no client its reply."""
        append(self.failures_file, [{"round": round, "client": None, "reason": told} for told in incidents])

    def record_counts(self, round: int, parts: Mapping[str, Evaluation]) -> None:
        """Appends what each part's evaluation counted: scores by group, (G, S, bins); of each class, what was right."""
        scores = {name: part.scores.tolist() for name, part in parts.items() if part.scores is not None}
        classes = {
            name: {"right": part.confusion.diagonal().tolist(), "examples": part.confusion.sum(1).tolist()}
            for name, part in parts.items()
            if part.confusion is not None and len(part.confusion) <= CLASSES
        }
        for file, counted in ((self.scores_file, scores), (self.classes_file, classes)):
            append(file, [{"round": round} | counted] if counted else [])

    def metrics(self) -> list[Metrics]:
        """The rounds so far; NaN for what was not finite."""
        lines = read_lines(self.metrics_file)
        return [{name: math.nan if value is None else value for name, value in line.items()} for line in lines]

    def save_evaluation(
        self, round: int, parts: Mapping[str, Evaluation], names: Mapping[str, tuple[str, ...]]
    ) -> None:
        """Writes the last evaluation: clients.csv and evaluation.json."""
        found: dict[str, Any] = {"round": round}
        for name, part in parts.items():
            found[name] = dict(part.pooled)
            if part.confusion is not None:
                found[name] |= {"confusion": part.confusion.tolist(), "classes": list(names.get("y", ()))}
            if part.groups is not None:  # summed over clients
                found[name] |= {"groups": part.groups.sum(0).tolist(), "group_names": list(names.get("a", ()))}
        if "clients" in parts:
            replace(self.path / "clients.csv", as_csv(parts["clients"].clients).encode())
        replace(self.path / "evaluation.json", json.dumps(found).encode())

    def checkpoints(self) -> list[Path]:
        """The checkpoints, oldest first."""
        found = (self.path / "checkpoints").glob("round-*.safetensors")
        return sorted(found, key=lambda path: int(path.stem.removeprefix("round-")))

    def save(self, snapshot: Snapshot, keep: int | Literal["all"]) -> Path:
        """Writes a checkpoint, then removes older ones as `prune` does."""
        folder = self.path / "checkpoints"
        folder.mkdir(exist_ok=True)
        for half in folder.glob(".tmp*"):  # what safetensors was writing when a process was killed
            half.unlink()
        path = folder / f"round-{snapshot.round:06d}.safetensors"
        flat = {f"state/{name}": leaf for name, leaf in tree.flatten(snapshot.state).items()}
        flat |= {f"personal/{name}": leaf for name, leaf in snapshot.personal.flat().items()}
        write_checkpoint(path, flat, snapshot.round)
        self.prune(keep)
        return path

    def prune(self, keep: int | Literal["all"]) -> None:
        """Removes all checkpoints but the last `keep` of them ("all": removes none)."""
        for old in self.checkpoints()[: 0 if keep == "all" else -keep]:
            old.unlink()

    def load(self, path: Path, like: Snapshot) -> Snapshot:
        """The snapshot in a checkpoint, with the structure of `like`, whose `personal` it fills.

        Raises:
            ValueError: the file is damaged, or its leaves do not fit; all that are missing or surplus are named.
        """
        flat, round = read_checkpoint(path)
        state = {name.removeprefix("state/"): leaf for name, leaf in flat.items() if name.startswith("state/")}
        kept = {name.removeprefix("personal/"): leaf for name, leaf in flat.items() if name.startswith("personal/")}
        like.personal.load(kept)
        return Snapshot(round, tree.restore(state, like.state, str(path)), like.personal)

    def rewind(self, round: int) -> None:
        """Takes back what was written after this round: it is about to be done again."""
        for file in (self.metrics_file, self.failures_file, self.scores_file, self.classes_file):
            if file.exists():
                kept = [line for line in read_lines(file) if line["round"] <= round]
                replace(file, "".join(json.dumps(line) + "\n" for line in kept).encode())


def _opened(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CREAT, 0o666)


def trained(path: Path, seed: int = 0) -> Params:
    """The model of a run's last checkpoint, or of a given one.

    Args:
        path: the run's directory; or a folder of runs: of these, the latest with this seed; or a checkpoint.
        seed: of the run, where there are several.

    Raises:
        FileNotFoundError: there is no such run, or it has no checkpoint yet.
        ValueError: its checkpoint is damaged, or holds no model.
    """
    file = last_checkpoint(path, seed)
    flat, _ = read_checkpoint(file)
    model = {
        name.removeprefix("state/params/"): leaf for name, leaf in flat.items() if name.startswith("state/params/")
    }
    if not model:
        raise ValueError(f"checkpoint {file} holds no model: its leaves are {', '.join(sorted(flat))}")
    return model


def last_checkpoint(path: Path, seed: int = 0) -> Path:
    """The checkpoint of which `trained` gives the model; raises FileNotFoundError as it does."""
    if path.is_file():
        return path
    run = Run.latest(path, seed)
    if not (found := run.checkpoints()):
        raise FileNotFoundError(f"{run.path} has no checkpoint to take a model from")
    return found[-1]
