"""The loop: a generator of rounds. Whoever runs it stops it, evaluates, saves and shows between two of them."""

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from fedsim import tree
from fedsim.client import Client
from fedsim.engines.engine import Engine
from fedsim.method import averages, step
from fedsim.personal import Personal
from fedsim.strategy import Strategy
from fedsim.task import Cohort, Draw, Metrics, Params, Replies, Sampler, Traffic
from fedsim.tree import Tree


class Snapshot(NamedTuple):
    """All that the next round depends on, besides the experiment itself."""

    round: int  # the last one done; 0 before the first
    state: Tree  # the strategy's; one that `overwrites` goes on changing it: `tree.clone` what is to be kept
    personal: Personal  # the clients'; the loop goes on changing it


class Round(NamedTuple):
    """One round as it went."""

    snapshot: Snapshot
    metrics: Metrics  # of the strategy, and "<action>/<name>": the clients' metrics, averaged by weight
    answered: int
    failed: dict[int, str]  # client -> why it did not answer
    traffic: Traffic
    seconds: float
    incidents: Sequence[str] = ()  # what else went wrong, and was made good
    done: bool = False  # no other round follows: the strategy has what it wants


class TooFewReplies(RuntimeError):  # noqa: N818 - says what happened
    """Fewer clients answered than the experiment asks for."""

    def __init__(self, round: int, asked: int, wanted: int, replies: Replies, failed: dict[int, str]) -> None:
        reasons = sorted({reason.strip().splitlines()[-1] for reason in failed.values()})
        because = f"; the others: {'; '.join(reasons[:3])}" if reasons else ""
        answered = f"{len(replies.ids)} of {asked} clients answered"
        super().__init__(f"round {round}: {answered}, min_replies is {wanted}{because}")
        self.round, self.failed, self.incidents = round, failed, replies.incidents


def begin(
    strategy: Strategy, params: Params, clients: Mapping[str, Client], num_clients: int, seed: int = 0
) -> Snapshot:
    """The snapshot before the first round."""
    return Snapshot(0, strategy.init(params), Personal(clients, num_clients, seed))


def rounds(
    strategy: Strategy, engine: Engine, sample: Sampler, snapshot: Snapshot, min_replies: int = 1
) -> Iterator[Round]:
    """The rounds after `snapshot`, until the strategy is done, or for as long as the caller takes them.

    With `min_replies` 0, a round in which nobody answers leaves the state as it is.

    Raises:
        TooFewReplies: fewer than `min_replies` clients answered. The snapshot before that round still holds.
    """
    state, personal = snapshot.state, snapshot.personal
    number = snapshot.round
    while not strategy.done(state):
        number += 1
        start = time.perf_counter()
        task = strategy.configure(state, number)._replace(round=number)
        draw = sample(number) if task.ids is None else Draw(list(task.ids))
        replies = engine.execute(task, Cohort(draw.ids, personal.gather(draw.ids)))
        failed = replies.failed | dict.fromkeys(draw.dropped, "dropped out")
        asked = len(draw.ids) + len(draw.dropped)
        if len(replies.ids) < min_replies:
            raise TooFewReplies(number, asked, min_replies, replies, failed)
        state, metrics = step(strategy, state, task, replies) if replies.ids else (state, {})
        personal.scatter(replies.ids, replies.personal)
        means = {f"{task.action}/{name}": value for name, value in averages(replies).items()}
        lost = len(draw.dropped) * tree.count_bytes(tree.leaves(task.shared))
        yield Round(
            Snapshot(number, state, personal),
            means | metrics,
            len(replies.ids),
            failed,
            Traffic(replies.traffic.down + lost, replies.traffic.up),
            time.perf_counter() - start,
            replies.incidents,
            strategy.done(state),
        )
