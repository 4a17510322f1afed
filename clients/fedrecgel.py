"""FedRecGEL's local side: one user, its embedding, and gradients that look at how sharp the loss is around them.

"FedRecGEL: federated recommendation with generalised embedding learning", WWW 2026, https://arxiv.org/abs/2603.11503.
The scorer is neural collaborative filtering (He, Liao, Zhang, Nie, Hu, Chua, WWW 2017,
https://arxiv.org/abs/1708.05031): with user u's p, m and item i's q, n,

    score(u, i) = w^T [p * q; MLP([m; n])] + b.

p and m are the user's own, theta_ns, and never sent; all else is shared, theta_sh. In its round a user draws for each
item that it has `negatives` that it does not, and with the loss L on these rows

    eps_sh = rho_shared g_sh / |g_sh|,    sent:  grad_sh L(theta_sh + eps_sh, theta_ns)
    eps_ns = rho_own g_ns / |g_ns|,       theta_ns <- Adam(grad_ns L(theta_sh, theta_ns + eps_ns))

with g the gradient of L where it stands: one block is perturbed at a time, on the same rows. Radii of zero are FedNCF.
L is the sum, over rows in order cut into pieces of `piece`, of the pieces' mean binary cross entropies ("ref", as the
authors have it), or the mean over all rows ("mean").

Only items of the round have a gradient, so a user gathers their rows of the item tables, and sends as many. Which rows
it sends tells which items it has or drew; the rows themselves, what it thinks of them.

Symbols: `rho_shared` and `rho_own` are rho_sh and rho_ns, `dim` is D, `lr` the user's; Adam's state stays here.

Differs from the paper: nothing in what is computed. The authors' code steps a copy of theta_sh too, and drops it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from fedsim import tree
from fedsim.client import Client
from fedsim.model import Model, gradient
from fedsim.networks import seeded
from fedsim.optim import Optimiser, adam
from fedsim.ranges import Count, Natural, NonNegative, Positive, checked
from fedsim.ranking import Scorer
from fedsim.task import Batch, Params, Reply
from fedsim.tree import Rows, Tree

OWN = "user_"  # how the names of a user's own parameters begin
TABLES = ("item_gmf.weight", "item_mlp.weight")  # with a row for each item
SPREAD = 0.01  # standard deviation of embeddings at first


class Ncf(nn.Module):
    """Neural collaborative filtering for one user: items (B,) -> logits (B,)."""

    def __init__(self, num_items: int, dim: int, layers: int) -> None:
        super().__init__()
        wide = dim * 2 ** (layers - 1)
        self.user_gmf = nn.Parameter(SPREAD * torch.randn(dim))
        self.user_mlp = nn.Parameter(SPREAD * torch.randn(wide))
        self.item_gmf, self.item_mlp = nn.Embedding(num_items, dim), nn.Embedding(num_items, wide)
        parts: list[nn.Module] = []
        for layer in range(layers):
            into = 2 * wide // 2**layer
            parts += [nn.Linear(into, into // 2), nn.ReLU()]
        self.mlp, self.predict = nn.Sequential(*parts), nn.Linear(2 * dim, 1)
        for table in (self.item_gmf, self.item_mlp):
            nn.init.normal_(table.weight, std=SPREAD)
        for part in parts[::2]:
            assert isinstance(part, nn.Linear)
            nn.init.xavier_uniform_(part.weight)
            nn.init.zeros_(part.bias)
        nn.init.kaiming_uniform_(self.predict.weight, a=1, nonlinearity="sigmoid")
        nn.init.zeros_(self.predict.bias)

    def forward(self, items: Tensor) -> Tensor:
        """The logits (B,) of items (B,)."""
        # By indexing, because torch's embedding cannot be vectorised over tables without a row.
        narrow, wide = self.item_gmf.weight[items], self.item_mlp.weight[items]
        deep = self.mlp(torch.cat([self.user_mlp.expand_as(wide), wide], -1))
        logits: Tensor = self.predict(torch.cat([self.user_gmf * narrow, deep], -1))[:, 0]
        return logits


def cross_entropies(outputs: Tensor, targets: Tensor) -> Tensor:
    """The binary cross entropy of logits (B,) with labels 0 and 1, (B,)."""
    return binary_cross_entropy_with_logits(outputs, targets.to(outputs.dtype), reduction="none")


@checked
def scorer(num_items: Count, dim: Count = 32, layers: Count = 3, seed: Natural = 0) -> Model:
    """Neural collaborative filtering, for `num_items` items."""
    return Model(seeded(seed, lambda: Ncf(num_items, dim, layers)), cross_entropies, inputs="item", target="y")


@dataclass(frozen=True, kw_only=True)
class DualSam(Client):
    """One step of a user: the gradient of the shared parameters, and its own embedding moved. All users weigh the same.

    Attributes:
        model: scores items, such as `scorer` makes.
        lr: of the user's Adam.
        rho_shared: how far the shared parameters are moved before their gradient is taken.
        rho_own: how far the user's.
        negatives: drawn for each item that the user has.
        reduction: how rows become a loss.
        piece: rows that are averaged, for "ref".
    """

    model: Model
    lr: Positive
    rho_shared: NonNegative = 0.02
    rho_own: NonNegative = 0.02
    negatives: Natural = 4
    reduction: Literal["ref", "mean"] = "ref"
    piece: Count = 128
    batch_size: Count = 2**30  # its one step does nothing

    @cached_property
    def optimiser(self) -> Optimiser:
        """The rule by which a user moves its embedding."""
        return adam(self.lr)

    @cached_property
    def num_items(self) -> int:
        """I."""
        return len(self.model.params[TABLES[0]])

    def personal(self, rng: torch.Generator) -> Tree:
        """The user's embedding, drawn anew for each, and its Adam at rest."""
        own = {
            name: SPREAD * torch.randn(leaf.shape, generator=rng, dtype=torch.float64).to(leaf.dtype)
            for name, leaf in self.model.params.items()
            if name.startswith(OWN)
        }
        return {"own": own, "adam": self.optimiser.init(own)}

    def prepare(self, examples: Batch, rng: torch.Generator) -> Batch:
        """Each of its items in random order, followed by negatives; and the place where each item stands first."""
        has = examples["item"]
        has = has[torch.randperm(len(has), generator=rng)]
        drawn = draw(has, self.negatives, self.num_items, rng)
        item = torch.cat([has[:, None], drawn], 1).flatten()
        y = torch.zeros(len(has), 1 + self.negatives, dtype=torch.int64)
        y[:, 0] = 1
        return {"item": item, "y": y.flatten(), "first": first(item)}

    def start(self, shared: Tree, personal: Tree, data: Batch) -> Tree:
        """The three gradients, on the same rows."""
        mask, weight = data["mask"], self._weights(data["mask"])
        touched = dict(shared["params"]) | {name: shared["params"][name][data["item"]] for name in TABLES}

        def loss(held: Tree) -> Tensor:
            outputs = self.model.outputs(held["shared"] | held["own"], {"item": data["first"]})
            return (weight * torch.where(mask, self.model.criterion(outputs, data["y"]), 0)).sum()

        at = {"shared": touched, "own": personal["own"]}
        value, slope = gradient(loss, at)
        if self.rho_shared:
            moved = at | {"shared": climbed(at["shared"], slope["shared"], self.rho_shared)}
            slope = slope | {"shared": gradient(lambda part: loss(moved | {"shared": part}), moved["shared"])[1]}
        if self.rho_own:
            moved = at | {"own": climbed(at["own"], slope["own"], self.rho_own)}
            slope = slope | {"own": gradient(lambda part: loss(moved | {"own": part}), moved["own"])[1]}
        own, rest = self.optimiser.update(slope["own"], personal["adam"], personal["own"])
        return {"sent": slope["shared"], "own": own, "adam": rest, "loss": value.double()}

    def _weights(self, mask: Tensor) -> Tensor:
        """What each row's loss counts, (R,)."""
        size = mask.sum().double()  # whatever the model's type
        if self.reduction == "mean":
            return (1 / size.clamp(min=1)).expand(len(mask))
        piece = torch.arange(len(mask)) // self.piece
        return 1 / (size - piece * self.piece).clamp(1, self.piece)

    def step(self, state: Tree, batch: Batch) -> Tree:
        """All is done."""
        return state

    def finish(self, shared: Tree, state: Tree, data: Batch) -> Reply:
        """The gradient of what is shared, of the items' tables the rows of this round; the embedding stays here."""
        there = data["mask"].any()
        place = torch.where(data["mask"] & (data["first"] == torch.arange(len(data["first"]))), data["item"], -1)
        tables = {name: Rows(place, state["sent"][name], self.num_items) for name in TABLES}
        kept = {"own": state["own"], "adam": state["adam"]}
        return Reply({"params": state["sent"] | tables}, there.double(), kept, {"loss": state["loss"]})


def climbed(params: Params, slope: Params, radius: float) -> Params:
    """The point at this distance in the direction of steepest ascent; where there is none, the same point."""
    factor = radius / (tree.norm(slope) + 1e-12)
    return tree.map(lambda leaf, g: leaf + factor * g, params, slope)


def draw(has: Tensor, number: int, num_items: int, rng: torch.Generator) -> Tensor:
    """For each item that a user has, so many that it has not, (n, number), no two of them the same.

    Drawn again until they fit, so it costs what the user has, not what the catalogue holds.

    Raises:
        ValueError: there are not so many.
    """
    if len(has) and num_items - len(has) < number:
        raise ValueError(f"a user has {len(has)} of {num_items} items: there are not {number} others to draw")
    found = torch.randint(num_items, (len(has), number), generator=rng)
    while True:
        ordered, order = found.sort(1)
        twice = torch.zeros_like(found, dtype=torch.bool)
        twice.scatter_(1, order[:, 1:], ordered[:, 1:] == ordered[:, :-1])
        wrong = torch.isin(found, has) | twice
        if not wrong.any():
            return found
        found[wrong] = torch.randint(num_items, (int(wrong.sum()),), generator=rng)


def first(items: Tensor) -> Tensor:
    """The place where each item stands first, (R,)."""
    inverse = torch.unique(items, return_inverse=True)[1]
    place = torch.full((len(items),), len(items)).scatter_reduce(0, inverse, torch.arange(len(items)), "amin")
    return place[inverse]


@dataclass(frozen=True)
class NcfScores(Scorer):
    """What the shared parameters and the user's embedding say of items."""

    model: Model

    def __call__(self, shared: Tree, personal: Tree, items: Tensor) -> Tensor:
        """The logits (n,) of items (n,)."""
        params: Mapping[str, Tensor] = shared["params"] | personal["own"]
        return self.model.predict(dict(params), {"item": items})
