"""The optimum: the best that any classifier could do within bounds, by linear programming."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog
from scipy.sparse import coo_array, csr_array

from fedsim.fairness.notions import Notion, events

Floats = NDArray[np.float64]


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
