"""Local training by stochastic gradient descent: the client of FedAvg, FedOpt and of most methods.

McMahan, Moore, Ramage, Hampson, Aguera y Arcas, "Communication-Efficient Learning of Deep Networks from Decentralized
Data", AISTATS 2017, https://arxiv.org/abs/1602.05629, ClientUpdate.
"""

from dataclasses import dataclass
from functools import cached_property

import torch

from fedsim.client import Client
from fedsim.model import Model
from fedsim.optim import Optimiser, sgd
from fedsim.ranges import NonNegative, Positive, Probability
from fedsim.task import Batch, Reply
from fedsim.tree import Tree


@dataclass(frozen=True)
class Sgd(Client):
    """Trains the server's model on the client's examples and sends what became of it.

    The weight is the number of examples.
    """

    model: Model
    lr: Positive
    momentum: Probability = 0.0
    weight_decay: NonNegative = 0.0

    @cached_property
    def optimiser(self) -> Optimiser:
        """The rule of a step."""
        return sgd(self.lr, self.momentum, self.weight_decay)

    def start(self, shared: Tree, personal: Tree, data: Batch) -> Tree:
        """The server's model, and the optimiser at rest."""
        params = shared["params"]
        loss = torch.zeros((), dtype=torch.float64)
        return {"params": params, "optimiser": self.optimiser.init(params), "loss": loss}

    def step(self, state: Tree, batch: Batch) -> Tree:
        """One step of the optimiser on the batch's mean loss."""
        loss, gradient = self.model.gradient(state["params"], batch)
        params, optimiser = self.optimiser.update(gradient, state["optimiser"], state["params"])
        return {"params": params, "optimiser": optimiser, "loss": state["loss"] + loss * batch["mask"].sum()}

    def finish(self, shared: Tree, state: Tree, data: Batch) -> Reply:
        """The trained model, and the mean loss met on the way."""
        examples = data["mask"].sum()
        loss = state["loss"] / (examples * self.epochs).clamp(min=1)
        return Reply({"params": state["params"]}, examples.to(loss.dtype), metrics={"loss": loss})
