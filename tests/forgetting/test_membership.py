"""Attacks on who was trained on: right about a model that learned by heart, and at a loss about one that never saw."""

import math
from fractions import Fraction
from statistics import NormalDist

import pytest
import torch
from torch import nn

from fedsim.forgetting import (
    Shadows,
    auc,
    fresh,
    likelihood_ratio,
    log_odds,
    loss_threshold,
    predictions_apart,
    train_shadows,
)
from fedsim.forgetting.membership import AT_ONCE
from fedsim.model import Model

CLASSES = 10
RECIPE = {"lr": 0.2, "epochs": 60, "batch_size": 8}


def perceptron(dropout=0.0, width=32):
    parts = [nn.Linear(10, width), nn.ReLU(), *([nn.Dropout(dropout)] if dropout else []), nn.Linear(width, CLASSES)]
    return Model(nn.Sequential(*parts))


def noise(number, seed):
    """Examples of which nothing can be learned but by heart: their labels are random."""
    random = torch.Generator().manual_seed(seed)
    return {"x": torch.randn(number, 10, generator=random), "y": torch.randint(CLASSES, (number,), generator=random)}


def rows(batch, mask):
    return {name: column[mask] for name, column in batch.items()}


def spread(members, others):
    """The standard deviation of the area under the ROC where scores say nothing."""
    return math.sqrt((members + others + 1) / (12 * members * others))


@pytest.fixture(scope="module")
def attacked():
    """A pool, shadows, and two further models of the same kind, of which one saw each example."""
    pool, model = noise(100, 0), perceptron()
    found = train_shadows(model, pool, 18, 3, **RECIPE)
    return model, pool, Shadows(found.params[2:], found.included[2:]), found.params[:2], found.included[:2]


# The area under the ROC


@pytest.mark.parametrize(
    ("members", "others", "values"), [(7, 11, 4), (1, 1, 2), (30, 20, 1000), (5, 1, 1), (40, 40, 9)]
)
def test_the_area_is_the_share_of_pairs_in_the_right_order(members, others, values):
    random = torch.Generator().manual_seed(members)
    one, other = (torch.randint(values, (size,), generator=random).double() / 7 for size in (members, others))
    pairs = [Fraction((a > b) * 2 + (a == b), 2) for a in one.tolist() for b in other.tolist()]
    assert auc(one, other) == pytest.approx(float(sum(pairs) / len(pairs)), abs=1e-15)
    assert auc(one, other) + auc(other, one) == pytest.approx(1, abs=1e-15)


def test_the_area_depends_on_the_order_of_scores_alone():
    random = torch.Generator().manual_seed(0)
    one, other = torch.randn(50, generator=random) + 0.5, torch.randn(60, generator=random)
    assert auc(one.exp(), other.exp()) == auc(one, other)
    assert auc(one.sort().values, other.flip(0)) == auc(one, other)
    assert auc(torch.tensor([math.inf, 1.0]), torch.tensor([-math.inf, 1.0])) == (1 + 1 + 1 + 0.5) / 4
    assert auc(torch.full((3,), 2.0), torch.full((4,), 2.0)) == 0.5


@pytest.mark.parametrize(
    ("members", "others", "complaint"),
    [
        (torch.zeros(0), torch.zeros(2), r"members must be one score or more, \(n,\), got shape \(0,\)"),
        (torch.zeros(2), torch.zeros(2, 1), r"others must be .* got shape \(2, 1\)"),
        (torch.zeros(2), torch.tensor([0.0, math.nan]), "others: score 1 is not a number"),
    ],
)
def test_scores_that_are_none_are_refused(members, others, complaint):
    with pytest.raises(ValueError, match=complaint):
        auc(members, others)


# The attacks


def test_both_attacks_tell_who_was_trained_on_where_that_was_learned_by_heart(attacked):
    model, pool, shadows, targets, seen = attacked
    for params, members in zip(targets, seen, strict=True):
        # Nine in ten of the others are got wrong, and score lower than any member.
        assert loss_threshold(model, params, rows(pool, members), rows(pool, ~members)) > 0.9
        scores = likelihood_ratio(model, params, pool, shadows)
        assert auc(scores[members], scores[~members]) > 0.95


def test_both_attacks_are_at_a_loss_about_a_model_that_saw_none_of_it(attacked):
    model, pool, shadows, _, seen = attacked
    strangers = train_shadows(model, noise(100, 99), 6, 3, **RECIPE).params
    areas = [loss_threshold(model, params, rows(pool, seen[0]), rows(pool, seen[1])) for params in strangers]
    scores = [likelihood_ratio(model, params, pool, shadows) for params in strangers]
    areas += [auc(score[seen[0]], score[seen[1]]) for score in scores]
    assert all(abs(area - 0.5) < 3.5 * spread(50, 50) for area in areas), areas
    assert torch.stack(scores).mean() < 0, "they have been trained on nothing of the pool, says the ratio too"


def test_what_all_shadows_saw_beside_tells_nothing_of_the_pool(attacked):
    """After retraining without the members, the rest of the training data gives no clue of them."""
    model, pool, _, _, seen = attacked
    beside = noise(40, 5)
    shadows = train_shadows(model, pool, 8, 0, beside=beside, **RECIPE)
    retrained = train_shadows(model, beside, 2, 1, **RECIPE).params[0]
    scores = likelihood_ratio(model, retrained, pool, shadows)
    assert abs(auc(scores[seen[0]], scores[seen[1]]) - 0.5) < 3.5 * spread(50, 50)
    for params in shadows.params:
        right = model.predict(params, beside).argmax(1) == beside["y"]
        assert float(right.float().mean()) > 0.95, "all of them know it by heart"


def test_the_ratio_is_that_of_two_normal_laws(attacked):
    model, pool, shadows, (params, _), _ = attacked
    found = likelihood_ratio(model, params, pool, shadows)

    def phi(of):
        chance = model.predict({name: leaf.double() for name, leaf in of.items()}, {"x": pool["x"].double()}).softmax(1)
        own = chance[torch.arange(100), pool["y"]]
        return (own / (1 - own)).log().tolist()

    told = [phi(shadow) for shadow in shadows.params]
    sides = {}
    for side in (True, False):
        each = [
            [told[s][n] for s in range(len(told)) if bool(shadows.included[s, n]) is side] for n in range(len(found))
        ]
        means = [math.fsum(values) / len(values) for values in each]
        squares = [(value - mean) ** 2 for values, mean in zip(each, means, strict=True) for value in values]
        freedom = sum(len(values) - 1 for values in each)
        sides[side] = [NormalDist(mean, math.sqrt(math.fsum(squares) / freedom)) for mean in means]
    for n, value in enumerate(phi(params)):
        seen, unseen = (sides[side][n] for side in (True, False))
        # the logarithm of each density, of which the density itself may be too small a number
        logs = [-(((value - law.mean) / law.stdev) ** 2) / 2 - math.log(law.stdev) for law in (seen, unseen)]
        assert float(found[n]) == pytest.approx(logs[0] - logs[1], rel=1e-3, abs=1e-3)


# Log odds


def test_log_odds_are_those_of_the_label_and_finite_where_its_chance_rounds_to_one():
    outputs = torch.randn(20, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(20) % 4
    chance = outputs.softmax(1)[torch.arange(20), labels]
    torch.testing.assert_close(log_odds(outputs, labels), (chance / (1 - chance)).log())
    sure = torch.tensor([[1000.0, 0.0, 0.0], [0.0, 1000.0, 0.0]])
    expected = torch.tensor([1000 - math.log(2), -1000], dtype=torch.float64)  # 1000 = log(e^1000 + 1), to the last bit
    torch.testing.assert_close(log_odds(sure, torch.tensor([0, 0])), expected, rtol=1e-12, atol=0)
    two = torch.tensor([[3.0, -1.0]])
    assert log_odds(two, torch.tensor([1])).tolist() == [-4.0], "of two classes it is the difference of their logits"
    with pytest.raises(ValueError, match=r"K >= 2 classes, got shape \(3, 1\)"):
        log_odds(torch.zeros(3, 1), torch.zeros(3, dtype=torch.long))


# Shadows


@pytest.mark.parametrize("size", [2, 9, 50])
def test_half_of_the_shadows_see_an_example_and_each_sees_half_of_the_examples(size):
    included = train_shadows(perceptron(), noise(size, 0), 6, 1, lr=0.1, epochs=1, batch_size=8).included
    assert included.shape == (6, size) and included.dtype == torch.bool
    assert included.sum(0).tolist() == [3] * size
    assert all(int(number) in (size // 2, size - size // 2) for number in included.sum(1))
    if size > 9:
        assert len({tuple(row) for row in included.tolist()}) == 6, "no half is drawn twice"


def test_a_shadow_learns_its_own_half_and_not_the_other(attacked):
    model, pool, shadows, _, _ = attacked
    for params, seen in zip(shadows.params, shadows.included, strict=True):
        right = (model.predict(params, pool).argmax(1) == pool["y"]).float()
        assert float(right[seen].mean()) > 0.95
        assert float(right[~seen].mean()) < 0.1 + 4 * math.sqrt(0.1 * 0.9 / 50), "by chance"


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_shadows_are_a_function_of_the_seed_and_leave_the_global_generator_alone(dropout):
    model, pool = perceptron(dropout), noise(20, 0)

    def train(seed, clutter):
        torch.manual_seed(clutter)
        before = torch.get_rng_state()
        found = train_shadows(model, pool, 4, seed, lr=0.1, epochs=2, batch_size=8)
        assert torch.equal(torch.get_rng_state(), before)
        return torch.stack([params["0.weight"] for params in found.params]), found.included

    one, same, other = train(1, 1), train(1, 2), train(2, 1)
    assert torch.equal(one[0], same[0]) and torch.equal(one[1], same[1])
    assert not torch.equal(one[0], other[0]) and not torch.equal(one[1], other[1])
    assert len({tuple(weight.flatten().tolist()) for weight in one[0]}) == 4


def test_a_shadow_of_one_step_descends_from_fresh_parameters():
    """A linear model that takes one whole batch: its step is the gradient of softmax regression, in closed form."""
    model = Model(nn.Linear(10, CLASSES).double())
    pool = {"x": noise(12, 0)["x"].double(), "y": noise(12, 0)["y"]}
    (one, _), included = train_shadows(model, pool, 2, 4, lr=0.5, epochs=1, batch_size=100)
    (still, _), _ = train_shadows(model, pool, 2, 4, lr=1e-300, epochs=1, batch_size=100)  # where it starts
    assert not torch.equal(still["weight"], model.params["weight"]), "anew, not where the model is"
    x, y = pool["x"][included[0]], pool["y"][included[0]]
    error = (x @ still["weight"].T + still["bias"]).softmax(1) - nn.functional.one_hot(y, CLASSES)
    torch.testing.assert_close(one["weight"], still["weight"] - 0.5 * error.T @ x / 6)
    torch.testing.assert_close(one["bias"], still["bias"] - 0.5 * error.mean(0))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"number": 3}, "number must be even, .* got 3"),
        ({"number": 0}, "number must be >= 1, got 0"),
        ({"lr": 0.0}, "lr must be > 0, got 0.0"),
        ({"pool": noise(1, 0)}, "pool must have two examples or more, .* got 1"),
        ({"pool": {"x": torch.zeros(4, 10)}}, "pool has no column y"),
        ({"beside": {"z": torch.zeros(4)}}, "beside has no column x and no column y"),
        ({"lr": 1e30}, r"shadow 0 has parameters that are not finite: lower lr = 1e\+30"),
    ],
)
def test_shadows_that_cannot_be_trained_are_refused(changes, complaint):
    usual = {"pool": noise(20, 0), "number": 2, "seed": 0, "lr": 0.1, "epochs": 3, "batch_size": 4}
    with pytest.raises(ValueError, match=complaint):
        train_shadows(perceptron(), **(usual | changes))


def test_shadows_of_another_pool_and_too_few_of_them_are_refused(attacked):
    model, pool, shadows, (params, _), _ = attacked
    with pytest.raises(ValueError, match=r"must have shape \(16, 70\), .* got \(16, 100\)"):
        likelihood_ratio(model, params, noise(70, 0), shadows)
    with pytest.raises(ValueError, match="two shadows or more must have seen each example, and as many not, got 1"):
        likelihood_ratio(model, params, pool, Shadows(shadows.params[:2], shadows.included[:2]))


# Predictions


def test_predictions_are_apart_by_the_divergence_and_the_distance_of_their_laws():
    model = perceptron()
    one, other = fresh(model, 1), fresh(model, 2)
    inputs = noise(30, 0)["x"]
    found = predictions_apart(model, one, other, inputs)
    p, q = ([row for row in model.predict(of, {"x": inputs}).softmax(1).tolist()] for of in (one, other))
    divergence = [sum(a * math.log(a / b) for a, b in zip(*pair, strict=True)) for pair in zip(p, q, strict=True)]
    distance = [math.dist(*pair) for pair in zip(p, q, strict=True)]
    assert found.divergence == pytest.approx(sum(divergence) / 30, rel=1e-5)
    assert found.distance == pytest.approx(sum(distance) / 30, rel=1e-5)
    assert predictions_apart(model, one, one, inputs) == (0.0, 0.0)
    assert predictions_apart(model, other, one, inputs).distance == pytest.approx(found.distance)
    with pytest.raises(ValueError, match="inputs must be one or more, got none"):
        predictions_apart(model, one, other, inputs[:0])


def test_predictions_that_are_sure_are_finitely_apart():
    model = Model(nn.Linear(1, 2, bias=False))
    one, other = ({"weight": torch.tensor([[size], [0.0]])} for size in (1000.0, -1000.0))
    found = predictions_apart(model, one, other, torch.ones(1, 1))
    assert found.divergence == pytest.approx(1000) and found.distance == pytest.approx(math.sqrt(2))


def test_many_examples_are_shown_a_part_at_a_time():
    class Narrow(nn.Linear):
        def forward(self, x):
            assert len(x) <= AT_ONCE, "too many at once"
            return super().forward(x)

    model, batch = Model(Narrow(10, CLASSES)), noise(2 * AT_ONCE + 5, 0)
    plain = Model(nn.Linear(10, CLASSES))
    half = {name: column[:1000] for name, column in batch.items()}
    params = fresh(model, 1)
    losses = plain.criterion(plain.predict(params, batch), batch["y"])
    assert loss_threshold(model, params, batch, half) == pytest.approx(auc(-losses, -losses[:1000]), abs=1e-4)
    assert predictions_apart(model, params, params, batch["x"]) == (0.0, 0.0)
