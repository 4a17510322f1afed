"""Sweeps: every value of every key that an experiment names, checked before the first run."""

import tomllib

import pytest

import fedsim
from fedsim.config import ConfigError, variants
from fedsim.config.sweep import setting

SMALL = {
    "name": "small",
    "rounds": 1,
    "data": {"use": "fedsim.data.datasets:canonical_joint"},
    "partition": {"use": "fedsim.data.partition:by_column"},
    "split": {"test": 0.2},
    "model": {"use": "fedsim.networks:logistic"},
    "strategy": {"use": "strategies.fedavg:FedAvg", "lr": 1.0},
    "clients": {"train": {"use": "clients.sgd:Sgd", "lr": 0.1}},
}


def test_every_combination_is_a_variant_in_the_order_of_the_values():
    sweep = {"strategy.lr": [0.5, 1.0], "clients.train.lr": [0.1, 0.2, 0.3]}
    found = variants(SMALL | {"sweep": sweep}, ["rounds=2"])
    assert [each[:-1] for each in found] == [
        ["rounds=2", f"strategy.lr={server}", f"clients.train.lr={client}"]
        for server in (0.5, 1.0)
        for client in (0.1, 0.2, 0.3)
    ]
    assert {each[-1] for each in found} == {"sweep={}"}


def test_without_a_sweep_there_is_one_variant():
    assert variants(SMALL, ["rounds=2"]) == [["rounds=2"]]


LONG = {"use": "clients.sgd:Sgd", "note": "x" * 120, "inner": {"values": [1, 2]}}
VALUES = [0.0, 3, True, "a b", "], [", 'quoted "x"', [1, 2], [[1], [2]], {}, {"use": "clients.sgd:Sgd"}, LONG]


@pytest.mark.parametrize("value", VALUES)
def test_a_value_is_written_as_toml_reads_it(value):
    assert tomllib.loads(setting("key", value))["key"] == value


@pytest.mark.parametrize(
    ("sweep", "told"),
    [
        ({"strategy.lr": [1.0, -1.0]}, "strategy.lr = -1.0"),
        ({"strategy.rate": [1.0]}, "unknown key rate"),
        ({"strategy.lr": []}, "sweep"),
        ({"strategy.lr": 1.0}, "sweep"),
        ({"stratgy.lr": [1.0]}, "unknown key stratgy"),
    ],
)
def test_a_wrong_sweep_is_refused_before_anything_runs(sweep, told, tmp_path):
    with pytest.raises(ConfigError, match=told):
        list(fedsim.sweep(SMALL | {"sweep": sweep}, root=tmp_path))
    assert not list(tmp_path.iterdir())


def test_each_variant_is_a_run_of_its_own_that_does_not_sweep_any_more(tmp_path):
    results = list(fedsim.sweep(SMALL | {"sweep": {"clients.train.lr": [0.1, 0.2]}}, seeds=[3, 4], root=tmp_path))
    written = [tomllib.loads((result.path / "experiment.toml").read_text()) for result in results]
    assert [(each["clients"]["train"]["lr"], each["seed"]) for each in written] == [
        (0.1, 3),
        (0.1, 4),
        (0.2, 3),
        (0.2, 4),
    ]
    assert not any(each.get("sweep") for each in written)


def test_a_single_run_of_several_is_refused_by_name(tmp_path):
    with pytest.raises(ConfigError, match=r"small is several runs, over strategy\.lr: fedsim\.sweep"):
        fedsim.run(SMALL | {"sweep": {"strategy.lr": [0.5, 1.0]}}, root=tmp_path)
