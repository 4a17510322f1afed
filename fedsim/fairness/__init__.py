"""Group fairness: rates by group, how far they are apart, what to charge for it, and the best any classifier could do.

All notions of fairness here compare rates P(predicted = y | label in E, group) between groups, for pairs of an event E
(a set of labels) and a class y. Their deviations from the pooled rate are linear in the group confusion matrices

    C[a, i, j] = P(label = i, predicted = j | group = a)                                  at one client, (G, K, K),

so a constraint is a matrix D of the same shape, and its value <D, C>, summed over groups and clients.

Definitions and the linear program follow Wang et al., "FedFACT: A Provable Framework for Controllable Group-Fairness
Calibration in Federated Learning", NeurIPS 2025, https://arxiv.org/abs/2506.03777.
"""

from fedsim.fairness.duals import accelerated, ascend, project, slackness
from fedsim.fairness.measures import (
    Unfairness,
    belonging,
    binding,
    count,
    deviations,
    known,
    max_deviation,
    pairwise_gap,
    rates,
    unfairness,
)
from fedsim.fairness.notions import Events, Notion, events
from fedsim.fairness.optimum import Optimum, optimum
from fedsim.fairness.prices import charges, constraints, costs, curvature, prices

__all__ = [
    "Events",
    "Notion",
    "Optimum",
    "Unfairness",
    "accelerated",
    "ascend",
    "belonging",
    "binding",
    "charges",
    "constraints",
    "costs",
    "count",
    "curvature",
    "deviations",
    "events",
    "known",
    "max_deviation",
    "optimum",
    "pairwise_gap",
    "prices",
    "project",
    "rates",
    "slackness",
    "unfairness",
]
