"""Codec: a Task or Replies as the records of a Flower message, and back, to the bit.

A message holds

    "arrays"    ArrayRecord    the model, that is the branch "params", each array under its parameter's name
    "metrics"   MetricRecord   in replies: "num-examples", the weight, and the client's metrics
    "config"    ConfigRecord   in tasks: what the server's user says to clients, "server-round", and, under "fedsim.",
                               "version" and all that the others cannot hold; "rest" are the other branches
    "fedsim"    ConfigRecord   the same in replies

so that Flower's strategies, wrappers, mods and checks find what they look for, and messages of other people's apps,
which say nothing of fedsim, can be read too. A node that runs several clients answers with all of them, stacked, as
"replies".

Whatever comes from outside is checked before anything is made of it; what is wrong raises MalformedMessage.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote, unquote

import torch
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from torch import Tensor

from fedsim import tree
from fedsim.flower.arrays import MalformedMessage, pack, unpack
from fedsim.flower.records import NUMBERS, VERSION, about_of, checked, config_of, join, list_of, only, split
from fedsim.task import Replies, Reply, Task
from fedsim.tree import Tree

WEIGHT = "num-examples"
OURS = "fedsim."  # before what is ours in a task's "config": mods of Flower's allow for one ConfigRecord


def message_type(action: str) -> str:
    """How an action travels: "train" and "evaluate" as Flower's own, any other as "train.<action>"."""
    if not action.isidentifier():
        raise ValueError(f"an action must be a Python identifier to travel as train.<action>, got {action!r}")
    return action if action in ("train", "evaluate") else f"train.{action}"


def action_of(message_type: str) -> str:
    """The action that travels under this type."""
    category, _, action = message_type.partition(".")
    return action if category == "train" and action else category


def encode_task(task: Task, config: Mapping[str, Any] | None = None) -> RecordDict:
    """A task as the content of a message to each of its clients; `task.ids` is who is to do it, None: the receiver."""
    arrays, about = split(task.shared)
    about |= {"action": task.action, "round": task.round, "reduce": task.reduce}
    about |= {} if task.ids is None else {"ids": list(map(int, task.ids))}
    ours = {OURS + name: value for name, value in about.items()}
    told = ConfigRecord({**(config or {}), "server-round": task.round, **ours})
    return RecordDict({"arrays": arrays, "config": told})


def decode_task(content: RecordDict, kind: str, where: str = "task") -> Task:
    """The task in a message of this type, fedsim's or another app's."""
    told = config_of(content, "config", where)
    about = checked({name.removeprefix(OURS): value for name, value in told.items() if name.startswith(OURS)}, where)
    shared = join(only(content.array_records, "ArrayRecord", where), about, where)
    number = about.get("round", told.get("server-round", 0))
    if type(number) is not int:
        raise MalformedMessage(f"{where}: round must be an integer, got {number!r}")
    ids = list_of(about, "ids", int, where) if "ids" in about else None
    if any(client < 0 for client in ids or []):
        raise MalformedMessage(f"{where}: clients must have ids from 0 on, got {str(ids)[:200]}")
    reduce = about.get("reduce", "stack")
    if reduce not in ("stack", "mean", "sum"):
        raise MalformedMessage(f"{where}: reduce must be one of stack, mean, sum, got {reduce!r}")
    if about.get("action", action_of(kind)) != action_of(kind):
        raise MalformedMessage(f"{where}: a message of type {kind!r} asks for the action {about['action']!r}")
    return Task(action_of(kind), shared, ids, number, reduce)


def encode_reply(reply: Reply) -> RecordDict:
    """What one client sends, its leaves not stacked. What it keeps for itself is not in it."""
    if WEIGHT in reply.metrics:
        raise ValueError(f"a metric cannot be called {WEIGHT!r}: that is the weight's name on the wire")
    arrays, about = split(reply.update)
    numbers = {WEIGHT: reply.weight, **reply.metrics}
    about["metrics"] = list(numbers)
    about["dtypes"] = [str(value.dtype).removeprefix("torch.") for value in numbers.values()]
    metrics = MetricRecord({name: _number(value) for name, value in numbers.items()})
    return RecordDict({"arrays": arrays, "metrics": metrics, "fedsim": ConfigRecord(about)})


def _number(value: Tensor) -> int | float:
    found = value.item()
    return found if isinstance(found, float) else int(found)


def decode_reply(content: RecordDict, like: Tree | None = None, where: str = "reply") -> Reply:
    """The reply in a message, fedsim's or another app's; what is a list there has leaves (L,) in its metrics.

    Args:
        content: the message's.
        like: what clients were sent; a leaf of the update that has a name of it must have its shape too.
        where: for messages.
    """
    about = about_of(content, where)
    records = content.array_records
    arrays = only(records, "ArrayRecord", where) if records or about else ArrayRecord()
    update = join(arrays, about, where) if records else {}
    numbers: Mapping[str, Any] = only(content.metric_records, "MetricRecord", where)
    if WEIGHT not in numbers:
        raise MalformedMessage(
            f"{where}: metrics lack {WEIGHT!r}, by which means are weighted; they hold {list(numbers)}"
        )
    weight = numbers[WEIGHT]
    if isinstance(weight, list) or not 0 <= weight < math.inf:  # NaN is not, either
        raise MalformedMessage(f"{where}: {WEIGHT} must be a number >= 0, got {str(weight)[:200]}")
    names, types = (list_of(about, key, str, where) for key in ("metrics", "dtypes"))
    if types and len(names) != len(types):
        raise MalformedMessage(f"{where}: {len(types)} dtypes for {len(names)} metrics")
    dtypes = dict(zip(names, types, strict=False))  # mods of other people's may have added metrics, or taken some away
    if dtypes.get(WEIGHT) == "bool":
        raise MalformedMessage(f"{where}: {WEIGHT} must be a number, and not of type bool")
    tensors = {name: _scalar(value, dtypes.get(name), f"{where}: {name}") for name, value in numbers.items()}
    if like is not None:
        check_form(update, like, 0, where)
    return Reply(update, tensors.pop(WEIGHT), metrics=tensors)


def _scalar(value: Any, dtype: str | None, where: str) -> Tensor:
    own = torch.int64 if isinstance(value, int) else torch.float64
    if dtype is not None and dtype not in NUMBERS:
        raise MalformedMessage(f"{where}: there is no type {dtype!r}")
    wanted = own if dtype is None else NUMBERS[dtype]
    whole = isinstance(value, int) and not wanted.is_floating_point  # uint64 has numbers that int64 has not
    try:
        return torch.tensor(value, dtype=wanted if whole else own).to(wanted)
    except (RuntimeError, ValueError, OverflowError):
        raise MalformedMessage(f"{where}: {str(value)[:200]} is no {wanted}") from None


def check_form(update: Tree, like: Tree, stacked: int, where: str) -> None:
    """Raises where a leaf bears the name of one that was sent, and has another shape after `stacked` leading axes."""
    sent = dict(tree.items(like))
    for name, leaf in tree.items(update):
        other = sent.get(name)
        if isinstance(leaf, tree.Rows) and leaf.index.ndim != 1 + stacked:
            raise MalformedMessage(f"{where}: {name} has indices of {leaf.index.ndim} axes, must be {1 + stacked}")
        if not isinstance(other, Tensor):
            continue
        if isinstance(leaf, tree.Rows):
            shape = (leaf.size, *leaf.values.shape[leaf.index.ndim :])
        else:
            shape = tuple(leaf.shape[stacked:])
        if shape != tuple(other.shape):
            raise MalformedMessage(f"{where}: {name} has shape {shape}, was sent as {tuple(other.shape)}")


def encode_replies(replies: Replies) -> RecordDict:
    """What a node sends that ran several clients: all their replies, stacked, and why others have none."""
    metrics = {quote(name, safe=""): values for name, values in replies.metrics.items()}  # "hr@10" is no key of a tree
    sent = {"update": replies.update, "weight": replies.weight, "metrics": metrics}
    about: dict[str, Any] = {"version": VERSION}
    about |= {"ids": list(map(int, replies.ids))} if replies.ids else {}
    if replies.failed:
        about |= {"failed": list(map(int, replies.failed)), "reasons": list(replies.failed.values())}
    return RecordDict({"replies": pack(sent), "fedsim": ConfigRecord(about)})


def decode_replies(content: RecordDict, asked: Sequence[int], like: Tree, where: str = "replies") -> Replies:
    """The replies of a node to which these clients were given, all of them stacked, leaves (C, ...)."""
    about = about_of(content, where)
    if not about or "replies" not in content.array_records:
        raise MalformedMessage(f"{where}: no reply of fedsim's: holds {', '.join(map(repr, content)) or 'nothing'}")
    ids, lost = (list_of(about, name, int, where) for name in ("ids", "failed"))
    reasons = list_of(about, "reasons", str, where)
    if sorted([*ids, *lost]) != sorted(asked) or len(reasons) != len(lost):
        raise MalformedMessage(
            f"{where}: answers for clients {str([*ids, *lost])[:200]} with {len(reasons)} reasons, "
            f"was asked for {list(asked)}"
        )
    sent = unpack(content.array_records["replies"], where)
    weight, update, metrics = (sent.get(name, {}) for name in ("weight", "update", "metrics"))
    if sent.keys() - {"weight", "update", "metrics"} or not isinstance(weight, Tensor) or not isinstance(update, dict):
        raise MalformedMessage(f"{where}: must hold weight, update and metrics, holds {', '.join(sent)}")
    if not isinstance(metrics, dict):
        raise MalformedMessage(f"{where}: metrics must be tensors by name")
    for name, leaf in {"weight": weight, **metrics}.items():
        if not isinstance(leaf, Tensor) or leaf.ndim != 1 or leaf.is_complex():
            raise MalformedMessage(f"{where}: weight and metrics must be real numbers (C,), {name} is not")
    leading = {len(leaf) if leaf.ndim else -1 for name, leaf in tree.flatten(sent).items() if "@size" not in name}
    if leading != {len(ids)}:
        raise MalformedMessage(f"{where}: answers for {len(ids)} clients with leaves of {sorted(leading)}")
    if weight.dtype == torch.bool or not bool(((weight.double() >= 0) & weight.double().isfinite()).all()):
        raise MalformedMessage(f"{where}: weights must be numbers >= 0, got {str(weight.tolist())[:200]}")
    metrics = {unquote(name): values for name, values in metrics.items()}
    check_form(update, like, 1, where)
    return Replies(ids, weight, update, {}, metrics, dict(zip(lost, reasons, strict=True)))
