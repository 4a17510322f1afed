"""FairFed's local side: counts of what the server's model decides, then training with debiasing weights.

Ezzeldin, Yan, He, Ferrara, Avestimehr, "FairFed: Enabling Group Fairness in Federated Learning", AAAI 2023,
https://arxiv.org/abs/2110.00857. Its debiasing is the reweighting of Kamiran, Calders, "Data preprocessing techniques
for classification without discrimination", 2012, https://doi.org/10.1007/s10115-011-0463-8: an example of group a and
label y weighs

    P(a) P(y) / P(a, y)

in the client's own data, so that label and group are independent.

Differs from the paper: nothing; `debias = false` leaves the weights at one.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fedsim.client import Client
from fedsim.fairness import Events, Notion, count, events, known
from fedsim.model import Model, gradient, mean
from fedsim.optim import Optimiser, sgd
from fedsim.ranges import Count, NonNegative, Positive, Probability
from fedsim.task import Batch, Params, Reply
from fedsim.tree import Tree


@dataclass(frozen=True)
class ReweightedSgd(Client):
    """Stochastic gradient descent on reweighted examples. The weight of the reply is the number of examples.

    Attributes:
        model: what is trained; its outputs are scores of the K classes.
        num_classes: K.
        num_groups: G, of the column "a".
        lr: of a step.
        notion: which rates are counted; the strategy's.
        debias: whether examples are reweighted.
    """

    model: Model
    num_classes: Count
    num_groups: Count
    lr: Positive
    momentum: Probability = 0.0
    weight_decay: NonNegative = 0.0
    notion: Notion = "demographic parity"
    debias: bool = True

    @cached_property
    def optimiser(self) -> Optimiser:
        """The rule of a step."""
        return sgd(self.lr, self.momentum, self.weight_decay)

    @cached_property
    def events(self) -> Events:
        """What is compared between groups: V rates."""
        return events(self.notion, self.num_classes)

    def start(self, shared: Tree, personal: Tree, data: Batch) -> Tree:
        """What the server's model decides, counted, and the weight of each group and label."""
        params = shared["params"]
        outputs = self.model.predict(params, data)
        labels = known(data, self.num_groups, self.num_classes, outputs.dtype)  # (n, G, K)
        decision = (outputs.argmax(-1)[:, None] == torch.arange(self.num_classes)).to(outputs.dtype)
        taken, among = count(self.events, labels, decision)
        cell = labels.sum(0)  # (G, K)
        expected = cell.sum(1, keepdim=True) * cell.sum(0) / data["mask"].sum().clamp(min=1)
        weight = torch.where(cell > 0, expected / cell.clamp(min=1), 1) if self.debias else torch.ones_like(cell)
        return {
            "params": params,
            "optimiser": self.optimiser.init(params),
            "weight": weight,
            "counts": {"taken": taken, "among": among, "correct": (labels.sum(1) * decision).sum()},
            "loss": torch.zeros((), dtype=torch.float64),
        }

    def step(self, state: Tree, batch: Batch) -> Tree:
        """One step on the batch's mean reweighted loss."""

        def loss(params: Params) -> Tensor:
            losses = self.model.criterion(self.model.outputs(params, batch), batch[self.model.target])
            return mean(losses * state["weight"][batch["a"], batch["y"]], batch["mask"])

        value, slope = gradient(loss, state["params"])
        params, optimiser = self.optimiser.update(slope, state["optimiser"], state["params"])
        total = state["loss"] + value * batch["mask"].sum()
        return state | {"params": params, "optimiser": optimiser, "loss": total}

    def finish(self, shared: Tree, state: Tree, data: Batch) -> Reply:
        """The trained model, and what was counted before."""
        examples = data["mask"].sum()
        loss = state["loss"] / (examples * self.epochs).clamp(min=1)
        update = {"params": state["params"]} | state["counts"]
        return Reply(update, examples.to(loss.dtype), metrics={"loss": loss})
