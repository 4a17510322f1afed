"""Handwritten digits in two: what clients hold, and what is public and has no labels."""

from dataclasses import replace

import torch
from torch import Tensor

from fedsim.data.dataset import Dataset
from fedsim.data.datasets import digits
from fedsim.randomness import rng

PUBLIC = 500  # examples


def _rows(dataset: Dataset, seed: int) -> Tensor:
    return torch.from_numpy(rng(seed, "public").permutation(len(dataset)))


def private(seed: int = 0) -> Dataset:
    """The digits but for the public ones, with the same test set."""
    dataset = digits(seed=seed)
    rows = _rows(dataset, seed)[PUBLIC:]
    return replace(dataset, columns={name: column[rows] for name, column in dataset.columns.items()})


def public(seed: int = 0) -> Dataset:
    """The public digits, their inputs alone."""
    dataset = digits(seed=seed)
    return Dataset("public digits", {"x": dataset.columns["x"][_rows(dataset, seed)[:PUBLIC]]}, source=dataset.source)
