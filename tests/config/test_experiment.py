"""Experiments: read, changed, resolved, put together."""

import tomllib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from clients.sgd import Sgd
from fedsim.config import ConfigError, Experiment, assemble, bundled, locate, read, resolve
from fedsim.engines.local import Sequential, Vectorised
from fedsim.evaluation import Evaluate
from strategies.fedopt import FedOpt

TABLES: dict[str, Any] = {
    "name": "small",
    "rounds": 2,
    "data": {"use": "fedsim.data.datasets:gaussians", "examples": 60, "classes": 3, "features": 4},
    "partition": {"use": "fedsim.data.partition:iid", "clients": 3},
    "model": {"use": "fedsim.networks:logistic"},
    "strategy": {"use": "strategies.fedavg:FedAvg"},
    "clients": {"train": {"use": "clients.sgd:Sgd", "lr": 0.1}},
}


def changed(*changes: str) -> Experiment:
    return read(TABLES, changes)[0]


def test_there_are_bundled_experiments_and_all_of_them_can_be_read():
    assert "fedavg/digits" in bundled()
    for name in bundled():
        experiment, folder = read(name)
        assert folder == locate(name).resolve().parent
        assert experiment.rounds >= 1


def test_an_experiment_is_found_by_its_path_with_or_without_toml(tmp_path, monkeypatch):
    (tmp_path / "mine.toml").write_text(tomli_w.dumps(TABLES))
    monkeypatch.chdir(tmp_path)
    for source in (tmp_path / "mine.toml", "mine.toml", "mine", tmp_path / "mine"):
        assert read(source)[0].name == "small"


def test_a_file_of_fedsims_can_be_named_by_its_path_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert locate("experiments/fedavg/digits.toml") == locate("fedavg/digits")
    with pytest.raises(ConfigError, match="nobody.toml"):
        locate("experiments/fedavg/nobody.toml")


def test_a_file_here_comes_before_a_bundled_experiment(tmp_path, monkeypatch):
    (tmp_path / "fedavg").mkdir()
    (tmp_path / "fedavg" / "digits.toml").write_text(tomli_w.dumps(TABLES))
    monkeypatch.chdir(tmp_path)
    assert read("fedavg/digits")[0].name == "small"


def test_reading_tables_changes_nothing_in_them():
    before = tomli_w.dumps(TABLES)
    read(TABLES, ["strategy.lr=0.5", "clients.train.lr=3.0", "data.seed=4"])
    assert tomli_w.dumps(TABLES) == before


@pytest.mark.parametrize(
    ("change", "path", "value"),
    [
        ("rounds=7", ["rounds"], 7),
        ("strategy.lr=0.5", ["strategy", "lr"], 0.5),
        ("strategy.lr=1e-3", ["strategy", "lr"], 0.001),
        (" strategy . lr = 0.5", ["strategy", "lr"], 0.5),
        ("model.hidden=[64, 32]", ["model", "hidden"], [64, 32]),
        ("model.use=mlp", ["model", "use"], "mlp"),
        ("model.use='mlp'", ["model", "use"], "mlp"),
        ('model.use="mlp"', ["model", "use"], "mlp"),
        ("model.use=a=b", ["model", "use"], "a=b"),
        ("model.flag=true", ["model", "flag"], True),
        ("model.flag=True", ["model", "flag"], "True"),
        ("strategy={use='fedopt'}", ["strategy"], {"use": "fedopt"}),
        ("sample.use=uniform", ["sample"], {"use": "uniform"}),
        ("clients.evaluate.use=evaluate", ["clients", "evaluate"], {"use": "evaluate"}),
        ("split.test=0.5", ["split"], {"use": "fedsim.data.federation:divide", "test": 0.5}),
        ("keep_checkpoints=all", ["keep_checkpoints"], "all"),
    ],
)
def test_a_change_is_written_as_in_toml_and_else_is_a_string(change, path, value):
    found: Any = changed(change).model_dump()
    for key in path:
        found = found[key]
    assert found == value


def test_later_changes_come_after_earlier_ones():
    experiment = changed("sample.use=uniform", "sample.fraction=0.5", "rounds=3", "rounds=4")
    assert experiment.sample == {"use": "uniform", "fraction": 0.5}
    assert experiment.rounds == 4


def test_a_default_table_is_not_changed_for_the_next_experiment():
    changed("split.test=0.5", "engine.use=sequential")
    assert changed().split == {"use": "fedsim.data.federation:divide"}


def test_the_resolved_experiment_reads_back_as_itself():
    experiment = changed("evaluate_clients=2", "name=a.b-c_d", "seed=9223372036854775807")
    assert read(tomllib.loads(experiment.toml()))[0] == experiment


def test_the_resolved_experiment_holds_the_defaults():
    resolved = tomllib.loads(changed().toml())
    assert resolved["seed"] == 0
    assert resolved["sample"] == {"use": "fedsim.sampling:everyone"}
    assert "evaluate_clients" not in resolved


def test_the_resolved_experiment_names_plug_in_files_by_their_absolute_path(tmp_path):
    (tmp_path / "mine.py").write_text("from clients.sgd import Sgd\nfrom fedsim.sampling import everyone, dropout\n")
    sample = {"use": "mine.py:dropout", "probability": 0.5, "sample": {"use": "mine.py:everyone"}}
    (tmp_path / "small.toml").write_text(tomli_w.dumps(TABLES | {"sample": sample}))
    resolved = read(tmp_path / "small.toml")[0].sample
    assert resolved["use"] == f"{tmp_path / 'mine.py'}:dropout"
    assert resolved["sample"]["use"] == f"{tmp_path / 'mine.py'}:everyone"


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("evaluate_clients", None, "TOML has no None"),
        ("model", {"use": "fedsim.networks:mlp", "hidden": None}, "TOML has no None"),
        ("model", {"use": Path("mine.py")}, "TOML has no PosixPath"),
        ("model", {3: 4}, "the key 3 is not a string"),
    ],
)
def test_tables_from_python_that_no_file_could_hold_are_refused(key, value, told):
    with pytest.raises(ConfigError, match=f"^experiment: {key} = .*{told}"):
        read(TABLES | {key: value})


def test_an_assembly_is_made_of_what_the_tables_say():
    parts = assemble(changed("strategy.use=fedopt", "strategy.lr=0.5", "seed=5", "engine.use=sequential"))
    assert parts.federation.num_clients == 3
    assert parts.strategy == FedOpt(lr=0.5)
    assert isinstance(parts.clients["train"], Sgd)
    assert isinstance(parts.engine, Sequential)
    assert parts.engine.seed == 5
    assert parts.sample(1).ids == [0, 1, 2]


def test_an_evaluation_is_there_unless_another_is_asked_for():
    assert assemble(changed()).clients["evaluate"].batch_size == 256
    evaluate = assemble(changed("clients.evaluate={use='evaluate', batch_size=3}")).clients["evaluate"]
    assert isinstance(evaluate, Evaluate)
    assert (evaluate.batch_size, evaluate.num_classes) == (3, 3)


def test_the_seed_reaches_every_part_that_draws():
    def one(*changes: str) -> Any:
        parts = assemble(changed("model.use=mlp", "model.hidden=[3]", *changes))
        return parts.federation.columns["x"], parts.federation.rows, parts.model.params["1.weight"]

    first, same, other = one("seed=1"), one("seed=1"), one("seed=2")
    assert all((a == b).all() for a, b in zip(first, same, strict=True))
    assert not any((a == b).all() for a, b in zip(first, other, strict=True))


def test_a_part_may_have_a_seed_of_its_own():
    first, other = (assemble(changed("data.seed=7", f"seed={seed}")).federation for seed in (1, 2))
    assert (first.columns["x"] == other.columns["x"]).all()
    assert (first.rows != other.rows).any()


def test_the_engine_is_chosen_by_the_model():
    assert isinstance(assemble(changed()).engine, Vectorised)


def test_no_data_is_read_when_a_later_table_is_wrong(tmp_path):
    (tmp_path / "mine.py").write_text("def data():\n    raise RuntimeError('the data was read')\n")
    with pytest.raises(ConfigError, match="unknown key surplus"):
        assemble(changed(f"data={{use='{tmp_path}/mine.py:data'}}", "engine.surplus=1"))
    with pytest.raises(ConfigError, match="the data was read"):
        assemble(changed(f"data={{use='{tmp_path}/mine.py:data'}}"))


def test_a_split_that_names_nothing_divides(tmp_path):
    experiment = read(TABLES | {"split": {"test": 0.5}})[0]
    assert experiment.split == {"use": "fedsim.data.federation:divide", "test": 0.5}
    assert assemble(experiment).federation.sizes("test").sum() > 0


def test_a_resolved_experiment_leaves_nothing_to_be_looked_up_and_resolves_to_itself():
    experiment = resolve(changed("strategy.use=fedopt", "model={use='mlp', hidden=[3]}"))
    assert experiment.strategy == {"use": "strategies.fedopt:FedOpt"} | asdict(FedOpt())
    assert experiment.clients["train"]["momentum"] == 0
    assert experiment.clients["evaluate"]["batch_size"] == 256
    assert not {"seed", "federation", "num_classes"} & experiment.model.keys()
    assert resolve(read(tomllib.loads(experiment.toml()))[0]) == experiment


# Data with two sensitive groups, and parts that ask how many there are.
GROUPED = """
from dataclasses import replace

import torch
from torch import nn

from fedsim.data.generated import gaussian_task
from fedsim.evaluation import Classifier
from fedsim.model import Model

def data(named=("y", "a")):
    names = {"y": ("p", "q", "r"), "a": ("one", "other")}
    return replace(gaussian_task(examples=60), names={name: names[name] for name in named})

def model(num_groups=7):
    return Model(nn.Linear(2, num_groups))

class Sure(Classifier):
    def __init__(self, num_groups, confidence=1.0):
        self.num_groups, self.confidence = num_groups, confidence

    def __call__(self, shared, personal, batch):
        return torch.full((len(batch["y"]), 3), 1 / 3)
"""


@pytest.fixture
def grouped(tmp_path: Path) -> list[str]:
    """What changes the experiment into one with groups."""
    (tmp_path / "grouped.py").write_text(GROUPED)
    return [
        f"data={{use='{tmp_path}/grouped.py:data'}}",
        f"model={{use='{tmp_path}/grouped.py:model'}}",
        "strategy={use='strategies.fedfact:FedFact'}",
        "clients.train={use='clients.fedfact:FairSgd', lr=0.1}",
        f"clients.evaluate={{use='evaluate', classifier={{use='{tmp_path}/grouped.py:Sure'}}}}",
    ]


def test_every_part_that_asks_for_the_number_of_groups_gets_it(grouped):
    parts: Any = assemble(changed(*grouped))
    evaluate = parts.clients["evaluate"]
    assert (parts.strategy.num_groups, parts.clients["train"].num_groups, evaluate.num_groups) == (2, 2, 2)
    assert (evaluate.classifier.num_groups, evaluate.classifier.confidence) == (2, 1.0)
    assert parts.model.params["bias"].shape == (2,)
    own: Any = assemble(changed(*grouped, "clients.evaluate.num_groups=5", "model.num_groups=4"))
    assert (own.clients["evaluate"].num_groups, own.clients["evaluate"].classifier.num_groups) == (5, 2)
    assert own.model.params["bias"].shape == (4,)


def test_a_strategy_that_cannot_begin_is_told_as_the_experiments_fault(grouped, tmp_path):
    strategy = f"strategy={{use='strategies.fedfact_post:FedFactPost', from_run='{tmp_path}/nowhere'}}"
    told = "^strategy: strategies.fedfact_post:FedFactPost: .*nowhere is no run, nor does it hold one with the seed 0"
    with pytest.raises(ConfigError, match=told):
        assemble(changed(*grouped, strategy))


def test_groups_without_names_are_no_groups(grouped):
    plain = ["strategy={use='fedavg'}", "clients={train={use='sgd', lr=0.1}}", "model.num_groups=3"]
    unnamed = changed(*grouped, *plain, "data.named=['y']")
    assert "a" in assemble(unnamed).federation.columns
    assert assemble(unnamed).clients["evaluate"].num_groups is None
    assert assemble(changed()).clients["evaluate"].num_groups is None


def test_the_number_of_groups_is_not_written_down_where_it_was_filled_in(grouped):
    experiment = resolve(changed(*grouped))
    tables = [experiment.model, experiment.strategy, *experiment.clients.values()]
    assert not any("num_groups" in table for table in [*tables, experiment.clients["evaluate"]["classifier"]])
    assert experiment.clients["evaluate"]["classifier"]["confidence"] == 1.0
    assert resolve(changed(*grouped, "strategy.num_groups=3")).strategy["num_groups"] == 3


@pytest.mark.parametrize("classifier", ["{confidence=0.5}", "{}", "'clients.fedfact_post:Calibrated'", "3"])
def test_a_classifier_that_names_nothing_that_makes_it_is_refused(grouped, classifier):
    told = "must be a table with `use` that makes Classifier$"
    with pytest.raises(ConfigError, match=f"^clients.evaluate.classifier = .*: {told}"):
        assemble(changed(*grouped, f"clients.evaluate.classifier={classifier}"))


def test_a_key_that_a_classifier_does_not_take_is_refused_by_its_full_name(grouped):
    with pytest.raises(ConfigError, match=r"clients.evaluate.classifier.confidense = 1: .*did you mean confidence\?"):
        assemble(changed(*grouped, "clients.evaluate.classifier.confidense=1"))


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        (
            [
                "clients.train={use='clients.fedfact:FairSgd', lr=0.1}",
                "strategy={use='strategies.fedfact:FedFact', num_groups=2}",
            ],
            "clients.train: clients.fedfact:FairSgd",
        ),
        (["strategy={use='strategies.fedfact:FedFact'}"], "strategy: strategies.fedfact:FedFact"),
        (
            ["clients.evaluate={use='evaluate', classifier={use='clients.fedfact_post:Calibrated'}}"],
            "clients.evaluate.classifier: clients.fedfact_post:Calibrated",
        ),
    ],
)
def test_what_needs_groups_and_finds_none_in_the_data_says_so(changes, where):
    place = where.partition(":")[0]
    with pytest.raises(ConfigError) as caught:
        assemble(changed(*changes))
    assert str(caught.value) == (
        f"{where} needs num_groups, and gaussians has no column a with names of its values: choose other data, "
        f"or set {place}.num_groups"
    )
    assert assemble(changed(*changes, f"{place}.num_groups=2"))


def test_what_needs_classes_and_finds_none_in_the_data_says_so(grouped):
    with pytest.raises(ConfigError, match="^strategy: .*:FedFact needs num_classes, and gaussian_task has no column y"):
        assemble(changed(*grouped, "data.named=['a']", "clients={train={use='sgd', lr=0.1}}"))


def test_what_can_do_without_groups_has_its_own_default_where_there_are_none(grouped):
    parts = assemble(
        changed(*grouped, "data.named=['y']", "strategy={use='fedavg'}", "clients={train={use='sgd', lr=1}}")
    )
    assert parts.model.params["bias"].shape == (7,)
    assert parts.clients["evaluate"].num_groups is None  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"data": {"use": "digits"}, "partition": {"use": "iid", "clients": 5}, "split": {"use": "divide"}},
            r"clients.evaluate: fedsim.ranking:RankItems needs a column item; digits, split by .*divide, has x, y",
        ),
        (
            {"split": {"use": "divide", "test": 0.2}},
            r"clients.evaluate: fedsim.ranking:RankItems needs a column y; .*, split by .*divide, has item, .*user",
        ),
    ],
)
def test_columns_that_a_client_needs_are_missed_before_anything_starts(changes, told):
    tables = tomllib.loads(locate("fedrecgel/latent-factors").read_text())
    tables |= {"model": {"use": "ncf", "num_items": 400}} | changes
    with pytest.raises(ConfigError, match=told):
        assemble(*read(tables))
