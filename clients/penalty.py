"""Training with a fairness penalty: what a client can do by itself for demographic parity, with FedAvg at the server.

Padala, Gujar, "FNNC: Achieving Fairness through Neural Networks", IJCAI 2020, https://arxiv.org/abs/1811.00247. Over a
batch,

    CE + penalty (max_a m_a - min_a m_a),    m_a the mean score in group a, of the groups that are in the batch;

the score is P(second class), or P(each class), summed over.

Differs from the paper: the penalty has a fixed weight, not a multiplier that is raised; there are two groups.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fedsim.client import Client
from fedsim.model import Model, gradient, mean
from fedsim.optim import Optimiser, adam
from fedsim.ranges import Count, Decay, NonNegative, Positive
from fedsim.task import Batch, Params, Reply
from fedsim.transport import class_scores
from fedsim.tree import Tree


@dataclass(frozen=True)
class PenalisedAdam(Client):
    """Adam on the loss and a penalty for mean scores that differ between groups. The weight is its examples.

    Attributes:
        model: its outputs are logits of the K classes.
        num_groups: G, of the column "a".
        lr: of Adam, which is new in every round.
        penalty: what a difference of one costs; 0: nothing.
    """

    model: Model
    num_groups: Count
    lr: Positive
    penalty: NonNegative
    beta1: Decay = 0.9
    beta2: Decay = 0.999
    weight_decay: NonNegative = 0.0

    @cached_property
    def optimiser(self) -> Optimiser:
        """The rule of a step."""
        return adam(self.lr, self.beta1, self.beta2, weight_decay=self.weight_decay)

    def start(self, shared: Tree, personal: Tree, data: Batch) -> Tree:
        """The server's model, and the optimiser at rest."""
        params = shared["params"]
        loss = torch.zeros((), dtype=torch.float64)
        return {"params": params, "optimiser": self.optimiser.init(params), "loss": loss}

    def step(self, state: Tree, batch: Batch) -> Tree:
        """One step of Adam on the batch's mean loss and its penalty."""

        def loss(params: Params) -> Tensor:
            outputs = self.model.outputs(params, batch)
            accuracy = mean(self.model.criterion(outputs, batch[self.model.target]), batch["mask"])
            member = (batch["a"][:, None] == torch.arange(self.num_groups)) & batch["mask"][:, None]  # (B, G)
            return accuracy + self.penalty * spread(class_scores(outputs), member).sum()

        value, slope = gradient(loss, state["params"])
        params, optimiser = self.optimiser.update(slope, state["optimiser"], state["params"])
        return {"params": params, "optimiser": optimiser, "loss": state["loss"] + value * batch["mask"].sum()}

    def finish(self, shared: Tree, state: Tree, data: Batch) -> Reply:
        """The trained model, and the mean loss met on the way."""
        examples = data["mask"].sum()
        loss = state["loss"] / (examples * self.epochs).clamp(min=1)
        return Reply({"params": state["params"]}, examples.to(loss.dtype), metrics={"loss": loss})


def spread(scores: Tensor, member: Tensor) -> Tensor:
    """The largest mean score of a group less the smallest, (S,); zero where there is one group only.

    Args:
        scores: (B, S).
        member: whether an example is in a group, (B, G).
    """
    size = member.sum(0)  # (G,)
    means = member.to(scores.dtype).T @ scores / size.clamp(min=1)[:, None]  # (G, S)
    there = (size > 0)[:, None]
    most, least = torch.where(there, means, -torch.inf).amax(0), torch.where(there, means, torch.inf).amin(0)
    return torch.where(there.any(), most - least, 0)
