"""q-FedAvg's local side: the loss is that of the model as it was sent, the training is Sgd."""

import pytest
import torch
from torch.nn import functional

from clients.qfedavg import LossThenSgd
from clients.sgd import Sgd
from fedsim.engines.local import Sequential, Vectorised
from fedsim.task import Cohort, Task

SIZES = (0, 1, 7, 20, 33, 2)


def train(model, federation, client, engine):
    task = Task("train", {"params": model.params}, round=1)
    return engine(federation, {"train": client}).execute(task, Cohort(range(len(SIZES))))


@pytest.mark.parametrize("engine", [Sequential, Vectorised])
def test_the_loss_is_that_of_the_model_as_it_was_sent_on_all_examples(classification, engine):
    model, federation = classification(SIZES, torch.float64)
    replies = train(model, federation, LossThenSgd(model=model, lr=0.5, epochs=3, batch_size=8), engine)
    for ident in range(1, len(SIZES)):
        examples = federation.examples(ident)
        with torch.no_grad():
            before = functional.cross_entropy(model.module(examples["x"]), examples["y"])
            trained = {name: leaf[ident] for name, leaf in replies.update["params"].items()}
            after = functional.cross_entropy(model.predict(trained, examples), examples["y"])
        assert float(replies.update["loss"][ident]) == pytest.approx(float(before), rel=1e-10)
        assert float(after) < float(before) - 1e-3, "after training it would be another"
    assert float(replies.update["loss"][0]) == 0.0
    assert replies.weight.tolist() == list(SIZES)


@pytest.mark.parametrize("engine", [Sequential, Vectorised])
def test_its_training_is_sgd_to_the_bit(classification, engine):
    model, federation = classification(SIZES)
    one = train(model, federation, LossThenSgd(model=model, lr=0.1, epochs=2, batch_size=8), engine).update["params"]
    other = train(model, federation, Sgd(model=model, lr=0.1, epochs=2, batch_size=8), engine).update["params"]
    assert all(torch.equal(leaf, one[name]) for name, leaf in other.items())


def test_the_loss_is_measured_without_dropout(classification):
    model, federation = classification(SIZES, torch.float64, dropout=0.9)
    losses = train(model, federation, LossThenSgd(model=model, lr=0.1), Sequential).update["loss"]
    still, _ = classification(SIZES, torch.float64)
    examples = federation.examples(4)
    params = {name.replace("2.", "3.") if name.startswith("2.") else name: leaf for name, leaf in still.params.items()}
    assert all(torch.equal(leaf, model.params[name]) for name, leaf in params.items())
    expected = functional.cross_entropy(still.predict(still.params, examples), examples["y"])
    assert float(losses[4]) == pytest.approx(float(expected), rel=1e-10)
