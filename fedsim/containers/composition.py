"""Compositions: what the compose files in docker/ would start, as compose itself reads them."""

import errno
import json
import os
import re
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fedsim.config import ConfigError
from fedsim.containers.docker import DockerError, docker
from fedsim.report.formats import amount, several

# In a wheel they lie inside of fedsim, in a checkout beside it.
FOLDERS = (Path(__file__).parents[1] / "docker", Path(__file__).parents[2] / "docker")
EXPERIMENT = "EXPERIMENT"  # what the files have a variable for, and stands in its place until the words are there


class Composition(NamedTuple):
    """A compose file, and what is to be known of it.

    Its variables EXPERIMENT, FEDSIM_IMAGE and WORKERS say what runs, in which image, and how many work; the runs are at
    RUNS of the service that runs the experiment, in a volume.
    """

    file: str
    service: str  # the one that runs the experiment, and ends with its exit code
    worker: str  # what the names of those that work begin with
    data: tuple[str, ...]  # the variables for the folder with the data sets
    before: str = ""  # the service that makes certificates and keys in the folder FEDSIM_KEYS of the user FEDSIM_USER
    nodes: bool = False  # whether no file travels to those that work, who keep what is their own


COMPOSITIONS = {
    "ray": Composition("compose.ray.yaml", "driver", "worker", ("FEDSIM_DATA",)),
    "flower": Composition(
        "compose.flower.yaml",
        "runner",
        "supernode",
        ("FEDSIM_DATA", "FEDSIM_DATA_0", "FEDSIM_DATA_1", "FEDSIM_DATA_2"),
        before="certify",
        nodes=True,
    ),
}
RUNS = "/home/fedsim/runs"


class Service(NamedTuple):
    """A service as compose would start it."""

    name: str
    copies: int
    memory: int  # bytes that each copy may use; 0: no limit
    command: list[str]
    ports: list[tuple[str, int, str]]  # address and number on this machine, and the protocol


def path(composition: Composition) -> Path:
    """Where the compose file is; raises ConfigError where it is missing."""
    for folder in FOLDERS:
        if (folder / composition.file).is_file():
            return folder / composition.file
    raise ConfigError(f"{composition.file} is not part of this installation of fedsim: install it anew")


def variables(composition: Composition, image: str, workers: int | None, data: Path | None) -> dict[str, str]:
    """The environment in which compose reads its file: what is yours, such as WORKER_MEMORY, and what is launch's."""
    ours = {"EXPERIMENT", "WORKERS", "FEDSIM_RUNS", *composition.data}
    yours = {name: value for name, value in os.environ.items() if not name.startswith("COMPOSE_") and name not in ours}
    found = {"EXPERIMENT": EXPERIMENT, "FEDSIM_IMAGE": image, "FEDSIM_USER": str(os.getuid())}
    found |= {} if workers is None else {"WORKERS": str(workers)}
    return yours | found | ({} if data is None else dict.fromkeys(composition.data, str(data)))


def services(file: Path, env: Mapping[str, str]) -> list[Service]:
    """What a compose file would start.

    Raises:
        ConfigError: compose cannot read it with these variables.
    """
    try:
        read = json.loads(docker("compose", "--file", str(file), "config", "--format", "json", env=env))
    except DockerError as error:
        raise ConfigError(f"{file}, with the variables that are set here, is not right. Docker says: {error}") from None
    return [_service(name, table) for name, table in read["services"].items()]


def _service(name: str, table: Mapping[str, Any]) -> Service:
    deploy = table.get("deploy") or {}
    limits = (deploy.get("resources") or {}).get("limits") or {}
    published = [port for port in table.get("ports") or () if str(port.get("published", "")).isdigit()]
    return Service(
        name,
        int(deploy.get("replicas", table.get("scale", 1))),
        int(limits.get("memory", table.get("mem_limit", 0))),
        list(table.get("command") or ()),
        [(port.get("host_ip", ""), int(port["published"]), port.get("protocol", "tcp")) for port in published],
    )


def told(parts: list[Service], apart: str) -> str:
    """All services but one in words: "1 head and 4 workers"."""
    counted = [several(part.copies, part.name) for part in parts if part.name != apart]
    return " and ".join(filter(None, [", ".join(counted[:-1]), *counted[-1:]]))


def check_workers(composition: Composition, parts: list[Service], workers: int | None) -> None:
    """Raises ConfigError where not as many would work as were asked for."""
    there = sum(part.copies for part in parts if part.name.startswith(composition.worker))
    if workers not in (None, there):
        raise ConfigError(
            f"--workers {workers}: {composition.file} has {several(there, composition.worker)}, whose number is fixed"
        )


def check_memory(file: Path, parts: list[Service], there: int) -> None:
    """Raises ConfigError where all together may use more memory than the engine has."""
    needed = sum(part.copies * part.memory for part in parts)
    if needed <= there:
        return
    each = [f"{part.copies} x {part.name} {amount(part.memory)}" for part in parts if part.memory]
    raise ConfigError(
        f"not enough memory: {' + '.join(each)} may use {amount(needed)} together, and the Docker engine has "
        f"{amount(there)}: take fewer --workers, or set lower limits ({', '.join(limits(file))})"
    )


def limits(file: Path) -> list[str]:
    """The variables that say how much memory the services of a compose file may use."""
    return sorted(set(re.findall(r"\$\{(\w+_MEMORY)\b", file.read_text(encoding="utf-8"))))


def check_ports(parts: list[Service]) -> None:
    """Raises ConfigError where a port that is to be published is in use on this machine."""
    for part in parts:
        for address, number, protocol in part.ports:
            if _taken(address, number, protocol):
                raise ConfigError(
                    f"port {number} is in use on this machine, and {part.name} is to be reached at it: end what "
                    "listens there (`docker ps` shows whether it is a container), or have another port published"
                )


def _taken(address: str, number: int, protocol: str) -> bool:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM if protocol == "udp" else socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # what has ended does not count
        try:
            probe.bind((address, number))
        except OSError as error:
            return error.errno == errno.EADDRINUSE
    return False
