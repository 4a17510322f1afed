"""FedOpt: adaptive optimisers at the server, fed with the mean change of the clients' models.

Reddi, Charles, Zaheer, Garrett, Rush, Konecny, Kumar, McMahan, "Adaptive Federated Optimization", ICLR 2021,
https://arxiv.org/abs/2003.00295, Algorithm 2. With d = mean_k (w_k - w), by the clients' weights:

    m <- beta1 m + (1 - beta1) d
    v <- v + d^2                                  adagrad
    v <- v - (1 - beta2) d^2 sign(v - d^2)        yogi
    v <- beta2 v + (1 - beta2) d^2                adam
    w <- w + lr m / (sqrt(v) + tau)

and for momentum (FedAvgM: Hsu, Qi, Brown, 2019, https://arxiv.org/abs/1909.06335)

    m <- beta1 m + d;   w <- w + lr m.

Symbols: `lr` is the paper's eta, `tau` its degree of adaptivity, `beta1` and `beta2` its decays. v starts at tau^2.

Differs from the paper: nothing; as there, moments are not corrected for their start. Adagrad keeps the paper's m too
(beta1 = 0 switches it off).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fedsim import tree
from fedsim.ranges import Decay, Positive
from fedsim.strategy import Strategy
from fedsim.task import Metrics, Params, Replies, Task
from fedsim.tree import Tree


@dataclass(frozen=True)
class FedOpt(Strategy):
    """A server optimiser on the mean change of the clients' models.

    Attributes:
        optimiser: which of the four rules.
        lr: the server's step size, eta.
        beta1: decay of the first moment.
        beta2: decay of the second moment (adam and yogi).
        tau: added to the root of the second moment; the smaller, the more adaptive.
    """

    optimiser: Literal["adam", "yogi", "adagrad", "momentum"] = "adam"
    lr: Positive = 0.01
    beta1: Decay = 0.9
    beta2: Decay = 0.99
    tau: Positive = 1e-3

    def init(self, params: Params) -> Tree:
        """The model, a first moment of zero and, for adaptive rules, a second moment of tau^2."""
        state = {"params": params, "first": tree.map(torch.zeros_like, params)}
        if self.optimiser != "momentum":
            state["second"] = tree.map(lambda leaf: torch.full_like(leaf, self.tau**2), params)
        return state

    def aggregate(self, state: Tree, task: Task, replies: Replies) -> tuple[Tree, Metrics]:
        """One step of the optimiser."""
        change = tree.map(torch.sub, replies.update["params"], state["params"])
        if self.optimiser == "momentum":
            first = tree.map(lambda m, d: self.beta1 * m + d, state["first"], change)
            return {"params": tree.map(lambda w, m: w + self.lr * m, state["params"], first), "first": first}, {}
        first = tree.map(lambda m, d: self.beta1 * m + (1 - self.beta1) * d, state["first"], change)
        second = tree.map(self._second, state["second"], change)
        params = tree.map(lambda w, m, v: w + self.lr * m / (v.sqrt() + self.tau), state["params"], first, second)
        return {"params": params, "first": first, "second": second}, {}

    def _second(self, v: Tensor, d: Tensor) -> Tensor:
        square = d * d
        if self.optimiser == "adagrad":
            return v + square
        if self.optimiser == "yogi":
            return v - (1 - self.beta2) * square * torch.sign(v - square)
        return self.beta2 * v + (1 - self.beta2) * square
