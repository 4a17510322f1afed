"""pfl 0.6 as its own benchmarks use it: FederatedAveraging on a resident PyTorchModel, its simulated backend.

Runs in an environment of its own, in one process, or in several that torchrun has started. pfl always evaluates in
the first round; that one warms up. Its metrics are printed and written to a file every round.
"""

import types
from collections.abc import Iterator

import numpy as np
import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.aggregate_metrics_to_disk import AggregateMetricsToDisk
from pfl.callback.base import TrainingProcessCallback
from pfl.context import CentralContext
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
from pfl.internal.ops import get_ops
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel
from pfl.stats import WeightedStatistics
from torch import Tensor, nn
from torch.nn import functional

from experiments.benchmarks.cases import BATCH, module, pool
from experiments.benchmarks.measuring import Clock
from experiments.benchmarks.systems.contest import Work


def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """What a step makes smaller."""
    return functional.cross_entropy(model(x), y)


def metrics(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Weighted]:
    """What is measured in the first round."""
    with torch.no_grad():
        return {"loss": Weighted(float(functional.cross_entropy(model(x), y, reduction="sum")), len(y))}


def nothing(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Weighted]:
    """What is measured where nothing is learnt."""
    return {"loss": Weighted(0.0, len(y))}


class Echo(FederatedAveraging):
    """Clients that send back what they got; with pfl that is the difference, nothing."""

    def train_one_user(
        self, initial_model_state: WeightedStatistics, model: PyTorchModel, user_dataset: Dataset, _: CentralContext
    ) -> tuple[WeightedStatistics, Metrics]:
        return model.get_model_difference(initial_model_state), Metrics()


class Ticking(TrainingProcessCallback):
    """Tells the clock of every round, and counts who answered."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.replies: list[int] = []

    def on_train_begin(self, *, model: PyTorchModel) -> Metrics:
        self.clock(0)
        return Metrics()

    def after_central_iteration(
        self, aggregate_metrics: Metrics, model: PyTorchModel, *, central_iteration: int
    ) -> tuple[bool, Metrics]:
        told = aggregate_metrics.to_simple_dict()
        self.replies.append(next(int(value) for name, value in told.items() if "number of devices" in name))
        self.clock(central_iteration + 1)
        return False, Metrics()


def run(system: str, work: Work) -> None:
    """The simulation."""
    case, network, clock = work.case, module(work.case), work.clock()
    np.random.seed(0)
    x, y = pool(case)
    network.loss = types.MethodType(loss, network)
    network.metrics = types.MethodType(metrics if case.learns else nothing, network)
    visits: Iterator[tuple[int, int]] = work.visits()

    def dataset(visit: tuple[int, int]) -> Dataset:
        rows = work.examples(*visit)
        return Dataset((x[rows], y[rows]), user_id=str(visit[1]))

    data = FederatedDataset(dataset, lambda: next(visits))  # "sampled" are the cohorts that all others have
    model = PyTorchModel(network, torch.optim.SGD, torch.optim.SGD(network.parameters(), lr=1.0))
    ticking = Ticking(clock)
    (FederatedAveraging if case.learns else Echo)().run(
        NNAlgorithmParams(
            central_num_iterations=case.rounds,
            evaluation_frequency=case.rounds + 1,
            train_cohort_size=case.cohort,
            val_cohort_size=0,
        ),
        SimulatedBackend(data, data, postprocessors=[WeightByDatapoints()]),
        model,
        NNTrainHyperParams(local_num_epochs=1, local_learning_rate=case.lr, local_batch_size=BATCH),
        NNEvalHyperParams(local_batch_size=None),
        [AggregateMetricsToDisk(str(work.folder / "metrics.csv")), ticking],
    )
    if get_ops().distributed.global_rank == 0:
        work.leave(clock, network.state_dict(), ticking.replies)
