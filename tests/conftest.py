"""No test tells the makers of Flower or Ray that it ran; both look at the environment when they are imported."""

import os
import signal

import numpy as np
import pytest
import torch
from torch import nn

os.environ |= {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "RAY_USAGE_STATS_ENABLED": "0"}

# What runs in the background of a script ignores Ctrl-C, and all that it starts does, too; the tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The tests' tensors are small: several threads only get into each other's way.
torch.set_num_threads(1)


@pytest.fixture
def classification():
    """A small perceptron, and clients of these sizes with "x" (5 numbers), "y" (3 classes), "a" (2 groups), "item"."""
    from fedsim.model import Model
    from fedsim.testing import ragged

    def build(sizes=(0, 1, 7, 20, 33, 2), dtype=torch.float32, dropout=0.0, seed=0):
        generator = torch.Generator().manual_seed(seed)
        columns = {
            "x": torch.randn(70, 5, generator=generator, dtype=torch.float64).to(dtype),
            "y": torch.randint(3, (70,), generator=generator),
            "item": torch.randint(9, (70,), generator=generator),
            "a": torch.arange(70) % 5 % 2,
        }
        parts = [nn.Linear(5, 8), nn.Tanh(), *([nn.Dropout(dropout)] if dropout else []), nn.Linear(8, 3)]
        module = nn.Sequential(*parts).to(dtype)
        for parameter in module.parameters():
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            nn.init.constant_(parameter, 0).data.add_(0.4 * values.to(dtype))
        return Model(module), ragged(columns, sizes)

    return build


@pytest.fixture
def quadratics():
    """A model and a federation in which client k's loss is sum_j curvature_kj (w_j - optimum_kj)^2 / 2 + 0."""
    from fedsim.data.dataset import Dataset
    from fedsim.data.federation import Partition, divide
    from fedsim.model import Model, squared_error

    def build(curvature, optimum):
        curvature, optimum = (torch.as_tensor(part, dtype=torch.float64) for part in (curvature, optimum))
        clients, size = curvature.shape
        root = (size * curvature).sqrt()  # the mean over `size` examples, one for each direction, takes it back
        columns = {"x": torch.diag_embed(root).reshape(-1, size), "y": (root * optimum).reshape(-1, 1)}
        partition = Partition(np.arange(clients * size), np.arange(0, clients * size + 1, size))
        module = nn.Linear(size, 1, bias=False).double()
        nn.init.zeros_(module.weight)
        return Model(module, squared_error), divide(Dataset("quadratics", columns), partition)

    return build


@pytest.fixture
def overheard():
    """A loopback grid, as a class, that keeps what came back in each round."""
    from fedsim.flower import SimulationGrid

    class Overheard(SimulationGrid):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.heard = []

        def send_and_receive(self, messages, *, timeout=None):
            replies = list(super().send_and_receive(messages, timeout=timeout))
            self.heard.append(replies)
            return replies

    return Overheard
