"""Class-discriminative pruning: channels that serve the class to be forgotten more than others are cut, then repaired.

Wang, Guo, Xie, Qi, "Federated Unlearning via Class-Discriminative Pruning", WWW 2022,
https://arxiv.org/abs/2110.11794. A channel is to a class what a word is to a document. Phases:

1. "train", for `training` rounds: federated averaging; none with `from_run`, whose model is taken.
2. For each request, the examples that it names in the column "target" being D_f:
   a. "measure", once: clients send sums of activations (`clients.activations:MeasureActivations`), of which A(y, j)
      follows, the mean activation of channel j of a layer over the examples of class y. In a hidden layer of n channels

          TF(y, j) = A(y, j) / sum_i A(y, i)
          IDF(j) = log((1 + C) / (1 + #{y: A(y, j) >= mean_i A(y, i)})),    C the number of classes that there are,

      and the floor(R n) channels of the largest sum_y share(y) TF(y, j) IDF(j) are pruned: what they are computed with
      is zero from now on (weights, bias, and what a norm scales and shifts them by). share(y) is how much of D_f is of
      the class y: where D_f is one class, this is its TF-IDF.
   b. "repair", for `repairing` rounds: federated averaging on what is kept, by `clients.retained:Retained` around any
      client that sends its model. Pruned channels are zero again in each mean.

What a request has named is deleted with it: no later round touches it.

It forgets classes. A request for some examples of a class prunes the channels of that class, which repairing with the
class's other examples brings back.

Symbols: `share` is R.

Differs from the paper: the share is pruned in each layer, where the authors' code takes one threshold for all: as TF
adds up to one in a layer, channels of narrow layers would go first, and a layer might go as a whole. One channel stays
in any case. Several classes are pruned together, by their shares, where the paper removes one after another: as
requests they are dealt with one by one here, too. Linear layers are pruned as convolutions are. A channel is cut off
by its own parameters: behind an activation that is not zero at zero a constant is left of it. Clients know nothing of
that: behind a ReLU, which is flat at zero, what is pruned stays; elsewhere it moves until the server's next mean.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from fedsim.forgetting import at_hand
from fedsim.layers import Layer, chain, check_covered
from fedsim.model import Model
from fedsim.ranges import Count, Decay, Natural
from fedsim.strategy import Strategy
from fedsim.task import Metrics, Params, Replies, Task
from fedsim.tree import Tree
from strategies.phases import Phase, check, first, nobody, over, planned


@dataclass(frozen=True)
class Pruning(Strategy):
    """Trains, measures, prunes, repairs; then it is done.

    Attributes:
        model: whose network is pruned, a chain of linear layers and convolutions.
        num_clients: N.
        num_targets: how many values the column "target" has: one for what is kept, and one for each request.
        share: of each hidden layer's channels, how many a request prunes.
        training: rounds of federated averaging before.
        from_run: the directory of a run whose last model is taken, or a folder of runs: of these, the latest with the
            same seed; or a checkpoint.
        repairing: rounds after each request.
        together: all requests are dealt with as one.
        seed: of the run.
    """

    model: Model
    num_clients: Count
    num_targets: Count = 2
    share: Decay = 0.2
    training: Natural = 0
    from_run: Path | None = None
    repairing: Natural = 5
    together: bool = False
    seed: Natural = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.training, self.from_run, self.num_targets)

    @cached_property
    def layers(self) -> list[Layer]:
        """The layers, in the order in which examples pass them."""
        return chain(self.model.module)

    @cached_property
    def plan(self) -> Sequence[Phase]:
        """The phases: what is done, in how many rounds, with which "request" and "deleted"."""

        def serve(request: int, deleted: int) -> Sequence[Phase]:
            return Phase("measure", 1, request, deleted), Phase("repair", self.repairing, request, request)

        return planned(self.training, self.num_targets, self.together, serve)

    @property
    def actions(self) -> tuple[str, ...]:
        """What follows upon the first phase."""
        return tuple(dict.fromkeys(action for action, *_ in self.plan))

    def shares(self, action: str) -> tuple[str, ...]:
        """Which request is at hand."""
        return ("params",) if action == "train" else ("params", "request", "deleted")

    def init(self, params: Params) -> Tree:
        """The trained model, of which nothing is pruned; raises ValueError where it is no chain of layers."""
        begin = first(params, self.from_run, self.seed)
        check_covered(self.layers, begin["params"])
        hidden = [layer for layer in self.layers if layer.hidden]
        if not hidden:
            raise ValueError("the network has no hidden layer: there is no channel to prune")
        alive = {layer.weight: torch.ones(layer.neurons, dtype=torch.bool) for layer in hidden}
        return begin | {"alive": alive}

    def configure(self, state: Tree, round: int) -> Task:
        """What the phase asks; of nobody, where all phases are over and a loop of Flower's goes on."""
        if self.done(state):
            return nobody(self.plan, state)
        action, _, request, deleted = self.plan[int(state["phase"])]
        shared: Tree = {"params": state["params"]}
        if action == "train":
            return Task(action, shared, reduce="mean")
        shared |= at_hand(request, deleted)
        if action == "measure":
            return Task(action, shared, range(self.num_clients), reduce="sum")
        return Task(action, shared, reduce="mean")

    def aggregate(self, state: Tree, task: Task, replies: Replies) -> tuple[Tree, Metrics]:
        """The mean model but for what is pruned, or more to prune; and the next phase, where this one is over."""
        _, rounds, request, _ = self.plan[int(state["phase"])]
        told: Metrics = {"request": request} if request else {}
        after = dict(state)
        if task.action == "measure":
            after["alive"] = self._prune(state["alive"], replies.update)
            told["pruned"] = sum(int((~alive).sum()) for alive in after["alive"].values())
        elif bool(replies.weight.sum() > 0):  # else there is nothing to learn from
            after["params"] = replies.update["params"]
        after["params"] = self._without_pruned(after["params"], after["alive"])
        done = state["rounds"] + 1
        if done < rounds:
            return after | {"rounds": done}, told
        return after | {"phase": state["phase"] + 1, "rounds": torch.zeros_like(done)}, told

    def done(self, state: Tree) -> bool:
        """Whether all phases are over."""
        return over(self.plan, state)

    def _prune(self, alive: dict[str, Tensor], measured: Tree) -> dict[str, Tensor]:
        """Which channels of each layer are left."""
        after = dict(alive)
        if not measured["forgotten"].any():
            return after  # nobody has anything to forget
        for name, left in alive.items():
            number = min(int(self.share * len(left) + 1e-9), int(left.sum()) - 1)
            places = left.nonzero().flatten()
            score = discrimination(measured["sums"][name][:, places], measured["examples"], measured["forgotten"])
            chosen = places[score.sort(descending=True, stable=True).indices[:number]]
            after[name] = left.index_fill(0, chosen, False)
        return after

    def _without_pruned(self, params: Params, alive: dict[str, Tensor]) -> Params:
        """The parameters, those of pruned channels zero."""
        result = dict(params)
        for layer in self.layers:
            left = alive.get(layer.weight)
            if left is None or bool(left.all()):
                continue
            for name in layer.names:
                leaf = result[name]  # each channel has a row of it, or several in a row
                rows = left.repeat_interleave(len(leaf) // len(left)).reshape(-1, *[1] * (leaf.ndim - 1))
                result[name] = torch.where(rows, leaf, 0)
        return result


def discrimination(sums: Tensor, examples: Tensor, forgotten: Tensor) -> Tensor:
    """How much more each of n channels is active for what is to be forgotten than for other classes: TF-IDF, (n,).

    Args:
        sums: of the activations over the examples of each class, (K, n).
        examples: of each class, (K,).
        forgotten: those of them that are to be forgotten, (K,), at least one.
    """
    there = examples > 0  # a class that nobody has is no document
    mean = sums[there] / examples[there, None]  # A, (C, n)
    often = mean / mean.sum(1, keepdim=True).clamp(min=torch.finfo(mean.dtype).tiny)
    common = (mean >= mean.mean(1, keepdim=True)).sum(0)
    rare = torch.log((1 + there.sum()) / (1 + common).to(mean.dtype))
    share = forgotten[there] / forgotten.sum()
    return share @ (often * rare)
