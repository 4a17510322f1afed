"""Notions of group fairness, as the rates that they compare."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Notion = Literal["demographic parity", "equal opportunity", "equalised odds", "mean equalised odds"]


class Events(NamedTuple):
    """What a notion of fairness compares between groups: V rates."""

    labels: Tensor  # (V, K) whether a label belongs to the event
    classes: Tensor  # (V,) the class that is predicted

    def name(self, number: int) -> str:
        """One of them, in words."""
        belong = self.labels[number].nonzero().flatten().tolist()
        if len(belong) == self.labels.shape[1]:
            given = ""
        elif len(belong) == 1:
            given = f" | {belong[0]}"
        else:
            given = f" | not {self.classes[number]}"
        return f"P({self.classes[number]}{given})"


def events(notion: Notion, num_classes: int) -> Events:
    """The rates that a notion compares.

    Demographic parity: all labels, each class. Equal opportunity: the class itself (true positive rates). Equalised
    odds: every label, each class. Mean equalised odds, one versus the rest: true and false positive rates.
    """
    one = torch.eye(num_classes, dtype=torch.bool)
    classes = torch.arange(num_classes)
    match notion:
        case "demographic parity":
            return Events(torch.ones_like(one), classes)
        case "equal opportunity":
            return Events(one, classes)
        case "equalised odds":
            return Events(one.repeat_interleave(num_classes, 0), classes.repeat(num_classes))
        case "mean equalised odds":
            return Events(torch.cat([one, ~one]), classes.repeat(2))
    raise ValueError(
        f"notion must be demographic parity, equal opportunity, equalised odds or mean equalised odds, got {notion!r}"
    )
