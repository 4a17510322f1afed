"""Sampling: round -> the clients that are asked, and who of them is there to answer.

A sampler is any function of (round, among) that gives a Draw; `among` names the clients it may draw from, None for all.
Wrappers (`available`, `dropout`) are samplers around a sampler.
"""

import csv
from pathlib import Path

import numpy as np

from fedsim.data.federation import Federation
from fedsim.randomness import keys, rng
from fedsim.ranges import Count, Natural, Probability, Share, checked
from fedsim.task import Draw, Ids, Sampler


def _size(num_clients: int, fraction: float | None, count: int | None) -> int:
    if (fraction is None) == (count is None):
        raise ValueError(f"give either fraction or count, got fraction = {fraction} and count = {count}")
    if count is None:
        return max(1, round((fraction or 0) * num_clients))
    if count > num_clients:
        raise ValueError(f"count must be at most the number of clients, {num_clients}, got {count}")
    return count


@checked
def uniform(
    num_clients: Count, seed: Natural = 0, fraction: Share | None = None, count: Count | None = None
) -> Sampler:
    """A fraction of all clients, or a number of them, each equally likely; fewer where fewer are there."""
    size = _size(num_clients, fraction, count)

    def sample(round: int, among: Ids | None = None) -> Draw:
        pool = num_clients if among is None else len(among)
        places = np.sort(rng(seed, "uniform", round).choice(pool, min(size, pool), replace=False, shuffle=False))
        return Draw((places if among is None else among[places]).tolist())

    return sample


@checked
def weighted(
    federation: Federation, seed: Natural = 0, fraction: Share | None = None, count: Count | None = None
) -> Sampler:
    """As `uniform`, but a client is the likelier the more training examples it has; never one without any.

    A strategy that also averages by number of examples, as FedAvg does, then counts size twice.

    Drawn without replacement, one after the other in proportion to size (Efraimidis, Spirakis, "Weighted random
    sampling with a reservoir", 2006).
    """
    size = _size(federation.num_clients, fraction, count)
    sizes = federation.sizes()
    inhabited = np.flatnonzero(sizes)

    def sample(round: int, among: Ids | None = None) -> Draw:
        pool = inhabited if among is None else among[sizes[among] > 0]
        waiting = rng(seed, "weighted", round).exponential(size=federation.num_clients)[pool] / sizes[pool]
        first = np.argpartition(waiting, size - 1)[:size] if size < len(pool) else np.arange(len(pool))
        return Draw(np.sort(pool[first]).tolist())

    return sample


@checked
def everyone(num_clients: Count) -> Sampler:
    """All clients in every round."""

    def sample(round: int, among: Ids | None = None) -> Draw:
        return Draw((np.arange(num_clients) if among is None else among).tolist())

    return sample


@checked
def dropout(sample: Sampler, probability: Probability, seed: Natural = 0) -> Sampler:
    """Each client that was drawn fails to answer with this probability. The model was sent to it all the same.

    One such wrapper around another needs another seed, or both lose the same clients.
    """

    def draw(round: int, among: Ids | None = None) -> Draw:
        ids, dropped = sample(round, among)
        gone = keys(seed, "dropout", round, np.array(ids, dtype=np.int64)) / 2.0**64 < probability
        left = [client for client, lost in zip(ids, gone, strict=True) if lost]
        return Draw([client for client, lost in zip(ids, gone, strict=True) if not lost], sorted([*dropped, *left]))

    return draw


@checked
def available(
    sample: Sampler,
    num_clients: Count,
    seed: Natural = 0,
    probability: Probability | None = None,
    trace: Path | str | None = None,
) -> Sampler:
    """Draws only from the clients that are there.

    Either each client is there with a `probability` in each round, or a `trace` says when: a CSV file with the columns
    client, first, last, a line for each span of rounds (both ends included) in which a client is there. One such
    wrapper inside another needs another seed, or both draw the same.
    """
    if (probability is None) == (trace is None):
        raise ValueError(f"give either probability or trace, got probability = {probability} and trace = {trace}")
    spans = None if trace is None else read_trace(Path(trace), num_clients)

    def draw(round: int, among: Ids | None = None) -> Draw:
        pool = np.arange(num_clients) if among is None else among
        if spans is None:
            there = pool[keys(seed, "available", round, pool) / 2.0**64 < (probability or 0)]
        else:
            inside = (spans[:, 1] <= round) & (round <= spans[:, 2])
            there = np.intersect1d(pool, spans[inside, 0])
        return sample(round, there)

    return draw


def read_trace(path: Path, num_clients: int) -> Ids:
    """The spans of an availability trace: (S, 3) of client, first and last round."""
    if not path.is_file():
        raise FileNotFoundError(f"trace {path} does not exist")
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames is None or list(reader.fieldnames) != ["client", "first", "last"]:
            raise ValueError(f"trace {path} must have the columns client, first, last, got {reader.fieldnames}")
        spans = []
        for row in reader:
            try:
                client, first, last = (int(value) for value in row.values())
            except (TypeError, ValueError):  # as raised for a missing value, None, and for surplus ones, a list
                raise ValueError(f"trace {path}, line {reader.line_num}: not three integers: {row}") from None
            if not 0 <= client < num_clients or not 0 <= first <= last < 2**63:
                raise ValueError(
                    f"trace {path}, line {reader.line_num}: client must be in 0..{num_clients - 1} and "
                    f"0 <= first <= last < 2**63, got {client}, {first}, {last}"
                )
            spans.append((client, first, last))
    return np.array(spans, dtype=np.int64).reshape(-1, 3)
