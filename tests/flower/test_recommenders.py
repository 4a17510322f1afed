"""Recommenders under Flower's loop do what they do under ours, and only rows of tables travel up."""

from itertools import islice

import pytest
import torch
from flwr.app import ArrayRecord

from clients.mostpop import TellItems, nothing
from clients.pfedrec import DualPersonal, scorer
from fedsim import tree
from fedsim.data.datasets import latent_factor_ratings
from fedsim.data.partition import by_column
from fedsim.engines.local import Sequential, Vectorised
from fedsim.flower import ClientNodes
from fedsim.flower.codec import decode_reply
from fedsim.personal import Personal
from fedsim.ranking import leave_one_out, popularity
from fedsim.sampling import everyone
from fedsim.simulation import begin, rounds
from strategies.mostpop import MostPop
from strategies.pfedrec import PFedRec

USERS, ITEMS = 12, 90


@pytest.fixture(scope="module")
def federation():
    data = latent_factor_ratings(users=USERS, items=ITEMS)
    return leave_one_out(data, by_column(data.columns, column="user"), negatives=9)


def through_the_grid(overheard, strategy, model, client, engine, federation, number):
    """The state of our own loop after so many rounds, Flower's result, and what the nodes answered in the first."""
    here = engine(federation, {"train": client}, 3)
    start = begin(strategy, model.params, {"train": client}, USERS, 3)
    *_, last = islice(rounds(strategy, here, everyone(USERS), start), number)
    grid = overheard(ClientNodes(here, Personal({"train": client}, USERS, 3)), USERS, 3)
    result = strategy.start(grid=grid, initial_arrays=ArrayRecord(model.module.state_dict()), num_rounds=number)
    return last.snapshot.state, result, [decode_reply(message.content) for message in grid.heard[0]]


@pytest.mark.parametrize("engine", [Sequential, Vectorised])
def test_pfedrec(federation, overheard, engine):
    model = scorer(ITEMS, dim=4)
    model.module.double()
    client = DualPersonal(model=model, lr=0.1, lr_eta=1, batch_size=16)
    state, result, answers = through_the_grid(overheard, PFedRec(), model, client, engine, federation, 3)
    found = {name: torch.from_numpy(array.numpy().copy()) for name, array in result.arrays.items()}
    for name, leaf in state["params"].items():
        torch.testing.assert_close(found[name], leaf, rtol=1e-9, atol=1e-12)
    for answer in answers:
        assert answer.personal == {} and answer.update.keys() == {"change"}
        assert 0 < len(answer.update["change"]["item.weight"].index) < ITEMS


@pytest.mark.parametrize("engine", [Sequential, Vectorised])
def test_mostpop(federation, overheard, engine):
    strategy = MostPop(ITEMS, USERS)
    state, _, answers = through_the_grid(
        overheard, strategy, nothing(), TellItems(num_items=ITEMS), engine, federation, 1
    )
    assert torch.equal(state["popularity"].long(), popularity(federation).long())
    sent = sum(tree.Rows(a.update["popularity"].index, a.update["popularity"].values, ITEMS).dense() for a in answers)
    assert torch.equal(sent, state["popularity"])
