"""Conformance tests for plug-ins: run them on your own clients and strategies.

def test_my_client():
    check_client(MyClient(model, lr=0.1), {"params": model.params}, ragged({"x": x, "y": y}))
"""

import copy
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedsim import tree
from fedsim.client import Client
from fedsim.data.dataset import Dataset
from fedsim.data.federation import Federation, Partition, divide
from fedsim.engines.engine import Engine
from fedsim.engines.local import Sequential, Vectorised
from fedsim.personal import Personal
from fedsim.strategy import Strategy
from fedsim.task import Cohort, Params, Replies, Task
from fedsim.tree import Tree

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}


def ragged(columns: dict[str, torch.Tensor], sizes: Sequence[int] = (0, 1, 7, 20, 33, 2)) -> Federation:
    """A federation of clients of these sizes, one of them empty, one with a single example; rows repeat as needed."""
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    rows = np.arange(offsets[-1]) % len(next(iter(columns.values())))
    federation = divide(Dataset("ragged", columns), Partition(rows, offsets))
    start, end = federation.bounds[:, 0], federation.bounds[:, 3]
    whole = np.stack([start, end, end, end], axis=1)
    return Federation(federation.columns, federation.rows, whole)


def check_client(client: Client, shared: Tree, federation: Federation, seed: int = 0) -> None:
    """Raises AssertionError, saying which promise is broken and where.

    A client promises that it

    - changes none of its arguments, nor itself;
    - answers the same task twice in the same way;
    - answers with finite numbers, whatever the number of examples (none, one, many);
    - answers alone what it answers vectorised, in blocks of any size and in any order, to 1e-5 (float32) or 1e-10
      (float64), unless it is stochastic or overrides `run`;
    - sends nothing that still hangs on the computation of a gradient.

    Differences are measured against the largest number of a leaf, or 1: let `lr` be large enough to move the model.

    Raises:
        TypeError: the client is a class, not an object.
    """
    _refuse_class(client, "client")
    ids = list(range(federation.num_clients))
    rows = torch.from_numpy(federation.rows)  # in this order a client's examples are a view, where a change shows
    columns = {name: column[rows] for name, column in federation.columns.items()}
    whole = Federation(columns, np.arange(len(rows)), _all_in(federation, client.split))
    alone = Sequential(whole, {"check": client}, seed)
    near = max((TOLERANCE.get(leaf.dtype, 0.0) for leaf in tree.flatten(shared).values()), default=1e-5)
    before, told = copy.deepcopy((tree.flatten(shared), whole.columns)), _portrait(client)
    first = _execute(alone, client, shared, ids, seed)
    _equal(before[0], tree.flatten(shared), "the client changed what it was sent")
    _equal(before[1], whole.columns, "the client changed its examples")
    _unchanged(told, _portrait(client), "the client changed itself")
    sent = tree.flatten({"update": first.update, "personal": first.personal, "metrics": first.metrics})
    for name, leaf in sent.items():
        assert not leaf.requires_grad, f"{name} requires a gradient: detach what is sent"
    _same(first, _execute(alone, client, shared, ids, seed), 0.0, "twice the same task")
    if client.stochastic or type(client).run is not Client.run:
        return
    for block in (1, 2, len(ids)):
        together = _execute(Vectorised(whole, {"check": client}, seed, block), client, shared, ids, seed)
        _same(first, together, near, f"alone and vectorised in blocks of {block}")
    backwards = _execute(Vectorised(whole, {"check": client}, seed, 3), client, shared, ids[::-1], seed)
    _same(first, _in_order(backwards, first.ids), near, "in another order")


def check_strategy(strategy: Strategy, params: Params, replies: Replies) -> None:
    """Raises AssertionError unless the strategy is pure and its state keeps its names, shapes and types."""
    _refuse_class(strategy, "strategy")
    given, told = copy.deepcopy(params), _portrait(strategy)
    state = strategy.init(params)
    _equal(given, params, "init changed the parameters that it was given")
    task = strategy.configure(state, 1)
    before = copy.deepcopy((tree.flatten(state), _leaves(replies)))
    spare = tree.clone(state)
    after, _ = strategy.aggregate(state, task, replies)
    if strategy.overwrites:
        _equal(given, params, "aggregate wrote over the model's first parameters: init must copy them")
        state = spare
    _equal(
        before[0], tree.flatten(state), "aggregate changed the state that it was given, and does not say `overwrites`"
    )
    _equal(before[1], _leaves(replies), "aggregate changed the replies that it was given")
    try:
        tree.restore(tree.flatten(after), state, "the state after aggregate")
    except ValueError as error:
        raise AssertionError(str(error)) from error
    for name, leaf in tree.flatten(after).items():
        assert leaf.dtype == before[0][name].dtype, f"{name} was {before[0][name].dtype} and became {leaf.dtype}"
    again, _ = strategy.aggregate(state, task, replies)
    _equal(tree.flatten(after), tree.flatten(again), "aggregate gave two answers to the same replies")
    _unchanged(told, _portrait(strategy), "the strategy changed itself")


def _refuse_class(plugin: object, name: str) -> None:
    if isinstance(plugin, type):
        raise TypeError(f"{name} must be an object, got the class {plugin.__name__}: pass {plugin.__name__}(...)")


def _all_in(federation: Federation, split: str) -> NDArray[np.int64]:
    """Bounds that put all examples into one part, so that a client of any split has work."""
    start, end = federation.bounds[:, 0], federation.bounds[:, 3]
    cut = {"train": (end, end), "validation": (start, end), "test": (start, start)}[split]
    return np.stack([start, *cut, end], axis=1)


def _execute(engine: Engine, client: Client, shared: Tree, ids: Sequence[int], seed: int) -> Replies:
    personal = Personal({"check": client}, max(ids) + 1, seed).gather(ids)
    kept = copy.deepcopy(tree.flatten(personal))
    try:
        replies = engine.execute(Task("check", shared, round=1), Cohort(list(ids), personal))
    except TypeError as error:  # it changes something in place, or cannot be vectorised
        raise AssertionError(str(error)) from error
    assert not replies.failed, f"client {min(replies.failed)} failed: {replies.failed[min(replies.failed)]}"
    _equal(kept, tree.flatten(personal), "the client changed what it kept, instead of answering with it")
    return replies


def _in_order(replies: Replies, ids: Sequence[int]) -> Replies:
    order = torch.tensor([replies.ids.index(ident) for ident in ids])
    return replies._replace(
        ids=list(ids),
        weight=replies.weight[order],
        update=tree.take(replies.update, order),
        personal=tree.take(replies.personal, order),
        metrics=tree.take(replies.metrics, order),
    )


def _leaves(replies: Replies) -> dict[str, torch.Tensor]:
    parts = {"update": replies.update, "personal": replies.personal, "metrics": replies.metrics}
    return tree.flatten(parts | {"weight": replies.weight})


def _tables(replies: Replies) -> Replies:
    """The same with tables (C, size, ...) in the place of rows, whose number and order may differ."""

    def table(leaf: Any) -> Any:
        if not isinstance(leaf, tree.Rows):
            return leaf
        rows = zip(leaf.index, leaf.values, strict=True)
        return torch.stack([tree.Rows(index, values, leaf.size).dense() for index, values in rows])

    return replies._replace(update=tree.map(table, replies.update))


def _portrait(thing: Any) -> dict[str, str]:
    """What it is made of, save for what it may work out once and keep; a model by its numbers too."""
    portrait = {}
    for name, value in vars(thing).items():
        if isinstance(getattr(type(thing), name, None), cached_property):
            continue
        module = getattr(value, "module", value)
        numbers = module.state_dict() if isinstance(module, nn.Module) else {}
        portrait[name] = f"{value!r} {[leaf.double().sum().item() for leaf in numbers.values()]}"
    return portrait


def _unchanged(before: dict[str, str], after: dict[str, str], message: str) -> None:
    changed = [name for name in before | after if before.get(name) != after.get(name)]
    assert not changed, f"{message}: {', '.join(changed)}"


def _equal(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor], message: str) -> None:
    assert before.keys() == after.keys(), f"{message}: {sorted(before.keys() ^ after.keys())}"
    for name, leaf in before.items():
        assert torch.equal(leaf, after[name]), f"{message}: {name}"


def _same(one: Replies, other: Replies, tolerance: float, when: str) -> None:
    assert one.ids == other.ids, f"{when}: {one.ids} answered, then {other.ids}"
    parts = [_leaves(_tables(replies)) for replies in (one, other)]
    assert parts[0].keys() == parts[1].keys(), f"{when}: leaves differ: {sorted(parts[0].keys() ^ parts[1].keys())}"
    for name, leaf in parts[0].items():
        shapes = tuple(leaf.shape), tuple(parts[1][name].shape)
        assert shapes[0] == shapes[1], f"{when}: {name} has shape {shapes[0]}, then {shapes[1]}"
        allowed = tolerance if leaf.is_floating_point() else 0.0
        difference = float((leaf.double() - parts[1][name].double()).abs().max()) if leaf.numel() else 0.0
        scale = max(1.0, float(leaf.double().abs().max())) if leaf.numel() else 1.0
        assert difference <= allowed * scale, (
            f"{when}: {name} differs by {difference:.3g}, allowed {allowed * scale:.3g}"
        )
