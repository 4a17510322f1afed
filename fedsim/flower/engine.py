"""GridEngine: the nodes of a Flower Grid as an engine, simulated by Flower or real ones behind a SuperLink."""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedsim import tree
from fedsim.engines.engine import Engine
from fedsim.engines.gathering import Gathering
from fedsim.flower.arrays import MalformedMessage
from fedsim.flower.codec import OURS, decode_replies, encode_task, message_type
from fedsim.flower.node import WHO
from fedsim.ranges import Count, Positive, checked
from fedsim.task import Cohort, Replies, Reply, Task

logger = logging.getLogger(__name__)

POLL_SECONDS = (0.05, 1.0)  # between two looks whether there is an answer: at first, and at most


class Forms:
    """The replies of nodes, one of which may be in another form than the others: that of most clients counts.

    The first to answer could else, by a form of its own, have all others refused.
    """

    def __init__(self, task: Task, cohort: Cohort) -> None:
        self.task, self.cohort = task, Cohort(cohort.ids)
        self.gatherings: dict[object, Gathering] = {}
        self.failed: dict[int, str] = {}

    def add(self, ids: Sequence[int], replies: Reply) -> None:
        """Takes in the stacked replies of some clients."""
        flat = tree.flatten({"update": replies.update, "metrics": replies.metrics})
        form = frozenset((name, leaf.shape[1:]) for name, leaf in flat.items() if "@" not in name)
        if form not in self.gatherings:
            self.gatherings[form] = Gathering("a node", self.task, self.cohort, {})
        self.gatherings[form].add_block(ids, replies)

    def replies(self) -> Replies:
        """Those of the form that most clients have."""
        empty = Gathering("a node", self.task, self.cohort, {})
        most = max(self.gatherings.values(), key=lambda gathering: len(gathering.ids), default=empty)
        for other in self.gatherings.values():
            most.failed |= other.failed
            if other is not most:
                most.failed |= dict.fromkeys(other.ids, "it answered in another form than most clients")
        most.failed |= self.failed
        return most.replies()


class GridEngine(Engine):
    """Sends a task to the nodes that hold the cohort's clients.

    Of n nodes, that with partition-id p holds the clients p, p + n, p + 2n, ...; each is asked for its partition-id
    once, so client 7 is client 7 wherever it runs. What clients keep to themselves stays on their node. Updates of
    which a mean or a sum is wanted are folded as they arrive, so the last bits depend on the order of arrival.

    A node that fails, or does not answer in time, costs the round its clients.

    Args:
        grid: Flower's.
        num_clients: N, of the federation.
        timeout: how long to wait for the answers of a round, in seconds.
        wait: how long to wait for the nodes in the beginning, in seconds.
    """

    @checked
    def __init__(self, grid: Grid, num_clients: Count, timeout: Positive = 3600.0, wait: Positive = 120.0) -> None:
        self.grid, self.num_clients, self.timeout, self.wait = grid, num_clients, timeout, wait
        self.places: dict[int, int] = {}  # node -> its partition
        self.partitions = 0  # how many there are; 0: not known yet
        self.complete = False  # whether there was once a node for each
        self.silent: set[int] = set()  # nodes that do not say which partition they are
        self.asked: dict[str, tuple[int, float]] = {}  # message -> the node that is asked which it is, and since when

    def __repr__(self) -> str:
        return "GridEngine()"

    def execute(self, task: Task, cohort: Cohort) -> Replies:
        """What the clients of the cohort answer to the task."""
        forms = Forms(task, cohort)
        hosts = self._hosts()
        held: dict[int, list[int]] = {}  # node -> the clients that it is to run
        for client in cohort.ids:
            partition = client % self.partitions
            if partition in hosts:
                held.setdefault(hosts[partition], []).append(client)
            else:
                forms.failed[client] = f"the node of partition {partition} is gone"
        common = encode_task(task)
        messages = {}
        for node, ids in sorted(held.items()):
            told = ConfigRecord({**common.config_records["config"], f"{OURS}ids": ids})
            messages[node] = RecordDict({**common, "config": told})
        for node, reply in self._ask(messages, message_type(task.action), str(task.round), self.timeout):
            self._take_in(forms, task, reply, held.pop(node), f"partition {self.places[node]}")
        for node, ids in held.items():
            late = f"partition {self.places[node]} did not answer within {self.timeout:g} s"
            forms.failed |= dict.fromkeys(ids, late)
        return forms.replies()

    def _take_in(self, forms: Forms, task: Task, message: Message, ids: list[int], where: str) -> None:
        if message.has_error():
            reason = f"{where}: error {message.error.code}: {message.error.reason}"
            forms.failed |= dict.fromkeys(ids, reason)
            return
        try:
            replies = decode_replies(message.content, ids, task.shared, where)
        except MalformedMessage as error:
            forms.failed |= dict.fromkeys(ids, str(error))
            return
        forms.failed |= replies.failed
        if replies.ids:
            forms.add(replies.ids, Reply(replies.update, replies.weight, metrics=replies.metrics))

    def _ask(
        self, contents: Mapping[int, RecordDict], kind: str, group: str, timeout: float
    ) -> Iterator[tuple[int, Message]]:
        """Each node's reply as it arrives; those that arrive together in the order of their partitions."""
        messages = [Message(content, node, kind, ttl=timeout, group_id=group) for node, content in contents.items()]
        sent = set(self.grid.push_messages(messages)) if messages else set()
        waiting = {
            message.metadata.message_id: message.metadata.dst_node_id
            for message in messages
            if message.metadata.message_id in sent
        }
        deadline, pause = time.monotonic() + timeout, POLL_SECONDS[0]
        while waiting:
            replies = {waiting[ident]: reply for ident, reply in self._pull(waiting).items()}
            waiting = {ident: node for ident, node in waiting.items() if node not in replies}
            yield from sorted(replies.items(), key=lambda item: (self.places.get(item[0], -1), item[0]))
            if time.monotonic() >= deadline:
                break
            if waiting:
                time.sleep(pause)
                pause = min(1.5 * pause, POLL_SECONDS[1])

    def _pull(self, waiting: Mapping[str, object]) -> dict[str, Message]:
        """Those replies that are there, by the id of what they answer."""
        there = self.grid.pull_messages(list(waiting))
        replies = {reply.metadata.reply_to_message_id: reply for reply in there}
        return {ident: reply for ident, reply in replies.items() if ident in waiting}

    def _hosts(self) -> dict[int, int]:
        """Partition -> its node, of those that are there.

        Raises:
            RuntimeError: in the beginning not all of them came.
        """
        deadline, pause = time.monotonic() + self.wait, POLL_SECONDS[0]
        while True:
            nodes = list(self.grid.get_node_ids())
            self._meet(nodes)
            hosts: dict[int, int] = {}
            for node in nodes:
                if node in self.places and hosts.setdefault(self.places[node], node) != node:
                    both = f"nodes {hosts[self.places[node]]} and {node}"
                    raise RuntimeError(f"{both} both have the partition-id {self.places[node]}: each needs its own")
            now = time.monotonic()
            if self.partitions and len(hosts) == self.partitions:
                self.complete = True
                return hosts
            if self.complete and all(since + self.wait <= now for _, since in self.asked.values()):
                return hosts
            if not self.complete and now >= deadline:
                missing = sorted(set(range(self.partitions)) - hosts.keys())
                told = f"partitions {missing} are missing of {self.partitions}" if missing else "there are none"
                raise RuntimeError(f"waited {self.wait:g} s for the nodes: {told}")
            time.sleep(pause)
            pause = min(1.5 * pause, POLL_SECONDS[1])

    def _meet(self, nodes: Sequence[int]) -> None:
        """Asks new nodes which partition they are, and takes in what those say that were asked; waits for nobody."""
        known = {*self.places, *self.silent, *(node for node, _ in self.asked.values())}
        messages = [Message(RecordDict(), node, WHO, ttl=self.wait, group_id="") for node in nodes if node not in known]
        sent = set(self.grid.push_messages(messages)) if messages else set()
        here = {message.metadata.message_id: message.metadata.dst_node_id for message in messages}
        self.asked |= {ident: (node, time.monotonic()) for ident, node in here.items() if ident in sent}
        replies = self._pull(self.asked) if self.asked else {}
        for node, reply in sorted(
            ((self.asked.pop(ident)[0], reply) for ident, reply in replies.items()), key=lambda pair: pair[0]
        ):
            told: Mapping[str, object] = {} if reply.has_error() else reply.content.metric_records.get("node", {})
            partition, of, clients = (told.get(name) for name in ("partition-id", "num-partitions", "num-clients"))
            if not isinstance(partition, int) or not isinstance(of, int) or not 0 <= partition < of:
                reason = reply.error.reason if reply.has_error() else f"it answered {dict(told)}"
                logger.warning("node %d takes no part, for it does not say which partition it is: %s", node, reason)
                self.silent.add(node)
                continue
            if clients != self.num_clients:
                raise RuntimeError(
                    f"the node of partition {partition} knows {clients} clients, the server {self.num_clients}: "
                    "they do not run the same experiment on the same data"
                )
            if self.partitions not in (0, of):
                raise RuntimeError(f"node {node} says that there are {of} partitions, others say {self.partitions}")
            self.places[node], self.partitions = partition, of

    def close(self) -> None:
        """Nothing: the grid is its owner's."""
