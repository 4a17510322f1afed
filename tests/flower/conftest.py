"""Programs of Flower, really run: its simulation, and a deployment with TLS and authenticated nodes."""

import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

BIN = Path(sys.executable).parent
QUICKSTART = Path(__file__).parent / "quickstart"
HASTY_NODE = Path(__file__).parent / "hasty_node.py"
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "NO_COLOR": "1",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",  # in seconds: how soon work that has come is begun
}


def wait_for(happened: Callable[[], Any], what: str, seconds: float = 120) -> Any:
    """What `happened` gives as soon as that is true; a failure that says `what` after so many seconds."""
    deadline = time.monotonic() + seconds
    while not (found := happened()):
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.1)
    return found


def free_ports(count: int) -> list[int]:
    """Ports of this machine that nobody listens on, no two the same."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [listening.getsockname()[1] for listening in sockets]
    for listening in sockets:
        listening.close()
    return ports


def toml(values: dict[str, Any]) -> str:
    """Keys and values as Flower's command line takes them."""
    return " ".join(f"{key}={json.dumps(value)}" for key, value in values.items())


class Programs:
    """Programs of Flower and what they start, all marked by the folder of their homes, so that all can be ended."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started: list[subprocess.Popen[bytes]] = []
        link, control = free_ports(2)
        foreign = {name for name in os.environ if name.startswith(("FLWR_", "RAY_"))}
        self.environment = {name: value for name, value in os.environ.items() if name not in foreign} | QUIET
        self.environment |= {
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "RAY_TMPDIR": str(folder),  # else a Ray that somebody else runs here would be joined
            "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(link),
            "FLWR_LOCAL_CONTROL_API_PORT": str(control),
        }

    def start(self, name: str, *command: str | Path, log: Path | None = None) -> subprocess.Popen[bytes]:
        """Starts a program, at a home and with a log of this name."""
        home = self.folder / name
        home.mkdir(exist_ok=True)
        with (log or self.log(name)).open("ab") as file:
            words, environment = [str(word) for word in command], self.environment | {"FLWR_HOME": str(home)}
            program = subprocess.Popen(
                words, cwd=home, env=environment, stdout=file, stderr=file, stdin=subprocess.DEVNULL, process_group=0
            )
        self.started.append(program)
        return program

    def log(self, name: str) -> Path:
        """The file with what the program of this name said."""
        return self.folder / f"{name}.log"

    def ask(self, *command: str | Path, meanwhile: Callable[..., None] | None = None, seconds: float = 400) -> str:
        """What one of Flower's commands says, which must end well; `meanwhile` is called with it while it runs."""
        log = self.log(f"user-{len(self.started)}")
        program = self.start("user", *command, log=log)
        if meanwhile is not None:
            meanwhile(program)
        try:
            code: int | str = program.wait(seconds)
        except subprocess.TimeoutExpired:
            code = f"nothing for {seconds} s"
        assert code == 0, f"{' '.join(map(str, command))} ended with {code}:\n{log.read_text()}"
        return log.read_text()

    def alive(self, name: str = "") -> list[int]:
        """The processes whose home is that of this name, or any."""
        mark, found = f"FLWR_HOME={self.folder}/{name}".encode(), []
        for environment in Path("/proc").glob("[0-9]*/environ"):
            try:
                variables = environment.read_bytes().split(b"\0")
            except OSError:  # it has ended, or is somebody else's
                continue
            if any(variable == mark or (not name and variable.startswith(mark)) for variable in variables):
                found.append(int(environment.parent.name))
        return found

    def kill(self, name: str = "") -> None:
        """Ends the programs of this name, or all, also what has left the process group that it was started in."""

        def none_is_left() -> bool:
            for process in (alive := self.alive(name)):
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            return not alive

        wait_for(none_is_left, f"end of {name or 'all of'} Flower's processes")

    def end(self) -> None:
        """Ends everything, and removes its traces."""
        self.kill()
        for program in self.started:
            program.wait(30)
        shutil.rmtree(self.folder)


class Simulation:
    """Flower's own simulation, as `flwr run` starts it."""

    def __init__(self, programs: Programs) -> None:
        self.programs = programs

    def run(self, app: Path, nodes: int, **config: Any) -> str:
        """Runs an app; gives what was said."""
        size = f"num-supernodes={nodes} client-resources-num-cpus=1 init-args-num-cpus=1"  # one worker starts faster
        command = ("flwr", "run", app, "local", "--stream", "--federation-config", size, "--run-config", toml(config))
        return self.programs.ask(*command)


class Deployment:
    """A SuperLink on this machine that speaks TLS and lets only registered nodes in."""

    def __init__(self, programs: Programs) -> None:
        self.programs, self.folder = programs, programs.folder
        self.nodes: dict[str, subprocess.Popen[bytes]] = {}
        host, port = "127.0.0.1", free_ports(1)[0]
        self.address = f"{host}:{port}"
        self.certify()
        files = {name: self.folder / name for name in ("ca.pem", "server.pem", "server.key")}
        self.secure = ("--ssl-ca-certfile", files["ca.pem"], "--ssl-certfile", files["server.pem"])
        self.secure += ("--ssl-keyfile", files["server.key"])
        command = ("flower-superlink", *self.secure, "--enable-supernode-auth", "--host", host, "--port", port)
        self.link = programs.start("superlink", *command)
        home = self.folder / "user"
        home.mkdir()
        connection = toml({"address": self.address, "root-certificates": str(files["ca.pem"])}).replace(" ", "\n")
        (home / "config.toml").write_text(f'[superlink]\ndefault = "dep"\n\n[superlink.dep]\n{connection}\n')
        wait_for(self.answers, "answer of the SuperLink")

    def certify(self) -> None:
        """Makes two authorities, and the certificate by the first of them of a server on this machine."""
        make = ("openssl", "req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
        sign = ("openssl", "x509", "-req", "-in", "server.csr", "-CA", "ca.pem", "-CAkey", "ca.key")
        (self.folder / "names").write_text("subjectAltName=IP:127.0.0.1,DNS:localhost\n")
        for command in (
            (*make, "-x509", "-days", "2", "-subj", "/CN=authority", "-keyout", "ca.key", "-out", "ca.pem"),
            (*make, "-x509", "-days", "2", "-subj", "/CN=authority", "-keyout", "other.key", "-out", "other.pem"),
            (*make, "-subj", "/CN=server", "-keyout", "server.key", "-out", "server.csr"),
            (*sign, "-CAcreateserial", "-days", "2", "-extfile", "names", "-out", "server.pem"),
        ):
            subprocess.run(command, cwd=self.folder, check=True, capture_output=True)

    def answers(self, scheme: str = "https", trusted: Path | None = None) -> bool:
        """Whether the SuperLink can be reached by who trusts this authority; None: ours."""
        assert self.link.poll() is None, self.programs.log("superlink").read_text()
        trusting = ssl.create_default_context(cafile=trusted or self.folder / "ca.pem")
        try:
            with urllib.request.urlopen(f"{scheme}://{self.address}/health", timeout=5, context=trusting):
                return True
        except OSError:
            return False

    def start(self, name: str, part: int, parts: int, registered: bool = True) -> subprocess.Popen[bytes]:
        """Starts a node, at a home, with a log and with a key of this name; the key is kept if there is one."""
        key = self.folder / f"{name}.key"
        if not key.exists():
            subprocess.run(("ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-C", "", "-f", key), check=True)
            if registered:
                self.programs.ask("flwr", "supernode", "register", f"{key}.pub", "dep")
        command = (sys.executable, HASTY_NODE, "--superlink", self.address)
        command += ("--root-certificates", self.folder / "ca.pem")
        command += ("--auth-supernode-private-key", key, "--port", free_ports(1)[0], *self.secure)
        config = toml({"partition-id": part, "num-partitions": parts})
        return self.programs.start(name, *command, "--node-config", config)

    def online(self) -> int:
        """How many nodes the SuperLink can reach."""
        told = json.loads(self.programs.ask("flwr", "supernode", "list", "dep", "--format", "json"))
        return sum(node["status"] == "online" for node in told["nodes"])

    def ensure(self, count: int) -> list[str]:
        """Starts so many nodes, but for those that run, and waits until they can be reached; gives their names."""
        running = {name for name, node in self.nodes.items() if node.poll() is None}
        if running != self.nodes.keys():  # for a while, the SuperLink refuses who takes the place of the dead
            wait_for(lambda: self.online() == len(running), "the SuperLink knows which nodes are gone")
        names = [f"node-{part}" for part in range(count)]
        if running == {*names}:
            return names
        for part, name in enumerate(names):
            if name not in running:
                self.nodes[name] = self.start(name, part, count)
        wait_for(lambda: self.online() == count, f"{count} nodes online")
        return names

    def run(self, app: Path, meanwhile: Callable[..., None] | None = None, **config: Any) -> str:
        """Runs an app; gives what was said."""
        command = ("flwr", "run", app, "dep", "--stream", "--run-config", toml(config))
        return self.programs.ask(*command, meanwhile=meanwhile)


@pytest.fixture(scope="session")
def quickstart() -> Path:
    """A Flower app of somebody who has never heard of fedsim."""
    return QUICKSTART


@pytest.fixture(scope="session")
def poll() -> Callable[..., Any]:
    """Waits until something is true, but not for ever."""
    return wait_for


@contextmanager
def programs() -> Iterator[Programs]:
    """A place for Flower's programs, with a short name: Ray makes sockets in it. They end with the block."""
    if not Path("/proc/self/environ").exists():
        pytest.skip("Flower's processes could not be found again: this system has no /proc")
    started = Programs(Path(tempfile.mkdtemp(prefix="flower-")))
    try:
        yield started
    finally:
        started.end()


@pytest.fixture(scope="session")
def simulation() -> Iterator[Simulation]:
    """Flower's own simulation."""
    with programs() as started:
        yield Simulation(started)


@pytest.fixture(scope="module")
def deployment() -> Iterator[Deployment]:
    """A SuperLink, yet without any nodes."""
    for needed in ("openssl", "ssh-keygen"):
        if shutil.which(needed) is None:
            pytest.skip(f"{needed} is not installed")
    with programs() as started:
        yield Deployment(started)
