"""Forgetting: a model is trained, then made to forget what requests name, one after another, and repaired.

"Federated Unlearning via Active Forgetting", Knowledge-Based Systems 316, 2025, https://arxiv.org/abs/2307.03363; the
formulas are a derivation. Phases, of which each is an action that an experiment binds to a client:

1. "train", for the first `training` rounds: federated averaging, as if nothing were ever to be forgotten. With
   `from_run` there are none: the model is that of a run's last checkpoint.
2. For each request, the examples that it names in the column "target" being D_f and those that none has named D_r:
   a. "weigh", once, where `remember` is "importance": clients send sums of Fisher information, of which Omega follows
      (`fedsim.forgetting.fisher`), 2 P numbers from each client.
   b. "forget", for `forgetting` rounds: theta <- sum_k n_k theta_k / sum_k n_k over the models of clients, such as
      `clients.forget:ForgetWhileTraining` (protocol P2: all take part) or `clients.forget_alone:ForgetAlone` (P1, with
      `alone`: those who have something to forget).
   c. "repair", for `repairing` rounds: federated averaging on what is kept. It may bring back what was forgotten; the
      two plain rounds after which one measures that are repair as well.

What a request has named is deleted with it: no later round touches it. Clients that forget are told of which classes
nothing is kept, "gone": no memory of what a later request names may point to them.

Which methods that is, the clients say: with `clients.forget:ForgetWhileTraining` or `ForgetAlone` active forgetting,
its ablations, or gradient ascent; with `clients.retained:Retained` fine-tuning on what is kept.

Symbols: `forgetting` is R_u (P2) or R_max (P1), `until` is s.

Differs from the paper: its exact formulas are not known to us. P1's stop is tested with the counts that come with a
round's models, whose round is then taken back: the same model, for one round more.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from fedsim import tree
from fedsim.forgetting import Evidence, at_hand, importance
from fedsim.method import averages
from fedsim.ranges import Count, Natural, Probability
from fedsim.strategy import Strategy
from fedsim.task import Metrics, Params, Replies, Task
from fedsim.tree import Tree
from strategies.phases import Phase, check, first, nobody, over, planned


@dataclass(frozen=True)
class Forget(Strategy):
    """Trains, forgets, repairs; then it is done.

    Attributes:
        num_clients: N.
        num_targets: how many values the column "target" has: one for what is kept, and one for each request.
        training: rounds of federated averaging before.
        from_run: the directory of a run whose last model is taken, or a folder of runs: of these, the latest with the
            same seed; or a checkpoint.
        forgetting: rounds for each request; at most so many with `until`.
        repairing: rounds after each request.
        together: all requests are dealt with as one.
        alone: in "forget" only those are asked who have something to forget; in the first round, which finds out who
            that is, all.
        until: it stops where the model predicts at most this share of the examples to be forgotten right.
        remember: what clients that forget are sent besides the model: "model", the one before; "importance", that and
            Omega.
        seed: of the run.
        served: how many requests the model that it begins from has been through: their examples are never touched.
        gone_with: for each class the request with which the last of it goes (`fedsim.forgetting.requests:gone_with`).
    """

    num_clients: Count
    num_targets: Count = 2
    training: Natural = 0
    from_run: Path | None = None
    forgetting: Natural = 5
    repairing: Natural = 0
    together: bool = False
    alone: bool = False
    until: Probability | None = None
    remember: Literal["nothing", "model", "importance"] = "nothing"
    seed: Natural = 0
    served: Natural = 0
    gone_with: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.training, self.from_run, self.num_targets)
        if self.served and (self.training or self.served >= self.num_targets - 1):
            raise ValueError(
                f"served = {self.served}: must be below the number of requests, {self.num_targets - 1}, and training 0"
                f", not {self.training}: it is of a model that has forgotten already, as by from_run"
            )
        if not self.plan:
            raise ValueError("training, forgetting and repairing are all 0: no round would do anything")

    @property
    def plan(self) -> Sequence[Phase]:
        """The phases: what is done, in how many rounds, with which "request" and "deleted"."""
        weigh = int(self.remember == "importance" and self.forgetting > 0)

        def serve(request: int, deleted: int) -> Sequence[Phase]:
            asked = (Phase("weigh", weigh, request, deleted), Phase("forget", self.forgetting, request, deleted))
            return (*asked, Phase("repair", self.repairing, request, request))

        return planned(self.training, self.num_targets, self.together, serve, self.served)

    @property
    def actions(self) -> tuple[str, ...]:
        """What follows upon the first phase."""
        return tuple(dict.fromkeys(action for action, *_ in self.plan))

    def shares(self, action: str) -> tuple[str, ...]:
        """Which request is at hand, and to forget what was before."""
        if action == "train":
            return ("params",)
        past = {"nothing": (), "model": ("before",), "importance": ("before", "omega")}[self.remember]
        return ("params", "request", "deleted", *(past if action == "forget" else ()))

    def init(self, params: Params) -> Tree:
        """The trained model, and where in the plan this is."""
        state = first(params, self.from_run, self.seed)
        state["holders"] = torch.ones(self.num_clients, dtype=torch.bool)  # who may have something to forget
        if self.remember != "nothing":
            state["before"] = state["params"]
        if self.remember == "importance":
            state["omega"] = tree.map(torch.zeros_like, state["params"])
        return state

    def configure(self, state: Tree, round: int) -> Task:
        """What the phase asks; of nobody, where all phases are over and a loop of Flower's goes on."""
        if self.done(state):
            return nobody(self.plan, state)
        action, _, request, deleted = self.plan[int(state["phase"])]
        shared: Tree = {"params": state["params"]}
        if action == "train":
            return Task(action, shared, reduce="mean")
        shared |= at_hand(request, deleted)
        if action == "weigh":
            return Task(action, shared, range(self.num_clients), reduce="sum")
        if action == "repair":
            return Task(action, shared, reduce="mean")
        shared |= {name: state[name] for name in ("before", "omega") if name in state}
        if self.gone_with:
            shared["gone"] = torch.tensor(self.gone_with) <= request
        ids = state["holders"].nonzero().flatten().tolist() if self.alone else None
        return Task(action, shared, ids, reduce="mean")

    def aggregate(self, state: Tree, task: Task, replies: Replies) -> tuple[Tree, Metrics]:
        """The mean model, or the importance of its parameters; and the next phase, where this one is over."""
        action, rounds, request, _ = self.plan[int(state["phase"])]
        told: Metrics = {"request": request} if request else {}
        if action == "weigh":
            retained, forgotten = (Evidence(**replies.update[name]) for name in ("retained", "forgotten"))
            return self._on(state | {"omega": importance(retained, forgotten)}), told
        ended = False
        if action == "forget":
            state = state | {"holders": _holders(state["holders"], replies)}
            ended = self._over(state, replies)
        if not ended and bool(replies.weight.sum() > 0):  # else there is nothing to learn from
            state = state | {"params": replies.update["params"]}
        done = state["rounds"] + 1
        return (self._on(state) if ended or done >= rounds else state | {"rounds": done}), told

    def _over(self, state: Tree, replies: Replies) -> bool:
        """Whether nothing is left to forget: nobody has anything, or the model that was sent knows little of it."""
        if self.alone and not state["holders"].any():
            return True
        if self.until is None:
            return False
        if "accuracy" not in replies.metrics:
            raise ValueError('until needs clients that tell their "accuracy" on what is to be forgotten before')
        known = averages(replies).get("accuracy")  # where nobody of the cohort has anything to forget, who knows
        return known is not None and known <= self.until

    def _on(self, state: Tree) -> Tree:
        """The first round of the next phase."""
        after = state | {"phase": state["phase"] + 1, "rounds": torch.zeros_like(state["rounds"])}
        if not self.done(after) and self.plan[int(after["phase"])][0] in ("weigh", "forget"):
            if "before" in state and self.plan[int(state["phase"])][0] != "weigh":
                after["before"] = state["params"]
            after["holders"] = torch.ones_like(state["holders"])
        return after

    def done(self, state: Tree) -> bool:
        """Whether all phases are over."""
        return over(self.plan, state)


def _holders(known: Tensor, replies: Replies) -> Tensor:
    """Without those that had nothing to forget."""
    none = torch.tensor(replies.ids)[replies.weight == 0]
    return known.index_fill(0, none, False)
