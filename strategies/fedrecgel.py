"""FedRecGEL: shared parameters moved by the mean gradient of users who looked at how sharp their losses are.

"FedRecGEL: federated recommendation with generalised embedding learning", WWW 2026, https://arxiv.org/abs/2603.11503.
With S users in the round, each of whom sends the gradient g_u of the shared parameters theta, taken a little uphill
(`clients.fedrecgel:DualSam`):

    G     = 1 / S sum_u g_u
    theta <- Adam(G)

Adam's state stays from round to round; items that nobody touched move by its momentum. Of the model's parameters those
whose names begin with "user_" are each user's own: they are not here.

Symbols: `lr` is the server's learning rate. The metric "item_shift" is how far the item tables moved in the round,
|Q_t - Q_(t-1)| / |Q_(t-1)|.

Differs from the paper: nothing.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch

from fedsim import tree
from fedsim.optim import Optimiser, adam, overwrite
from fedsim.ranges import Positive
from fedsim.strategy import Strategy
from fedsim.task import Metrics, Params, Replies, Task
from fedsim.tree import Tree

OWN, ITEM = "user_", "item_"  # how the names of users' own parameters, and of tables with a row for each item, begin


@dataclass(frozen=True)
class FedRecGel(Strategy):
    """A server Adam on the mean of the users' gradients, written over the tables: a large catalogue is there once.

    Attributes:
        lr: of Adam.
    """

    lr: Positive = 0.001

    @cached_property
    def optimiser(self) -> Optimiser:
        """The rule of a step."""
        return adam(self.lr)

    @property
    def overwrites(self) -> bool:
        """Yes: of the tables, their gradients' means and squares two copies would be too many."""
        return True

    def init(self, params: Params) -> Tree:
        """What all users share, and Adam at rest."""
        shared = tree.clone({name: leaf for name, leaf in params.items() if not name.startswith(OWN)})
        return {"params": shared, "adam": self.optimiser.init(shared)}

    def aggregate(self, state: Tree, task: Task, replies: Replies) -> tuple[Tree, Metrics]:
        """One step of Adam."""
        if not replies.weight.any():  # nobody who answered has an item
            return state, {}
        tables = [name for name in state["params"] if name.startswith(ITEM)]
        size = math.hypot(*(float(torch.linalg.vector_norm(state["params"][name])) for name in tables))
        rest, moved = overwrite(self.optimiser, replies.update["params"], state["adam"], state["params"])
        shift = math.hypot(*(moved[name] for name in tables)) / size if size else 0.0
        return {"params": state["params"], "adam": rest}, {"item_shift": shift}
