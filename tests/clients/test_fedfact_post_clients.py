"""FedFACT's local side after training: its formulas written out, and what it promises."""

import pytest
import torch
from torch import nn
from torch.nn.functional import one_hot

from clients.fedfact_post import Calibrate, Measure, reward
from fedsim import tree
from fedsim.data.federation import Federation
from fedsim.engines.local import Sequential, Vectorised
from fedsim.fairness import charges, costs, events, project
from fedsim.model import Model
from fedsim.task import Cohort, Task
from fedsim.testing import check_client, ragged

NOTIONS = {"DP": "demographic parity", "EOP": "equal opportunity", "EO": "equalised odds", "MEO": "mean equalised odds"}
SIZES = (0, 1, 7, 20, 33, 2)
GROUPS, CLASSES = 2, 3


def population(blind=False, dtype=torch.float64, sizes=SIZES):
    """A linear model and clients of these sizes, of whom one has no examples, one a single one."""
    generator = torch.Generator().manual_seed(1)
    columns = {
        "x": torch.randn(70, 5, generator=generator, dtype=torch.float64).to(dtype),
        "a": torch.randint(GROUPS, (70,), generator=generator),
    }
    module = nn.Linear(5, GROUPS * CLASSES if blind else CLASSES).to(dtype)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(dtype)
    return Model(module), ragged(columns, sizes)


def settings(model, notion="DP"):
    return {"model": model, "num_classes": CLASSES, "num_groups": GROUPS, "notion": NOTIONS[notion]}


def execute(engine, federation, client, shared, personal=None):
    ids = list(range(federation.num_clients))
    personal = {} if personal is None else personal
    replies = engine(federation, {"act": client}).execute(Task("act", shared, round=1), Cohort(ids, personal))
    assert not replies.failed, replies.failed
    return replies


def scores_of(model, federation, client):
    """J (n, G, K) of a client's examples, by the definition."""
    examples = federation.examples(client)
    outputs = model.predict(model.params, examples)
    if outputs.shape[1] == GROUPS * CLASSES:
        return outputs.softmax(1).reshape(-1, GROUPS, CLASSES)
    return one_hot(examples["a"], GROUPS)[:, :, None] * outputs.softmax(1)[:, None]


def binding(belongs):
    """P(group, event), (G, V), out of what each example adds, (n, G, V); zero where less than one is expected."""
    sums = belongs.sum(0)
    return torch.where(sums < 1 - 1e-9, 0, sums) / max(len(belongs), 1)


def belonging_to(found, scores):
    """P(group, label in event | example), (n, G, V), by the definition."""
    return torch.stack([scores[:, :, held].sum(2) for held in found.labels], 2)


# What is measured.


@pytest.mark.parametrize("engine", [Sequential, Vectorised])
@pytest.mark.parametrize("blind", [False, True])
@pytest.mark.parametrize("notion", NOTIONS)
def test_the_moments_are_those_of_belonging_to_a_group_and_an_event(notion, blind, engine):
    model, federation = population(blind)
    replies = execute(engine, federation, Measure(**settings(model, notion)), {"params": model.params})
    assert replies.weight.tolist() == list(SIZES)
    labels = events(NOTIONS[notion], CLASSES).labels
    for k, size in enumerate(SIZES):
        each = belonging_to(events(NOTIONS[notion], CLASSES), scores_of(model, federation, k))
        among, second = replies.update["among"][k], replies.update["second"][k]
        for i in range(GROUPS):
            for v in range(len(labels)):
                assert float(among[i, v]) == pytest.approx(float(each[:, i, v].sum()) / max(size, 1), abs=1e-12)
        expected = torch.einsum("ip,iq->pq", each.flatten(1), each.flatten(1)) / max(size, 1)
        torch.testing.assert_close(second.flatten(2).flatten(0, 1), expected, rtol=0, atol=1e-12)
        assert torch.equal(replies.personal["among"][k], among)
        assert torch.equal(replies.personal["params"]["weight"][k], model.params["weight"])


@pytest.mark.parametrize("notion", NOTIONS)
def test_the_curvature_is_the_largest_eigenvalue_of_what_each_example_adds_to_each_constraint(notion):
    model, federation = population()
    kept = execute(Sequential, federation, Measure(**settings(model, notion)), {"params": model.params}).personal
    found = events(NOTIONS[notion], CLASSES)
    for k, size in enumerate(SIZES):
        belongs = belonging_to(found, scores_of(model, federation, k))  # (n, G, V)
        among = binding(belongs)
        there = (among > 0).double()
        own = torch.eye(GROUPS).double()[:, None] / among.where(among > 0, torch.ones(1).double())[:, :, None]
        apart = own - 1 / among.sum(0).clamp(min=1e-9)[:, None]  # (G, V, G), of a group compared by a group charged
        column = one_hot(found.classes, CLASSES).double()
        each = torch.einsum("nav,av,gv,gva,vj->ngvj", belongs, there, there, apart, column).flatten(1, 2)  # (n, G V, K)
        largest = torch.linalg.eigvalsh(torch.einsum("nuj,nwj->uw", each, each) / max(size, 1))[-1]
        assert float(kept["curvature"][k]) == pytest.approx(float(largest), abs=1e-10)


# What is done with it.


def measured(model, federation, notion="DP", engine=Sequential):
    """What clients keep after they have measured, with multipliers at zero."""
    measure = Measure(**settings(model, notion))
    kept = execute(engine, federation, measure, {"params": model.params}).personal
    first = Calibrate(**settings(model, notion)).personal(torch.Generator())
    return tree.stack([first] * federation.num_clients) | kept


def price_for(notion):
    generator = torch.Generator().manual_seed(2)
    rates = len(events(NOTIONS[notion], CLASSES).classes)
    return 0.5 * torch.randn(GROUPS, rates, generator=generator, dtype=torch.float64)


def smooth_maximum(f, temperature, smoothing):
    if smoothing == "boltzmann":
        return ((f / temperature).softmax(-1) * f).sum(-1)
    return temperature * (f / temperature).logsumexp(-1)


@pytest.mark.parametrize("smoothing", ["log-sum-exp", "boltzmann"])
@pytest.mark.parametrize("blind", [False, True])
@pytest.mark.parametrize("notion", NOTIONS)
def test_what_is_taken_is_the_slope_of_the_smooth_maximum_in_the_price(notion, blind, smoothing):
    model, federation = population(blind)
    client = Calibrate(**settings(model, notion), temperature=0.1, smoothing=smoothing)
    found = events(NOTIONS[notion], CLASSES)
    price = price_for(notion)
    replies = execute(Sequential, federation, client, {"price": price}, measured(model, federation, notion))
    for k, size in enumerate(SIZES):
        if not size:
            assert not replies.update["taken"][k].any()
            continue
        leaf = price.clone().requires_grad_()
        f = scores_of(model, federation, k).sum(1) - torch.einsum(
            "nai,aij->nj", scores_of(model, federation, k), costs(found, leaf)
        )
        slope = torch.autograd.grad(smooth_maximum(f, 0.1, smoothing).mean(), leaf)[0]
        torch.testing.assert_close(replies.update["taken"][k], -slope, rtol=1e-10, atol=1e-12)
        if size > 1:
            assert slope.abs().max() > 1e-3


@pytest.mark.parametrize("notion", NOTIONS)
def test_steps_on_the_multipliers_go_down_the_slope_and_end_at_the_bottom(notion):
    model, federation = population()
    tolerance, price = 0.03, price_for(notion)
    found, kept = events(NOTIONS[notion], CLASSES), measured(model, federation, notion)

    def objective(pair, k):
        scores = scores_of(model, federation, k)
        among = binding(belonging_to(found, scores))
        f = reward(scores, costs(found, price + charges(pair[0] - pair[1], among)))
        return smooth_maximum(f, 0.1, "log-sum-exp").mean() + tolerance * pair.sum()

    def after(steps):
        client = Calibrate(**settings(model, notion), local_tolerance=tolerance, temperature=0.1, steps=steps)
        return execute(Sequential, federation, client, {"price": price}, kept)

    one, many = after(1), after(300)
    for k in range(len(SIZES)):
        among = binding(belonging_to(found, scores_of(model, federation, k)))
        if not (among > 0).all(0).any():  # there is no other group to compare with
            assert many.personal["dual"][k].max() < 1e-9
            continue
        leaf = kept["dual"][k].clone().requires_grad_()
        slope = torch.autograd.grad(objective(leaf, k), leaf)[0]
        step = 0.1 / kept["curvature"][k]
        torch.testing.assert_close(one.personal["dual"][k], project(-step * slope, 5.0), rtol=1e-9, atol=1e-12)
        values = [float(objective(pair[k], k)) for pair in (kept["dual"], one.personal["dual"], many.personal["dual"])]
        assert values[0] > values[1] >= values[2]
        assert 0 <= float(many.metrics["duality_gap"][k]) < 0.1 * float(one.metrics["duality_gap"][k])
        assert values[1] - values[2] <= float(one.metrics["duality_gap"][k])
        assert many.personal["dual"][k].sum() <= 5.0


def test_what_boltzmann_does_has_no_gap():
    model, federation = population()
    kept, shared = measured(model, federation), {"price": price_for("DP")}
    found = {
        smoothing: execute(Sequential, federation, Calibrate(**settings(model), smoothing=smoothing), shared, kept)
        for smoothing in ("log-sum-exp", "boltzmann")
    }
    assert found["boltzmann"].metrics == {} and found["log-sum-exp"].metrics.keys() == {"duality_gap"}
    assert not torch.equal(found["boltzmann"].update["taken"], found["log-sum-exp"].update["taken"])


def test_multipliers_start_at_zero_and_the_cost_kept_is_that_of_the_multipliers():
    model, federation = population()
    first = Calibrate(**settings(model, "EO")).personal(torch.Generator())
    assert first["dual"].shape == (2, GROUPS, CLASSES**2) and not first["dual"].any() and not first["cost"].any()
    client = Calibrate(**settings(model, "EO"), local_tolerance=0.01, temperature=0.1)
    kept = measured(model, federation, "EO")
    after = execute(Sequential, federation, client, {"price": price_for("EO")}, kept).personal
    for k in range(len(SIZES)):
        among = binding(belonging_to(events(NOTIONS["EO"], CLASSES), scores_of(model, federation, k)))
        own = charges(after["dual"][k, 0] - after["dual"][k, 1], among)
        torch.testing.assert_close(after["cost"][k], costs(events(NOTIONS["EO"], CLASSES), own))
    assert after["cost"].abs().max() > 0.01


# What promises are kept.


class Begun(Calibrate):
    """It is not in its first round: there are multipliers, and what was measured, the same at every client."""

    def personal(self, rng):
        first = super().personal(rng)
        among, dual = first["among"], first["dual"]
        spread = torch.linspace(0.05, 0.25, among.numel(), dtype=among.dtype).reshape(among.shape)
        prior = torch.linspace(0.0, 0.1, dual.numel(), dtype=dual.dtype).reshape(dual.shape)
        return first | {"among": spread, "dual": prior, "curvature": torch.ones_like(first["curvature"])}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("blind", [False, True])
def test_clients_keep_their_promises(blind, dtype):
    model, federation = population(blind, dtype)
    for notion in ("DP", "EO"):
        check_client(Measure(**settings(model, notion)), {"params": model.params}, federation)
        shared = {"price": price_for(notion).to(dtype)}
        for smoothing, tolerance in (("log-sum-exp", 0.01), ("boltzmann", 0.0), ("log-sum-exp", None)):
            client = Begun(
                **settings(model, notion), local_tolerance=tolerance, temperature=0.2, smoothing=smoothing, steps=3
            )
            check_client(client, shared, federation)


@pytest.mark.parametrize("notion", NOTIONS)
def test_a_client_without_examples_of_a_group_or_none_at_all_answers_with_numbers(notion):
    model, federation = population()
    columns = federation.columns | {"a": torch.zeros_like(federation.columns["a"])}
    lonely = Federation(columns, federation.rows, federation.bounds)  # of the other group there is nobody
    for engine in (Sequential, Vectorised):
        kept = measured(model, lonely, notion, engine)
        client = Calibrate(**settings(model, notion), local_tolerance=0.0, temperature=0.1)
        replies = execute(engine, lonely, client, {"price": price_for(notion)}, kept)
        sent = tree.flatten({"update": replies.update, "personal": replies.personal, "metrics": replies.metrics})
        assert all(torch.isfinite(leaf).all() for leaf in sent.values())
        assert replies.personal["cost"].abs().max() < 1e-6  # there is nobody to be compared with
        assert replies.metrics["duality_gap"].abs().max() < 1e-6


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"local_tolerance": -0.1}, "local_tolerance"),
        ({"temperature": 0.0}, "temperature"),
        ({"smoothing": "softmax"}, "smoothing must be one of 'log-sum-exp', 'boltzmann', got 'softmax'"),
        ({"bound": 0.0}, "bound"),
        ({"steps": 0}, "steps"),
    ],
)
def test_settings_out_of_range_are_refused(changed, told):
    model, _ = population()
    with pytest.raises(ValueError, match=told):
        Calibrate(**settings(model) | changed)
