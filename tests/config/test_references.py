"""References: "${strategy.notion}" stands for what is written elsewhere in the experiment, and for nothing else."""

import tomllib
from typing import Any

import pytest
import tomli_w

from fedsim.config import ConfigError, Experiment, assemble, read, resolve

TABLES: dict[str, Any] = {
    "name": "small",
    "rounds": 2,
    "data": {"use": "fedsim.data.datasets:gaussians", "examples": 60, "classes": 3, "features": 4},
    "partition": {"use": "fedsim.data.partition:iid", "clients": 3},
    "model": {"use": "fedsim.networks:mlp", "hidden": [8, 5]},
    "strategy": {"use": "strategies.fedavg:FedAvg", "lr": 0.5},
    "clients": {"train": {"use": "clients.sgd:Sgd", "lr": "${strategy.lr}"}},
}


def changed(*changes: str) -> Experiment:
    return read(TABLES, changes)[0]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", "small"),
        ("rounds", 2),
        ("strategy.lr", 0.5),
        ("model.hidden", [8, 5]),
        ("data", TABLES["data"]),
    ],
)
def test_a_reference_is_what_it_refers_to_in_its_own_type(key, value):
    found = changed(f"clients.train.other=${{{key}}}").clients["train"]["other"]
    assert found == value and type(found) is type(value)


def test_a_reference_has_what_was_changed_and_may_be_what_changes():
    assert changed("strategy.lr=0.25").clients["train"]["lr"] == 0.25
    assert changed("clients.train.lr=3.0").clients["train"]["lr"] == 3.0
    assert changed("clients.train.batch_size=${rounds}", "rounds=7").clients["train"]["batch_size"] == 7


def test_a_reference_may_lead_to_another_and_lie_in_a_table_that_is_referred_to():
    assert changed("strategy.lr=${model.lr}", "model.lr=${data.lr}", "data.lr=0.125").clients["train"]["lr"] == 0.125
    experiment = changed("clients.again=${clients.train}", "strategy.lr=0.25")
    assert experiment.clients["again"] == experiment.clients["train"] == {"use": "clients.sgd:Sgd", "lr": 0.25}


def test_a_reference_may_stand_at_any_depth_and_for_a_whole_part():
    experiment = changed(
        "clients.train.inner={deeper={lr='${strategy.lr}'}}", "engine=${data.engine}", "data.engine.use=sequential"
    )
    assert experiment.clients["train"]["inner"] == {"deeper": {"lr": 0.5}}
    assert experiment.engine == {"use": "sequential"}


def test_a_reference_may_stand_in_a_list():
    experiment = changed("model.hidden=['${data.features}', 3]", "clients.train.list=[{deep='${rounds}'}, ['${name}']]")
    assert experiment.model["hidden"] == [4, 3]
    assert experiment.clients["train"]["list"] == [{"deep": 2}, ["small"]]
    with pytest.raises(ConfigError, match=r"model.hidden\[1\] = '\$\{nobody\}': nobody is missing"):
        changed("model.hidden=[3, '${nobody}']")
    with pytest.raises(ConfigError, match=r"model.hidden\[0\].*refers to itself, by way of model.hidden$"):
        changed("model.hidden=['${model.hidden}']")


def test_reading_tables_with_references_changes_nothing_in_them():
    before = tomli_w.dumps(TABLES)
    read(TABLES, ["clients.again=${clients.train}"])
    assert tomli_w.dumps(TABLES) == before


def test_what_is_resolved_and_written_down_refers_to_nothing():
    text = resolve(changed()).toml()
    assert "$" not in text and tomllib.loads(text)["clients"]["train"]["lr"] == 0.5
    assert assemble(changed()).clients["train"].lr == 0.5  # type: ignore[attr-defined]


@pytest.mark.parametrize("text", ["lr is ${strategy.lr}", "${strategy.lr}s", "${}", "$strategy.lr", "${a}${b}", "{a}"])
def test_a_text_that_is_more_or_less_than_a_reference_is_that_text(text):
    assert changed(f"clients.train.note='{text}'").clients["train"]["note"] == text


@pytest.mark.parametrize(
    ("reference", "told"),
    [
        ("${strategy.lrr}", r"strategy.lrr is missing: it must be there to refer to; did you mean lr\?"),
        ("${strategie.lr}", r"strategie is missing: it must be there to refer to; did you mean strategy\?"),
        ("${ rounds }", r" rounds  is missing: it must be there to refer to; did you mean rounds\?"),
        ("${name.lr}", "name.lr is missing: it must be there to refer to$"),
        ("${model.hidden.0}", "model.hidden.0 is missing: it must be there to refer to$"),
        ("${strategy.}", "strategy. is missing"),
        ("${seed}", "seed is missing"),  # a default that is not written down
        ("${split.test}", "split is missing"),
    ],
)
def test_a_reference_to_nothing_is_refused_with_what_is_there(reference, told):
    with pytest.raises(ConfigError, match=rf"^experiment: clients.train.lr = '\$\{{.*\}}': {told}"):
        changed(f"clients.train.lr={reference}")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (["strategy.lr=${strategy.lr}"], "strategy.lr"),
        (["strategy.lr=${clients.train.lr}"], "clients.train.lr and strategy.lr"),
        (["strategy.lr=${data.lr}", "data.lr=${clients.train.lr}"], "strategy.lr and data.lr and clients.train.lr"),
        (["strategy.lr=${strategy}"], "strategy"),
        (["strategy.a={b={c='${strategy.a}'}}"], "strategy.a"),
        (["clients=${clients}"], "clients"),
        # The first one that is looked at leads into a circle in which it does not lie.
        (
            [
                "data.lr=${partition.lr}",
                "partition.lr=${model.lr}",
                "model.lr=${strategy.lr}",
                "strategy.lr=${model.lr}",
            ],
            "partition.lr and model.lr and strategy.lr",
        ),
    ],
)
def test_a_reference_that_leads_back_to_itself_is_refused_with_its_way(changes, told):
    with pytest.raises(ConfigError, match=r"refers to itself, by way of") as caught:
        changed(*changes)
    way = str(caught.value).rpartition("by way of ")[2].split(" and ")
    assert sorted(way) == sorted(told.split(" and "))


def test_referring_twice_to_the_same_is_no_circle():
    experiment = changed("data.a=${strategy.lr}", "data.b=${strategy.lr}", "model.c={d='${data.a}', e='${data.b}'}")
    assert experiment.model["c"] == {"d": 0.5, "e": 0.5}


def test_the_file_is_named_in_which_a_reference_is_wrong(tmp_path):
    (tmp_path / "mine.toml").write_text(tomli_w.dumps(TABLES | {"name": "${nobody}"}))
    with pytest.raises(ConfigError, match=r"mine.toml: name = '\$\{nobody\}': nobody is missing"):
        read(tmp_path / "mine.toml")


def test_a_value_is_checked_where_it_is_used_not_where_it_is_written():
    for reference, shown in (("${name}", "'small'"), ("${model.hidden}", r"\[8, 5\]")):
        with pytest.raises(ConfigError, match=f"^clients.train.lr = {shown}: must be float > 0"):
            resolve(changed(f"clients.train.lr={reference}"))
    with pytest.raises(ConfigError, match=r"^experiment: rounds = 'small': must be int >= 1"):
        changed("rounds=${name}")


def test_a_bundled_experiment_says_its_notion_once():
    for notion in ("demographic parity", "equal opportunity"):
        experiment = read("fedfact/adult-post", [f"strategy.notion={notion}", "strategy.temperature=0.5"])[0]
        assert [experiment.clients[name]["notion"] for name in ("measure", "calibrate")] == [notion, notion]
        assert experiment.clients["evaluate"]["classifier"]["temperature"] == 0.5
