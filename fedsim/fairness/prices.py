"""Prices: what a multiplier on each constraint adds to the cost of each decision.

With multipliers z on the deviations D_u, the Lagrangian of "most accurate, subject to |D_u| <= tolerance" pays a
classifier <M(a), C> for the confusion of group a, with

    M(a, k) = I - 1 / p(a, k) sum_u z_u D_u[a, k].

All D_u come from few numbers: their entries in row i and column j are the same for all i in an event E_v, j = y_v, and
D_u[a, k] / p(a, k) is the same for all clients k. So M needs one price for each group and event, which is what travels.
"""

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from fedsim.fairness.notions import Events


def constraints(found: Events, own: Tensor, everyone: Tensor) -> Tensor:
    """The constraints at one client as matrices, (G, V, G, K, K): the group compared, the rate, and a confusion.

    D[a', v, a, i, j] = 1[j = y_v] 1[i in E_v] p(a, k) (1[a = a'] / p(a', E_v) - 1 / p(E_v)),

    zero where no example of the group a' belongs to E_v. Global constraints come from the distribution of everyone;
    local ones, which hold given the client, from the client's own in both places, divided by its sum.

    Args:
        found: the rates that are compared.
        own: P(group, label, this client), (G, K).
        everyone: P(group, label), (G, K).
    """
    labels = found.labels.to(own.dtype)  # (V, K)
    among = everyone @ labels.T  # (G, V) P(a', E_v)
    total = among.sum(0)  # (V,)
    same = torch.eye(len(own), dtype=own.dtype)[:, None, :]  # (G, 1, G)
    share = torch.where(among > 0, 1 / among, 0)[:, :, None] * same - torch.where(total > 0, 1 / total, 0)[:, None]
    share = torch.where((among > 0)[:, :, None], share, 0) * own.sum(1)  # (G, V, G)
    column = torch.nn.functional.one_hot(found.classes, own.shape[1]).to(own.dtype)  # (V, K)
    return share[..., None, None] * labels[None, :, None, :, None] * column[None, :, None, None, :]


def prices(multipliers: Tensor, among: Tensor) -> Tensor:
    """The price of taking an example of group a whose label belongs to E_v for the class y_v, (G, V).

    price[a, v] = z[a, v] / p(a, E_v) - sum_a' z[a', v] / p(E_v),

    which is (1 / p(a, k)) sum_u z_u D_u[a, k][i, y_v] for i in E_v. Constraints on nobody have no multiplier.

    Args:
        multipliers: signed, z, (G, V): above zero where a rate is to fall.
        among: P(group, label in E_v), (G, V), over those whom the constraints are about: everyone, or one client's.
    """
    there = among > 0
    some = torch.where(there, multipliers, 0)
    whole = torch.where(there.any(0), among.sum(0), 1)  # (V,)
    return some / torch.where(there, among, 1) - some.sum(0) / whole


def charges(multipliers: Tensor, among: Tensor) -> Tensor:
    """The prices, (G, V), but none for a group and event of which nothing is there: it is not in the pooled rate."""
    return torch.where(among > 0, prices(multipliers, among), 0)


def curvature(found: Events, second: Tensor, among: Tensor) -> Tensor:
    """The largest curvature, in multipliers, of sum_j f_j^2 / 2 averaged over examples, f the rewards of decisions, ().

    Over twice the temperature it bounds that of the smooth maximum temperature log sum_j exp(f_j / temperature).

    Args:
        found: the events.
        second: E[b[a, v] b[a', v']], (G, V, G, V), b an example's P(group, label in event).
        among: P(group, label in event), (G, V), as for `charges`.
    """
    size = among.numel()
    units = torch.eye(size, dtype=among.dtype).reshape(size, *among.shape)
    price = torch.func.vmap(charges, (0, None))(units, among).reshape(size, size)
    same = (found.classes[:, None] == found.classes).to(second.dtype)  # (V, V)
    within = (second * same[None, :, None, :]).reshape(size, size)
    largest: Tensor = torch.linalg.eigvalsh(price @ within @ price.T)[-1]
    return largest


def costs(found: Events, price: Tensor) -> Tensor:
    """What the prices take from the reward of a decision: I - M, (G, K, K), rows labels and columns predictions."""
    labels = found.labels.to(price.dtype)  # (V, K)
    column = one_hot(found.classes, labels.shape[1]).to(price.dtype)  # (V, K)
    return torch.einsum("gv,vi,vj->gij", price, labels, column)
