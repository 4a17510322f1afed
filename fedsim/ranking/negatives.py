"""Negatives: items that a user has not, drawn at a cost that grows with what it has and not with the catalogue."""

import torch
from torch import Tensor


def draw_negatives(has: Tensor, number: int, num_items: int, rng: torch.Generator) -> Tensor:
    """For each of the items (n,) that a user has, so many that it has not, (n, number), no two of these the same.

    Raises:
        ValueError: there are not so many.
    """
    different = len(torch.unique(has))
    if len(has) and num_items - different < number:
        raise ValueError(
            f"negatives = {number}: a user has {different} of {num_items} items, there are not so many others"
        )
    return draw_others(has, len(has), number, num_items, rng)


def draw_others(items: Tensor, rows: int, number: int, num_items: int, rng: torch.Generator) -> Tensor:
    """Rows (rows, number) of items from 0 to I - 1 that are not among `items` (n,), all of a row different.

    Raises:
        ValueError: there are not so many.
    """
    there = torch.unique(items)
    others = num_items - len(there)
    if rows and others < number:
        raise ValueError(f"{number} items other than {len(there)} of {num_items} cannot be drawn")
    found = _places(rows, number, others, rng)
    below = there - torch.arange(len(there))  # how many others are below each that is there
    return found + torch.searchsorted(below, found, right=True)


def _places(rows: int, number: int, others: int, rng: torch.Generator) -> Tensor:
    """The how manieth of the others each of them is, (R, number)."""
    if 2 * number > others:  # most would be drawn twice
        return torch.rand(rows, others, generator=rng).argsort(1)[:, :number]
    found = torch.randint(max(others, 1), (rows, number), generator=rng)
    while (twice := _twice(found)).any():
        found[twice] = torch.randint(others, (int(twice.sum()),), generator=rng)
    return found


def _twice(rows: Tensor) -> Tensor:
    """Whether a number has stood in its row before, (R, number)."""
    ordered, order = rows.sort(dim=1, stable=True)
    twice = torch.zeros_like(rows, dtype=torch.bool)
    return twice.scatter_(1, order[:, 1:], ordered[:, 1:] == ordered[:, :-1])
