"""FedAvg: the new model is the mean of the clients' models.

McMahan, Moore, Ramage, Hampson, Aguera y Arcas, "Communication-Efficient Learning of Deep Networks from Decentralized
Data", AISTATS 2017, https://arxiv.org/abs/1602.05629, Algorithm 1:

    w <- w + lr (sum_k n_k w_k / sum_k n_k - w)

with w the model, w_k what client k made of it and n_k its weight, the number of its examples.

FedProx (Li, Sahu, Zaheer, Sanjabi, Talwalkar, Smith, "Federated Optimization in Heterogeneous Networks", MLSys 2020,
https://arxiv.org/abs/1812.06127) is this strategy with the client `clients.prox:Prox`.

Differs from the paper: `lr`, the server's learning rate; the paper has lr = 1, the default.
"""

from dataclasses import dataclass

import torch

from fedsim import tree
from fedsim.ranges import Positive
from fedsim.strategy import Strategy
from fedsim.task import Metrics, Replies, Task
from fedsim.tree import Tree


@dataclass(frozen=True)
class FedAvg(Strategy):
    """Averages the clients' models by weight.

    Attributes:
        lr: how far the server goes from its model to their mean; 1 is the mean itself.
    """

    lr: Positive = 1.0

    def aggregate(self, state: Tree, task: Task, replies: Replies) -> tuple[Tree, Metrics]:
        """The server's model, moved towards the mean."""
        # lerp, unlike w + lr (mean - w), is exactly the mean at lr = 1.
        params = tree.map(lambda old, mean: torch.lerp(old, mean, self.lr), state["params"], replies.update["params"])
        return {"params": params}, {}
