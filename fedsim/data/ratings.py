"""Ratings of items by users: columns "user", "item", "rating", and "time" where it is known, each (E,)."""

from pathlib import Path

import numpy as np
import torch

from fedsim.data.dataset import Dataset
from fedsim.data.files import load
from fedsim.data.sources import FILMTRUST, MOVIELENS_100K
from fedsim.data.tables import Table, parse
from fedsim.task import Batch


def movielens_100k(path: str | Path | None = None) -> Dataset:
    """100,000 ratings, 1 to 5, of 1,682 films by 943 people, in the publisher's order; "time" is in Unix seconds.

    Args:
        path: the folder of u.data.
    """
    table = parse(load(MOVIELENS_100K, path)["u.data"], ("user", "item", "rating", "time"), delimiter="\t")
    columns = _interactions(table) | {"time": torch.from_numpy(table.integers("time"))}
    source = "Harper, Konstan, The MovieLens datasets, ACM TiiS 5(4), 2015, https://doi.org/10.1145/2827872"
    return Dataset("movielens_100k", columns, source=source)


def filmtrust(path: str | Path | None = None) -> Dataset:
    """35,494 ratings, 0.5 to 4, of 2,071 films by 1,508 people, without times.

    Of several ratings of one film by one person the first in the file is kept.

    Args:
        path: the folder of ratings.txt.
    """
    table = parse(load(FILMTRUST, path)["ratings.txt"], ("user", "item", "rating"), delimiter=" ")
    pairs = np.stack([table.integers("user"), table.integers("item")], axis=1)
    first = np.sort(np.unique(pairs, axis=0, return_index=True)[1])
    source = "Guo, Zhang, Yorke-Smith, A novel Bayesian similarity measure for recommender systems, IJCAI 2013"
    return Dataset("filmtrust", _interactions(table.rows(first)), source=source)


def _interactions(table: Table) -> Batch:
    """Users and items numbered from 0 in the order of the publisher's numbers, and the ratings."""
    numbered = {
        name: torch.from_numpy(np.unique(table.integers(name), return_inverse=True)[1]) for name in ("user", "item")
    }
    return numbered | {"rating": torch.from_numpy(table.numbers("rating").astype(np.float32))}
