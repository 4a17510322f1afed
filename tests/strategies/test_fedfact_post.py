"""FedFACT after training, as a whole: against the linear program, and a solver that sees all clients' data at once."""

import numpy as np
import pytest
import torch

from clients.fedfact_post import Calibrated
from fedsim.data.generated import canonical_table
from fedsim.engines.local import Vectorised
from fedsim.evaluation import Evaluate, evaluate
from fedsim.task import Cohort

# The canonical joint distribution, of which every number is known.

SOFT = [
    ("DP", 0.1, 0.52593, 0.57771593),
    ("EOP", 0.1, 0.56149, None),
    ("EO", 0.1, 0.55636, 0.60519883),
    ("DP", 0.02, 0.53906, 0.54561826),
    pytest.param("EOP", 0.02, 0.57853, None, marks=pytest.mark.slow),
    pytest.param("EO", 0.02, 0.56820, 0.57416306, marks=pytest.mark.slow),  # slow to converge: 1768 rounds
]


@pytest.mark.parametrize(("notion", "temperature", "accuracy", "minimum"), SOFT)
def test_calibration_ends_at_the_soft_optimum(notion, temperature, accuracy, minimum, finite):
    outcome = finite.calibrated("canonical", notion, temperature=temperature)
    outcome.assert_optimal()
    assert outcome.problem.accuracy(outcome.classifier()) == pytest.approx(accuracy, abs=1e-5)
    if minimum:
        assert outcome.problem.objective(outcome.pairs) == pytest.approx(minimum, abs=1e-6)
    assert outcome.problem.limit == pytest.approx({"DP": 0.539434, "EOP": 0.579033, "EO": 0.568886}[notion])


SCOPES = [
    ("canonical", "DP", 0.02, None, True),
    ("canonical", "EO", None, 0.05, True),
    ("canonical", "DP", 0.0, 0.0, True),
    ("canonical", "DP", 0.05, 0.1, False),
    ("canonical", "EOP", 0.05, None, False),
    ("a group is absent", "DP", 0.01, 0.02, True),
    pytest.param("a group is absent", "EO", 0.01, 0.02, True, marks=pytest.mark.slow),
    pytest.param("labels are absent", "EO", 0.01, 0.02, True, marks=pytest.mark.slow),
    ("labels are absent", "EOP", 0.02, 0.0, True),
    ("one group", "EO", 0.0, 0.0, True),
    ("one label in use", "EO", 0.0, 0.0, True),
    ("one class", "EOP", 0.0, 0.0, True),
]


@pytest.mark.parametrize(("name", "notion", "at_large", "at_home", "aware"), SCOPES)
def test_so_it_does_with_either_kind_of_constraint_and_where_nobody_is_compared(
    name, notion, at_large, at_home, aware, finite
):
    finite.calibrated(name, notion, at_large, at_home, gap=1e-4, aware=aware).assert_optimal(1e-4)


def test_what_local_constraints_ask_of_the_only_client_the_global_ones_ask_already(finite):
    both, alone = (finite.calibrated("central", "DP", 0.02, at_home) for at_home in (0.05, None))
    both.assert_optimal()
    assert both.problem.limit == pytest.approx(0.54, abs=1e-6)
    for outcome in (both, alone):
        assert not outcome.pairs[:, 1].any()
    assert both.problem.objective(both.pairs) == pytest.approx(alone.problem.objective(alone.pairs), abs=1e-6)


@pytest.mark.parametrize("loose", [None, 1.0])
def test_without_tolerances_multipliers_stay_zero_and_it_predicts_what_the_model_does(loose, finite):
    outcome = finite.calibrated("canonical", "EO", loose, loose)
    assert len(outcome.rounds) == 2  # to measure, and to see that there is nothing to do
    assert not outcome.pairs.any()
    sharp = outcome.classifier(randomised=False)
    own = outcome.problem.joint.argmax(-1)[..., None] == np.arange(3)
    assert outcome.problem.accuracy(sharp) == pytest.approx(0.6255, abs=1e-9)
    assert (sharp == own).all()


def test_where_groups_are_alike_at_every_client_local_parity_costs_nothing(finite):
    outcome = finite.calibrated("alike", "DP", None, 0.0, 0.02)
    assert outcome.problem.limit == pytest.approx(0.6205, abs=1e-9)
    assert np.abs(outcome.pairs).max() < 1e-9
    assert outcome.problem.accuracy(outcome.classifier(randomised=False)) == pytest.approx(0.6205, abs=1e-9)


@pytest.mark.parametrize("at_home", [None, 0.05])
def test_all_clients_decide_alike_unless_they_have_constraints_of_their_own(at_home, finite):
    outcome = finite.calibrated("canonical", "DP", 0.02, at_home)
    examples = {"x": torch.eye(16, dtype=torch.float64), "a": torch.arange(16) // 4 % 2}
    shared, cost = outcome.strategy.shared(outcome.snapshot.state), outcome.snapshot.personal.gather([0, 1])["cost"]
    rule = Calibrated(outcome.calibrate.model, 3, 2, True, 0.1)
    first, second = (rule(shared, {"cost": own}, examples) for own in cost)
    assert torch.equal(first, second) == (at_home is None)
    assert not torch.equal(first, rule({"params": shared["params"]}, {}, examples)), (
        "it is not the model's own decision"
    )


def test_evaluation_counts_what_the_classifier_does(finite):
    fed, model = finite.federation(canonical_table(), 4000, labelled=True)
    strategy, clients = finite.prepare(fed, model, "DP", 0.02, 0.05, 3, 2, 0.1, 0.0, 5.0)
    settings = {"model": model, "num_classes": 3, "num_groups": 2, "part": "train"}
    clients["evaluate"] = Evaluate(**settings, classifier=Calibrated(model, 3, 2, True, 0.1))
    engine = Vectorised(fed, clients)
    snapshot = finite.play(strategy, engine, clients, model, 20, 2)[-1].snapshot
    found = evaluate(
        engine, strategy.shared(snapshot.state), Cohort([0, 1], snapshot.personal.gather([0, 1])), 1, "stack"
    )
    same = finite.calibrated("canonical", "DP", gap=0.0, number=20)  # on 200 examples of which nobody knows the label
    held = same.classifier()
    apart = np.abs(same.problem.deviations(held)).max(1)
    assert found.pooled["accuracy"] == pytest.approx(same.problem.accuracy(held), abs=1e-9)
    assert found.pooled["demographic_parity_deviation"] == pytest.approx(apart[0], abs=1e-9)
    np.testing.assert_allclose(found.clients["demographic_parity_deviation"], apart[1:], atol=1e-9)


# Models of group and label together, which need not know the group (OptFair), at one client.

BLIND = [
    ("central", "DP", 0.05, 0.48599, 0.48628),
    ("central", "DP", 0.01, 0.44862, 0.44963),
    ("central", "EOP", 0.05, 0.44505, 0.44788),
    ("central", "EOP", 0.01, 0.38268, 0.38467),
    ("central", "EO", 0.05, 0.44482, 0.44631),
    ("central", "EO", 0.01, 0.37952, 0.38173),
    ("four", "DP", 0.05, 0.45969, 0.46109),
    pytest.param("four", "DP", 0.01, 0.43477, 0.43524, marks=pytest.mark.slow),
    pytest.param("four", "EOP", 0.05, 0.44679, 0.44783, marks=pytest.mark.slow),
    pytest.param("four", "EOP", 0.01, 0.42107, 0.42168, marks=pytest.mark.slow),
    pytest.param("four", "EO", 0.05, 0.43990, 0.44024, marks=pytest.mark.slow),
    pytest.param("four", "EO", 0.01, 0.37281, 0.37329, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "notion", "tolerance", "accuracy", "best"), BLIND)
def test_who_does_not_see_the_group_is_as_fair_and_nearly_as_accurate_as_can_be(
    name, notion, tolerance, accuracy, best, finite
):
    outcome = finite.calibrated(name, notion, tolerance, None, 0.02, 1e-4, 100.0, aware=False)
    held = outcome.classifier()
    assert (held == held[:, :1]).all()  # whatever the group
    assert outcome.problem.accuracy(held) == pytest.approx(accuracy, abs=1e-4)
    assert outcome.problem.limit == pytest.approx(best, abs=1e-4)
    assert np.abs(outcome.problem.deviations(held)[0]).max() == pytest.approx(tolerance, abs=5e-5)
    assert outcome.pairs.sum() < 5


def test_the_looser_the_tolerance_the_better_and_the_less_so_the_looser_it_is(finite):
    tolerances = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3)
    found = [finite.calibrated("central", "DP", t, None, 0.02, 1e-4, aware=False) for t in tolerances]
    accuracies = [outcome.problem.accuracy(outcome.classifier()) for outcome in found]
    np.testing.assert_allclose(accuracies, (0.43884, 0.44862, 0.45811, 0.48599, 0.53198, 0.61846, 0.61924), atol=1e-4)
    values = np.array([outcome.problem.objective(outcome.pairs) for outcome in found])
    slopes = np.diff(values) / np.diff(tolerances)
    assert (slopes >= 0).all() and (np.diff(slopes) <= 1e-6).all() and slopes[0] > 0.9
    loosest = found[-1]  # above what the soft classifier itself deviates by
    assert not loosest.pairs.any() and np.abs(loosest.problem.deviations(loosest.classifier())).max() < 0.3
