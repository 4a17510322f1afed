"""Laws whose distances and barycenters are known."""

import numpy as np
import pytest
import torch


@pytest.fixture(scope="session")
def betas():
    """4000 scores of Beta(2, 5) and 6000 of Beta(5, 2)."""
    random = np.random.default_rng(0)
    return [torch.from_numpy(random.beta(*shape, size)) for shape, size in (((2, 5), 4000), ((5, 2), 6000))]


@pytest.fixture(scope="session")
def gaussians():
    """3000 sorted numbers of N(-1, 1) and of N(2, 1/4), (2, 3000)."""
    random = np.random.default_rng(1)
    return torch.from_numpy(np.sort([random.normal(-1, 1, 3000), random.normal(2, 0.5, 3000)]))
