"""SCAFFOLD: control variates that take the drift out of local training.

Karimireddy, Kale, Mohri, Reddi, Stich, Suresh, "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning",
ICML 2020, https://arxiv.org/abs/1910.06378, Algorithm 1. With S the cohort, x the model, c the server's control
variate, and y_k and the change dc_k of its own control variate from client k:

    x <- x + lr mean_{k in S} (y_k - x)
    c <- c + |S| / N mean_{k in S} dc_k

`lr` is the paper's eta_g. The local side is `clients.scaffold:ControlledSgd`, whose replies all weigh the same, as in
the paper. A client's control variate stays with it.

Differs from the paper: nothing.
"""

from dataclasses import dataclass

import torch

from fedsim import tree
from fedsim.ranges import Count, Positive
from fedsim.strategy import Strategy
from fedsim.task import Metrics, Params, Replies, Task
from fedsim.tree import Tree


@dataclass(frozen=True)
class Scaffold(Strategy):
    """The server's side of SCAFFOLD.

    Attributes:
        num_clients: N, clients in all.
        lr: the server's step size, eta_g.
    """

    num_clients: Count
    lr: Positive = 1.0

    def init(self, params: Params) -> Tree:
        """The model, and a control variate of zero."""
        return {"params": params, "control": tree.map(torch.zeros_like, params)}

    def configure(self, state: Tree, round: int) -> Task:
        """To train, corrected by the server's control variate."""
        return Task("train", {"params": state["params"], "control": state["control"]}, reduce="mean")

    def aggregate(self, state: Tree, task: Task, replies: Replies) -> tuple[Tree, Metrics]:
        """Both, moved by what the clients changed."""
        share = len(replies.ids) / self.num_clients
        params = tree.map(lambda x, y: torch.lerp(x, y, self.lr), state["params"], replies.update["params"])
        control = tree.map(lambda c, dc: c + share * dc, state["control"], replies.update["control"])
        return {"params": params, "control": control}, {"control/norm": float(tree.norm(control))}
