"""A client on what is kept does, to the bit, what it does where nothing else ever was."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from clients.fedrecgel import DualSam
from clients.ncf import OWN, scorer
from clients.prox import Prox
from clients.retained import Retained
from clients.scaffold import ControlledSgd
from clients.sgd import Sgd
from fedsim import tree
from fedsim.engines.local import Sequential, Vectorised
from fedsim.forgetting import at_hand
from fedsim.personal import Personal
from fedsim.task import Cohort, Task
from fedsim.testing import check_client, ragged

SETTINGS = {"lr": 0.1, "epochs": 2, "batch_size": 4}
CLIENTS = {
    "sgd": lambda model: Sgd(model=model, momentum=0.5, **SETTINGS),
    "prox": lambda model: Prox(model=model, mu=0.7, **SETTINGS),
    "scaffold": lambda model: ControlledSgd(model=model, **SETTINGS),
}


def without(federation, named):
    """The same without the examples (E,) that are named."""
    rows, ends = [], [0]
    for start, end, _, _ in federation.bounds:
        own = federation.rows[start:end]
        rows.append(own[~named[own]])
        ends.append(ends[-1] + len(rows[-1]))
    end = np.array(ends)
    return replace(federation, rows=np.concatenate(rows), bounds=np.stack([end[:-1], end[1:], end[1:], end[1:]], 1))


def answers(engine, federation, client, shared):
    personal = Personal({"train": client}, 5, 0).gather(range(5))
    replies = engine(federation, {"train": client}, 3).execute(
        Task("train", shared, round=2), Cohort(range(5), personal)
    )
    assert not replies.failed
    parts = {"update": replies.update, "metrics": replies.metrics, "personal": replies.personal}
    return tree.flatten(parts | {"weight": replies.weight})


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(leaf, other[name]) for name, leaf in one.items())


@pytest.mark.parametrize("engine", [Sequential, Vectorised])
@pytest.mark.parametrize("make", CLIENTS.values(), ids=CLIENTS)
def test_its_answers_are_those_of_the_other_on_a_federation_without_the_examples(forgetful, engine, make):
    federation, model = forgetful()
    federation.columns["target"][:3] = torch.tensor([2, 3, 2])  # the first client has these for later
    client, target = make(model), federation.columns["target"].numpy()
    plain = {"params": model.params, "control": tree.map(torch.ones_like, model.params)}
    everything = answers(engine, federation, client, plain)
    # A request at hand is named already, and one that has been dealt with is deleted; later ones are not yet known.
    for request, deleted, gone in ((1, 0, target == 1), (2, 1, (target > 0) & (target < 3)), (3, 3, target > 0)):
        found = answers(engine, federation, Retained(client=client), plain | at_hand(request, deleted))
        assert same(found, answers(engine, without(federation, gone), client, plain))
        assert not same(found, everything)
    assert same(answers(engine, federation, Retained(client=client), plain | at_hand(0, 0)), everything)


def test_a_client_of_which_nothing_is_kept_sends_the_servers_model_and_weighs_nothing(forgetful):
    federation, model = forgetful()
    client = Retained(client=CLIENTS["sgd"](model))
    found = answers(Sequential, federation, client, {"params": model.params} | at_hand(1, 0))
    for name, leaf in model.params.items():
        assert torch.equal(found[f"update/params/{name}"][2], leaf)
    assert found["weight"].tolist() == [15, 13, 0, 0, 1] and found["metrics/loss"][2] == 0


@pytest.mark.parametrize("make", [CLIENTS["sgd"], CLIENTS["prox"]])
def test_it_keeps_the_promises_of_a_client(forgetful, make):
    federation, model = forgetful(torch.float32)
    check_client(Retained(client=make(model)), {"params": model.params} | at_hand(1, 0), federation)


def recommender():
    """A client that begins with a drawn embedding of its own, what it is sent, and a federation for it."""
    model = scorer(60, dim=4, layers=2)
    client = DualSam(model=model, lr=0.1, negatives=2)
    params = {name: leaf for name, leaf in model.params.items() if not name.startswith(OWN)}
    columns = {"item": torch.arange(40) % 30, "y": torch.ones(40), "target": (torch.arange(40) % 4 == 1).long()}
    return client, {"params": params}, ragged(columns, (5, 9, 0, 12, 3))


def test_what_is_kept_begins_as_with_the_other_whoever_is_asked_first():
    client, shared, federation = recommender()
    alone, around = (Personal({"train": part}, 5, 0).gather(range(5)) for part in (client, Retained(client=client)))
    both = Personal({"train": client, "repair": Retained(client=client)}, 5, 0).gather(range(5))
    assert same(tree.flatten(alone), tree.flatten(around)) and same(tree.flatten(alone), tree.flatten(both))
    found = answers(Vectorised, federation, Retained(client=client), shared | at_hand(1, 0))
    assert same(
        found, answers(Vectorised, without(federation, federation.columns["target"].numpy() == 1), client, shared)
    )


def test_it_says_of_itself_what_the_other_says():
    client, shared, _ = recommender()
    around = Retained(client=client)
    assert (around.epochs, around.batch_size, around.split) == (client.epochs, client.batch_size, client.split)
    assert (around.stochastic, around.ordered) == (client.stochastic, client.ordered)
    assert around.footprint(shared, 7) == client.footprint(shared, 7)
    assert around.needs == (*client.needs, "target")


def test_a_client_with_a_way_of_its_own_to_run_is_refused(forgetful):
    @dataclass(frozen=True)
    class Own(Sgd):
        def run(self, shared, personal, data, rows):
            return super().run(shared, personal, data, rows)

    with pytest.raises(ValueError, match="client: Own overrides run, of which Retained knows nothing"):
        Retained(client=Own(model=forgetful()[1], lr=0.1))


def test_without_a_request_or_a_column_target_it_says_what_is_missing(forgetful):
    federation, model = forgetful()
    client = {"train": Retained(client=CLIENTS["sgd"](model))}
    failed = Sequential(federation, client).execute(Task("train", {"params": model.params}), Cohort([0])).failed
    assert "the server does not say 'request'" in failed[0]
    columns = {name: federation.columns[name] for name in ("x", "y")}
    task = Task("train", {"params": model.params} | at_hand(1, 0))
    failed = Sequential(replace(federation, columns=columns), client).execute(task, Cohort([0])).failed
    assert "no column target says what is to be forgotten, only x, y" in failed[0]
