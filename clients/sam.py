"""Sharpness-aware minimisation: gradients that look at how sharp the loss is around them, for any client.

SAM: Foret, Kleiner, Mobahi, Neyshabur, "Sharpness-Aware Minimization for Efficiently Improving Generalization", ICLR
2021, https://arxiv.org/abs/2010.01412. Where the loss L has the gradient g at w, the gradient is taken uphill instead:

    eps = rho g / |g|,    SAM(w) = grad L(w + eps)

ASAM: Kwon, Kim, Park, Choi, "ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant Learning of Deep Neural
Networks", ICML 2021, https://arxiv.org/abs/2102.11600. Each parameter is moved as its own size allows, so that weights
that are rescaled while the loss stays are moved to where the loss is the same (if eta = 0):

    T_w = diag(|w| + eta),    eps = rho T_w^2 g / |T_w g|,    that is |T_w^-1 eps| = rho

`sam` and `asam` make such a gradient of any function that gives a loss and its gradient. `Sam` is local training with
one of them, as in FedSAM (Qu, Li, Duan, Liu, Tang, Lu, "Generalized Federated Learning via Sharpness Aware
Minimization", ICML 2022, https://arxiv.org/abs/2206.02618) and in FedSAM and FedASAM (Caldarola, Caputo, Ciccone,
"Improving Generalization in Federated Learning by Seeking Flat Minima", ECCV 2022, https://arxiv.org/abs/2203.11834).

`rho` and `eta` are the papers' rho and eta. rho = 0 is `clients.sgd:Sgd`.

Differs from the papers: T_w is that of all parameters; the code of ASAM's authors has ones for biases. The server is
whichever strategy is chosen: neither the momentum of Qu et al. (MoFedSAM) nor the averaging over rounds of Caldarola et
al. (SWA) is here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fedsim import tree
from fedsim.client import Client
from fedsim.model import Model
from fedsim.optim import Optimiser, sgd
from fedsim.ranges import NonNegative, Positive, Probability, checked
from fedsim.task import Batch, Reply
from fedsim.tree import Tree

Slope = Callable[[Tree], tuple[Tensor, Tree]]  # parameters -> (loss (), its gradient, which is a tree like them)


@checked
def sam(slope: Slope, rho: NonNegative) -> Slope:
    """The loss where one stands, and the gradient at a distance of `rho` in the direction of steepest ascent.

    Where the gradient is zero there is no such direction, and it is the gradient where one stands. A model that draws
    (dropout) draws for each of the two gradients.
    """
    return _uphill(slope, rho, lambda _: 1.0)


@checked
def asam(slope: Slope, rho: NonNegative, eta: NonNegative = 0.01) -> Slope:
    """The same with distances measured in the sizes of the parameters, |w| + eta."""
    return _uphill(slope, rho, lambda leaf: leaf.abs() + eta)


def _uphill(slope: Slope, rho: float, size: Callable[[Tensor], Tensor | float]) -> Slope:
    """As `asam` does, with T_w = diag(size(w))."""

    def sharp(params: Tree) -> tuple[Tensor, Tree]:
        loss, gradient = slope(params)
        sizes = tree.map(size, params)
        scaled = tree.map(lambda s, g: s * g, sizes, gradient)
        norm = tree.norm(tree.map(Tensor.double, scaled))  # float32 has no squares of small gradients
        unit = torch.where(norm > 0, norm, 1)  # where it is zero, so is what is divided
        climbed = tree.map(lambda w, s, g: w + rho * s * (g / unit.to(g.dtype)), params, sizes, scaled)
        return loss, slope(climbed)[1]

    return sharp if rho else slope


@dataclass(frozen=True)
class Sam(Client):
    """Stochastic gradient descent on sharpness-aware gradients. The weight is the number of examples.

    Weight decay is added where one stands, and the loss that is told is that of the model itself.

    Attributes:
        model: what is trained.
        lr: of a step.
        rho: how far uphill the gradient is taken; usual are 0.05 to 0.1 for SAM, 0.5 to 2 for ASAM.
        momentum: of a step.
        weight_decay: of a step.
        adaptive: ASAM instead of SAM.
        eta: ASAM's, which lets parameters of zero move.
    """

    model: Model
    lr: Positive
    rho: NonNegative
    momentum: Probability = 0.0
    weight_decay: NonNegative = 0.0
    adaptive: bool = False
    eta: NonNegative = 0.01

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
        """One step of the optimiser with the sharpness-aware gradient of the batch's mean loss."""

        def slope(params: Tree) -> tuple[Tensor, Tree]:
            return self.model.gradient(params, batch)

        sharp = asam(slope, self.rho, self.eta) if self.adaptive else sam(slope, self.rho)
        loss, gradient = sharp(state["params"])
        params, optimiser = self.optimiser.update(gradient, state["optimiser"], state["params"])
        return {"params": params, "optimiser": optimiser, "loss": state["loss"] + loss * batch["mask"].sum()}

    def finish(self, shared: Tree, state: Tree, data: Batch) -> Reply:
        """The trained model, and the mean loss met on the way."""
        examples = data["mask"].sum()
        loss = state["loss"] / (examples * self.epochs).clamp(min=1)
        return Reply({"params": state["params"]}, examples.to(loss.dtype), metrics={"loss": loss})
