"""One model measured: what it still gets right, gives away, and does with a trigger."""

from collections.abc import Mapping

import torch
from torch import Tensor

from fedsim.certificate.material import Material, some
from fedsim.forgetting import Shadows, auc, likelihood_ratio, loss_threshold, predictions_apart, train_shadows
from fedsim.model import Model
from fedsim.randomness import generator
from fedsim.ranges import Count, Natural
from fedsim.task import Batch, Params

AT_ONCE = 1024  # examples that a model is shown at a time
SHADOW_LR, SHADOW_EPOCHS, SHADOW_BATCH = 0.05, 6, 32


def accuracies(model: Model, params: Params, material: Material) -> dict[str, float]:
    """What is predicted right of each kind of example, as far as there are any."""
    parts = {"forgotten": material.forgotten, "target": material.target, "retained": material.rest}
    found = {f"{name}_accuracy": _right(model, params, part) for name, part in parts.items() if _size(part)}
    if material.stamped is not None:
        guess = predictions(model, params, material.stamped)
        found["attack_success"] = float((guess == material.label).double().mean())
        found["stamped_accuracy"] = float((guess == material.stamped[model.target]).double().mean())
    return found


def membership(
    model: Model, models: Mapping[str, Params], material: Material, shadows: Natural, most: Count, seed: Natural
) -> dict[str, dict[str, float]]:
    """Of each model, how well two attacks tell what was to be forgotten from what nobody trained on.

    Args:
        model: the network.
        models: name -> its parameters.
        material: of which the forgotten are the members.
        shadows: how many models the likelihood ratio is made of; 0: that attack is left out.
        most: how many members and others at most, and how many examples that are kept the shadows see besides for each.
        seed: of what is drawn.
    """
    draw = generator(seed, "membership")
    members, strangers = (some(part, most, draw) for part in (material.forgotten, material.strangers))
    if not _size(strangers):
        return {name: {} for name in models}
    found = {
        name: {"membership_loss": loss_threshold(model, params, members, strangers)} for name, params in models.items()
    }
    if not shadows:
        return found
    columns = (model.inputs, model.target)
    pool = {name: torch.cat([members[name], strangers[name]]) for name in columns}
    beside = some(material.kept, 3 * _size(pool), draw)
    trained: Shadows = train_shadows(
        model, pool, shadows, seed, SHADOW_LR, SHADOW_EPOCHS, SHADOW_BATCH, beside if _size(beside) else None
    )
    for name, params in models.items():
        scores = likelihood_ratio(model, params, pool, trained)
        found[name]["membership_ratio"] = auc(scores[: _size(members)], scores[_size(members) :])
    return found


def apart(model: Model, params: Params, retrained: Params, material: Material) -> dict[str, float]:
    """How far what it says of the examples to be forgotten is from what the retrained model says of them."""
    told = predictions_apart(model, retrained, params, material.forgotten[model.inputs])
    return {"divergence": told.divergence, "distance": told.distance}


def predictions(model: Model, params: Params, examples: Batch) -> Tensor:
    """The class that each example is taken for, (n,)."""
    with torch.no_grad():
        parts = torch.split(examples[model.inputs], AT_ONCE)
        return torch.cat([model.predict(params, {model.inputs: part}).argmax(1) for part in parts])


def _right(model: Model, params: Params, examples: Batch) -> float:
    return float((predictions(model, params, examples) == examples[model.target]).double().mean())


def _size(examples: Batch) -> int:
    return len(next(iter(examples.values())))
