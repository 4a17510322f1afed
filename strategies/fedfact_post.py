"""FedFACT after training: prices on decisions that make any trained classifier fair, found without labels.

Wang et al., "FedFACT: A Provable Framework for Controllable Group-Fairness Calibration in Federated Learning", NeurIPS
2025, https://arxiv.org/abs/2506.03777, Algorithm 2. With scores eta of a trained model, the costs M(a, k) that follow
from the multipliers lambda (global) and mu_k (of client k), and p_k the clients' shares of the examples:

    min_lambda sum_k p_k min_mu_k  mean_i smax(M(a_i, k)^T eta_i) + xi_g |lambda| + xi_k |mu_k|,    |.| <= B

1. "train", only for the first `training` rounds: federated averaging.
2. "measure", once: clients get the model and tell how much of each group falls under each event by their scores, and
   the second moments of that, (U, U), of which the step 1 / (2 L) follows.
3. "calibrate", every other round: clients get the price of each group and event, |U| numbers, improve their mu_k, and
   tell how much is taken for each event's class out of how much, 2 |U| numbers, of which the gradient follows.

The local side is `clients.fedfact_post`: `Measure`, `Calibrate`, and the classifier that comes out, `Calibrated`.

With global constraints alone all clients decide alike. With local ones each has a classifier of its own: one for all
of them would need P(client | x, group), which no client can tell.

Symbols: `global_tolerance` is the paper's xi_g, `bound` its B_d, `temperature` its beta.

Differs from the paper: lambda is extrapolated as in Nesterov's method, started anew when that leads uphill, and steps
follow from the curvature. It ends when the duality gap is small. Prices travel down, not multipliers: half as many
numbers. A group and event in which all clients together expect less than one example binds nothing: it has no
multiplier, is in no pooled rate, and is charged nothing. Else its price, up to bound / P(group, event), would rule.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from fedsim import tree
from fedsim.fairness import (
    Events,
    Notion,
    accelerated,
    ascend,
    binding,
    charges,
    costs,
    curvature,
    deviations,
    events,
    slackness,
)
from fedsim.method import averages
from fedsim.ranges import Count, Natural, NonNegative, Positive
from fedsim.runs import trained
from fedsim.strategy import Strategy
from fedsim.task import Metrics, Params, Replies, Task
from fedsim.tree import Tree


@dataclass(frozen=True)
class FedFactPost(Strategy):
    """Finds the prices at which a trained model is fair over all clients.

    Attributes:
        num_classes: K.
        num_groups: G.
        num_clients: N.
        notion: which rates are to be the same for all groups.
        global_tolerance: how far a group's rate over all clients may be from the pooled one; None: as far as it likes.
        bound: of the sum of the multipliers.
        temperature: of the smooth maximum.
        gap: the duality gap at which it ends; 0: it goes on for as many rounds as there are.
        training: rounds of federated averaging before.
        from_run: the directory of a run whose last model is taken, or a folder of runs: of these, the latest with the
            same seed; or a checkpoint.
        seed: of the run.
    """

    num_classes: Count
    num_groups: Count
    num_clients: Count
    notion: Notion = "demographic parity"
    global_tolerance: NonNegative | None = None
    bound: Positive = 5.0
    temperature: Positive = 0.02
    gap: NonNegative = 1e-4
    training: Natural = 0
    from_run: Path | None = None
    seed: Natural = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.training and self.from_run is not None:
            raise ValueError(f"training = {self.training} and from_run = {str(self.from_run)!r}: there can be one only")

    @cached_property
    def events(self) -> Events:
        """What the constraints are about: V rates."""
        return events(self.notion, self.num_classes)

    @property
    def actions(self) -> tuple[str, ...]:
        """What follows upon training."""
        return ("measure", "calibrate")

    def init(self, params: Params) -> Tree:
        """The trained model, and no multipliers."""
        if self.from_run is not None:
            params = tree.restore(trained(self.from_run, self.seed), params, f"the model of {self.from_run}")
        like = next(iter(params.values()))
        among = like.new_zeros((self.num_groups, len(self.events.classes)))
        return {
            "params": params,
            "dual": torch.stack([among, among]),  # lambda
            "ahead": torch.stack([among, among]),  # lambda extrapolated: what prices are made of
            "momentum": like.new_ones(()),
            "curvature": like.new_zeros(()),  # of the smooth maximum, times 2 temperature
            "gap": like.new_full((), torch.inf),
            "among": among,  # P(group, label in event) by the scores, where that binds
            "measured": torch.zeros(self.num_clients, dtype=torch.bool),
        }

    def configure(self, state: Tree, round: int) -> Task:
        """What is due: to train, to measure, or to calibrate; the latter two are asked of all."""
        if round <= self.training:
            return Task("train", {"params": state["params"]}, reduce="mean")
        if not state["measured"].any():
            return Task("measure", {"params": state["params"]}, range(self.num_clients), reduce="mean")
        ids = state["measured"].nonzero().flatten().tolist()
        return Task("calibrate", {"price": self._price(state)}, ids, reduce="mean")

    def aggregate(self, state: Tree, task: Task, replies: Replies) -> tuple[Tree, Metrics]:
        """The mean model, the step size, or the next multipliers."""
        if task.action == "train":
            return state | {"params": replies.update["params"]}, {}
        if task.action == "measure":
            among = binding(replies.update["among"], replies.weight.sum())
            curved = curvature(self.events, replies.update["second"], among)
            measured = state["measured"].index_fill(0, torch.tensor(replies.ids), True)
            return state | {"among": among, "curvature": curved, "measured": measured}, {}
        return self._descend(state, replies)

    def done(self, state: Tree) -> bool:
        """Whether the duality gap is small enough."""
        return bool(state["gap"] <= self.gap)

    def shared(self, state: Tree) -> Tree:
        """The model, and what the prices take from the reward of each decision."""
        return {"params": state["params"], "cost": costs(self.events, self._price(state))}

    def _price(self, state: Tree) -> Tensor:
        return charges(state["ahead"][0] - state["ahead"][1], state["among"])

    def _descend(self, state: Tree, replies: Replies) -> tuple[Tree, Metrics]:
        """One step of Nesterov's method on lambda."""
        ahead, dual, momentum = state["ahead"], state["dual"], state["momentum"]
        among = torch.where(state["among"] > 0, replies.update["among"], 0)
        apart = deviations(replies.update["taken"], among)
        whole = len(replies.ids) == state["measured"].sum()  # of fewer it is not the gap of all
        gap = averages(replies).get("duality_gap", math.inf) if whole else math.inf
        if self.global_tolerance is not None:
            gap += float(slackness(ahead, apart, self.global_tolerance, self.bound))
        told = {"duality_gap": gap, "deviation": float(apart.abs().max()), "multipliers": float(ahead.sum())}
        state = state | {"gap": torch.full_like(state["gap"], gap)}
        if gap <= self.gap or self.global_tolerance is None:  # stay where this was found
            return state, told
        step = self.temperature / state["curvature"].clamp(min=1e-12)  # 1 / (2 L)
        new = ascend(ahead, apart, self.global_tolerance, step, self.bound)
        return state | accelerated(dual, ahead, momentum, new, self.bound), told
