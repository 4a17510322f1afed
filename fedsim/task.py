"""What passes between the server and its clients.

Letters, the same in the whole project: N clients in all, C in the cohort, T local steps, B batch, K classes, G groups,
I items, D embedding width, P parameters.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from torch import Tensor

from fedsim.tree import Tree

Params = dict[str, Tensor]  # a model's parameters by name
Batch = dict[str, Tensor]  # columns of examples, leaves (n, ...)
Metrics = dict[str, float]  # what is written down once a round
Reduce = Literal["stack", "mean", "sum"]


class Task(NamedTuple):
    """What the server asks of its clients in one round."""

    action: str  # which of the experiment's clients runs: "train", "evaluate", "forget", ...
    shared: Tree  # what every client receives
    ids: Sequence[int] | None = None  # who; None: whom the sampler draws
    round: int = 0  # stamped by the loop
    reduce: Reduce = "stack"  # "stack": every client's update, leaves (C, ...); "mean": folded by weight, leaves (...);
    # "sum": added up, leaves (...). Folding needs memory for one update, not for C of them.


class Cohort(NamedTuple):
    """The C clients that take part."""

    ids: Sequence[int]
    personal: Tree = {}  # leaves (C, ...): what each of them kept


class Reply(NamedTuple):
    """What one client answers."""

    update: Tree
    weight: Tensor  # (), usually the number of examples
    personal: Tree = {}  # kept for this client, never sent; what is not in it stays unchanged
    metrics: dict[str, Tensor] = {}  # each ()


class Traffic(NamedTuple):
    """Bytes that a real network would have carried."""

    down: int = 0
    up: int = 0


class Replies(NamedTuple):
    """What a cohort answers."""

    ids: list[int]  # those that answered, in the cohort's order
    weight: Tensor  # (C,)
    update: Tree  # leaves (C, ...), or folded as Task.reduce says; {} where nobody answered
    personal: Tree = {}  # leaves (C, ...)
    metrics: dict[str, Tensor] = {}  # each (C,)
    failed: dict[int, str] = {}  # client id -> why it did not answer
    traffic: Traffic = Traffic()
