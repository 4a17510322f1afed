"""Codec: a Task or Replies as the records of a Flower message, and back, to the bit.

A message holds

    "arrays"    ArrayRecord    the model, that is the branch "params", each array under its parameter's name
    "metrics"   MetricRecord   in replies: "num-examples", the weight, and the client's metrics
    "config"    ConfigRecord   in tasks: what the server's user says to clients, and "server-round"
    "fedsim"    ConfigRecord   "version", and all that the others cannot hold; "rest" are the other branches

so that Flower's strategies, wrappers and checks find what they look for, and messages of other people's apps, which
have no record "fedsim", can be read too. A node that runs several clients answers with all of them, stacked, as
"replies".

Whatever comes from outside is checked before anything is made of it; what is wrong raises MalformedMessage.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import safetensors
import torch
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from safetensors.torch import load, save
from torch import Tensor

from fedsim import tree
from fedsim.flower.arrays import MalformedMessage, flatten, pack, unflatten, unpack
from fedsim.task import Replies, Reply, Task
from fedsim.tree import Tree

VERSION = 1
WEIGHT = "num-examples"


class _Halves(NamedTuple):
    """A tree in two: what Flower's strategies look at, and what they do not."""

    arrays: ArrayRecord
    about: dict[str, Any]  # for the record "fedsim"


def _split(whole: Tree) -> _Halves:
    params = whole.get("params")
    model = isinstance(params, dict)
    rest = flatten({name: branch for name, branch in whole.items() if not (model and name == "params")})
    about: dict[str, Any] = {"version": VERSION, "params": model}
    if rest:
        about["rest"] = save({name: leaf.detach().cpu().contiguous().clone() for name, leaf in rest.items()})
    return _Halves(pack(params) if isinstance(params, dict) else ArrayRecord(), about)


def _join(arrays: ArrayRecord, about: Mapping[str, Any], where: str) -> Tree:
    params = unpack(arrays, f"{where}: arrays")
    if params and not about.get("params", True):
        raise MalformedMessage(f"{where}: arrays hold {', '.join(params)}, and there should be none")
    whole: Tree = {"params": params} if about.get("params", True) else {}
    rest = about.get("rest", b"")
    if not isinstance(rest, bytes):
        raise MalformedMessage(f"{where}: rest is a {type(rest).__name__}, must be bytes")
    try:
        others = unflatten(load(rest), f"{where}: rest") if rest else {}
    except (safetensors.SafetensorError, KeyError) as error:
        raise MalformedMessage(f"{where}: rest is not in safetensors format: {error}") from None
    if "params" in others and "params" in whole:
        raise MalformedMessage(f"{where}: there are two branches 'params'")
    return whole | others


def _about(content: RecordDict, where: str) -> Mapping[str, Any]:
    """The record "fedsim"; empty in messages of other apps."""
    about: Any = content.get("fedsim", {})
    if not isinstance(about, ConfigRecord | dict):
        raise MalformedMessage(f"{where}: 'fedsim' is a {type(about).__name__}, must be a ConfigRecord")
    if about and about.get("version") != VERSION:
        raise MalformedMessage(
            f"{where}: of version {about.get('version')!r}; this fedsim reads version {VERSION}: "
            "have the same fedsim on all nodes"
        )
    return about


def _only(records: Mapping[str, Any], kind: str, where: str) -> Any:
    """The one record of its kind."""
    if len(records) != 1:
        raise MalformedMessage(f"{where}: must hold one {kind}, holds {', '.join(map(repr, records)) or 'none'}")
    return next(iter(records.values()))


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
    arrays, about = _split(task.shared)
    about |= {"action": task.action, "round": task.round, "reduce": task.reduce}
    told = ConfigRecord({**(config or {}), "server-round": task.round})
    content = RecordDict({"arrays": arrays, "config": told, "fedsim": ConfigRecord(about)})
    if task.ids is not None:
        content["clients"] = ConfigRecord({"ids": list(map(int, task.ids))})
    return content


def decode_task(content: RecordDict, kind: str, where: str = "task") -> Task:
    """The task in a message of this type, fedsim's or another app's."""
    about = _about(content, where)
    shared = _join(_only(content.array_records, "ArrayRecord", where), about, where)
    configs = content.config_records
    told: Mapping[str, Any] = configs.get("config", {})
    number = about.get("round", told.get("server-round", 0))
    ids = configs["clients"].get("ids") if "clients" in configs else None
    if not isinstance(number, int) or not (ids is None or isinstance(ids, list)):
        raise MalformedMessage(f"{where}: round must be an integer, ids a list, got {number!r} and {ids!r}")
    reduce = about.get("reduce", "stack")
    if reduce not in ("stack", "mean", "sum"):
        raise MalformedMessage(f"{where}: reduce must be one of stack, mean, sum, got {reduce!r}")
    if about.get("action", action_of(kind)) != action_of(kind):
        raise MalformedMessage(f"{where}: a message of type {kind!r} asks for the action {about['action']!r}")
    return Task(action_of(kind), shared, ids, number, reduce)  # type: ignore[arg-type]


def encode_reply(reply: Reply) -> RecordDict:
    """What one client sends, its leaves not stacked. What it keeps for itself is not in it."""
    if WEIGHT in reply.metrics:
        raise ValueError(f"a metric cannot be called {WEIGHT!r}: that is the weight's name on the wire")
    arrays, about = _split(reply.update)
    numbers = {WEIGHT: reply.weight, **reply.metrics}
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
    about = _about(content, where)
    records = content.array_records
    arrays = _only(records, "ArrayRecord", where) if records or about else ArrayRecord()
    update = _join(arrays, about, where) if records else {}
    numbers: Mapping[str, Any] = _only(content.metric_records, "MetricRecord", where)
    if WEIGHT not in numbers:
        raise MalformedMessage(
            f"{where}: metrics lack {WEIGHT!r}, by which means are weighted; they hold {list(numbers)}"
        )
    weight = numbers[WEIGHT]
    if isinstance(weight, list) or not (math.isfinite(weight) and weight >= 0):
        raise MalformedMessage(f"{where}: {WEIGHT} must be a number >= 0, got {weight!r}")
    names = about.get("dtypes", [])
    dtypes = dict(zip(numbers, names, strict=True)) if len(names) == len(numbers) else {}
    tensors = {name: _scalar(value, dtypes.get(name), f"{where}: {name}") for name, value in numbers.items()}
    if like is not None:
        check_form(update, like, 0, where)
    return Reply(update, tensors.pop(WEIGHT), metrics=tensors)


def _scalar(value: Any, dtype: str | None, where: str) -> Tensor:
    found = torch.tensor(value, dtype=torch.int64 if isinstance(value, int) else torch.float64)
    wanted = found.dtype if dtype is None else getattr(torch, str(dtype), None)
    if not isinstance(wanted, torch.dtype):
        raise MalformedMessage(f"{where}: there is no type {dtype!r}")
    return found.to(wanted)


def check_form(update: Tree, like: Tree, stacked: int, where: str) -> None:
    """Raises where a leaf bears the name of one that was sent, and has another shape after `stacked` leading axes."""
    sent = dict(tree.items(like))
    for name, leaf in tree.items(update):
        other = sent.get(name)
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
    sent = {"update": replies.update, "weight": replies.weight, "metrics": replies.metrics}
    about: dict[str, Any] = {"version": VERSION}
    about |= {"ids": list(map(int, replies.ids))} if replies.ids else {}
    if replies.failed:
        about |= {"failed": list(map(int, replies.failed)), "reasons": list(replies.failed.values())}
    return RecordDict({"replies": pack(sent), "fedsim": ConfigRecord(about)})


def decode_replies(content: RecordDict, asked: Sequence[int], like: Tree, where: str = "replies") -> Replies:
    """The replies of a node to which these clients were given, all of them stacked, leaves (C, ...)."""
    about = _about(content, where)
    if not about or "replies" not in content.array_records:
        raise MalformedMessage(f"{where}: no reply of fedsim's: holds {', '.join(map(repr, content)) or 'nothing'}")
    ids, lost, reasons = (list(about.get(name, [])) for name in ("ids", "failed", "reasons"))
    if sorted([*ids, *lost]) != sorted(asked) or len(reasons) != len(lost):
        raise MalformedMessage(f"{where}: answers for clients {[*ids, *lost]}, was asked for {list(asked)}")
    sent = unpack(content.array_records["replies"], where)
    weight, update, metrics = (sent.get(name, {}) for name in ("weight", "update", "metrics"))
    if sent.keys() - {"weight", "update", "metrics"} or not isinstance(weight, Tensor) or isinstance(update, Tensor):
        raise MalformedMessage(f"{where}: must hold weight, update and metrics, holds {', '.join(sent)}")
    leading = {len(leaf) if leaf.ndim else -1 for name, leaf in tree.flatten(sent).items() if "@size" not in name}
    if ids and leading != {len(ids)}:
        raise MalformedMessage(f"{where}: answers for {len(ids)} clients with leaves of {sorted(leading)}")
    if not bool((weight >= 0).all()):  # NaN is not, either
        raise MalformedMessage(f"{where}: weights must be numbers >= 0, got {weight.tolist()}")
    if not isinstance(metrics, dict) or any(isinstance(leaf, dict) for leaf in metrics.values()):
        raise MalformedMessage(f"{where}: metrics must be tensors by name")
    check_form(update, like, 1, where)
    return Replies(ids, weight, update, {}, metrics, dict(zip(lost, reasons, strict=True)))
