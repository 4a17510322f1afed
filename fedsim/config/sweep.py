"""Sweeps: one experiment with several values of some keys."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w

from fedsim.config.assembly import resolve
from fedsim.config.experiment import read


def variants(source: str | Path | Mapping[str, Any], changes: Sequence[str] = ()) -> list[list[str]]:
    """The changes that make each variant of an experiment out of it: each value of each key in its `sweep`, combined.

    One, `changes` themselves, where there is no sweep.

    Raises:
        ConfigError: one of them is wrong.
    """
    experiment, _ = read(source, changes)
    if not experiment.sweep:
        return [list(changes)]
    settings = [[setting(key, value) for value in values] for key, values in experiment.sweep.items()]
    found = [[*changes, *chosen, "sweep={}"] for chosen in itertools.product(*settings)]
    for each in found:
        resolve(*read(source, each))
    return found


def setting(key: str, value: Any) -> str:
    """As `--set` takes it. Within arrays of arrays even a long table is written in one piece."""
    text = tomli_w.dumps({"values": [[value]]}).partition("=")[2]
    for _ in range(2):
        text = text.strip().removeprefix("[").removesuffix("]").strip().removesuffix(",")
    return f"{key}={text}"
