"""What a certificate is measured on: examples that were to be forgotten, and others that nobody trained on."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from fedsim import tree
from fedsim.data.backdoor import backdoored, triggered
from fedsim.data.federation import Federation
from fedsim.task import Batch

BACKDOOR = f"{backdoored.__module__}:{backdoored.__name__}"


class Material(NamedTuple):
    """Examples, leaves (n, ...) each.

    Attributes:
        forgotten: D_f, that clients trained on and were asked to forget.
        kept: some of those that they trained on and were not.
        target: held-out examples like those that were forgotten; none where a request is about samples or a client.
        rest: the other held-out examples.
        strangers: held-out examples for an attacker to tell from those forgotten: the target, or where there is none
            those with the same labels; of a backdoor, stamped ones with its label.
        stamped: held-out examples with a backdoor's trigger, labelled as what they show; None where there is none.
        label: what the trigger stands for.
    """

    forgotten: Batch
    kept: Batch
    target: Batch
    rest: Batch
    strangers: Batch
    stamped: Batch | None = None
    label: int = 0


def material(federation: Federation, split: Mapping[str, Any]) -> Material:
    """Out of a federation with a column "target", and the table of the split that made it.

    Raises:
        ValueError: nothing in it was to be forgotten, or there is nothing to measure on.
    """
    if "target" not in federation.columns:
        raise ValueError(f"{federation.name} has no column target, so nothing was to be forgotten: see split = marked")
    trained = tree.take(federation.columns, torch.from_numpy(_rows(federation, 0)))
    held_out = federation.test or tree.take(federation.columns, torch.from_numpy(_rows(federation, 2)))
    named = trained["target"] > 0
    if not bool(named.any()):
        raise ValueError(f"{federation.name}: no client trains on anything that was to be forgotten")
    if not len(next(iter(held_out.values()))):
        raise ValueError(f"{federation.name} has no test set, neither a common one nor at its clients: set split.test")
    forgotten = _where(trained, named)
    alike = held_out["target"] > 0
    target, rest = _where(held_out, alike), _where(held_out, ~alike)
    if split.get("use") == BACKDOOR:
        label = int(forgotten["y"][0])
        stamped = triggered(held_out, label, split["size"], split["value"])
        strangers = stamped | {"y": torch.full_like(stamped["y"], label)}
        return Material(forgotten, _where(trained, ~named), target, rest, strangers, stamped, label)
    strangers = (
        target if bool(alike.any()) else _where(held_out, torch.isin(held_out["y"], torch.unique(forgotten["y"])))
    )
    return Material(forgotten, _where(trained, ~named), target, rest, strangers)


def _rows(federation: Federation, part: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The rows of all clients' training (0) or test (2) parts."""
    spans = (federation.rows[bounds[part] : bounds[part + 1]] for bounds in federation.bounds)
    return np.concatenate([*spans, np.zeros(0, dtype=np.int64)])


def _where(examples: Batch, mask: torch.Tensor) -> Batch:
    return tree.take(examples, mask.nonzero().flatten())


def some(examples: Batch, number: int, generator: torch.Generator) -> Batch:
    """So many of the examples at most, drawn."""
    size = len(next(iter(examples.values())))
    return examples if size <= number else tree.take(examples, torch.randperm(size, generator=generator)[:number])
