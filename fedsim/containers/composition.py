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
Table = Mapping[str, Any]
EXPERIMENT = "EXPERIMENT"  # what the files have a variable for, and stands in its place until the words are there


class Composition(NamedTuple):
    """A compose file, and what is to be known of it.

    Its variables EXPERIMENT, FEDSIM_IMAGE and WORKERS, or NODES, say what runs, in which image, and how many work; the
    runs are at RUNS of the service that runs the experiment, in a volume.
    """

    file: str
    service: str  # the one that runs the experiment, and ends with its exit code
    worker: str  # what the names of those that work begin with
    data: tuple[str, ...]  # the variables for the folder with the data sets
    before: str = ""  # the service that makes certificates and keys in the folder FEDSIM_KEYS of the user FEDSIM_USER
    # Whether those that work are nodes: each is a service of its own, numbered from 0 on, and no file travels to it.
    nodes: bool = False


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
    entrypoint: tuple[str, ...] = ()


def path(composition: Composition) -> Path:
    """Where the compose file is; raises ConfigError where it is missing."""
    for folder in FOLDERS:
        if (folder / composition.file).is_file():
            return folder / composition.file
    raise ConfigError(f"{composition.file} is not part of this installation of fedsim: install it anew")


def variables(composition: Composition, image: str, workers: int | None, data: Path | None) -> dict[str, str]:
    """The environment in which compose reads its file: what is yours, such as WORKER_MEMORY, and what is launch's."""
    ours = {"EXPERIMENT", "WORKERS", "NODES", "FEDSIM_RUNS", *composition.data}
    yours = {name: value for name, value in os.environ.items() if not name.startswith("COMPOSE_") and name not in ours}
    found = {"EXPERIMENT": EXPERIMENT, "FEDSIM_IMAGE": image, "FEDSIM_USER": str(os.getuid())}
    found |= {} if workers is None else dict.fromkeys(("WORKERS", "NODES"), str(workers))
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
        tuple(table.get("entrypoint") or ()),
    )


def scaled(composition: Composition, parts: list[Service], workers: int | None) -> list[Service]:
    """The same services with so many nodes, where those that work are nodes; all are like the first of them."""
    if workers is None or not composition.nodes:
        return parts
    first = f"{composition.worker}-0"
    like = next(part for part in parts if part.name == first)

    def node(number: int) -> Service:
        words = tuple(word.replace("partition-id=0", f"partition-id={number}") for word in like.entrypoint)
        return like._replace(name=f"{composition.worker}-{number}", entrypoint=words)

    others = [part for part in parts if not part.name.startswith(composition.worker)]
    return [*others, *map(node, range(workers))]


def changes(composition: Composition, file: Path, before: list[Service], after: list[Service], keys: Path) -> Table:
    """What makes of a compose file's services others, with more or fewer nodes: tables of an overlay.

    Args:
        composition: which.
        file: of compose.
        before: the services that the file has.
        after: those that are wanted.
        keys: the folder with a folder of keys for each node.
    """
    there, wanted = ({part.name: part for part in parts} for parts in (before, after))
    tables: dict[str, Any] = {name: {"profiles": ["unused"]} for name in there.keys() - wanted.keys()}
    for name in wanted.keys() - there.keys():
        volume = {"type": "bind", "source": str(keys / name), "target": "/keys", "read_only": True}
        like = {"file": str(file), "service": f"{composition.worker}-0"}
        tables[name] = {"extends": like, "entrypoint": wanted[name].entrypoint, "volumes": [volume]}
    waits = {name: {"condition": "service_healthy", "required": name in wanted} for name in tables}
    return tables | ({composition.service: {"depends_on": waits}} if waits else {})


def told(parts: list[Service], apart: str) -> str:
    """All services but one in words: "1 head and 4 workers"."""
    counted = [several(part.copies, part.name) for part in parts if part.name != apart]
    return " and ".join(filter(None, [", ".join(counted[:-1]), *counted[-1:]]))


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
