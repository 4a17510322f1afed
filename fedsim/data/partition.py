"""Partitioners: which client owns which row, as pure functions of the columns and a seed.

Every row goes to exactly one client, and a client's rows stand in ascending order. Each function first decides the
owner of every row, (E,), and then sorts the rows by owner, so a million clients take no loop.
"""

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from fedsim.data.codes import Ints, integers, numbered
from fedsim.data.federation import Partition
from fedsim.randomness import rng
from fedsim.ranges import Count, Natural, Positive, Probability, checked
from fedsim.task import Batch

TRIES = 50  # draws before a minimum is said to be out of reach

Floats = NDArray[np.float64]
Hands = Iterator[tuple[Ints, Ints]]  # rows (n,), and how many of them each client gets (N,)


@checked
def iid(columns: Batch, seed: Natural, clients: Count) -> Partition:
    """Every client gets a random sample of the rows; sizes differ by one at most."""
    examples = _room(columns, "iid", clients, 1)
    return _collect(rng(seed, "iid").permutation(np.arange(examples) % clients), clients)


@checked
def dirichlet(
    columns: Batch, seed: Natural, clients: Count, alpha: Positive, column: str = "y", min_size: Natural = 1
) -> Partition:
    """The rows of each value of `column` are divided among the clients in shares drawn from a Dirichlet(alpha).

    The smaller alpha, the fewer clients own most rows of a value; a large alpha is iid. All shares are drawn again
    until every client has at least `min_size` rows.

    Hsu, Qi, Brown, "Measuring the effects of non-identical data distribution", 2019, https://arxiv.org/abs/1909.06335.

    Raises:
        ValueError: if `min_size` was not reached in 50 draws.
    """
    examples = _room(columns, "dirichlet", clients, min_size)
    groups = _groups(numbered(columns, column))

    def draw(random: np.random.Generator) -> Hands:
        return ((rows, _cut(_shares(random, clients, alpha), len(rows))) for rows in groups)

    return _redraw(draw, "dirichlet", seed, examples, clients, min_size)


@checked
def dirichlet_balanced(
    columns: Batch,
    seed: Natural,
    clients: Count,
    alpha: Positive,
    column: str = "a",
    min_size: Natural = 10,
    min_cell: Natural = 0,
    draws: Count = TRIES,
) -> Partition:
    """As `dirichlet`, but a client that already holds E / N rows gets none of the next value.

    Sizes are therefore even while the clients' shares of the values of `column`, usually the sensitive group, are not.
    Everything is drawn again until every client has at least `min_size` rows, and `min_cell` of each value.

    Raises:
        ValueError: if the minima were not reached in so many draws.
    """
    examples = _room(columns, "dirichlet_balanced", clients, min_size)
    codes = numbered(columns, column)
    groups = _groups(codes)

    def draw(random: np.random.Generator) -> Hands:
        held = np.zeros(clients, dtype=np.int64)
        for rows in groups:
            free = held * clients < examples  # never empty: fewer than E rows are dealt so far
            shares = _shares(random, clients, alpha) * free
            shares = shares if shares.sum() > 0 else free.astype(float)  # all of a tiny alpha's weight was taken away
            counts = _cut(shares / shares.sum(), len(rows))
            held += counts
            yield rows, counts

    return _redraw(draw, "dirichlet_balanced", seed, examples, clients, min_size, codes, min_cell, draws)


@checked
def shards(columns: Batch, seed: Natural, clients: Count, shards_per_client: Count = 2, column: str = "y") -> Partition:
    """The rows, sorted by `column`, are cut into equal shards, and each client gets `shards_per_client` of them.

    McMahan, Moore, Ramage, Hampson, Aguera y Arcas, "Communication-efficient learning of deep networks from
    decentralized data", AISTATS 2017, https://arxiv.org/abs/1602.05629.
    """
    number = clients * shards_per_client
    examples = _room(columns, "shards", number, 1, "shards")
    random = rng(seed, "shards")
    mixed = random.permutation(examples)  # rows of one value in random order
    order = mixed[np.argsort(numbered(columns, column)[mixed], kind="stable")]
    owner = np.empty(examples, dtype=np.int64)
    owner[order] = np.repeat(random.permutation(number) % clients, _even(examples, number))
    return _collect(owner, clients)


@checked
def quantity_skew(
    columns: Batch, seed: Natural, clients: Count, alpha: Positive = 1.0, min_size: Natural = 1
) -> Partition:
    """Random rows for everybody, but unequally many: `min_size`, and a share of the rest drawn from a Dirichlet(alpha).

    The smaller alpha, the more rows the largest clients have.
    """
    examples = _room(columns, "quantity_skew", clients, min_size)
    random = rng(seed, "quantity_skew")
    sizes = min_size + _cut(_shares(random, clients, alpha), examples - clients * min_size)
    return _collect(random.permutation(np.repeat(np.arange(clients), sizes)), clients)


@checked
def by_column(columns: Batch, seed: Natural = 0, column: str = "client") -> Partition:
    """One client for each distinct value of `column`, in the order of the values: nothing is drawn."""
    codes = numbered(columns, column)
    return _collect(codes, int(codes.max(initial=-1)) + 1)


@checked
def correlation(
    columns: Batch,
    seed: Natural,
    clients: Count,
    low: Probability = 0.2,
    high: Probability = 0.8,
    attribute: str = "a",
    label: str = "y",
    min_size: Natural = 1,
) -> Partition:
    """Clients in which label and attribute agree to different degrees.

    Client k draws gamma_k uniformly from [low, high]. The rows with attribute i and label j are divided in proportion
    to gamma_k if i = j and 1 - gamma_k otherwise, rounded by largest remainders. Everything is drawn again until every
    client has at least `min_size` rows.

    Raises:
        ValueError: if low > high, or `min_size` was not reached in 50 draws.
    """
    if low > high:
        raise ValueError(f"low must be at most high, got low = {low}, high = {high}")
    examples = _room(columns, "correlation", clients, min_size)
    attributes, labels = (integers(columns, name) for name in (attribute, label))
    cells = [
        (i == j, rows)
        for i in np.unique(attributes)
        for j in np.unique(labels)
        if len(rows := np.flatnonzero((attributes == i) & (labels == j)))
    ]

    def draw(random: np.random.Generator) -> Hands:
        gamma = random.uniform(low, high, size=clients)
        return ((rows, apportion(gamma if agree else 1 - gamma, len(rows))) for agree, rows in cells)

    return _redraw(draw, "correlation", seed, examples, clients, min_size)


def apportion(weights: Floats, total: int) -> Ints:
    """Whole numbers in proportion to the weights that add up to `total`, rounded by largest remainders."""
    whole = weights.sum()
    quota = (weights / whole if whole > 0 else np.full(len(weights), 1 / len(weights))) * total
    counts: Ints = np.floor(quota).astype(np.int64)
    counts[np.argsort(counts - quota, kind="stable")[: total - counts.sum()]] += 1
    return counts


def _shares(random: np.random.Generator, clients: int, alpha: float) -> Floats:
    shares = random.dirichlet(np.full(clients, alpha))
    if not abs(shares.sum() - 1) < 1e-6:  # underflow or overflow, and NaN
        raise ValueError(f"alpha = {alpha} is too extreme for a Dirichlet distribution over {clients} clients")
    return shares


def _cut(shares: Floats, total: int) -> Ints:
    """How many of `total` rows lie between one cumulated share and the next, (N,)."""
    ends = np.minimum(np.floor(np.cumsum(shares) * total), total).astype(np.int64)
    # Rounding may leave the sum just below 1; what is missing belongs to the last client with a share.
    ends[np.flatnonzero(shares)[-1] :] = total
    return np.asarray(np.diff(ends, prepend=0))


def _even(total: int, parts: int) -> Ints:
    return np.full(parts, total // parts) + (np.arange(parts) < total % parts)


def _collect(owner: Ints, clients: int) -> Partition:
    """Each client's rows, ascending, from each row's owner."""
    small = owner.astype(np.uint16) if clients <= 2**16 else owner  # numpy sorts 16 bits by radix, ten times faster
    offsets = np.concatenate([[0], np.cumsum(np.bincount(owner, minlength=clients))])
    return Partition(np.argsort(small, kind="stable"), offsets)


def _redraw(
    draw: Callable[[np.random.Generator], Hands],
    name: str,
    seed: int,
    examples: int,
    clients: int,
    min_size: int,
    codes: Ints | None = None,
    min_cell: int = 0,
    draws: int = TRIES,
) -> Partition:
    """The first draw in which every client has `min_size` rows, and `min_cell` of each code.

    A draw says of every group of rows how many each client gets; which of them is drawn here.
    """
    best_size, best_cell = 0, 0
    for attempt in range(draws):
        random = rng(seed, name, attempt)
        owner = np.empty(examples, dtype=np.int64)
        for rows, counts in draw(random):
            owner[random.permutation(rows)] = np.repeat(np.arange(clients), counts)
        size = int(np.bincount(owner, minlength=clients).min())
        cell = _smallest_cell(owner, clients, codes) if codes is not None and min_cell else 0
        if size >= min_size and cell >= min_cell:
            return _collect(owner, clients)
        best_size, best_cell = max(best_size, size), max(best_cell, cell)
    cells = f", and at best {best_cell} of some value where min_cell = {min_cell}" if min_cell else ""
    raise ValueError(
        f"{name}: in {draws} draws of {examples} examples for {clients} clients, the smallest client had at best "
        f"{best_size} where min_size = {min_size}{cells}: ask for less, for fewer clients or for more even shares"
    )


def _smallest_cell(owner: Ints, clients: int, codes: Ints) -> int:
    values = int(codes.max()) + 1
    return int(np.bincount(owner * values + codes, minlength=clients * values).min())


def _room(columns: Batch, name: str, parts: int, least: int, what: str = "clients") -> int:
    """The number of examples, if they suffice for `least` in each part."""
    examples = len(next(iter(columns.values()))) if columns else 0
    if parts * least > examples:
        raise ValueError(f"{name}: {examples} examples are too few for {parts} {what} with at least {least} each")
    return examples


def _groups(codes: Ints) -> list[Ints]:
    """The rows of each code."""
    by_code = _collect(codes, int(codes.max(initial=-1)) + 1)
    return np.split(by_code.rows, by_code.offsets[1:-1])
