"""Dataset: the columns of one data set, before they are divided among clients."""

from dataclasses import dataclass, field, replace

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Dataset:
    """Columns of equal length, and what their values are called.

    Columns that several parts of fedsim know by name: "x" features (float32), "y" labels (int64, 0..K-1), "a" the
    sensitive group (int64, 0..G-1), "user", "item" (int64 from 0), "rating" (float32), "time" (int64; float64
    where it has fractions).
    """

    name: str
    columns: dict[str, Tensor]  # leaves (E, ...), E examples: what is divided among clients
    test: dict[str, Tensor] = field(default_factory=dict)  # leaves (E', ...): a common test set; {} where there is none
    names: dict[str, tuple[str, ...]] = field(default_factory=dict)  # column -> what its values 0, 1, ... are called
    source: str = ""  # whom to cite
    notes: tuple[str, ...] = ()  # what was left out of it, a sentence each

    def __post_init__(self) -> None:
        for which, columns in (("columns", self.columns), ("test", self.test)):
            for name, column in columns.items():
                if not isinstance(column, Tensor):
                    kind = type(column).__name__
                    raise TypeError(f"{self.name}: column {name!r} of {which} must be a torch.Tensor, got a {kind}")
            if "mask" in columns:
                raise ValueError(f"{self.name}: no column of {which} may be called 'mask', which marks padding")
            lengths = {name: len(column) for name, column in columns.items()}
            if len(set(lengths.values())) > 1:
                raise ValueError(f"{self.name}: the {which} must be equally long, got {lengths}")
            for name in ("y", "a"):
                if name in columns and name in self.names:
                    self._check_named(which, name, columns[name])
        if self.test and self.test.keys() != self.columns.keys():
            raise ValueError(f"{self.name}: test has columns {sorted(self.test)}, training {sorted(self.columns)}")

    def _check_named(self, which: str, name: str, column: Tensor) -> None:
        """Labels and groups are told apart by their numbers: one without a name would be taken for another's."""
        if not column.numel():
            return
        least, most, number = column.min().item(), column.max().item(), len(self.names[name])
        if least < 0 or most >= number:
            raise ValueError(
                f"{self.name}: column {name!r} of {which} has names for 0 to {number - 1}, and values from {least} to "
                f"{most}: name them all, or leave out the examples of which it is not known"
            )

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))


def left_out(kept: int, number: int, what: str, one: str, several: str) -> tuple[str, ...]:
    """The note that says so: "5 of 7 users: 2 have no items"; none if all were kept.

    Args:
        kept: how many were.
        number: how many there were.
        what: they are, "users".
        one: why, if a single one was left out, "has no items".
        several: why, if more were, "have no items".
    """
    lost = number - kept
    return (f"{kept:,} of {number:,} {what}: {lost:,} {one if lost == 1 else several}",) if lost else ()


def joint_labels(dataset: Dataset) -> Dataset:
    """The same with a column "ay" of group and label together, a K + y: what attribute-blind methods learn to score."""
    missing = {"a", "y"} - dataset.names.keys()
    if missing:
        raise ValueError(f"{dataset.name} names no values of {' and '.join(sorted(missing))}: joint labels need both")
    labels = dataset.names["y"]

    def joined(columns: dict[str, Tensor]) -> dict[str, Tensor]:
        return columns | ({"ay": columns["a"] * len(labels) + columns["y"]} if columns else {})

    names = tuple(f"{group}, {label}" for group in dataset.names["a"] for label in labels)
    return replace(
        dataset,
        columns=joined(dataset.columns),
        test=joined(dataset.test),
        names=dataset.names | {"ay": names},
    )
