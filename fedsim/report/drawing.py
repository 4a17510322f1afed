"""How every figure is drawn and kept: one style, no state of pyplot, SVG that a page can hold."""

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator
from numpy.typing import NDArray

from fedsim.report.formats import amount, plain
from fedsim.report.palette import AXIS, GRID, INK, LIGHT, PAPER, QUIET

_SETTINGS: dict[str, Any] = {
    "font.family": ["DejaVu Sans"],
    "font.size": 10,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "fedsim",  # the same figure is the same file
    "text.parse_math": False,  # names may hold a $
    "axes.formatter.use_mathtext": False,
}


class Plot(NamedTuple):
    """A figure, the name of its files, and what it shows in words."""

    name: str
    title: str
    figure: Figure


@contextmanager
def style() -> Iterator[None]:
    """Inside, figures are drawn and saved in the report's style."""
    with matplotlib.rc_context(_SETTINGS):  # type: ignore[arg-type] # newer stubs list every key
        yield


def blank(title: str, height: float = 3.1) -> tuple[Figure, Axes]:
    """A figure with one pair of axes and a title at its upper left."""
    figure = Figure(figsize=(5.4, height), layout="constrained", facecolor=PAPER)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(facecolor=PAPER)
    entitle(axes, title)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(AXIS)
    axes.tick_params(length=0, labelsize=9, colors=QUIET)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def entitle(axes: Axes, title: str, above: float = 0) -> None:
    """Writes the title at the upper left, so many points higher than where it usually is."""
    axes.set_title(short(title, 60), loc="left", fontsize=11, color=INK, pad=10 + above)


def over_rounds(axes: Axes, first: int, last: int) -> None:
    """Makes the x axis that of rounds."""
    axes.set_xlabel("round", color=QUIET, fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    margin = max(0.02 * (last - first), 0.5)
    axes.set_xlim(first - margin, last + margin)


def plain_log(axis: Axis) -> None:
    """Writes the powers of ten of a logarithmic axis as numbers, and nothing between them."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if 1 <= value < 1e6 else f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def in_bytes(axes: Axes) -> None:
    """Makes the y axis one of bytes."""
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: amount(value)))


def legend(figure: Figure, axes: Axes) -> None:
    """A legend below the axes, where there is more than one thing to tell apart."""
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) > 1:
        columns = max(1, min(4, len(labels), 64 // (max(map(len, labels)) + 5)))
        found = figure.legend(handles, labels, loc="outside lower left", frameon=False, fontsize=9, ncols=columns)
        for text in found.get_texts():
            text.set_color(INK)


def named(name: str) -> str:
    """A name that a legend takes: a leading underscore would hide it."""
    name = short(name, 40)
    return f" {name}" if name.startswith("_") else name


def short(text: str, most: int) -> str:
    """One line of at most so many characters."""
    line = " ".join(plain(text).split())
    return line if len(line) <= most else line[: most - 1] + "…"


def shades(colour: str) -> ListedColormap:
    """From transparent to one colour, so that it suits a light and a dark page."""
    return ListedColormap(np.column_stack([np.tile(to_rgb(colour), (256, 1)), np.linspace(0, 1, 256)]))


def thin(x: NDArray[np.int64], y: NDArray[np.float64], most: int = 400) -> tuple[NDArray[np.float64], ...]:
    """At most so many points of a curve: x, mean, least and greatest y of neighbours; NaN where none is finite."""
    if len(x) <= most:
        return x.astype(np.float64), y, y, y
    starts = np.linspace(0, len(x), most + 1).round().astype(np.int64)[:-1]
    finite = np.isfinite(y)
    number = np.add.reduceat(finite.astype(np.int64), starts)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.add.reduceat(np.where(finite, y, 0.0), starts) / number
    low = np.minimum.reduceat(np.where(finite, y, np.inf), starts)
    high = np.maximum.reduceat(np.where(finite, y, -np.inf), starts)
    middle = (x[starts] + x[np.append(starts[1:], len(x)) - 1]) / 2
    return middle, mean, np.where(number, low, np.nan), np.where(number, high, np.nan)


def save(plot: Plot, folder: Path) -> str:
    """Writes a figure as name.svg and name.png, and gives the SVG back."""
    content = io.StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # a name in another script; the SVG has it
        plot.figure.savefig(content, format="svg", metadata={"Date": None, "Creator": None})
        plot.figure.set_layout_engine("none")  # it stands; laying out is the most expensive part
        plot.figure.savefig(folder / f"{plot.name}.png", dpi=144)
    svg = content.getvalue()
    (folder / f"{plot.name}.svg").write_text(svg, encoding="utf-8")
    return svg


def inline(svg: str, name: str, title: str) -> str:
    """An SVG file as an element of a page: its colours are the page's variables, its ids are its own."""
    svg = re.sub(r"<(metadata|style)\b.*?</\1>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    used = set(re.findall(r"""(?:url\(#|href="#)([^)"]+)""", svg))
    body = svg[svg.index(">") + 1 :].strip()
    body = re.sub(r"<[^>]*>", lambda found: _own(found[0], name, used), body)  # text between tags stays as it is
    size = re.search(r'viewBox="[^"]*"', svg)
    assert size is not None  # matplotlib wrote it
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" {size[0]} role="img"'
    return f'{opening} aria-label="{escape(title)}">{body}'


def _own(tag: str, name: str, used: set[str]) -> str:
    """One tag of an SVG file, as it stands on a page."""
    tag = re.sub(r' id="([^"]*)"', lambda found: f' id="{name}-{found[1]}"' if found[1] in used else "", tag)
    tag = re.sub(r"""(url\(#|href="#)""", rf"\1{name}-", tag)
    tag = re.sub(r"font-family: [^;\"]*;?", "", tag)
    for colour, value in LIGHT.items():
        tag = tag.replace(value, f"var(--{colour})")
    return tag
