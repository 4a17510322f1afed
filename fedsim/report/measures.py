"""What a run measured: which numbers matter most, which way is better, and what came out in the end."""

import re
from collections.abc import Collection, Iterable
from typing import NamedTuple

import numpy as np

from fedsim.ranking import is_ranking
from fedsim.report.reading import RunRecord

_ROUND = ("round", "seconds", "clients", "failed", "bytes_down", "bytes_up", "converged")
BOOKKEEPING = frozenset({*_ROUND, "request", "evaluate/bytes_down", "evaluate/bytes_up"})
_LOWER = frozenset(
    {"loss", "error", "rmse", "mae", "mse", "perplexity", "gap", "deviation", "violation", "disparity", "distance"}
)
_HIGHER = frozenset({"accuracy", "auc", "f1", "precision", "recall", "hr", "ndcg", "mrr", "map"})


class Outcome(NamedTuple):
    """How one metric went."""

    first: float
    last: float  # NaN where it was not finite
    last_round: int
    best: float | None  # None where nobody knows which way is better, or it was never finite
    best_round: int | None


def direction(name: str) -> int:
    """1 where more is better, -1 where less is, 0 where the name does not tell."""
    words = set(re.findall(r"[a-z0-9]+", name.rsplit("/", 1)[-1].lower()))
    return -1 if words & _LOWER else 1 if words & _HIGHER else 0


def measured(record: RunRecord) -> list[str]:
    """The metrics of a run without time, traffic and counts; the evaluated ones first, accuracy before loss."""
    return sorted(record.metrics.keys() - BOOKKEEPING, key=_rank)


def curved(record: RunRecord) -> list[str]:
    """Those that are drawn one by one: all but how far groups are apart, and recommendations, which have a section."""
    elsewhere = apart(record.metrics)
    return [name for name in measured(record) if name not in elsewhere and not _recommends(name)]


def _recommends(name: str) -> bool:
    """Whether it is a measure of recommendation, or how one is spread over users: "clients/hr_10/min"."""
    group, _, leaf = name.partition("/")
    return group == "clients" and is_ranking(leaf.partition("/")[0])


def notions(names: Collection[str]) -> dict[str, list[str]]:
    """The notions of fairness by which groups are compared, for "test" and "clients": those with gap and deviation."""
    found: dict[str, list[str]] = {}
    for part in ("test", "clients"):
        leaves = {name.removeprefix(f"{part}/") for name in names if name.startswith(f"{part}/")}
        both = {leaf.removesuffix("_gap") for leaf in leaves if leaf.endswith("_gap")}
        both &= {leaf.removesuffix("_deviation") for leaf in leaves if leaf.endswith("_deviation")}
        if pooled := sorted(notion for notion in both if not notion.startswith("local_")):
            found[part] = pooled
    return found


def apart(names: Collection[str]) -> set[str]:
    """Those of the metrics that tell how far groups are apart."""
    kinds = [(scope, end) for scope in ("", "local_") for end in ("gap", "deviation")]
    pairs = [(part, notion) for part, some in notions(names).items() for notion in some]
    return {f"{part}/{scope}{notion}_{end}" for part, notion in pairs for scope, end in kinds} & set(names)


def main(names: Iterable[str]) -> list[str]:
    """The measures of the test set and of the clients of which one knows which way is better."""
    evaluated = [name for name in names if name.count("/") == 1 and name.split("/")[0] in ("test", "clients")]
    return sorted((name for name in evaluated if direction(name)), key=_rank)


def _rank(name: str) -> tuple[int, int, int, str]:
    group, _, leaf = name.partition("/")
    groups, leaves = ["test", "clients", "train"], ["accuracy", "loss"]
    return (
        name.count("/") if name.count("/") > 1 else 1,
        groups.index(group) if group in groups else len(groups),
        1 if leaf not in leaves else 2 * leaves.index(leaf),
        name,
    )


def outcome(record: RunRecord, name: str) -> Outcome | None:
    """First, last and best value of a metric; None where it was never measured."""
    rounds, values = record.series(name)
    if not len(values):
        return None
    best = None
    sign = direction(name)
    if sign and np.isfinite(values).any():
        best = int(np.nanargmax(sign * values))
    return Outcome(
        float(values[0]),
        float(values[-1]),
        int(rounds[-1]),
        None if best is None else float(values[best]),
        None if best is None else int(rounds[best]),
    )


def total(record: RunRecord, name: str) -> float | None:
    """The sum of a metric over all rounds; None where it was never measured."""
    _, values = record.series(name)
    return float(np.nansum(values)) if len(values) else None


def label(name: str) -> str:
    """A metric's name for a reader: "Test accuracy", "Clients' loss"; others stay as they are."""
    group, _, leaf = name.partition("/")
    if "/" in leaf or group not in ("test", "clients", "train") or not leaf:
        return name
    return f"{ {'test': 'Test', 'clients': 'Clients’', 'train': 'Training'}[group] } {leaf}"
