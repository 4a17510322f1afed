"""New memories: soft labels for what is to be forgotten, by teachers who know nothing.

"Federated Unlearning via Active Forgetting", Knowledge-Based Systems 316, 2025, https://arxiv.org/abs/2307.03363, of
which the formulas here are a derivation. For inputs x, n of them, teachers j = 1..M with random parameters phi_j, and
the class c that must not come out,

    P_j = softmax(z_phi_j(x) / tau)          P_j <- rownorm(P_j / colmean(P_j))
    q   = mean_j P_j,  q_c <- 0,  q <- rownorm(q)

The mean over inputs takes out what a random network favours whatever it sees: afterwards its mean is uniform.

Symbols: `temperature` is tau.
"""

import copy
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax

from fedsim.model import Model
from fedsim.networks import seeded
from fedsim.ranges import Positive, checked
from fedsim.task import Batch, Params

Memory = Literal["teacher", "self", "mix", "random", "uniform", "ascent"]
NEED_BEFORE: tuple[Memory, ...] = ("self", "mix")  # of the model before it forgets


def debiased(probabilities: Tensor) -> Tensor:
    """The same rows (n, K) without what all of them have in common; each sums to one."""
    common = probabilities.mean(0, keepdim=True)
    return _rows(probabilities / common.clamp(min=torch.finfo(common.dtype).tiny))  # some may have no chance anywhere


def masked(probabilities: Tensor, forbidden: Tensor) -> Tensor:
    """The same rows (n, K) without the class (n,) that is forbidden to each; uniform where nothing else was likely."""
    allowed = torch.ones_like(probabilities).scatter(1, forbidden[:, None], 0)
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
        forbidden: the class (n,) that no memory may point to.
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

    "teacher" and "mix": as `new_memories`; "random": another class, drawn for each example; "uniform": all others
    alike; zero else.
    """
    one = inputs.new_zeros(1, *inputs.shape[1:])  # there may be no example, and not every network takes none
    classes = model.predict(model.params, {model.inputs: one}).shape[1]
    q = torch.zeros(len(inputs), classes)
    if memory in ("teacher", "mix") and len(inputs):
        seeds = torch.randint(2**62, (teachers,), generator=generator).tolist()
        return new_memories(model, inputs, forbidden, seeds, temperature).to(q.dtype)
    if memory == "random":
        other = torch.randint(max(1, classes - 1), (len(inputs),), generator=generator)
        return q.scatter(1, (other + (other >= forbidden))[:, None], 1)
    return masked(q + 1, forbidden) if memory == "uniform" else q


def forgetting_losses(memory: Memory, model: Model, outputs: Tensor, batch: Batch, before: Params | None) -> Tensor:
    """L_f of each example, (B,): -sum_y q(y | x) log p(y | x), or, for "ascent", the model's loss times -1.

    "self": q is what the model said before, without the label; "mix": the mean of that and the teachers'.

    Args:
        memory: which.
        model: its outputs are logits.
        outputs: of the model that forgets, (B, K).
        batch: with "q" (B, K), out of `memories`, and the labels.
        before: the model before it forgets, for "self" and "mix".
    """
    labels = batch[model.target]
    if memory == "ascent":
        return -model.criterion(outputs, labels)
    q = batch["q"]
    if memory in NEED_BEFORE:
        if before is None:
            raise ValueError(f'memory = {memory!r} needs the model before it forgets: set strategy.remember = "model"')
        own = masked(model.predict(before, batch).softmax(1), labels)
        q = own if memory == "self" else (q + own) / 2
    return -(q * log_softmax(outputs, 1)).sum(1)
