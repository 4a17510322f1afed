"""SimulationGrid: nodes of this process as a Flower Grid, without polling and without copies of what all receive."""

import threading
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedsim.engines.engine import Engine
from fedsim.flower.codec import decode_task, encode_reply
from fedsim.flower.compat import Error, ErrorCode, Run, ensure_identity, stamp
from fedsim.flower.node import alone, fitted
from fedsim.personal import Personal
from fedsim.randomness import keys
from fedsim.ranges import Count, Natural, checked
from fedsim.task import Cohort

# Flower's strategies wait for nodes by asking once a second how many there are. Here their number does not change.
PATIENCE_CALLS, PATIENCE_SECONDS = 10, 8.0


class Nodes(Protocol):
    """What stands behind a grid and answers messages."""

    def answer(self, batch: Sequence[tuple[int, Message]]) -> Iterator[Message]:
        """The reply to each message, which is given with the number of its node; in order, each made when asked for."""


class SimulationGrid(Grid):
    """N nodes that answer when they are asked for their replies.

    Node k, in the order of the ids, is partition k. The ids are drawn from the seed, so that who takes them for
    partition ids finds out here, and not in a deployment.

    A message is carried out when a reply is asked for; what nobody asks for, when the grid is closed.
    """

    @checked
    def __init__(self, nodes: Any, num_nodes: Count, seed: Natural = 0, run_id: int = 1) -> None:
        ensure_identity(run_id)
        self._nodes: Nodes = nodes
        drawn: set[int] = set()
        attempt = 0
        while len(drawn) < num_nodes:  # two may be the same once in 2**31 times
            drawn |= {int(key >> 1) | 1 for key in keys(seed, "node", attempt, np.arange(num_nodes - len(drawn)))}
            attempt += 1
        self.node_ids = sorted(drawn)
        self._number = {node: number for number, node in enumerate(self.node_ids)}
        self._run = Run.create_empty(run_id)
        self._known: set[str] = set()
        self._waiting: dict[str, Message] = {}  # by message id, in the order in which they were pushed
        self._replies: dict[str, Message] = {}
        self._late: set[str] = set()  # messages that a timeout left waiting
        self._lock = threading.RLock()
        self._owner = threading.get_ident()
        self._asked: list[float] = []  # when it was asked for nodes since the last message

    def set_run(self, run: Run) -> None:
        """Sets the run."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run."""
        return Run(**vars(self._run))

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """A message; for older apps."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """The nodes, in the order of their partitions.

        Raises:
            RuntimeError: somebody waits for more nodes than there are, which would be for ever.
        """
        if threading.get_ident() == self._owner:
            self._asked.append(time.monotonic())
            if len(self._asked) >= PATIENCE_CALLS and self._asked[-1] - self._asked[0] >= PATIENCE_SECONDS:
                raise RuntimeError(
                    f"the server waits for more than the {len(self.node_ids)} nodes that there are: lower what it "
                    "waits for (min_available_nodes, min_train_nodes, min_evaluate_nodes), or have more nodes"
                )
        return list(self.node_ids)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Takes in messages, and gives the id of each.

        Raises:
            ValueError: there is no such node, or a message is no message to a node; none was taken in then.
        """
        messages = list(messages)
        for message in messages:
            if message.metadata.dst_node_id not in self._number:
                raise ValueError(
                    f"there is no node {message.metadata.dst_node_id}: the nodes are those of get_node_ids"
                )
            if not message.has_content() or message.metadata.reply_to_message_id:
                raise ValueError(f"a message to a node has content and is no reply, got {message.metadata}")
        with self._lock:
            under_way = any(self._waiting.get(message.metadata.message_id) is message for message in messages)
            if under_way or len({id(message) for message in messages}) < len(messages):
                raise ValueError("a message is sent once at a time: make another Message of the same content")
            self._asked.clear()
            idents = []
            for message in messages:
                stamp(message, f"message-{len(self._known) + 1}")
                self._known.add(message.metadata.message_id)
                self._waiting[message.metadata.message_id] = message
                idents.append(message.metadata.message_id)
            return idents

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies to these messages, each given once."""
        return self._pull(list(message_ids), None)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """The replies to these messages, in their order; those which `timeout` seconds suffice for."""
        deadline = None if timeout is None else time.monotonic() + timeout
        return self._pull(list(self.push_messages(messages)), deadline)

    def _pull(self, idents: Sequence[str], deadline: float | None) -> list[Message]:
        with self._lock:
            if unknown := set(idents) - self._known:
                raise ValueError(f"no messages with the ids {sorted(unknown)} were pushed")
            idents = list(dict.fromkeys(idents))
            self._carry_out([ident for ident in idents if ident in self._waiting], deadline)
            return [self._replies.pop(ident) for ident in idents if ident in self._replies]

    def _carry_out(self, idents: Sequence[str], deadline: float | None) -> None:
        """Has the nodes answer, until the deadline; those that are left stay waiting."""
        batch = [self._waiting[ident] for ident in idents]
        pairs = [(self._number[message.metadata.dst_node_id], message) for message in batch]
        answers = self._nodes.answer(pairs)
        try:
            for ident in idents:
                if deadline is not None and time.monotonic() >= deadline:
                    self._late |= self._waiting.keys() & set(idents)
                    break
                reply = next(answers)
                del self._waiting[ident]
                stamp(reply, f"reply-to-{ident}")
                self._replies[ident] = reply
        finally:
            if isinstance(answers, Generator):  # which may hold the server's generators as they were
                answers.close()

    def close(self) -> None:
        """Carries out what nobody asked for; not what came too late for whoever did."""
        with self._lock:
            self._carry_out([ident for ident in self._waiting if ident not in self._late], None)


def alike(batch: Sequence[tuple[int, Message]]) -> Iterator[list[tuple[int, Message]]]:
    """The batch in parts that can be carried out at once: same content, same type, one message to a node."""
    part: list[tuple[int, Message]] = []
    busy: set[int] = set()
    for node, message in batch:
        first = part[0][1] if part else message
        same = message.content is first.content and message.metadata.message_type == first.metadata.message_type
        if node in busy or not same:
            yield part
            part, busy = [], set()
        part.append((node, message))
        busy.add(node)
    if part:
        yield part


class ClientNodes:
    """Fedsim's clients behind a grid: messages with the same content are one task, which an engine carries out.

    Args:
        engine: runs the clients.
        personal: what they keep to themselves.
    """

    def __init__(self, engine: Engine, personal: Personal) -> None:
        self.engine, self.personal = engine, personal

    def answer(self, batch: Sequence[tuple[int, Message]]) -> Iterator[Message]:
        """The reply to each message, in order."""
        for pairs in alike(batch):
            yield from self._carry_out(pairs)

    def _carry_out(self, pairs: Sequence[tuple[int, Message]]) -> Iterator[Message]:
        """The replies to messages that are alike."""
        first = pairs[0][1]
        try:
            task = decode_task(first.content, first.metadata.message_type)._replace(reduce="stack")
            task = fitted(task, getattr(self.engine, "clients", {}))
            ids = [number for number, _ in pairs]
            replies = self.engine.execute(task, Cohort(ids, self.personal.gather(ids)))
        except Exception as error:  # no client can answer this
            yield from (_error(message, repr(error)) for _, message in pairs)
            return
        self.personal.scatter(replies.ids, replies.personal)
        place = {client: position for position, client in enumerate(replies.ids)}
        for number, message in pairs:
            if number in replies.failed:
                yield _error(message, replies.failed[number])
                continue
            try:
                content = encode_reply(alone(replies, task.action, place[number]))
            except ValueError as error:
                yield _error(message, str(error))
            else:
                yield Message(content, reply_to=message)


def _error(message: Message, reason: str) -> Message:
    return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)
