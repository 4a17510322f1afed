"""Somebody's whole Flower app, unchanged, on fedsim's engines: fast, and repeatable to the bit.

outcome = fedsim.flower.run(server_app, client_app, num_nodes=100, seed=1)
outcome.result.train_metrics_clientapp[3]
"""

import copy
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from threading import Lock, get_ident
from typing import Any, NamedTuple

import numpy as np
from flwr.app import Context, Message, Metadata, RecordDict, UserConfig, UserConfigValue
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from fedsim.client import Client
from fedsim.data.federation import Federation
from fedsim.engines.engine import Engine
from fedsim.engines.local import Sequential
from fedsim.flower.compat import Error, ErrorCode, captured, ordered, private_message, swift_arrays
from fedsim.flower.grid import SimulationGrid, alike
from fedsim.randomness import reseed, seeding
from fedsim.ranges import Count, Natural, checked

_ONE_AT_A_TIME = Lock()  # Flower keeps a run's identity for the whole process
_running: list[int] = []  # the thread that runs an app


class Failure(NamedTuple):
    """A message that a node answered with an error."""

    partition: int
    message_type: str
    round: int  # as the server told it; 0 if it told none
    error: str  # in a line
    reason: str  # with the traceback


class Outcome(NamedTuple):
    """What a Flower app did.

    Attributes:
        result: what the last of Flower's loops in it returned: the Result of `Strategy.start`, the History of an older
            app; None if it has a loop of its own.
        context: the server's, with what it put into its state.
        failed: the messages that nodes answered with an error.
    """

    result: Any
    context: Context
    failed: list[Failure]


class ClientAppsFailed(RuntimeError):  # noqa: N818 - says what happened
    """Not one message of some type, such as "train", was answered without an error in the whole run."""


class Job(NamedTuple):
    """One message to one node."""

    partition: int
    before: int  # how many messages this node had before
    metadata: Metadata  # of the message; its content is shared by all of a batch
    context: Context


class Answer(NamedTuple):
    """What became of it."""

    reply: Message
    context: Context  # as it is afterwards
    traceback: str = ""  # of what the app raised


@dataclass(frozen=True)
class Handler:
    """What a node does with a message; with a ClientApp that can be pickled, it can."""

    app: ClientApp
    seed: int

    def __call__(self, content: RecordDict, job: Job) -> Answer:
        """The reply, or an error in its place, and the node's Context afterwards.

        What it draws from the global generators depends on the seed, the node and the number of its message alone.
        An app that raises leaves the node's state as it was.
        """
        kept = copy.deepcopy(job.context.state) if job.context.state else None
        message = private_message(job.metadata, content)
        reseed(self.seed, "message", job.partition, job.before)
        try:
            reply = self.app(message, job.context)
            if not isinstance(reply, Message):
                raise TypeError(f"the ClientApp returned a {type(reply).__name__}, it must return a Message")
            if reply.metadata.reply_to_message_id != job.metadata.message_id:
                raise ValueError("the ClientApp returned no reply: it must return Message(..., reply_to=message)")
        except (Exception, SystemExit) as error:  # whatever it raises costs this node alone, and is told
            job.context.state = RecordDict() if kept is None else kept
            told = Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, f"{type(error).__name__}: {error}")
            asked = private_message(job.metadata, RecordDict())  # what became of the other is not known
            return Answer(Message(told, reply_to=asked), job.context, _trace(error))
        return Answer(reply, job.context)


def _trace(error: BaseException) -> str:
    return "".join(traceback.format_exception(error)).strip()


class AppNodes:
    """Nodes that run a ClientApp, each with a Context of its own."""

    def __init__(self, app: ClientApp, num_nodes: int, run_config: UserConfig, engine: Engine, seed: int) -> None:
        self.handler = Handler(app, seed)
        self.num_nodes, self.run_config, self.engine = num_nodes, run_config, engine
        self.contexts: dict[int, Context] = {}
        self.counts: Counter[int] = Counter()
        self.failed: list[Failure] = []
        self.answered: Counter[str] = Counter()  # by type of message

    def answer(self, batch: Sequence[tuple[int, Message]]) -> Iterator[Message]:
        """The reply to each message, in order; the server's generators stay as they are."""
        if not batch:
            return
        with seeding(self.handler.seed, "nodes"):
            for pairs in alike(batch):
                yield from self._answer(pairs)

    def _answer(self, pairs: Sequence[tuple[int, Message]]) -> Iterator[Message]:
        """The replies to messages of the same content, which is handed over once."""
        answers: Iterator[Answer | Exception]
        answers = self.engine.map(self.handler, pairs[0][1].content, self._jobs(pairs))
        for (partition, message), answer in zip(pairs, answers, strict=True):
            if isinstance(answer, Exception):  # not the app's: its worker died, say
                told = Error(ErrorCode.CLIENT_APP_CRASHED, f"{type(answer).__name__}: {answer}")
                answer = Answer(Message(told, reply_to=message), self.contexts[partition], _trace(answer))
            self.contexts[partition] = answer.context
            if answer.reply.has_error():
                self.failed.append(self._failure(partition, message, answer))
            else:
                self.answered[message.metadata.message_type] += 1
            yield answer.reply

    def _failure(self, partition: int, message: Message, answer: Answer) -> Failure:
        configs = message.content.config_records.values()
        told = next((config["server-round"] for config in configs if "server-round" in config), 0)
        number = told if isinstance(told, int) else 0
        error = str(answer.reply.error.reason)
        return Failure(partition, message.metadata.message_type, number, error, answer.traceback or error)

    def _jobs(self, pairs: Sequence[tuple[int, Message]]) -> Iterator[Job]:
        for partition, message in pairs:
            meta = message.metadata
            if partition not in self.contexts:
                place: UserConfig = {"partition-id": partition, "num-partitions": self.num_nodes}
                told = dict(self.run_config)
                self.contexts[partition] = Context(meta.run_id, meta.dst_node_id, place, RecordDict(), told)
            before = self.counts[partition]
            self.counts[partition] += 1  # now: after the last of a batch nobody comes back here
            yield Job(partition, before, meta, self.contexts[partition])


@checked
def run(
    server_app: ServerApp,
    client_app: ClientApp,
    *,
    num_nodes: Count,
    seed: Natural = 0,
    run_config: Mapping[str, UserConfigValue] | None = None,
    engine: Callable[[Federation, Mapping[str, Client], int], Engine] = Sequential,
) -> Outcome:
    """Runs a Flower app.

    Whatever it draws from the global generators of Python, numpy and torch depends on the seed alone: the same seed
    gives the same sampled nodes and the same numbers, whatever the engine.

    Args:
        server_app: its server.
        client_app: what its nodes do.
        num_nodes: how many nodes; node k has the partition-id k.
        seed: of all that is drawn.
        run_config: the run's configuration, which both have in their Context.
        engine: where nodes run, as for `fedsim.simulate`.

    Raises:
        ClientAppsFailed: not one message of some type was answered without an error.
        RuntimeError: called by an app that is run so itself.
        Exception: what the server's app raised.
    """
    if isinstance(num_nodes, bool) or isinstance(seed, bool):
        raise ValueError(f"num_nodes and seed must be numbers, got {num_nodes!r} and {seed!r}")
    if get_ident() in _running:
        raise RuntimeError("a Flower app runs already, and one cannot be run inside another")
    config: UserConfig = dict(run_config or {})
    nobody = Federation({}, np.arange(0), np.zeros((num_nodes, 4), dtype=np.int64), name="a Flower app's")
    with (
        _ONE_AT_A_TIME,
        engine(nobody, {}, seed) as where,
        captured() as results,
        ordered(),
        swift_arrays(),
        seeding(seed, "server"),
    ):
        nodes = AppNodes(client_app, num_nodes, config, where, seed)
        grid = SimulationGrid(nodes, num_nodes, seed)
        context = Context(grid.run.run_id, 0, {}, RecordDict(), config)
        _running.append(get_ident())
        try:
            server_app(grid, context)
            grid.close()
        finally:
            _running.clear()
    for first in nodes.failed:
        kind = first.message_type
        if not nodes.answered[kind] and "No evaluate function registered" not in first.error:
            number = sum(failure.message_type == kind for failure in nodes.failed)
            raise ClientAppsFailed(
                f"all {number} messages of type {kind} were answered with errors; the first, of partition "
                f"{first.partition}: {first.reason}"
            )
    return Outcome(results[-1] if results else None, context, nodes.failed)
