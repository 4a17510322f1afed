"""Fusion: the mean of the clients' models, layer by layer, after their neurons were matched to the server's.

Singh, Jaggi, "Model Fusion via Optimal Transport", NeurIPS 2020, https://arxiv.org/abs/1910.05653, Algorithm 1, by
weights. Networks that differ only in the order of their hidden neurons are the same function, and their plain mean is
not. With W the server's model before the round, W_k client k's, l a layer and T its matching:

    W_k^l <- W_k^l T_k^(l-1)                                             what comes in, in the server's order
    T_k^l  = argmin_T sum_ij T_ij |W^l_i - W_k^l_j|^2                    T a plan between n neurons and n neurons
    W_k^l <- (n T_k^l) W_k^l                                             the neurons, in the server's order
    W^l   <- sum_k n_k W_k^l / sum_k n_k

A neuron is a row of a layer's weight, its bias and what a norm behind the layer scales and shifts it by; in a
convolution a channel, which is several inputs of a linear layer behind it. Both networks have n neurons in a layer, so
the cheapest plan is a permutation: neurons change places, and what the clients' models compute stays the same. The
outputs keep theirs. The local side is `clients.sgd:Sgd`.

Symbols: none of the paper's is left to choose. Its T is `plan`, its cost that of weights ("wts").

Differs from the paper: networks of the same widths only, biases and norms count, and what is fused is what the clients
of a round made of one model, so neurons mostly are where they were: then it is FedAvg. Under a GroupNorm of several
channels to a group, which are not free to go elsewhere, channels are matched within their group.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from fedsim import tree
from fedsim.layers import Layer, chain, check_covered
from fedsim.model import Model
from fedsim.strategy import Strategy
from fedsim.task import Metrics, Params, Replies, Task
from fedsim.transport.discrete import plan
from fedsim.tree import Tree


@dataclass(frozen=True)
class Fusion(Strategy):
    """Averages the clients' models by weight, neurons matched by optimal transport.

    Attributes:
        model: whose network is fused, a chain of linear layers and convolutions.
    """

    model: Model

    @cached_property
    def layers(self) -> list[Layer]:
        """The layers, in the order in which examples pass them."""
        return chain(self.model.module)

    def init(self, params: Params) -> Tree:
        """The model; raises ValueError where its parameters are not those of a chain of layers."""
        check_covered(self.layers, params)
        return {"params": params}

    def configure(self, state: Tree, round: int) -> Task:
        """To train, and to send models one by one: they are matched before they are averaged."""
        return Task("train", {"params": state["params"]}, reduce="stack")

    def aggregate(self, state: Tree, task: Task, replies: Replies) -> tuple[Tree, Metrics]:
        """The mean of the aligned models, and the share of neurons that changed places."""
        present = (replies.weight > 0).nonzero().flatten()  # a client without examples has no model of its own
        if not len(present):
            return state, {}
        params = replies.update["params"]
        fitted = [aligned(self.layers, tree.take(params, client), state["params"]) for client in present]
        weight = replies.weight[present].double()
        moved = torch.tensor([share for _, share in fitted], dtype=torch.float64)
        mean = tree.weighted_mean(tree.stack([model for model, _ in fitted]), weight)
        return {"params": mean}, {"moved": float(moved @ weight / weight.sum())}


def aligned(layers: list[Layer], params: Params, reference: Params) -> tuple[Params, float]:
    """The same function with its hidden neurons in the order of the reference's, and the share that changed places."""
    result, before = dict(params), None
    moved = total = 0
    for layer in layers:
        if layer.weight and before is not None:
            result[layer.weight] = _by_column(result[layer.weight], before)
        if not layer.hidden:
            continue
        before = matching(layer, result, reference)
        for name in layer.names:
            result[name] = _by_row(result[name], before)
        moved += int((before != torch.arange(layer.neurons)).sum())
        total += layer.neurons
    return result, moved / max(total, 1)


def matching(layer: Layer, params: Params, reference: Params) -> Tensor:
    """Which neuron of `params` takes the place of each of the reference's, (n,)."""
    rows = [
        torch.cat([model[name].detach().cpu().double().reshape(layer.neurons, -1) for name in layer.names], 1)
        for model in (reference, params)
    ]
    size = layer.neurons // layer.groups
    order = []
    for start in range(0, layer.neurons, size):
        mine, theirs = (part[start : start + size] for part in rows)
        cost = torch.cdist(mine, theirs, compute_mode="donot_use_mm_for_euclid_dist").square()
        law = np.full(size, 1 / size)
        order.append(start + torch.from_numpy(plan(cost, law, law).argmax(1)))
    return torch.cat(order)


def _by_row(leaf: Tensor, order: Tensor) -> Tensor:
    """A parameter of n neurons, each with one entry or several in a row, those of `order` first."""
    return leaf.reshape(len(order), -1)[order.to(leaf.device)].reshape(leaf.shape)


def _by_column(weight: Tensor, order: Tensor) -> Tensor:
    """The weight of the layer behind n neurons, each one input of it or several in a row."""
    return weight.reshape(len(weight), len(order), -1)[:, order.to(weight.device)].reshape(weight.shape)
