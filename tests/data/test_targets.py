"""What is to be forgotten: exactly the examples that are named, and all the rest as if nobody had asked."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fedsim.config import ConfigError, assemble, read
from fedsim.data.dataset import Dataset
from fedsim.data.federation import SPLITS, Partition, divide
from fedsim.data.targets import marked, told

NAMES = {"y": ("cat", "dog", "owl", "elk"), "a": ("here", "there")}
SIZES = (12, 9, 0, 1, 10)


def table(size):
    row = torch.arange(size)
    return {
        "x": torch.stack([row, -row], 1).float(),
        "y": row % 3,  # no elk
        "a": row // 3 % 2,
        "age": 20 + row,
        "score": (row % 10).float() / 10,
    }


def dataset():
    return Dataset("toy", table(40), table(7), NAMES)


def partition():
    """32 of 40 rows, mixed."""
    rows = np.random.default_rng(0).permutation(40)[: sum(SIZES)]
    return Partition(rows, np.array([0, *np.cumsum(SIZES)]))


def shared():
    """Rows that several clients have, and one of them twice."""
    return Partition(np.array([0, 1, 2, 3, 0, 1, 4, 3, 5, 5]), np.array([0, 4, 7, 10]))


def targets(federation, client, split="train"):
    return federation.examples(client, split)["target"].tolist()


def named(federation, request=1):
    """The rows of the data set that a request names, nobody's included."""
    return federation.columns["x"][federation.columns["target"] == request, 0].int().tolist()


# What is named.


@pytest.mark.parametrize(
    ("request_", "meant"),
    [
        ({"class": "dog"}, lambda t: t["y"] == 1),
        ({"class": 1}, lambda t: t["y"] == 1),
        ({"class": ["cat", 2]}, lambda t: (t["y"] == 0) | (t["y"] == 2)),
        ({"where": {"age": 26}}, lambda t: t["age"] == 26),
        ({"where": {"age": [25, 30]}}, lambda t: (t["age"] == 25) | (t["age"] == 30)),
        ({"where": {"a": "there"}}, lambda t: t["a"] == 1),
        ({"where": {"a": ["here", "there"], "age": 26}}, lambda t: t["age"] == 26),
        ({"where": {"age": {"at_least": 30}}}, lambda t: t["age"] >= 30),
        ({"where": {"age": {"at_most": 30}}}, lambda t: t["age"] <= 30),
        ({"where": {"age": {"at_least": 25, "at_most": 30}}}, lambda t: (t["age"] >= 25) & (t["age"] <= 30)),
        ({"where": {"score": 0.1}}, lambda t: (t["score"] * 10).round() == 1),  # which no float32 is
        (
            {"where": {"score": [0.3, 0.7]}},
            lambda t: ((t["score"] * 10).round() == 3) | ((t["score"] * 10).round() == 7),
        ),
        ({"where": {"score": {"at_least": 0.7}}}, lambda t: (t["score"] * 10).round() >= 7),
        ({"where": {"y": "dog", "age": {"at_most": 30}}}, lambda t: (t["y"] == 1) & (t["age"] <= 30)),
        ({"class": "dog", "where": {"a": "here"}}, lambda t: (t["y"] == 1) & (t["a"] == 0)),
    ],
)
def test_a_request_by_values_names_the_examples_that_have_them_in_the_test_set_too(request_, meant):
    federation = marked(dataset(), partition(), [request_])
    assert named(federation) == meant(table(40)).nonzero().flatten().tolist()
    assert torch.equal(federation.test["target"], meant(table(7)).long())
    assert federation.columns["target"].dtype == torch.int64


@pytest.mark.parametrize(
    ("request_", "rows"),
    [
        ({"samples": [3, 17, 17, 39]}, {3, 17, 39}),
        ({"samples": 3}, {3}),
        ({"client": 1}, set(partition().rows[12:21].tolist())),
        ({"client": [1, 3]}, set(partition().rows[12:22].tolist())),
        ({"client": 0, "class": "dog"}, {row for row in partition().rows[:12].tolist() if row % 3 == 1}),
        ({"client": 0, "samples": list(range(20))}, {row for row in partition().rows[:12].tolist() if row < 20}),
        ({"samples": list(range(20)), "class": "owl"}, {row for row in range(20) if row % 3 == 2}),
    ],
)
def test_samples_and_clients_are_named_by_number_and_nothing_of_the_test_set_is_known_to_be_theirs(request_, rows):
    federation = marked(dataset(), partition(), [request_])
    assert set(named(federation)) == rows
    assert not federation.test["target"].any()


def test_samples_may_stand_in_a_file(tmp_path):
    (tmp_path / "rows.txt").write_text("3\n17\n\n39\n")
    federation = marked(dataset(), partition(), [{"samples": str(tmp_path / "rows.txt")}])
    assert named(federation) == [3, 17, 39]


def test_of_what_several_requests_name_the_first_counts():
    requests = [{"class": "dog"}, {"where": {"age": {"at_most": 30}}}, {"client": 1}]
    federation = marked(dataset(), partition(), requests)
    row, own = np.arange(40), np.isin(np.arange(40), partition().rows[12:21])
    expected = np.where(row % 3 == 1, 1, np.where(row <= 10, 2, np.where(own, 3, 0)))
    assert federation.columns["target"].tolist() == expected.tolist()
    assert federation.test["target"].tolist() == [2, 1, 2, 2, 1, 2, 2]
    assert federation.names["target"] == ("kept", "class dog", "age to 30", "client 1")
    assert federation.names.items() >= NAMES.items()


def test_a_request_in_words():
    assert told({"class": ["cat", 2], "client": 3}) == "class cat, 2, client 3"
    assert told({"where": {"age": {"at_least": 25, "at_most": 30}, "a": "here"}}) == "age from 25 to 30, a here"
    assert told({"samples": list(range(6))}) == "samples 6 of them"


# The rest.


@pytest.mark.parametrize("parts", [partition, shared])
@pytest.mark.parametrize(("validation", "test"), [(0.0, 0.0), (0.2, 0.3)])
def test_but_for_the_column_everything_is_as_without_requests(parts, validation, test):
    found = marked(dataset(), parts(), [{"class": "cat"}], 0, validation, test, seed=4)
    plain = divide(dataset(), parts(), validation, test, seed=4)
    assert np.array_equal(found.bounds, plain.bounds) and (found.name, found.notes) == (plain.name, plain.notes)
    for client in range(plain.num_clients):
        for split in SPLITS:
            own, other = found.examples(client, split), plain.examples(client, split)
            assert torch.equal(own["target"], (other["y"] == 0).long())
            assert own.keys() - {"target"} == other.keys()
            assert all(torch.equal(own[name], column) for name, column in other.items())
    assert all(torch.equal(found.test[name], column) for name, column in plain.test.items())
    assert "target" not in dataset().columns


def test_an_example_that_several_clients_have_is_named_with_its_client_only():
    plain = marked(dataset(), shared(), [{"class": "cat"}])
    assert [targets(plain, client) for client in range(3)] == [[1, 0, 0, 1], [1, 0, 0], [1, 0, 0]]
    second = marked(dataset(), shared(), [{"client": 1}])
    assert [targets(second, client) for client in range(3)] == [[0, 0, 0, 0], [1, 1, 1], [0, 0, 0]]
    rows = marked(dataset(), shared(), [{"samples": [5, 0], "client": [0, 2]}])
    assert [targets(rows, client) for client in range(3)] == [[1, 0, 0, 0], [0, 0, 0], [0, 1, 1]]
    left = marked(dataset(), shared(), [{"samples": [5, 0], "client": [0, 2]}], leave_out=1)
    assert left.sizes().tolist() == [3, 3, 1]


def test_what_is_left_out_is_in_no_training_part_and_all_else_stays_in_its_place():
    requests = [{"client": 1}, {"class": "dog"}]
    whole = marked(dataset(), partition(), requests, 0, 0.2, 0.3, seed=4)
    for number in (1, 2):
        left = marked(dataset(), partition(), requests, number, 0.2, 0.3, seed=4)
        for client in range(5):
            for split in SPLITS:
                before, after = whole.examples(client, split), left.examples(client, split)
                stays = (before["target"] == 0) | (before["target"] > number) | (split != "train")
                assert all(torch.equal(after[name], column[stays]) for name, column in before.items())
        assert left.names == whole.names and left.sizes()[1] == 0
        assert left.sizes("test")[1] == whole.sizes("test")[1] > 0
        assert all(torch.equal(left.test[name], column) for name, column in whole.test.items())
    assert whole.sizes().sum() > marked(dataset(), partition(), requests, 1, 0.2, 0.3, seed=4).sizes().sum()


def test_a_class_that_is_all_a_client_has_leaves_it_with_nothing():
    parts = Partition(np.array([0, 3, 6, 1, 2, 4]), np.array([0, 3, 6]))  # the first has cats alone
    assert targets(marked(dataset(), parts, [{"class": "cat"}]), 0) == [1, 1, 1]
    left = marked(dataset(), parts, [{"class": "cat"}], leave_out=1)
    assert left.sizes().tolist() == [0, 3] and left.examples(0)["x"].shape == (0, 2)


def test_data_without_a_test_set_or_names_can_be_marked():
    plain = Dataset("plain", table(40))
    federation = marked(plain, partition(), [{"class": 1}])
    assert named(federation) == list(range(1, 40, 3)) and federation.test == {}


# What is refused.

KEYS = "class, where, samples, client"


@pytest.mark.parametrize(
    ("requests", "complaint"),
    [
        ([], "requests must name something to forget, got none"),
        ([{}], rf"requests\[0\] = {{}}: must be a table with {KEYS}, one of them at least"),
        (["dog"], rf"requests\[0\] = 'dog': must be a table with {KEYS}"),
        ([{"clas": "dog"}], rf"requests\[0\].clas: unknown key; a request has {KEYS}"),
        ([{"class": "elk"}], r"requests\[0\] = {'class': 'elk'}: no client trains on an example like this$"),
        ([{"class": []}], r"requests\[0\] = {'class': \[\]}: no client trains on an example like this$"),
        (
            [{"class": "cow"}],
            r"requests\[0\].class = 'cow': must be one of cat, dog, owl, elk, or its number",
        ),
        ([{"class": 4}], r"requests\[0\].class = 4: must be one of cat, dog, owl, elk, or its number"),
        ([{"class": [0, True]}], r"requests\[0\].class = True: must be one of cat"),
        ([{"class": 0}, {"client": 5}], r"requests\[1\].client: 5 is no client: clients are numbered from 0 to 4"),
        ([{"client": -1}], r"requests\[0\].client: -1 is no client"),
        ([{"client": "1"}], r"requests\[0\].client: '1' is no client"),
        ([{"client": 2}], r"requests\[0\] = {'client': 2}: no client trains on an example like this"),
        (
            [{"samples": [3, 40]}],
            r"requests\[0\].samples: 40 is no row: rows of the data set are numbered from 0 to 39",
        ),
        ([{"samples": [1.0]}], r"requests\[0\].samples: 1.0 is no row"),
        ([{"samples": "nowhere.txt"}], r"requests\[0\].samples = 'nowhere.txt': there is no such file"),
        (
            [{"where": {"height": 3}}],
            r"requests\[0\].where.height: there is no column height with one value an example, only a, age, score, y",
        ),
        ([{"where": {"x": 3}}], r"requests\[0\].where.x: there is no column x with one value an example, only"),
        ([{"where": "age"}], r"requests\[0\].where = 'age': must be a table of columns with the values that they have"),
        ([{"where": {"age": "old"}}], r"requests\[0\].where.age = 'old': must be a number"),
        (
            [{"where": {"age": {"above": 3}}}],
            r"requests\[0\].where.age: bounds are numbers called at_least and at_most, got above = 3",
        ),
        ([{"where": {"age": {"at_least": "3"}}}], r"bounds are numbers called .*, got at_least = '3'"),
        ([{"where": {"age": {}}}], r"bounds are numbers called .*, got {}"),
        (
            [{"class": "dog"}, {"class": 1}],
            r"requests\[1\] = {'class': 1}: no client trains on an example like this that no request before it names",
        ),
        (
            [{"class": ["cat", "owl"]}, {"class": "dog"}],
            "requests name all that clients train on: nothing would be left to keep; begin a new run",
        ),
    ],
)
def test_a_request_that_cannot_be_met_is_refused_with_its_place(requests, complaint):
    with pytest.raises(ValueError, match=complaint):
        marked(dataset(), partition(), requests)


def test_more_than_all_requests_cannot_be_left_out():
    with pytest.raises(ValueError, match="leave_out must be at most the number of requests, 1, got 2"):
        marked(dataset(), partition(), [{"class": "dog"}], leave_out=2)
    with pytest.raises(ValueError, match="leave_out must be >= 0, got -1"):
        marked(dataset(), partition(), [{"class": "dog"}], leave_out=-1)


@pytest.mark.parametrize("line", ["2.5", "two", "-1", "²"])
def test_a_file_of_samples_with_something_else_in_it_is_refused(tmp_path, line):
    (tmp_path / "rows.txt").write_text(f"3\n{line}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=rf"requests\[0\].samples: '{line}' is no row"):
        marked(dataset(), partition(), [{"samples": str(tmp_path / "rows.txt")}])


def test_an_example_that_nobody_trains_on_is_not_enough():
    spare = sorted(set(range(40)) - set(partition().rows.tolist()))
    with pytest.raises(ValueError, match="no client trains on an example like this"):
        marked(dataset(), partition(), [{"samples": spare}])


def test_data_that_have_a_column_target_themselves_are_refused():
    own = replace(dataset(), columns=table(40) | {"target": torch.zeros(40)}, test={})
    with pytest.raises(ValueError, match="toy has a column target itself, which is to say what is to be forgotten"):
        marked(own, partition(), [{"class": "dog"}])


# In an experiment.

TABLES = {
    "name": "forgetting",
    "rounds": 2,
    "data": {"use": "fedsim.data.datasets:gaussians", "examples": 60, "classes": 3, "features": 4},
    "partition": {"use": "fedsim.data.partition:iid", "clients": 3},
    "split": {"use": "fedsim.data.targets:marked"},
    "model": {"use": "fedsim.networks:logistic"},
    "strategy": {"use": "strategies.forget:Forget"},
    "clients": {"forget": {"use": "clients.forget:ForgetWhileTraining", "lr": 0.1}},
}


def test_an_experiment_declares_requests_and_the_strategy_learns_how_many_there_are():
    made = assemble(read(TABLES, ["split.requests=[{ class = 0 }, { client = 1, where = { y = [1] } }]"])[0])
    assert made.strategy.num_targets == 3 and made.strategy.num_clients == 3
    assert made.federation.columns["target"].unique().tolist() == [0, 1, 2]
    assert made.strategy.gone_with == (1, 3, 3)


def test_which_class_is_gone_is_said_of_those_that_the_model_tells_apart():
    data = {"use": "fedsim.data.datasets:group_shift", "examples": 200, "test": 0}
    tables = TABLES | {"data": data, "model": TABLES["model"] | {"target": "a"}}
    made = assemble(read(tables, ["split.requests=[{ where = { a = 1 } }]"])[0])
    assert made.strategy.gone_with == (2, 1), "of y some are kept in both"


@pytest.mark.parametrize(
    ("requests", "complaint"),
    [
        ("[{ class = 3 }]", r"split: .*marked: requests\[0\].class = 3: must be"),
        ("[{ class = 1 }, { client = 3 }]", r"split: .*marked: requests\[1\].client: 3 is no client"),
        ("[]", "split: .*marked: requests must name something to forget, got none"),
        ("[{ class = [0, 1, 2] }]", "split: .*marked: requests name all that clients train on"),
        ("'dog'", r"split.requests = 'dog': must be a list of a table"),
        ("['dog']", r"split.requests = \['dog'\]: must be a list of a table"),
    ],
)
def test_the_place_in_the_experiment_is_named(requests, complaint):
    with pytest.raises(ConfigError, match=complaint):
        assemble(read(TABLES, [f"split.requests={requests}"])[0])


def test_without_requests_the_experiment_says_so():
    with pytest.raises(ConfigError, match="split.requests is missing: fedsim.data.targets:marked needs it"):
        assemble(read(TABLES)[0])


def test_a_split_that_marks_nothing_is_no_split_to_forget_with():
    with pytest.raises(ConfigError, match="clients.forget: .*ForgetWhileTraining needs a column target"):
        assemble(read(TABLES, ["split={use='fedsim.data.federation:divide'}"])[0])


FORGET = "clients.forget={use='clients.forget:ForgetWhileTraining', lr=0.1, "


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        (
            [FORGET + "memory='mix'}"],
            r"clients.forget: clients.forget:ForgetWhileTraining expects before of the server, and "
            r'strategies.forget:Forget, as it is set, does not share it: set strategy.remember = "model"',
        ),
        (
            [FORGET + "strength=1.0}", "strategy.remember='model'"],
            r'expects omega of the server, and .* does not share it: set strategy.remember = "importance"',
        ),
        (
            ["strategy={use='fedavg'}", "clients.train={use='clients.forget:ForgetWhileTraining', lr=0.1}"],
            r"clients.train: .* expects request of the server, and fedavg, .*: use a strategy that knows of requests",
        ),
        (
            ["strategy={use='fedavg'}", "clients.train={use='scaffold', lr=0.1}"],
            r'clients.train: scaffold expects control of the server, .*: set strategy.use = "scaffold"',
        ),
        (
            ["strategy={use='flwr.serverapp.strategy:FedAvg'}", "clients.train={use='scaffold', lr=0.1}"],
            r"clients.train: scaffold expects control of the server, and flwr.serverapp.strategy:FedAvg",
        ),
    ],
)
def test_what_a_client_expects_of_the_server_is_missed_before_any_training(changes, complaint):
    asked = ["split.requests=[{ class = 1 }]", "strategy.training=1", *changes]
    if any("strategy={" in change for change in changes):
        asked.remove("strategy.training=1")
    else:
        asked.append("clients.train={use='sgd', lr=0.1}")
    with pytest.raises(ConfigError, match=complaint):
        assemble(read(TABLES, asked)[0])


def test_what_is_shared_as_it_is_expected_is_not_missed():
    remember = ["strategy.remember='importance'", "clients.weigh={use='clients.weigh:Weigh'}"]
    asked = ["split.requests=[{ class = 1 }]", FORGET + "memory='mix', strength=1.0}", *remember]
    assert assemble(read(TABLES, asked)[0]).strategy.shares("forget") == (
        "params",
        "request",
        "deleted",
        "before",
        "omega",
    )
