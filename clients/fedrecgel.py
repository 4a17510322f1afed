"""FedRecGEL's local side: one user, its embedding, and gradients that look at how sharp the loss is around them.

"FedRecGEL: federated recommendation with generalised embedding learning", WWW 2026, https://arxiv.org/abs/2603.11503.
The scorer is neural collaborative filtering (`clients.ncf:scorer`), of which the user's embeddings are its own,
theta_ns, and never sent; all else is shared, theta_sh. In its round a user draws for each item that it has `negatives`
that it does not, and with the loss L on these rows

    eps_sh = rho_shared g_sh / |g_sh|,    sent:  grad_sh L(theta_sh + eps_sh, theta_ns)
    eps_ns = rho_own g_ns / |g_ns|,       theta_ns <- Adam(grad_ns L(theta_sh, theta_ns + eps_ns))

with g the gradient of L where it stands: one block is perturbed at a time, on the same rows. Radii of zero are FedNCF.
L is the sum, over rows in order cut into pieces of `piece`, of the pieces' mean binary cross entropies ("ref", as the
authors have it), or the mean over all rows ("mean").

Only items of the round have a gradient, so a user gathers their rows of the item tables, and sends as many.

What that gives away. The rows that a user sends tell which items it has or drew, and their values which of the two.

- `decoys` sends rows of so many other items as well, chosen at random each round (pseudo-items: Wu, Wu, Cao, Huang,
  Xie, "FedGNN", 2021, https://arxiv.org/abs/2102.04925). Their gradient is zero, which everybody sees who sees the
  values: without noise they hide nothing from the server, only from one who sees which rows are sent, and not what is
  in them. Over many rounds a user's items come again and decoys do not, so that too wears off.
- `noise` adds to each number of the gradient a Gaussian one with this standard deviation; no loss is reported then.
  With `clip`, the Euclidean norm of the whole gradient is at most that before. *Given which rows are sent*, the
  gradient of one round is then (epsilon, delta)-differentially private for epsilon < 1 if noise is at least
  clip sqrt(8 ln(1.25 / delta)) / epsilon (Dwork, Roth, "The Algorithmic Foundations of Differential Privacy", 2014,
  appendix A; two gradients differ by 2 clip at most); T rounds cost more. Which rows are sent, and how many, is not
  covered: it gives away which items a user may have, with decoys among them or not.

Symbols: `rho_shared` and `rho_own` are rho_sh and rho_ns, `lr` is the user's; its Adam's state stays here.

Differs from the paper: an item that is there more than once in a round is one row, whose loss counts as often; which
changes no gradient. The authors' code steps a copy of theta_sh too, and drops it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor
from torch.func import functional_call, vmap

from clients.disclosure import along, clipped, noised, norms
from clients.ncf import ITEM, OWN, SPREAD, table_size
from fedsim import tree
from fedsim.client import Client
from fedsim.model import Model
from fedsim.optim import Optimiser, adam, sgd
from fedsim.ranges import Count, Natural, NonNegative, Positive
from fedsim.ranking import draw_negatives, draw_others
from fedsim.task import Batch, Params, Reply
from fedsim.tree import Rows, Tree

EVERY = slice(None)  # in the place of items: all rows of the tables


@dataclass(frozen=True, kw_only=True)
class DualSam(Client):
    """One step of a user: the gradient of the shared parameters, and its own embedding moved. All users weigh the same.

    Attributes:
        model: scores items, such as `scorer` makes. Parameters whose names begin with "user_" are the user's own;
            those that begin with "item_" have a row for each item, and it must use these by `table[items]`.
        lr: of the user's rule.
        rho_shared: how far the shared parameters are moved before their gradient is taken.
        rho_own: how far the user's.
        negatives: drawn for each item that the user has.
        reduction: how rows become a loss.
        piece: rows that are averaged, for "ref".
        rule: how a user moves its embedding.
        spread: standard deviation of the user's parameters at first.
        decoys: how many rows of other items it sends as well.
        clip: the largest norm of the gradient that it sends; None: any.
        noise: standard deviation of what is added to each number of it.
    """

    model: Model
    lr: Positive
    rho_shared: NonNegative = 0.02
    rho_own: NonNegative = 0.02
    negatives: Natural = 4
    reduction: Literal["ref", "mean"] = "ref"
    piece: Count = 128
    rule: Literal["adam", "sgd"] = "adam"
    spread: NonNegative = SPREAD
    decoys: Natural = 0
    clip: Positive | None = None
    noise: NonNegative = 0.0
    batch_size: Count = 2**30  # its one step does nothing

    def __post_init__(self) -> None:
        super().__post_init__()
        table_size(self.model)  # raises

    @property
    def needs(self) -> tuple[str, ...]:
        """The items that a user has."""
        return ("item",)

    @cached_property
    def optimiser(self) -> Optimiser:
        """The rule by which a user moves its embedding."""
        return adam(self.lr) if self.rule == "adam" else sgd(self.lr)

    @cached_property
    def num_items(self) -> int:
        """I."""
        return table_size(self.model)

    def footprint(self, shared: Tree, examples: int) -> int:
        """What a user's rows take up: of tables their own, not all."""
        rows = examples * (1 + self.negatives) + self.decoys
        params = shared["params"]
        touched = sum(leaf[:1].numel() for name, leaf in params.items() if name.startswith(ITEM))
        network = sum(leaf.numel() for name, leaf in params.items() if not name.startswith(ITEM))
        # Of each table's row the copy, its perturbation and gradients, and as many numbers in the layers.
        return int(4 * (10 * rows * touched + 6 * network))

    def personal(self, rng: torch.Generator) -> Tree:
        """The user's embedding, drawn anew for each, and its optimiser at rest."""
        own = {
            name: self.spread * torch.randn(leaf.shape, generator=rng, dtype=torch.float64).to(leaf.dtype)
            for name, leaf in self.model.module.named_parameters()
            if name.startswith(OWN)
        }
        return {"own": own, "optimiser": self.optimiser.init(own)}

    def prepare(self, examples: Batch, rng: torch.Generator) -> Batch:
        """The items of its round, each once: its own, negatives and decoys; and what the loss of each counts."""
        has = examples["item"]
        has = has[torch.randperm(len(has), generator=rng)]
        drawn = draw_negatives(has, self.negatives, self.num_items, rng)
        y = torch.zeros(len(has), 1 + self.negatives, dtype=torch.int64)
        y[:, 0] = 1
        weight = self._weights(y.numel())
        rows = once({"item": torch.cat([has[:, None], drawn], 1).flatten(), "y": y.flatten(), "weight": weight})
        if self.decoys:
            others = self._decoys(rows["item"], rng)
            longer = {name: torch.cat([leaf, leaf.new_zeros(self.decoys)]) for name, leaf in rows.items()}
            longer["item"][-self.decoys :] = others
            rows = once(longer)  # in order, or their place would tell which they are
        if self.noise:  # by a seed of the user's, so that it is the same whoever runs beside
            rows["seed"] = torch.randint(2**62, (1,), generator=rng).expand(len(rows["item"]))
        return rows

    def _decoys(self, items: Tensor, rng: torch.Generator) -> Tensor:
        """Other items than those of the round."""
        if (left := self.num_items - len(items)) < self.decoys:
            raise ValueError(f"decoys = {self.decoys}: only {left} of {self.num_items} items are not in a user's round")
        return draw_others(items, 1, self.decoys, self.num_items, rng)[0]

    def _weights(self, rows: int) -> Tensor:
        """What each row's loss counts, (R,)."""
        start = torch.arange(rows) // self.piece * self.piece
        size = (rows - start).clamp(max=self.piece) if self.reduction == "ref" else torch.full((rows,), rows)
        return 1 / size.double()

    def start(self, shared: Tree, personal: Tree, data: Batch) -> Tree:
        """The three gradients of one user."""
        alone = (tree.map(lambda leaf: leaf[None], part) for part in (personal, data))
        return tree.map(lambda leaf: leaf[0], self._climb(shared, *alone))

    def step(self, state: Tree, batch: Batch) -> Tree:
        """All is done."""
        return state

    def finish(self, shared: Tree, state: Tree, data: Batch) -> Reply:
        """The gradient of what is shared, of the items' tables the rows of this round; the embedding stays here."""
        place = torch.where(data["mask"], data["item"], -1)
        tables = {
            name: Rows(place, leaf, self.num_items) for name, leaf in state["sent"].items() if name.startswith(ITEM)
        }
        there = (data["mask"] & (data["weight"] > 0)).any(-1).double()
        metrics = {} if self.noise else {"loss": state["loss"]}  # which would tell what noise hides
        return Reply({"params": state["sent"] | tables}, there, state["kept"], metrics)

    def run_cohort(self, shared: Tree, personal: Tree, data: Batch, rows: Tensor) -> Reply:
        """All users at once, of the tables with their own rows only."""
        return self.finish(shared, self._climb(shared, personal, data), data)

    def _climb(self, shared: Tree, personal: Tree, data: Batch) -> Tree:
        """The three gradients of C users, on the same rows, leaves (C, ...)."""
        users, weight = len(data["item"]), torch.where(data["mask"], data["weight"], 0)
        touched = {
            name: leaf[data["item"]] if name.startswith(ITEM) else leaf.expand(users, *leaf.shape)
            for name, leaf in shared["params"].items()
        }
        score = vmap(
            lambda params: functional_call(self.model.module, params, (EVERY,)),
            randomness="different" if self.model.stochastic else "error",
        )

        def losses(at: Tree) -> Tensor:
            rows = self.model.criterion(score(at["shared"] | at["own"]), data["y"])
            return (weight.to(rows.dtype) * rows).sum(1)

        at = {"shared": touched, "own": personal["own"]}
        value, slope = slopes(losses, at, ("shared", "own"))
        for block, radius in (("shared", self.rho_shared), ("own", self.rho_own)):
            if radius:
                moved = at | {block: climbed(at[block], slope[block], radius)}
                slope = slope | slopes(losses, moved, (block,))[1]
        own, rest = vmap(self.optimiser.update)(slope["own"], personal["optimiser"], personal["own"])
        sent = {"sent": self._hidden(slope["shared"], data), "loss": value.double()}
        return sent | {"kept": {"own": own, "optimiser": rest}}

    def _hidden(self, sent: Params, data: Batch) -> Params:
        """What is sent, clipped and with noise."""
        if self.clip is not None:
            sent = clipped(sent, self.clip)
        if not self.noise or not data["mask"].shape[1]:
            return sent
        rows = data["mask"].sum(1).tolist()
        sizes = {name: rows for name in sent if name.startswith(ITEM)}
        return noised(sent, self.noise, data["seed"][:, 0].tolist(), sizes)


def slopes(losses: Callable[[Tree], Tensor], at: Tree, blocks: tuple[str, ...]) -> tuple[Tensor, Tree]:
    """The losses (C,) of C users who share no parameter, leaves (C, ...), and their gradients in some blocks."""
    with torch.enable_grad():
        free = {block: tree.map(lambda leaf: leaf.detach().requires_grad_(), at[block]) for block in blocks}
        value = losses(at | free)
        parts = iter(torch.autograd.grad(value.sum(), tree.leaves(free), materialize_grads=True))  # type: ignore[arg-type]
    return value.detach(), tree.map(lambda _: next(parts), free)


def climbed(params: Params, slope: Params, radius: float) -> Params:
    """Each user's point at this distance in the direction of steepest ascent; where there is none, the same point."""
    factor = radius / (norms(slope) + 1e-12)
    return tree.map(lambda leaf, g: leaf + along(factor, g) * g, params, slope)


def once(rows: Batch) -> Batch:
    """The same rows (R,) with each item once and in order, of the label that it has and with its weights added up."""
    item, place = torch.unique(rows["item"], return_inverse=True)
    y = rows["y"].new_zeros(len(item)).scatter_(0, place, rows["y"])  # an item's labels are all the same
    return {"item": item, "y": y, "weight": rows["weight"].new_zeros(len(item)).index_add_(0, place, rows["weight"])}
