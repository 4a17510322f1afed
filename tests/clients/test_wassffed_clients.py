"""WassFFed's local side: what is counted, where scores are to go, and steps towards there, against plain loops."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from clients.penalty import PenalisedAdam, spread
from clients.wassffed import CountScores, TransportAdam, shuffled
from fedsim.data.federation import schedule
from fedsim.engines.local import Sequential, Vectorised
from fedsim.task import Cohort, Task
from fedsim.testing import check_client
from fedsim.transport import class_scores

SIZES = (0, 1, 7, 20, 33, 2)
N = len(SIZES)
ENGINES = (Sequential, Vectorised)
BINS = 21


@pytest.fixture
def setting(classification):
    return classification(SIZES, torch.float64)


def maps(seed=0):
    """Some map of each of 2 groups and 3 scores, (2, 3, BINS)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(2, 3, BINS, generator=generator, dtype=torch.float64).sort(-1).values


def answer(engine, federation, client, shared, ids=range(N)):
    clients = {"train": client}
    return engine(federation, clients, 5).execute(Task("train", shared, round=2), Cohort(list(ids)))


def by_torch(model, data, client, loss):
    """The parameters after an epoch of torch's Adam on `loss(outputs, batch)`, batches in the engines' order."""
    own = {name: leaf.clone().requires_grad_() for name, leaf in model.params.items()}
    optimiser = torch.optim.Adam(
        own.values(), client.lr, (client.beta1, client.beta2), weight_decay=client.weight_decay
    )
    (plan,) = schedule(np.array([len(data["y"])]), client.epochs, client.batch_size, 5, 2, [4])
    for step in plan:
        rows = torch.from_numpy(step[step >= 0])
        batch = {name: column[rows] for name, column in data.items()}
        optimiser.zero_grad()
        loss(torch.func.functional_call(model.module, own, (batch["x"],)), batch).backward()
        optimiser.step()
    return {name: leaf.detach() for name, leaf in own.items()}


def distant(outputs, target, power, dead_zone):
    off = (outputs.softmax(-1) - target).abs()
    return (off - dead_zone).relu().pow(power)


# Counting.


@pytest.mark.parametrize("engine", ENGINES)
def test_a_client_sends_how_many_of_each_group_have_which_score_and_nothing_else(setting, engine):
    model, federation = setting
    replies = answer(engine, federation, CountScores(model=model, num_groups=2, bins=BINS), {"params": model.params})
    assert replies.update.keys() == {"counts"} and replies.metrics == {} and replies.personal == {}
    assert replies.update["counts"].dtype == torch.int64
    for place, ident in enumerate(replies.ids):
        data = federation.examples(ident)
        scores = model.module(data["x"]).softmax(-1).detach().numpy()
        expected = np.zeros((2, 3, BINS), dtype=int)
        for row, group in zip(scores, data["a"].tolist(), strict=True):
            for column, score in enumerate(row):
                expected[group, column, round(score * (BINS - 1))] += 1
        assert (replies.update["counts"][place].numpy() == expected).all()
        assert replies.weight[place] == len(data["y"])


@pytest.mark.parametrize("engine", ENGINES)
def test_a_client_whose_scores_are_no_numbers_fails_alone(setting, engine):
    model, federation = setting
    columns = {name: column.clone() for name, column in federation.columns.items()}
    columns["x"][federation.rows[federation.bounds[3][0]]] = torch.nan
    broken = replace(federation, columns=columns)
    replies = answer(engine, broken, CountScores(model=model, num_groups=2, bins=BINS), {"params": model.params})
    assert replies.failed.keys() == {3} and len(replies.ids) == N - 1
    assert "nan" in replies.failed[3].lower()


def test_two_classes_have_one_score():
    outputs = torch.randn(5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert class_scores(outputs).shape == (5, 1)
    torch.testing.assert_close(class_scores(outputs)[:, 0], (outputs[:, 1] - outputs[:, 0]).sigmoid())


# Training.


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("power", "dead_zone"), [(1, 0.0), (1, 0.05), (2, 0.0), (1.5, 0.05)])
def test_training_is_adam_on_the_mixed_loss_with_targets_of_the_model_that_was_sent(setting, engine, power, dead_zone):
    model, federation = setting
    client = TransportAdam(
        model, 2, lr=0.03, weight_decay=0.01, power=power, dead_zone=dead_zone, epochs=3, batch_size=8
    )
    data, alpha, sent = federation.examples(4), 0.3, maps()
    scores = model.module(data["x"]).softmax(-1).detach()
    place = (scores * (BINS - 1) + 0.5).floor().long()
    target = torch.stack([sent[a, torch.arange(3), at] for a, at in zip(data["a"], place, strict=True)])

    def loss(outputs, batch):
        cost = distant(outputs, batch["target"], power, dead_zone).sum(1).mean()
        return alpha * cross_entropy(outputs, batch["y"]) + (1 - alpha) * cost

    shared = {"params": model.params, "maps": sent, "alpha": torch.tensor(alpha, dtype=torch.float64)}
    replies = answer(engine, federation, client, shared)
    expected = by_torch(model, data | {"target": target}, client, loss)
    for name, leaf in expected.items():
        torch.testing.assert_close(replies.update["params"][name][4], leaf, rtol=1e-9, atol=1e-9)
    other = answer(engine, federation, replace(client, dead_zone=0.5 - dead_zone), shared)
    assert not torch.allclose(other.update["params"]["0.weight"][4], replies.update["params"]["0.weight"][4])


@pytest.mark.parametrize("engine", ENGINES)
def test_with_all_weight_on_accuracy_maps_change_no_bit(classification, engine):
    model, federation = classification(SIZES)
    client = TransportAdam(model, 2, lr=0.03, epochs=2, batch_size=8)
    shared = {"params": model.params, "maps": maps().float(), "alpha": torch.tensor(1.0)}
    plain = answer(engine, federation, client, {"params": model.params}).update["params"]
    same = answer(engine, federation, client, shared).update["params"]
    less = answer(engine, federation, client, shared | {"alpha": torch.tensor(0.99)}).update["params"]
    unpenalised = PenalisedAdam(model, 2, lr=0.03, penalty=0, epochs=2, batch_size=8)
    other = answer(engine, federation, unpenalised, {"params": model.params}).update["params"]
    for name, leaf in plain.items():
        assert torch.equal(leaf, same[name]) and torch.equal(leaf, other[name])
    assert not torch.equal(plain["0.weight"], less["0.weight"])


def test_scores_within_the_dead_zone_of_their_target_are_left_alone(setting):
    model, federation = setting
    stay = torch.linspace(0, 1, BINS, dtype=torch.float64).expand(2, 3, BINS)
    shared = {"params": model.params, "maps": stay, "alpha": torch.tensor(0.0, dtype=torch.float64)}
    half = 0.5 / (BINS - 1)
    still = answer(Sequential, federation, TransportAdam(model, 2, lr=0.03, dead_zone=half), shared)
    moved = answer(Sequential, federation, TransportAdam(model, 2, lr=0.03, dead_zone=0), shared)
    for name, leaf in model.params.items():
        assert torch.equal(still.update["params"][name][4], leaf)
        assert not torch.equal(moved.update["params"][name][4], leaf), "rounding alone would pull at every score"


def test_the_dead_zone_is_half_of_a_bin_unless_it_is_said(setting):
    model, federation = setting
    shared = {"params": model.params, "maps": maps(), "alpha": torch.tensor(0.3, dtype=torch.float64)}
    found = [
        answer(Sequential, federation, TransportAdam(model, 2, lr=0.03, dead_zone=zone), shared).update["params"]
        for zone in (None, 0.5 / (BINS - 1), 0.005)
    ]
    assert torch.equal(found[0]["0.weight"], found[1]["0.weight"])
    assert not torch.equal(found[0]["0.weight"], found[2]["0.weight"])


def test_an_example_of_an_unknown_group_keeps_its_score_as_target(setting):
    model, federation = setting
    groups = federation.columns["a"].clone()
    groups[federation.rows[federation.bounds[4][0]]] = -1
    data = replace(federation, columns=federation.columns | {"a": groups}).examples(4)
    scores = model.module(data["x"]).softmax(-1).detach()
    target = TransportAdam(model, 2, lr=0.03)._targets(
        maps(), scores, data | {"mask": torch.ones(33, dtype=torch.bool)}
    )
    assert torch.equal(target[0], scores[0]) and not torch.equal(target[1], scores[1])


@pytest.mark.parametrize(
    ("groups", "held"),
    [(torch.tensor([0, 1, 2]), "torch.int64 up to 2"), (torch.tensor([0.0, 1.0, 0.0]), "torch.float32 up to 1.0")],
)
def test_groups_that_are_too_many_or_no_integers_are_told_in_the_first_round(setting, groups, held):
    client = TransportAdam(setting[0], 2, lr=0.03)
    with pytest.raises(ValueError, match=f"column a must hold groups as integers below num_groups = 2, got {held}"):
        client.prepare({"a": groups}, torch.Generator())


def test_a_model_of_one_output_has_no_scores():
    with pytest.raises(ValueError, match="scores need the logits of two classes or more, the model has 1 output"):
        class_scores(torch.zeros(3, 1))


def test_the_authors_order_gives_a_group_the_right_targets_and_its_examples_the_wrong_ones():
    generator = np.random.default_rng(0)
    scores = np.concatenate([generator.beta(2, 5, 400), generator.beta(5, 2, 600)])
    group = np.repeat([0, 1], [400, 600])
    sent = torch.from_numpy(scores**2)[:, None]  # any increasing map
    data = {"a": torch.from_numpy(group), "mask": torch.ones(1000, dtype=torch.bool)}
    found = shuffled(sent, torch.from_numpy(scores)[:, None], data, 2)[:, 0].numpy()
    for a in (0, 1):
        own = scores[group == a]
        order = np.argsort(own, kind="stable")
        expected = np.sort(own**2)[order]  # as released; right would be expected[order] = sort
        assert (found[group == a] == expected).all()
        assert (np.sort(found[group == a]) == np.sort(own**2)).all()
        assert abs(np.corrcoef(own, expected)[0, 1]) < 0.15 < 0.9 < np.corrcoef(own, own**2)[0, 1]


# The penalty.


@pytest.mark.parametrize("engine", ENGINES)
def test_the_penalty_is_the_largest_difference_of_mean_scores(setting, engine):
    model, federation = setting
    client = PenalisedAdam(model, 2, lr=0.03, penalty=0.7, epochs=2, batch_size=8)
    data = federation.examples(4)

    def loss(outputs, batch):
        scores, both = outputs.softmax(-1), len(batch["a"].unique()) == 2
        apart = (scores[batch["a"] == 0].mean(0) - scores[batch["a"] == 1].mean(0)).abs().sum() if both else 0
        return cross_entropy(outputs, batch["y"]) + 0.7 * apart

    replies = answer(engine, federation, client, {"params": model.params})
    for name, leaf in by_torch(model, data, client, loss).items():
        torch.testing.assert_close(replies.update["params"][name][4], leaf, rtol=1e-9, atol=1e-9)


def test_groups_that_are_not_in_a_batch_are_not_apart():
    scores = torch.tensor([[0.1], [0.5], [0.9], [0.3]])
    member = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 1, 0], [0, 0, 0]], dtype=torch.bool)
    assert float(spread(scores, member)) == pytest.approx(0.7 - 0.1)
    assert float(spread(scores, member & torch.tensor([False, True, True]))) == 0
    assert float(spread(scores, torch.zeros_like(member))) == 0


# Promises.


@pytest.mark.parametrize(
    "make",
    [
        lambda model: CountScores(model=model, num_groups=2),
        lambda model: TransportAdam(model, 2, lr=0.03, batch_size=8),
        lambda model: PenalisedAdam(model, 2, lr=0.03, penalty=1.0, batch_size=8),
    ],
)
def test_clients_keep_their_promises(setting, make):
    model, federation = setting
    check_client(make(model), {"params": model.params}, federation)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"power": 0.5}, "power must be >= 1, got 0.5"),
        ({"dead_zone": -0.1}, "dead_zone must be >= 0, got -0.1"),
        ({"targets": "sorted"}, "targets must be one of 'rank', 'argsort', got 'sorted'"),
        ({"lr": 0.0}, "lr must be > 0, got 0.0"),
    ],
)
def test_settings_out_of_range_are_refused(setting, wrong, message):
    model, _ = setting
    with pytest.raises(ValueError, match=message):
        TransportAdam(model, 2, **{"lr": 0.1} | wrong)


def test_a_grid_of_one_point_is_refused(setting):
    with pytest.raises(ValueError, match="bins must be >= 2, got 1"):
        CountScores(model=setting[0], num_groups=2, bins=1)
