"""Prices against the matrices they stand for, deviations against probabilities, curvature against second moments."""

from typing import get_args

import numpy as np
import pytest
import torch
from torch.func import grad, jacrev

from fedsim.data.generated import canonical_table, random_joint
from fedsim.fairness import (
    Notion,
    belonging,
    binding,
    charges,
    constraints,
    costs,
    count,
    curvature,
    deviations,
    events,
    prices,
)

NOTIONS = get_args(Notion)


def close(found, wanted, atol=1e-12):
    torch.testing.assert_close(found, wanted, rtol=0, atol=atol)


def multipliers(found, groups, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(groups, len(found.classes), generator=generator, dtype=torch.float64)


def charged(found, z, own, everyone):
    """(1 / p(a, k)) sum_u z_u D_u^{a, k}, (G, K, K), from the matrices; zero for groups that are not at the client."""
    share = own.sum(1)
    total = torch.einsum("gv,gvaij->aij", z, constraints(found, own, everyone))
    return torch.where(share[:, None, None] > 0, total / torch.where(share > 0, share, 1)[:, None, None], 0)


def among(found, table):
    """P(group, label in event), (G, V), out of P(group, label), (G, K)."""
    return table @ found.labels.to(table.dtype).T


@pytest.mark.parametrize("notion", NOTIONS)
@pytest.mark.parametrize(("groups", "classes"), [(2, 2), (2, 5), (3, 3), (5, 4)])
def test_prices_are_the_multipliers_on_the_constraint_matrices(notion, groups, classes):
    found = events(notion, classes)
    joint = torch.from_numpy(random_joint(3, groups, 4, classes, 7).sum(2))  # (N, G, K)
    z = multipliers(found, groups)
    price = prices(z, among(found, joint.sum(0)))
    for own in joint:  # the same price at every client
        close(costs(found, price), charged(found, z, own, joint.sum(0)))
        at_home = own / own.sum()
        close(costs(found, prices(z, among(found, at_home))), charged(found, z, at_home, at_home))
    assert costs(found, price).abs().max() > 0.1


@pytest.mark.parametrize("notion", NOTIONS)
def test_of_one_client_alone_global_and_local_constraints_are_the_same(notion):
    found = events(notion, 3)
    table = torch.from_numpy(random_joint(1, 3, 4, 3, 2).sum(2))
    together, alone = constraints(found, table[0], table.sum(0)), constraints(found, table[0], table[0])
    assert torch.equal(together, alone)
    z = multipliers(found, 3)
    close(costs(found, prices(z, among(found, table[0]))), charged(found, z, table[0], table[0]))


# Tables P(group, label) of two clients that lack something.
LACKING = {
    "a group": [[[0.1, 0.1, 0.1], [0, 0, 0]], [[0.1, 0.2, 0.1], [0, 0, 0]]],
    "a group at a client": [[[0.1, 0.1, 0.1], [0, 0, 0]], [[0.1, 0.2, 0.1], [0.1, 0.1, 0.1]]],
    "a label": [[[0.1, 0, 0.2], [0.2, 0, 0.1]], [[0.1, 0, 0.1], [0.1, 0, 0.1]]],
    "a label in a group": [[[0.1, 0.1, 0.2], [0.2, 0, 0.1]], [[0.1, 0.05, 0.1], [0.1, 0, 0.05]]],
    "all labels but one": [[[0.3, 0, 0], [0.2, 0, 0]], [[0.2, 0, 0], [0.3, 0, 0]]],
    "a client": [[[0, 0, 0], [0, 0, 0]], [[0.2, 0.1, 0.2], [0.3, 0.1, 0.1]]],
    "everyone": [[[0, 0, 0], [0, 0, 0]], [[0, 0, 0], [0, 0, 0]]],
}


@pytest.mark.parametrize("notion", NOTIONS)
@pytest.mark.parametrize("lacking", LACKING)
def test_what_is_empty_costs_nothing_and_deviates_by_nothing(notion, lacking):
    found = events(notion, 3)
    joint = torch.tensor(LACKING[lacking], dtype=torch.float64)
    z = multipliers(found, 2)
    everyone = joint.sum(0)
    for own in joint:
        at_home = own / own.sum().clamp(min=1e-9)
        for mine, all_of_them in ((own, everyone), (at_home, at_home)):
            there = among(found, all_of_them)
            price = prices(z, there)
            assert torch.isfinite(price).all()
            here = (mine.sum(1) > 0)[:, None, None]
            close(torch.where(here, costs(found, price), 0), charged(found, z, mine, all_of_them))
            # Multipliers on nobody do nothing.
            assert torch.equal(price, prices(torch.where(there > 0, z, 1e9), there))
            # Those who are there, all taken for the class of the event, half of it for the last group.
            taken = there * torch.tensor([[1.0], [0.5]])
            apart = deviations(taken, there)
            assert torch.isfinite(apart).all() and not apart[there == 0].any()
            alone = (there > 0).sum(0) < 2
            assert not apart[:, alone].any()
            assert (apart[:, ~alone] != 0).all()
            curved = curvature(found, torch.einsum("gv,hw->gvhw", there, there), there)
            assert torch.isfinite(curved) and curved >= -1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_one_example_binds_and_less_does_not(dtype):
    examples = torch.arange(1, 5000)
    one = torch.ones((), dtype=dtype) / examples  # times that many it is not always 1
    assert torch.equal(binding(one, examples), one)
    assert torch.equal(binding(1.05 * one, examples), 1.05 * one)
    assert not binding(0.95 * one, examples).any() and not binding(0 * one, examples).any()


@pytest.mark.parametrize("notion", NOTIONS)
def test_what_does_not_bind_is_in_no_rate_and_charged_nothing(notion):
    found = events(notion, 3)
    joint = torch.from_numpy(random_joint(2, 3, 5, 3, 6))
    weight, scores = (part.flatten(0, 1) for part in cells(joint, aware=False))
    second, there = measured(found, weight, scores)
    bound = there.clone()
    bound[1] = bound[0, -1] = 0
    z, r = multipliers(found, 3), torch.rand(there.shape, generator=torch.Generator().manual_seed(1)).double()
    assert torch.equal(deviations(r * there, bound), deviations(r * bound, bound))
    price = charges(z, bound)
    assert not price[bound == 0].any() and torch.equal(price[bound > 0], prices(z, bound)[bound > 0])
    assert torch.equal(charges(z, there), prices(z, there))
    # A price is what a taken example adds to all deviations, times their multipliers.
    slope = grad(lambda taken: (z * deviations(taken, bound)).sum())(r * there)
    close(price, slope)
    kept = (bound > 0).double()
    without = torch.einsum("gvhw,gv,hw->gvhw", second, kept, kept)
    close(curvature(found, second, bound), curvature(found, without, bound))
    assert (curvature(found, second, there) - curvature(found, second, bound)).abs() > 1e-3


@pytest.mark.parametrize("notion", NOTIONS)
def test_without_examples_nothing_is_counted(notion):
    found = events(notion, 3)
    taken, there = count(found, torch.zeros(4, 2, 3), torch.full((4, 3), 1 / 3))
    assert not taken.any() and not there.any()
    assert not deviations(taken, there).any() and not prices(torch.ones_like(there), there).any()


@pytest.mark.parametrize("notion", NOTIONS)
@pytest.mark.parametrize(("groups", "classes"), [(2, 2), (3, 4)])
def test_deviations_are_constraints_on_confusions_and_differences_of_probabilities(notion, groups, classes):
    found = events(notion, classes)
    clients, points = 3, 6
    joint = torch.from_numpy(random_joint(clients, groups, points, classes, 3))  # (N, G, X, K)
    r = np.random.default_rng(0)
    decided = torch.from_numpy(r.dirichlet(np.ones(classes), size=(clients, groups, points)))
    share, everyone = joint.sum((1, 2, 3)), joint.sum((0, 2))
    counts, summed, confusions = [], 0, []
    for client in range(clients):
        # The points of this client as its examples: each belongs to one group, with P(label) as its score.
        scores = torch.einsum("gxi,gh->gxhi", joint[client], torch.eye(groups).double()).flatten(0, 1) / share[client]
        counts.append(count(found, scores, decided[client].flatten(0, 1)))
        confusion = torch.einsum("axi,axj->aij", joint[client], decided[client])
        confusions.append(confusion)
        own = joint[client].sum(1)
        given = confusion / own.sum(1)[:, None, None]
        summed += torch.einsum("gvaij,aij->gv", constraints(found, own, everyone), given)
        at_home = own / share[client]
        close(deviations(*counts[-1]), torch.einsum("gvaij,aij->gv", constraints(found, at_home, at_home), given))
        close(deviations(*counts[-1]), differences(found, confusion))
        close(counts[-1][1], among(found, at_home))
    taken, there = (torch.einsum("k,kgv->gv", share, torch.stack(parts)) for parts in zip(*counts, strict=True))
    close(there, among(found, everyone))
    close(deviations(taken, there), summed)
    close(deviations(taken, there), differences(found, torch.stack(confusions).sum(0)))
    close(deviations(40 * taken, 40 * there), summed)  # any scale
    assert summed.abs().max() > 1e-3


def differences(found, confusion):
    """P(predicted = y | label in E, group) - P(predicted = y | label in E), from joint probabilities, one by one."""
    wanted = torch.zeros(len(confusion), len(found.classes), dtype=torch.float64)
    for number, (labels, y) in enumerate(zip(found.labels, found.classes, strict=True)):
        pooled = confusion[:, labels, y].sum() / confusion[:, labels].sum()
        for group in range(len(confusion)):
            wanted[group, number] = confusion[group, labels, y].sum() / confusion[group, labels].sum() - pooled
    return wanted


@pytest.mark.parametrize("notion", NOTIONS)
def test_when_the_group_is_not_known_scores_count_by_their_share(notion):
    found = events(notion, 3)
    r = np.random.default_rng(1)
    scores = torch.from_numpy(r.dirichlet(np.ones(6), size=50).reshape(50, 2, 3))
    decided = torch.from_numpy(r.dirichlet(np.ones(3), size=50))
    taken, there = count(found, scores, decided)
    close(deviations(taken, there), differences(found, torch.einsum("ngi,nj->gij", scores, decided)))


CURVATURES = {  # of the smooth maximum at a temperature of .02: over all clients, and at each
    "demographic parity": (51.010, (108.333, 138.095)),
    "equal opportunity": (121.992, (222.294, 522.623)),
    "equalised odds": (200.008, (376.345, 633.559)),
}


def measured(found, weight, scores):
    """What `curvature` gets, out of examples of these weights, (B,), with P(group, label | example), (B, G, K)."""
    belongs = belonging(found, scores)
    return torch.einsum("b,bgv,bhw->gvhw", weight, belongs, belongs), torch.einsum("b,bgv->gv", weight, belongs)


def cells(joint, aware=True):
    """A joint distribution (N, G, X, K) as weights (N, B) that sum to p_k, and scores (N, B, G, K), of examples."""
    groups = joint.shape[1]
    if aware:
        weight = joint.sum(3)
        scores = torch.einsum("kgxi,gh->kgxhi", joint / weight[..., None], torch.eye(groups).double())
        return weight.flatten(1), scores.flatten(1, 2)
    weight = joint.sum((1, 3))
    return weight, (joint / weight[:, None, :, None]).transpose(1, 2)


@pytest.mark.parametrize("notion", CURVATURES)
def test_the_curvature_on_the_canonical_joint(notion):
    found = events(notion, 3)
    joint = torch.from_numpy(canonical_table())
    weight, scores = cells(joint)
    everyone, (first, second) = CURVATURES[notion]
    curved = curvature(found, *measured(found, weight.flatten(), scores.flatten(0, 1)))
    assert float(curved) / (2 * 0.02) == pytest.approx(everyone, abs=1e-3)
    for client, wanted in enumerate((first, second)):
        # Multipliers here are the published ones over p_k, which is 1/2 for both.
        share = weight[client].sum()
        curved = curvature(found, *measured(found, weight[client] / share, scores[client]))
        assert float(curved / share) / (2 * 0.02) == pytest.approx(wanted, abs=1e-3)


@pytest.mark.parametrize("notion", NOTIONS)
@pytest.mark.parametrize("aware", [True, False])
def test_the_curvature_is_the_largest_eigenvalue_of_the_second_moments_of_slopes(notion, aware):
    found = events(notion, 4)
    joint = torch.from_numpy(random_joint(2, 3, 5, 4, 4))
    weight, scores = (part.flatten(0, 1) for part in cells(joint, aware))
    table = joint.sum((0, 2))  # one client: the prices are the same for all
    matrices = constraints(found, table, table) / table.sum(1)[:, None, None]  # D_u^a / p_a, (G, V, G, K, K)
    slope = torch.einsum("bai,gvaij->bgvj", scores, matrices).flatten(1, 2)  # of the rewards, in the multipliers
    naive = torch.linalg.eigvalsh(torch.einsum("b,buj,bwj->uw", weight, slope, slope))[-1]
    close(curvature(found, *measured(found, weight, scores)), naive, atol=1e-9)


@pytest.mark.parametrize("notion", NOTIONS)
def test_nowhere_is_the_smooth_maximum_more_curved(notion):
    found = events(notion, 3)
    joint = torch.from_numpy(random_joint(2, 2, 5, 3, 6))
    weight, scores = (part.flatten(0, 1) for part in cells(joint, aware=False))
    second, there = measured(found, weight, scores)
    temperature = 0.1

    def smooth(z):
        rewards = torch.einsum("bai,aij->bj", scores, torch.eye(3).double() - costs(found, prices(z, there)))
        return temperature * (weight * (rewards / temperature).logsumexp(1)).sum()

    most = float(curvature(found, second, there)) / (2 * temperature)
    curved = []
    for seed in range(20):
        z = multipliers(found, 2, seed) * 0.02 * seed
        hessian = jacrev(grad(smooth))(z).reshape(z.numel(), z.numel())
        curved.append(float(torch.linalg.eigvalsh(hessian)[-1]))
    assert 0.1 * most < max(curved) <= most  # a bound, and one of the right size
