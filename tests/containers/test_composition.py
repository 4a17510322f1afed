"""What compose files would start, and whether there is room for it."""

import json
import os
import shutil
import socket
import subprocess

import pytest

from fedsim.config import ConfigError
from fedsim.containers import composition as compositions
from fedsim.containers.composition import COMPOSITIONS, Service, changes, check_memory, check_ports, scaled

RAY = COMPOSITIONS["ray"]
GB = 10**9
PARTS = [
    Service("head", 1, 2 * GB, [], []),
    Service("driver", 1, 3 * GB, [], []),
    Service("worker", 4, 2 * GB, [], []),
]


@pytest.fixture
def compose():
    if (
        shutil.which("docker") is None
        or subprocess.run(["docker", "compose", "version"], capture_output=True).returncode
    ):
        pytest.skip("there is no `docker compose` here")


def test_memory_is_enough_if_all_have_their_limits_and_not_a_byte_less():
    needed = (2 + 3 + 4 * 2) * GB
    check_memory(compositions.path(RAY), PARTS, needed)
    with pytest.raises(ConfigError) as told:
        check_memory(compositions.path(RAY), PARTS, needed - 1)
    assert "4 x worker 2 GB" in str(told.value) and "13 GB" in str(told.value)
    assert "(DRIVER_MEMORY, HEAD_MEMORY, WORKER_MEMORY)" in str(told.value)


def test_a_service_without_a_limit_needs_nothing():
    check_memory(compositions.path(RAY), [Service("any", 9, 0, [], [])], 0)


def overlaid(tmp_path, number):
    """The services of Flower's file with so many nodes, as compose reads it with what launch lays over it."""
    flower, file, keys = COMPOSITIONS["flower"], compositions.path(COMPOSITIONS["flower"]), tmp_path / "keys"
    env = compositions.variables(flower, "image", number, tmp_path) | {"FEDSIM_KEYS": str(keys)}
    before = compositions.services(file, env)
    after = scaled(flower, before, number)
    overlay = tmp_path / "overlay.json"
    overlay.write_text(json.dumps({"services": changes(flower, file, before, after, keys)}))
    command = ["docker", "compose", "--file", str(file), "--file", str(overlay), "config", "--format", "json"]
    read = json.loads(subprocess.run(command, env=env, capture_output=True, check=True).stdout)["services"]
    return read, after


@pytest.mark.parametrize("number", [1, 2, 3, 5])
def test_there_are_as_many_nodes_as_asked_for(compose, tmp_path, number):
    read, after = overlaid(tmp_path, number)
    names = {f"supernode-{each}" for each in range(number)}
    assert {name for name in read if name.startswith("supernode")} == names
    assert {part.name for part in after} == read.keys()
    waits = read["runner"]["depends_on"]
    assert {name for name in waits if waits[name]["required"] and name.startswith("supernode")} == names
    for place, name in enumerate(sorted(names)):
        assert any(f"partition-id={place} num-partitions={number}" in word for word in read[name]["entrypoint"])
        sources = {volume["target"]: volume["source"] for volume in read[name]["volumes"]}
        assert sources == {"/keys": str(tmp_path / "keys" / name), "/data": str(tmp_path)}
        same = ("image", "command", "user", "read_only", "cap_drop", "networks", "deploy", "healthcheck", "depends_on")
        assert all(read[name][key] == read["supernode-0"][key] for key in same)


def test_workers_of_one_service_are_no_nodes():
    assert scaled(RAY, PARTS, 5) == PARTS
    assert changes(RAY, compositions.path(RAY), PARTS, PARTS, compositions.path(RAY)) == {}


@pytest.mark.parametrize("address", ["", "0.0.0.0", "127.0.0.1"])
def test_a_port_is_in_use_as_long_as_somebody_listens(address):
    with socket.create_server(("127.0.0.1", 0)) as listening:
        number = listening.getsockname()[1]
        parts = [Service("link", 1, 0, [], [(address, number, "tcp")])]
        with pytest.raises(ConfigError, match=f"port {number} is in use on this machine, and link"):
            check_ports(parts)
        check_ports([Service("link", 1, 0, [], [(address, number, "udp")])])
    check_ports(parts)


def test_the_words_for_what_is_started():
    assert compositions.told(PARTS, "driver") == "1 head and 4 workers"
    assert compositions.told([*PARTS, Service("link", 1, 0, [], [])], "driver") == "1 head, 4 workers and 1 link"


def test_variables_that_say_what_runs_are_launchs_and_others_are_yours(monkeypatch, tmp_path):
    for name in ("EXPERIMENT", "FEDSIM_RUNS", "FEDSIM_DATA", "WORKERS", "COMPOSE_FILE", "WORKER_MEMORY"):
        monkeypatch.setenv(name, "yours")
    found = compositions.variables(RAY, "image", 4, None)
    assert found.keys().isdisjoint({"FEDSIM_RUNS", "FEDSIM_DATA", "COMPOSE_FILE"})
    assert (found["WORKER_MEMORY"], found["WORKERS"], found["FEDSIM_IMAGE"]) == ("yours", "4", "image")
    assert "WORKERS" not in compositions.variables(RAY, "image", None, None)  # as the file has it
    flower = compositions.variables(COMPOSITIONS["flower"], "image", None, tmp_path)
    assert all(flower[name] == str(tmp_path) for name in COMPOSITIONS["flower"].data)


@pytest.mark.parametrize("where", COMPOSITIONS)
def test_compose_reads_a_file_as_launch_does(compose, where):
    chosen = COMPOSITIONS[where]
    parts = compositions.services(compositions.path(chosen), compositions.variables(chosen, "image", None, None))
    (runner,) = (part for part in parts if part.name == chosen.service)
    assert compositions.EXPERIMENT in runner.command
    assert all(part.memory > 0 for part in parts)
    assert any(part.name.startswith(chosen.worker) for part in parts)
    text = compositions.path(chosen).read_text()
    assert all(f"${{{name}:-" in text for name in (*chosen.data, "FEDSIM_IMAGE", "FEDSIM_RUNS", "EXPERIMENT"))
    assert f":{compositions.RUNS}" in text


def test_workers_are_as_many_as_asked_for(compose):
    for number in (1, 4):
        parts = compositions.services(compositions.path(RAY), compositions.variables(RAY, "image", number, None))
        assert {part.name: part.copies for part in parts} == {"head": 1, "driver": 1, "worker": number}
        assert any(f"workers={number}}}" in word for part in parts for word in part.command)


def test_published_ports_are_found_in_a_file(compose, tmp_path):
    file = tmp_path / "compose.yaml"
    with socket.create_server(("127.0.0.1", 0)) as listening:
        number = listening.getsockname()[1]
        ports = f"['127.0.0.1:{number}:8000', '9000']"  # the second one is chosen by Docker
        file.write_text(f"name: x\nservices: {{link: {{image: y, ports: {ports}, mem_limit: 1g}}}}\n")
        (link,) = compositions.services(file, os.environ)
        assert link.ports == [("127.0.0.1", number, "tcp")]
        assert link.memory == 2**30
        with pytest.raises(ConfigError, match=f"port {number} is in use"):
            check_ports([link])


def test_a_file_that_compose_cannot_read_is_told(compose, monkeypatch):
    monkeypatch.setenv("WORKER_MEMORY", "much")
    with pytest.raises(ConfigError, match=r"(?s)compose.ray.yaml, with the variables .* is not right.*much"):
        compositions.services(compositions.path(RAY), compositions.variables(RAY, "image", 2, None))
