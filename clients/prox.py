"""FedProx: local training that is held near the server's model.

Li, Sahu, Zaheer, Sanjabi, Talwalkar, Smith, "Federated Optimization in Heterogeneous Networks", MLSys 2020,
https://arxiv.org/abs/1812.06127, eq. 2. Client k minimises

    F_k(w) + mu / 2 |w - w_server|^2

`mu` is the paper's mu. mu = 0 is `clients.sgd:Sgd`.

Differs from the paper: all clients run the same number of epochs; uneven work comes from uneven data.
"""

from dataclasses import dataclass
from functools import cached_property

import torch

from fedsim import tree
from fedsim.client import Client
from fedsim.model import Model
from fedsim.optim import Optimiser, sgd
from fedsim.ranges import NonNegative, Positive
from fedsim.task import Batch, Reply
from fedsim.tree import Tree


@dataclass(frozen=True)
class Prox(Client):
    """Stochastic gradient descent with a proximal term. The weight is the number of examples."""

    model: Model
    lr: Positive
    mu: NonNegative = 0.01

    @cached_property
    def optimiser(self) -> Optimiser:
        """The rule of a step."""
        return sgd(self.lr)

    def start(self, shared: Tree, personal: Tree, data: Batch) -> Tree:
        """The server's model, which is also the anchor."""
        return {"params": shared["params"], "anchor": shared["params"], "loss": torch.zeros((), dtype=torch.float64)}

    def step(self, state: Tree, batch: Batch) -> Tree:
        """One step on the batch's mean loss plus the proximal term, whose gradient is mu (w - anchor)."""
        loss, gradient = self.model.gradient(state["params"], batch)
        if self.mu:
            pull = tree.map(torch.sub, state["params"], state["anchor"])
            gradient = tree.map(lambda g, d: torch.add(g, d, alpha=self.mu), gradient, pull)
        params, _ = self.optimiser.update(gradient, {}, state["params"])
        return state | {"params": params, "loss": state["loss"] + loss * batch["mask"].sum()}

    def finish(self, shared: Tree, state: Tree, data: Batch) -> Reply:
        """The trained model, and the mean loss met on the way (without the proximal term)."""
        examples = data["mask"].sum()
        loss = state["loss"] / (examples * self.epochs).clamp(min=1)
        return Reply({"params": state["params"]}, examples.to(loss.dtype), metrics={"loss": loss})
