"""Active forgetting on what is to be forgotten alone: nothing that is kept is touched, nor needed.

"Federated Unlearning via Active Forgetting", Knowledge-Based Systems 316, 2025, https://arxiv.org/abs/2307.03363; the
formulas are a derivation (its protocol P1). Of a client's examples those that the request at hand names, D_f, are
trained on in batches, with the loss

    L_f = -mean sum_y q(y | x) log p(y | x),

q a new memory, in which neither the label occurs nor a class of which nothing is kept (`fedsim.forgetting.memory`), its
gradient clipped to a norm. Then, where lambda > 0, the parameters are pulled back to theta*, the model before
(`fedsim.forgetting.fisher`):

    theta <- theta* + (theta - theta*) / (1 + eta lambda Omega).

The server is `strategies.forget:Forget` with `alone = true`: it asks those who have something to forget, weighs their
models by how much that is, and stops when what they predict right of it, before they train, is little enough.

With `memory = "ascent"` this is unlearning by gradient ascent, for which Halimi, Kadhe, Rawat, Baracaldo, "Federated
Unlearning: How to Efficiently Erase a Client in FL?", 2022, https://arxiv.org/abs/2207.05521, is known.

Symbols: `teachers` is M, `batch_size` B, `lr` eta, `strength` lambda.

Differs from the paper: its exact formulas are not known to us. Memories are made once a round, for all of its epochs,
those of `clients.forget:ForgetWhileTraining` anew in each. The ascent is bound by the clipping and by when the server
stops, not by a ball around the other clients' models.
"""

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
class ForgetAlone(Client):
    """Stochastic gradient descent on new memories. The weight is the number of examples to be forgotten.

    Its metric "accuracy" is how many of these the model that it received predicts right.

    Attributes:
        model: its outputs are logits of the K classes.
        lr: of the descent.
        teachers: how many make a memory.
        temperature: of the teachers.
        clip: the largest norm of a gradient.
        memory: what is remembered instead, as in `clients.forget:ForgetWhileTraining`.
        strength: how much the model is pulled back to what it was before.
    """

    model: Model
    lr: Positive
    teachers: Count = 3
    temperature: Positive = 1.0
    clip: Positive = 5.0
    memory: Memory = "teacher"
    strength: NonNegative = 0.0

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
        """Those that are to be forgotten now, with the classes that are "forbidden" to their memories, (n, K)."""
        left = remaining(examples, shared)
        named = tree.take(left, (left["target"] == 1).nonzero().flatten())
        return named | {"forbidden": forbidden(self.model, named, shared)}

    def prepare(self, examples: Batch, rng: torch.Generator) -> Batch:
        """The examples, with new memories "q" (n, K)."""
        inputs, barred = examples[self.model.inputs], examples["forbidden"]
        q = memories(self.memory, self.model, inputs, barred, rng, self.teachers, self.temperature)
        return examples | {"q": q}

    def start(self, shared: Tree, personal: Tree, data: Batch) -> Tree:
        """The server's model."""
        zero = torch.zeros((), dtype=torch.float64)
        return {"params": shared["params"], "loss": zero, "right": zero, "shared": shared}

    def step(self, state: Tree, batch: Batch) -> Tree:
        """One step on the new memories' mean loss; and how many of the examples the server's model predicts right."""
        before = cast(Params | None, state["shared"].get("before"))

        def loss(params: Params) -> Tensor:
            outputs = self.model.outputs(params, batch)
            return mean(forgetting_losses(self.memory, self.model, outputs, batch, before), batch["mask"])

        value, slope = gradient(loss, state["params"])
        params, _ = self.optimiser.update(clipped(slope, self.clip), {}, state["params"])
        params = pull(params, state["shared"], self.lr, self.strength)
        guess = self.model.predict(state["shared"]["params"], batch).argmax(1)
        right = (batch["mask"] & (guess == batch[self.model.target])).sum()
        met = state["loss"] + value * batch["mask"].sum()
        return state | {"params": params, "loss": met, "right": state["right"] + right}

    def finish(self, shared: Tree, state: Tree, data: Batch) -> Reply:
        """The trained model, the mean loss met on the way, and how much the server's model still knew."""
        examples = data["mask"].sum()
        visits = (examples * self.epochs).clamp(min=1)
        metrics = {"loss": state["loss"] / visits, "accuracy": state["right"] / visits}
        return Reply({"params": state["params"]}, examples.to(state["loss"].dtype), metrics=metrics)
