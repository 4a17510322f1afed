"""Active forgetting on the client: what is to be forgotten is trained away while the rest is trained on.

"Federated Unlearning via Active Forgetting", Knowledge-Based Systems 316, 2025, https://arxiv.org/abs/2307.03363; the
formulas are a derivation, in which all clients take part (its protocol P2). Of a client's examples those that the
request at hand names in the column "target", D_f, are to be forgotten, the others, D_r, to be kept. With
nb = max(1, ceil(n_r / B)), step i has retained examples i B to (i + 1) B, and ceil(n_f / nb) of those to be forgotten,
while there are some, and descends

    mean CE over the retained + beta L_f,    L_f = -mean sum_y q(y | x) log p(y | x)  over the others,

q a new memory, in which neither the label occurs nor a class of which nothing is kept (`fedsim.forgetting.memory`), its
gradient clipped to a norm. Then, where lambda > 0, the parameters are pulled back to theta*, the model before
(`fedsim.forgetting.fisher`):

    theta <- theta* + (theta - theta*) / (1 + eta lambda Omega).

A client without anything to forget trains as with `clients.sgd:Sgd` (with the same clipping); one without anything to
keep takes one step. The server is `strategies.forget:Forget`, which averages, and sends theta* and Omega where needed.

Symbols: `beta` is beta, `teachers` M, `batch_size` B, `lr` eta, `strength` lambda.

Differs from the paper: its exact formulas are not known to us.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import torch
from torch import Tensor

from fedsim import tree
from fedsim.client import Client
from fedsim.forgetting import (
    AT_HAND,
    NEED_BEFORE,
    Memory,
    expected,
    forbidden,
    forgetting_losses,
    memories,
    pull,
    remaining,
)
from fedsim.model import Model, gradient, mean
from fedsim.optim import Optimiser, clipped, sgd
from fedsim.ranges import Count, NonNegative, Positive
from fedsim.task import Batch, Params, Reply
from fedsim.tree import Tree


@dataclass(frozen=True, kw_only=True)
class ForgetWhileTraining(Client):
    """Stochastic gradient descent on what is kept, and on new memories of what is not. The weight is all examples.

    Attributes:
        model: its outputs are logits of the K classes.
        lr: of the descent.
        beta: what the new memories count.
        teachers: how many make a memory.
        temperature: of the teachers.
        clip: the largest norm of a gradient.
        memory: what is remembered instead: what random teachers say ("teacher"), what the model said before, but for
            the label ("self"), the mean of both ("mix"); or, to compare with, another label, drawn ("random"), all
            others alike ("uniform"), or nothing: the loss is ascended ("ascent").
        strength: how much the model is pulled back to what it was before.
    """

    model: Model
    lr: Positive
    beta: NonNegative = 1.0
    teachers: Count = 3
    temperature: Positive = 1.0
    clip: Positive = 5.0
    memory: Memory = "teacher"
    strength: NonNegative = 0.0

    @property
    def ordered(self) -> bool:
        """Yes: what is forgotten is spread evenly over the steps."""
        return True

    @property
    def needs(self) -> tuple[str, ...]:
        """What is to be forgotten."""
        return (self.model.inputs, self.model.target, "target")

    @property
    def expects(self) -> dict[str, str]:
        """Which request is at hand, and what is needed of the model before."""
        return AT_HAND | expected(self.memory in NEED_BEFORE, self.strength)

    @cached_property
    def optimiser(self) -> Optimiser:
        """The rule of a step."""
        return sgd(self.lr)

    def select(self, examples: Batch, shared: Tree) -> Batch:
        """Those that no request before has named, with the classes that are "forbidden" to their memories, (n, K)."""
        left = remaining(examples, shared)
        return left | {"forbidden": forbidden(self.model, left, shared)}

    def prepare(self, examples: Batch, rng: torch.Generator) -> Batch:
        """The examples of all epochs, with new memories "q" (n, K) for those to be forgotten, and their "step"."""
        epochs = [self._epoch(examples, rng) for _ in range(self.epochs)]
        before = 0
        for epoch in epochs:
            epoch["step"] = epoch["step"] + before
            before += int(epoch["step"].max() - before + 1) if len(epoch["step"]) else 0
        return {name: torch.cat([epoch[name] for epoch in epochs]) for name in epochs[0]}

    def _epoch(self, examples: Batch, rng: torch.Generator) -> Batch:
        order = torch.randperm(len(examples["target"]), generator=rng)
        target = examples["target"][order] == 1
        kept, gone = order[~target], order[target]
        steps = max(1, math.ceil(len(kept) / self.batch_size))
        each = max(1, math.ceil(len(gone) / steps))
        step = torch.cat([torch.arange(len(kept)) // self.batch_size, torch.arange(len(gone)) // each])
        rows = tree.take(examples, torch.cat([kept, gone]))
        inputs, barred = rows[self.model.inputs][len(kept) :], rows["forbidden"][len(kept) :]
        q = memories(self.memory, self.model, inputs, barred, rng, self.teachers, self.temperature)
        q = torch.cat([q.new_zeros(len(kept), q.shape[1]), q])
        return rows | {"q": q, "step": step}

    def start(self, shared: Tree, personal: Tree, data: Batch) -> Tree:
        """The server's model."""
        return {"params": shared["params"], "loss": torch.zeros((), dtype=torch.float64), "shared": shared}

    def step(self, state: Tree, batch: Batch) -> Tree:
        """One step on the retained examples' mean loss and the new memories'."""
        gone = batch["mask"] & (batch["target"] == 1)
        kept = batch["mask"] & ~gone
        before = cast(Params | None, state["shared"].get("before"))

        def loss(params: Params) -> Tensor:
            outputs = self.model.outputs(params, batch)
            plain = mean(self.model.criterion(outputs, batch[self.model.target]), kept)
            return plain + self.beta * mean(forgetting_losses(self.memory, self.model, outputs, batch, before), gone)

        value, slope = gradient(loss, state["params"])
        params, _ = self.optimiser.update(clipped(slope, self.clip), {}, state["params"])
        params = pull(params, state["shared"], self.lr, self.strength)
        return state | {"params": params, "loss": state["loss"] + value * batch["mask"].sum()}

    def finish(self, shared: Tree, state: Tree, data: Batch) -> Reply:
        """The trained model, and the mean loss met on the way."""
        visits = data["mask"].sum()
        loss = state["loss"] / visits.clamp(min=1)
        return Reply({"params": state["params"]}, (visits / self.epochs).to(loss.dtype), metrics={"loss": loss})
