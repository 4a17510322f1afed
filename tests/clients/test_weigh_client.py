"""Importance is weighed at the clients: their sums together are what all examples in one place give."""

import pytest
import torch

from clients.weigh import Weigh
from fedsim import tree
from fedsim.engines.local import Sequential, Vectorised
from fedsim.forgetting import Evidence, at_hand, importance
from fedsim.method import averages
from fedsim.task import Cohort, Task
from fedsim.testing import check_client


def weighed(federation, model, engine=Sequential, request=(1, 0), reduce="sum", **settings):
    shared = {"params": model.params} | at_hand(*request)
    task = Task("weigh", shared, round=1, reduce=reduce)
    replies = engine(federation, {"weigh": Weigh(model=model, **settings)}).execute(task, Cohort(range(5)))
    assert not replies.failed
    return replies


def one_by_one(model, x, y):
    """The true and the empirical sums, by a gradient for each example and label."""
    true, empirical = (tree.map(torch.zeros_like, model.params) for _ in range(2))
    for row, label in zip(x, y.tolist(), strict=True):
        free = {name: leaf.clone().requires_grad_() for name, leaf in model.params.items()}
        logs = torch.func.functional_call(model.module, free, (row[None],))[0].log_softmax(0)
        for other, log in enumerate(logs):
            slopes = torch.autograd.grad(log, list(free.values()), retain_graph=True)
            for name, slope in zip(free, slopes, strict=True):
                true[name] += log.detach().exp() * slope**2
                empirical[name] += slope**2 * (other == label)
    return true, empirical


def assert_near(found, expected):
    for name, leaf in expected.items():
        torch.testing.assert_close(found[name], leaf, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("engine", [Sequential, Vectorised])
@pytest.mark.parametrize("batch_size", [4, 256])
def test_the_sum_over_clients_is_the_centralised_information(forgetful, engine, batch_size):
    federation, model = forgetful()
    replies = weighed(federation, model, engine, batch_size=batch_size)
    x, y, gone = federation.columns["x"], federation.columns["y"], federation.columns["target"] == 1
    true, _ = one_by_one(model, x[~gone], y[~gone])
    both = tree.map(torch.add, *one_by_one(model, x[gone], y[gone]))
    assert_near(replies.update["retained"]["sums"], true)
    assert_near(replies.update["forgotten"]["sums"], both)
    assert replies.update["retained"]["examples"] == 29 and replies.update["forgotten"]["examples"] == 19
    found = importance(*(Evidence(**replies.update[name]) for name in ("retained", "forgotten")))
    kept = tree.map(lambda leaf: leaf / 29, true)
    ratio = tree.map(lambda r, f: r / (r + f / 19 + 1e-8), kept, both)
    mean = torch.cat([leaf.flatten() for leaf in ratio.values()]).mean()
    assert_near(found, tree.map(lambda leaf: leaf / mean, ratio))


def test_what_was_deleted_before_counts_nowhere_and_what_is_asked_for_later_is_retained(forgetful):
    federation, model = forgetful()
    target = federation.columns["target"]
    target[:5] = torch.tensor([1, 2, 3, 1, 2])  # of the first client; the others' are of the first request
    update = weighed(federation, model, request=(2, 1)).update
    assert update["forgotten"]["examples"] == 2
    assert update["retained"]["examples"] == 29 + 1
    gone = target == 2
    both = tree.map(torch.add, *one_by_one(model, federation.columns["x"][gone], federation.columns["y"][gone]))
    assert_near(update["forgotten"]["sums"], both)


def test_two_numbers_for_each_parameter_and_two_counts_go_up_from_each_client(forgetful):
    federation, model = forgetful()
    replies = weighed(federation, model, reduce="stack")
    parameters = sum(leaf.numel() for leaf in model.params.values())
    assert sum(leaf[0].numel() for leaf in tree.flatten(replies.update).values()) == 2 * parameters + 2
    assert replies.traffic.up == 5 * (8 * (2 * parameters + 2) + 4 + 8)  # float64; the weight, and the metric
    assert replies.weight.tolist() == [20, 13, 6, 0, 9]
    named = float((federation.columns["target"] == 1).sum())
    assert averages(replies)["forgotten"] == pytest.approx(named / 48), "by which a report and a cost know the round"


def test_it_keeps_the_promises_of_a_client(forgetful):
    federation, model = forgetful(torch.float32)
    check_client(Weigh(model=model, batch_size=4), {"params": model.params} | at_hand(1, 0), federation)


def test_its_blocks_have_room_for_the_gradients_of_single_examples(forgetful):
    _, model = forgetful(torch.float32)
    shared, size = {"params": model.params} | at_hand(1, 0), 4 * sum(leaf.numel() for leaf in model.params.values())
    few, more, most = (Weigh(model=model, batch_size=50).footprint(shared, number) for number in (1, 11, 1000))
    assert more - few == 2 * 10 * size and most - few == 2 * 49 * size


def test_without_a_request_it_says_which_strategy_knows_of_some(forgetful):
    federation, model = forgetful()
    engine = Sequential(federation, {"weigh": Weigh(model=model)})
    failed = engine.execute(Task("weigh", {"params": model.params}), Cohort([0])).failed
    assert "the server does not say 'request': use a strategy that knows of requests, such as `forget`" in failed[0]
