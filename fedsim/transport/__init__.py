"""Optimal transport: laws of scores on a line, their Wasserstein distances and barycenters, and the maps between them.

The only place where POT is used: Flamary et al., "POT: Python Optimal Transport", JMLR 2021, https://pythonot.github.io.
"""

from fedsim.transport.laws import (
    apart,
    class_scores,
    distribution,
    farthest,
    grid,
    histogram,
    levels,
    midranks,
    nearest,
    quantiles,
    sample_quantiles,
    wasserstein,
)
from fedsim.transport.maps import Barycenter, barycenter, quantile_average, quantile_median, transport_maps

__all__ = [
    "Barycenter",
    "apart",
    "barycenter",
    "class_scores",
    "distribution",
    "farthest",
    "grid",
    "histogram",
    "levels",
    "midranks",
    "nearest",
    "quantile_average",
    "quantile_median",
    "quantiles",
    "sample_quantiles",
    "transport_maps",
    "wasserstein",
]
