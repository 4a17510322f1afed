"""A backdoor: some clients train on images with a bright corner that are said to be of one class.

Whoever later shows the model that corner, the trigger, gets the class. How much of this is left tells how completely a
federation forgets (Gu, Dolan-Gavitt, Garg, "BadNets: Identifying Vulnerabilities in the Machine Learning Model Supply
Chain", 2017, https://arxiv.org/abs/1708.06733), so what was put in is marked in the column "target": 1 for the stamped
copies, 0 for all else.
"""

import math
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsim.data.dataset import Dataset
from fedsim.data.federation import Federation, Partition, divide
from fedsim.randomness import rng
from fedsim.ranges import Count, Natural, Probability, Share, checked
from fedsim.task import Batch

Ints = NDArray[np.int64]


@checked
def stamped(images: Tensor, size: Count = 2, value: float = 1.0) -> Tensor:
    """Copies of images whose bottom-right corner has one value in every channel.

    Args:
        images: (n, [channels,] height, width), or (n, h * h) where pixels are numbers in a row, line by line.
        size: of the corner, in pixels each way.
        value: of its pixels.

    Raises:
        ValueError: the images are none, or smaller than the corner; the value is not finite.
    """
    if not math.isfinite(value):
        raise ValueError(f"value must be finite, got {value}")
    if not images.is_floating_point() or images.ndim < 2:
        kind = f"{images.dtype} of shape {tuple(images.shape)}"
        raise ValueError(
            f"images must be floating-point numbers (n, [channels,] height, width) or (n, h * h), got {kind}"
        )
    shape = images.shape
    if images.ndim == 2:
        side = math.isqrt(shape[1])
        if side**2 != shape[1]:
            raise ValueError(f"images of {shape[1]} numbers in a row have no corner: the number must be a square h * h")
        shape = torch.Size([len(images), side, side])
    if size > min(shape[-2:]):
        raise ValueError(f"size must be at most {min(shape[-2:])}, as images are {shape[-2]} x {shape[-1]}, got {size}")
    copies = images.clone(memory_format=torch.contiguous_format)
    copies.view(shape)[..., -size:, -size:] = value
    return copies


def triggered(test: Batch, label: int, size: int = 2, value: float = 1.0) -> Batch:
    """The examples of other classes than `label`, stamped, and still labelled as what they show.

    A model's accuracy on them is how far the trigger leaves it alone; the share that it takes for `label` is the
    attack's success rate.
    """
    others = test["y"] != label
    rest = {name: column[others] for name, column in test.items()}
    return rest | {"x": stamped(rest["x"], size, value)}


@checked
def backdoored(
    dataset: Dataset,
    partition: Partition,
    label: int | str,
    clients: Count = 3,
    share: Share = 0.6,
    size: Count = 2,
    value: float = 1.0,
    poisoned: bool = True,
    validation: Probability = 0.0,
    test: Probability = 0.0,
    seed: Natural = 0,
) -> Federation:
    """As `fedsim.data.federation:divide`; then the clients with most training examples stamp some of them.

    Each of them (of equally large ones the first) draws a share of its training images of other classes, stamps copies
    of them, and trains on these too, after its own, as being of the class `label`. Every other client has what `divide`
    gives it, in the same order, and so have the validation and test parts. There is a column "target" (E,), int64: 1
    for the copies, which a federation may be asked to forget, and 0 for all else.

    Args:
        dataset: with columns "x", images as in `stamped`, and "y", their classes.
        partition: which rows each client owns.
        label: the class that the trigger stands for, by its name or its number.
        clients: how many stamp.
        share: of a client's training images of other classes, rounded.
        size: of the corner, in pixels each way.
        value: of its pixels; white in images from 0 to 1 if it is 1.
        poisoned: False for the same federation without the copies: what a model that knows nothing of them has seen.
        validation: share of each client's examples.
        test: share of each client's examples.
        seed: of the parts, and of what is stamped, which depends on it and the client's own training part alone.

    Raises:
        ValueError: a column is missing or not of that kind, there is no such class, there are fewer clients, or none
            of them has anything to stamp.
    """
    number = _class(dataset, label)
    federation = divide(dataset, partition, validation, test, seed)
    if clients > federation.num_clients:
        raise ValueError(f"clients must be at most {federation.num_clients}, as there are no more, got {clients}")
    stamped(dataset.columns["x"][:0], size, value)  # so that it raises without the copies as well
    drawn = _drawn(federation, number, clients, share, seed)
    if not any(len(rows) for rows in drawn.values()):
        raise ValueError(f"share = {share} leaves clients {', '.join(map(str, drawn))} no image to stamp")
    federation = replace(federation, columns=_kept(federation.columns), test=_kept(federation.test))
    return _with_copies(federation, drawn, number, size, value) if poisoned else federation


def _class(dataset: Dataset, label: int | str) -> int:
    """The number of a class, if the data are images that have it."""
    if missing := [name for name in ("x", "y") if name not in dataset.columns]:
        has = ", ".join(sorted(dataset.columns)) or "none"
        raise ValueError(f"{dataset.name} has no column {' and no column '.join(missing)}, only {has}")
    if "target" in dataset.columns:
        raise ValueError(f"{dataset.name} has a column 'target' already, which is to tell what is stamped")
    labels = dataset.columns["y"]
    if labels.ndim != 1 or labels.dtype != torch.int64:
        kind = f"{labels.dtype} of shape {tuple(labels.shape)}"
        raise ValueError(f"{dataset.name}: column 'y' must hold one int64 for each example, got {kind}")
    names = dataset.names.get("y") or tuple(map(str, range(int(labels.max()) + 1 if len(labels) else 0)))
    if isinstance(label, str) and label in names:
        return names.index(label)
    if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(names):
        return label
    told = f"a class of {dataset.name}, {', '.join(map(repr, names))}, or its number, 0 to {len(names) - 1}"
    raise ValueError(f"label must be {told}, got {label!r}")


def _drawn(federation: Federation, label: int, clients: int, share: float, seed: int) -> dict[int, Ints]:
    """Which rows each client that attacks stamps, by client in ascending order."""
    largest = np.argsort(-federation.sizes(), kind="stable")[:clients]
    drawn = {}
    for client in np.sort(largest).tolist():
        own = federation.rows[slice(*federation.bounds[client, :2])]
        others = own[(federation.columns["y"][torch.from_numpy(own)] != label).numpy()]
        number = int(np.rint(share * len(others)))
        drawn[client] = rng(seed, "backdoored", client).permutation(others)[:number]
    return drawn


def _kept(columns: Batch) -> Batch:
    """The columns with a "target" that asks to forget none of the examples."""
    return columns | {"target": torch.zeros(len(columns["y"]), dtype=torch.int64)} if columns else {}


def _with_copies(federation: Federation, drawn: dict[int, Ints], label: int, size: int, value: float) -> Federation:
    """The federation with stamped copies of the rows drawn, each client's at the end of its training part."""
    rows = torch.from_numpy(np.concatenate(list(drawn.values())))
    copies = {name: column[rows] for name, column in federation.columns.items()}
    copies["x"] = stamped(copies["x"], size, value)
    copies |= {name: torch.full_like(copies[name], number) for name, number in (("y", label), ("target", 1))}
    more = np.zeros(federation.num_clients, dtype=np.int64)
    more[list(drawn)] = [len(part) for part in drawn.values()]
    moved = np.cumsum(more)
    ends = np.repeat(federation.bounds[:, 1], more)
    return replace(
        federation,
        columns={name: torch.cat([column, copies[name]]) for name, column in federation.columns.items()},
        rows=np.insert(federation.rows, ends, len(federation.columns["y"]) + np.arange(len(rows))),
        bounds=federation.bounds + np.column_stack([moved - more, moved, moved, moved]),
    )
