"""A Ray cluster of containers: the bits of the run in one process, whatever becomes of containers meanwhile."""

import json
import time

import pytest

from .conftest import Project, call

pytestmark = pytest.mark.docker
ROUNDS, KILLED_AFTER = 150, 15
CHANGES = (
    f"rounds={ROUNDS}",
    "evaluate_every=25",
    "checkpoint_every=10",
    "keep_checkpoints=all",
    "clients.train.epochs=20",  # slow enough to be killed in the middle
)
EXPERIMENT = "fedavg/digits " + " ".join(f"--set {change}" for change in CHANGES)


def measured(path):
    """All that a run found: its metrics but for the seconds, its checkpoints byte by byte, and its last evaluation."""
    metrics = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    kept = [{name: value for name, value in line.items() if name != "seconds"} for line in metrics]
    checkpoints = {file.name: file.read_bytes() for file in (path / "checkpoints").iterdir()}
    rest = {name: (path / name).read_bytes() for name in ("classes.jsonl", "clients.csv", "evaluation.json")}
    return kept, checkpoints, rest


def incidents(path):
    """What went wrong and was made good, and clients that did not answer."""
    told = [json.loads(line) for line in (path / "failures.jsonl").read_text().splitlines()]
    return [line["reason"] for line in told if line["client"] is None], [line for line in told if line["client"]]


@pytest.fixture(scope="module")
def alone(image, tmp_path_factory):
    """The run in one process, without a cluster: what `auto` runs there is what Ray's workers run by themselves."""
    place = Project(f"{image}-alone", image, {})
    changes = [word for change in CHANGES for word in ("--set", change)]
    try:
        place.compose("run", "--rm", "--no-deps", "--entrypoint", "fedsim", "driver", "run", "fedavg/digits", *changes)
        (path,) = place.fetch(tmp_path_factory.mktemp("alone"))
    finally:
        place.down()
    metrics, checkpoints, rest = measured(path)
    assert (
        "Vectorised" in (path / "environment.json").read_text() and "Ray" not in (path / "environment.json").read_text()
    )
    assert len(metrics) == ROUNDS and len(checkpoints) == ROUNDS // 10
    assert len(set(checkpoints.values())) == len(checkpoints)  # no two alike: each round matters
    return metrics, checkpoints, rest


def gone(there):
    """Whether what a function lists is empty within half a minute."""
    deadline = time.monotonic() + 30
    while found := there():
        if time.monotonic() > deadline:
            return found
        time.sleep(0.5)
    return True


def test_a_head_and_two_workers_give_the_bits_of_one_process(project, alone, tmp_path):
    cluster = project(EXPERIMENT=EXPERIMENT)
    said = cluster.compose("run", "--rm", "driver").stdout
    assert f"after {ROUNDS} rounds" in said
    (path,) = cluster.fetch(tmp_path)
    assert "workers=2" in (path / "environment.json").read_text()
    assert not (path / "failures.jsonl").exists()
    assert measured(path) == alone
    # The run is over: nobody runs clients any more, and the driver is gone.
    assert gone(cluster.ray_workers) is True
    assert cluster.compose("ps", "--all", "--services").stdout.split() == ["head", "worker"]
    cluster.down()
    assert not cluster.left()


def test_a_worker_container_killed_in_the_middle_changes_nothing(project, alone, tmp_path):
    cluster = project(EXPERIMENT=EXPERIMENT)
    cluster.begin()
    cluster.await_round(KILLED_AFTER)
    assert len(cluster.ray_workers()) == 2
    call("kill", f"{cluster.name}-worker-2")
    cluster.end()
    assert call("inspect", "--format", "{{.State.Status}}", f"{cluster.name}-worker-2").stdout.strip() == "exited"
    (path,) = cluster.fetch(tmp_path)
    told, failed = incidents(path)
    assert told and all("a worker died" in each and "replaced" in each for each in told) and not failed
    assert "cost no client its reply" in (path / "report" / "index.html").read_text()
    assert measured(path) == alone


def test_a_driver_killed_and_resumed_from_the_volume_ends_with_the_same_bits(project, alone, tmp_path):
    cluster = project(EXPERIMENT=EXPERIMENT)
    cluster.begin()
    cluster.await_round(KILLED_AFTER)
    call("kill", cluster.driver)
    (path,) = cluster.fetch(tmp_path / "before")
    assert KILLED_AFTER <= len((path / "metrics.jsonl").read_text().splitlines()) < ROUNDS
    assert list((path / "checkpoints").iterdir())
    assert gone(cluster.ray_workers) is True  # Ray ends what the driver cannot any more
    cluster.compose("run", "--rm", "driver", "resume", f"runs/{path.relative_to(tmp_path / 'before')}")
    (path,) = cluster.fetch(tmp_path / "after")
    assert not (path / "failures.jsonl").exists()
    assert measured(path) == alone


def test_a_driver_does_not_start_before_there_are_workers(project):
    cluster = project(EXPERIMENT="fedavg/digits --set rounds=1", WORKERS="1", ENGINE_WORKERS="2")
    found = cluster.compose("run", "--rm", "driver", check=False)
    assert found.returncode == 1
    assert "no room for 2 workers with 1 CPUs" in found.stderr and "enough for 1" in found.stderr


def test_nobody_outside_its_network_reaches_it(project):
    cluster = project()
    cluster.compose("up", "--detach", "--wait", "head")
    head = f"{cluster.name}-head-1"
    assert call("ps", "--filter", f"name={head}", "--format", "{{.Ports}}").stdout.strip() == ""
    (address,) = call(
        "inspect", "--format", "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}", head
    ).stdout.split()

    def reaches(network):
        code = f"import socket; socket.create_connection(({address!r}, 6379), 3)"
        where = ("run", "--rm", "--network", network, "--entrypoint", "python", cluster.image)
        return call(*where, "-c", code, check=False).returncode == 0

    assert reaches(f"{cluster.name}_ray") and not reaches("bridge")
    assert call("network", "inspect", "--format", "{{.Internal}}", f"{cluster.name}_ray").stdout.strip() == "true"
