"""Optimal transport: plans, barycenters of histograms and of clouds of points."""

from fedsim.transport.discrete import barycenter, entropic_barycenter, free_support, plan
from fedsim.transport.medians import ordinal_barycenter, uniform_barycenter

__all__ = [
    "barycenter",
    "entropic_barycenter",
    "free_support",
    "ordinal_barycenter",
    "plan",
    "uniform_barycenter",
]
