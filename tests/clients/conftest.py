"""Clients that have something to forget."""

import numpy as np
import pytest
import torch
from torch import nn

from fedsim.data.federation import Federation
from fedsim.model import Model


def clients_of(parts):
    """A federation of tables (x, y, target)."""
    sizes = torch.tensor([len(y) for _, y, _ in parts])
    ends = sizes.cumsum(0)
    columns = {name: torch.cat([part[place] for part in parts]) for place, name in enumerate(("x", "y", "target"))}
    bounds = torch.stack([ends - sizes, ends, ends, ends], 1).numpy()
    return Federation(columns, np.arange(int(sizes.sum())), bounds)


@pytest.fixture
def forgetful():
    """A federation and a model: clients of (20, 13, 6, 0, 9) examples, of which (5, 0, 6, 0, 8) are to be forgotten."""

    def build(dtype=torch.float64):
        generator = torch.Generator().manual_seed(0)
        parts = []
        for size, gone in ((20, 5), (13, 0), (6, 6), (0, 0), (9, 8)):
            x = torch.randn(size, 4, generator=generator, dtype=dtype)
            y = torch.randint(3, (size,), generator=generator)
            parts.append((x, y, (torch.arange(size) < gone).long()))
        torch.manual_seed(1)
        return clients_of(parts), Model(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype))

    return build
