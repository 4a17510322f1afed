"""FedFACT in training: multipliers for global fairness, which the server raises and clients are charged by.

Wang et al., "FedFACT: A Provable Framework for Controllable Group-Fairness Calibration in Federated Learning", NeurIPS
2025, https://arxiv.org/abs/2506.03777, Algorithm 1. With p_k the clients' shares of the examples, D_u the deviation of
a group's rate from the pooled one over all clients, and lambda >= 0 a pair of multipliers for |D_u| <= tolerance:

    theta  <- theta + lr sum_k p_k (theta_k - theta)
    lambda <- Pi_B(lambda + step [D - tolerance; -D - tolerance])

Pi_B projects on sums of at most B. The local side is `clients.fedfact:FairSgd`, which tells how much of each group and
event its classifier took for the event's class; D is made of the sums over clients. What travels to clients, besides
theta, is the price of each group and event that follows from lambda (`fedsim.fairness.prices`).

Symbols: `dual_step` is the paper's eta_d, `bound` its B_d, `global_tolerance` its xi_g.

Differs from the paper: the tolerance is subtracted once, not once for each client, which would allow N times as much.
Deviations and prices are those of the clients asked so far, so that cohorts may be drawn.
"""

from dataclasses import dataclass
from functools import cached_property

import torch

from fedsim import tree
from fedsim.fairness import Events, Notion, ascend, deviations, events, prices
from fedsim.ranges import Count, NonNegative, Positive
from fedsim.strategy import Strategy
from fedsim.task import Metrics, Params, Replies, Task
from fedsim.tree import Tree


@dataclass(frozen=True)
class FedFact(Strategy):
    """Averages the clients' models, and raises the multipliers of what is unfair over all clients.

    Attributes:
        num_classes: K.
        num_groups: G.
        notion: which rates are to be the same for all groups.
        global_tolerance: how far a group's rate over all clients may be from the pooled one; None: as far as it likes.
        dual_step: of the multipliers.
        bound: of their sum.
        lr: how far the server goes from its model to the clients' mean.
    """

    num_classes: Count
    num_groups: Count
    notion: Notion = "demographic parity"
    global_tolerance: NonNegative | None = None
    dual_step: Positive = 0.1
    bound: Positive = 5.0
    lr: Positive = 1.0

    @cached_property
    def events(self) -> Events:
        """What the constraints are about: V rates."""
        return events(self.notion, self.num_classes)

    def init(self, params: Params) -> Tree:
        """The model, no multipliers, and nobody counted."""
        like = next(iter(params.values()))
        among = like.new_zeros((self.num_groups, len(self.events.classes)))
        return {
            "params": params,
            "dual": torch.stack([among, among]),
            "among": among.double(),  # a count over all rounds, which bfloat16 could not keep
            "examples": like.new_zeros((), dtype=torch.float64),
        }

    def configure(self, state: Tree, round: int) -> Task:
        """To train, at these prices."""
        share = state["among"] / state["examples"].clamp(min=1)
        price = prices(state["dual"][0] - state["dual"][1], share.to(state["dual"].dtype))
        return Task("train", {"params": state["params"], "price": price}, reduce="mean")

    def aggregate(self, state: Tree, task: Task, replies: Replies) -> tuple[Tree, Metrics]:
        """The mean model, and multipliers moved by the deviations of the classifiers that clients had."""
        params = tree.map(lambda old, mean: torch.lerp(old, mean, self.lr), state["params"], replies.update["params"])
        taken, among = replies.update["taken"], replies.update["among"]  # means over examples, (G, V)
        apart = deviations(taken, among)
        dual = state["dual"]
        if self.global_tolerance is not None:
            dual = ascend(dual, apart, self.global_tolerance, self.dual_step, self.bound)
        examples = replies.weight.double().sum()
        state = {
            "params": params,
            "dual": dual,
            "among": state["among"] + examples * among.double(),
            "examples": state["examples"] + examples,
        }
        return state, {"deviation": float(apart.abs().max()), "multipliers": float(dual.sum())}
