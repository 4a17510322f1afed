"""This project as a Flower app: on real nodes over TLS, and on Flower's simulation, as in one process."""

import json
import shutil
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import fedsim

ROOT = Path(__file__).parents[2]
EXPERIMENT = "experiments/fedavg/digits.toml"
NODES = 2
KILLED_AFTER = 2  # rounds
CHANGES = [f"rounds={KILLED_AFTER}", f"evaluate_every={KILLED_AFTER}"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A copy of what belongs to the app, and nothing that was left in the folder."""
    folder = tmp_path_factory.mktemp("project")
    for package in ("fedsim", "strategies", "clients", "experiments"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / file, folder)
    return folder


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The metrics of the same experiment in this process."""
    metrics = fedsim.run(EXPERIMENT, changes=CHANGES, root=tmp_path_factory.mktemp("here")).metrics
    assert {"train/loss", "test/accuracy", "clients/accuracy", "bytes_up"} <= metrics[-1].keys()
    assert metrics[-1]["train/loss"] < 0.9 * metrics[0]["train/loss"]  # so each round matters
    return metrics


@pytest.fixture
def nodes(deployment):
    """The names of the nodes of a deployment, all of which can be reached."""
    return deployment.ensure(NODES)


class Bereft(NamedTuple):
    """What a run leaves behind that lost a node on its way, and what was said."""

    lines: list[dict[str, Any]]
    failures: list[dict[str, Any]]
    report: Path
    nodes: list[str]
    said: str


@pytest.fixture(scope="module")
def bereft(deployment, poll, project, tmp_path_factory):
    """A run of which one of two nodes is killed after some rounds, and which then takes two more without it."""
    nodes, out = deployment.ensure(NODES), tmp_path_factory.mktemp("bereft")

    def kill_one(run):
        poll(lambda: run.poll() is not None or len(lines(out)) == KILLED_AFTER, "end of the last whole round", 300)
        deployment.programs.kill(nodes[1])

    changes = f"rounds={KILLED_AFTER + 2};evaluate_every={KILLED_AFTER}"
    said = deployment.run(project, kill_one, experiment=EXPERIMENT, set=changes, out=str(out))
    (path,) = out.glob("*/*")
    return Bereft(lines(out), lines(out, "failures.jsonl"), path / "report" / "index.html", nodes, said)


def lines(out, name="metrics.jsonl"):
    """The lines of a file of the one run that was written there."""
    files = list(Path(out).glob(f"*/*/{name}"))
    assert len(files) <= 1
    return [json.loads(line) for line in files[0].read_text().splitlines()] if files else []


def numbers(metrics):
    """round and name -> number, of all but the time it took."""
    return {(line["round"], name): value for line in metrics for name, value in line.items() if name != "seconds"}


def test_all_that_the_project_needs_travels_to_the_nodes(simulation, project):
    simulation.programs.ask("flwr", "build", "--app", project)
    (built,) = (simulation.programs.folder / "user").glob("*.fab")
    with zipfile.ZipFile(built) as archive:
        travels = set(archive.namelist())
    needed = {path.relative_to(project).as_posix() for path in project.rglob("*") if path.is_file()}
    assert "fedsim/apps.py" in needed
    # What only type checkers and readers look for.
    assert needed - travels == {"fedsim/py.typed", "experiments/benchmarks/systems.svg"}


def test_the_link_speaks_tls_alone_and_is_known_by_its_authority(deployment):
    assert deployment.answers()
    assert not deployment.answers(scheme="http")
    assert not deployment.answers(trusted=deployment.folder / "other.pem")


def test_a_node_whose_key_nobody_registered_is_refused(deployment, nodes):
    stranger = deployment.start("stranger", 1, NODES, registered=False)
    assert stranger.wait(60) != 0
    assert "Failed to activate SuperNode" in deployment.programs.log("stranger").read_text()
    assert deployment.online() == len(nodes)


def test_two_nodes_over_tls_give_the_metrics_of_one_process(deployment, bereft, expected):
    assert numbers(bereft.lines[: len(expected)]) == pytest.approx(numbers(expected), rel=1e-5), bereft.said
    for name in bereft.nodes:  # each of them had the project, so did some of the work
        assert list((deployment.folder / name / "apps").iterdir())


def test_a_node_that_is_killed_costs_its_clients_and_not_the_run(bereft):
    *before, last, first, second = bereft.lines
    assert [line["failed"] for line in (*before, last)] == [0] * KILLED_AFTER
    assert [line["round"] for line in (first, second)] == [KILLED_AFTER + 1, KILLED_AFTER + 2], bereft.said
    for line in (first, second):  # of two nodes, that with partition-id 1 has the clients with odd numbers
        found = [failure for failure in bereft.failures if failure["round"] == line["round"]]
        assert {failure["client"] % NODES for failure in found} == {1}
        lost = [failure for failure in found if not failure["reason"].startswith("evaluating: ")]
        assert line["failed"] == len(lost) > 0
        assert line["clients"] == last["clients"] - len(lost) > 0
    assert "clients/accuracy" in second  # of those that are left
    assert bereft.report.is_file()


def test_flowers_simulation_gives_the_metrics_of_one_process(simulation, project, expected, tmp_path):
    said = simulation.run(project, 4, experiment=EXPERIMENT, set=";".join(CHANGES), out=str(tmp_path))
    assert numbers(lines(tmp_path)) == pytest.approx(numbers(expected), rel=1e-5), said
    assert list(tmp_path.glob("*/*/report/index.html"))
