"""The verdict: what was measured of a model that forgot, held against one that never knew."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from fedsim.ranges import NonNegative, check_fields

Measures = Mapping[str, float]  # of one model; what could not be measured is not there
Cost = Mapping[str, float]  # rounds, client_epochs, bytes, seconds


@dataclass(frozen=True)
class Limits:
    """How far the model may be from the retrained one and still count as one that has forgotten.

    Attributes:
        target: the difference in accuracy on what was to be forgotten.
        retained: what the accuracy on the rest may be lower.
        relapse: what the accuracy on the target may be higher after plain rounds.
        backdoor: the share of stamped images that may be taken for the backdoor's label, now and after plain rounds.
        membership: the difference in an attack's area under the ROC.
        cost: client epochs, as a share of retraining's.
    """

    target: NonNegative = 0.02
    retained: NonNegative = 0.02
    relapse: NonNegative = 0.10
    backdoor: NonNegative = 0.20
    membership: NonNegative = 0.03
    cost: NonNegative = 0.20

    def __post_init__(self) -> None:
        check_fields(self)


class Check(NamedTuple):
    """One thing that must hold: the value is at most what is allowed."""

    name: str
    value: float
    allowed: float

    @property
    def holds(self) -> bool:
        """Whether it does; what is not a number does not."""
        return self.value <= self.allowed


def checks(models: Mapping[str, Measures], costs: Mapping[str, Cost], limits: Limits) -> list[Check]:
    """What can be checked of the models "after", "retrained" and "relapsed", and of what they cost.

    The target is what was held out like the examples that were forgotten, and where there is nothing like them those
    examples themselves; of a backdoor, stamped images.
    """
    after, retrained, relapsed = (models.get(name, {}) for name in ("after", "retrained", "relapsed"))
    found = []
    if "attack_success" in after:
        found.append(Check("backdoor success", after["attack_success"], limits.backdoor))
        if relapsed:
            found.append(Check("backdoor success after plain rounds", relapsed["attack_success"], limits.backdoor))
    else:
        on = "target_accuracy" if "target_accuracy" in after else "forgotten_accuracy"
        word = "on the target" if on == "target_accuracy" else "on the forgotten examples"
        found.append(Check(f"difference in accuracy {word}", abs(after[on] - retrained[on]), limits.target))
        if relapsed:
            rise = relapsed[on] - retrained[on]
            found.append(Check(f"more accuracy {word} after plain rounds", rise, limits.relapse))
    gap = retrained["retained_accuracy"] - after["retained_accuracy"]
    found.append(Check("less accuracy on the rest", gap, limits.retained))
    for name, word in (("membership_loss", "loss threshold"), ("membership_ratio", "likelihood ratio")):
        if name in after and name in retrained:
            apart = abs(after[name] - retrained[name])
            found.append(Check(f"difference in membership AUC, {word}", apart, limits.membership))
    share = costs["forgetting"]["client_epochs"] / max(1.0, costs["retraining"]["client_epochs"])
    found.append(Check("client epochs, as a share of retraining’s", share, limits.cost))
    return found


def verdict(found: list[Check]) -> str:
    """In a sentence."""
    failed = [check.name for check in found if not check.holds]
    if failed:
        return f"Not as if retrained: {'; '.join(failed)}."
    return (
        f"As if retrained, by {'the one check' if len(found) == 1 else f'all {len(found)} checks'} that could be made."
    )
