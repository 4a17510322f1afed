"""Neural collaborative filtering: scores a user's items by a product and a perceptron, side by side.

He, Liao, Zhang, Nie, Hu, Chua, "Neural Collaborative Filtering", WWW 2017, https://arxiv.org/abs/1708.05031. With user
u's p, m and item i's q, n,

    score(u, i) = w^T [p * q; MLP([m; n])] + b.

One module is one user: p and m, whose names begin with "user_", are its own; the tables "item_gmf" and "item_mlp" have
a row for each item.

Symbols: p and q are `user_gmf` and `item_gmf`, m and n `user_mlp` and `item_mlp`, w and b `predict`, `dim` is D.

Differs from the paper: without a sigmoid, which is in the loss; trained from the start, not put together out of two
models that were trained alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from fedsim.model import Model
from fedsim.networks import seeded
from fedsim.ranges import Count, Natural, checked
from fedsim.ranking import Scorer
from fedsim.tree import Tree

OWN, ITEM = "user_", "item_"  # how the names of a user's own parameters, and of tables with a row for each item, begin
SPREAD = 0.01  # standard deviation of embeddings at first


class Ncf(nn.Module):
    """Neural collaborative filtering for one user: items (B,) -> logits (B,)."""

    def __init__(self, num_items: int, dim: int, layers: int) -> None:
        super().__init__()
        wide = dim * 2 ** (layers - 1)
        self.user_gmf, self.user_mlp = embedding(dim), embedding(wide)
        self.item_gmf, self.item_mlp = embedding(num_items, dim), embedding(num_items, wide)
        self.mlp = nn.ModuleList(nn.Linear(2 * wide // 2**layer, wide // 2**layer) for layer in range(layers))
        self.predict = nn.Linear(2 * dim, 1)
        for part in self.mlp:
            assert isinstance(part, nn.Linear)
            nn.init.xavier_uniform_(part.weight)
            nn.init.zeros_(part.bias)
        nn.init.kaiming_uniform_(self.predict.weight, a=1, nonlinearity="sigmoid")
        nn.init.zeros_(self.predict.bias)

    def forward(self, items: Tensor | slice) -> Tensor:
        """The logits (B,) of items (B,)."""
        narrow, wide = self.item_gmf[items], self.item_mlp[items]
        weights = [(layer.weight, layer.bias) for layer in self.mlp if isinstance(layer, nn.Linear)]
        mine, theirs = weights[0][0].chunk(2, 1)
        # What the user brings to the first layer is the same for all items.
        hidden = torch.addmm(weights[0][1] + mine @ self.user_mlp, wide, theirs.T).relu_()
        for weight, bias in weights[1:]:
            hidden = torch.addmm(bias, hidden, weight.T).relu_()
        gmf, deep = self.predict.weight[0].chunk(2)
        return narrow @ (gmf * self.user_gmf) + hidden @ deep + self.predict.bias


def embedding(*shape: int) -> nn.Parameter:
    """Numbers near zero."""
    return nn.Parameter(torch.randn(shape).mul_(SPREAD))


def cross_entropies(outputs: Tensor, targets: Tensor) -> Tensor:
    """The binary cross entropy of logits with labels 0 and 1, of the same shape."""
    return binary_cross_entropy_with_logits(outputs, targets.to(outputs.dtype), reduction="none")


@checked
def scorer(num_items: Count, dim: Count = 32, layers: Count = 3, seed: Natural = 0) -> Model:
    """Neural collaborative filtering, for `num_items` items."""
    return Model(seeded(seed, lambda: Ncf(num_items, dim, layers)), cross_entropies, inputs="item", target="y")


def table_size(model: Model) -> int:
    """I, of a model with tables of items.

    Raises:
        ValueError: it has none.
    """
    parameters = dict(model.module.named_parameters())
    sizes = {len(leaf) for name, leaf in parameters.items() if name.startswith(ITEM)}
    if len(sizes) != 1:
        raise ValueError(
            f"model: a recommender's model must have tables of one length whose names begin with {ITEM!r}, "
            f"it has {', '.join(parameters) or 'no parameters'}"
        )
    return sizes.pop()


@dataclass(frozen=True)
class ModelScores(Scorer):
    """What the shared parameters and the user's own say of items."""

    model: Model

    def __call__(self, shared: Tree, personal: Tree, items: Tensor) -> Tensor:
        """The logits (n,) of items (n,)."""
        params: Mapping[str, Tensor] = shared["params"] | personal["own"]
        return self.model.predict(dict(params), {"item": items})
