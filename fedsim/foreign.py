"""Foreign: a Flower strategy in the place of one of fedsim's, over fedsim's clients and engines.

It takes part in the ordinary loop: the nodes that it sees are the clients that the sampler draws for the round, what it
sends is a task, and it aggregates messages made of the replies. Its rounds of evaluation are left to the loop's own.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fedsim import tree
from fedsim.flower.guest import FlowerStrategy, Guest
from fedsim.strategy import Strategy
from fedsim.task import Draw, Ids, Metrics, Params, Replies, Sampler, Task
from fedsim.tree import Tree


@dataclass(frozen=True)
class Foreign(Strategy):
    """A Flower strategy as one of fedsim's.

    Unlike those it has a memory of its own, so its runs cannot be resumed, and it is no function of its state.

    Attributes:
        guest: the strategy, and what must be remembered of the round that is under way.
        sample: who is there in a round.
    """

    guest: Guest
    sample: Sampler

    def configure(self, state: Tree, round: int) -> Task:
        """What the strategy sends to those nodes that it chooses among the clients that were drawn."""
        task = self.guest.configure(_plain(state["params"]), round, self.sample(round))
        like: Params = state["params"]
        params = {name: leaf.to(like[name].dtype) for name, leaf in task.shared["params"].items() if name in like}
        return task._replace(shared=task.shared | {"params": params})

    def draw(self, round: int, among: Ids | None = None) -> Draw:
        """Whom it chose: the sampler of a loop with this strategy."""
        return self.guest.chosen

    def aggregate(self, state: Tree, task: Task, replies: Replies) -> tuple[Tree, Metrics]:
        """What the strategy makes of the clients' models; nothing new where it refuses to aggregate."""
        update = replies.update | {"params": _plain(replies.update["params"])}
        params, metrics = self.guest.aggregate(task, replies._replace(update=update))
        if params is None:
            return state, metrics
        like: Params = state["params"]
        made = tree.restore(params, like, f"the model that {self.guest!r} made in round {task.round}")
        return {"params": {name: leaf.to(like[name].dtype) for name, leaf in made.items()}}, metrics


def adopt(strategy: FlowerStrategy, sample: Sampler, num_clients: int, seed: int) -> tuple[Strategy, Sampler]:
    """A strategy, fedsim's or Flower's, as one of fedsim's, and the sampler to use with it."""
    if isinstance(strategy, Strategy):
        return strategy, sample
    own = copy.deepcopy(strategy)  # what it remembers of this run is none of the next one's business
    foreign = Foreign(Guest(own, num_clients, seed), sample)
    return foreign, foreign.draw


def _plain(params: Params) -> Params:
    """With numbers that numpy has too: Flower's strategies compute with it."""
    special: Sequence[torch.dtype] = (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
    return {name: leaf.float() if leaf.dtype in special else leaf for name, leaf in params.items()}
