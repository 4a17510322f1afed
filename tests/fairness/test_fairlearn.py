"""Rates, gaps and deviations are those that fairlearn finds in the same predictions."""

import numpy as np
import pytest
import torch
from fairlearn.metrics import (
    MetricFrame,
    demographic_parity_difference,
    equal_opportunity_difference,
    equalized_odds_difference,
    false_positive_rate,
    selection_rate,
    true_positive_rate,
)

from fedsim.evaluation import disparities
from fedsim.fairness import events, max_deviation, pairwise_gap, rates, unfairness

NEAR = {"rtol": 0, "atol": 1e-12}
SIZES = [(2, 2), (4, 2), (2, 5), (3, 4)]  # groups, classes


def drawn(groups, classes, seed, size=3000):
    """Labels, predictions and groups, all of which depend on each other, and their counts (G, K, K)."""
    r = np.random.default_rng(seed)
    a = r.choice(groups, p=r.dirichlet(np.full(groups, 5.0)), size=size)
    y = (r.random(size)[:, None] > r.dirichlet(np.full(classes, 5.0), size=groups)[a].cumsum(1)).sum(1)
    chances = r.dirichlet(np.full(classes, 2.0), size=(groups, classes))[a, y].cumsum(1)
    predicted = (r.random(size)[:, None] > chances).sum(1)
    y, predicted = np.minimum(y, classes - 1), np.minimum(predicted, classes - 1)
    counts = torch.zeros(groups, classes, classes, dtype=torch.float64)
    counts.index_put_(tuple(map(torch.from_numpy, (a, y, predicted))), torch.ones(size).double(), accumulate=True)
    assert counts.sum(2).min() > 0  # each group has each label
    return y, predicted, a, counts


def frames(notion, y, predicted, a, classes):
    """What fairlearn makes of each rate that the notion compares, one versus the rest, in the order of `events`."""

    def frame(metric, label, some=slice(None)):
        one = (predicted[some] == label).astype(int)
        return MetricFrame(
            metrics=metric, y_true=(y[some] == label).astype(int), y_pred=one, sensitive_features=a[some]
        )

    match notion:
        case "demographic parity":
            return [frame(selection_rate, label) for label in range(classes)]
        case "equal opportunity":
            return [frame(true_positive_rate, label) for label in range(classes)]
        case "equalised odds":
            return [frame(selection_rate, label, y == given) for given in range(classes) for label in range(classes)]
        case "mean equalised odds":
            metrics = (true_positive_rate, false_positive_rate)
            return [frame(metric, label) for metric in metrics for label in range(classes)]


@pytest.mark.parametrize("notion", ["demographic parity", "equal opportunity", "equalised odds", "mean equalised odds"])
@pytest.mark.parametrize(("groups", "classes"), SIZES)
def test_each_rate_gap_and_deviation(notion, groups, classes):
    y, predicted, a, counts = drawn(groups, classes, seed=groups + classes)
    found = events(notion, classes)
    theirs = frames(notion, y, predicted, a, classes)
    assert len(theirs) == len(found.classes)
    by_group = np.stack([frame.by_group.sort_index().to_numpy() for frame in theirs], 1)
    np.testing.assert_allclose(rates(found, counts).numpy(), by_group, **NEAR)
    pooled = rates(found, counts.sum(0, keepdim=True)).numpy()[0]
    np.testing.assert_allclose(pooled, [frame.overall for frame in theirs], **NEAR)
    ours = unfairness(found, counts)
    gaps = [frame.difference("between_groups") for frame in theirs]
    apart = [frame.difference("to_overall") for frame in theirs]
    np.testing.assert_allclose(ours.gap.numpy(), gaps, **NEAR)
    np.testing.assert_allclose(ours.deviation.numpy(), apart, **NEAR)
    assert pairwise_gap(found, counts) == pytest.approx(max(gaps), abs=1e-12)
    assert max_deviation(found, counts) == pytest.approx(max(apart), abs=1e-12)
    assert max(gaps) > max(apart) > 0.01  # not to be taken for each other


@pytest.mark.parametrize("groups", [2, 5])
def test_of_two_classes_the_measures_are_those_with_names(groups):
    y, predicted, a, counts = drawn(groups, 2, seed=groups)
    ours = {name: float(value) for name, value in disparities(counts).items()}
    theirs = {}
    for name, method in (("gap", "between_groups"), ("deviation", "to_overall")):
        same = {"sensitive_features": a, "method": method}
        theirs[f"demographic_parity_{name}"] = demographic_parity_difference(y, predicted, **same)
        theirs[f"equalised_odds_{name}"] = equalized_odds_difference(y, predicted, **same)
        # Here of either class, there of class 1 alone.
        one = equal_opportunity_difference(y, predicted, **same)
        turned = equal_opportunity_difference(1 - y, 1 - predicted, **same)
        theirs[f"equal_opportunity_{name}"] = max(one, turned)
    assert ours == pytest.approx(theirs, abs=1e-12)


def test_disparities_at_each_client_are_those_of_its_examples_alone():
    groups, classes = 3, 4
    clients = [drawn(groups, classes, seed) for seed in range(3)]
    together = disparities(torch.stack([counts for *_, counts in clients]).long())
    for number, (y, predicted, a, _) in enumerate(clients):
        for notion in ("demographic parity", "equal opportunity", "equalised odds"):
            theirs = frames(notion, y, predicted, a, classes)
            name = notion.replace(" ", "_")
            gap = max(frame.difference("between_groups") for frame in theirs)
            apart = max(frame.difference("to_overall") for frame in theirs)
            assert float(together[f"{name}_gap"][number]) == pytest.approx(gap, abs=1e-12)
            assert float(together[f"{name}_deviation"][number]) == pytest.approx(apart, abs=1e-12)


def test_the_mean_of_the_gaps_of_mean_equalised_odds_is_fairlearns():
    y, predicted, a, counts = drawn(2, 2, seed=1)
    gaps = unfairness(events("mean equalised odds", 2), counts).gap  # TPR of 0, of 1, FPR of 0, of 1
    theirs = equalized_odds_difference(y, predicted, sensitive_features=a, agg="mean")
    assert float(gaps[1] + gaps[3]) / 2 == pytest.approx(theirs, abs=1e-12)
