"""q-FedAvg: clients with a higher loss weigh more, so that accuracy is spread more evenly over clients.

Li, Sanjabi, Beirami, Smith, "Fair Resource Allocation in Federated Learning", ICLR 2020,
https://arxiv.org/abs/1905.10497, Algorithm 2. It minimises sum_k p_k F_k(w)^(q+1) / (q+1), F_k the loss of client k:

    D_k = L (w - w_k)                                      L = 1 / lr of the clients, w_k what client k made of w
    h_k = q F_k^(q-1) |D_k|^2 + L F_k^q
    w  <- w - sum_k F_k^q D_k / sum_k h_k

The local side is `clients.qfedavg:LossThenSgd`, which also sends F_k(w), the loss before
training, and its L.

Differs from the paper: F_k is kept above 1e-10, as in the authors' code, so that q < 1 has no pole at a loss of zero.
As in the paper clients count alike however many examples they have (it samples them by size); so q = 0 is the plain
mean of the clients' models.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim import tree
from fedsim.ranges import NonNegative
from fedsim.strategy import Strategy
from fedsim.task import Metrics, Replies, Task
from fedsim.tree import Tree


@dataclass(frozen=True)
class QFedAvg(Strategy):
    """The server's side of q-FedAvg.

    Attributes:
        q: 0 is FedAvg with equal weights; the larger, the more even the clients' losses.
    """

    q: NonNegative = 1.0

    def configure(self, state: Tree, round: int) -> Task:
        """To train, and to send model and loss one by one: the step is no mean of the models."""
        return Task("train", {"params": state["params"]}, reduce="stack")

    def aggregate(self, state: Tree, task: Task, replies: Replies) -> tuple[Tree, Metrics]:
        """One step of Algorithm 2."""
        present = replies.weight > 0  # (C,), a client without examples has no loss
        if not present.any():
            return state, {}
        update = tree.take(replies.update, present)
        lipschitz = update["lipschitz"]  # (C,)
        change = tree.map(lambda w, w_k: scaled(w - w_k, lipschitz), state["params"], update["params"])  # (C, ...)
        loss = update["loss"].clamp(min=1e-10)  # (C,)
        square = sum_of_squares(change)  # (C,)
        most = loss.max()  # F_k^q would leave float32's range; (F_k / most)^q does not, and most^q cancels
        ratio = loss / most
        height = self.q * ratio ** (self.q - 1) * square / most + lipschitz * ratio**self.q  # (C,)
        share = ratio**self.q / height.sum()
        params = tree.map(lambda w, d: w - torch.tensordot(share.to(d.dtype), d, 1), state["params"], change)
        return {"params": params}, {"loss/min": float(loss.min()), "loss/max": float(loss.max())}


def scaled(stacked: Tensor, factor: Tensor) -> Tensor:
    """Each client's tensor (C, ...) times its factor (C,)."""
    return stacked * factor.to(stacked.dtype).reshape(-1, *[1] * (stacked.ndim - 1))


def sum_of_squares(stacked: Tree) -> Tensor:
    """The squared norm of each client's tree, (C,)."""
    return torch.stack([leaf.flatten(1).square().sum(1) for leaf in tree.flatten(stacked).values()]).sum(0)
