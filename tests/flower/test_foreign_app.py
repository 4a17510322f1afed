"""A Flower app that knows nothing of fedsim gives on our engine what it gives on Flower's simulation."""

import importlib
import json
import sys
import tomllib

import pytest
from flwr.clientapp import ClientApp
from typer.testing import CliRunner

from fedsim import cli

NODES = 4
PARTS = ("train_metrics_clientapp", "evaluate_metrics_clientapp", "evaluate_metrics_serverapp")


class Overheard(ClientApp):
    """Another ClientApp, and what reached it: type, round and partition of each message."""

    def __init__(self, app):
        super().__init__()
        self.app, self.heard = app, []

    def __call__(self, message, context):
        number, partition = message.content["config"]["server-round"], context.node_config["partition-id"]
        self.heard.append((message.metadata.message_type, number, partition))
        return self.app(message, context)


@pytest.fixture
def play(quickstart, monkeypatch):
    """Runs the app on our engine; gives the outcome, and what the clients were asked."""
    from fedsim.flower import run

    monkeypatch.setattr(sys, "path", [str(quickstart), *sys.path])
    server, client = (importlib.import_module(f"digits_quickstart.{side}_app").app for side in ("server", "client"))
    defaults = tomllib.loads((quickstart / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]

    def call(num_nodes=NODES, seed=0, **config):
        listening = Overheard(client)
        changed = {key.replace("_", "-"): value for key, value in config.items()}
        outcome = run(server, listening, num_nodes=num_nodes, seed=seed, run_config=defaults | changed)
        return outcome, listening.heard

    return call


@pytest.fixture(scope="module")
def simulated(quickstart, simulation, tmp_path_factory):
    """What the app measures on Flower's simulation."""
    path = tmp_path_factory.mktemp("simulated") / "result.json"
    said = simulation.run(quickstart, NODES, **{"result-path": str(path), "min-available-nodes": NODES})
    assert path.exists(), said
    return json.loads(path.read_text())


def measured(outcome):
    """What an outcome tells, in the form in which the app writes it down."""
    told = {part: {n: dict(record) for n, record in getattr(outcome.result, part).items()} for part in PARTS}
    return json.loads(json.dumps(told))


def named(told):
    """part, round and name -> number."""
    return {
        (part, int(number), name): value
        for part, rounds in told.items()
        for number, record in rounds.items()
        for name, value in record.items()
    }


def bits(outcome):
    return {name: array.data for name, array in outcome.result.arrays.items()}


def drawn(heard, kind="train"):
    """Who was asked, round by round."""
    rounds = {number for asked, number, _ in heard if asked == kind}
    return [[who for asked, n, who in heard if (asked, n) == (kind, number)] for number in sorted(rounds)]


@pytest.mark.slow
def test_the_app_measures_on_our_engine_what_it_measures_on_flowers_simulation(simulated, play):
    outcome, _ = play()
    assert not outcome.failed
    assert {part: len(rounds) for part, rounds in simulated.items()} == dict(zip(PARTS, (3, 3, 4), strict=True))
    assert named(measured(outcome)) == pytest.approx(named(simulated), rel=1e-5)


@pytest.mark.slow
def test_other_local_work_would_have_been_noticed(simulated, play):
    outcome, _ = play(learning_rate=0.101)
    assert named(measured(outcome)) != pytest.approx(named(simulated), rel=1e-5)


@pytest.mark.slow
def test_the_command_line_runs_the_app_in_its_folder(simulated, quickstart, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "result.json"
    command = ["run", "--flower-app", str(quickstart), "--num-nodes", str(NODES)]
    command += ["--set", f"result-path={path}", "--set", f"min-available-nodes={NODES}"]
    done = CliRunner().invoke(cli.app, command)
    assert done.exit_code == 0, done.output
    assert named(json.loads(path.read_text())) == pytest.approx(named(simulated), rel=1e-5)


def test_it_learns_what_there_is_to_learn(play):
    outcome, _ = play()
    first, *_, last = outcome.result.evaluate_metrics_serverapp.values()
    assert first["accuracy"] < 0.3  # ten digits, nothing learned yet
    assert last["accuracy"] > 0.9


def test_every_node_has_a_part_of_the_data_of_its_own_and_takes_part(play):
    _, heard = play(num_server_rounds=2)
    for kind in ("train", "evaluate"):
        assert [sorted(round) for round in drawn(heard, kind)] == [list(range(NODES))] * 2


def test_the_same_seed_draws_the_same_nodes_and_gives_the_same_bits(play):
    half = {"num_nodes": 8, "fraction_train": 0.5, "local_epochs": 1}
    (one, asked), (two, again) = play(seed=3, **half), play(seed=3, **half)
    assert [len(round) for round in drawn(asked)] == [4, 4, 4]
    assert asked == again
    assert bits(one) == bits(two) and measured(one) == measured(two)


def test_another_seed_draws_other_nodes(play):
    half = {"num_nodes": 8, "fraction_train": 0.5, "local_epochs": 1}
    (one, asked), (two, again) = play(seed=3, **half), play(seed=4, **half)
    assert drawn(asked) != drawn(again)
    assert bits(one) != bits(two)


def test_the_app_writes_nothing_unless_it_is_told_to(play, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    play(num_server_rounds=1)
    assert not list(tmp_path.iterdir())
    play(num_server_rounds=1, result_path=str(tmp_path / "result.json"))
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
