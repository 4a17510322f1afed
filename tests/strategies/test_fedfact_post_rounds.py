"""Rounds of FedFACT after training: what travels, clients that are not there, and engines."""

import os

import numpy as np
import pytest
import torch

from clients.fedfact_post import Measure
from fedsim import tree
from fedsim.data.federation import Federation
from fedsim.data.generated import canonical_table
from fedsim.engines.engine import pick
from fedsim.engines.local import Sequential, Vectorised
from fedsim.testing import check_strategy
from strategies.fedfact_post import FedFactPost

# What travels.


@pytest.mark.parametrize(("notion", "rates"), [("DP", 3), ("EOP", 3), ("EO", 9)])
def test_nothing_travels_but_the_model_the_moments_and_then_numbers_for_each_group_and_rate(notion, rates, finite):
    fed, model = finite.federation(*finite.joints["canonical"])
    strategy, clients = finite.prepare(fed, model, notion, 0.02, 0.05, 3, 2, 0.1, 0.0, 5.0)
    engine = finite.Listening(fed, clients)
    done = finite.play(strategy, engine, clients, model, 6, 2)

    def shape(part):
        return {name: tuple(leaf.shape) for name, leaf in tree.flatten(part).items()}

    shapes = [(shape(task.shared), shape(replies.update)) for task, replies in engine.heard]
    pair = (2, rates)
    assert shapes[0] == ({"params/weight": (3, 16)}, {"among": pair, "second": pair + pair})
    assert shapes[1:] == [({"price": pair}, {"taken": pair, "among": pair})] * 5
    assert [task.action for task, _ in engine.heard] == ["measure"] + ["calibrate"] * 5
    assert [set(r.metrics) for _, r in engine.heard] == [set()] + [{"duality_gap"}] * 5
    number = 2 * rates
    for step in done[1:]:
        assert step.traffic.down == 2 * 8 * number
        assert step.traffic.up == 2 * 8 * (2 * number + 2)  # and the weight and the gap
    assert done[-1].snapshot.personal.gather([0, 1])["dual"].any()  # of which nothing travelled


def test_the_steps_follow_from_the_curvature(finite):
    expected = {
        "DP": (51.01010101, (108.333, 138.095)),
        "EOP": (121.99197595, (222.294, 522.623)),
        "EO": (200.00772285, (376.345, 633.559)),
    }
    for notion, (at_large, at_home) in expected.items():
        snapshot = finite.calibrated("canonical", notion, temperature=0.02, number=1).snapshot
        assert float(snapshot.state["curvature"]) / 0.04 == pytest.approx(at_large, abs=1e-6)
        own = snapshot.personal.gather([0, 1])["curvature"] / 0.04
        share = [0.5, 0.5]  # the reference's multipliers are the client's times its share
        np.testing.assert_allclose(own / torch.tensor(share), at_home, atol=1e-3)


# Clients that are not there.


def some(fed, seats):
    """A federation in which some of the clients have no examples."""
    bounds = fed.bounds.copy()
    bounds[seats, 1:] = bounds[seats, :1]
    return Federation(fed.columns, fed.rows, bounds)


def final(finite, fed, model, engine=Sequential, number=40, **changed):
    """What a short run on the canonical joint comes to, as named tensors; `changed` are other clients."""
    strategy, clients = finite.prepare(fed, model, "DP", 0.02, 0.05, 3, 2, 0.1, 0.0, 5.0)
    clients |= {action: make(**vars_of(clients[action])) for action, make in changed.items()}
    with engine(fed, clients, 0) as runner:
        done = finite.play(strategy, runner, clients, model, number, fed.num_clients)
    return done, tree.flatten(done[-1].snapshot.state) | done[-1].snapshot.personal.flat()


def vars_of(client):
    return {name: getattr(client, name) for name in client.__dataclass_fields__}


def test_a_client_without_examples_changes_nothing(finite):
    fed, model = finite.federation(*finite.joints["canonical"])
    bounds = np.insert(fed.bounds, 1, 0, axis=0)
    _, with_it = final(finite, Federation(fed.columns, fed.rows, bounds), model)
    _, without_it = final(finite, fed, model)
    for name in ("dual", "ahead", "among", "gap"):
        assert torch.equal(with_it[name], without_it[name]), name
    assert not with_it["rows/dual"][1].any() and torch.isfinite(with_it["rows/cost"]).all()
    assert torch.equal(with_it["rows/dual"][[0, 2]], without_it["rows/dual"])


class Broken(Measure):
    """Cannot measure where group 0 is the larger one, which is at client 0 of the canonical joint."""

    def start(self, shared, personal, data):
        if data["a"].double().mean() < 0.5:
            raise ArithmeticError("it cannot")
        return super().start(shared, personal, data)


def test_a_client_that_cannot_measure_is_left_out_and_the_others_go_on(finite):
    fed, model = finite.federation(*finite.joints["canonical"])
    done, found = final(finite, fed, model, measure=Broken)
    assert done[0].failed.keys() == {0} and "it cannot" in done[0].failed[0]
    assert all(not step.failed and step.answered == 1 for step in done[1:])
    assert found["measured"].tolist() == [False, True]
    _, alone = final(finite, some(fed, [0]), model)
    for name in ("dual", "ahead", "among", "gap", "curvature"):
        torch.testing.assert_close(found[name], alone[name], rtol=1e-12, atol=1e-14)
    assert found["dual"].any()


def losing(lost):
    """An engine that in some rounds hears nothing of client 0."""

    class Losing(Sequential):
        def execute(self, task, cohort):
            if task.round not in lost or 0 not in cohort.ids:
                return super().execute(task, cohort)
            there = [place for place, client in enumerate(cohort.ids) if client != 0]
            return super().execute(task, pick(cohort, there))._replace(failed={0: "it is gone"})

    return Losing


def interrupted(finite, lost):
    fed, model = finite.federation(*finite.joints["canonical"])
    strategy, clients = finite.prepare(fed, model, "DP", 0.02, 0.05, 3, 2, 0.1, 1e-4, 5.0)
    done = finite.play(strategy, losing(lost)(fed, clients), clients, model, 200, 2)
    problem = finite.Problem(canonical_table(), "DP", (0.02, 0.05, 0.05), 0.1)
    return finite.Outcome(done[-1].snapshot, done, strategy, clients["calibrate"], problem)


def test_a_client_that_is_gone_for_a_moment_costs_no_more_than_time(finite):
    outcome = interrupted(finite, [30, 60])
    assert outcome.rounds[-1].done and [step.snapshot.round for step in outcome.rounds if step.failed] == [30, 60]
    outcome.assert_optimal()


def test_after_a_client_is_gone_for_good_the_others_are_fair_among_themselves_and_it_does_not_claim_to_be_done(finite):
    outcome = interrupted(finite, range(30, 1000))
    assert len(outcome.rounds) == 200 and outcome.rounds[-1].metrics["duality_gap"] == float("inf")
    alone = finite.Problem(finite.without(canonical_table(), 0), "DP", outcome.problem.tolerances, 0.1)
    assert np.abs(alone.deviations(outcome.classifier())).max() <= 0.02 + 1e-4
    assert outcome.rounds[-1].metrics["multipliers"] < 1


# Engines.


def test_all_clients_at_once_are_what_one_after_another_are(finite):
    for joint in ("canonical", "a group is absent"):
        fed, model = finite.federation(*finite.joints[joint])
        alone, together = final(finite, fed, model)[1], final(finite, fed, model, Vectorised)[1]
        assert alone.keys() == together.keys()
        for name, leaf in alone.items():
            torch.testing.assert_close(leaf, together[name], rtol=0, atol=1e-10, msg=lambda text, n=name: n + text)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning")  # Ray's daemons, till the end
@pytest.mark.filterwarnings("ignore:unclosed file .*/dev/null:ResourceWarning")  # theirs, too
def test_any_number_of_workers_gives_the_same_bits(finite):
    import ray

    from fedsim.engines.ray import Ray

    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    try:
        fed, model = finite.federation(*finite.joints["labels are absent"])
        here = final(finite, fed, model, number=6)[1]
        for workers in (1, 2):

            def engine(*arguments, workers=workers):
                return Ray(*arguments, workers=workers, cpus=0.5, inner="sequential")

            there = final(finite, fed, model, engine, 6)[1]
            assert here.keys() == there.keys()
            assert all(torch.equal(leaf, there[name]) for name, leaf in here.items()), workers
    finally:
        ray.shutdown()


def test_the_strategy_is_pure_in_every_phase(finite):
    fed, model = finite.federation(*finite.joints["canonical"])
    strategy, clients = finite.prepare(fed, model, "EO", 0.02, 0.05, 3, 2, 0.1, 0.0, 5.0)
    engine = finite.Listening(fed, clients)
    done = finite.play(strategy, engine, clients, model, 3, 2)
    check_strategy(strategy, model.params, engine.heard[0][1])  # measures

    class Midway(FedFactPost):
        def init(self, params):
            return done[1].snapshot.state

    check_strategy(Midway(**vars_of(strategy)), model.params, engine.heard[2][1])  # calibrates
    trained = engine.heard[0][1]._replace(update={"params": tree.map(torch.zeros_like, model.params)})
    check_strategy(FedFactPost(3, 2, 2, training=1), model.params, trained)
