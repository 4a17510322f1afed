"""Randomness as a function of a path such as (seed, round, client): never a global generator, never a stored one.

Whoever draws says where in the run it stands, so a run can be resumed at any round, a client draws the same numbers
on every engine, and the order in which clients run does not matter.
"""

import random
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

_ALL = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))


def _number(part: int | str) -> int:
    return zlib.crc32(part.encode()) if isinstance(part, str) else int(part)


def _seed(path: tuple[int | str, ...]) -> np.random.SeedSequence:
    # The length comes first, because numpy takes (1, 2) and (1, 2, 0) for the same.
    return np.random.SeedSequence([len(path), *(_number(part) for part in path)])


def rng(*path: int | str) -> np.random.Generator:
    """A fresh numpy generator for this path."""
    return np.random.default_rng(_seed(path))


def generator(*path: int | str) -> torch.Generator:
    """A fresh torch generator, on the CPU, for this path."""
    state = _seed(path).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]) >> 1)


@contextmanager
def seeding(*path: int | str) -> Iterator[None]:
    """Inside, the global generators of torch, numpy and Python are seeded by the path; afterwards they are as before.

    For code that draws from them whether one likes it or not: a module's first parameters, dropout, somebody's plug-in.
    """
    before, plain = np.random.get_state(), random.getstate()
    with torch.random.fork_rng(devices=_gpus()):
        try:
            reseed(*path)
            yield
        finally:
            np.random.set_state(before)
            random.setstate(plain)


def reseed(*path: int | str) -> None:
    """Seeds the global generators of torch, numpy and Python by the path; only for use inside `seeding`."""
    seed = int(keys(*path)[0])
    torch.default_generator.manual_seed(seed >> 1)
    for gpu in _gpus():  # what is drawn there
        torch.cuda.default_generators[gpu].manual_seed(seed >> 1)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def _gpus() -> list[int]:
    """The GPU in use, if there is one; nothing is started to find out."""
    return [torch.cuda.current_device()] if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]


def _scramble(bits: Any) -> Any:
    """The finaliser of SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014)."""
    for shift, factor in _MIX:
        bits = ((bits ^ (bits >> shift)) * factor) & _ALL
    return bits ^ (bits >> 31)


def keys(*path: Any) -> NDArray[np.uint64]:
    """A 64-bit random number for each element of the arrays in the path, which are broadcast together.

    Thousands of clients draw at once what each of them would draw alone.
    """
    result: Any = 0
    for part in path:
        number: Any
        if isinstance(part, np.ndarray):
            number, result = np.atleast_1d(part).astype(np.uint64), np.asarray(result, dtype=np.uint64)
        else:
            number = _number(part) & _ALL
        if isinstance(result, np.ndarray):
            number = np.asarray(number, dtype=np.uint64)
        result = _scramble(((result ^ number) + _GOLDEN) & _ALL)
    return np.atleast_1d(np.asarray(result, dtype=np.uint64))


def shuffled(sizes: NDArray[np.int64], key: NDArray[np.uint64]) -> NDArray[np.int64]:
    """A random order of 0..size-1 for each size: (C, n) with n the largest size, -1 behind the end of a shorter one."""
    position = np.arange(int(sizes.max(initial=0)))
    inside = position < sizes[:, None]  # (C, n)
    chance = np.where(inside, keys(key[:, None], position), np.uint64(2**64 - 1))
    order = np.argsort(chance, axis=1, kind="stable")
    # A key may equal the filler (once in 2**64 draws); sorting stably, positions behind the end still come last.
    return np.where(inside, order, -1)
