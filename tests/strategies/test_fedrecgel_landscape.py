"""The landscape of FedRecGEL's runs: each at its last checkpoint, seeds of one configuration in one row."""

import json
import math
import sys
from itertools import islice

import pytest
import torch

from experiments.fedrecgel import landscape
from fedsim import tree
from fedsim.config import assemble, read, resolve
from fedsim.runs import Run, trained
from fedsim.simulation import begin, rounds

SMALL = ("data.users=12", "data.items=90", "split.negatives=9", "rounds=5", "checkpoint_every=2")


def train(root, rho, seed, number=5):
    """The directory of a short run, with checkpoints of every second round and of the last one."""
    radii = (f"clients.train.rho_shared={rho}", f"clients.train.rho_own={rho}")
    experiment = resolve(*read("fedrecgel/latent-factors", [*SMALL, *radii, f"seed={seed}"]))
    parts, run = assemble(experiment), Run.create(root, experiment.name, seed, experiment.toml(), {})
    start = begin(parts.strategy, parts.model.params, parts.clients, 12, seed)
    for step in islice(rounds(parts.strategy, parts.engine, parts.sample, start), number):
        round = step.snapshot.round
        run.record({"round": round, "clients/hr_10": round / 100})
        if round % 2 == 0 or round == number:
            run.save(step.snapshot, 2)
    return run.path


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    return root, [train(root, rho, seed) for rho in (0.0, 0.5) for seed in (1, 2)]


def test_a_run_is_measured_at_its_last_checkpoint_with_what_its_users_keep(runs):
    _, paths = runs
    surface, shared = landscape.solution(paths[2])
    assert surface.cohort.ids == list(range(12))
    expected = trained(paths[2])
    assert shared["params"].keys() == expected.keys()
    assert all(torch.equal(leaf, expected[name].double()) for name, leaf in shared["params"].items())
    flat, round = landscape.read_checkpoint(landscape.checkpoints(paths[2])[-1])
    assert round == 5
    place = {user: place for place, user in enumerate(flat["personal/ids"].tolist())}
    assert 2 < len(place) < 12
    for user, row in place.items():
        for name, leaf in tree.take(surface.cohort.personal, user)["own"].items():
            assert torch.equal(leaf, flat[f"personal/rows/own/{name}"][row].double())


def test_the_numbers_of_a_run(runs):
    _, paths = runs
    found = landscape.landscape(paths[0], radii=[0.0, 0.05], steps=[0.0, 0.5])
    assert found["rho 0"] == found["t 0"] == found["t 0, sd over d"] == 0
    assert found["rho 0.05"] == pytest.approx(0.05 * found["gradient"], rel=0.5) and found["rho 0.05"] > 0
    assert found["rounds"] == 1, "checkpoints are of rounds 2, 4 and 5, of which the last two are kept"
    assert 0 < found["change"] < 2 and -1 <= found["cosine"] <= 1 and 0 <= found["10 nearest"] <= 1
    assert found["HR@10"] == 0.05
    assert landscape.landscape(paths[0], radii=[0.0, 0.05], steps=[0.0, 0.5]) == found


def test_one_row_for_each_configuration_with_its_spread_over_seeds(runs, monkeypatch, capsys, tmp_path):
    root, paths = runs
    out = tmp_path / "numbers.json"
    monkeypatch.setattr(sys, "argv", ["landscape", str(root), "--radii", "0.1", "--steps", "0.5", "--out", str(out)])
    landscape.main()
    head, rule, *rows = capsys.readouterr().out.strip().splitlines()
    assert [row.split("|")[1:3] for row in rows] == [
        [f" fedrecgel-latent-factors, rho_own {rho}, rho_shared {rho} ", " 2 "] for rho in ("0.0", "0.5")
    ]
    assert head.count("|") == rule.count("|") == rows[0].count("|")
    numbers = json.loads(out.read_text())
    pair = [numbers["fedrecgel-latent-factors, rho_own 0.0, rho_shared 0.0"][str(path)]["loss"] for path in paths[:2]]
    mean, half = sum(pair) / 2, abs(pair[0] - pair[1]) / math.sqrt(2)
    assert f"| {mean:.4g} ± {half:.2g} |" in rows[0]


def test_with_one_checkpoint_there_is_no_stability_yet(tmp_path):
    assert landscape.stability(train(tmp_path, 0.0, 1, number=1)) == {}
    assert landscape.as_table({"one": [{"a": 1.0}], "other": [{"b": 2.0}]}).splitlines()[2:] == [
        "| one | 1 | 1 | - |",
        "| other | 1 | - | 2 |",
    ]


def test_a_run_of_another_method_is_refused_and_so_is_one_that_has_not_got_far(tmp_path):
    other = Run.create(tmp_path, "other", 1, resolve(*read("fedavg/digits")).toml(), {}).path
    with pytest.raises(ValueError, match="clients.train is a Sgd, must be a DualSam"):
        landscape.landscape(other)
    begun = Run.create(tmp_path, "begun", 1, resolve(*read("fedrecgel/latent-factors", SMALL)).toml(), {}).path
    with pytest.raises(FileNotFoundError, match="has no checkpoint: there is nothing to measure yet"):
        landscape.landscape(begun)


def test_what_cannot_be_measured_is_left_out_of_the_table_and_told(tmp_path, monkeypatch, capsys):
    begun = Run.create(
        tmp_path / "begun", "begun", 1, resolve(*read("fedrecgel/latent-factors", SMALL)).toml(), {}
    ).path
    other = Run.create(tmp_path / "other", "other", 1, resolve(*read("fedavg/digits")).toml(), {}).path
    monkeypatch.setattr(sys, "argv", ["landscape", str(begun), str(other)])
    with pytest.raises(SystemExit, match="none of the runs can be measured"):
        landscape.main()
    good = train(tmp_path, 0.0, 1, number=1)
    monkeypatch.setattr(sys, "argv", ["landscape", str(begun), str(other), str(good), "--radii", "0.1"])
    capsys.readouterr()
    landscape.main()
    told = capsys.readouterr()
    assert [line.split("|")[2] for line in told.out.strip().splitlines()[2:]] == [" 1 "]
    assert (
        f"left out: {begun} has no checkpoint" in told.err and f"left out: {other}: clients.train is a Sgd" in told.err
    )
