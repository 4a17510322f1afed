"""What one must know of a certificate's measurements, in sentences."""

import math
from collections.abc import Mapping

import torch

from fedsim.certificate.material import Material
from fedsim.certificate.verdict import Limits
from fedsim.config import Experiment

POWER = 0.55  # of an attack that is worth the name


def of_lengths(first: int, again: int) -> list[str]:
    """Where the retrained model was not trained for as many rounds as the first one."""
    told = f"The first model had {first} rounds, the retrained one {again}: they differ for that as well."
    return [told] if first != again else []


def of_training(first: Experiment, again: Experiment) -> list[str]:
    """Where the retrained model was trained otherwise than the first one, apart from the server's strategy."""
    parts = {"clients.train": (first.clients.get("train"), again.clients.get("train"))}
    parts |= {"sample": (first.sample, again.sample)}
    differing = " and ".join(f"{name} is {one} and {two}" for name, (one, two) in parts.items() if one != two)
    told = (
        f"The first model and the retrained one were not trained alike, so they differ for that as well: {differing}."
    )
    return [told] if differing else []


def of_end(rounds: int, done: bool) -> list[str]:
    """Where the run ended before its strategy was done, with some of what it was to forget perhaps not forgotten."""
    told = f"The run is measured after {rounds} rounds; its strategy would have gone on."
    return [] if done else [told]


def of_measurements(
    models: Mapping[str, Mapping[str, float]], about: Material, shadows: int, most: int, limits: Limits
) -> list[str]:
    """What they are not about, and how much chance is in them."""
    notes = [] if "relapsed" in models else ["No plain rounds were taken, so a relapse would not have been seen."]
    if len(about.target["target"]) and (unlike := _unlike(about)):
        notes.append(
            f"{unlike} of the examples to be forgotten are like nothing held out: the accuracy on the target is not "
            "about them, and an attack holds them against others than their like."
        )
    members, others = (min(most, len(part["target"])) for part in (about.forgotten, about.strangers))
    if not others:
        return [*notes, "No attack on membership was made: there is nothing held out like what was forgotten."]
    error = math.sqrt((members + others + 1) / (12 * members * others))
    few = "" if 2 * error <= limits.membership else f": too large to tell a difference of {limits.membership:g} by"
    notes.append(f"A membership AUC, of {members} against {others} examples, has a standard error of {error:.3f}{few}.")
    notes += [] if shadows else ["No attack by likelihood ratio was made."]
    attacks = [value for name, value in models.get("before", {}).items() if name.startswith("membership")]
    if attacks and max(attacks) < POWER:
        notes.append(
            f"The attacks on membership tell little of the model before either (AUC {max(attacks):.2f} at most), so "
            "that they tell little of the one after proves nothing."
        )
    return notes


def _unlike(about: Material) -> int:
    """Of how many examples to be forgotten the request names none that is held out: of samples, or of a client."""
    return int((~torch.isin(about.forgotten["target"], about.target["target"])).sum())
