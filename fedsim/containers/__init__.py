"""Containers: an experiment launched in containers by Docker's compose, as `fedsim run` runs it here."""

from fedsim.containers.composition import COMPOSITIONS, Composition
from fedsim.containers.launch import Launched, Order, launch

__all__ = ["COMPOSITIONS", "Composition", "Launched", "Order", "launch"]
