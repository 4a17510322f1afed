"""Active forgetting: ordinary steps where there is nothing to forget, and new memories beside them where there is."""

from dataclasses import dataclass

import pytest
import torch

from clients.forget import ForgetWhileTraining
from clients.sgd import Sgd
from fedsim.engines.local import Sequential, Vectorised
from fedsim.engines.sequential import prepare
from fedsim.forgetting import at_hand
from fedsim.optim import clipped
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


@pytest.mark.parametrize("clip", [0.4, 1e9])
def test_with_nothing_to_forget_its_steps_are_those_of_sgd_to_the_bit(forgetful, clip):
    @dataclass(frozen=True)
    class Clipping(Sgd):
        def step(self, state, batch):
            loss, slope = self.model.gradient(state["params"], batch)
            params, _ = self.optimiser.update(clipped(slope, clip), {}, state["params"])
            return state | {"params": params, "loss": state["loss"] + loss * batch["mask"].sum()}

    federation, model = forgetful(torch.float32)
    shared = {"params": model.params} | REQUEST
    client = ForgetWhileTraining(model=model, lr=0.3, batch_size=4, clip=clip)
    data = prepare(Sequential(federation, {"train": client}, 3), Task("train", shared, round=1), 1)
    data |= {"mask": torch.ones(13, dtype=torch.bool)}
    rows = [(data["step"] == step).nonzero().flatten() for step in range(4)]
    plain = Sgd(model=model, lr=0.3) if clip == 1e9 else Clipping(model=model, lr=0.3)
    one, other = (part.run(shared, {}, data, rows) for part in (client, plain))
    for name, leaf in one.update["params"].items():
        assert torch.equal(leaf, other.update["params"][name]) and not torch.equal(leaf, model.params[name])
    assert torch.equal(one.weight, other.weight) and torch.equal(one.metrics["loss"], other.metrics["loss"])


@pytest.mark.parametrize("engine", [Sequential, Vectorised])
def test_all_its_examples_weigh_however_many_epochs_there_are(forgetful, engine):
    federation, model = forgetful()
    client = ForgetWhileTraining(model=model, lr=0.3, batch_size=4, epochs=3)
    replies = engine(federation, {"train": client}, 3).execute(
        Task("train", {"params": model.params} | REQUEST, round=1), Cohort(range(5))
    )
    assert dict(zip(replies.ids, replies.weight.tolist(), strict=True)) == {0: 20, 1: 13, 2: 6, 3: 0, 4: 9}


def test_what_a_request_before_named_is_gone_and_what_a_later_one_will_is_kept(forgetful):
    federation, model = forgetful()
    federation.columns["target"][:5] = torch.tensor([1, 2, 3, 1, 2])
    engine = Sequential(federation, {"train": ForgetWhileTraining(model=model, lr=0.1, batch_size=4)}, 3)
    for request, deleted, gone, left in (
        (1, 0, {0, 3}, 20),
        (2, 1, {1, 4}, 18),
        (3, 2, {2}, 16),
        (3, 0, set(range(5)), 20),
    ):
        data = prepare(engine, Task("train", at_hand(request, deleted), round=1), 0)
        assert len(data["y"]) == left
        named = {row for row in range(20) if federation.columns["x"][row, 0] in data["x"][data["target"] == 1, 0]}
        assert named == gone


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
