"""Node: a ClientApp that runs fedsim's clients, on a Flower node that holds some of a federation's clients.

Of n nodes, that with partition-id p holds the clients p, p + n, p + 2n, ... A message says which of them are meant. One
that does not, as Flower's strategies send it, means client p; then there must be as many nodes as clients.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import ClientAppCallable, Mod

from fedsim import tree
from fedsim.client import Client
from fedsim.data.federation import Federation
from fedsim.engines.local import Sequential
from fedsim.flower.arrays import MalformedMessage, to_array, to_tensor
from fedsim.flower.codec import decode_task, encode_replies, encode_reply
from fedsim.personal import Personal
from fedsim.task import Cohort, Replies, Reply, Task

WHO = "query.fedsim"  # asks a node which clients it holds
KEPT = "fedsim.personal"  # what clients keep to themselves, in the node's Context.state


class Site(NamedTuple):
    """What a node needs to know to act for clients."""

    federation: Federation
    clients: Mapping[str, Client]  # by action
    seed: int = 0


def client_app(
    federation: Federation, clients: Mapping[str, Client], seed: int = 0, mods: Sequence[Mod] = ()
) -> ClientApp:
    """A ClientApp whose nodes are clients of this federation: `train` and `evaluate`, and other actions by name.

    Under a strategy's `start` there must be as many nodes as clients; a `GridEngine` needs fewer.

    Args:
        federation: the data by client.
        clients: action -> the local side.
        seed: of all that is drawn.
        mods: Flower's, around every message.
    """
    return NodeApp(lambda context: Site(federation, clients, seed), mods)


class NodeApp(ClientApp):
    """The ClientApp; what it needs is loaded when the first message comes, for the node's Context says of what."""

    def __init__(self, load: Callable[[Context], Site], mods: Sequence[Mod] = ()) -> None:
        super().__init__()
        handle: ClientAppCallable = partial(answer, load)
        for mod in reversed(mods):
            handle = partial(_with, mod, handle)
        self.handle = handle

    def __call__(self, message: Message, context: Context) -> Message:
        """Whatever the action is: an experiment may name any."""
        with self._lifespan(context):
            return self.handle(message, context)


def _with(mod: Mod, inner: ClientAppCallable, message: Message, context: Context) -> Message:
    return mod(message, context, inner)


def answer(load: Callable[[Context], Site], message: Message, context: Context) -> Message:
    """A node's reply to a message."""
    site = load(context)
    number, of = place(context)
    kind = message.metadata.message_type
    if kind == WHO:
        told = {"partition-id": number, "num-partitions": of, "num-clients": site.federation.num_clients}
        return Message(RecordDict({"node": MetricRecord({**told})}), reply_to=message)
    task = fitted(decode_task(message.content, kind, f"message to the node of partition {number}"), site.clients)
    if task.ids is None and of != site.federation.num_clients:
        raise ValueError(
            f"the federation has {site.federation.num_clients} clients, so it needs as many nodes, not {of}"
        )
    ids = [number] if task.ids is None else list(task.ids)
    if wrong := [client for client in ids if client % of != number or not 0 <= client < site.federation.num_clients]:
        raise MalformedMessage(f"partition {number} of {of} holds no clients {wrong}")
    personal = _recall(site, context)
    engine = Sequential(site.federation, site.clients, site.seed)
    replies = engine.execute(task._replace(reduce="stack"), Cohort(ids, personal.gather(ids)))
    personal.scatter(replies.ids, replies.personal)
    _remember(personal, context)
    if task.ids is not None:
        return Message(encode_replies(replies), reply_to=message)
    if replies.failed:
        raise RuntimeError(f"client {number} failed: {replies.failed[number]}")
    return Message(encode_reply(alone(replies, task.action)), reply_to=message)


def fitted(task: Task, clients: Mapping[str, Client]) -> Task:
    """The task with the model in the types that its client computes in: servers with numpy make float64 of float32."""
    like = getattr(getattr(clients.get(task.action), "model", None), "params", {})
    params = task.shared.get("params")
    if not isinstance(params, dict):
        return task
    cast = {name: leaf.to(like[name].dtype) if name in like else leaf for name, leaf in params.items()}
    return task._replace(shared=task.shared | {"params": cast})


def place(context: Context) -> tuple[int, int]:
    """The node's partition-id, and of how many."""
    config = context.node_config
    number, of = config.get("partition-id"), config.get("num-partitions")
    if not isinstance(number, int) or not isinstance(of, int) or not 0 <= number < of:
        raise ValueError(
            f"a node's configuration must hold partition-id and num-partitions, 0 <= partition-id < num-partitions, "
            f'as in --node-config "partition-id=0 num-partitions=2"; it holds {dict(config)}'
        )
    return number, of


def alone(replies: Replies, action: str, place: int = 0) -> Reply:
    """One client's reply out of stacked ones, in the form that Flower's strategies know.

    A client that evaluates counts sums over its examples: they become means, which are averaged by the weight.

    Raises:
        ValueError: it has no examples to evaluate on; Flower's strategies would divide by a sum of such weights.
    """
    picked = tree.take({"update": replies.update, "weight": replies.weight, "metrics": replies.metrics}, place)
    update, metrics = _unpadded(picked["update"]), picked["metrics"]
    if action == "evaluate" and "examples" in metrics:
        examples = metrics["examples"].double()
        if not examples:
            raise ValueError(f"client {replies.ids[place]} has no examples to evaluate on")
        sums = {name: value for name, value in metrics.items() if name != "examples"}
        metrics = {name: value.double() / examples for name, value in sums.items()}
        update = {}
    return Reply(update, picked["weight"], metrics=metrics)


def _unpadded(update: tree.Tree) -> tree.Tree:
    """Without the padding that rows got when they were stacked."""

    def strip(leaf: torch.Tensor | tree.Rows) -> torch.Tensor | tree.Rows:
        if not isinstance(leaf, tree.Rows):
            return leaf
        real = leaf.index >= 0
        return tree.Rows(leaf.index[real], leaf.values[real], leaf.size)

    return tree.map(strip, update)


def _recall(site: Site, context: Context) -> Personal:
    """What the clients of this node kept after earlier messages."""
    personal = Personal(site.clients, site.federation.num_clients, site.seed)
    if KEPT in context.state:
        record = context.state.array_records[KEPT]
        personal.load({name: to_tensor(array, f"{KEPT}: {name}") for name, array in record.items()})
    return personal


def _remember(personal: Personal, context: Context) -> None:
    if flat := personal.flat():
        context.state[KEPT] = ArrayRecord({name: to_array(leaf) for name, leaf in flat.items()})
