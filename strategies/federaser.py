"""FedEraser: a model is trained, what clients sent is kept, and without the target it is all done again, but shorter.

Liu, Ma, Yang, Wang, Liu, "FedEraser: Enabling Efficient Client-Level Data Removal from Federated Learning Models",
IWQoS 2021, https://doi.org/10.1109/IWQOS52092.2021.9521274. A client's update says how far to go and in which
direction; how far is taken from history, the direction from a little training without the target:

1. "train", for `training` rounds: federated averaging. Of the rounds t_j = 1, 1 + Delta t, ..., S = floor(E / Delta t)
   of them, every client's update U_k^t is kept.
2. "calibrate", one round for each of these, from the initial model M on: those who took part then train on what is
   kept of their examples, for fewer epochs than they did, and send Uhat_k. With n_k how many examples these are,

       U~_k = |U_k^t| Uhat_k / |Uhat_k|,      M <- M + sum_k n_k U~_k / sum_k n_k.

3. "repair", for `repairing` rounds: federated averaging on what is kept.

The examples that any request names in the column "target" are dealt with together, and are touched no more after 1. The
local side is any client that sends its model, such as `clients.sgd:Sgd` for "train" and, for the other two,
`clients.retained:Retained` around it.

History is what this needs: S N P numbers in the state and in each checkpoint, and updates one by one in the rounds that
are kept and in those that calibrate. Hence it cannot begin from another run's model, which has none.

Symbols: `training` is E, `interval` Delta t; r is the ratio of the epochs of the clients that calibrate and that train.

Differs from the paper: what is removed are examples, not a client, so all clients calibrate, the first round's updates
too, which here have seen the target, and clients count by the examples that they have left. The norm is of each
parameter tensor, as in the authors' code, which takes it of the mean of all clients; the paper's formula is for each
client, and does not say of what. The paper's mean has one more factor, 1 / (K - 1), which would make it no mean.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim import tree
from fedsim.forgetting import at_hand
from fedsim.ranges import Count, Natural
from fedsim.strategy import Strategy
from fedsim.task import Metrics, Params, Replies, Task
from fedsim.tree import Tree


@dataclass(frozen=True)
class FedEraser(Strategy):
    """Trains, rebuilds the model from calibrated updates, repairs; then it is done.

    Attributes:
        num_clients: N.
        training: rounds of federated averaging before.
        num_targets: how many values the column "target" has: one for what is kept, and one for each request.
        interval: the updates of every so many-th round are kept.
        repairing: rounds after.
    """

    num_clients: Count
    training: Count
    num_targets: Count = 2
    interval: Count = 2
    repairing: Natural = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_targets < 2:
            raise ValueError("num_targets must be at least 2, what is kept and a request: nothing is to be forgotten")
        if self.interval > self.training:
            raise ValueError(f"interval must be at most training = {self.training}, got {self.interval}")

    @property
    def actions(self) -> tuple[str, ...]:
        """What follows upon training."""
        return ("calibrate", "repair") if self.repairing else ("calibrate",)

    def shares(self, action: str) -> tuple[str, ...]:
        """Which request is at hand."""
        return ("params",) if action == "train" else ("params", "request", "deleted")

    def init(self, params: Params) -> Tree:
        """The model, and an empty history."""
        history = (self.training // self.interval, self.num_clients)  # (S, N)
        none = torch.zeros((), dtype=torch.int64)
        return {
            "params": params,
            "rebuilt": params,  # what becomes of the initial model without the target
            "updates": tree.map(lambda leaf: leaf.new_zeros((*history, *leaf.shape)), params),
            "present": torch.zeros(history, dtype=torch.bool),  # whose updates these are
            "trained": none,  # rounds
            "calibrated": none,  # rounds of the history, those included in which nobody was there
            "repaired": none,  # rounds
        }

    def configure(self, state: Tree, round: int) -> Task:
        """To train, or, without the target, to calibrate or to repair; nobody, where a loop goes on after that."""
        if state["trained"] < self.training:
            return Task("train", {"params": state["params"]}, reduce="mean" if self._slot(state) is None else "stack")
        last = self.num_targets - 1
        told = at_hand(last, last)
        if self._remaining(state):
            present = state["present"][int(state["calibrated"])]
            shared = {"params": state["rebuilt"]} | told
            return Task("calibrate", shared, present.nonzero().flatten().tolist(), reduce="stack")
        return Task("repair", {"params": state["params"]} | told, () if self.done(state) else None, reduce="mean")

    def aggregate(self, state: Tree, task: Task, replies: Replies) -> tuple[Tree, Metrics]:
        """The mean model, in some rounds kept together with what it is the mean of; or one more calibrated step."""
        if task.action == "train":
            return self._train(state, replies), {}
        told: Metrics = {"request": self.num_targets - 1}
        if task.action == "calibrate":
            return self._calibrate(state, replies), told
        params = replies.update["params"] if bool(replies.weight.sum() > 0) else state["params"]
        return state | {"params": params, "repaired": state["repaired"] + 1}, told

    def done(self, state: Tree) -> bool:
        """Whether all phases are over."""
        trained = bool(state["trained"] >= self.training)
        return trained and not self._remaining(state) and bool(state["repaired"] >= self.repairing)

    def _slot(self, state: Tree) -> int | None:
        """Where in the history the round that is due to train is kept, if it is."""
        slot, beyond = divmod(int(state["trained"]), self.interval)
        return slot if not beyond and slot < len(state["present"]) else None

    def _remaining(self, state: Tree) -> bool:
        """Whether there is more of the history to calibrate."""
        return int(state["calibrated"]) < len(state["present"])

    def _train(self, state: Tree, replies: Replies) -> Tree:
        params = replies.update["params"]
        after = state | {"trained": state["trained"] + 1}
        if (slot := self._slot(state)) is not None:
            place = (torch.tensor(slot), torch.tensor(replies.ids))
            moved = tree.map(torch.sub, params, state["params"])
            after["updates"] = tree.map(lambda kept, own: kept.index_put(place, own), state["updates"], moved)
            after["present"] = state["present"].index_put(place, replies.weight > 0)
            params = tree.weighted_mean(params, replies.weight)
        if bool(replies.weight.sum() > 0):  # else there is nothing to learn from
            after["params"] = params
        if after["trained"] < self.training:
            return after
        if not after["present"].any():
            raise ValueError("in none of the rounds that are kept a client had examples: there is no history")
        return after | {"calibrated": _next(after["present"], 0)}

    def _calibrate(self, state: Tree, replies: Replies) -> Tree:
        place = (state["calibrated"], torch.tensor(replies.ids))
        kept = tree.map(lambda leaf: leaf[place], state["updates"])
        now = tree.map(torch.sub, replies.update["params"], state["rebuilt"])
        step = tree.weighted_mean(tree.map(calibrated, kept, now), replies.weight)
        some = bool(replies.weight.sum() > 0)
        rebuilt = tree.map(torch.add, state["rebuilt"], step) if some else state["rebuilt"]
        later = _next(state["present"], int(state["calibrated"]) + 1)
        return state | {"params": rebuilt, "rebuilt": rebuilt, "calibrated": later}


def calibrated(kept: Tensor, now: Tensor) -> Tensor:
    """|kept_k| now_k / |now_k| for each of C clients, leaves (C, ...); zero where `now_k` is."""
    far, length = (leaf[:, None].flatten(1).norm(dim=1).reshape(-1, *[1] * (now.ndim - 1)) for leaf in (kept, now))
    return torch.where(length > 0, far / length, 0) * now


def _next(present: Tensor, slot: int) -> Tensor:
    """The first round of the history, from `slot` on, in which there was somebody; or S."""
    there = present.any(1)
    there[:slot] = False
    return there.int().argmax() if bool(there.any()) else torch.tensor(len(present))
