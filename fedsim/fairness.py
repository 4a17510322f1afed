"""Group fairness: rates by group, how far they are apart, and the best that any classifier could do within a bound.

All notions of fairness here compare rates P(predicted = y | label in E, group) between groups, for pairs of an event E
(a set of labels) and a class y. Their deviations from the pooled rate are linear in the group confusion matrices

    C[a, i, j] = P(label = i, predicted = j | group = a)                                  at one client, (G, K, K),

so a constraint is a matrix D of the same shape, and its value <D, C>, summed over groups and clients.

Definitions and the linear program follow Wang et al., "FedFACT: A Provable Framework for Controllable Group-Fairness
Calibration in Federated Learning", NeurIPS 2025, https://arxiv.org/abs/2506.03777.
"""

from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linprog
from scipy.sparse import coo_array, csr_array
from torch import Tensor

Notion = Literal["demographic parity", "equal opportunity", "equalised odds", "mean equalised odds"]
Floats = NDArray[np.float64]


class Events(NamedTuple):
    """What a notion of fairness compares between groups: V rates."""

    labels: Tensor  # (V, K) whether a label belongs to the event
    classes: Tensor  # (V,) the class that is predicted

    def name(self, number: int) -> str:
        """One of them, in words."""
        belong = self.labels[number].nonzero().flatten().tolist()
        if len(belong) == self.labels.shape[1]:
            given = ""
        elif len(belong) == 1:
            given = f" | {belong[0]}"
        else:
            given = f" | not {self.classes[number]}"
        return f"P({self.classes[number]}{given})"


def events(notion: Notion, num_classes: int) -> Events:
    """The rates that a notion compares.

    Demographic parity: all labels, each class. Equal opportunity: the class itself (true positive rates). Equalised
    odds: every label, each class. Mean equalised odds, one versus the rest: true and false positive rates.
    """
    one = torch.eye(num_classes, dtype=torch.bool)
    classes = torch.arange(num_classes)
    match notion:
        case "demographic parity":
            return Events(torch.ones_like(one), classes)
        case "equal opportunity":
            return Events(one, classes)
        case "equalised odds":
            return Events(one.repeat_interleave(num_classes, 0), classes.repeat(num_classes))
        case "mean equalised odds":
            return Events(torch.cat([one, ~one]), classes.repeat(2))
    raise ValueError(
        f"notion must be demographic parity, equal opportunity, equalised odds or mean equalised odds, got {notion!r}"
    )


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


def rates(found: Events, confusion: Tensor) -> Tensor:
    """P(predicted = y_v | label in E_v, group), (..., G, V), NaN where there is no such example.

    Args:
        found: the rates that are wanted.
        confusion: how often which label was taken for which class in which group, (..., G, K, K); any scale.
    """
    labels = found.labels.to(confusion.dtype)
    predicted = torch.einsum("vi,...aiv->...av", labels, confusion[..., found.classes])
    among = torch.einsum("vi,...ai->...av", labels, confusion.sum(-1))
    return predicted / among


class Unfairness(NamedTuple):
    """How far rates are apart, (..., V) each."""

    deviation: Tensor  # of the group that is farthest from the pooled rate
    gap: Tensor  # between the two groups that are farthest from each other


def unfairness(found: Events, confusion: Tensor) -> Unfairness:
    """The largest deviation from the pooled rate, and the largest gap between two groups.

    Groups without examples of an event are left out of it.
    For two groups the deviation is (1 - share of the smaller group) times the gap, about half of it: they must not be
    taken for each other.

    Args:
        found: the rates that are compared.
        confusion: counts, (..., G, K, K).
    """
    each = rates(found, confusion)  # (..., G, V)
    pooled = rates(found, confusion.sum(-3, keepdim=True))  # (..., 1, V)
    there = ~each.isnan()
    deviation = torch.where(there, (each - pooled).abs(), 0).amax(-2)
    most = torch.where(there, each, -torch.inf).amax(-2)
    least = torch.where(there, each, torch.inf).amin(-2)
    return Unfairness(deviation, (most - least).clamp(min=0))


def max_deviation(found: Events, confusion: Tensor) -> float:
    """The largest deviation of a group's rate from the pooled one, over everything in `confusion`, (..., G, K, K)."""
    return float(unfairness(found, confusion).deviation.max())


def pairwise_gap(found: Events, confusion: Tensor) -> float:
    """The largest difference of a rate between two groups, over everything in `confusion`, (..., G, K, K)."""
    return float(unfairness(found, confusion).gap.max())


class Optimum(NamedTuple):
    """The best classifier within bounds."""

    accuracy: float
    classifier: Floats  # (N, G, X, K) P(predicted | client, group, x); the same along an axis that it may not see


def optimum(
    joint: Floats,
    notion: Notion,
    global_tolerance: float = float("inf"),
    local_tolerance: float = float("inf"),
    aware: bool = True,
    personal: bool = True,
) -> Optimum:
    """The best accuracy that any randomised classifier could have whose deviations stay within the tolerances, exactly.

    A linear program over P(predicted | client, group, x), solved by HiGHS:

        maximise sum P[k, a, x, j] h[k, a, x, j]   subject to   |D_u(h)| <= tolerance for every global and local u.

    Args:
        joint: P(client, group, x, label), (N, G, X, K), non-negative; divided by its sum. For a sample of n examples
            with scores, X are the examples and an example's row holds its scores over n.
        notion: of fairness.
        global_tolerance: for the rates of all clients together; infinity: no such constraints.
        local_tolerance: for the rates at each client.
        aware: whether the classifier sees the group.
        personal: whether each client may have its own.

    Raises:
        ValueError: the joint is no distribution, or a tolerance is negative.
    """
    joint = np.asarray(joint, dtype=np.float64)
    if joint.ndim != 4 or not np.isfinite(joint).all() or joint.min(initial=0.0) < 0 or not joint.sum() > 0:
        raise ValueError(
            f"joint must be P(client, group, x, label): four axes, non-negative, not all zero; got shape {joint.shape}"
        )
    for name, tolerance in (("global_tolerance", global_tolerance), ("local_tolerance", local_tolerance)):
        if not tolerance >= 0:
            raise ValueError(f"{name} must be at least 0, got {tolerance}")
    joint = joint / joint.sum()
    clients, groups, points, num_classes = joint.shape
    # Axes that the classifier may not see are summed over: what remains is indexed as its variables are.
    hidden = tuple(axis for axis, seen in ((0, personal), (1, aware)) if not seen)
    rows, bounds = _rows(joint, notion, global_tolerance, local_tolerance)
    gain = joint.sum(hidden, keepdims=True)
    rows = rows.sum(tuple(axis + 1 for axis in hidden), keepdims=True).reshape(len(rows), gain.size)
    cells = gain.size // num_classes
    each = np.arange(gain.size)
    sums = csr_array((np.ones(gain.size), (each // num_classes, each)), shape=(cells, gain.size))
    found = linprog(
        -gain.ravel(),
        A_ub=coo_array(np.concatenate([rows, -rows])) if len(rows) else None,
        b_ub=np.concatenate([bounds, bounds]) if len(rows) else None,
        A_eq=sums,
        b_eq=np.ones(cells),
        bounds=(0, 1),
        method="highs",
    )
    if found.status != 0:  # constant classifiers meet every tolerance, so this is never the caller's doing
        raise RuntimeError(f"the linear program was not solved: {found.message}")
    classifier = np.broadcast_to(found.x.reshape(gain.shape), (clients, groups, points, num_classes))
    return Optimum(float(-found.fun), classifier)


def _rows(joint: Floats, notion: Notion, global_tolerance: float, local_tolerance: float) -> tuple[Floats, Floats]:
    """The constraints on P(predicted | client, group, x), (U, N, G, X, K), and the tolerance of each, (U,)."""
    clients, groups, _, num_classes = joint.shape
    found = events(notion, num_classes)
    labels, classes = found.labels.numpy(), found.classes.numpy()
    mass = np.einsum("vi,kaxi->kaxv", labels, joint)  # P(client, group, x, label in E_v)
    column = np.eye(num_classes)[classes]  # (V, K)
    parts, bounds = [], []
    scopes = [(global_tolerance, np.ones(clients, dtype=bool))]
    scopes += [(local_tolerance, np.arange(clients) == client) for client in range(clients)]
    for tolerance, some in scopes:
        if np.isinf(tolerance):
            continue
        among = mass[some].sum((0, 2))  # (G, V)
        total = among.sum(0)
        for group in range(groups):
            for number in range(len(classes)):
                if not among[group, number]:
                    continue  # nobody is compared
                weight = (np.arange(groups) == group) / among[group, number] - 1 / total[number]
                row = some[:, None, None] * weight[None, :, None] * mass[..., number]  # (N, G, X)
                parts.append(row[..., None] * column[number])
                bounds.append(tolerance)
    if not parts:
        return np.zeros((0, *joint.shape)), np.zeros(0)
    return np.stack(parts), np.array(bounds)
