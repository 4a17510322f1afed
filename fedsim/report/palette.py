"""Colours, named once for the figures, for the page in light, and for the page in dark."""

LIGHT = {
    "ink": "#2f3133",
    "quiet": "#6a6f75",
    "axis": "#b3b7bb",
    "grid": "#e7e8ea",
    "paper": "#ffffff",
    "c0": "#3f74ad",
    "c1": "#d9730d",
    "c2": "#3d8f4d",
    "c3": "#c94546",
    "c4": "#8a63a8",
    "c5": "#2b9a9a",
    "c6": "#a7832b",
    "c7": "#8c6d5a",
}
DARK = {
    "ink": "#dfe1e4",
    "quiet": "#a0a6ad",
    "axis": "#5d636a",
    "grid": "#33373c",
    "paper": "#1d2024",
    "c0": "#7fb0e6",
    "c1": "#f5a04f",
    "c2": "#7cc788",
    "c3": "#f08484",
    "c4": "#bd9add",
    "c5": "#66cccc",
    "c6": "#d9b85c",
    "c7": "#c3a592",
}
INK, QUIET, AXIS, GRID, PAPER = (LIGHT[name] for name in ("ink", "quiet", "axis", "grid", "paper"))
SERIES = tuple(LIGHT[f"c{place}"] for place in range(8))


def variables(colours: dict[str, str]) -> str:
    """The colours as custom properties of CSS."""
    return " ".join(f"--{name}: {colour};" for name, colour in colours.items())
