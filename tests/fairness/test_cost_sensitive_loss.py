"""A model trained on FedFACT's cost-sensitive loss responds to multipliers as it should: the loss is calibrated."""

import numpy as np
import pytest
import torch
from torch import Tensor

from clients.fedfact import cost_matrix, cost_sensitive
from fedsim.fairness import belonging


@pytest.mark.parametrize("notion", ["DP", "EOP", "EO"])
@pytest.mark.parametrize(("name", "scale"), [("canonical", 1.0), ("canonical", 5.0), ("R1", 1.0)])
def test_the_loss_is_least_where_the_model_gives_the_rewards(problem, name, notion, scale):
    case = problem(name, notion, 0.05, 0.1)
    joint, share = case.joint, case.share[1:]
    clients, groups, points, classes = joint.shape
    drawn = torch.from_numpy(np.random.default_rng(0).normal(size=case.none.shape))
    multipliers = scale * drawn * torch.cat([torch.tensor([0.05]), 0.02 / share])[:, None, None]
    among = belonging(case.events, joint).sum(2) / share[:, None, None]
    made = [cost_matrix(case.events, *each) for each in zip(case.price(multipliers), among, strict=True)]
    assert all(cost.min() > 0 and rescale > 1 for cost, rescale in made)

    a, x, y = (part.flatten() for part in torch.meshgrid(*map(torch.arange, joint.shape[1:]), indexing="ij"))
    weight = (joint / case.weight).flatten(1)  # each x counts as much as any other
    logits = torch.zeros(clients, points, classes, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [logits],
        max_iter=2000,
        tolerance_grad=1e-11,
        tolerance_change=0,
        history_size=50,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        optimiser.zero_grad()
        total = logits.new_zeros(())
        for client, (cost, rescale) in enumerate(made):
            each = cost_sensitive(logits[client, x], {"a": a, "y": y}, cost / rescale)
            total = total + (weight[client] * each).sum()
        total.backward()
        return total

    optimiser.step(loss)
    rewards = case.rewards(multipliers)[:, 0] / case.weight[:, 0]  # sum_a P(a | x, k) M(a, k)^T eta(x, a, k), (N, X, K)
    kappa = torch.stack([rescale - 1 for _, rescale in made])[:, None, None] / classes
    wanted = (rewards + kappa) / (rewards + kappa).sum(-1, keepdim=True)
    found = logits.detach().softmax(-1)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    assert torch.equal(found.argmax(-1), rewards.argmax(-1))
    free = (case.rewards(case.none) / case.weight)[:, 0]
    assert (rewards - free).abs().max() > 0.02  # what is charged tells
