"""FedFACT after training where hardly anybody is: a group and event in which less than one example is expected.

In the joint distributions of these tests, so many examples of a (group, label) are expected by the scores; those with
none at all are the same but for that. The linear program says what it would cost to be fair to what is hardly there.
"""

from dataclasses import replace

import numpy as np
import pytest

# Name of the joints, notion, global and local tolerance, whether the group is seen; scope and constraint of the cell.
CELLS = [
    ("a label", "EOP", 0.02, None, True, (0, 2)),
    ("a label of the first", "EOP", None, 0.02, True, (1, 0)),
    ("a group", "DP", 0.01, None, False, (0, slice(8, 12))),
]


def found(finite, name, expected, notion, at_large, at_home, aware=True):
    return finite.calibrated(f"{name}, {expected}", notion, at_large, at_home, 0.05, 1e-4, aware=aware)


@pytest.mark.parametrize(("name", "notion", "at_large", "at_home", "aware", "place"), CELLS)
def test_what_is_hardly_there_changes_nothing(name, notion, at_large, at_home, aware, place, finite):
    absent, trace = (found(finite, name, n, notion, at_large, at_home, aware) for n in (0.0, 2e-4))
    assert trace.problem.joint.min(where=trace.problem.joint > 0, initial=1) < 1e-6
    assert len(trace.rounds) == len(absent.rounds) and trace.rounds[-1].done
    np.testing.assert_allclose(trace.pairs, absent.pairs, atol=1e-5)
    assert absent.pairs.sum() > 0.2, "without multipliers they would be alike anyhow"
    mass = absent.problem.joint.sum(3) > 0
    np.testing.assert_allclose(trace.classifier()[mass], absent.classifier()[mass], atol=1e-4)
    for before, after in zip(absent.rounds[1:], trace.rounds[1:], strict=True):
        assert after.metrics == pytest.approx(before.metrics, abs=1e-5)  # the duality gap among them
    absent.assert_optimal(1e-4)
    curved = [outcome.snapshot.state["curvature"] for outcome in (absent, trace)]
    own = [outcome.snapshot.personal.gather([0])["curvature"] for outcome in (absent, trace)]
    np.testing.assert_allclose(curved[1], curved[0], rtol=1e-4)
    np.testing.assert_allclose(own[1], own[0], rtol=1e-4)


@pytest.mark.parametrize(("name", "notion", "at_large", "at_home", "aware", "place"), CELLS)
def test_it_binds_from_one_example_on_and_costs_nothing_below(name, notion, at_large, at_home, aware, place, finite):
    absent, below, above = (found(finite, name, n, notion, at_large, at_home, aware) for n in (0.0, 0.95, 1.05))
    cost = absent.problem.limit - below.problem.limit
    assert cost > 0.005, "what is hardly there would be dear"
    accuracy, unbound, bound = (each.problem.accuracy(each.classifier()) for each in (absent, below, above))
    tolerance = at_large or at_home

    above.assert_optimal(1e-4)
    assert np.abs(above.problem.deviations(above.classifier())[place]).max() <= tolerance + 5e-4
    assert bound < accuracy - cost / 2
    assert below.rounds[-1].done
    assert np.abs(below.problem.deviations(below.classifier())[place]).max() > 5 * tolerance
    assert not below.pairs[(slice(None), *place)].any()
    assert unbound > accuracy - cost / 2 and unbound > below.problem.limit


@pytest.mark.parametrize(("name", "notion", "at_large", "at_home", "aware", "place"), CELLS)
def test_the_optimum_is_the_one_without_it_in_any_rate(name, notion, at_large, at_home, aware, place, finite):
    absent, below = (found(finite, name, n, notion, at_large, at_home, aware) for n in (0.0, 0.95))
    there = absent.problem.joint > 0
    left = replace(below.problem, compared=below.problem.joint * there)
    assert left.objective(below.pairs) == pytest.approx(left.objective(left.best), abs=1e-4)
    held = below.classifier()
    soft, _ = left.classifier(below.pairs[0] - below.pairs[1])
    np.testing.assert_allclose(held, soft, atol=1e-9)  # prices
    assert (np.abs(left.deviations(held)).max(1) <= np.array(left.tolerances) + 5e-4).all()
    gap, apart = below.rounds[-1].metrics["duality_gap"], below.rounds[-1].metrics["deviation"]
    assert left.objective(below.pairs) - left.objective(left.best) <= gap <= 1e-4
    assert apart == pytest.approx(np.abs(left.deviations(held)[0]).max(), abs=1e-9)


@pytest.mark.parametrize("expected", [0.8, 1.2])
def test_clients_that_hardly_have_it_may_have_enough_together(expected, finite):
    outcome = found(finite, "a label of all", expected, "EOP", 0.02, 0.02)
    each = outcome.problem.joint[:, 0, :, 0].sum(1) * 200
    assert (each < 0.9).all() and each.sum() == pytest.approx(expected)
    assert outcome.rounds[-1].done
    apart, pairs = np.abs(outcome.problem.deviations(outcome.classifier()))[:, 0], outcome.pairs[:, :, 0].sum(0)
    assert (apart[1:] > 0.1).all() and not pairs[1:].any()
    assert (apart[0] <= 0.02 + 5e-4) == (pairs[0] > 0) == (expected > 1)
