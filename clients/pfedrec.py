"""PFedRec's local side: one user, who trains a score layer of its own, and then the items' embeddings to suit it.

Zhang, Long, Zhou, Yan, Yang, Zhang, "Dual Personalization on Federated Recommendation", IJCAI 2023,
https://arxiv.org/abs/2301.08143. The score of item i, whose embedding is q_i, for user u is

    score(u, i) = sigmoid(w_u q_i + b_u)

with w_u, b_u the user's own and never sent. A round begins with the server's table Q of embeddings. The user draws, for
each item that it has, `negatives` that it does not, and for each mini-batch of these rows, L its mean binary cross
entropy,

    (w_u, b_u) <- (w_u, b_u) - lr grad L(w_u, b_u, Q_u)
    Q_u        <- Q_u - lr I lr_eta grad L(w_u, b_u, Q_u)    with the new w_u, b_u.

Q_u begins as Q; what is sent is Q_u - Q, of the items of the round, for it is zero elsewhere. The user's scores are by
its own Q_u: of the items of the round it keeps the scores, one number each, and the others' rows are the server's.

Which rows it sends tells which items it has or drew; and as a mini-batch moves every row by a multiple of w_u, the rows
tell of it too: after a single one, w_u but for its length.

The step on Q is that large because L is a mean over all rows, of which few are of one item, and the server then takes
the mean over users, of whom few have touched it.

Symbols: `lr` is eta, `lr_eta` the authors' constant of that name (80, tuned by data set), I the number of items.

Differs from the paper: negatives are drawn from all items that the user is not trained on, as in FedRecGEL, so that a
held-out item may be among them; the authors' code spares the held-out items, and so tells them from the others before
it is asked to. Where not all users take part in a round, rows that a user did not touch when it last did are those of
the last table that was sent to anybody; in the authors' code they are those that it was sent itself.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from clients.ncf import OWN, cross_entropies
from fedsim.client import Client
from fedsim.model import Model, gradient
from fedsim.networks import seeded
from fedsim.optim import Optimiser, sgd
from fedsim.ranges import Count, Natural, Positive, checked
from fedsim.ranking import Scorer, draw_negatives
from fedsim.task import Batch, Params, Reply
from fedsim.tree import Rows, Tree

TABLE = "item.weight"  # with a row for each item


class ScoreLayer(nn.Module):
    """A linear score of embeddings: items (B,) -> logits (B,)."""

    def __init__(self, num_items: int, dim: int) -> None:
        super().__init__()
        self.item, self.user_score = nn.Embedding(num_items, dim), nn.Linear(dim, 1)

    def forward(self, items: Tensor) -> Tensor:
        """The logits (B,) of items (B,)."""
        logits: Tensor = self.user_score(self.item.weight[items])[:, 0]
        return logits


@checked
def scorer(num_items: Count, dim: Count = 32, seed: Natural = 0) -> Model:
    """A score layer, and embeddings of `num_items` items, as torch draws them."""
    return Model(seeded(seed, lambda: ScoreLayer(num_items, dim)), cross_entropies, inputs="item", target="y")


@dataclass(frozen=True, kw_only=True)
class DualPersonal(Client):
    """Trains the user's score layer and, in the same mini-batches, its rows of the table. All users weigh the same.

    Attributes:
        model: scores items, such as `scorer` makes; parameters whose names begin with "user_" are the user's own.
        lr: of the score layer.
        lr_eta: how many times I `lr` the rows' learning rate is.
        negatives: drawn for each item that the user has.
        capacity: how many different items a user's round may have at most, for so many scores it keeps; None: all I.
    """

    model: Model
    lr: Positive
    lr_eta: Positive = 80
    negatives: Natural = 4
    capacity: Count | None = None
    batch_size: Count = 256

    @property
    def needs(self) -> tuple[str, ...]:
        """The items that a user has."""
        return ("item",)

    @cached_property
    def num_items(self) -> int:
        """I."""
        return len(self.model.module.get_parameter(TABLE))

    @cached_property
    def layer(self) -> Optimiser:
        """The rule of a step of the score layer."""
        return sgd(self.lr)

    def footprint(self, shared: Tree, examples: int) -> int:
        """What the rows of a user's round take up: before and after, their gradients and those of a mini-batch."""
        rows = examples * (1 + self.negatives)
        return int(4 * (6 * rows * shared["params"][TABLE].shape[1] + 2 * (self.capacity or self.num_items)))

    def personal(self, rng: torch.Generator) -> Tree:
        """The score layer, at first the same for all users; and no item's score."""
        size = self.capacity or self.num_items
        own = {name: leaf for name, leaf in self.model.params.items() if name.startswith(OWN)}
        item = torch.full((size,), self.num_items)
        return {"layer": own, "item": item, "score": self.model.params[TABLE].new_zeros(size)}

    def prepare(self, examples: Batch, rng: torch.Generator) -> Batch:
        """Each of its items followed by negatives: "y", and where the items stand, as `placed` has it.

        Raises:
            ValueError: there are more different ones of them than scores can be kept.
        """
        has = examples["item"]
        item = torch.cat([has[:, None], draw_negatives(has, self.negatives, self.num_items, rng)], 1)
        y = torch.zeros_like(item)
        y[:, 0] = 1
        columns = {"y": y.flatten()} | placed(item.flatten(), self.num_items)
        different = int((columns["touched"] < self.num_items).sum())
        if self.capacity is not None and different > self.capacity:
            raise ValueError(f"capacity = {self.capacity}: a user's round has {different} different items")
        return columns

    def start(self, shared: Tree, personal: Tree, data: Batch) -> Tree:
        """The user's score layer, and the server's rows of the round's items."""
        rows = shared["params"][TABLE][self._touched(data).clamp(max=self.num_items - 1)]
        return {"layer": personal["layer"], "rows": rows, "loss": torch.zeros((), dtype=torch.float64)}

    def _touched(self, data: Batch) -> Tensor:
        """The different items of the round in ascending order, (n,), filled up with I."""
        return torch.where(data["mask"], data["touched"], self.num_items)

    def step(self, state: Tree, batch: Batch) -> Tree:
        """A step of the score layer, and one of the rows; what an item gets from several examples adds up."""
        examples = {"item": torch.arange(len(batch["y"])), "y": batch["y"], "mask": batch["mask"]}

        def loss(own: Params, rows: Tensor) -> Tensor:
            return self.model.loss(own | {TABLE: rows}, examples)

        rows = state["rows"][batch["place"]]  # (B, D)
        _, slope = gradient(loss, state["layer"], rows)
        own, _ = self.layer.update(slope, {}, state["layer"])
        value, pull = gradient(lambda part: loss(own, part["rows"]), {"rows": rows})
        moved = state["rows"].index_add(0, batch["place"], pull["rows"], alpha=-self.lr * self.num_items * self.lr_eta)
        return {"layer": own, "rows": moved, "loss": state["loss"] + value * batch["mask"].sum()}

    def finish(self, shared: Tree, state: Tree, data: Batch) -> Reply:
        """How far the rows went, and the mean loss met on the way; the score layer and the scores stay here."""
        touched, size = self._touched(data), self.capacity or self.num_items
        before = shared["params"][TABLE][touched.clamp(max=self.num_items - 1)]
        real = touched < self.num_items
        change = Rows(torch.where(real, touched, -1), state["rows"] - before, self.num_items)
        logits = self.model.predict(state["layer"] | {TABLE: state["rows"]}, {"item": torch.arange(len(touched))})
        padding = max(0, size - len(touched))
        kept = {
            "layer": state["layer"],
            "item": nn.functional.pad(touched[:size], (0, padding), value=self.num_items),
            "score": nn.functional.pad(torch.where(real, logits, 0)[:size], (0, padding)),
        }
        examples = data["mask"].sum()
        loss = state["loss"] / (examples * self.epochs).clamp(min=1)
        return Reply({"change": {TABLE: change}}, (examples > 0).double(), kept, {"loss": loss})


def placed(items: Tensor, num_items: int) -> Batch:
    """The different items in ascending order, "touched", and where each of the items (n,) stands there, "place".

    Both are (n,), because columns of examples are of one length: "touched" is filled up with I.
    """
    found, place = torch.unique(items, return_inverse=True)
    return {"place": place, "touched": nn.functional.pad(found, (0, len(items) - len(found)), value=num_items)}


@dataclass(frozen=True)
class OwnScores(Scorer):
    """What a user's own score layer says of its own rows: of the items that it touched last as kept, else as shared."""

    model: Model

    def __call__(self, shared: Tree, personal: Tree, items: Tensor) -> Tensor:
        """The logits (n,) of items (n,)."""
        scores = self.model.predict(shared["params"] | personal["layer"], {"item": items})
        touched = personal["item"]
        place = torch.zeros(len(shared["params"][TABLE]) + 1, dtype=torch.int64)  # one more, for what only fills up
        place = place.scatter(0, touched, torch.arange(len(touched)))[items]
        return torch.where(touched[place] == items, personal["score"][place], scores)
