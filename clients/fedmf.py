"""FedMF: matrix factorisation, of which each user keeps its own factors.

Chai, Wang, Chen, Yang, "Secure Federated Matrix Factorization", IEEE Intelligent Systems 2021,
https://arxiv.org/abs/1906.05108, without its encryption. With user u's p and item i's q,

    score(u, i) = p^T q.

On the user's side is `clients.fedrecgel:DualSam` with both radii zero and `rule = "sgd"`: it sends the gradients
of the items' q, and takes a step of gradient descent on its p. The server averages what it is sent.

Symbols: p and q are `user_factors` and `item_factors`, `dim` is how many there are of each.

Differs from the paper: trained on which items a user has, by binary cross entropy against drawn negatives, not on
ratings by squared error; no weight decay; the server's step is Adam's (`strategies.fedrecgel:FedRecGel`), as for the
methods that it is compared with.
"""

import torch
from torch import Tensor, nn

from clients.ncf import cross_entropies
from fedsim.model import Model
from fedsim.networks import seeded
from fedsim.ranges import Count, Natural, Positive, checked


class Factors(nn.Module):
    """Matrix factorisation for one user: items (B,) -> logits (B,)."""

    def __init__(self, num_items: int, dim: int, spread: float) -> None:
        super().__init__()
        self.user_factors = nn.Parameter(torch.randn(dim).mul_(spread))
        self.item_factors = nn.Parameter(torch.randn(num_items, dim).mul_(spread))

    def forward(self, items: Tensor | slice) -> Tensor:
        """The logits (B,) of items (B,)."""
        return self.item_factors[items] @ self.user_factors


@checked
def factors(num_items: Count, dim: Count = 32, spread: Positive = 0.01, seed: Natural = 0) -> Model:
    """Matrix factorisation for `num_items` items, its first factors normal with the standard deviation `spread`."""
    return Model(seeded(seed, lambda: Factors(num_items, dim, spread)), cross_entropies, inputs="item", target="y")
