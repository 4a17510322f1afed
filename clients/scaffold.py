"""SCAFFOLD's local side: gradient steps corrected by control variates.

Karimireddy, Kale, Mohri, Reddi, Stich, Suresh, "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning",
ICML 2020, https://arxiv.org/abs/1910.06378, Algorithm 1. With x the server's model, c its control variate and c_k the
client's own, K steps of

    y  <- y - lr (g_k(y) - c_k + c)

and then, option II of the paper,

    c_k <- c_k - c + (x - y) / (K lr).

`lr` is the paper's eta_l.

Differs from the paper: a client without examples takes no step and keeps its control variate. Replies weigh the same
whatever the number of examples, as in the paper.
"""

from dataclasses import dataclass

import torch

from fedsim import tree
from fedsim.client import Client
from fedsim.model import Model
from fedsim.ranges import Positive
from fedsim.task import Batch, Reply
from fedsim.tree import Tree


@dataclass(frozen=True)
class ControlledSgd(Client):
    """Stochastic gradient descent with SCAFFOLD's correction; sends its model and the change of its control variate."""

    model: Model
    lr: Positive

    def personal(self, rng: torch.Generator) -> Tree:
        """c_k, zero at first."""
        return {"control": tree.map(torch.zeros_like, self.model.params)}

    @property
    def expects(self) -> dict[str, str]:
        """The server's control variate."""
        return {"control": 'set strategy.use = "scaffold"'}

    def start(self, shared: Tree, personal: Tree, data: Batch) -> Tree:
        """The server's model, the correction c - c_k, and the steps taken."""
        correction = tree.map(torch.sub, shared["control"], personal["control"])
        zero = torch.zeros((), dtype=torch.float64)
        return {
            "params": shared["params"],
            "correction": correction,
            "control": personal["control"],
            "steps": zero,
            "loss": zero,
        }

    def step(self, state: Tree, batch: Batch) -> Tree:
        """One corrected step."""
        loss, gradient = self.model.gradient(state["params"], batch)
        gradient = tree.map(torch.add, gradient, state["correction"])
        params = tree.map(lambda p, g: torch.add(p, g, alpha=-self.lr), state["params"], gradient)
        count = batch["mask"].sum()
        return state | {"params": params, "steps": state["steps"] + 1, "loss": state["loss"] + loss * count}

    def finish(self, shared: Tree, state: Tree, data: Batch) -> Reply:
        """y, the change of c_k, and c_k itself, which stays here."""
        steps = state["steps"]
        moved = (steps > 0).to(steps.dtype)  # without a step nothing was learnt about the gradient here
        scale = moved / (steps.clamp(min=1) * self.lr)
        change = tree.map(
            lambda x, y, c: (x - y) * scale.to(x.dtype) - c * moved.to(c.dtype),
            shared["params"],
            state["params"],
            shared["control"],
        )
        examples = data["mask"].sum()
        return Reply(
            {"params": state["params"], "control": change},
            torch.ones_like(steps),
            personal={"control": tree.map(torch.add, state["control"], change)},
            metrics={"loss": state["loss"] / (examples * self.epochs).clamp(min=1)},
        )
