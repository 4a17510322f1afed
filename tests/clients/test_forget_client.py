"""Active forgetting: ordinary steps where there is nothing to forget, and new memories beside them where there is."""

import pytest
import torch
from torch.nn.functional import cross_entropy, log_softmax

from clients.forget import ForgetWhileTraining
from clients.sgd import Sgd
from fedsim.engines.local import Sequential, Vectorised
from fedsim.engines.sequential import prepare
from fedsim.forgetting import at_hand
from fedsim.task import Cohort, Task
from fedsim.testing import check_client

REQUEST = at_hand(1, 0)


def test_retained_examples_come_in_batches_and_the_others_evenly_with_them(forgetful):
    federation, model = forgetful()
    client = ForgetWhileTraining(model=model, lr=0.1, batch_size=4, epochs=2)
    for ident, (kept, gone) in enumerate(((15, 5), (13, 0), (0, 6), (0, 0), (1, 8))):
        engine = Sequential(federation, {"train": client}, 3)
        data = prepare(engine, Task("train", REQUEST, round=1), ident)
        steps = max(1, -(-kept // 4))
        each = max(1, -(-gone // steps))
        for epoch in range(2 if kept + gone else 0):
            here = (data["step"] >= epoch * steps) & (data["step"] < (epoch + 1) * steps)
            for target, size, width in ((0, kept, 4), (1, gone, each)):
                counts = (data["step"][here & (data["target"] == target)] - epoch * steps).bincount(minlength=steps)
                assert counts.tolist() == [min(width, max(0, size - step * width)) for step in range(steps)]
            assert sorted(data["x"][here, 0].tolist()) == sorted(federation.examples(ident)["x"][:, 0].tolist())
        q = data["q"][data["target"] == 1]
        assert q.shape == (2 * gone, 3) and not q.gather(1, data["y"][data["target"] == 1][:, None]).any()
        assert not data["q"][data["target"] == 0].any()


@pytest.mark.parametrize("engine", [Sequential, Vectorised])
def test_each_step_descends_both_losses_with_a_clipped_gradient(forgetful, engine):
    federation, model = forgetful()
    client = ForgetWhileTraining(model=model, lr=0.3, beta=0.7, batch_size=4, clip=0.4)
    here = engine(federation, {"train": client}, 3)
    task = Task("train", {"params": model.params} | REQUEST, round=1)
    replies = here.execute(task, Cohort([0, 1, 2, 3, 4]))
    assert replies.failed == {}
    for place, ident in enumerate(replies.ids):
        data = prepare(here, task, ident)
        params = {name: leaf.clone() for name, leaf in model.params.items()}
        for step in range(int(data["step"].max()) + 1 if len(data["step"]) else 0):
            free = {name: leaf.requires_grad_() for name, leaf in params.items()}
            kept, gone = ((data["step"] == step) & (data["target"] == target) for target in (0, 1))
            outputs = torch.func.functional_call(model.module, free, (data["x"],))
            loss = torch.zeros((), dtype=torch.float64)
            if kept.any():
                loss = loss + cross_entropy(outputs[kept], data["y"][kept])
            if gone.any():
                loss = loss - 0.7 * (data["q"][gone] * log_softmax(outputs[gone], 1)).sum(1).mean()
            slope = dict(zip(free, torch.autograd.grad(loss, list(free.values())), strict=True))
            size = torch.cat([leaf.flatten() for leaf in slope.values()]).norm()
            factor = min(1.0, 0.4 / float(size))
            params = {name: (leaf - 0.3 * factor * slope[name]).detach() for name, leaf in params.items()}
        for name, leaf in params.items():
            torch.testing.assert_close(replies.update["params"][name][place], leaf.detach(), rtol=1e-7, atol=1e-9)
    assert dict(zip(replies.ids, replies.weight.tolist(), strict=True)) == {0: 20, 1: 13, 2: 6, 3: 0, 4: 9}


def test_with_one_batch_and_nothing_to_forget_it_is_a_step_of_sgd(forgetful):
    federation, model = forgetful()
    task, cohort = Task("train", {"params": model.params} | REQUEST, round=1), Cohort([1])
    forgetting = ForgetWhileTraining(model=model, lr=0.1, batch_size=50, clip=1e9)
    one, other = (
        Sequential(federation, {"train": client}, 3).execute(task, cohort).update["params"]
        for client in (forgetting, Sgd(model=model, lr=0.1, batch_size=50))
    )
    for name, leaf in one.items():
        torch.testing.assert_close(leaf, other[name], rtol=1e-12, atol=1e-14)


def test_it_keeps_the_promises_of_a_client(forgetful):
    federation, model = forgetful(torch.float32)
    check_client(ForgetWhileTraining(model=model, lr=0.1, batch_size=4), {"params": model.params} | REQUEST, federation)


def test_an_ordered_client_must_say_the_order(forgetful):
    class Silent(ForgetWhileTraining):
        def prepare(self, examples, rng):
            return examples

    federation, model = forgetful()
    engine = Sequential(federation, {"train": Silent(model=model, lr=0.1)})
    failed = engine.execute(Task("train", {"params": model.params} | REQUEST), Cohort([0])).failed
    assert "Silent is `ordered`, so its `prepare` must make a column step" in failed[0]
