"""FedFACT's local side after training: scores, prices, and the multipliers of local fairness.

Wang et al., "FedFACT: A Provable Framework for Controllable Group-Fairness Calibration in Federated Learning", NeurIPS
2025, https://arxiv.org/abs/2506.03777, Algorithm 2; and, for models that do not see the group, "Demystifying the
Optimal Fair Classifier in Multi-Class Classification", ICML 2026, https://arxiv.org/abs/2606.00656.

A model gives scores J[i, a, y] = P(group = a, label = y | x_i). One with K outputs is a model of the label: the group
is known, J is softmax(outputs) at the example's own group and zero elsewhere (attribute-aware, FedFACT). One with G K
outputs is a model of group and label together, a K + y: the group need not be known (attribute-blind, OptFair). With
the costs M(a) that follow from prices,

    f_ij = sum_a,y J[i, a, y] M(a)[y, j],

the prediction is argmax_j f_ij, or a draw from softmax(f_i / temperature). Labels are used nowhere.

A round of `Calibrate`: `steps` steps on mu_k, at given prices of the global constraints, towards the minimum of

    mean_i smax(f_i) + tolerance |mu_k|,   of slope tolerance -+ D(softmax(f / temperature)),

with smax(f) = temperature log sum_j exp(f_j / temperature); or, as in the paper, sum_j softmax(f / temperature)_j f_j,
which is not convex, and whose duality gap is not known.

Symbols: `local_tolerance` is the paper's xi_k, `bound` its B_d, `temperature` its beta, `steps` its R.

Differs from the paper: mu_k stands for its mu_k / p_k, p_k the client's share of all examples; the bound is on it. The
rates of equal opportunity and equalised odds are normalised by what the scores say of labels, not by counts of labels,
so that a constant classifier is fair by them. Steps follow from the curvature. A group and event in which the client
expects less than one example is left out of its own constraints, but not of what it tells of itself.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from fedsim.client import Client
from fedsim.evaluation import Classifier
from fedsim.fairness import (
    Events,
    Notion,
    accelerated,
    ascend,
    belonging,
    binding,
    charges,
    costs,
    curvature,
    deviations,
    events,
    slackness,
)
from fedsim.model import Model
from fedsim.ranges import Count, NonNegative, Positive, check_fields
from fedsim.task import Batch, Params, Reply
from fedsim.tree import Tree


@dataclass(frozen=True, kw_only=True)
class Measure(Client):
    """Tells how much falls under which event, by the scores of the model that it gets and keeps.

    Attributes:
        model: K outputs, or G K for a model of group and label together.
        num_classes: K.
        num_groups: G, of the column "a".
        notion: which rates are to be the same for all groups; the strategy's.
    """

    model: Model
    num_classes: Count
    num_groups: Count
    notion: Notion = "demographic parity"
    batch_size: Count = 2**30  # its one step does nothing

    def start(self, shared: Tree, personal: Tree, data: Batch) -> Tree:
        """The first and second moments of belonging to a group and an event."""
        found = events(self.notion, self.num_classes)
        scores = joint_scores(self.model, shared["params"], data, self.num_groups, self.num_classes)
        belongs = belonging(found, torch.where(data["mask"][:, None, None], scores, 0))  # (n, G, V)
        size = data["mask"].sum().clamp(min=1)
        return {"among": belongs.sum(0) / size, "second": torch.einsum("ngv,nhw->gvhw", belongs, belongs) / size}

    def step(self, state: Tree, batch: Batch) -> Tree:
        """All is done."""
        return state

    def finish(self, shared: Tree, state: Tree, data: Batch) -> Reply:
        """The moments; the model stays here, with what the client's own constraints need."""
        found = events(self.notion, self.num_classes)
        examples = data["mask"].sum()
        curved = curvature(found, state["second"], binding(state["among"], examples))
        kept = {"params": shared["params"], "among": state["among"], "curvature": curved}
        return Reply(state, examples.to(curved.dtype), kept)


@dataclass(frozen=True, kw_only=True)
class Calibrate(Client):
    """Improves the multipliers of its own constraints, and tells how its decisions then fall.

    Attributes:
        model: K outputs, or G K for a model of group and label together.
        num_classes: K.
        num_groups: G, of the column "a".
        notion: which rates are to be the same for all groups; the strategy's.
        local_tolerance: how far a group's rate at this client may be from the pooled one; None: as far as it likes.
        temperature: of the smooth maximum; the strategy's.
        smoothing: which smooth maximum.
        bound: of the sum of the multipliers.
        steps: on the multipliers, in a round.
    """

    model: Model
    num_classes: Count
    num_groups: Count
    notion: Notion = "demographic parity"
    local_tolerance: NonNegative | None = None
    temperature: Positive = 0.02
    smoothing: Literal["log-sum-exp", "boltzmann"] = "log-sum-exp"
    bound: Positive = 5.0
    steps: Count = 10
    batch_size: Count = 2**30  # its one step does nothing

    @cached_property
    def events(self) -> Events:
        """What the constraints are about: V rates."""
        return events(self.notion, self.num_classes)

    def personal(self, rng: torch.Generator) -> Tree:
        """What `Measure` is going to put there, and no multipliers."""
        params = self.model.params
        among = next(iter(params.values())).new_zeros((self.num_groups, len(self.events.classes)))
        cost = among.new_zeros((self.num_groups, self.num_classes, self.num_classes))
        kept = {"params": params, "among": among, "curvature": among.new_zeros(()), "cost": cost}
        dual = torch.stack([among, among])
        return kept | {"dual": dual, "ahead": dual, "momentum": among.new_ones(())}

    def start(self, shared: Tree, personal: Tree, data: Batch) -> Tree:
        """The steps on mu, and the decisions that follow."""
        among = binding(personal["among"], data["mask"].sum())
        scores = joint_scores(self.model, personal["params"], data, self.num_groups, self.num_classes)
        size = data["mask"].sum().clamp(min=1)
        belongs = belonging(self.events, torch.where(data["mask"][:, None, None], scores, 0)) / size  # (n, G, V)

        def taken(dual: Tensor) -> Tensor:
            """How much of each group and event is taken for the event's class at these multipliers, (G, V)."""
            price = shared["price"] + charges(dual[0] - dual[1], among)
            chosen = self._response(reward(scores, costs(self.events, price)))
            return torch.einsum("ngv,nv->gv", belongs, chosen[:, self.events.classes])

        kept = {name: personal[name] for name in ("dual", "ahead", "momentum", "among")}
        if self.local_tolerance is None:
            return kept | {"taken": taken(kept["dual"]), "gap": torch.zeros((), dtype=torch.float64)}
        step = self.temperature / personal["curvature"].clamp(min=1e-12)  # 1 / (2 L)
        for _ in range(self.steps):
            apart = deviations(taken(kept["ahead"]), among)
            new = ascend(kept["ahead"], apart, self.local_tolerance, step, self.bound)
            kept |= accelerated(kept["dual"], kept["ahead"], kept["momentum"], new, self.bound)
        found = taken(kept["dual"])
        gap = slackness(kept["dual"], deviations(found, among), self.local_tolerance, self.bound)
        return kept | {"taken": found, "gap": gap.double()}

    def _response(self, rewards: Tensor) -> Tensor:
        """The slope of the smooth maximum at each example's rewards, (n, K)."""
        chosen = (rewards / self.temperature).softmax(-1)
        if self.smoothing == "boltzmann":
            average = (chosen * rewards).sum(-1, keepdim=True)
            chosen = chosen * (1 + (rewards - average) / self.temperature)
        return chosen

    def step(self, state: Tree, batch: Batch) -> Tree:
        """All is done."""
        return state

    def finish(self, shared: Tree, state: Tree, data: Batch) -> Reply:
        """What is taken for what; the multipliers stay here, as does what they take from the reward of a decision."""
        kept = {name: state[name] for name in ("dual", "ahead", "momentum")}
        examples = data["mask"].sum()
        price = charges(state["dual"][0] - state["dual"][1], binding(state["among"], examples))
        kept["cost"] = costs(self.events, price)
        metrics = {"duality_gap": state["gap"]} if self.smoothing == "log-sum-exp" else {}
        update = {"taken": state["taken"], "among": state["among"]}
        return Reply(update, examples.to(state["taken"].dtype), kept, metrics)


@dataclass(frozen=True)
class Calibrated(Classifier):
    """What FedFACT predicts after calibration; before it, what the model does.

    Attributes:
        model: K outputs, or G K for a model of group and label together.
        num_classes: K.
        num_groups: G.
        randomised: draw from softmax(f / temperature), rather than take the largest f.
        temperature: of that; the strategy's.
    """

    model: Model
    num_classes: Count
    num_groups: Count
    randomised: bool = False
    temperature: Positive = 0.02

    def __post_init__(self) -> None:
        check_fields(self)

    def __call__(self, shared: Tree, personal: Tree, batch: Batch) -> Tensor:
        """P(predicted | example), (B, K)."""
        scores = joint_scores(self.model, shared["params"], batch, self.num_groups, self.num_classes)
        none = scores.new_zeros((self.num_groups, self.num_classes, self.num_classes))
        rewards = reward(scores, shared.get("cost", none) + personal.get("cost", none))
        if self.randomised:
            return (rewards / self.temperature).softmax(-1)
        return (rewards.argmax(-1)[:, None] == torch.arange(self.num_classes)).to(rewards.dtype)


def joint_scores(model: Model, params: Params, batch: Batch, num_groups: int, num_classes: int) -> Tensor:
    """J: P(group, label | example), (B, G, K).

    Raises:
        ValueError: the model has neither K nor G K outputs.
    """
    outputs = model.predict(params, batch)
    if outputs.shape[-1] == num_classes:
        own = batch["a"][:, None] == torch.arange(num_groups)
        return torch.where(own[:, :, None], outputs.softmax(-1)[:, None, :], 0)
    if outputs.shape[-1] == num_groups * num_classes:
        return outputs.softmax(-1).reshape(-1, num_groups, num_classes)
    raise ValueError(
        f"the model has {outputs.shape[-1]} outputs: must be num_classes = {num_classes}, or "
        f"num_groups * num_classes = {num_groups * num_classes} for a model of group and label together"
    )


def reward(scores: Tensor, cost: Tensor) -> Tensor:
    """f: what each decision is worth, (B, K), where `cost` (G, K, K) is taken from the identity."""
    return scores.sum(1) - torch.einsum("bgy,gyj->bj", scores, cost)
