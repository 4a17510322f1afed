"""Clients count, the server divides: what comes out is what counting all their examples at once would give."""

import re

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix
from torch import nn

from fedsim.data.federation import Federation
from fedsim.engines.local import Sequential, Vectorised
from fedsim.evaluation import NOTIONS, Classifier, Evaluate, Evaluation, disparities, evaluate, spread
from fedsim.model import Model, squared_error
from fedsim.task import Cohort

K, G = 4, 3
SIZES = (30, 0, 1, 400, 7)
ENGINES = {
    "alone": Sequential,
    "all at once": Vectorised,
    "two at once": lambda *arguments: Vectorised(*arguments, block=2),
}


def columns(dtype=torch.float32):
    torch.manual_seed(0)
    examples = sum(SIZES) + 2 * len(SIZES)
    return {
        "x": torch.randn(examples, 3).to(dtype),
        "y": torch.randint(K, (examples,)),
        "a": torch.randint(G, (examples,), generator=torch.Generator().manual_seed(5)),
        "rating": torch.randn(examples).to(dtype),
    }


def federation(split="test", dtype=torch.float32):
    """Clients that own SIZES examples of one split, and one of each other."""
    number = ("train", "validation", "test").index(split)
    sizes = np.ones((len(SIZES), 3), dtype=np.int64)
    sizes[:, number] = SIZES
    ends = np.cumsum(sizes.ravel()).reshape(-1, 3)
    bounds = np.column_stack([ends[:, 0] - sizes[:, 0], ends])
    rows = torch.randperm(int(ends[-1, -1]), generator=torch.Generator().manual_seed(1)).numpy()
    return Federation(columns(dtype), rows, bounds)


def linear(dtype=torch.float32):
    torch.manual_seed(3)
    return Model(nn.Sequential(nn.Linear(3, K), nn.Dropout(0.9)).to(dtype))


def pooled(data, split="test"):
    parts = [data.examples(client, split) for client in range(data.num_clients)]
    return {name: torch.cat([part[name] for part in parts]) for name in data.columns}


def found(model, data, engine="alone", ids=None, shared=None, personal=None, **arguments):
    client = Evaluate(model=model, **{"num_classes": K} | arguments)
    ids = list(range(data.num_clients)) if ids is None else ids
    return evaluate(
        ENGINES[engine](data, {"evaluate": client}),
        {"params": model.params} | (shared or {}),
        Cohort(ids, personal or {}),
        1,
        client.reduce,
    )


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("batch_size", [1000, 256, 13])
def test_the_confusion_is_that_of_the_pooled_examples(engine, batch_size):
    model, data = linear(), federation()
    evaluation, everything = found(model, data, engine, batch_size=batch_size), pooled(data)
    predicted = model.predict(model.params, everything).argmax(1)
    expected = confusion_matrix(everything["y"], predicted, labels=range(K))
    assert evaluation.confusion.tolist() == expected.tolist()
    assert evaluation.confusion.dtype == torch.int64


@pytest.mark.parametrize("engine", ENGINES)
def test_accuracy_and_loss_are_those_of_the_pooled_examples(engine):
    model, data = linear(), federation()
    evaluation, everything = found(model, data, engine), pooled(data)
    outputs = model.predict(model.params, everything)
    assert evaluation.pooled == {
        "examples": sum(SIZES),
        "accuracy": float((outputs.argmax(1) == everything["y"]).double().mean()),
        "loss": pytest.approx(float(nn.functional.cross_entropy(outputs, everything["y"])), rel=1e-6),
    }


@pytest.mark.parametrize("engine", ENGINES)
def test_each_clients_measures_are_those_of_its_own_examples(engine):
    model, data = linear(), federation()
    clients = found(model, data, engine).clients
    assert clients["client"].tolist() == list(range(len(SIZES)))
    assert clients["examples"].tolist() == list(SIZES)
    for client, size in enumerate(SIZES):
        if not size:
            assert np.isnan(clients["accuracy"][client]) and np.isnan(clients["loss"][client])
            continue
        own = data.examples(client, "test")
        outputs = model.predict(model.params, own)
        assert clients["accuracy"][client] == (outputs.argmax(1) == own["y"]).double().mean()
        loss = float(nn.functional.cross_entropy(outputs, own["y"]))
        assert clients["loss"][client] == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_any_part_of_the_examples_can_be_evaluated(split):
    model, data = linear(), federation(split)
    evaluation = found(model, data, part=split)
    everything = pooled(data, split)
    correct = (model.predict(model.params, everything).argmax(1) == everything["y"]).sum()
    assert evaluation.pooled["examples"] == sum(SIZES)
    assert evaluation.pooled["accuracy"] == float(correct) / sum(SIZES)


def test_a_part_of_another_name_fails_with_those_that_there_are():
    with pytest.raises(ValueError, match="part must be one of 'train', 'validation', 'test', got 'tests'"):
        Evaluate(model=linear(), part="tests")


def test_the_cohort_alone_is_evaluated():
    model, data = linear(), federation()
    evaluation = found(model, data, ids=[4, 0])
    assert evaluation.clients["client"].tolist() == [4, 0]
    assert evaluation.clients["examples"].tolist() == [SIZES[4], SIZES[0]]
    assert evaluation.confusion.sum() == evaluation.pooled["examples"] == SIZES[4] + SIZES[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_counts_are_exact_in_low_precision_too(dtype):
    model, data = linear(dtype), federation(dtype=dtype)
    model.params["0.weight"].zero_()
    model.params["0.bias"].copy_(torch.tensor([0.0, 0.0, 1.0, 0.0]))
    data.columns["y"].fill_(2)
    evaluation = found(model, data, batch_size=1000)
    assert evaluation.confusion[2, 2] == evaluation.confusion.sum() == sum(SIZES)
    assert evaluation.clients["accuracy"][[0, 2, 3, 4]].tolist() == [1.0] * 4


def test_a_label_or_a_prediction_beyond_the_classes_is_wrong_not_lost():
    model, data = linear(), federation()
    evaluation = found(model, data, num_classes=2)
    everything = pooled(data)
    predicted = model.predict(model.params, everything).argmax(1)
    inside = (everything["y"] < 2) & (predicted < 2)
    assert evaluation.confusion.sum() == inside.sum() < evaluation.pooled["examples"]
    correct = (inside & (everything["y"] == predicted)).sum()
    assert evaluation.pooled["accuracy"] == float(correct) / sum(SIZES)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_regression_has_a_loss_and_no_classes(engine):
    torch.manual_seed(2)
    model, data = Model(nn.Linear(3, 1), squared_error, target="rating"), federation()
    evaluation, everything = found(model, data, engine, num_classes=None), pooled(data)
    difference = model.predict(model.params, everything)[:, 0] - everything["rating"]
    assert evaluation.confusion is None
    assert evaluation.pooled.keys() == {"examples", "loss"}
    assert evaluation.pooled["loss"] == pytest.approx(float((difference**2).mean() / 2), rel=1e-6)
    assert evaluation.clients.keys() == {"client", "examples", "loss"}
    assert spread(evaluation) == {}


@pytest.mark.parametrize("engine", ENGINES)
def test_clients_without_examples_are_no_error(engine):
    evaluation = found(linear(), federation(), engine, ids=[1])
    assert evaluation.pooled == {"examples": 0.0}
    assert np.isnan(evaluation.clients["accuracy"]).all() and not evaluation.confusion.any()
    assert spread(evaluation) == {} and evaluation.failed == {}


@pytest.mark.parametrize("engine", ENGINES)
def test_nobody_is_no_error_either(engine):
    evaluation = found(linear(), federation(), engine, ids=[])
    assert evaluation.pooled == {"examples": 0.0} and evaluation.confusion is None
    assert spread(evaluation) == {}


def test_a_client_that_fails_is_named_and_the_others_count():
    model, data = linear(), federation()
    data.columns["y"][torch.from_numpy(data.rows[data.bounds[4, 2] : data.bounds[4, 3]])] = K  # no output for it
    evaluation = found(model, data)
    assert list(evaluation.failed) == [4] and "out of bounds" in evaluation.failed[4]
    assert evaluation.pooled["examples"] == sum(SIZES) - SIZES[4]


def test_evaluating_changes_nothing_and_draws_nothing():
    model, data = linear(), federation()
    before, state = {name: leaf.clone() for name, leaf in model.params.items()}, torch.get_rng_state()
    first, again = found(model, data), found(model, data)
    assert first.pooled == again.pooled
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(leaf, before[name]) for name, leaf in model.params.items())


def test_the_spread_is_over_clients_with_examples_each_as_important_as_the_others():
    accuracy = np.array([0.5, np.nan, 1.0, 0.8, 0.6])
    clients = {"client": np.arange(5.0), "examples": np.array(SIZES, dtype=float), "accuracy": accuracy}
    clients["loss"] = np.ones(5)
    evaluation = Evaluation({"examples": 438.0, "accuracy": 0.7, "loss": 1.0}, clients, None, {})
    values = sorted([0.5, 1.0, 0.8, 0.6])
    place = 0.1 * (len(values) - 1)  # between the least value and the next
    average = sum(values) / len(values)
    assert spread(evaluation) == {
        "accuracy/min": 0.5,
        "accuracy/p10": pytest.approx(values[0] + place * (values[1] - values[0])),
        "accuracy/std": pytest.approx((sum((v - average) ** 2 for v in values) / len(values)) ** 0.5),
    }


def test_a_single_client_has_no_spread():
    evaluation = found(linear(), federation(), ids=[0])
    measures = spread(evaluation)
    assert measures["accuracy/std"] == 0
    assert measures["accuracy/min"] == measures["accuracy/p10"] == evaluation.pooled["accuracy"]


def by_hand(truth, group, predicted):
    """The largest gap and the largest deviation for each notion, counted example by example."""
    apart = {}
    for notion in NOTIONS:
        gaps, deviations = [0.0], [0.0]
        for label in range(K):
            for guess in range(K):
                if notion == "equal opportunity" and label != guess:
                    continue
                inside = np.ones(len(truth), dtype=bool) if notion == "demographic parity" else truth == label
                there = [inside & (group == number) for number in range(G)]
                rates = np.array([(predicted[some] == guess).mean() for some in there if some.any()])
                if len(rates):
                    gaps.append(rates.max() - rates.min())
                    deviations.append(np.abs(rates - (predicted[inside] == guess).mean()).max())
        name = notion.replace(" ", "_")
        apart |= {f"{name}_gap": max(gaps), f"{name}_deviation": max(deviations)}
    return apart


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("batch_size", [256, 13])
def test_confusions_are_counted_for_each_client_and_group(engine, batch_size):
    model, data = linear(), federation()
    evaluation = found(model, data, engine, num_groups=G, batch_size=batch_size)
    for client in range(len(SIZES)):
        own = data.examples(client, "test")
        predicted = model.predict(model.params, own).argmax(1)
        for group in range(G):
            some = own["a"] == group
            expected = np.zeros((K, K), dtype=int)
            np.add.at(expected, (own["y"][some].numpy(), predicted[some].numpy()), 1)
            assert evaluation.groups[client, group].tolist() == expected.tolist()
    assert evaluation.groups.shape == (len(SIZES), G, K, K) and evaluation.groups.dtype == torch.int64


@pytest.mark.parametrize("engine", ENGINES)
def test_groups_change_nothing_in_what_is_counted_without_them(engine):
    model, data = linear(), federation()
    plain, grouped = (found(model, data, engine, num_groups=groups) for groups in (None, G))
    assert plain.groups is None and plain.confusion.tolist() == grouped.confusion.tolist()
    assert plain.pooled == {name: grouped.pooled[name] for name in plain.pooled}
    for name, column in plain.clients.items():
        np.testing.assert_array_equal(grouped.clients[name], column)
    assert spread(plain).items() <= spread(grouped).items()


def test_how_far_groups_are_apart_is_that_of_the_pooled_examples_and_of_each_clients_own():
    model, data = linear(), federation()
    data.columns["x"][:, 0] += data.columns["a"]  # so that they are
    evaluation, everything = found(model, data, num_groups=G), pooled(data)
    parts = [everything, *(data.examples(client, "test") for client in range(len(SIZES)))]
    numbers = [
        by_hand(part["y"].numpy(), part["a"].numpy(), model.predict(model.params, part).argmax(1).numpy())
        for part in parts
    ]
    assert all(value > 0.05 for value in numbers[0].values())
    assert {name: evaluation.pooled[name] for name in numbers[0]} == pytest.approx(numbers[0])
    for name in numbers[0]:
        expected = [one[name] if size else np.nan for one, size in zip(numbers[1:], SIZES, strict=True)]
        assert evaluation.clients[name] == pytest.approx(expected, nan_ok=True)
    measures = spread(evaluation)
    assert {name for name in measures if name.startswith("local_")} == {f"local_{name}" for name in numbers[0]}
    for name in numbers[0]:
        worst = max(one[name] for one, size in zip(numbers[1:], SIZES, strict=True) if size)
        assert measures[f"local_{name}"] == pytest.approx(worst)
        assert not {f"{name}/min", f"{name}/p10", f"{name}/std"} & measures.keys()


def test_groups_whose_examples_are_the_same_are_not_apart_whatever_their_sizes():
    model, data = linear(), federation()
    own = data.rows[data.bounds[3, 2] : data.bounds[3, 3]]
    for start, size, group in ((0, 100, 0), (100, 100, 1), (200, 100, 2), (300, 100, 2)):
        for name in ("x", "y"):
            data.columns[name][own[start : start + size]] = data.columns[name][own[:100]]
        data.columns["a"][own[start : start + size]] = group
    evaluation = found(model, data, num_groups=G, ids=[3])
    apart = disparities(evaluation.groups.sum(0))
    assert float(max(apart.values())) < 1e-12
    data.columns["x"][own[:100]] += 5  # one of them is no longer the same
    assert float(min(disparities(found(model, data, num_groups=G, ids=[3]).groups.sum(0)).values())) > 0.1


def test_the_deviation_of_two_groups_is_less_than_their_gap_by_the_smaller_ones_share():
    groups = torch.tensor([[[80, 20], [0, 0]], [[6, 14], [0, 0]]])  # 100 and 20 of label 0
    apart = disparities(groups)
    gap = 0.7 - 0.2
    assert float(apart["demographic_parity_gap"]) == pytest.approx(gap)
    assert float(apart["demographic_parity_deviation"]) == pytest.approx(gap * (1 - 20 / 120))
    assert float(apart["equal_opportunity_gap"]) == pytest.approx(gap)  # of label 1 there is nobody


def test_a_group_that_is_alone_is_not_apart_from_anybody():
    model, data = linear(), federation()
    data.columns["a"].fill_(1)
    evaluation = found(model, data, num_groups=G)
    assert {evaluation.pooled[name] for name in disparities(evaluation.groups)} == {0.0}
    single = found(model, data, num_groups=1)
    assert not single.confusion.any()  # there is no group 1
    data.columns["a"].zero_()
    assert found(model, data, num_groups=1).confusion.tolist() == evaluation.confusion.tolist()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("outside", [-1, G, 1000])
def test_an_example_of_a_group_that_there_is_not_counts_for_none(engine, outside):
    model, data = linear(), federation()
    data.columns["a"][data.columns["a"] == 1] = outside
    evaluation, everything = found(model, data, engine, num_groups=G), pooled(data)
    assert evaluation.groups.sum((0, 2, 3)).tolist() == [int((everything["a"] == group).sum()) for group in range(G)]
    assert not evaluation.groups[:, 1].any() and evaluation.pooled["examples"] == sum(SIZES)
    inside = everything["a"] != outside
    predicted = model.predict(model.params, everything).argmax(1)
    numbers = by_hand(*(column[inside].numpy() for column in (everything["y"], everything["a"], predicted)))
    assert {name: evaluation.pooled[name] for name in numbers} == pytest.approx(numbers)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_label_beyond_the_classes_is_none_of_another_groups(engine):
    model, data = linear(), federation()
    evaluation, everything = found(model, data, engine, num_classes=2, num_groups=G), pooled(data)
    predicted = model.predict(model.params, everything).argmax(1)
    inside = (everything["y"] < 2) & (predicted < 2)
    counted = [int((inside & (everything["a"] == group)).sum()) for group in range(G)]
    assert evaluation.groups.sum((0, 2, 3)).tolist() == counted and sum(counted) < sum(SIZES)
    assert evaluation.pooled["accuracy"] == found(model, data, engine, num_classes=2).pooled["accuracy"]


@pytest.mark.parametrize("ids", [[1], []])
def test_where_nobody_has_examples_groups_are_not_compared(ids):
    evaluation = found(linear(), federation(), ids=ids, num_groups=G)
    assert evaluation.pooled == {"examples": 0.0} and spread(evaluation) == {}
    for name in disparities(torch.zeros(G, K, K)):
        assert np.isnan(evaluation.clients.get(name, np.array([]))).all()


class Largest(Classifier):
    """What the model itself would predict."""

    def __init__(self, model):
        self.model = model

    def __call__(self, shared, personal, batch):
        return nn.functional.one_hot(self.model.predict(shared["params"], batch).argmax(1), K)


class Tossed(Largest):
    """That, or else one of the others at random, as what is shared and what is kept say."""

    def __call__(self, shared, personal, batch):
        sure = shared["sure"] * personal["trust"]
        return sure * super().__call__(shared, personal, batch) + (1 - sure) / K


@pytest.mark.parametrize("groups", [None, G])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_classifier_that_takes_the_largest_output_is_none_at_all(engine, groups):
    model, data = linear(), federation()
    plain, other = (found(model, data, engine, num_groups=groups, classifier=c) for c in (None, Largest(model)))
    assert other.confusion.tolist() == plain.confusion.tolist() and other.pooled == plain.pooled
    for name, column in plain.clients.items():
        np.testing.assert_array_equal(other.clients[name], column)
    assert other.confusion.dtype == torch.float64


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_randomised_classifier_counts_by_its_probabilities_out_of_what_is_shared_and_kept(engine, dtype):
    model, data = linear(dtype), federation(dtype=dtype)
    trust = torch.tensor([1.0, 0.5, 0.5, 0.5, 0.0])
    given = {"shared": {"sure": torch.tensor(0.5)}, "personal": {"trust": trust}}
    evaluation = found(model, data, engine, num_groups=G, classifier=Tossed(model), batch_size=64, **given)
    plain = found(model, data, engine, num_groups=G)
    for client, sure in enumerate(0.5 * trust):
        counts = plain.groups[client].double()
        expected = sure * counts + (1 - sure) / K * counts.sum(-1, keepdim=True)
        torch.testing.assert_close(evaluation.groups[client], expected)
    right = evaluation.confusion.diagonal().sum()
    assert evaluation.pooled["accuracy"] == pytest.approx(float(right) / sum(SIZES))
    assert evaluation.pooled["loss"] == plain.pooled["loss"]  # that of the model
    assert evaluation.clients["demographic_parity_gap"][4] == pytest.approx(0)  # all by chance
    assert plain.clients["demographic_parity_gap"][4] > 0.1


def test_a_classifier_predicts_the_label_whatever_the_model_does():
    torch.manual_seed(2)
    model, data = Model(nn.Linear(3, 1), squared_error, target="rating"), federation()

    class Sign(Classifier):
        def __call__(self, shared, personal, batch):
            positive = model.predict(shared["params"], batch)[:, 0] > 0
            return nn.functional.one_hot(positive.long(), K).float()

    evaluation, everything = found(model, data, classifier=Sign()), pooled(data)
    predicted = (model.predict(model.params, everything)[:, 0] > 0).long()
    assert evaluation.pooled["accuracy"] == float((predicted == everything["y"]).double().mean())
    assert evaluation.confusion.tolist() == confusion_matrix(everything["y"], predicted, labels=range(K)).tolist()


def test_a_classifier_that_gives_something_else_than_probabilities_costs_the_clients_and_says_so():
    model, data = linear(), federation()

    class Odd(Classifier):
        def __call__(self, shared, personal, batch):
            return torch.full((len(batch["y"]), K), torch.nan)

    class Short(Classifier):
        def __call__(self, shared, personal, batch):
            return torch.full((len(batch["y"]), K - 1), 0.5)

    for classifier, told in ((Odd(), "its update holds NaN or infinity"), (Short(), "shape .* is invalid")):
        evaluation = found(model, data, classifier=classifier, ids=[0, 4])
        assert sorted(evaluation.failed) == [0, 4] and evaluation.confusion is None
        assert all(re.search(told, reason) for reason in evaluation.failed.values())


def test_what_is_no_classifier_is_refused_and_one_that_has_no_labels_to_tell_apart():
    model = linear()
    with pytest.raises(ValueError, match="classifier must be a Classifier, got a Model"):
        Evaluate(model=model, num_classes=K, classifier=model)
    with pytest.raises(ValueError, match="classifier needs num_classes"):
        Evaluate(model=model, classifier=Largest(model))


def test_without_a_method_to_predict_by_a_classifier_cannot_be_made():
    with pytest.raises(TypeError, match="abstract"):
        Classifier()


def test_a_client_that_fails_costs_its_groups_and_no_others():
    model, data = linear(), federation()
    data.columns["y"][torch.from_numpy(data.rows[data.bounds[4, 2] : data.bounds[4, 3]])] = K  # no output for it
    evaluation = found(model, data, num_groups=G)
    assert list(evaluation.failed) == [4] and len(evaluation.groups) == len(SIZES) - 1
    assert len(evaluation.clients["demographic_parity_gap"]) == len(SIZES) - 1
    assert evaluation.groups.sum() == sum(SIZES) - SIZES[4]


@pytest.mark.parametrize("groups", [0, -1])
def test_fewer_than_one_group_is_refused(groups):
    with pytest.raises(ValueError, match=f"num_groups must be >= 1, got {groups}"):
        Evaluate(model=linear(), num_groups=groups)


def counted(model, part, groups, bins):
    """The histograms of scores, (G, S, bins), counted example by example."""
    chances = model.predict(model.params, part).double().softmax(1).numpy()
    chances = chances[:, 1:] if chances.shape[1] == 2 else chances
    owners = part["a"].tolist() if groups else [0] * len(chances)
    expected = np.zeros((groups or 1, chances.shape[1], bins), dtype=int)
    for own, group in zip(chances, owners, strict=True):
        for column, chance in enumerate(own):
            expected[group, column, np.abs(np.linspace(0, 1, bins) - chance).argmin()] += 1
    return expected


def telling(classes):
    """A model of these classes whose scores are all over [0, 1]."""
    torch.manual_seed(7)
    module = nn.Linear(3, classes)
    nn.init.normal_(module.weight, std=2)
    return Model(module)


@pytest.mark.parametrize("groups", [None, 1, G])
@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("batch_size", [256, 13])
def test_scores_are_counted_by_group_over_all_clients(engine, batch_size, classes, groups):
    model, data = telling(classes), federation()
    data.columns["y"] %= classes
    if groups == 1:
        data.columns["a"].zero_()
    if groups is None:
        del data.columns["a"]
    everything = pooled(data)
    plain = found(model, data, engine, num_classes=classes, num_groups=groups, batch_size=batch_size)
    evaluation = found(
        model, data, engine, num_classes=classes, num_groups=groups, score_bins=11, batch_size=batch_size
    )
    assert evaluation.scores.tolist() == counted(model, everything, groups, 11).tolist()
    assert evaluation.scores.sum() == sum(SIZES) * (1 if classes == 2 else classes)
    assert plain.scores is None and "score_distance" not in plain.pooled
    # Nothing else changes, and where groups are not told apart they have no distance.
    assert evaluation.pooled.keys() - plain.pooled.keys() == ({"score_distance"} if groups else set())
    assert plain.pooled.items() <= evaluation.pooled.items()
    assert evaluation.confusion.tolist() == plain.confusion.tolist()
    assert spread(evaluation) == spread(plain)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_score_distance_is_that_of_the_two_groups_that_are_farthest_apart(engine):
    model, data = telling(2), federation()
    data.columns["y"] %= 2
    data.columns["x"][:, 0] += data.columns["a"]  # so that they are
    evaluation = found(model, data, engine, num_classes=2, num_groups=G, score_bins=101)
    reached = counted(model, pooled(data), G, 101)[:, 0].cumsum(1) / evaluation.scores.sum((1, 2)).numpy()[:, None]
    distances = [np.abs(reached[one] - reached[other]).sum() / 100 for one, other in ((0, 1), (0, 2), (1, 2))]
    assert evaluation.pooled["score_distance"] == pytest.approx(max(distances)) and max(distances) > 0.1
    data.columns["a"].fill_(1)
    alone = found(model, data, engine, num_classes=2, num_groups=G, score_bins=101)
    assert alone.pooled["score_distance"] == 0


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_examples_whose_scores_are_not_numbers_are_left_out_of_the_scores_alone(engine, wrong):
    model, data = telling(3), federation()
    data.columns["y"] %= 3
    data.columns["x"][::7] = wrong
    evaluation = found(model, data, engine, num_classes=3, num_groups=G, score_bins=11)
    everything = pooled(data)
    sound = everything["x"].isfinite().all(1)
    assert 0 < sound.sum() < sum(SIZES)
    expected = counted(model, {name: column[sound] for name, column in everything.items()}, G, 11)
    assert evaluation.scores.tolist() == expected.tolist()
    assert evaluation.failed == {} and evaluation.groups.sum() == evaluation.pooled["examples"] == sum(SIZES)
    assert np.isfinite(evaluation.pooled["score_distance"]) and np.isnan(evaluation.pooled["loss"])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("outside", [-1, G, 1000])
def test_scores_of_a_group_that_there_is_not_count_for_none(engine, outside):
    model, data = telling(3), federation()
    data.columns["y"] %= 3
    data.columns["a"][data.columns["a"] == 1] = outside
    evaluation, everything = found(model, data, engine, num_classes=3, num_groups=G, score_bins=11), pooled(data)
    inside = everything["a"] != outside
    expected = counted(model, {name: column[inside] for name, column in everything.items()}, G, 11)
    assert evaluation.failed == {} and evaluation.scores.tolist() == expected.tolist()
    assert not evaluation.scores[1].any()


@pytest.mark.parametrize("groups", [None, G])
def test_of_nobody_no_scores_are_counted_and_there_is_no_distance(groups):
    nobody = found(linear(), federation(), ids=[1], num_groups=groups, score_bins=11)
    assert nobody.pooled == {"examples": 0.0} and spread(nobody) == {}
    assert nobody.scores.shape == (groups or 1, K, 11) and not nobody.scores.any()
    nobody = found(linear(), federation(), ids=[], num_groups=groups, score_bins=11)
    assert nobody.pooled == {"examples": 0.0} and nobody.scores is None


def test_scores_are_those_of_a_model_that_decides_itself_among_classes():
    model = linear()
    for arguments in ({}, {"num_classes": K, "classifier": Largest(model)}):
        with pytest.raises(ValueError, match="score_bins needs num_classes, and a model that decides itself"):
            Evaluate(model=model, score_bins=11, **arguments)
    for bins in (1, 0, -1):
        with pytest.raises(ValueError, match=f"score_bins must be >= 2, got {bins}"):
            Evaluate(model=model, num_classes=K, score_bins=bins)
