"""Images to classify: columns "x" (E, 1, height, width) and "y" (E,), with a common test set."""

from math import prod
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from annotated_types import Interval
from numpy.typing import NDArray
from torch import Tensor

from fedsim.data.dataset import Dataset
from fedsim.data.files import File, load
from fedsim.data.sources import FASHION_MNIST
from fedsim.randomness import rng
from fedsim.ranges import Natural, checked

_CLOTHES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)


@checked
def digits(test: Annotated[float, Interval(ge=0, lt=1)] = 0.2, seed: Natural = 0) -> Dataset:
    """1,797 handwritten digits of 8 x 8 pixels from 0 to 1, which come with scikit-learn.

    Args:
        test: the share of each class that goes to the common test set.
        seed: which examples those are.
    """
    from sklearn.datasets import load_digits  # here, because it takes longer to import than all of fedsim

    bunch = load_digits()
    images, labels = bunch.images.astype(np.float32) / 16, bunch.target.astype(np.int64)
    mixed = rng(seed, "digits").permutation(len(labels))
    order = mixed[np.argsort(labels[mixed], kind="stable")]  # by class, in random order within
    sizes = np.bincount(labels)
    rank = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)  # position within the class
    chosen = rank < np.repeat(np.rint(test * sizes), sizes)
    columns, held_out = (
        {"x": torch.from_numpy(images[rows][:, None]), "y": torch.from_numpy(labels[rows])}
        for rows in (np.sort(order[~chosen]), np.sort(order[chosen]))
    )
    return Dataset(
        "digits",
        columns,
        held_out if test else {},
        {"y": tuple(str(digit) for digit in range(10))},
        "Alpaydin, Kaynak, Optical recognition of handwritten digits, UCI Machine Learning Repository, 1998, "
        "https://doi.org/10.24432/C50P49",
    )


def fashion_mnist(path: str | Path | None = None) -> Dataset:
    """70,000 pieces of clothing of 28 x 28 pixels, of which the publisher's 10,000 are the common test set.

    Pixels are scaled to mean 0 and standard deviation 1 over the training images.

    Args:
        path: the folder of the four files.
    """
    files = load(FASHION_MNIST, path)
    columns, test = (_labelled(files, part) for part in ("train", "t10k"))
    source = "Xiao, Rasul, Vollgraf, Fashion-MNIST, 2017, https://arxiv.org/abs/1708.07747"
    return Dataset("fashion_mnist", columns, test, {"y": _CLOTHES}, source)


def _labelled(files: dict[str, File], part: str) -> dict[str, Tensor]:
    pictures, answers = files[f"{part}-images-idx3-ubyte"], files[f"{part}-labels-idx1-ubyte"]
    images, labels = _idx(pictures, (28, 28)), _idx(answers, ())
    if len(images) != len(labels):
        raise ValueError(f"{pictures.where} has {len(images)} images, but {answers.where} {len(labels)} labels")
    if labels.max() >= len(_CLOTHES):
        raise ValueError(f"{answers.where}: labels go from 0 to {len(_CLOTHES) - 1}, got {labels.max()}")
    x = torch.from_numpy(images[:, None].astype(np.float32)).div_(255).sub_(0.2860).div_(0.3530)
    return {"x": x, "y": torch.from_numpy(labels.astype(np.int64))}


def _idx(file: File, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """The bytes in an IDX file, (E, *shape): 0, 0, 8 (for bytes), number of dimensions, each of them in 4 bytes."""
    dimensions = 1 + len(shape)
    start = 4 + 4 * dimensions
    if file.content[:4] != bytes((0, 0, 8, dimensions)) or len(file.content) < start:
        raise ValueError(f"{file.where} is not an IDX file of bytes in {dimensions} dimensions")
    examples, *inner = (int(size) for size in np.frombuffer(file.content, ">u4", dimensions, offset=4))
    if tuple(inner) != shape or examples == 0:
        raise ValueError(f"{file.where} holds {examples} arrays of shape {tuple(inner)}, expected {shape}")
    if len(file.content) != start + examples * prod(shape):
        raise ValueError(
            f"{file.where} has {len(file.content)} bytes, expected {start + examples * prod(shape)}: it is cut off"
        )
    return np.frombuffer(file.content, np.uint8, offset=start).reshape(examples, *shape)
