"""The certificate of small runs: every number anew, and what does not belong together is refused."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import fedsim
from fedsim import ConfigError
from fedsim.certificate import FILE, certify, read_certificate
from fedsim.certificate.material import material
from fedsim.cli import app
from fedsim.config import assemble, read, resolve
from fedsim.report import write_report
from fedsim.runs import Run, trained

SGD = {"use": "clients.sgd:Sgd", "lr": 0.2, "epochs": 2, "batch_size": 8}
BASE = {
    "name": "forgets",
    "seed": 3,
    "rounds": 16,
    "checkpoint_every": 1,
    "keep_checkpoints": "all",
    "data": {"use": "gaussians", "examples": 400, "classes": 4, "features": 6, "test": 0.4},
    "partition": {"use": "dirichlet", "clients": 4, "alpha": 1.0},
    "split": {"use": "marked", "requests": [{"class": 1}]},
    "model": {"use": "mlp", "hidden": [16]},
    "strategy": {"use": "forget", "training": 10, "forgetting": 6},
    "clients": {
        "train": SGD,
        "forget": {"use": "clients.forget:ForgetWhileTraining", "lr": 0.2, "batch_size": 8},
        "repair": {"use": "clients.retained:Retained", "client": SGD},
    },
}
RETRAIN = ("name=retrained", "split.leave_out=1", "strategy.forgetting=0", "rounds=10")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run that forgets, and one that never knew."""
    root = tmp_path_factory.mktemp("runs")
    return tuple(fedsim.run(BASE, changes=changes, root=root).path for changes in ((), RETRAIN))


def right(model, params, x, y):
    return float((model.predict(params, {"x": x}).argmax(1) == y).double().mean())


def test_all_numbers_anew(runs):
    found = certify(*runs, shadows=4, most=60)
    assembly = assemble(resolve(*read(runs[0] / "experiment.toml")))
    federation, model = assembly.federation, assembly.model
    checkpoints = {int(path.stem[6:]): path for path in Run.open(runs[0]).checkpoints()}
    params = {"before": trained(checkpoints[10]), "after": trained(runs[0]), "retrained": trained(runs[1])}
    x, y = federation.test["x"], federation.test["y"]
    own = torch.from_numpy(federation.rows)
    gone = own[federation.columns["y"][own] == 1]
    for name, one in params.items():
        measured = found.models[name]
        assert measured["target_accuracy"] == right(model, one, x[y == 1], y[y == 1])
        assert measured["retained_accuracy"] == right(model, one, x[y != 1], y[y != 1])
        assert measured["forgotten_accuracy"] == right(
            model, one, federation.columns["x"][gone], federation.columns["y"][gone]
        )
    assert found.models["before"]["target_accuracy"] > 0.5 and found.models["after"]["target_accuracy"] == 0
    assert found.models["retrained"]["divergence"] == found.models["retrained"]["distance"] == 0
    assert found.models["after"]["distance"] < found.models["before"]["distance"]
    assert found.asked == ("class 1",) and found.examples == len(gone)
    assert found.costs["forgetting"]["client_epochs"] == 6 * 4 and found.costs["forgetting"]["rounds"] == 6
    assert found.costs["retraining"]["client_epochs"] == 10 * 4 * 2
    assert 0 <= found.models["after"]["membership_ratio"] <= 1


TIRING = '''
"""A client that learns the less the more often it was asked."""
from dataclasses import dataclass, replace

import torch

from clients.sgd import Sgd
from fedsim import tree


@dataclass(frozen=True)
class Tiring(Sgd):
    def personal(self, rng):
        return {"asked": torch.zeros(())}

    def start(self, shared, personal, data):
        return super().start(shared, personal, data) | {"asked": personal["asked"]}

    def step(self, state, batch):
        return super().step(state, batch) | {"asked": state["asked"]}

    def finish(self, shared, state, data):
        reply = super().finish(shared, state, data)
        weary = tree.map(lambda new, old: old + (new - old) / (1 + state["asked"]), state["params"], shared["params"])
        return reply._replace(update={"params": weary}, personal={"asked": state["asked"] + 1})
'''


@pytest.mark.parametrize("keeping", [False, True])
def test_the_plain_rounds_are_those_that_the_run_would_have_had(runs, tmp_path, keeping):
    base = BASE
    if keeping:  # what its clients had kept counts as well
        (tmp_path / "tiring.py").write_text(TIRING)
        client = SGD | {"use": f"{tmp_path / 'tiring.py'}:Tiring"}
        clients = BASE["clients"] | {"train": client, "repair": {"use": "clients.retained:Retained", "client": client}}
        base = BASE | {"clients": clients}
    # With rounds = 16 to come after the last one that the strategy has, which is the eighth of these.
    begun = fedsim.run(base, changes=("strategy.training=2",), root=tmp_path).path
    longer = fedsim.run(base, changes=("strategy.training=2", "strategy.repairing=2"), root=tmp_path).path
    found = certify(longer, runs[1], shadows=0, plain_rounds=0)
    relapsed = certify(begun, runs[1], shadows=0).models["relapsed"]
    assert {name: found.models["after"][name] for name in relapsed} == relapsed
    assert "relapsed" not in found.models and "relapse" in found.limits[0]


def test_of_folders_of_runs_the_latest_counts(runs):
    found = certify(runs[0].parent, runs[1].parent, shadows=0, plain_rounds=0)
    assert found == certify(*runs, shadows=0, plain_rounds=0) and found.against == str(runs[1])


def test_it_says_the_same_twice_and_stands_in_the_report(runs):
    one, two = (certify(*runs, shadows=4, most=60) for _ in range(2))
    assert one == two
    assert read_certificate(runs[0]) == one
    told = json.loads((runs[0] / FILE).read_text())
    assert told["verdict"] == one.verdict and [check["name"] for check in told["checks"]] == [
        c.name for c in one.checks
    ]
    summary = (runs[0] / "report" / "summary.md").read_text()
    assert "## Unlearning certificate" in summary and one.verdict in summary and "class 1" in summary
    assert all(limit[:40] in summary for limit in one.limits)


def test_a_run_that_only_trains_on_is_found_out(runs, tmp_path):
    tuned = fedsim.run(
        BASE, changes=('clients.forget={use="retained", client={use="sgd", lr=0.02, batch_size=8}}',), root=tmp_path
    )
    found = certify(tuned.path, runs[1], shadows=0)
    assert found.models["after"]["target_accuracy"] > 0.3
    assert found.verdict.startswith("Not as if retrained: difference in accuracy on the target")


def test_from_run_is_the_model_before(runs, tmp_path):
    there = Run.open(runs[0]).checkpoints()[9]
    changes = ("strategy.training=0", f"strategy.from_run={there}", "rounds=6")
    again = fedsim.run(BASE, changes=changes, root=tmp_path)
    one, two = (certify(path, runs[1], shadows=0) for path in (runs[0], again.path))
    assert one.models["before"] == two.models["before"]


@pytest.mark.parametrize(
    ("action", "changes"),
    [
        ("weigh", ('strategy.remember="importance"', 'clients.weigh={use="weigh"}', "strategy.forgetting=1")),
        (
            "measure",
            ('strategy={use="pruning", training=10, repairing=1}', 'clients.measure={use="activations"}', "rounds=12"),
        ),
    ],
)
def test_a_round_in_which_nobody_trains_costs_something_too(runs, tmp_path, action, changes):
    gone = fedsim.run(BASE, changes=changes, root=tmp_path)
    assert f"{action}/forgotten" in gone.metrics[10]
    costs = certify(gone.path, runs[1], shadows=0).costs["forgetting"]
    other = 1 if action == "weigh" else 2  # epochs of the round that follows
    assert (costs["rounds"], costs["client_epochs"]) == (2, 4 + 4 * other)
    assert f"{action}, round 11" in (gone.path / "report" / "index.html").read_text()


def test_a_client_is_judged_by_what_it_had(tmp_path):
    request = ("split.requests=[{client=2}]", "rounds=12", "strategy.forgetting=2")
    gone = fedsim.run(BASE, changes=request, root=tmp_path)
    without = fedsim.run(BASE, changes=[*request, *RETRAIN], root=tmp_path)
    found = certify(gone.path, without.path, shadows=0)
    assert "target_accuracy" not in found.models["after"]
    assert found.checks[0].name == "difference in accuracy on the forgotten examples"
    assert found.examples == len(assemble(resolve(*read(gone.path / "experiment.toml"))).federation.examples(2)["y"])
    assert not any("like nothing held out" in note for note in found.limits)


def test_what_the_accuracy_on_the_target_is_not_about_is_said(tmp_path):
    request = ("split.requests=[{class=1}, {client=2}]", "strategy.forgetting=1", "rounds=12")
    gone = fedsim.run(BASE, changes=request, root=tmp_path)
    without = fedsim.run(BASE, changes=[*request, *RETRAIN, "split.leave_out=2"], root=tmp_path)
    own = assemble(resolve(*read(gone.path / "experiment.toml"))).federation.examples(2)["y"]
    (note,) = (note for note in certify(gone.path, without.path, shadows=0).limits if "like nothing held out" in note)
    assert note.startswith(f"{int((own != 1).sum())} of the examples")


def test_a_retrained_model_of_fewer_rounds_is_noted(runs, tmp_path):
    def told(path, other):
        return [note for note in certify(path, other, shadows=0).limits if note.startswith("The first model had")]

    short = fedsim.run(BASE, changes=[*RETRAIN, "strategy.training=4"], root=tmp_path).path
    there = Run.open(runs[0]).checkpoints()[9]
    again = fedsim.run(BASE, changes=("strategy.training=0", f"strategy.from_run={there}", "rounds=6"), root=tmp_path)
    assert told(runs[0], runs[1]) == told(again.path, runs[1]) == []
    for path in (runs[0], again.path):
        assert [note[:50] for note in told(path, short)] == ["The first model had 10 rounds, the retrained one 4"]


def test_a_retrained_model_that_was_trained_otherwise_is_noted(runs, tmp_path):
    def told(path, other):
        return [note for note in certify(path, other, shadows=0).limits if "not trained alike" in note]

    other = fedsim.run(BASE, changes=[*RETRAIN, "clients.train.lr=0.1"], root=tmp_path).path
    first = ("name=first", "split.leave_out=0", "strategy.forgetting=0", "rounds=10", "clients.train.lr=0.1")
    slow = fedsim.run(BASE, changes=first, root=tmp_path).path
    later = ("name=later", "strategy.training=0", f"strategy.from_run={slow}", "rounds=6")
    again = fedsim.run(BASE, changes=later, root=tmp_path).path
    assert told(runs[0], runs[1]) == told(again, other) == []
    for path, one in ((runs[0], other), (again, runs[1])):
        (note,) = told(path, one)
        assert "clients.train is {" in note and "'lr': 0.1" in note and "'lr': 0.2" in note and "sample" not in note


def test_a_run_that_is_not_done_is_noted(runs, tmp_path):
    early = fedsim.run(BASE, changes=("rounds=13",), root=tmp_path).path
    for path, expected in ((runs[0], 0), (early, 1)):
        told = [note for note in certify(path, runs[1], shadows=0).limits if "its strategy would have gone on" in note]
        assert len(told) == expected
    assert told[0].startswith("The run is measured after 13 rounds")


def test_clients_own_test_parts_serve_where_there_is_no_common_test_set():
    changes = ("data.test=0.0", "split.test=0.5", "evaluate_every=1")
    federation = assemble(resolve(*read(BASE, changes))).federation
    about = material(federation, {})
    sizes = [len(federation.examples(client, "test")["y"]) for client in range(4)]
    assert len(about.target["y"]) + len(about.rest["y"]) == sum(sizes)
    assert set(about.target["y"].tolist()) == {1} and 1 not in about.rest["y"].tolist()


def test_a_backdoor(tmp_path):
    base = BASE | {
        "data": {"use": "digits"},
        "split": {"use": "backdoored", "label": 7, "clients": 2},
        "clients": BASE["clients"] | {"train": SGD | {"epochs": 1}},
    }
    gone = fedsim.run(base, root=tmp_path)
    clean = fedsim.run(
        base, changes=("name=clean", "split.poisoned=false", "strategy.forgetting=0", "rounds=10"), root=tmp_path
    )
    other = ("split.poisoned=false", "strategy.training=1", "strategy.forgetting=0", "split.validation=0.5")
    with pytest.raises(ConfigError, match="against: its split is .*, with poisoned = false"):
        certify(gone.path, fedsim.run(base, changes=other, root=tmp_path).path)
    found = certify(gone.path, clean.path, shadows=0)
    assert found.models["before"]["attack_success"] > 0.8 > 0.2 > found.models["retrained"]["attack_success"]
    assert found.models["after"]["attack_success"] < found.models["before"]["attack_success"]
    assert found.checks[0].name == "backdoor success" and found.asked == ("stamped copies of class 7",)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("seed=4",), "against: its seed is 4, and that of the run is 3"),
        (("data.features=7",), "against: its data is"),
        (("split.leave_out=0", "strategy.forgetting=1"), "with leave_out = 1"),
        (("split.requests=[{class=2}]",), "with leave_out = 1"),
    ],
)
def test_what_does_not_belong_together_is_refused(runs, tmp_path, changes, message):
    other = fedsim.run(BASE, changes=[*RETRAIN, *changes], root=tmp_path)
    with pytest.raises(ConfigError, match=message):
        certify(runs[0], other.path)


def test_what_else_is_refused(runs, tmp_path):
    with pytest.raises(ConfigError, match="shadows must be 0, or an even number of at least 4, got 3"):
        certify(*runs, shadows=3)
    with pytest.raises(ValueError, match="plain_rounds must be >= 0"):
        certify(*runs, plain_rounds=-1)
    with pytest.raises(FileNotFoundError, match="is no run, nor does it hold one"):
        certify(tmp_path, runs[1])
    plain = {"split": {"use": "divide"}, "strategy": {"use": "fedavg"}, "rounds": 1, "clients": {"train": SGD}}
    path = fedsim.run(BASE | plain, root=tmp_path).path
    with pytest.raises(ConfigError, match="run: its split is .* which names nothing to forget"):
        certify(path, path)


def test_on_the_command_line(runs):
    run, against = map(str, runs)
    told = CliRunner().invoke(app, ["certify", run, "--against", against, "--shadows", "0"])
    assert told.exit_code == 0 and "holds  difference in accuracy on the target: 0.0000, at most 0.02" in told.output
    assert "s if retrained" in told.output
    wrong = CliRunner().invoke(app, ["certify", run, "--against", str(Path(run) / "nowhere")])
    assert wrong.exit_code == 2


def test_a_damaged_certificate_is_told(runs, tmp_path):
    run = fedsim.run(BASE, changes=("rounds=1",), root=tmp_path).path
    (run / FILE).write_text('{"asked": 3}')
    with pytest.raises(ValueError, match=r"certificate.json is damaged"):
        write_report(run)
    with pytest.raises(ValueError, match=r"certificate.json is damaged"):
        read_certificate(run)
    assert read_certificate(tmp_path) is None
