"""Checkpoints: named tensors and a round in a file of safetensors, whole at any moment."""

import json
from collections import Counter
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from fedsim.files import replace_by

FORMAT = 1


def write_checkpoint(path: Path, flat: dict[str, Tensor], round: int) -> None:
    """Writes named tensors; the same tensors give the same bytes."""
    told = json.dumps({"format": FORMAT, "round": round})  # one entry, as safetensors writes several in any order
    leaves = _apart(flat)
    replace_by(path, lambda temporary: safetensors.torch.save_file(leaves, temporary, {"fedsim": told}))


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], int]:
    """The named tensors of a checkpoint, and its round."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            told = json.loads((file.metadata() or {}).get("fedsim", "{}"))
            flat = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except SafetensorError as error:
        raise ValueError(f"checkpoint {path} is damaged: {error}; remove it to go on from the one before it") from error
    if told.get("format") != FORMAT:
        raise ValueError(f"checkpoint {path} has format {told.get('format')}, this version reads {FORMAT}")
    return flat, int(told["round"])


def _apart(flat: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same leaves; a copy of those that safetensors refuses, as they share memory with another or are strided."""
    places = Counter(leaf.untyped_storage().data_ptr() for leaf in flat.values())
    return {
        name: leaf.detach()
        if leaf.is_contiguous() and places[leaf.untyped_storage().data_ptr()] == 1
        else leaf.detach().clone(memory_format=torch.contiguous_format)
        for name, leaf in flat.items()
    }
