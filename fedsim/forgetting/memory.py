"""New memories: soft labels for what is to be forgotten, by teachers who know nothing.

"Federated Unlearning via Active Forgetting", Knowledge-Based Systems 316, 2025, https://arxiv.org/abs/2307.03363, of
which the formulas here are a derivation. For inputs x, n of them, teachers j = 1..M with random parameters phi_j, and
the classes C(x) that must not come out,

    P_j = softmax(z_phi_j(x) / tau)          P_j <- rownorm(P_j / colmean(P_j))
    q   = mean_j P_j,  q_c <- 0 for c in C(x),  q <- rownorm(q)

The mean over inputs takes out what a random network favours whatever it sees: afterwards its mean is uniform. In C(x)
are the example's own class and those of which nothing is kept: else a memory would bring back what had been forgotten.

Symbols: `temperature` is tau.
"""

import copy
import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax, one_hot

from fedsim.model import Model
from fedsim.networks import seeded
from fedsim.ranges import Positive, checked
from fedsim.task import Batch, Params
from fedsim.tree import Tree

Memory = Literal["teacher", "self", "mix", "random", "uniform", "ascent"]
NEED_BEFORE: tuple[Memory, ...] = ("self", "mix")  # of the model before it forgets


def debiased(probabilities: Tensor) -> Tensor:
    """The same rows (n, K) without what all of them have in common; each sums to one."""
    common = probabilities.mean(0, keepdim=True)
    return _rows(probabilities / common.clamp(min=torch.finfo(common.dtype).tiny))  # some may have no chance anywhere


def forbidden(model: Model, examples: Batch, shared: Tree) -> Tensor:
    """Which classes, (n, K) bool, no memory of an example may point to: its own, and those of which nothing is kept.

    The latter are what the server shares as "gone", (K,) bool, if it does. Where both are all that there are, only an
    example's own is forbidden.

    Raises:
        ValueError: the model has one output, or fewer than there are classes.
    """
    inputs, labels = examples[model.inputs], examples[model.target]
    one = inputs.new_zeros(1, *inputs.shape[1:])  # there may be no example, and not every network takes none
    classes = model.predict(model.params, {model.inputs: one}).shape[1]
    gone = torch.as_tensor(shared.get("gone", torch.zeros(classes, dtype=torch.bool)))
    if classes < max(2, len(gone)):
        raise ValueError(f"the model has {classes} outputs: to forget it needs one for each class, and two at least")
    own = one_hot(labels, classes).bool()
    barred = own.clone()
    barred[:, : len(gone)] |= gone.to(own.device)  # examples are made ready on the CPU, whatever trains on them
    return torch.where(barred.all(1, keepdim=True), own, barred)


def masked(probabilities: Tensor, forbidden: Tensor) -> Tensor:
    """The same rows (n, K) without the classes (n, K) forbidden to each; uniform where nothing else was likely."""
    allowed = (~forbidden).to(probabilities.dtype)
    left = probabilities * allowed
    return _rows(torch.where(left.sum(1, keepdim=True) > 0, left, allowed))


def _rows(values: Tensor) -> Tensor:
    return values / values.sum(1, keepdim=True)


def fresh(model: Model, seed: int) -> Params:
    """First parameters of the same network, drawn anew: those that its layers give themselves.

    Raises:
        ValueError: a layer has parameters, and no `reset_parameters`.
    """

    def build() -> nn.Module:
        module = copy.deepcopy(model.module)
        for name, part in module.named_modules():
            reset = getattr(part, "reset_parameters", None)
            if callable(reset):
                reset()
            elif own := [leaf for leaf, _ in part.named_parameters(recurse=False)]:
                raise ValueError(
                    f"the model's {name or 'module'} has {', '.join(own)} and no reset_parameters(), so no teacher can "
                    "be drawn: give it one"
                )
        return module

    return {name: leaf.detach() for name, leaf in seeded(seed, build).named_parameters() if leaf.requires_grad}


@checked
def new_memories(
    model: Model, inputs: Tensor, forbidden: Tensor, seeds: Sequence[int], temperature: Positive = 1.0
) -> Tensor:
    """What is to be remembered of inputs (n, ...) instead, q, (n, K), by a teacher of each seed.

    Args:
        model: its outputs are logits of the K classes; its parameters are not used.
        inputs: what is to be forgotten.
        forbidden: the classes (n, K) that no memory may point to.
        seeds: of the M teachers; none may be that of the model's own first parameters.
        temperature: tau; default networks hardly differ from one another at 1.

    Raises:
        ValueError: there is no seed, or a layer cannot be drawn anew.
    """
    if not seeds:
        raise ValueError("seeds must name a teacher at least, got none")
    taught = [
        debiased((model.predict(fresh(model, seed), {model.inputs: inputs}) / temperature).softmax(1)) for seed in seeds
    ]
    return masked(torch.stack(taught).mean(0), forbidden)


def memories(
    memory: Memory,
    model: Model,
    inputs: Tensor,
    forbidden: Tensor,
    generator: torch.Generator,
    teachers: int = 3,
    temperature: float = 1.0,
) -> Tensor:
    """What of q, (n, K), does not depend on the model that forgets; see `forgetting_losses` for what does.

    "teacher" and "mix": as `new_memories`; "random": a class that is not `forbidden`, (n, K), drawn for each example;
    "uniform": all of these alike; zero else.
    """
    q = torch.zeros(forbidden.shape, device=forbidden.device)
    if memory in ("teacher", "mix") and len(inputs):
        seeds = torch.randint(2**62, (teachers,), generator=generator).tolist()
        return new_memories(model, inputs, forbidden, seeds, temperature).to(q.dtype)
    if memory == "random" and len(inputs):
        choices = (~forbidden).sum(1)
        multiple = math.lcm(*set(choices.tolist()))  # so that each is as likely as any other
        chosen = torch.randint(multiple, (len(inputs),), generator=generator) % choices
        place = ((~forbidden).cumsum(1) > chosen[:, None]).int().argmax(1)
        return q.scatter(1, place[:, None], 1)
    return masked(q + 1, forbidden) if memory == "uniform" else q


def forgetting_losses(memory: Memory, model: Model, outputs: Tensor, batch: Batch, before: Params | None) -> Tensor:
    """L_f of each example, (B,): -sum_y q(y | x) log p(y | x), or, for "ascent", the model's loss times -1.

    "self": q is what the model said before, without what is forbidden; "mix": the mean of that and the teachers'.

    Args:
        memory: which.
        model: its outputs are logits.
        outputs: of the model that forgets, (B, K).
        batch: with "q" (B, K), out of `memories`, what is "forbidden" (B, K), and the labels.
        before: the model before it forgets, for "self" and "mix".
    """
    if memory == "ascent":
        return -model.criterion(outputs, batch[model.target])
    q = batch["q"]
    if memory in NEED_BEFORE:
        if before is None:
            raise ValueError(f'memory = {memory!r} needs the model before it forgets: set strategy.remember = "model"')
        own = masked(model.predict(before, batch).softmax(1), batch["forbidden"])
        q = own if memory == "self" else (q + own) / 2
    return -(q * log_softmax(outputs, 1)).sum(1)
