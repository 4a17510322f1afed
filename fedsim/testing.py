"""Conformance tests for plug-ins: run them on your own clients and strategies.

def test_my_client():
    check_client(MyClient(model, lr=0.1), {"params": model.params})
"""

import copy
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

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
    """
    ids = list(range(federation.num_clients))
    whole = Federation(federation.columns, federation.rows, _all_in(federation, client.split))
    alone = Sequential(whole, {"check": client}, seed)
    near = max((TOLERANCE.get(leaf.dtype, 0.0) for leaf in tree.flatten(shared).values()), default=1e-5)
    before, told = copy.deepcopy((tree.flatten(shared), whole.columns)), repr(client)
    first = _execute(alone, client, shared, ids, seed)
    _equal(before[0], tree.flatten(shared), "the client changed what it was sent")
    _equal(before[1], whole.columns, "the client changed its examples")
    assert repr(client) == told, f"the client changed itself: {told} became {client!r}"
    _same(first, _execute(alone, client, shared, ids, seed), 0.0, "twice the same task")
    sent = tree.flatten({"update": first.update, "personal": first.personal, "metrics": first.metrics})
    for name, leaf in sent.items():
        assert not leaf.requires_grad, f"{name} requires a gradient: detach what is sent"
    if client.stochastic or type(client).run is not Client.run:
        return
    for block in (1, 2, len(ids)):
        together = _execute(Vectorised(whole, {"check": client}, seed, block), client, shared, ids, seed)
        _same(first, together, near, f"alone and vectorised in blocks of {block}")
    backwards = _execute(Vectorised(whole, {"check": client}, seed, 3), client, shared, ids[::-1], seed)
    _same(first, _in_order(backwards, first.ids), near, "in another order")


def check_strategy(strategy: Strategy, params: Params, replies: Replies) -> None:
    """Raises AssertionError unless the strategy is pure and its state keeps its names and shapes."""
    state = strategy.init(params)
    task = strategy.configure(state, 1)
    before = copy.deepcopy((tree.flatten(state), tree.flatten(replies.update)))
    after, _ = strategy.aggregate(state, task, replies)
    _equal(before[0], tree.flatten(state), "aggregate changed the state that it was given")
    _equal(before[1], tree.flatten(replies.update), "aggregate changed the replies that it was given")
    tree.restore(tree.flatten(after), state, "the state after aggregate")
    again, _ = strategy.aggregate(state, task, replies)
    _equal(tree.flatten(after), tree.flatten(again), "aggregate gave two answers to the same replies")


def _all_in(federation: Federation, split: str) -> NDArray[np.int64]:
    """Bounds that put all examples into one part, so that a client of any split has work."""
    start, end = federation.bounds[:, 0], federation.bounds[:, 3]
    cut = {"train": (end, end), "validation": (start, end), "test": (start, start)}[split]
    return np.stack([start, *cut, end], axis=1)


def _execute(engine: Engine, client: Client, shared: Tree, ids: Sequence[int], seed: int) -> Replies:
    personal = Personal({"check": client}, max(ids) + 1, seed).gather(ids)
    kept = copy.deepcopy(tree.flatten(personal))
    replies = engine.execute(Task("check", shared, round=1), Cohort(list(ids), personal))
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


def _equal(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor], message: str) -> None:
    assert before.keys() == after.keys(), f"{message}: {sorted(before.keys() ^ after.keys())}"
    for name, leaf in before.items():
        assert torch.equal(leaf, after[name]), f"{message}: {name}"


def _same(one: Replies, other: Replies, tolerance: float, when: str) -> None:
    assert one.ids == other.ids, f"{when}: {one.ids} answered, then {other.ids}"
    parts = [
        tree.flatten({"update": r.update, "personal": r.personal, "metrics": r.metrics, "weight": r.weight})
        for r in (one, other)
    ]
    assert parts[0].keys() == parts[1].keys(), f"{when}: leaves differ: {sorted(parts[0].keys() ^ parts[1].keys())}"
    for name, leaf in parts[0].items():
        if name.endswith("@index"):
            continue  # padding may differ
        allowed = tolerance if leaf.is_floating_point() else 0.0
        difference = float((leaf.double() - parts[1][name].double()).abs().max()) if leaf.numel() else 0.0
        scale = max(1.0, float(leaf.double().abs().max())) if leaf.numel() else 1.0
        assert difference <= allowed * scale, (
            f"{when}: {name} differs by {difference:.3g}, allowed {allowed * scale:.3g}"
        )
