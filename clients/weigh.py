"""Tells which parameters the memory of a client's examples hangs on: Fisher information, as sums.

"Federated Unlearning via Active Forgetting", Knowledge-Based Systems 316, 2025, https://arxiv.org/abs/2307.03363; the
formulas are a derivation, see `fedsim.forgetting.fisher`. Over the examples that are kept, and over those that the
request at hand names, a client sums

    retained:  sum_x sum_y p(y|x) (d_i log p(y|x))^2
    forgotten: the same, + sum_x (d_i log p(y_x|x))^2

2 P numbers and two counts, of which `strategies.forget:Forget` makes Omega.
"""

from dataclasses import dataclass

import torch

from fedsim import tree
from fedsim.client import Client
from fedsim.forgetting import AT_HAND, empirical_fisher, remaining, together, true_fisher
from fedsim.model import Model
from fedsim.ranges import Count
from fedsim.task import Batch, Reply
from fedsim.tree import Tree


@dataclass(frozen=True, kw_only=True)
class Weigh(Client):
    """Sums squared gradients of single examples. The weight is the number of examples.

    Its metric "forgotten" is the share of them that the request at hand names.

    Attributes:
        model: its outputs are logits of the K classes.
    """

    model: Model
    batch_size: Count = 256

    @property
    def needs(self) -> tuple[str, ...]:
        """What is to be forgotten."""
        return (self.model.inputs, self.model.target, "target")

    @property
    def expects(self) -> dict[str, str]:
        """Which request is at hand."""
        return AT_HAND

    def footprint(self, shared: Tree, examples: int) -> int:
        """The sums, and above all the gradients of single examples, and their squares."""
        params = shared["params"]
        at_once = min(self.batch_size, examples, together(params))
        return super().footprint(shared, examples) + 2 * at_once * tree.count_bytes(tree.leaves(params))

    def select(self, examples: Batch, shared: Tree) -> Batch:
        """Those that no request before has named."""
        return remaining(examples, shared)

    def start(self, shared: Tree, personal: Tree, data: Batch) -> Tree:
        """Sums at zero."""
        zero = {
            "sums": tree.map(torch.zeros_like, shared["params"]),
            "examples": torch.zeros((), dtype=torch.float64),
        }
        return {"params": shared["params"], "retained": zero, "forgotten": zero}

    def step(self, state: Tree, batch: Batch) -> Tree:
        """Adds one batch."""
        params, x, y = state["params"], batch[self.model.inputs], batch[self.model.target]
        gone = batch["mask"] & (batch["target"] == 1)
        retained = true_fisher(self.model, params, x, batch["mask"] & ~gone)
        true, empirical = true_fisher(self.model, params, x, gone), empirical_fisher(self.model, params, x, y, gone)
        forgotten = {"sums": tree.map(torch.add, true.sums, empirical.sums), "examples": true.examples}
        return state | {
            "retained": tree.map(torch.add, state["retained"], retained._asdict()),
            "forgotten": tree.map(torch.add, state["forgotten"], forgotten),
        }

    def finish(self, shared: Tree, state: Tree, data: Batch) -> Reply:
        """The sums and counts."""
        update = {name: state[name] for name in ("retained", "forgotten")}
        examples = data["mask"].sum()
        share = state["forgotten"]["examples"] / examples.clamp(min=1)
        return Reply(update, examples.to(torch.get_default_dtype()), metrics={"forgotten": share})
