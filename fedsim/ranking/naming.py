"""The names of ranking's measures: "hr_10" and "full_ndcg_5", and MostPop's beside them, "mostpop_hr_10"."""

import re
from collections.abc import Iterable
from typing import NamedTuple

MOSTPOP = "mostpop_"  # before a measure's name: what the order by popularity gives
PART = "clients/"  # before the metrics of what users hold out themselves
USUAL = 10  # items proposed, where one number has to do
_NAME = re.compile(r"(full_)?(hr|ndcg)_([1-9][0-9]*)")


class Measure(NamedTuple):
    """A measure of an order of items; they sort as a reader wants them."""

    full: bool  # among all items, not among drawn negatives
    k: int
    kind: str  # "hr" or "ndcg"

    @property
    def name(self) -> str:
        """As a metric: "full_hr_10"."""
        return f"{'full_' if self.full else ''}{self.kind}_{self.k}"

    @property
    def label(self) -> str:
        """As people write it: "HR@10"."""
        return f"{self.kind.upper()}@{self.k}"


def ranked(names: Iterable[str]) -> list[Measure]:
    """Those of the names that are measures of a method, in order: drawn negatives first, then by K; not MostPop's."""
    found = (_NAME.fullmatch(name) for name in names)
    return sorted({Measure(match[1] is not None, int(match[3]), match[2]) for match in found if match})


def usual(names: Iterable[str]) -> list[Measure]:
    """Of these the hit rate and the NDCG at 10, or at the number nearest to it; drawn negatives first."""
    found = ranked(names)
    chosen = {
        full: min((m.k for m in found if m.full == full), key=lambda k: (abs(k - USUAL), k))
        for full in {m.full for m in found}
    }
    return [m for m in found if chosen[m.full] == m.k]


def is_ranking(name: str) -> bool:
    """Whether a metric measures an order of items, a method's or MostPop's."""
    return _NAME.fullmatch(name.removeprefix(MOSTPOP)) is not None


def foremost(metrics: Iterable[str]) -> list[str]:
    """Of a run's metrics those of `usual`, as they are called there: "clients/hr_10"."""
    return [f"{PART}{m.name}" for m in usual(name.removeprefix(PART) for name in metrics if name.startswith(PART))]


def beside(metric: str) -> str:
    """What MostPop's is called, of a run's metric: "clients/mostpop_hr_10"."""
    return f"{PART}{MOSTPOP}{metric.removeprefix(PART)}"
