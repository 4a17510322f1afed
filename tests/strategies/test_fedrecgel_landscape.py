"""The landscape of FedRecGEL's runs: each at its last checkpoint, seeds of one configuration in one row."""

import json
import math
import sys

import pytest
import torch

import fedsim
from experiments.fedrecgel import landscape
from fedsim import tree
from fedsim.runs import trained

SMALL = ("data.users=12", "data.items=90", "split.negatives=9", "rounds=5", "evaluate_every=5", "checkpoint_every=2")


def train(root, rho, seed, *changes):
    radii = (f"clients.train.rho_shared={rho}", f"clients.train.rho_own={rho}")
    return fedsim.run("fedrecgel/latent-factors", changes=[*SMALL, *radii, f"seed={seed}", *changes], root=root)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    return root, [train(root, rho, seed) for rho in (0.0, 0.5) for seed in (1, 2)]


def test_a_run_is_measured_at_its_last_checkpoint_with_what_its_users_keep(runs):
    _, results = runs
    surface, shared = landscape.solution(results[2].path)
    assert surface.cohort.ids == list(range(12))
    expected = trained(results[2].path)
    assert shared["params"].keys() == expected.keys()
    assert all(torch.equal(leaf, expected[name].double()) for name, leaf in shared["params"].items())
    flat, round = landscape.read_checkpoint(landscape.checkpoints(results[2].path)[-1])
    assert round == 5
    place = {user: place for place, user in enumerate(flat["personal/ids"].tolist())}
    assert 2 < len(place) < 12
    for user, row in place.items():
        for name, leaf in tree.take(surface.cohort.personal, user)["own"].items():
            assert torch.equal(leaf, flat[f"personal/rows/own/{name}"][row].double())


def test_the_numbers_of_a_run(runs):
    _, results = runs
    found = landscape.landscape(results[0].path, radii=[0.0, 0.05], steps=[0.0, 0.5])
    assert found["rho 0"] == found["t 0"] == found["t 0, sd over d"] == 0
    assert found["rho 0.05"] == pytest.approx(0.05 * found["gradient"], rel=0.5) and found["rho 0.05"] > 0
    assert found["rounds"] == 1, "checkpoints are of rounds 2, 4 and 5, of which the last two are kept"
    assert 0 < found["change"] < 2 and -1 <= found["cosine"] <= 1 and 0 <= found["10 nearest"] <= 1
    assert found["HR@10"] == results[0].last("clients/hr_10")
    assert landscape.landscape(results[0].path, radii=[0.0, 0.05], steps=[0.0, 0.5]) == found


def test_one_row_for_each_configuration_with_its_spread_over_seeds(runs, monkeypatch, capsys, tmp_path):
    root, results = runs
    out = tmp_path / "numbers.json"
    monkeypatch.setattr(sys, "argv", ["landscape", str(root), "--radii", "0.1", "--steps", "0.5", "--out", str(out)])
    landscape.main()
    head, rule, *rows = capsys.readouterr().out.strip().splitlines()
    assert [row.split("|")[1:3] for row in rows] == [
        [f" fedrecgel-latent-factors, rho_own {rho}, rho_shared {rho} ", " 2 "] for rho in ("0.0", "0.5")
    ]
    assert head.count("|") == rule.count("|") == rows[0].count("|")
    numbers = json.loads(out.read_text())
    pair = [numbers["fedrecgel-latent-factors, rho_own 0.0, rho_shared 0.0"][str(r.path)]["loss"] for r in results[:2]]
    mean, half = sum(pair) / 2, abs(pair[0] - pair[1]) / math.sqrt(2)
    assert f"| {mean:.4g} ± {half:.2g} |" in rows[0]


def test_with_one_checkpoint_there_is_no_stability_yet(runs, tmp_path):
    only = train(tmp_path, 0.0, 1, "rounds=1").path
    assert landscape.stability(only) == {}
    assert landscape.as_table({"one": [{"a": 1.0}], "other": [{"b": 2.0}]}).splitlines()[2:] == [
        "| one | 1 | 1 | - |",
        "| other | 1 | - | 2 |",
    ]


def test_a_run_of_another_method_is_refused(tmp_path):
    path = fedsim.run("fedavg/digits", changes=["rounds=1"], root=tmp_path).path
    with pytest.raises(ValueError, match="clients.train is a Sgd, must be a DualSam"):
        landscape.landscape(path)
