"""Ratings of items by users: columns "user", "item", and "rating" and "time" where they are known, each (E,)."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedsim.data.dataset import Dataset, left_out
from fedsim.data.files import load
from fedsim.data.interactions import collect
from fedsim.data.sources import FILMTRUST, MOVIELENS_100K
from fedsim.data.tables import Table, parse
from fedsim.task import Batch

_WHOLE = re.compile(r"-?[0-9]{1,18}")


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


def ratings(
    path: str | Path,
    columns: tuple[str, ...] | dict[str, str] | None = None,
    header: bool = False,
    delimiter: str = ",",
    encoding: str = "utf-8",
    min_rating: float | None = None,
) -> Dataset:
    r"""Interactions of users with items out of a text file of yours: user, item, and rating and time if any.

    Each line is one. Ids are any text, so "7" and "07" are two. They are numbered from 0, in numeric order if all of
    them are whole numbers (of 18 digits at most) and else sorted as text; names["user"] and names["item"] tell what
    each was. Of several interactions of a user with an item the first in the file is kept. Times may have fractions;
    they are int64 if none has. Blank lines are passed over, and spaces around a cell are no part of it. Of
    10 million lines about a gigabyte is held. The notes say how many interactions were left out, and why.

    Args:
        path: the file; it may be compressed with gzip.
        columns: what stands in the file's columns, in order: "user", "item", "rating", "time", or "-" for one that is
            passed over. With a header it may be a table of what the header calls them, such as {user = "userId",
            item = "movieId"}; others are passed over then. By default without a header user, item, rating, time, and
            with one the columns that it calls so.
        header: whether the first line says what the columns are called.
        delimiter: what stands between cells: ",", ";", "\t", "::" or another text; " " for any spaces or tabs. With
            "," and ";" a cell may stand in quotes.
        encoding: such as "latin-1". With "utf-8" the file may begin with a BOM.
        min_rating: interactions with a lower rating are left out first, with the users and items that have no other.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: something in the file or an argument is not right; names the line and what is allowed.
    """
    place = Path(path)
    found, names = collect(place, columns, header, delimiter, encoding)
    if min_rating is not None and "rating" not in found:
        raise ValueError(f"{place}: min_rating = {min_rating} needs a column 'rating', there are {', '.join(found)}")
    kept, notes = _kept(found, names, min_rating, str(place))
    numbered = {role: _numbered(found.pop(role)[kept], names[role]) for role in ("user", "item")}
    data = {role: codes for role, (codes, _) in numbered.items()} | {role: cells[kept] for role, cells in found.items()}
    return Dataset(
        place.name.partition(".")[0] or place.name,
        {role: torch.from_numpy(column) for role, column in data.items()},
        names={role: called for role, (_, called) in numbered.items()},
        source=str(place),
        notes=notes,
    )


def _kept(
    found: Mapping[str, NDArray[Any]], names: Mapping[str, Sequence[str]], min_rating: float | None, where: str
) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Which stay, ascending: those rated high enough, and of each user with each item the first; and what does not."""
    number = len(found["user"])
    high = np.arange(number)
    if min_rating is not None:
        high = np.flatnonzero(found["rating"] >= np.float32(min_rating))
        if not len(high):
            raise ValueError(
                f"{where}: no rating is at least min_rating = {min_rating}, the highest is {found['rating'].max()}"
            )
    pairs = found["user"][high] * len(names["item"]) + found["item"][high]
    kept = high[np.sort(np.unique(pairs, return_index=True)[1])]
    below, again = f"rated below min_rating = {min_rating}", "one that is there already"
    low = left_out(len(high), number, "interactions", f"is {below}", f"are {below}")
    return kept, low + left_out(len(kept), len(high), "interactions", f"repeats {again}", f"repeat {again}")


def _numbered(codes: NDArray[np.int64], names: Sequence[str]) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """The same numbered anew, in the order of the names of those that occur; and these names."""
    present, codes = np.unique(codes, return_inverse=True)
    called = [names[code] for code in present]
    whole = all(map(_WHOLE.fullmatch, called))
    order = sorted(range(len(called)), key=lambda place: (int(called[place]) if whole else 0, called[place]))
    number = np.empty(len(order), dtype=np.int64)
    number[order] = np.arange(len(order))
    return number[codes], tuple(called[place] for place in order)


def _interactions(table: Table) -> Batch:
    """Users and items numbered from 0 in the order of the publisher's numbers, and the ratings."""
    numbered = {
        name: torch.from_numpy(np.unique(table.integers(name), return_inverse=True)[1]) for name in ("user", "item")
    }
    return numbered | {"rating": torch.from_numpy(table.numbers("rating").astype(np.float32))}
