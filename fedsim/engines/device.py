"""Device: where clients compute, and what fits there."""

import ctypes
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import fields, is_dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fedsim.model import Model

CPU = torch.device("cpu")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
SPARE = 0.8  # of the memory that is left: the rest is for what an allocator cannot give back in time


@cache
def keep_memory() -> bool:
    """Has freed memory kept for what comes next, instead of given back to the system; whether that could be done.

    A block's tensors come and go with every step, and the system clears what it gives out: that would take a third of
    the time of large blocks. Nothing is done where the C library is not GNU's, or somebody has chosen for themselves.
    """
    if platform.libc_ver()[0] != "glibc" or {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"} & os.environ.keys():
        return False
    # Pieces of up to 32 MiB, which is the most that it allows, come from the heap, of which 1 GiB at most is kept.
    set_option = ctypes.CDLL(None).mallopt
    return bool(set_option(M_MMAP_THRESHOLD, 2**25)) and bool(set_option(M_TRIM_THRESHOLD, 2**30))


def find(name: str) -> torch.device:
    """The device of this name: "cpu", "cuda", "cuda:1".

    Raises:
        ValueError: there is none.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f'device must be "cpu", "cuda" or "cuda:1", say, got {name!r}: {error}') from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f'device must be "cpu" or "cuda", got {name!r}')
    if device.type == "cpu":
        return device
    count = torch.cuda.device_count()
    if not torch.cuda.is_available() or (device.index or 0) >= count:
        built = "" if torch.version.cuda else ", and was built without CUDA"
        raise ValueError(f"device = {name!r}: torch {torch.__version__} finds {count} GPUs here{built}")
    return torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)


@contextmanager
def on(device: torch.device) -> Iterator[None]:
    """Inside, a client's new tensors are made on the device, though it does not name one."""
    if device == CPU:
        yield
        return
    # The second alone would leave "cuda:0" the GPU in use, and only that one's generator is seeded.
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext(), device:
        yield


def moved(part: Any, device: torch.device) -> Any:
    """The same client with its models and tensors on a device, those of its parts too, such as a classifier's."""
    if isinstance(part, Model | Tensor):
        return part.to(device)
    if not is_dataclass(part) or isinstance(part, type):
        return part
    parts = {field.name: getattr(part, field.name) for field in fields(part) if field.init}
    changes = {name: new for name, old in parts.items() if (new := moved(old, device)) is not old}
    return replace(part, **changes) if changes else part


def confine(device: torch.device, share: float) -> None:
    """Bounds what this process may allocate on the device to a share of its memory."""
    if device.type == "cuda" and 0 < share < 1:
        torch.cuda.set_per_process_memory_fraction(share, device)


def peak(device: torch.device, work: Callable[[], object]) -> int:
    """Bytes that are allocated on a GPU while `work` runs, at most, beyond those that were before."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    return int(torch.cuda.max_memory_allocated(device)) - before


def free(device: torch.device) -> int:
    """Bytes that this process may still allocate on a GPU."""
    free, total = torch.cuda.mem_get_info(device)
    own = torch.cuda.get_per_process_memory_fraction(device) * total - torch.cuda.memory_allocated(device)
    return int(min(own, free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)))


def fitting(room: int, two: int, four: int) -> int:
    """How many clients fit into `room` bytes, if two of them at once take `two` bytes and four of them `four`.

    What a block takes is a constant, and so much for each client.
    """
    each = max(1.0, (four - two) / 2 if four > two else four / 4)
    constant = max(0.0, two - 2 * each)
    return max(1, int((SPARE * room - constant) / each))
