"""Records: a tree as the records of a message, and the record "fedsim" that says what the others cannot."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import safetensors
import torch
from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from safetensors.torch import load, save

from fedsim.flower.arrays import MalformedMessage, flatten, pack, unflatten, unpack
from fedsim.tree import Tree

VERSION = 1
NUMBERS = {f"{sign}int{bits}": getattr(torch, f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64)}
NUMBERS |= {name: getattr(torch, name) for name in ("bool", "float16", "bfloat16", "float32", "float64")}
_IN_REST = {*NUMBERS.values(), torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2}  # safetensors holds no others


class Halves(NamedTuple):
    """A tree in two: what Flower's strategies look at, and what they do not."""

    arrays: ArrayRecord
    about: dict[str, Any]  # for the record "fedsim"


def split(whole: Tree) -> Halves:
    """The model's arrays, and all other branches as "rest"."""
    params = whole.get("params")
    model = isinstance(params, dict)
    rest = flatten({name: branch for name, branch in whole.items() if not (model and name == "params")})
    about: dict[str, Any] = {"version": VERSION, "params": model}
    for name, leaf in rest.items():
        if leaf.dtype not in _IN_REST:
            raise TypeError(f"{name}: {leaf.dtype} can only travel in the branch 'params'")
        if name == "__metadata__":
            raise ValueError("'__metadata__' cannot be the name of a leaf: safetensors keeps it for itself")
    if rest:
        about["rest"] = save({name: leaf.detach().cpu().contiguous().clone() for name, leaf in rest.items()})
    return Halves(pack(params) if isinstance(params, dict) else ArrayRecord(), about)


def join(arrays: ArrayRecord, about: Mapping[str, Any], where: str) -> Tree:
    """The tree that `split` took in two."""
    params = unpack(arrays, f"{where}: arrays")
    if params and not about.get("params", True):
        raise MalformedMessage(f"{where}: arrays hold {', '.join(params)}, and there should be none")
    if not isinstance(about.get("params", True), bool):
        raise MalformedMessage(f"{where}: params says whether there is a model, got {about['params']!r}")
    whole: Tree = {"params": params} if about.get("params", True) else {}
    rest = about.get("rest", b"")
    if not isinstance(rest, bytes):
        raise MalformedMessage(f"{where}: rest is a {type(rest).__name__}, must be bytes")
    try:
        loaded = load(rest) if rest else {}
    except (safetensors.SafetensorError, KeyError, RuntimeError, ValueError, OverflowError) as error:
        raise MalformedMessage(f"{where}: rest is not in safetensors format: {error}") from None
    others = unflatten(loaded, f"{where}: rest")
    if "params" in others and "params" in whole:
        raise MalformedMessage(f"{where}: there are two branches 'params'")
    return whole | others


def about_of(content: RecordDict, where: str) -> Mapping[str, Any]:
    """The record "fedsim"; empty in messages of other apps."""
    return checked(config_of(content, "fedsim", where), where)


def checked(about: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """What a message says of itself, if this fedsim can read it."""
    if about and about.get("version") != VERSION:
        raise MalformedMessage(
            f"{where}: of version {about.get('version')!r}; this fedsim reads version {VERSION}: "
            "have the same fedsim on all nodes"
        )
    return about


def config_of(content: RecordDict, name: str, where: str) -> Mapping[str, Any]:
    """A record of words; empty where there is none."""
    record = content.get(name, ConfigRecord())
    if not isinstance(record, ConfigRecord):
        raise MalformedMessage(f"{where}: {name!r} is a {type(record).__name__}, must be a ConfigRecord")
    return record


def list_of(record: Mapping[str, Any], name: str, kind: type, where: str) -> list[Any]:
    """A list of values of one type; empty where there is none."""
    found = record.get(name, [])
    if not isinstance(found, list) or not all(type(value) is kind for value in found):
        raise MalformedMessage(f"{where}: {name} must be a list of {kind.__name__}, got {str(found)[:200]}")
    return found


def only(records: Mapping[str, Any], kind: str, where: str) -> Any:
    """The one record of its kind."""
    if len(records) != 1:
        raise MalformedMessage(f"{where}: must hold one {kind}, holds {', '.join(map(repr, records)) or 'none'}")
    return next(iter(records.values()))
