"""How a federation's examples are spread over its clients: as numbers, and as a figure."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator, PercentFormatter, StrMethodFormatter
from numpy.typing import NDArray

from fedsim.data.federation import Federation

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

_BARS = 50  # clients that a figure shows
_COLOURS = (
    *("#4c78a8", "#f58518", "#54a24b", "#e45756", "#72b7b2"),
    *("#eeca3b", "#b279a2", "#ff9da6", "#9d755d", "#79706e"),
)
_GROUP_COLOURS = ("#2f6f73", "#e0a458", "#8e6c8a", "#c8553d", "#b7b7a4", *_COLOURS[:5])
_VALUES = 20  # of a column without names that are told apart
_LETTERS = 40  # of a name that a figure shows
_REST = "#d8d5d2"
_INK = "#3b3b3b"


@dataclass(frozen=True, eq=False)
class Description:
    """What each client has, over all its splits unless said otherwise."""

    name: str
    column: str
    values: tuple[str, ...]  # what the column's values are called: the 20 most frequent, then "<n> others" if there are
    groups: tuple[str, ...]  # the sensitive groups likewise; () where there are none
    sizes: Ints  # (N, 3) examples for training, validation and testing
    shares: Floats  # (N, K) of each value in each client; 0 for a client without examples
    group_shares: Floats  # (N, G)
    pooled: Floats  # (K,) shares of each value over all clients
    pooled_groups: Floats  # (G,)
    heterogeneity: float  # mean total variation distance of the clients' shares, of all values, to the pooled ones:
    # 0 where all are alike, below 1. Clients without examples do not count.

    @property
    def examples(self) -> Ints:
        """Examples of each client, (N,)."""
        return np.asarray(self.sizes.sum(axis=1))

    def summary(self) -> dict[str, float]:
        """The main numbers by name."""
        examples = self.examples
        return {
            "clients": len(examples),
            "examples": int(examples.sum()),
            "smallest": int(examples.min()),
            "median": float(np.median(examples)),
            "largest": int(examples.max()),
            "heterogeneity": self.heterogeneity,
        }


def describe(federation: Federation, column: str = "y") -> Description:
    """How the values of a column, and the sensitive groups if there are any, are spread over the clients.

    Raises:
        ValueError: if there is no such column, or it does not hold integers from 0, or there are no clients.
    """
    if not federation.num_clients:
        raise ValueError(f"{federation.name} has no clients")
    values, counts, heterogeneity = _counts(federation, column)
    groups, group_counts, _ = _counts(federation, "a") if "a" in federation.columns else ((), counts[:, :0], 0.0)
    return Description(
        federation.name,
        column,
        values,
        groups,
        np.diff(federation.bounds, axis=1),
        _shares(counts, axis=1),
        _shares(group_counts, axis=1),
        _shares(counts.sum(axis=0), axis=0),
        _shares(group_counts.sum(axis=0), axis=0),
        heterogeneity,
    )


def draw(description: Description, path: str | Path) -> None:
    """Writes a figure: shares by client, sizes, and sensitive groups; its format is what `path` ends in.

    Of more than 50 clients it shows 50, evenly spaced; of more than ten values the nine most frequent.
    """
    grouped = bool(description.groups)
    figure = Figure(figsize=(11, 6.4), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1), facecolor="white")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 2 if grouped else 1, height_ratios=(1.5, 1))
    clients = np.unique(np.linspace(0, len(description.sizes) - 1, _BARS).round().astype(int))
    top = figure.add_subplot(grid[0, :])
    _stack(top, clients, description.values, description.shares, description.pooled, _COLOURS)
    top.set_title(f"Values of {description.column} by client", loc="left", fontsize=11, color=_INK)
    _histogram(figure.add_subplot(grid[1, 0]), description.examples)
    if grouped:
        right = figure.add_subplot(grid[1, 1])
        _stack(right, clients, description.groups, description.group_shares, description.pooled_groups, _GROUP_COLOURS)
        right.set_title("Sensitive groups by client", loc="left", fontsize=11, color=_INK)
    numbers = description.summary()
    figure.suptitle(
        f"{description.name}: {numbers['examples']:,} examples of {numbers['clients']:,} clients, "
        f"{numbers['smallest']:,} to {numbers['largest']:,} each (median {numbers['median']:,.10g}), "
        f"heterogeneity {numbers['heterogeneity']:.2f}",
        fontsize=12,
        color=_INK,
    )
    figure.savefig(path, dpi=150)


def draw_interactions(name: str, users: Ints, items: Ints, path: str | Path) -> None:
    """Writes a figure of who has how many items, `users` (N,), and of how many have each, `items` (I,)."""
    figure = Figure(figsize=(11, 4), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1), facecolor="white")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    _histogram(left, users, "items", "users")
    right.plot(np.arange(1, len(items) + 1), np.sort(items)[::-1], color=_COLOURS[0])
    right.set_title("Users by item, the most popular first", loc="left", fontsize=11, color=_INK)
    right.set_xlabel("item", color=_INK)
    right.set_ylabel("users", color=_INK)
    right.set_ylim(bottom=0)
    right.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    _clean(right)
    told = f"{_label(name)}: {users.sum():,} interactions of {len(users):,} users with {len(items):,} items to train on"
    figure.suptitle(told, fontsize=12, color=_INK)
    figure.savefig(path, dpi=150)


def _counts(federation: Federation, column: str) -> tuple[tuple[str, ...], Ints, float]:
    """What a column's values are called, how often each client has each of them, (N, K), and the heterogeneity."""
    if column not in federation.columns:
        raise ValueError(
            f"{federation.name} has no column {column!r}; there are {', '.join(sorted(federation.columns))}"
        )
    cells = federation.columns[column].numpy()
    whole = cells.ndim == 1 and np.issubdtype(cells.dtype, np.integer)
    if not whole or cells.min(initial=0) < 0:
        found = cells.min() if whole else f"{cells.dtype} of shape {cells.shape}"
        raise ValueError(f"column {column!r} must hold one integer from 0 for each example, got {found}")
    sizes = federation.bounds[:, -1] - federation.bounds[:, 0]
    client = np.repeat(np.arange(len(sizes)), sizes)
    # Where each example stands in `rows`: its client's first place, and one further for each of that client's.
    place = np.arange(len(client)) + np.repeat(federation.bounds[:, 0] - (np.cumsum(sizes) - sizes), sizes)
    names = federation.names.get(column, ())
    seen = np.concatenate([np.arange(len(names)), cells[federation.rows[place]]])  # each name once, then the examples
    values, codes = np.unique(seen, return_inverse=True)  # they may be few and far between, as years are
    codes = codes[len(names) :]
    called, places = _most(values, np.bincount(codes, minlength=len(values)), names)
    counts = np.bincount(client * len(called) + places[codes], minlength=len(sizes) * len(called))
    return called, counts.reshape(len(sizes), len(called)), _distance(client, codes, sizes, len(values))


def _most(values: Ints, counts: Ints, names: Sequence[str]) -> tuple[tuple[str, ...], Ints]:
    """What the values are called, the rest of more than _VALUES together; and where among these each value stands."""
    kept = np.sort(np.argsort(-counts, kind="stable")[:_VALUES])
    places = np.full(len(values), len(kept))
    places[kept] = np.arange(len(kept))
    called = [names[value] if value < len(names) else str(value) for value in values[kept].tolist()]
    return (*called, *([f"{len(values) - _VALUES} others"] if len(values) > _VALUES else [])), places


def _distance(client: Ints, codes: Ints, sizes: Ints, number: int) -> float:
    """The heterogeneity, from the shares that are not 0: of all clients and all values there may be too many."""
    if not len(codes):
        return 0.0
    pairs, counts = np.unique(client * number + codes, return_counts=True)
    owner, value = np.divmod(pairs, number)
    pooled = np.bincount(codes, minlength=number)[value] / len(codes)
    # A value that a client lacks adds its pooled share: all of them add up to 1, less those of the values that it has.
    differences = np.abs(counts / sizes[owner] - pooled) - pooled
    return float(differences.sum() / (sizes > 0).sum() + 1) / 2


def _shares(counts: Ints, axis: int) -> Floats:
    return np.asarray(counts / np.maximum(counts.sum(axis=axis, keepdims=True), 1))


def _stack(
    axes: Axes, clients: Ints, names: tuple[str, ...], shares: Floats, pooled: Floats, colours: Sequence[str]
) -> None:
    """A bar of shares for each of these clients, and at the right end one for all clients together."""
    few = len(names) <= len(colours)  # of more than _VALUES the last is the rest
    kept = np.arange(len(names)) if few else np.sort(np.argsort(-pooled[:_VALUES], kind="stable")[:9])
    table = np.concatenate([shares[clients], pooled[None]])  # (bars, K)
    layers = [(names[value], colour, table[:, value]) for value, colour in zip(kept, colours, strict=False)]
    if len(kept) < len(names):
        layers.append(("others", _REST, table.sum(axis=1) - table[:, kept].sum(axis=1)))
    gap = 0.4 + 0.03 * len(clients)
    place = np.append(np.arange(len(clients)), len(clients) + gap)
    base = np.zeros(len(table))
    bars = []
    for _, colour, height in layers:
        bars.append(axes.bar(place, height, 0.9, base, color=colour, linewidth=0))
        base += height
    ticks = np.unique(np.linspace(0, len(clients) - 1, 11 if len(clients) > 11 else len(clients)).round().astype(int))
    axes.set_xticks([*ticks, place[-1]], [*(f"{client:,}" for client in clients[ticks]), "all"])
    axes.set_xlim(-0.7, place[-1] + 0.7)
    axes.set_ylim(0, 1)
    axes.set_xlabel("client", color=_INK)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    labels = [_label(name) for name, _, _ in layers]
    axes.legend(bars[::-1], labels[::-1], loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=9)
    _clean(axes)


def _label(name: str) -> str:
    """A name as it is drawn: one line, not too long, and a dollar is a dollar, not the beginning of a formula."""
    line = " ".join(name.split())
    return (line if len(line) <= _LETTERS else f"{line[: _LETTERS - 1]}…").replace("$", r"\$")


def _histogram(axes: Axes, examples: Ints, what: str = "examples", whose: str = "clients") -> None:
    low, high = int(examples.min()), int(examples.max())
    edges = np.linspace(low - 0.5, high + 0.5, min(high - low + 1, 30) + 1)
    axes.hist(examples, bins=edges.tolist(), color=_COLOURS[0], edgecolor="white", linewidth=0.6)
    margin = max(3.0, 0.03 * (high - low))
    axes.set_xlim(low - margin, high + margin)
    axes.set_title(f"{what.capitalize()} by {whose.removesuffix('s')}", loc="left", fontsize=11, color=_INK)
    axes.set_xlabel(what, color=_INK)
    axes.set_ylabel(whose, color=_INK)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    _clean(axes)


def _clean(axes: Axes) -> None:
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#b0b0b0")
    axes.tick_params(length=0, labelsize=9, colors=_INK)
