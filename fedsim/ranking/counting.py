"""Popularity: how many users have which item, and how active a user is, out of the data of all of them."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsim.data.federation import Federation, Ids
from fedsim.ranking.splitting import WANTED


def recommends(federation: Federation) -> bool:
    """Whether it is one of recommendation, as `leave_one_out` makes them: columns "item", all named, and "y"."""
    return {"item", "y"} <= federation.columns.keys() and "item" in federation.names


def chosen(federation: Federation, part: str) -> NDArray[np.int64]:
    """How many of the items in a part each user chose: those to train on, or those held out there, (N,)."""
    rows, owner = _owned(federation, range(federation.num_clients), part)
    return np.bincount(owner[federation.columns["y"].cpu().numpy()[rows] == WANTED], minlength=federation.num_clients)


def popularity(federation: Federation) -> Tensor:
    """How many users have each item in their training part, (I,).

    Raises:
        ValueError: the federation does not say which items there are, in a column "item" with names.
    """
    if "item" not in federation.columns or "item" not in federation.names:
        raise ValueError(f"{federation.name} has no column item with names of its values")
    rows, _ = _owned(federation, range(federation.num_clients), "train")
    items: Tensor = federation.columns["item"].cpu()[torch.from_numpy(rows)]
    return items.bincount(minlength=len(federation.names["item"]))


def users(federation: Federation, ids: Ids, part: str, popular: Tensor | None) -> dict[str, NDArray[np.float64]]:
    """Of each of C users its "activity", how many items it is trained on, and the "popularity" of its held-out item.

    Args:
        federation: of a split like `leave_one_out`.
        ids: who.
        part: in which the held-out item stands.
        popular: how many users have each item, (I,); None: not known, and the second is left out.
    """
    found = {"activity": federation.sizes("train", ids).astype(np.float64)}
    if popular is None:
        return found
    rows, owner = _owned(federation, ids, part)
    item, y = (federation.columns[name].cpu().numpy()[rows] for name in ("item", "y"))
    held = y == WANTED
    found["popularity"] = np.full(len(ids), np.nan)
    found["popularity"][owner[held]] = popular.cpu().numpy()[item[held]]
    return found


def _owned(federation: Federation, ids: Ids, part: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The rows of the columns that these clients own, and the place of each one's owner among them."""
    start, size = federation.span(ids, part)
    owner = np.repeat(np.arange(len(size)), size)
    within = np.arange(len(owner)) - np.repeat(np.cumsum(size) - size, size)
    return federation.rows[np.repeat(start, size) + within], owner
