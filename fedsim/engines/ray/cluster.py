"""Cluster: which Ray the workers run on, and whether there is room for them."""

import math
import os
import sys
from pathlib import Path

import ray
from ray import cloudpickle

PLUGIN = "fedsim_plugin_"  # what names of modules begin with that were loaded from plug-in files
OURS = ("fedsim", "strategies", "clients")


def attach(address: str | None, cpus: float) -> bool:
    """Connects to a running cluster, or starts one on this machine; whether this is to be undone in the end.

    A Ray to which this process is connected already is used as it is, and stays.

    Raises:
        ConnectionError: there is no cluster at this address.
    """
    if ray.is_initialized():
        return False
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # what will be the default; Ray warns until then
    if address is not None:
        try:
            ray.init(address=address, log_to_driver=False, configure_logging=False)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ConnectionError(f"no Ray cluster at {address}: {error}") from error
        return True
    ray.init(
        address="local",  # never somebody else's that happens to run here
        num_cpus=max(1, math.ceil(cpus)),
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
    )
    return True


def check_room(workers: int, cpus: float, gpus: float) -> None:
    """Raises where the cluster cannot place even one worker, or not as many as asked for."""
    there = ray.cluster_resources()  # type: ignore[no-untyped-call]
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    fits = sum(int(min(_times(node, "CPU", cpus), _times(node, "GPU", gpus))) for node in nodes)
    if fits < workers:
        has = f"{there.get('CPU', 0):g} CPUs and {there.get('GPU', 0):g} GPUs on {len(nodes)} nodes"
        raise RuntimeError(
            f"no room for {workers} workers with {cpus:g} CPUs and {gpus:g} GPUs each: the cluster has {has}, "
            f"which is enough for {fits}"
        )


def _times(resources: dict[str, float], name: str, each: float) -> float:
    """How often this much of a resource is there."""
    return float("inf") if not each else resources.get(name, 0.0) / each + 1e-9


def surroundings() -> dict[str, dict[str, str]]:
    """What a worker's process is given: it finds the modules that this one finds."""
    path = os.pathsep.join(folder or os.getcwd() for folder in sys.path)
    # With the second, cuBLAS gives the same bits every time; without a GPU nobody reads it.
    return {"env_vars": {"PYTHONPATH": path, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}}


def carry_plugins() -> None:
    """Has modules that were loaded from plug-in files travel by value, and those that lie beside them.

    Workers cannot import them, at least not on another machine.
    """
    for name in travelling():
        cloudpickle.register_pickle_by_value(sys.modules[name])  # type: ignore[no-untyped-call]


def travelling() -> dict[str, Path]:
    """The modules that were loaded from plug-in files, and those that lie beside them: name -> file."""
    modules = list(sys.modules.items())
    files = {name: Path(file) for name, module in modules if (file := getattr(module, "__file__", None))}
    folders = {file.parent for name, file in files.items() if name.startswith(PLUGIN)}
    beside = {
        name
        for name, file in files.items()
        if any(folder in file.parents for folder in folders) and not _installed(name, file)
    }
    return {name: file for name, file in files.items() if name.startswith(PLUGIN) or name in beside}


def _installed(name: str, file: Path) -> bool:
    """Whether a module is there wherever fedsim is."""
    return name.split(".")[0] in OURS or Path(sys.prefix) in file.parents or "site-packages" in file.parts
