"""Session: a method in the phases in which Flower calls a strategy, and what must be remembered between them."""

import logging
import time
from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.app.typing import MetricRecordValues
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedsim import tree
from fedsim.engines.gathering import Gathering
from fedsim.flower.arrays import MalformedMessage, pack, unpack
from fedsim.flower.codec import decode_reply, encode_task, message_type
from fedsim.method import Method, step
from fedsim.task import Cohort, Params, Replies, Reply, Sampler, Task
from fedsim.tree import Rows, Tree

logger = logging.getLogger(__name__)


class Session(Strategy):
    """One run of a method under Flower's loop, or under one of Flower's wrappers.

    The method stays pure: its state, the task that is out and the nodes that were asked are kept here.
    """

    def __init__(
        self, method: Method, sample: Sampler | None = None, min_nodes: int = 1, wrapped: bool = False
    ) -> None:
        self.method, self.sample, self.min_nodes, self.wrapped = method, sample, min_nodes, wrapped
        self.state: Tree = {}
        self.given = ArrayRecord()  # the model as Flower last had it from here
        self.task: Task | None = None
        self.asked: dict[int, int] = {}  # node -> client

    def summary(self) -> None:
        """Logs what the strategy is."""
        logging.getLogger("flwr").info("\t└──> %r", self.method)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Messages of this round to the nodes that take part."""
        if server_round == 1 or not self.state:
            self._begin(arrays)
        else:
            self._take_back(arrays)
        self.task = self.method.configure(self.state, server_round)._replace(round=server_round)
        nodes = self._nodes(grid)
        ids = self.task.ids
        if ids is None:
            ids = range(len(nodes)) if self.sample is None else self.sample(server_round).ids
        return self._messages(self.task, ids, nodes, config)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The new model, and the clients' metrics averaged by weight; nothing where nobody answered."""
        if self.task is None or self.task.round != server_round or self.task.action == "evaluate":
            raise RuntimeError(f"aggregate_train({server_round}): configure_train({server_round}) must come first")
        task = self.task
        gathered = self._gather(task, replies)
        if not gathered.ids:
            return None, None
        self._warn(gathered)
        self.state, metrics = step(self.method, self.state, task, gathered)
        made = pack(self.method.params(self.state))
        self.given = made.copy()  # a wrapper may change what it is handed
        return made, MetricRecord(_averages(gathered) | metrics)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Messages to all nodes, to evaluate the model."""
        if not self.state:
            self._begin(arrays)
        self._take_back(arrays)
        self.task = Task("evaluate", self.method.shared(self.state), round=server_round)
        nodes = self._nodes(grid)
        return self._messages(self.task, range(len(nodes)), nodes, config)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """The clients' measures, averaged by their numbers of examples; nothing where nobody answered."""
        if self.task is None or self.task.round != server_round or self.task.action != "evaluate":
            raise RuntimeError(
                f"aggregate_evaluate({server_round}): configure_evaluate({server_round}) must come first"
            )
        gathered = self._gather(self.task._replace(reduce="stack"), replies)
        return MetricRecord(_averages(gathered)) if gathered.ids else None

    def _warn(self, replies: Replies) -> None:
        """Says once what a wrapper, for privacy say, neither sees nor changes."""
        others = sorted(replies.update.keys() - {"params"})
        if self.wrapped and others:
            self.wrapped = False
            logger.warning(
                "%s sends %s besides the model: what wraps it does not see that, so it is neither clipped nor noised",
                type(self.method).__name__,
                ", ".join(others),
            )

    def _begin(self, arrays: ArrayRecord) -> None:
        self.state, self.given = self.method.init(_params(arrays)), arrays.copy()

    def _take_back(self, arrays: ArrayRecord) -> None:
        """Goes on from the model that Flower has, which a wrapper may have changed since it left here."""
        same = arrays.keys() == self.given.keys() and all(
            array.data == self.given[name].data for name, array in arrays.items()
        )
        if same:
            return
        before = self.method.params(self.state)
        if self.state.get("params") is not before and not _equal(self.state.get("params"), before):
            raise TypeError(
                f"{type(self.method).__name__} makes the model out of its state by `params`, so it cannot go on from "
                "one that was changed outside it, as a wrapper does that adds noise"
            )
        after = tree.restore(_params(arrays), before, "the model that the round begins with")
        # In its own types: noise that numpy makes is of float64.
        self.state = self.state | {"params": {name: leaf.to(before[name].dtype) for name, leaf in after.items()}}
        self.given = arrays.copy()

    def _nodes(self, grid: Grid) -> list[int]:
        """The nodes in the order of their ids, once there are enough."""
        while len(nodes := sorted(grid.get_node_ids())) < self.min_nodes:
            logger.info("waiting for nodes: there are %d, min_nodes is %d", len(nodes), self.min_nodes)
            time.sleep(1)
        return nodes

    def _messages(self, task: Task, ids: Sequence[int], nodes: Sequence[int], config: ConfigRecord) -> list[Message]:
        """One message to each of these clients, all of them with the same content."""
        if wrong := [client for client in ids if not 0 <= client < len(nodes)]:
            raise ValueError(f"round {task.round}: asks for clients {wrong}, there are nodes 0 to {len(nodes) - 1}")
        self.asked = {nodes[client]: client for client in ids}
        content = encode_task(task._replace(ids=None), config)
        kind = message_type(task.action)
        return [Message(content, node, kind, group_id=str(task.round)) for node in self.asked]

    def _gather(self, task: Task, messages: Iterable[Message]) -> Replies:
        """What the nodes answered; who failed, and why, is logged."""
        gathering = Gathering("a node", task, Cohort(list(self.asked.values())), {})
        silent = dict(self.asked)
        answers: list[tuple[int, Reply]] = []
        # In the nodes' order, whatever the order of their answers: sums of floats depend on it.
        for message in sorted(messages, key=lambda message: message.metadata.src_node_id):
            node = message.metadata.src_node_id
            client = silent.pop(node, None)
            if client is None:
                logger.warning("round %d: node %d answers unasked, or twice: refused", task.round, node)
                continue
            where = f"reply of node {node}"
            if message.has_error():
                gathering.failed[client] = f"{where}: error {message.error.code}: {message.error.reason}"
                continue
            try:
                answers.append((client, stacked(decode_reply(message.content, task.shared, where))))
            except MalformedMessage as error:
                gathering.failed[client] = str(error)
        for client, reply in _usual_first(answers):
            gathering.add_block([client], reply)
        gathering.failed |= {client: f"node {node} did not answer" for node, client in silent.items()}
        for client, reason in gathering.failed.items():
            logger.warning("round %d, %s, client %d: %s", task.round, task.action, client, reason)
        return gathering.replies()


def _usual_first(answers: Sequence[tuple[int, Reply]]) -> list[tuple[int, Reply]]:
    """Those of the commonest form first: the form of the first is what others are measured by."""

    def form(reply: Reply) -> tuple[tuple[str, tuple[int, ...]], ...]:
        flat = tree.flatten({"update": reply.update}) | reply.metrics
        return tuple(sorted((name, tuple(leaf.shape)) for name, leaf in flat.items() if "@" not in name))

    counts = Counter(form(reply) for _, reply in answers)
    return sorted(answers, key=lambda answer: -counts[form(answer[1])])


def stacked(reply: Reply) -> Reply:
    """One client's reply with leaves (1, ...)."""

    def one(leaf: torch.Tensor | Rows) -> torch.Tensor | Rows:
        return Rows(leaf.index[None], leaf.values[None], leaf.size) if isinstance(leaf, Rows) else leaf[None]

    return Reply(**tree.map(one, reply._asdict()))


def _params(arrays: ArrayRecord) -> Params:
    """The model by name; what counts in it, such as the batches that a layer has seen, as numbers that have a mean.

    Raises:
        ValueError: a name cannot be the key of a tree.
    """
    if wrong := [name for name in arrays if "/" in name or "@" in name or not name]:
        raise ValueError(f"a parameter's name may hold neither '/' nor '@', and not be empty, got {wrong[:3]}")
    whole = {name: leaf for name, leaf in unpack(arrays, "the model").items() if isinstance(leaf, torch.Tensor)}
    return {name: leaf if leaf.is_floating_point() else leaf.double() for name, leaf in whole.items()}


def _equal(one: object, other: Params) -> bool:
    if not isinstance(one, dict) or one.keys() != other.keys():
        return False
    return all(torch.equal(leaf, other[name]) for name, leaf in one.items())


def _averages(replies: Replies) -> dict[str, MetricRecordValues]:
    """The metrics' means by weight; of those that are lists, (C, L), lists."""
    weight = replies.weight.double()
    weight = weight if weight.sum() else torch.ones_like(weight)
    some = weight > 0  # what weighs nothing counts for nothing, were it NaN
    share = weight[some] / weight.sum()
    return {name: torch.tensordot(share, values[some].double(), 1).tolist() for name, values in replies.metrics.items()}
