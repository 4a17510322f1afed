"""FairFed: clients whose fairness is far from that of all together count less.

Ezzeldin, Yan, He, Ferrara, Avestimehr, "FairFed: Enabling Group Fairness in Federated Learning", AAAI 2023,
https://arxiv.org/abs/2110.00857, Algorithm 1. With F_k how the server's model treats the groups at client k, and F how
it treats them over all clients:

    d_k  = |F_k - F|, or |accuracy_k - mean accuracy| where F_k is not defined
    u_k <- u_k - beta (d_k - mean d)
    w   <- sum_k u_k w_k / sum_k u_k

u_k starts at n_k / n. The local side is `clients.fairfed:ReweightedSgd`, which sends counts of what the server's model
decides, and trains with weights that make label and group independent.

Symbols: `beta` is the paper's fairness budget; 0 is FedAvg.

Differs from the paper: F is a difference of rates between two groups for one notion; for more of either, d_k is that of
the largest difference. u_k is kept above zero.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fedsim import tree
from fedsim.fairness import Events, Notion, events
from fedsim.ranges import Count, NonNegative
from fedsim.strategy import Strategy
from fedsim.task import Metrics, Params, Replies, Task
from fedsim.tree import Tree


@dataclass(frozen=True)
class FairFed(Strategy):
    """Averages the clients' models by weights that follow their fairness.

    Attributes:
        num_classes: K.
        num_clients: N.
        notion: which rates are to be the same for all groups.
        beta: how fast weights follow.
    """

    num_classes: Count
    num_clients: Count
    notion: Notion = "demographic parity"
    beta: NonNegative = 1.0

    @cached_property
    def events(self) -> Events:
        """What is compared between groups: V rates."""
        return events(self.notion, self.num_classes)

    def init(self, params: Params) -> Tree:
        """The model, and for each client no weight yet."""
        return {"params": params, "weight": torch.full((self.num_clients,), -1.0, dtype=torch.float64)}

    def configure(self, state: Tree, round: int) -> Task:
        """To train, and to send models and counts one by one."""
        return Task("train", {"params": state["params"]}, reduce="stack")

    def aggregate(self, state: Tree, task: Task, replies: Replies) -> tuple[Tree, Metrics]:
        """The models, averaged by weights that were moved before."""
        present = replies.weight > 0  # a client without examples has no model of its own
        if not present.any():
            return state, {}
        ids = torch.tensor(replies.ids)[present]
        size = replies.weight[present].double()
        update = tree.take(replies.update, present)
        taken, among = update["taken"].double(), update["among"].double()  # (C, G, V) counts
        local, whole = differences(taken, among), differences(taken.sum(0), among.sum(0))
        accuracy = update["correct"].double() / size
        unfair = (local - whole).abs().amax((1, 2))  # NaN where a rate is not defined
        distance = torch.where(unfair.isnan(), (accuracy - accuracy.mean()).abs(), unfair)
        before = state["weight"][ids]
        before = torch.where(before < 0, size / size.sum(), before)
        weight = (before - self.beta * (distance - distance.mean())).clamp(min=1e-6)
        params = tree.weighted_mean(update["params"], weight)
        told = {
            "deviation": float(distance.max()),
            "weight/min": float(weight.min()),
            "weight/max": float(weight.max()),
        }
        return {"params": params, "weight": state["weight"].index_copy(0, ids, weight)}, told


def differences(taken: Tensor, among: Tensor) -> Tensor:
    """Each group's rates less those of the first group, (..., G, V); NaN where one is not defined."""
    rates = taken / among
    return rates - rates[..., :1, :]
