"""Flower, both ways: its strategies and apps on fedsim's engines, and fedsim's clients on its nodes.

`run` runs somebody's whole Flower app. `SimulationGrid` is an engine as a Grid, `GridEngine` a Grid as an engine.
`client_app` makes a ClientApp of fedsim's clients. A `fedsim.Strategy` is a strategy of Flower's as it is.
"""

from fedsim.flower.app import ClientAppsFailed, Failure, Outcome, run
from fedsim.flower.arrays import MalformedMessage
from fedsim.flower.engine import GridEngine
from fedsim.flower.grid import ClientNodes, SimulationGrid
from fedsim.flower.node import client_app

__all__ = [
    "ClientAppsFailed",
    "ClientNodes",
    "Failure",
    "GridEngine",
    "MalformedMessage",
    "Outcome",
    "SimulationGrid",
    "client_app",
    "run",
]
