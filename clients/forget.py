"""Active forgetting on the client: what is to be forgotten is trained away while the rest is trained on.

"Federated Unlearning via Active Forgetting", Knowledge-Based Systems 316, 2025, https://arxiv.org/abs/2307.03363; the
formulas are a derivation, in which all clients take part (its protocol P2). Of a client's examples those with 1 in the
column "target", D_f, are to be forgotten, the others, D_r, to be kept. With nb = max(1, ceil(n_r / B)), step i has
retained examples i B to (i + 1) B, and ceil(n_f / nb) of those to be forgotten, while there are some, and descends

    mean CE over the retained + beta L_f,    L_f = -mean sum_y q(y | x) log p(y | x)  over the others,

q a new memory in which the label does not occur (`fedsim.forgetting:new_memories`), its gradient clipped to a norm.

A client without anything to forget trains as with `clients.sgd:Sgd` (with the same clipping); one without anything to
keep takes one step. The server averages (`strategies.fedavg:FedAvg`), starting from the model that is to forget.

Symbols: `beta` is beta, `teachers` M, `batch_size` B, `lr` eta.

Differs from the paper: its exact formulas are not known to us.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from fedsim import tree
from fedsim.client import Client
from fedsim.forgetting import new_memories
from fedsim.model import Model, gradient, mean
from fedsim.optim import Optimiser, sgd
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
    """

    model: Model
    lr: Positive
    beta: NonNegative = 1.0
    teachers: Count = 3
    temperature: Positive = 1.0
    clip: Positive = 5.0

    @property
    def ordered(self) -> bool:
        """Yes: what is forgotten is spread evenly over the steps."""
        return True

    @property
    def needs(self) -> tuple[str, ...]:
        """What is to be forgotten."""
        return (self.model.inputs, self.model.target, "target")

    @cached_property
    def optimiser(self) -> Optimiser:
        """The rule of a step."""
        return sgd(self.lr)

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
        nothing = {self.model.inputs: examples[self.model.inputs][:0]}
        q = torch.zeros(len(order), self.model.predict(self.model.params, nothing).shape[1])
        seeds = torch.randint(2**62, (self.teachers,), generator=rng).tolist()
        if len(gone):
            inputs, labels = examples[self.model.inputs][gone], examples[self.model.target][gone]
            q[len(kept) :] = new_memories(self.model, inputs, labels, seeds, self.temperature).to(q.dtype)
        return rows | {"q": q, "step": step}

    def start(self, shared: Tree, personal: Tree, data: Batch) -> Tree:
        """The server's model."""
        return {"params": shared["params"], "loss": torch.zeros((), dtype=torch.float64)}

    def step(self, state: Tree, batch: Batch) -> Tree:
        """One step on the retained examples' mean loss and the new memories'."""
        gone = batch["mask"] & (batch["target"] == 1)
        kept = batch["mask"] & ~gone

        def loss(params: Params) -> Tensor:
            outputs = self.model.outputs(params, batch)
            plain = mean(self.model.criterion(outputs, batch[self.model.target]), kept)
            return plain + self.beta * mean(-(batch["q"] * log_softmax(outputs, 1)).sum(1), gone)

        value, slope = gradient(loss, state["params"])
        factor = (self.clip / tree.norm(slope).clamp(min=1e-12)).clamp(max=1)
        params, _ = self.optimiser.update(tree.map(lambda leaf: leaf * factor, slope), {}, state["params"])
        return {"params": params, "loss": state["loss"] + value * batch["mask"].sum()}

    def finish(self, shared: Tree, state: Tree, data: Batch) -> Reply:
        """The trained model, and the mean loss met on the way."""
        visits = data["mask"].sum()
        loss = state["loss"] / visits.clamp(min=1)
        return Reply({"params": state["params"]}, (visits / self.epochs).to(loss.dtype), metrics={"loss": loss})
