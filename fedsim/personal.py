"""Personal: what clients keep to themselves between rounds, as one stacked tree of those seen so far."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedsim import tree
from fedsim.client import Client
from fedsim.randomness import generator
from fedsim.tree import Tree


class Personal:
    """A row for each client that has kept something; the others stand at their first value, which costs nothing.

    The loop owns it and changes it in place: a million clients' trees are not copied every round.
    """

    def __init__(self, clients: Mapping[str, Client], num_clients: int, seed: int) -> None:
        makers = sorted(clients.items(), key=lambda item: item[0])
        keepers = [client.keeper for _, client in makers]
        self._makers = [client for client in keepers if type(client).personal is not Client.personal]
        self._seed = seed
        self._slot = torch.full((num_clients,), -1)  # (N,) row of each client, -1: not seen
        self._rows: Tree = {}  # leaves (capacity, ...)
        self._seen: list[int] = []

    def first(self, client: int) -> Tree:
        """What a client has before its first round: what each of the experiment's clients wants kept."""
        kept: Tree = {}
        for maker in self._makers:
            # The path names the function, so that clients that share it draw the same, whatever their actions' names.
            function = type(maker).personal.__qualname__
            made = maker.personal(generator(self._seed, "personal", function, client))
            for name in made.keys() & kept.keys():
                if not _equal({name: made[name]}, {name: kept[name]}):
                    raise ValueError(f"two clients of the experiment keep {name!r}, and do not begin it with the same")
            kept = made | kept
        return kept

    def newcomers(self, count: int) -> Tree:
        """What somebody who is none of the N clients would have, so many times, leaves (count, ...)."""
        return tree.stack([self.first(len(self._slot))] * count) if self._makers else {}

    def gather(self, ids: Sequence[int]) -> Tree:
        """What these clients keep, leaves (C, ...)."""
        if not self._makers or not len(ids):
            return {}
        slots = self._slot[torch.as_tensor(list(ids))]
        unseen = [place for place, slot in enumerate(slots.tolist()) if slot < 0]
        fresh = tree.stack([self.first(ids[place]) for place in unseen]) if unseen else {}
        if len(unseen) == len(ids):
            return fresh
        kept = tree.take(self._rows, slots.clamp(min=0))  # indexing by a tensor copies
        if unseen:
            kept = tree.map(lambda leaf, new: leaf.index_copy(0, torch.tensor(unseen), new), kept, fresh)
        return kept

    def scatter(self, ids: Sequence[int], kept: Tree) -> None:
        """Keeps these rows, leaves (C, ...), for these clients; keys that are missing stay as they were."""
        if not kept or not len(ids):
            return
        before = self.gather(ids)
        unknown = kept.keys() - before.keys()
        if unknown:
            raise ValueError(f"a client keeps {sorted(unknown)}, but its personal() makes only {sorted(before)}")
        rows = before | kept
        tree.map(_same_kind, before, rows)  # first, so that what is refused changes nothing
        slots = self._allocate(ids, before)
        tree.map(lambda leaf, new: leaf.index_copy_(0, slots, new), self._rows, rows)

    def _allocate(self, ids: Sequence[int], like: Tree) -> Tensor:
        new = [client for client in ids if self._slot[client] < 0]
        self._slot[torch.tensor(new, dtype=torch.long)] = torch.arange(len(self._seen), len(self._seen) + len(new))
        self._seen += new
        capacity = len(tree.flatten(self._rows)[next(iter(tree.flatten(like)))]) if self._rows else 0
        if len(self._seen) > capacity:
            size = max(2 * capacity, len(self._seen))
            grown = tree.map(lambda leaf: leaf.new_zeros((size, *leaf.shape[1:])), like)
            if self._rows:
                tree.map(lambda leaf, old: leaf[:capacity].copy_(old), grown, self._rows)
            self._rows = grown
        return self._slot[torch.as_tensor(list(ids))]

    def flat(self) -> dict[str, Tensor]:
        """All of it as named tensors, for a checkpoint: the ids (S,) of those seen, and their rows (S, ...)."""
        if not self._seen:
            return {}
        rows = tree.flatten(tree.take(self._rows, slice(0, len(self._seen))))
        return {"ids": torch.tensor(self._seen)} | {f"rows/{name}": leaf for name, leaf in rows.items()}

    def load(self, flat: Mapping[str, Tensor]) -> None:
        """Takes back what `flat` gave; what was kept before is forgotten."""
        self._slot.fill_(-1)
        self._rows, self._seen = {}, []
        if "ids" not in flat:
            return
        ids = flat["ids"].tolist()
        if max(ids) >= len(self._slot):
            raise ValueError(f"client {max(ids)} keeps something, but the ids go from 0 to {len(self._slot) - 1}")
        rows = {name.removeprefix("rows/"): leaf for name, leaf in flat.items() if name != "ids"}
        self.scatter(ids, tree.restore(rows, self.gather(ids), "what clients keep"))


def _equal(one: Tree, other: Tree) -> bool:
    flat = tree.flatten(one), tree.flatten(other)
    return flat[0].keys() == flat[1].keys() and all(torch.equal(leaf, flat[1][name]) for name, leaf in flat[0].items())


def _same_kind(before: Tensor, new: Tensor) -> None:
    if before.shape[1:] != new.shape[1:] or before.dtype != new.dtype:
        raise ValueError(
            f"a client keeps a tensor {tuple(new.shape[1:])} of {new.dtype} where it had "
            f"{tuple(before.shape[1:])} of {before.dtype}"
        )
