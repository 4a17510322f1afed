"""Distillation: the mean of the clients' models, taught the barycenter of what these predict on a probe set.

Dognin, Melnyk, Mroueh, Ross, Dos Santos, Sercu, "Wasserstein Barycenter Model Ensembling", ICLR 2019,
https://arxiv.org/abs/1902.04999; the federated frame is that of Lin, Kong, Stich, Jaggi, "Ensemble Distillation for
Robust Model Fusion in Federated Learning", NeurIPS 2020, https://arxiv.org/abs/2006.07242, Algorithm 1. With w_k the
clients' models, p_k(x) their class probabilities on a probe example x, and M the cost of taking one class for another:

    w    <- sum_k n_k w_k / sum_k n_k
    q(x)  = argmin_q sum_k n_k W_M(p_k(x), q)                            for each x of the probe set
    w    <- w - lr Adam(gradient of mean_x -sum_j q_j(x) log p_j(x; w))  `steps` times, each on a batch of the probe set

The mean stays where the steps, all together, do not lead nearer to the targets.

The local side is `clients.sgd:Sgd`.

Symbols: `cost` is M, `temperature` the weight of the entropy in W ("epsilon" in the former paper), `steps` and `lr` N
and eta in the latter, which has the mean of logits in the place of q.

Differs from the papers: probabilities weigh in by the clients' examples; the exact barycenter too (`temperature` 0, for
W itself and not its power: a majority decides); steps in float64, because Adam magnifies what is left of a gradient by
rounding; no early stopping, as the server has no labels.

What it costs: the costs with a name and temperature 0 are medians, some 20 ms for 500 probe examples of 20 clients and
10 classes. By a matrix each probe example is a linear program, of 25 ms; with a temperature, iterations of 1 to 30 ms.
"""

import copy
import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsim import tree
from fedsim.data.dataset import Dataset
from fedsim.data.federation import Federation
from fedsim.model import Model, gradient
from fedsim.optim import adam
from fedsim.randomness import generator, rng
from fedsim.ranges import Count, Natural, NonNegative, Positive, checked
from fedsim.strategy import Strategy
from fedsim.task import Metrics, Params, Replies, Task
from fedsim.transport.discrete import barycenter, entropic_barycenter
from fedsim.transport.medians import ordinal_barycenter, uniform_barycenter
from fedsim.tree import Tree

Cost = Literal["uniform", "ordinal"] | tuple[tuple[NonNegative, ...], ...]


@dataclass(frozen=True)
class Distillation(Strategy):
    """Averages the clients' models by weight, then distils the barycenter of their outputs into the mean.

    Attributes:
        model: whose outputs are logits of K classes.
        probe: examples to predict, of which the model's inputs are used alone: `noise`, `held_out`, or any data set.
        cost: of taking a class for another. "uniform": 1; "ordinal": |i - j|; or a table, K by K.
        temperature: 0: the exact barycenter; above: that for plans with entropy, smoother.
        steps: of Adam in a round; 0 is FedAvg.
        lr: Adam's step size, falling to zero over the steps along a cosine.
        batch_size: probe examples in a step.
        seed: of the batches.
    """

    model: Model
    probe: Dataset
    cost: Cost = "uniform"
    temperature: NonNegative = 0.0
    steps: Natural = 50
    lr: Positive = 1e-3
    batch_size: Count = 64
    seed: Natural = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.probe, Dataset):
            kind = type(self.probe).__name__
            raise ValueError(f"probe must be a Dataset, such as noise() makes, got a {kind}")
        if self.model.inputs not in self.probe.columns:
            has = ", ".join(self.probe.columns) or "none"
            raise ValueError(f"probe has no column {self.model.inputs}, which the model reads; it has {has}")
        if not len(self.probe):
            raise ValueError("probe must hold an example, it is empty")
        if not isinstance(self.cost, str) and {len(row) for row in self.cost} != {len(self.cost)}:
            raise ValueError(f"cost must be square, got rows of {[len(row) for row in self.cost]} entries")

    @cached_property
    def inputs(self) -> Tensor:
        """What the models are to predict, (n, ...)."""
        inputs = self.probe.columns[self.model.inputs]
        return inputs.double() if inputs.is_floating_point() else inputs

    @cached_property
    def exact(self) -> Model:
        """The model in float64."""
        return replace(self.model, module=copy.deepcopy(self.model.module).double())

    def init(self, params: Params) -> Tree:
        """The model; raises ValueError where it cannot predict the probe set, or has other classes than the cost."""
        shape = tuple(self.inputs.shape)
        try:
            outputs = self._predict(_exactly(params), self.inputs[:1])
        except (RuntimeError, IndexError, ValueError) as error:
            raise ValueError(f"the model cannot predict the probe set of shape {shape}: {error}") from error
        if outputs.ndim != 2 or outputs.shape[1] < 2:
            raise ValueError(f"the model must give logits of K classes, (n, K); it gives {tuple(outputs.shape)}")
        classes = outputs.shape[1]
        if not isinstance(self.cost, str) and len(self.cost) != classes:
            raise ValueError(f"cost must have {classes} rows, one for each class of the model; got {len(self.cost)}")
        return {"params": params}

    def configure(self, state: Tree, round: int) -> Task:
        """To train, and to send models one by one, or their mean where nothing is made of them but that."""
        return Task("train", {"params": state["params"]}, reduce="stack" if self.steps else "mean")

    def aggregate(self, state: Tree, task: Task, replies: Replies) -> tuple[Tree, Metrics]:
        """The mean model, distilled; and how far it was from the targets before and after, as divergence in nats."""
        if not self.steps:
            return {"params": replies.update["params"]}, {}
        present = (replies.weight > 0).nonzero().flatten()  # a client without examples has no model of its own
        if not len(present):
            return state, {}
        models, weight = tree.take(replies.update["params"], present), replies.weight[present].double()
        mean = tree.weighted_mean(models, weight)
        laws = [self._predict(_exactly(tree.take(models, k)), self.inputs).softmax(1) for k in range(len(present))]
        target = torch.from_numpy(self.targets(torch.stack(laws).numpy(force=True), weight.numpy(force=True)))
        params = self._distil(_exactly(mean), target, task.round)
        before, after = self._divergence(mean, target), self._divergence(params, target)
        told = {"divergence/before": before, "divergence/after": after}
        # Where all clients agree nothing is to be learned, and Adam would take rounding for a gradient.
        params = tree.map(lambda new, old: new.to(old.dtype), params, mean) if after < before else mean
        return {"params": params}, told

    def targets(self, laws: NDArray[np.float64], weight: NDArray[np.float64]) -> NDArray[np.float64]:
        """The barycenters (n, K) of the clients' probabilities (C, n, K)."""
        named = {"uniform": uniform_barycenter, "ordinal": ordinal_barycenter}
        if isinstance(self.cost, str) and not self.temperature:
            return named[self.cost](laws, weight)
        cost = _between(self.cost, laws.shape[2])
        if self.temperature:
            each = [entropic_barycenter(law, cost, weight, self.temperature) for law in laws.swapaxes(0, 1)]
        else:
            each = [barycenter(law, cost, weight) for law in laws.swapaxes(0, 1)]
        return np.stack(each)

    def _predict(self, params: Params, inputs: Tensor) -> Tensor:
        with torch.no_grad():
            return self.exact.predict(params, {self.model.inputs: inputs})

    def _loss(self, params: Params, inputs: Tensor, target: Tensor) -> Tensor:
        """The cross-entropy of the model's probabilities to the target."""
        outputs = self.exact.predict(params, {self.model.inputs: inputs})
        return -(target * outputs.log_softmax(1)).sum(1).mean()

    def _divergence(self, params: Params, target: Tensor) -> float:
        with torch.no_grad():
            own = torch.xlogy(target, target).sum(1).mean()
            return float(self._loss(_exactly(params), self.inputs, target) + own)

    def _distil(self, params: Params, target: Tensor, round: int) -> Params:
        """The model after `steps` steps of Adam, each on the next batch of the probe set in a random order."""
        state, order = adam(self.lr).init(params), generator(self.seed, "distillation", round)
        rows = torch.zeros(0, dtype=torch.int64)
        size = min(self.batch_size, len(target))
        for step in range(self.steps):
            if len(rows) < size:
                rows = torch.cat([rows, torch.randperm(len(target), generator=order)])
            batch, rows = rows[:size], rows[size:]
            _, slope = gradient(self._loss, params, self.inputs[batch], target[batch])
            rate = self.lr * (1 + math.cos(math.pi * step / self.steps)) / 2
            params, state = adam(rate).update(slope, state, params)
        return params


def _exactly(params: Params) -> Params:
    return tree.map(Tensor.double, params)


def _between(cost: Cost, size: int) -> NDArray[np.float64]:
    """The cost of each pair of classes, (K, K)."""
    if cost == "uniform":
        return 1 - np.eye(size)
    if cost == "ordinal":
        return np.abs(np.subtract.outer(np.arange(size), np.arange(size))).astype(np.float64)
    return np.array(cost, dtype=np.float64)


@checked
def noise(
    federation: Federation,
    model: Model,
    examples: Count = 500,
    law: Literal["uniform", "normal"] = "uniform",
    seed: Natural = 0,
) -> Dataset:
    """A probe set that nobody's data went into: inputs of the shape of theirs, uniform in [0, 1) or standard normal."""
    like = federation.columns[model.inputs]
    if not like.is_floating_point():
        raise ValueError(f"noise stands for numbers, and column {model.inputs} of {federation.name} holds {like.dtype}")
    draw = {"uniform": torch.rand, "normal": torch.randn}[law]
    values = draw((examples, *like.shape[1:]), generator=generator(seed, "probe"), dtype=torch.float64)
    return Dataset(f"{law} noise", {model.inputs: values.to(like.dtype)})


@checked
def held_out(
    federation: Federation, model: Model, dataset: Dataset, examples: Count = 500, seed: Natural = 0
) -> Dataset:
    """A probe set out of public data: the inputs of some of its examples, without their labels.

    Raises:
        ValueError: it has fewer examples, or is what the clients hold.
    """
    if model.inputs not in dataset.columns:
        raise ValueError(f"{dataset.name} has no column {model.inputs}, only {', '.join(dataset.columns)}")
    inputs, private = dataset.columns[model.inputs], federation.columns[model.inputs]
    if inputs.shape == private.shape and torch.equal(inputs, private):
        raise ValueError(f"{dataset.name} is what the clients hold: a probe set must be public")
    if examples > len(dataset):
        raise ValueError(f"examples must be at most {len(dataset)}, as many as {dataset.name} has; got {examples}")
    rows = torch.from_numpy(rng(seed, "probe").permutation(len(dataset))[:examples])
    return Dataset(dataset.name, {model.inputs: inputs[rows]}, source=dataset.source)
