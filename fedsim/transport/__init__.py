"""Optimal transport: laws of scores on a line, their Wasserstein distances and barycenters, and the maps between them.

Laws on any finite number of points are in `fedsim.transport.discrete`, and closed forms of their barycenters in
`fedsim.transport.medians`; both are to be imported by themselves, since POT takes half as long as all of fedsim.

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
    score_width,
    wasserstein,
)
from fedsim.transport.maps import Barycenter, barycenter_quantiles, quantile_average, quantile_median, transport_maps

__all__ = [
    "Barycenter",
    "apart",
    "barycenter_quantiles",
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
    "score_width",
    "transport_maps",
    "wasserstein",
]
