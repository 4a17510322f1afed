"""The compose files, as compose reads them: rights, limits, networks, and what the variables change."""

import pytest

from .conftest import FLOWER, GPU, INSECURE, OPEN, RAY

pytestmark = pytest.mark.docker


def engine(config):
    """What the driver says of its engine."""
    (said,) = (word for word in config["services"]["driver"]["command"] if word.startswith("engine="))
    return said


@pytest.mark.parametrize("files", [(RAY,), (RAY, GPU)])
def test_every_service_has_few_rights_and_limits(configured, files):
    found = configured(*files)
    assert found["services"].keys() == {"head", "worker", "driver"}
    for name, service in found["services"].items():
        assert service["read_only"] and service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"] and "privileged" not in service, name
        assert "user" not in service and "ports" not in service and service["networks"].keys() == {"ray"}, name
        assert service["pull_policy"] == "never", name
        limits = service["deploy"]["resources"]["limits"]
        assert float(limits["cpus"]) > 0 and int(limits["memory"]) > int(service["shm_size"]) > 0, name
    assert found["networks"]["ray"]["internal"]


def test_data_are_read_only_and_only_the_driver_has_them(configured):
    services = configured(RAY)["services"]
    data, runs = services["driver"]["volumes"]
    assert data["target"] == "/data" and data["read_only"]
    assert runs["target"] == "/home/fedsim/runs" and not runs.get("read_only")
    assert "volumes" not in services["head"] and "volumes" not in services["worker"]
    named = configured(RAY, FEDSIM_DATA="/some/data", FEDSIM_RUNS="/some/runs")["services"]["driver"]["volumes"]
    assert [(each["type"], each["source"]) for each in named] == [("bind", "/some/data"), ("bind", "/some/runs")]


def test_who_waits_for_whom(configured):
    services = configured(RAY)["services"]
    waits = {name: set(service.get("depends_on", ())) for name, service in services.items()}
    assert waits == {"head": set(), "worker": {"head"}, "driver": {"head", "worker"}}
    conditions = {each["condition"] for service in services.values() for each in service.get("depends_on", {}).values()}
    assert conditions == {"service_healthy"}


def test_what_variables_change(configured):
    found = configured(RAY)
    assert engine(found) == 'engine={use="ray", address="head:6379", workers=2}'
    assert found["services"]["driver"]["command"][-1] == "fedavg/digits"
    found = configured(RAY, WORKERS="3", EXPERIMENT="fedavg/adult --set rounds=5 --seeds 0 1", WORKER_MEMORY="5g")
    assert "workers=3}" in engine(found) and found["services"]["worker"]["deploy"]["replicas"] == 3
    assert found["services"]["driver"]["command"][-6:] == ["fedavg/adult", "--set", "rounds=5", "--seeds", "0", "1"]
    assert int(found["services"]["worker"]["deploy"]["resources"]["limits"]["memory"]) == 5 * 2**30
    assert "workers=8}" in engine(configured(RAY, WORKERS="2", ENGINE_WORKERS="8", WORKER_CPUS="4"))


def test_the_overlay_reserves_gpus_and_gives_each_worker_its_share(configured):
    found = configured(RAY, GPU)
    worker = found["services"]["worker"]["deploy"]
    (device,) = worker["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"] and device["driver"] == "nvidia" and device["count"] == -1  # all
    assert worker["replicas"] == 1 and engine(found).endswith("workers=4, gpus=0.25}")
    found = configured(RAY, GPU, WORKER_GPUS="2", ENGINE_WORKERS="6", ENGINE_GPUS="0.3")
    assert found["services"]["worker"]["deploy"]["resources"]["reservations"]["devices"][0]["count"] == 2
    assert engine(found).endswith("workers=6, gpus=0.3}")
    assert "devices" not in configured(RAY)["services"]["worker"]["deploy"]["resources"].get("reservations", {})


NODES = ("supernode-0", "supernode-1", "supernode-2")
FEDERATION = {"superlink", "register", "runner", *NODES}


def places(service):
    """Where a container has what of the host or of a volume, and whether it may be written."""
    return {each["target"]: (each.get("source"), each.get("read_only", False)) for each in service["volumes"]}


@pytest.mark.parametrize("files", [(FLOWER,), (FLOWER, INSECURE), (FLOWER, OPEN)])
def test_every_service_of_a_federation_has_few_rights_and_limits(configured, files):
    found = configured(*files)
    assert found["services"].keys() == FEDERATION
    for name, service in found["services"].items():
        assert service["read_only"] and service["cap_drop"] == ["ALL"] and service["user"] == "1000", name
        assert service["security_opt"] == ["no-new-privileges:true"] and "privileged" not in service, name
        assert service["pull_policy"] == "never", name
        limits = service["deploy"]["resources"]["limits"]
        assert float(limits["cpus"]) > 0 and int(limits["memory"]) > 0, name
        if name in ("register", "runner"):
            assert service["network_mode"] == "service:superlink" and "networks" not in service, name
        elif name != "superlink" or OPEN not in files:
            assert service["networks"].keys() == {"flower"}, name
    assert found["networks"]["flower"]["internal"]


def test_nothing_is_published_but_the_superlink_where_it_is_opened_and_to_this_machine_unless_told(configured):
    assert not [name for name, each in configured(FLOWER)["services"].items() if "ports" in each]
    found = configured(FLOWER, OPEN)["services"]
    assert [name for name, each in found.items() if "ports" in each] == ["superlink"]
    (port,) = found["superlink"]["ports"]
    assert (port["host_ip"], port["published"], port["target"]) == ("127.0.0.1", "8000", 8000)
    (port,) = configured(FLOWER, OPEN, PUBLISH="10.0.0.1", PORT="443")["services"]["superlink"]["ports"]
    assert (port["host_ip"], port["published"], port["target"]) == ("10.0.0.1", "443", 8000)


def test_each_container_has_its_part_of_the_keys_and_a_node_its_own_data(configured):
    data = {"FEDSIM_DATA": "/the/link"} | {f"FEDSIM_DATA_{number}": f"/the/node-{number}" for number in range(3)}
    services = configured(FLOWER, FEDSIM_KEYS="/the/keys", FEDSIM_RUNS="/the/runs", **data)["services"]
    for number, name in enumerate(NODES):
        there = {"/keys": (f"/the/keys/{name}", True), "/data": (f"/the/node-{number}", True)}
        assert places(services[name]) == there
    runs = {"/home/fedsim/runs": ("/the/runs", False)}
    link = {"/keys": ("/the/keys/superlink", True), "/data": ("/the/link", True)}
    assert places(services["superlink"]) == link | runs
    assert places(services["runner"]) == {"/keys": ("/the/keys/public", True)} | runs
    assert places(services["register"]) == {"/keys": ("/the/keys/public", True)}


def test_no_command_of_a_federation_is_insecure_but_those_of_the_overlay(configured):
    def insecure(*files):
        said = {
            name: [*each["entrypoint"], *(each.get("command") or ())]
            for name, each in configured(*files)["services"].items()
        }
        return {name for name, words in said.items() if "--insecure" in words}

    assert insecure(FLOWER) == insecure(FLOWER, OPEN) == set()
    assert insecure(FLOWER, INSECURE) == FEDERATION - {"register"}
    command = configured(FLOWER)["services"]["superlink"]["command"]
    assert "--enable-supernode-auth" in command
    for service in configured(FLOWER, INSECURE)["services"].values():
        assert places(service)["/keys"] == (None, False)  # nothing of the host, so none need be there


def test_which_node_is_which_and_what_a_runner_runs(configured):
    for nodes in ("3", "5"):
        services = configured(FLOWER, NODES=nodes, EXPERIMENT="fedavg/adult --set rounds=5")["services"]
        for number, name in enumerate(NODES):
            assert f"--node-config=partition-id={number} num-partitions={nodes}" in services[name]["entrypoint"]
        assert services["runner"]["command"] == ["fedavg/adult", "--set", "rounds=5"]
    waits = {name: set(service.get("depends_on", ())) for name, service in configured(FLOWER)["services"].items()}
    assert waits["runner"] - {"superlink"} == set(NODES) and waits["register"] == {"superlink"}
    assert all(waits[name] == {"register"} for name in NODES)
