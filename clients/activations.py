"""Tells how active each channel of a network is on the examples of each class: sums, and how many these are.

Wang, Guo, Xie, Qi, "Federated Unlearning via Class-Discriminative Pruning", WWW 2022,
https://arxiv.org/abs/2110.11794. With O_l(x) what a hidden layer l gives for an example, of channels a and, in a
convolution, places p in the image, a client sums over its examples of each class y

    sum_x mean_p ReLU(O_l(x))_ap,

K numbers for each channel, and counts its examples of each class, and those that the request at hand names. The server
is `strategies.pruning:Pruning`.

Differs from the paper: sums and counts are sent, so that the server's mean is that over all examples; the paper's
clients send means, of which the server takes the mean. A neuron of a linear layer is a channel, too.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from fedsim.client import Client
from fedsim.forgetting import AT_HAND, remaining
from fedsim.layers import Layer, chain, hidden_outputs
from fedsim.model import Model
from fedsim.ranges import Count
from fedsim.task import Batch, Reply
from fedsim.tree import Tree


@dataclass(frozen=True, kw_only=True)
class MeasureActivations(Client):
    """Sums the activations of hidden channels by class. The weight is the number of examples.

    Its metric "forgotten" is the share of them that the request at hand names.

    Attributes:
        model: its network is a chain of layers (`fedsim.layers:chain`), its outputs are logits of the K classes.
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

    @cached_property
    def layers(self) -> list[Layer]:
        """The layers, the last of which has a neuron for each class."""
        return chain(self.model.module)

    @cached_property
    def inner(self) -> Model:
        """The same model, which gives what its hidden layers give."""
        return replace(self.model, module=hidden_outputs(self.model.module))

    def select(self, examples: Batch, shared: Tree) -> Batch:
        """Those that no request before has named."""
        return remaining(examples, shared)

    def start(self, shared: Tree, personal: Tree, data: Batch) -> Tree:
        """Sums at zero."""
        classes, hidden = self.layers[-1].neurons, [layer for layer in self.layers if layer.hidden]
        none = torch.zeros(classes, dtype=torch.float64)
        return {
            "params": shared["params"],
            "sums": {layer.weight: none[:, None].expand(classes, layer.neurons) for layer in hidden},
            "examples": none,
            "forgotten": none,
        }

    def step(self, state: Tree, batch: Batch) -> Tree:
        """Adds one batch."""
        label = batch[self.model.target][:, None] == torch.arange(self.layers[-1].neurons)
        own = (label & batch["mask"][:, None]).double()  # (B, K)
        told: Any = self.inner.predict(state["params"], batch)
        sums = {}
        for (name, sum_), output in zip(state["sums"].items(), told, strict=True):
            active = output[..., None].relu().flatten(2).mean(2).double()  # (B, channels)
            sums[name] = sum_ + own.T @ active
        return state | {
            "sums": sums,
            "examples": state["examples"] + own.sum(0),
            "forgotten": state["forgotten"] + (own * (batch["target"] == 1)[:, None]).sum(0),
        }

    def finish(self, shared: Tree, state: Tree, data: Batch) -> Reply:
        """The sums and counts."""
        update = {name: state[name] for name in ("sums", "examples", "forgotten")}
        examples = data["mask"].sum()
        share = state["forgotten"].sum() / examples.clamp(min=1)
        return Reply(update, examples.to(torch.get_default_dtype()), metrics={"forgotten": share})
