"""FedRecGEL: shared parameters moved by the mean gradient of users who looked at how sharp their losses are.

"FedRecGEL: federated recommendation with generalised embedding learning", WWW 2026, https://arxiv.org/abs/2603.11503.
With S users in the round, each of whom sends the gradient g_u of the shared parameters theta, taken a little uphill
(`clients.fedrecgel:DualSam`):

    G     = 1 / S sum_u g_u
    theta <- Adam(G)

Adam's state stays from round to round; items that nobody touched move by its momentum. Of the model's parameters those
whose names begin with "user_" are each user's own: they are not here.

Symbols: `lr` is the server's learning rate.

Differs from the paper: nothing.
"""

from dataclasses import dataclass
from functools import cached_property

from fedsim.optim import Optimiser, adam
from fedsim.ranges import Positive
from fedsim.strategy import Strategy
from fedsim.task import Metrics, Params, Replies, Task
from fedsim.tree import Tree


@dataclass(frozen=True)
class FedRecGel(Strategy):
    """A server Adam on the mean of the users' gradients.

    Attributes:
        lr: of Adam.
    """

    lr: Positive = 0.001

    @cached_property
    def optimiser(self) -> Optimiser:
        """The rule of a step."""
        return adam(self.lr)

    def init(self, params: Params) -> Tree:
        """What all users share, and Adam at rest."""
        shared = {name: leaf for name, leaf in params.items() if not name.startswith("user_")}
        return {"params": shared, "adam": self.optimiser.init(shared)}

    def aggregate(self, state: Tree, task: Task, replies: Replies) -> tuple[Tree, Metrics]:
        """One step of Adam."""
        if not replies.weight.any():  # nobody who answered has an item
            return state, {}
        params, rest = self.optimiser.update(replies.update["params"], state["adam"], state["params"])
        return {"params": params, "adam": rest}, {}
