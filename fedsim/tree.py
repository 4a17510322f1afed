"""Trees: nested dicts of tensors with string keys, and the few operations that simulation needs on them.

Flattened, the names of the leaves ("params/0.weight") are at once the layout on the wire, the layout on disk and the
vocabulary of error messages.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fedsim.rows import Rows as Rows

Tree = dict[str, Any]  # str -> Tensor | Rows | Tree


def map(function: Callable[..., Any], first: Tree, *others: Tree) -> Tree:  # noqa: A001 - read as tree.map
    """The tree whose leaves are `function` of the corresponding leaves; `Rows` are leaves."""
    for other in others:
        if other.keys() != first.keys():
            raise ValueError(f"trees differ: {sorted(first)} against {sorted(other)}")
    return {
        name: map(function, leaf, *(other[name] for other in others))
        if isinstance(leaf, dict)
        else function(leaf, *(other[name] for other in others))
        for name, leaf in first.items()
    }


def items(tree: Tree, prefix: str = "") -> Iterator[tuple[str, Tensor | Rows]]:
    """(name, leaf) of each leaf, names joined by "/"."""
    for name, leaf in tree.items():
        if not isinstance(name, str) or "/" in name or "@" in name:
            raise ValueError(f"{prefix}{name!r}: a key must be a string without '/' and '@'")
        if isinstance(leaf, dict):
            yield from items(leaf, f"{prefix}{name}/")
        elif isinstance(leaf, Tensor | Rows):
            yield prefix + name, leaf
        else:
            raise TypeError(f"{prefix}{name}: a leaf must be a tensor or Rows, got {type(leaf).__name__}")


def leaves(tree: Tree) -> list[Tensor | Rows]:
    """The leaves, in the order of `items`."""
    return [leaf for _, leaf in items(tree)]


def flatten(tree: Tree) -> dict[str, Tensor]:
    """Tensors by name. `Rows` become three of them: name@index, name@values and name@size."""
    flat: dict[str, Tensor] = {}
    for name, leaf in items(tree):
        if isinstance(leaf, Rows):
            flat |= {f"{name}@index": leaf.index, f"{name}@values": leaf.values}
            flat[f"{name}@size"] = torch.tensor(leaf.size, device=leaf.index.device)
        else:
            flat[name] = leaf
    return flat


def unflatten(flat: Mapping[str, Tensor]) -> Tree:
    """The tree that `flatten` took apart, save for branches without a leaf."""
    tree: Tree = {}
    for name, tensor in flat.items():
        *path, last = name.split("/")
        branch = tree
        for part in path:
            branch = branch.setdefault(part, {})
        if "@" not in last:
            branch[last] = tensor
        elif last.endswith("@index"):
            base = name.removesuffix("@index")
            size = int(flat[f"{base}@size"].flatten()[0]) if flat[f"{base}@size"].numel() else 0
            branch[last.removesuffix("@index")] = Rows(tensor, flat[f"{base}@values"], size)
    return tree


def restore(flat: Mapping[str, Tensor], like: Tree, where: str = "tree") -> Tree:
    """The tree with the leaves of `flat` and the structure of `like`, branches without a leaf included.

    Raises:
        ValueError: leaves are missing, surplus or of another shape; all of them are named.
    """
    wanted = flatten(like)
    wrong = [f"missing {name}" for name in wanted.keys() - flat.keys()]
    wrong += [f"surplus {name}" for name in flat.keys() - wanted.keys()]
    wrong += [
        f"{name} has shape {tuple(flat[name].shape)}, expected {tuple(leaf.shape)}"
        for name, leaf in wanted.items()
        if name in flat and "@" not in name and flat[name].shape != leaf.shape
    ]
    if wrong:
        raise ValueError(f"{where} does not fit: {'; '.join(sorted(wrong))}")
    return _fill(unflatten(flat), like)


def _fill(tree: Tree, like: Tree) -> Tree:
    return {
        name: _fill(tree.get(name, {}), leaf) if isinstance(leaf, dict) else tree[name] for name, leaf in like.items()
    }


def _stack_rows(rows: Sequence[Rows]) -> Rows:
    longest = max(len(leaf.index) for leaf in rows)
    index = rows[0].index.new_full((len(rows), longest), -1)
    values = rows[0].values.new_zeros((len(rows), longest, *rows[0].values.shape[1:]))
    for client, leaf in enumerate(rows):
        index[client, : len(leaf.index)] = leaf.index
        values[client, : len(leaf.index)] = leaf.values
    return Rows(index, values, rows[0].size)


def stack(trees: Sequence[Tree]) -> Tree:
    """One tree with leaves (C, ...) out of C trees with leaves (...)."""

    def join(*same: Any) -> Any:
        return _stack_rows(same) if isinstance(same[0], Rows) else torch.stack(same)

    return map(join, trees[0], *trees[1:])


def concatenate(trees: Sequence[Tree]) -> Tree:
    """One stacked tree out of several, in order."""

    def join(*same: Any) -> Any:
        if not isinstance(same[0], Rows):
            return torch.cat(same)
        return _stack_rows(
            [Rows(i, v, leaf.size) for leaf in same for i, v in zip(leaf.index, leaf.values, strict=True)]
        )

    return map(join, trees[0], *trees[1:]) if len(trees) > 1 else trees[0]


def take(tree: Tree, index: Any) -> Tree:
    """The tree whose leaves are indexed by `index` along their first axis."""

    def pick(leaf: Any) -> Any:
        return Rows(leaf.index[index], leaf.values[index], leaf.size) if isinstance(leaf, Rows) else leaf[index]

    return map(pick, tree)


def clone(tree: Tree) -> Tree:
    """The same tree in memory of its own."""

    def copy(leaf: Any) -> Any:
        return Rows(leaf.index.clone(), leaf.values.clone(), leaf.size) if isinstance(leaf, Rows) else leaf.clone()

    return map(copy, tree)


def to(tree: Tree, device: torch.device) -> Tree:
    """The same tree on a device; leaves that are there already are not copied."""

    def move(leaf: Any) -> Any:
        if isinstance(leaf, Rows):
            return Rows(leaf.index.to(device), leaf.values.to(device), leaf.size)
        return leaf.to(device)

    return map(move, tree)


def where(condition: Tensor, this: Tree, other: Tree) -> Tree:
    """`this` where the condition holds, else `other`; the condition is (), so inside vmap it is one per client."""
    return map(lambda a, b: torch.where(condition, a, b), this, other)


def weighted_mean(tree: Tree, weight: Tensor) -> Tree:
    """sum_c weight_c leaf_c / sum_c weight_c for leaves (C, ...); the plain mean where all weights are zero.

    The weights are normalised before they multiply, so the mean of one client is that client, to the bit.
    `Rows` become those that anybody named.
    """
    weight = weight if weight.sum() > 0 else torch.ones_like(weight)
    share = weight / weight.sum()

    def mean(leaf: Any) -> Any:
        if isinstance(leaf, Rows):
            return leaf.scaled(share).merged()
        leaf = leaf if leaf.is_floating_point() else leaf.double()
        return torch.tensordot(share.to(leaf.dtype), leaf, 1) if len(leaf) > 1 else leaf[0]

    return map(mean, tree)


def total(tree: Tree) -> Tree:
    """The sum over the first axis of leaves (C, ...); `Rows` become those that anybody named."""
    return map(lambda leaf: leaf.merged() if isinstance(leaf, Rows) else leaf.sum(0), tree)


def norm(tree: Tree) -> Tensor:
    """The Euclidean norm of all leaves together, (); zero if there are none."""
    parts = [leaf.dense() if isinstance(leaf, Rows) else leaf for leaf in leaves(tree)]
    return sum((part.square().sum() for part in parts), torch.zeros(())).sqrt()


def count_bytes(tensors: Iterable[Tensor | Rows]) -> int:
    """Bytes that these leaves occupy on a wire; padding rows do not travel."""
    size = 0
    for leaf in tensors:
        if isinstance(leaf, Rows):
            real = int((leaf.index >= 0).sum())
            row = leaf.values.shape[leaf.index.ndim :].numel()
            size += real * (leaf.index.element_size() + row * leaf.values.element_size())
        else:
            size += leaf.numel() * leaf.element_size()
    return size
