"""Problems of which all is known: to be accurate on a finite joint distribution within tolerances."""

from dataclasses import dataclass
from functools import cached_property

import pytest
import torch
from torch import Tensor
from torch.func import jacrev, vmap

from fedsim.data.generated import canonical_table, random_joint
from fedsim.fairness import Events, Notion, belonging, costs, deviations, events, optimum, prices

NOTIONS: dict[str, Notion] = {"DP": "demographic parity", "EOP": "equal opportunity", "EO": "equalised odds"}
JOINTS = {"canonical": canonical_table(), "R1": random_joint(3, 2, 10, 3, 1), "R5": random_joint(3, 2, 10, 3, 5)}


@dataclass(frozen=True)
class Problem:
    """A problem, and how it looks to multipliers, (1 + N, G, V): those of everyone, and those of each client.

    A client's multipliers stand for those of the whole problem over its share p_k of the examples.
    """

    name: str
    notion: str
    at_large: float
    at_home: float
    aware: bool = False
    personal: bool = True

    @cached_property
    def joint(self) -> Tensor:
        """P(client, group, x, label), (N, G, X, K)."""
        return torch.from_numpy(JOINTS[self.name])

    @cached_property
    def events(self) -> Events:
        return events(NOTIONS[self.notion], self.joint.shape[3])

    @cached_property
    def best(self) -> float:
        """The accuracy that the linear program finds."""
        notion = NOTIONS[self.notion]
        return optimum(self.joint.numpy(), notion, self.at_large, self.at_home, self.aware, self.personal).accuracy

    @cached_property
    def tolerance(self) -> Tensor:
        """Of everyone and of each client, (1 + N,)."""
        return torch.tensor([self.at_large] + [self.at_home] * len(self.joint), dtype=torch.float64)

    @cached_property
    def share(self) -> Tensor:
        """Of everyone, 1, and of each client, (1 + N,)."""
        return torch.cat([torch.ones(1, dtype=torch.float64), self.joint.sum((1, 2, 3))])

    @cached_property
    def none(self) -> Tensor:
        """No multipliers."""
        return self.joint.new_zeros(len(self.share), self.joint.shape[1], len(self.events.classes))

    @cached_property
    def charge(self) -> Tensor:
        """What a unit of each multiplier costs whoever sets them, (1 + N, G, V); nothing where there can be none."""
        each = self.share * torch.where(self.tolerance.isinf(), 0, self.tolerance)
        return each[:, None, None] + self.none

    @cached_property
    def weight(self) -> Tensor:
        """Of each row of a classifier, (N or 1, G or 1, X, 1)."""
        return self.seen(self.joint.sum(3))[..., None]

    def seen(self, values: Tensor) -> Tensor:
        """Summed over what the classifier does not see, (N or 1, G or 1, ...)."""
        for axis, sees in enumerate((self.personal, self.aware)):
            values = values if sees else values.sum(axis, keepdim=True)
        return values

    def among(self, mass: Tensor) -> Tensor:
        """What is P(client, group, ...), (N, G, ...), over everyone and given each client, (1 + N, G, ...)."""
        whole = torch.cat([mass.sum(0, keepdim=True), mass])
        return whole / self.share.reshape(-1, *[1] * (mass.ndim - 1))

    def price(self, multipliers: Tensor) -> Tensor:
        """What a decision is charged at each client, (N, G, V)."""
        each = vmap(prices)(multipliers, self.among(belonging(self.events, self.joint).sum(2)))
        return each[0] + each[1:]

    def rewards(self, multipliers: Tensor) -> Tensor:
        """What each decision is worth, times its weight, (N or 1, G or 1, X, K)."""
        taken = vmap(costs, (None, 0))(self.events, self.price(multipliers))
        return self.seen(self.joint - torch.einsum("kaxi,kaij->kaxj", self.joint, taken))

    def apart(self, classifier: Tensor) -> Tensor:
        """How rates deviate, over everyone and at each client, (1 + N, G, V)."""
        belongs = belonging(self.events, self.joint)  # (N, G, X, V)
        taken = (belongs * classifier[..., self.events.classes]).sum(2)
        return vmap(deviations)(self.among(taken), self.among(belongs.sum(2)))

    @cached_property
    def slope(self) -> Tensor:
        """Of the rewards, in the multipliers, (N or 1, G or 1, X, K, multipliers): rewards are affine."""
        return jacrev(self.rewards)(self.none).flatten(4)

    @cached_property
    def effect(self) -> Tensor:
        """Of the classifier, on deviations, (1 + N, G, V, classifier): they are linear."""
        return jacrev(self.apart)(torch.zeros_like(self.rewards(self.none))).flatten(3)

    def accuracy(self, classifier: Tensor) -> float:
        return float((self.joint * classifier).sum())

    def excess(self, classifier: Tensor) -> float:
        """By how much the tolerance is exceeded where it is exceeded most; below zero: not at all."""
        return float((self.apart(classifier).abs().amax((1, 2)) - self.tolerance).max())


@pytest.fixture(scope="session")
def problem() -> type[Problem]:
    """Makes a problem: name of the joint, notion, global and local tolerance, aware, personal."""
    return Problem
