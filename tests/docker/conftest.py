"""A Docker engine, the image, and projects of compose that leave nothing behind."""

import io
import json
import os
import re
import shlex
import shutil
import subprocess
import tarfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PLACES = ("ray", "gpu", "flower", "flower.insecure", "flower.open")
RAY, GPU, FLOWER, INSECURE, OPEN = (str(ROOT / "docker" / f"compose.{name}.yaml") for name in PLACES)
OURS = re.compile("FEDSIM_|COMPOSE_|EXPERIMENT|(ENGINE_)?WORKERS|NODES|HOSTS|PUBLISH|PORT|PULL_POLICY")


def call(*command: str, env: dict[str, str] | None = None, check: bool = True) -> subprocess.CompletedProcess[str]:
    """What a command of docker's says."""
    clean = {name: value for name, value in os.environ.items() if not OURS.match(name)}
    done = subprocess.run(["docker", *command], capture_output=True, text=True, env=clean | (env or {}), timeout=1500)
    assert done.returncode == 0 or not check, f"docker {shlex.join(command)}:\n{done.stdout}\n{done.stderr}"
    return done


def lines(*command: str) -> list[str]:
    return call(*command).stdout.splitlines()


@dataclass(frozen=True)
class Project:
    """A project of compose, with volumes of its own."""

    name: str
    image: str
    settings: dict[str, str]
    files: tuple[str, ...] = (RAY,)
    service: str = "driver"  # that which runs an experiment

    def compose(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        settings = self.settings | {"FEDSIM_IMAGE": self.image}
        named = [word for file in self.files for word in ("--file", file)]
        return call("compose", "--project-name", self.name, *named, *arguments, env=settings, check=check)

    @property
    def driver(self) -> str:
        """The name of the container that `begin` starts."""
        return f"{self.name}-begun"

    def begin(self) -> None:
        """Starts the cluster, and the driver, and does not wait for its end."""
        self.compose("run", "--detach", "--name", self.driver, self.service)

    def await_round(self, number: int) -> None:
        """Until the driver has written so many rounds down, all of which it must have before it, too."""
        deadline = time.monotonic() + 240
        count = ("exec", self.driver, "sh", "-c", "cat runs/*/*/metrics.jsonl | wc -l")
        while int(call(*count, check=False).stdout or 0) < number:
            running = call("inspect", "--format", "{{.State.Running}}", self.driver).stdout.strip()
            assert running == "true" and time.monotonic() < deadline, call("logs", self.driver).stderr
            time.sleep(0.1)

    def end(self) -> str:
        """Waits for the end of the driver, which must be a good one; what it said."""
        status = lines("wait", self.driver)
        said = call("logs", self.driver)
        assert status == ["0"], said.stdout + said.stderr
        return said.stdout + said.stderr

    def ray_workers(self) -> list[str]:
        """The processes in the cluster's containers that run clients."""
        containers = self.compose("ps", "--quiet", "worker").stdout.split()
        return [line for each in containers for line in lines("top", each, "-eo", "pid,args") if "ray::Worker" in line]

    def fetch(self, folder: Path) -> list[Path]:
        """The directories of all runs, brought here."""
        volume = f"{self.name}_runs"
        command = ["docker", "run", "--rm", "--volume", f"{volume}:/there:ro", "--entrypoint", "tar", self.image]
        packed = subprocess.run([*command, "-C", "/there", "-c", "."], capture_output=True, check=True)
        with tarfile.open(fileobj=io.BytesIO(packed.stdout)) as archive:
            archive.extractall(folder, filter="data")
        return sorted(path.parent for path in folder.glob("*/*/metrics.jsonl"))

    def left(self) -> list[str]:
        """What there is of this project."""
        ours = f"label=com.docker.compose.project={self.name}"
        kinds = (("ps", "--all"), ("volume", "ls"), ("network", "ls"))
        return [name for kind in kinds for name in lines(*kind, "--quiet", "--filter", ours)]

    def down(self) -> None:
        """Takes all of it away."""
        self.compose("down", "--volumes", "--remove-orphans", "--timeout", "0")


@pytest.fixture(scope="session")
def compose() -> None:
    """That there is compose, which checks its files without an engine."""
    if shutil.which("docker") is None or call("compose", "version", check=False).returncode:
        pytest.skip("there is no `docker compose` here")


@pytest.fixture(scope="session")
def engine(compose: None) -> None:
    """That a Docker engine answers."""
    if (found := call("info", check=False)).returncode:
        pytest.skip(f"no Docker engine answers: {(found.stderr.strip().splitlines() or ['?'])[-1]}")
    if call("buildx", "version", check=False).returncode:
        pytest.skip("there is no `docker buildx` here")


@pytest.fixture(scope="session")
def image(engine: None) -> Iterator[str]:
    """The image, built; DOCKER_BUILD has more arguments of `docker build`, such as another base image."""
    name = f"fedsim-test-{uuid.uuid4().hex[:8]}"
    more = shlex.split(os.environ.get("DOCKER_BUILD", ""))
    call("build", "--quiet", "--file", str(ROOT / "docker" / "Dockerfile"), "--tag", name, *more, str(ROOT))
    yield name
    call("rmi", "--force", name)


@pytest.fixture
def project(image: str) -> Iterator[Any]:
    """Makes a project; what it is set to are the variables of its compose file."""
    made = []

    def make(**settings: str) -> Project:
        made.append(Project(f"fedsim-test-{uuid.uuid4().hex[:8]}", image, settings))
        return made[-1]

    yield make
    for each in made:
        each.down()
        assert not each.left()


@pytest.fixture
def configured(compose: None) -> Any:
    """What compose makes of its files, with these variables."""

    def configure(*files: str, **settings: str) -> dict[str, Any]:
        named = [word for file in files for word in ("--file", file)]
        found: dict[str, Any] = json.loads(call("compose", *named, "config", "--format", "json", env=settings).stdout)
        return found

    return configure
