"""Whether an example was trained on, as an attacker tells from the model: what is forgotten must not be told.

A score is given to each example, the higher the likelier it was trained on, and `auc` says how well it tells members
from others: 1 always, 1/2 not at all. After forgetting, members are the forgotten examples, and others must be like
them in all but that the model never saw them: else the score tells the two kinds apart, not who was trained on.

Loss threshold: Yeom, Giacomelli, Fredrikson, Jha, "Privacy Risk in Machine Learning: Analyzing the Connection to
Overfitting", CSF 2018, https://arxiv.org/abs/1709.01604. The score is minus the loss.

Likelihood ratio: Carlini, Chien, Nasr, Song, Terzis, Tramer, "Membership Inference Attacks From First Principles",
IEEE S&P 2022, https://arxiv.org/abs/2112.03570, Algorithm 1. With phi = log(p / (1 - p)), p the chance that a model
gives an example's class, and shadow models of which half have seen the example,

    score = log N(phi; mean_in, var_in) - log N(phi; mean_out, var_out),

mean_in over the shadows that have seen this example, mean_out over the others.

Differs from the paper: shadows come in pairs that share out the pool, so that each has seen one half of it exactly.
Both variances are shared by all examples, as where the paper has few shadows, and are around each example's own mean.
An example is shown once, not in several augmentations.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from fedsim import tree
from fedsim.data.federation import schedule
from fedsim.forgetting.memory import fresh
from fedsim.model import Model
from fedsim.optim import Optimiser, sgd
from fedsim.randomness import keys, rng, seeding
from fedsim.ranges import Count, Natural, Positive, checked
from fedsim.task import Batch, Params

AT_ONCE = 1024  # examples that a model is shown at a time


class Shadows(NamedTuple):
    """Models that are trained as the attacked one may have been, S of them on halves of a pool of n examples."""

    params: list[Params]  # S
    included: Tensor  # (S, n), bool: whether this shadow has seen this example


class Apart(NamedTuple):
    """How far one model's predictions are from another's, as means over inputs."""

    divergence: float  # KL(p_one || p_other), in nats
    distance: float  # |p_one - p_other|, Euclidean


def auc(members: Tensor, others: Tensor) -> float:
    """The area under the ROC: P(a member's score > another's) + P(they are equal) / 2.

    Args:
        members: scores (m,); infinite ones are allowed.
        others: scores (o,).

    Raises:
        ValueError: there are none of either, or one is not a number.
    """
    for name, scores in (("members", members), ("others", others)):
        if scores.ndim != 1 or not len(scores):
            raise ValueError(f"{name} must be one score or more, (n,), got shape {tuple(scores.shape)}")
        if scores.isnan().any():
            raise ValueError(f"{name}: score {int(scores.isnan().int().argmax())} is not a number")
    order = others.double().sort().values
    below, upto = (torch.searchsorted(order, members.double(), right=right) for right in (False, True))
    return float((below + upto).sum()) / (2 * len(members) * len(others))


def loss_threshold(model: Model, params: Params, members: Batch, others: Batch) -> float:
    """The area under the ROC of minus the loss: how well a threshold on it tells members from others."""
    scores = (-model.criterion(_outputs(model, params, part), part[model.target]) for part in (members, others))
    return auc(*scores)


def log_odds(outputs: Tensor, labels: Tensor) -> Tensor:
    """The log odds phi = log(p / (1 - p)) of each label's chance p, (n,), in float64; finite where p rounds to 1.

    Args:
        outputs: logits (n, K) of two classes or more.
        labels: (n,).
    """
    if outputs.ndim != 2 or outputs.shape[1] < 2:
        raise ValueError(f"outputs must be logits (n, K) of K >= 2 classes, got shape {tuple(outputs.shape)}")
    outputs = outputs.double()
    own = one_hot(labels, outputs.shape[1]).bool()
    return outputs[own] - outputs.masked_fill(own, -torch.inf).logsumexp(1)


@checked
def train_shadows(
    model: Model,
    pool: Batch,
    number: Count,
    seed: Natural,
    lr: Positive,
    epochs: Count,
    batch_size: Count,
    beside: Batch | None = None,
) -> Shadows:
    """Models trained from fresh parameters by plain SGD, each on a random half of the pool, or on the other half of it.

    Args:
        model: what is trained; its own parameters are not used.
        pool: examples (n, ...) of which it may be asked whether they were trained on: members and others alike.
        number: S, of shadows, an even number. Each example is seen by S/2 of them.
        seed: of the halves, the first parameters and the order of examples.
        lr: of the descent.
        epochs: how often a shadow sees each of its examples.
        batch_size: of its steps.
        beside: examples that all shadows see as well: what the model was trained on and is not asked about.

    Raises:
        ValueError: the number is odd, there are less than two examples, a column is missing, or a shadow diverged.
    """
    if number % 2:
        raise ValueError(f"number must be even, so that half of the shadows see an example, got {number}")
    names = (model.inputs, model.target)
    for name, batch in (("pool", pool), ("beside", beside)):
        if batch is not None and (missing := [column for column in names if column not in batch]):
            raise ValueError(f"{name} has no column {' and no column '.join(missing)}")
    size = len(pool[model.target])
    if size < 2:
        raise ValueError(f"pool must have two examples or more, so that each shadow has one, got {size}")
    examples = {name: torch.cat([pool[name], beside[name]]) if beside else pool[name] for name in names}
    rest = torch.arange(size, len(examples[model.target]))
    included = torch.zeros(number, size, dtype=torch.bool)
    found = []
    for shadow in range(number):
        half = torch.from_numpy(rng(seed, "halves", shadow // 2).permutation(size) < size // 2)
        included[shadow] = half if shadow % 2 else ~half
        own = tree.take(examples, torch.cat([included[shadow].nonzero()[:, 0], rest]))
        found.append(_trained(model, own, sgd(lr), epochs, batch_size, seed, shadow))
        if not all(leaf.isfinite().all() for leaf in found[-1].values()):
            raise ValueError(f"shadow {shadow} has parameters that are not finite: lower lr = {lr}")
    return Shadows(found, included)


def _trained(
    model: Model, examples: Batch, optimiser: Optimiser, epochs: int, batch_size: int, seed: int, shadow: int
) -> Params:
    """One shadow, trained on all of its examples."""
    params = fresh(model, int(keys(seed, "shadow", shadow)[0]) >> 1)
    (plan,) = schedule(np.array([len(examples[model.target])]), epochs, batch_size, seed, 0, [shadow])
    with seeding(seed, "shadow", shadow):  # for a module that draws while it is trained
        for step in torch.from_numpy(plan):
            batch = tree.take(examples, step.clamp(min=0)) | {"mask": step >= 0}
            _, slope = model.gradient(params, batch)
            params, _ = optimiser.update(slope, {}, params)
    return params


def likelihood_ratio(model: Model, params: Params, pool: Batch, shadows: Shadows) -> Tensor:
    """The log likelihood ratio of each example's having been trained on, (n,) in float64.

    Args:
        model: its outputs are logits.
        params: of the attacked model.
        pool: the examples that the shadows were trained on halves of.
        shadows: four or more.

    Raises:
        ValueError: there are too few shadows, or they were trained on another pool.
    """
    included, size = shadows.included, len(pool[model.target])
    if included.shape != (len(shadows.params), size):
        expected = f"({len(shadows.params)}, {size}), of as many shadows and examples"
        raise ValueError(f"included must have shape {expected}, got {tuple(included.shape)}")
    if (least := min(int(seen.sum(0).min()) for seen in (included, ~included))) < 2:
        raise ValueError(f"two shadows or more must have seen each example, and as many not, got {least}")

    def phi(of: Params) -> Tensor:
        return log_odds(_outputs(model, of, pool), pool[model.target])

    told = torch.stack([phi(shadow) for shadow in shadows.params])  # (S, n)
    attacked = phi(params)
    return _log_density(attacked, told, included) - _log_density(attacked, told, ~included)


def _log_density(value: Tensor, told: Tensor, chosen: Tensor) -> Tensor:
    """Of values (n,), given each column's mean where chosen (S, n) and the variance around these, up to a constant."""
    number = chosen.sum(0)
    mean = torch.where(chosen, told, 0).sum(0) / number
    variance = torch.where(chosen, told - mean, 0).square().sum() / (number - 1).sum()
    variance = variance.clamp(min=1e-12)  # shadows that all say the same
    return -(variance.log() + (value - mean).square() / variance) / 2


def predictions_apart(model: Model, one: Params, other: Params, inputs: Tensor) -> Apart:
    """How far the first parameters' predictions for inputs (n, ...) are from the others': zero if they are the same."""
    if not len(inputs):
        raise ValueError("inputs must be one or more, got none")
    mine, theirs = (_outputs(model, of, {model.inputs: inputs}).double().log_softmax(1) for of in (one, other))
    divergence = (mine.exp() * (mine - theirs)).sum(1).mean()
    return Apart(float(divergence), float((mine.exp() - theirs.exp()).norm(dim=1).mean()))


def _outputs(model: Model, params: Params, batch: Batch) -> Tensor:
    """What the model says of a batch, (n, ...), asked of a part of it at a time."""
    with torch.no_grad():
        parts = torch.split(batch[model.inputs], AT_ONCE)
        return torch.cat([model.predict(params, {model.inputs: part}) for part in parts])
