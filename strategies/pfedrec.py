"""PFedRec: a table of the items' embeddings that is the mean of what users have made of it.

Zhang, Long, Zhou, Yan, Yang, Zhang, "Dual Personalization on Federated Recommendation", IJCAI 2023,
https://arxiv.org/abs/2301.08143. With S users in the round, who were sent the table Q and made Q_u of it
(`clients.pfedrec:DualPersonal`),

    Q <- 1 / S sum_u Q_u = Q + 1 / S sum_u (Q_u - Q).

The right side is what is computed, because Q_u - Q has few rows that are not zero. Of the model's parameters those
whose names begin with "user_" are each user's own: they are not here.

Users are evaluated with their own Q_u as it is after they were trained, before the next table is sent. So those who
evaluate receive the table that was sent last, Q from before the step, to which they add what they have kept.

Differs from the paper: nothing.
"""

from dataclasses import dataclass

from fedsim import tree
from fedsim.strategy import Strategy
from fedsim.task import Metrics, Params, Replies, Task
from fedsim.tree import Tree


@dataclass(frozen=True)
class PFedRec(Strategy):
    """The mean of the users' tables."""

    def init(self, params: Params) -> Tree:
        """What all users share, which is also what they will be sent first."""
        shared = {name: leaf for name, leaf in params.items() if not name.startswith("user_")}
        return {"params": shared, "sent": shared}

    def aggregate(self, state: Tree, task: Task, replies: Replies) -> tuple[Tree, Metrics]:
        """The table moved by the mean of the users' changes."""
        params = tree.map(lambda table, rows: rows.added(table), state["params"], replies.update["change"])
        return {"params": params, "sent": state["params"]}, {}

    def shared(self, state: Tree) -> Tree:
        """The table that was sent last, of which users have made their own."""
        return {"params": state["sent"]}
