"""What passes between the server and its clients.

Letters, the same in the whole project: N clients in all, C in the cohort, T local steps, B batch, K classes, G groups,
I items, D embedding width, P parameters.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fedsim.tree import Tree

Params = dict[str, Tensor]  # a model's parameters by name
Batch = dict[str, Tensor]  # columns of examples, leaves (n, ...)
Metrics = dict[str, float]  # what is written down once a round
Reduce = Literal["stack", "mean", "sum"]
Ids = NDArray[np.int64]  # of clients, each from 0 to N-1


class Draw(NamedTuple):
    """Who takes part in a round."""

    ids: list[int]
    dropped: list[int] = []  # asked, and gone before they answered


class Sampler(Protocol):
    """Who is asked in a round (counted from 1)."""

    def __call__(self, round: int, among: Ids | None = None) -> Draw: ...  # noqa: D102


class Task(NamedTuple):
    """What the server asks of its clients in one round.

    Attributes:
        action: which of the experiment's clients runs: "train", "evaluate", "forget", ...
        shared: what every client receives.
        ids: who; None: whom the sampler draws.
        round: counted from 1, stamped by the loop.
        reduce: what becomes of the updates. "stack": every client's own, leaves (C, ...); "mean": their mean by weight,
            leaves (...); "sum": their sum, leaves (...). The last two need memory for one update, not for C of them;
            `Rows` stay rows, each of those that a client named once.
    """

    action: str
    shared: Tree
    ids: Sequence[int] | None = None
    round: int = 0
    reduce: Reduce = "stack"


class Cohort(NamedTuple):
    """The C clients that take part.

    Attributes:
        ids: who they are, each from 0 to N-1.
        personal: what each of them kept, leaves (C, ...).
    """

    ids: Sequence[int]
    personal: Tree = {}


class Reply(NamedTuple):
    """What one client answers.

    Attributes:
        update: what is sent to the server, any tree.
        weight: by what means over clients are weighted, those of updates and of metrics; (), usually the number of
            examples.
        personal: kept for this client, never sent; what is not in it stays unchanged.
        metrics: numbers to write down, each (). The loop averages them by weight, as "<action>/<name>". Those of a
            client that evaluates are sums over its examples instead, one of them "examples", by which the others are
            divided.
    """

    update: Tree
    weight: Tensor
    personal: Tree = {}
    metrics: dict[str, Tensor] = {}


class Traffic(NamedTuple):
    """Bytes that a real network would have carried.

    Attributes:
        down: from the server to clients.
        up: from clients to the server.
    """

    down: int = 0
    up: int = 0


class Replies(NamedTuple):
    """What a cohort answers; C are those of its clients that did.

    Attributes:
        ids: those that answered, in the cohort's order.
        weight: (C,).
        update: leaves (C, ...), or (...) where Task.reduce is "mean" or "sum"; {} where nobody answered.
        personal: what they keep, leaves (C, ...).
        metrics: each (C,).
        failed: client id -> why it did not answer.
        traffic: bytes to and from all that were asked.
        incidents: what else went wrong, and was made good: a worker that died, say.
    """

    ids: list[int]
    weight: Tensor
    update: Tree
    personal: Tree = {}
    metrics: dict[str, Tensor] = {}
    failed: dict[int, str] = {}
    traffic: Traffic = Traffic()
    incidents: Sequence[str] = ()
