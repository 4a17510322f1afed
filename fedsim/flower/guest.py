"""Guest: a strategy of Flower's, asked in fedsim's words."""

import gc
import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from flwr.app import ConfigRecord, Message, MetricRecord
from flwr.serverapp.strategy import Strategy as FlowerStrategy

from fedsim.flower.arrays import pack, unpack
from fedsim.flower.codec import decode_task, encode_reply
from fedsim.flower.compat import Error, ErrorCode, quiet
from fedsim.flower.grid import SimulationGrid
from fedsim.flower.node import alone
from fedsim.randomness import seeding
from fedsim.task import Draw, Metrics, Params, Replies, Task

__all__ = ["FlowerStrategy", "Guest", "is_flower"]

logger = logging.getLogger(__name__)

PATIENCE = 5  # Flower's strategies ask twice who is there, and then once a second until there are enough


def is_flower(strategy: Any) -> bool:
    """Whether this is a strategy of Flower's (fedsim's are, too)."""
    return isinstance(strategy, FlowerStrategy)


class Guest:
    """A Flower strategy, and what must be remembered of the round that is under way.

    What it draws from the global generators depends on the seed and the round alone.
    """

    def __init__(self, strategy: FlowerStrategy, num_clients: int, seed: int) -> None:
        self.strategy, self.seed = strategy, seed
        self.roster = Roster(num_clients, seed)
        self.messages: dict[int, Message] = {}  # client -> what it is sent
        self.chosen = Draw([])
        self.warned = False

    def __repr__(self) -> str:
        return f"{type(self.strategy).__module__}:{type(self.strategy).__qualname__}"

    def configure(self, params: Params, round: int, draw: Draw) -> Task:
        """The task of this round, to those that the strategy chooses among the drawn, dropping out or not.

        Raises:
            ValueError: it sends nothing, or not the same to all.
        """
        self.roster.call([*draw.ids, *draw.dropped])
        with quiet(), seeding(self.seed, "flower", "configure", round):
            sent = list(self.strategy.configure_train(round, pack(params), ConfigRecord(), self.roster))
        if not sent:
            raise ValueError(f"round {round}: {self!r} sends no messages (is fraction_train 0?)")
        if any(not _alike(message, sent[0]) for message in sent):
            raise ValueError(
                f"round {round}: {self!r} does not send the same to all: fedsim's clients cannot take that"
            )
        self._warn(sent[0])
        self.messages = {self.roster.number(message.metadata.dst_node_id): message for message in sent}
        there = set(draw.ids)
        self.chosen = Draw(
            [client for client in self.messages if client in there],
            [client for client in self.messages if client not in there],
        )
        task = decode_task(sent[0].content, sent[0].metadata.message_type, f"{self!r}, round {round}")
        return task._replace(ids=None, round=round, reduce="stack")

    def aggregate(self, task: Task, replies: Replies) -> tuple[Params | None, Metrics]:
        """The new model, None where the strategy makes none; and its metrics."""
        with quiet(), seeding(self.seed, "flower", "aggregate", task.round):
            messages = list(self._replies(task, replies))
            mine = not gc.get_freeze_count()  # whoever runs this may have frozen things himself
            if mine:
                gc.freeze()  # some of Flower's strategies collect garbage for each array: what is here already is none
            try:
                arrays, metrics = self.strategy.aggregate_train(task.round, messages)
            finally:
                if mine:
                    gc.unfreeze()
        params = None if arrays is None else unpack(arrays, f"{self!r}, round {task.round}")
        return params, dict(_named(task.action, metrics or MetricRecord()))

    def _warn(self, message: Message) -> None:
        """Says once that what the strategy tells its clients, such as FedProx its mu, does not reach fedsim's."""
        told = {key for config in message.content.config_records.values() for key in config}
        lost = sorted(key for key in told if key != "server-round" and not key.startswith("fedsim."))
        if lost and not self.warned:
            self.warned = True
            logger.warning(
                "%r tells its clients %s, which fedsim's clients do not hear: their settings are the experiment's",
                self,
                ", ".join(lost),
            )

    def _replies(self, task: Task, replies: Replies) -> Iterator[Message]:
        place = {client: position for position, client in enumerate(replies.ids)}
        for client, message in self.messages.items():
            if client in place:
                yield Message(encode_reply(alone(replies, task.action, place[client])), reply_to=message)
            else:
                reason = replies.failed.get(client, "dropped out")
                yield Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)


def _alike(message: Message, other: Message) -> bool:
    same = message.content is other.content or message.content == other.content
    return same and message.metadata.message_type == other.metadata.message_type


class Roster(SimulationGrid):
    """A grid that only tells which nodes are there."""

    def __init__(self, num_nodes: int, seed: int) -> None:
        super().__init__(_Nobody(), num_nodes, seed)
        self.present: list[int] = []  # nodes
        self.calls = 0

    def call(self, clients: Sequence[int]) -> None:
        """From now on these are there."""
        self.present, self.calls = [self.node_ids[client] for client in sorted(clients)], 0

    def get_node_ids(self) -> Iterable[int]:
        """The nodes that are there."""
        self.calls += 1
        if self.calls > PATIENCE:
            raise RuntimeError(
                f"the strategy waits for more than the {len(self.present)} clients that were drawn: draw more, or "
                "lower its min_available_nodes and min_train_nodes"
            )
        return list(self.present)

    def number(self, node: int) -> int:
        """The client of a node."""
        return self._number[node]


class _Nobody:
    def answer(self, batch: Sequence[tuple[int, Message]]) -> Iterator[Message]:
        raise NotImplementedError("while it is configured, a strategy cannot send messages of its own")


def _named(action: str, metrics: MetricRecord) -> Iterator[tuple[str, float]]:
    for name, value in metrics.items():
        if isinstance(value, list):
            yield from ((f"{action}/{name}/{place}", float(part)) for place, part in enumerate(value))
        else:
            yield f"{action}/{name}", float(value)
