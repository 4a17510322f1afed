"""fedsim simulates federated learning.

A *federation* is data by client, a *client* is what one does locally, a *strategy* is what the server does, an *engine*
is where clients run. `fedsim.run("fedavg/digits")` runs an experiment, `fedsim.simulate(...)` one made of objects.
"""

import os

# Neither Flower nor Ray tells its makers that it ran; both look at the environment when they are imported.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

from fedsim import flower, tree
from fedsim.certificate import Certificate, certify
from fedsim.client import Client
from fedsim.config import ConfigError
from fedsim.data.dataset import Dataset
from fedsim.data.federation import Federation, Partition, divide
from fedsim.engines.engine import Engine
from fedsim.engines.local import Sequential, Vectorised, auto
from fedsim.evaluation import Classifier, Evaluate
from fedsim.job import Plan, Result
from fedsim.launch import load, resume, run, run_app, simulate, sweep
from fedsim.model import Model, gradient
from fedsim.simulation import Round, Snapshot, TooFewReplies, begin, rounds
from fedsim.strategy import Strategy
from fedsim.task import Batch, Cohort, Draw, Metrics, Params, Replies, Reply, Sampler, Task, Traffic
from fedsim.tree import Rows, Tree

__all__ = [
    "Batch",
    "Certificate",
    "Classifier",
    "Client",
    "Cohort",
    "ConfigError",
    "Dataset",
    "Draw",
    "Engine",
    "Evaluate",
    "Federation",
    "Metrics",
    "Model",
    "Params",
    "Partition",
    "Plan",
    "Replies",
    "Reply",
    "Result",
    "Round",
    "Rows",
    "Sampler",
    "Sequential",
    "Snapshot",
    "Strategy",
    "Task",
    "TooFewReplies",
    "Traffic",
    "Tree",
    "Vectorised",
    "auto",
    "begin",
    "certify",
    "divide",
    "flower",
    "gradient",
    "load",
    "resume",
    "rounds",
    "run",
    "run_app",
    "simulate",
    "sweep",
    "tree",
]
