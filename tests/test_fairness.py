"""Fairness: constraints against direct probabilities, and the linear program against its table of exact optima."""

import numpy as np
import pytest
import torch

from fedsim.data.generated import canonical_table as canonical
from fedsim.data.generated import random_joint
from fedsim.fairness import constraints, events, max_deviation, optimum, pairwise_gap, rates, unfairness

NOTIONS = {"DP": "demographic parity", "EOP": "equal opportunity", "EO": "equalised odds", "MEO": "mean equalised odds"}
TOLERANCES = (0.2, 0.1, 0.05, 0.02, 0.01, 0.0)
# Accuracies of the best classifiers on the canonical joint, by what they may see, notion and scope, for each tolerance.
OPTIMA = {
    ("blind, personal", "DP", "global"): (0.618595, 0.549372, 0.511002, 0.483044, 0.473725, 0.464406),
    ("blind, personal", "DP", "local"): (0.597690, 0.538873, 0.505937, 0.486175, 0.479587, 0.473000),
    ("blind, personal", "DP", "both"): (0.597690, 0.525689, 0.484452, 0.459709, 0.450557, 0.439500),
    ("blind, personal", "EOP", "global"): (0.614090, 0.584620, 0.548560, 0.522038, 0.512254, 0.502469),
    ("blind, personal", "EOP", "local"): (0.620500, 0.567065, 0.507141, 0.448217, 0.428495, 0.408774),
    ("blind, personal", "EOP", "both"): (0.614090, 0.547835, 0.474848, 0.424163, 0.405235, 0.365500),
    ("blind, personal", "EO", "global"): (0.613852, 0.579324, 0.538957, 0.512550, 0.503114, 0.492919),
    ("blind, personal", "EO", "local"): (0.619672, 0.535039, 0.473713, 0.433985, 0.420743, 0.407500),
    ("blind, personal", "EO", "both"): (0.613080, 0.518119, 0.448071, 0.399400, 0.382450, 0.365500),
    ("aware, personal", "DP", "global"): (0.620000, 0.589129, 0.561402, 0.544250, 0.538523, 0.532795),
    ("aware, personal", "DP", "local"): (0.609786, 0.580143, 0.563238, 0.551095, 0.547048, 0.543000),
    ("aware, personal", "DP", "both"): (0.609786, 0.579212, 0.556461, 0.538563, 0.532186, 0.520000),
    ("aware, personal", "EOP", "global"): (0.620540, 0.608029, 0.597856, 0.579517, 0.571603, 0.563690),
    ("aware, personal", "EOP", "local"): (0.622916, 0.609844, 0.600011, 0.591162, 0.587492, 0.583822),
    ("aware, personal", "EOP", "both"): (0.620199, 0.605367, 0.596490, 0.578223, 0.570309, 0.543226),
    ("aware, personal", "EO", "global"): (0.619287, 0.606481, 0.597820, 0.573326, 0.563001, 0.552569),
    ("aware, personal", "EO", "local"): (0.620518, 0.603888, 0.586427, 0.568971, 0.561487, 0.553240),
    ("aware, personal", "EO", "both"): (0.617705, 0.601833, 0.584134, 0.561196, 0.550255, 0.530858),
    ("blind, unified", "DP", "global"): (0.618465, 0.532101, 0.486283, 0.458792, 0.449629, 0.440465),
    ("blind, unified", "DP", "local"): (0.570000, 0.510000, 0.480000, 0.462000, 0.456000, 0.450000),
    ("blind, unified", "DP", "both"): (0.570000, 0.510000, 0.480000, 0.456415, 0.447416, 0.365500),
    ("blind, unified", "EOP", "global"): (0.610139, 0.524644, 0.447877, 0.400471, 0.384669, 0.368867),
    ("blind, unified", "EOP", "local"): (0.620000, 0.518619, 0.442423, 0.396269, 0.380885, 0.365500),
    ("blind, unified", "EOP", "both"): (0.610139, 0.503735, 0.436728, 0.394643, 0.380072, 0.365500),
    ("blind, unified", "EO", "global"): (0.610139, 0.524644, 0.446306, 0.397963, 0.381731, 0.365500),
    ("blind, unified", "EO", "local"): (0.614147, 0.513044, 0.439548, 0.395119, 0.380310, 0.365500),
    ("blind, unified", "EO", "both"): (0.604745, 0.503124, 0.434376, 0.393051, 0.379275, 0.365500),
    ("aware, unified", "DP", "global"): (0.618852, 0.587841, 0.558000, 0.540000, 0.534000, 0.528000),
    ("aware, unified", "DP", "local"): (0.596386, 0.555243, 0.533421, 0.514437, 0.507677, 0.494845),
    ("aware, unified", "DP", "both"): (0.596386, 0.555243, 0.533421, 0.513885, 0.504081, 0.468357),
    ("aware, unified", "EOP", "global"): (0.619120, 0.604254, 0.595173, 0.576412, 0.568498, 0.560584),
    ("aware, unified", "EOP", "local"): (0.620917, 0.606095, 0.587291, 0.562596, 0.552999, 0.524522),
    ("aware, unified", "EOP", "both"): (0.617910, 0.602381, 0.582974, 0.552991, 0.537876, 0.383809),
    ("aware, unified", "EO", "global"): (0.617772, 0.603077, 0.594902, 0.569875, 0.558348, 0.546627),
    ("aware, unified", "EO", "local"): (0.617732, 0.599631, 0.567651, 0.491385, 0.442133, 0.387521),
    ("aware, unified", "EO", "both"): (0.615084, 0.597720, 0.563964, 0.485139, 0.436169, 0.365500),
}
BAYES = {"blind, personal": 0.6205, "aware, personal": 0.6255, "blind, unified": 0.62, "aware, unified": 0.6255}


def best(joint, mode, notion, at_large=float("inf"), at_home=float("inf")):
    seen = {"aware": "aware" in mode, "personal": "personal" in mode}
    return optimum(joint, NOTIONS[notion], at_large, at_home, **seen)


@pytest.mark.parametrize(("mode", "notion", "scope"), OPTIMA)
def test_the_best_classifier_within_a_tolerance_is_found_exactly(mode, notion, scope):
    for tolerance, accuracy in zip(TOLERANCES, OPTIMA[mode, notion, scope], strict=True):
        bounds = [tolerance if scope in (name, "both") else float("inf") for name in ("global", "local")]
        assert best(canonical(), mode, notion, *bounds).accuracy == pytest.approx(accuracy, abs=1e-6)


MIXED = {
    ("blind, personal", 0.02, 0.1): (0.470887, 0.506205, 0.481474),
    ("blind, personal", 0.05, 0.1): (0.492627, 0.527057, 0.498663),
    ("aware, personal", 0.02, 0.1): (0.540887, 0.579517, 0.572477),
    ("aware, personal", 0.02, 0.05): (0.539434, 0.579033, 0.568886),
    ("blind, unified", 0.02, 0.1): (0.458792, 0.400471, 0.397963),
    ("aware, unified", 0.02, 0.1): (0.540000, 0.576412, 0.568969),
}


@pytest.mark.parametrize(("mode", "at_large", "at_home"), MIXED)
def test_global_and_local_tolerances_may_differ(mode, at_large, at_home):
    for notion, accuracy in zip(("DP", "EOP", "EO"), MIXED[mode, at_large, at_home], strict=True):
        assert best(canonical(), mode, notion, at_large, at_home).accuracy == pytest.approx(accuracy, abs=1e-6)


@pytest.mark.parametrize("mode", BAYES)
def test_without_bounds_the_best_is_bayes(mode):
    for notion in NOTIONS:
        assert best(canonical(), mode, notion).accuracy == pytest.approx(BAYES[mode], abs=1e-9)


def test_drawn_joints_have_their_optima():
    first, other = random_joint(3, 2, 10, 3, 1), random_joint(3, 2, 10, 3, 5)
    np.testing.assert_allclose(
        first.sum((2, 3)), [[0.173535, 0.172035], [0.235242, 0.099844], [0.175426, 0.143917]], atol=1e-6
    )
    found = [best(first, "aware, personal", notion, 0.02, 0.05).accuracy for notion in ("DP", "EOP", "EO")]
    np.testing.assert_allclose(found, [0.558086, 0.555509, 0.530020], atol=1e-6)
    found = [best(other, "aware, personal", notion, 0.02, 0.05).accuracy for notion in ("DP", "EOP", "EO")]
    np.testing.assert_allclose(found, [0.589629, 0.585580, 0.582531], atol=1e-6)
    found = [best(first, "blind, personal", notion, 0.05, 0.1).accuracy for notion in ("DP", "EOP", "EO")]
    np.testing.assert_allclose(found, [0.54794, 0.54436, 0.52872], atol=1e-5)


def confusions(joint, classifier):
    """C[k, a, i, j] = P(label = i, predicted = j | client, group)."""
    counts = np.einsum("kaxi,kaxj->kaij", joint, classifier)
    return counts, counts / counts.sum((2, 3), keepdims=True)


@pytest.mark.parametrize("notion", NOTIONS)
def test_a_constraint_is_the_difference_of_the_probabilities_that_it_stands_for(notion):
    joint = random_joint(3, 3, 6, 4, 2)
    r = np.random.default_rng(0)
    classifier = r.dirichlet(np.ones(4), size=joint.shape[:3])
    counts, confusion = (torch.from_numpy(leaf) for leaf in confusions(joint, classifier))
    found = events(NOTIONS[notion], 4)
    everyone = torch.from_numpy(joint.sum((0, 2)))
    values = torch.zeros(3, len(found.classes), dtype=torch.float64)
    for client in range(3):
        own = torch.from_numpy(joint[client].sum(1))
        matrices = constraints(found, own, everyone)
        values += torch.einsum("gvaij,aij->gv", matrices, confusion[client])
        at_home = own / own.sum()
        local = torch.einsum("gvaij,aij->gv", constraints(found, at_home, at_home), confusion[client])
        direct = rates(found, counts[client]) - rates(found, counts[client].sum(0, keepdim=True))
        torch.testing.assert_close(local, direct, rtol=0, atol=1e-12)
    everywhere = counts.sum(0)
    direct = rates(found, everywhere) - rates(found, everywhere.sum(0, keepdim=True))
    torch.testing.assert_close(values, direct, rtol=0, atol=1e-12)
    assert direct.abs().max() > 1e-3
    assert max_deviation(found, everywhere) == pytest.approx(float(direct.abs().max()), abs=1e-12)


def test_what_the_program_returns_is_a_classifier_with_this_accuracy_within_the_tolerance():
    joint = canonical()
    for notion in NOTIONS:
        best_of_all = best(joint, "aware, personal", notion, 0.02, 0.05)
        np.testing.assert_allclose(best_of_all.classifier.sum(-1), 1, atol=1e-9)
        counts, _ = (torch.from_numpy(leaf) for leaf in confusions(joint, best_of_all.classifier))
        assert float(counts.diagonal(dim1=2, dim2=3).sum()) == pytest.approx(best_of_all.accuracy, abs=1e-9)
        found = events(NOTIONS[notion], 3)
        assert max_deviation(found, counts.sum(0)) <= 0.02 + 1e-9
        assert max_deviation(found, counts) <= 0.05 + 1e-9


def test_deviation_and_gap_of_two_groups_differ_by_the_share_of_the_larger_one():
    counts = torch.tensor([[[60.0, 10], [10, 20]], [[5, 15], [20, 10]]])
    for notion in ("DP",):
        found = unfairness(events(NOTIONS[notion], 2), counts)
        torch.testing.assert_close(found.deviation, found.gap * (1 - 50 / 150))
    assert pairwise_gap(events(NOTIONS["DP"], 2), counts) == pytest.approx(abs(30 / 100 - 25 / 50))


def test_a_group_without_examples_of_an_event_is_left_out():
    counts = torch.zeros(2, 2, 2)
    counts[0] = torch.tensor([[3.0, 1], [1, 3]])
    counts[1] = torch.tensor([[2.0, 2], [0, 0]])  # nobody with label 1
    found = unfairness(events("equal opportunity", 2), counts)
    assert found.gap.tolist() == [0.25, 0.0]
    one = torch.tensor([[0.4, 0.4], [0.2, 0.0]]).double()
    matrices = constraints(events("equal opportunity", 2), one, one)
    assert torch.isfinite(matrices).all() and not matrices[1, 1].any()


@pytest.mark.parametrize("bad", [np.ones((2, 2, 3)), -np.ones((1, 1, 1, 2)), np.zeros((1, 1, 1, 2))])
def test_what_is_no_joint_distribution_is_refused(bad):
    with pytest.raises(ValueError, match="joint must be P"):
        optimum(bad, "demographic parity")
    with pytest.raises(ValueError, match="global_tolerance must be at least 0, got -0.1"):
        optimum(canonical(), "demographic parity", -0.1)
    with pytest.raises(ValueError, match="notion must be demographic parity.*got 'fair'"):
        optimum(canonical(), "fair", 0.1)
