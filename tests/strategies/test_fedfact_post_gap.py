"""The duality gap of FedFACT after training: what it says of the optimum, and when it ends."""

import numpy as np
import pytest
import torch

from fedsim.engines.local import Sequential


def test_the_gap_bounds_what_is_missing_from_the_optimum_and_what_is_too_much_of_a_deviation(finite):
    fed, model = finite.federation(*finite.joints["canonical"])
    strategy, clients = finite.prepare(fed, model, "DP", 0.02, 0.05, 3, 2, 0.1, 1e-4, 5.0)
    problem = finite.Problem(finite.joints["canonical"][0], "DP", (0.02, 0.05, 0.05), 0.1)
    best = problem.objective(problem.best)
    left = 5.0 - problem.best.sum((0, 2)) / np.concatenate([[1], problem.share])  # of the bounds, at the optimum
    assert (left > 3).all()
    asked, gaps = [strategy.init(model.params)], []

    def check(step):
        before, state = asked[0], step.snapshot.state
        asked[0] = state
        if step.snapshot.round == 1:
            return
        pairs = problem.pairs(before["ahead"], step.snapshot.personal)  # where the round was
        gap = step.metrics["duality_gap"]
        missing = problem.objective(pairs) - best
        apart = np.abs(problem.deviations(problem.classifier(pairs[0] - pairs[1])[0])).max(1)
        excess = np.maximum(apart - np.array(problem.tolerances), 0) * np.concatenate([[1], problem.share])
        assert -1e-12 <= missing <= gap + 1e-12
        assert (left * excess).sum() <= gap + 1e-12
        assert gap == pytest.approx(float(state["gap"]), abs=1e-15)
        assert step.metrics["deviation"] == pytest.approx(apart[0], abs=1e-12)
        assert step.metrics["multipliers"] == pytest.approx(float(before["ahead"].sum()), abs=1e-12)
        gaps.append(gap)

    done = finite.play(strategy, Sequential(fed, clients), clients, model, 400, 2, check)
    assert gaps[0] > 0.1 and gaps[-1] <= 1e-4  # it said much, and was small in the end
    assert [step.done for step in done] == [False] * (len(done) - 1) + [True]
    assert torch.equal(asked[0]["ahead"], done[-1].snapshot.state["ahead"])
    assert min(gaps[:-1]) > 1e-4


def test_with_a_gap_of_zero_it_goes_on(finite):
    outcome = finite.calibrated("canonical", "DP", gap=0.0, number=20)
    assert len(outcome.rounds) == 20 and not outcome.rounds[-1].done


def test_a_bound_that_is_too_small_leaves_it_unfair_at_the_optimum_within_the_bound(finite):
    for bound, apart in ((0.05, 0.212), (0.2, 0.200), (0.5, 0.198), (5.0, 0.010)):
        outcome = finite.calibrated("central", "DP", 0.01, None, 0.02, 1e-6, bound, aware=False)
        found = np.abs(outcome.problem.deviations(outcome.classifier())).max()
        assert found == pytest.approx(apart, abs=5e-4)
        assert outcome.pairs.sum() == pytest.approx(min(bound, 0.98), abs=5e-3)
        assert outcome.rounds[-1].done
        for step in outcome.rounds[1:]:
            assert step.metrics["duality_gap"] >= -1e-12 and step.metrics["multipliers"] <= bound + 1e-12
