"""The compose files, as compose reads them: rights, limits, networks, and what the variables change."""

import pytest

from .conftest import GPU, RAY

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
