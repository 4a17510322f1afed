"""The command `docker`: called with arguments as they are, by no shell, and out of reach of a terminal's Ctrl-C."""

import os
import signal
import subprocess
from collections.abc import Mapping
from contextlib import suppress

from fedsim.config import ConfigError

ANSWER_SECONDS = 60.0  # for an engine to say that it is there
END_SECONDS = 10.0  # for a command to end when it is to


class DockerError(RuntimeError):
    """Docker did not do what it was asked to; the message is what it said last."""


def docker(*words: str, env: Mapping[str, str] | None = None, seconds: float | None = None) -> str:
    """What a command of docker's writes.

    Args:
        words: the command.
        env: its environment; None: that of this process.
        seconds: how long it may take.

    Raises:
        ConfigError: there is no docker here.
        DockerError: it failed, or took too long.
    """
    try:
        process = subprocess.Popen(
            ["docker", *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=env,
            process_group=0,
        )
    except (FileNotFoundError, PermissionError):
        raise ConfigError(
            "this needs Docker, and there is no command docker on the PATH: install it, or take `fedsim run`"
        ) from None
    with process:
        try:
            written, said = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            _end(process)
            raise DockerError(f"no answer for {seconds:.0f} seconds") from None
        except BaseException:
            _end(process)
            raise
    if process.returncode:
        raise DockerError((said.strip().splitlines() or written.strip().splitlines() or ["nothing"])[-1])
    return written


def _end(process: subprocess.Popen[str]) -> None:
    """Ends a command, and its plug-in, which is a process of its own."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def tried(*words: str) -> str:
    """The same, and "" where it fails."""
    try:
        return docker(*words)
    except DockerError:
        return ""


def check_engine() -> int:
    """Bytes of memory that an engine has.

    Raises:
        ConfigError: there is no engine, or no compose.
    """
    try:
        memory = docker("info", "--format", "{{.MemTotal}}", seconds=ANSWER_SECONDS).strip()
    except DockerError as error:
        raise ConfigError(
            f"no Docker engine answers{_address()}: start one, or name one in DOCKER_HOST. Docker says: {error}"
        ) from None
    try:
        docker("compose", "version")
    except DockerError as error:
        raise ConfigError(f"docker has no plug-in compose 2: install it. Docker says: {error}") from None
    return int(memory)


def engine_address() -> str:
    """Where the engine is, such as unix:///var/run/docker.sock; "" where docker does not say."""
    return tried("context", "inspect", "--format", "{{.Endpoints.docker.Host}}").strip()


def _address() -> str:
    address = engine_address()
    return f" at {address}" if address else ""


def check_image(name: str) -> None:
    """Raises ConfigError unless the engine has this image."""
    try:
        docker("image", "inspect", name)
    except DockerError:
        raise ConfigError(
            f"image {name!r}: the engine has none of this name: build it in a checkout of fedsim, by "
            "`make docker-build`, or `docker pull` one, and name it by --image"
        ) from None


# It is the image's Python that looks, and imports no more than the packages that the modules lie in.
_LOOK = """
import importlib.util, sys
for name in sys.argv[1:]:
    try:
        found = importlib.util.find_spec(name)
    except ModuleNotFoundError:  # of a package that it would be in
        found = None
    if found is None:
        print(name)
"""


def missing_modules(image: str, modules: list[str]) -> list[str]:
    """Those modules that an image does not have."""
    if not modules:
        return []
    bare = ("--rm", "--network", "none", "--read-only", "--cap-drop", "ALL", "--entrypoint", "python")
    return docker("run", *bare, image, "-c", _LOOK, *modules).split()
