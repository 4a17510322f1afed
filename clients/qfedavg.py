"""q-FedAvg's local side: the loss of the server's model, then plain training.

Li, Sanjabi, Beirami, Smith, "Fair Resource Allocation in Federated Learning", ICLR 2020,
https://arxiv.org/abs/1905.10497, Algorithm 2: client k sends w_k; F_k(w), the mean loss of the server's model on all
its examples before the first step; and L = 1 / lr.
"""

from dataclasses import dataclass
from functools import cached_property

import torch

from fedsim.client import Client
from fedsim.model import Model, mean
from fedsim.optim import Optimiser, sgd
from fedsim.ranges import Positive
from fedsim.task import Batch, Reply
from fedsim.tree import Tree


@dataclass(frozen=True)
class LossThenSgd(Client):
    """Measures the server's model, trains it, sends both. The weight is the number of examples."""

    model: Model
    lr: Positive

    @cached_property
    def optimiser(self) -> Optimiser:
        """The rule of a step."""
        return sgd(self.lr)

    def start(self, shared: Tree, personal: Tree, data: Batch) -> Tree:
        """The server's model."""
        return {"params": shared["params"]}

    def step(self, state: Tree, batch: Batch) -> Tree:
        """One step of gradient descent."""
        _, gradient = self.model.gradient(state["params"], batch)
        return {"params": self.optimiser.update(gradient, {}, state["params"])[0]}

    def finish(self, shared: Tree, state: Tree, data: Batch) -> Reply:
        """w_k, F_k(w) and L."""
        outputs = self.model.predict(shared["params"], data)
        loss = mean(self.model.criterion(outputs, data[self.model.target]), data["mask"])
        update = {"params": state["params"], "loss": loss, "lipschitz": torch.full_like(loss, 1 / self.lr)}
        return Reply(update, data["mask"].sum().to(loss.dtype), metrics={"loss": loss})
