"""Projects: the containers, networks and volumes of one launch, from their start until nothing of them is left."""

import json
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fedsim.containers.composition import RUNS, Composition, limits
from fedsim.containers.docker import DockerError, docker, tried
from fedsim.containers.parcel import Parcel, Table
from fedsim.report.formats import amount

END_SECONDS = 60.0  # that a run may take to end when it is interrupted
SHOW_SECONDS = 5.0  # for its last words to be shown
TRIES = 3  # of taking everything away: what was being made when its maker was ended may come late
LABEL = "com.docker.compose.project"
KILLED = 137  # the exit code of what was killed


class Screen(NamedTuple):
    """The terminal of this process."""

    columns: int
    lines: int


class Project(NamedTuple):
    """One launch."""

    name: str  # no other has it
    files: tuple[Path, ...]  # of compose
    composition: Composition
    env: Mapping[str, str]  # the variables of these files

    @property
    def runner(self) -> str:
        """The name of the container that runs the experiment."""
        return f"{self.name}-{self.composition.service}"

    def compose(self, *words: str) -> str:
        """What compose says to a command."""
        named = [word for file in self.files for word in ("--file", str(file))]
        return docker("compose", "--progress", "quiet", "--project-name", self.name, *named, *words, env=self.env)

    def certify(self) -> None:
        """Has certificates and keys made where the composition needs some.

        Raises:
            DockerError: none were made.
        """
        if self.composition.before:
            Path(self.env["FEDSIM_KEYS"]).mkdir()
            self.compose("run", "--rm", "--no-TTY", "--interactive=false", self.composition.before)

    def start(self, words: Sequence[str], screen: Screen | None) -> None:
        """Starts all others, waits until they are well, and starts the one that runs the experiment.

        Raises:
            DockerError: some did not start.
        """
        shape = ["--no-TTY"]
        if screen is not None:
            shape = ["--no-TTY=false", "--env", f"COLUMNS={screen.columns}", "--env", f"LINES={screen.lines}"]
        named = ("--name", self.runner, self.composition.service)
        self.compose("run", "--detach", "--interactive=false", *shape, *named, *words)

    def follow(self) -> int:
        """Shows what the run shows, until it ends; its exit code. An interrupt is the run's, and then this process's.

        Raises:
            KeyboardInterrupt: the run was interrupted, and has ended.
        """
        shown = subprocess.Popen(["docker", "logs", "--follow", self.runner], process_group=0)
        try:
            shown.wait()
            return int(docker("wait", self.runner))
        except KeyboardInterrupt:
            self._interrupt(shown)
            raise
        finally:
            shown.kill()
            shown.wait()

    def _interrupt(self, shown: subprocess.Popen[bytes]) -> None:
        """Interrupts the run, and waits for its end, if nobody is in more of a hurry."""
        tried("kill", "--signal", "INT", self.runner)
        try:
            docker("wait", self.runner, seconds=END_SECONDS)
            shown.wait(SHOW_SECONDS)
        except (DockerError, KeyboardInterrupt):
            tried("kill", self.runner)
        except subprocess.TimeoutExpired:
            return

    def fetch(self, folder: Path) -> bool:
        """Copies what the run has written into a folder; whether there was a run.

        Raises:
            DockerError: it could not be copied.
        """
        if self.runner not in docker("ps", "--all", "--format", "{{.Names}}").split():
            return False
        docker("cp", f"{self.runner}:{RUNS}/.", str(folder))
        return True

    def deaths(self) -> list[str]:
        """What killed containers, in words."""
        told = []
        for state in self._containers():
            name, code = state["Name"].lstrip("/"), state["State"]["ExitCode"]
            if state["State"]["OOMKilled"]:
                allowed = amount(state["HostConfig"]["Memory"])
                more = " or ".join(limits(self.files[0]))
                told.append(f"container {name} ran out of memory: it may use {allowed}; {more} gives it more")
            elif code == KILLED:
                told.append(f"container {name} was killed from outside (exit code {code})")
        return told

    def ailing(self) -> list[str]:
        """The last words of containers that have ended badly, or are not well."""
        told = []
        for state in self._containers():
            health = (state["State"].get("Health") or {}).get("Status")
            if state["State"]["ExitCode"] or health == "unhealthy":
                name = state["Name"].lstrip("/")
                done = subprocess.run(["docker", "logs", "--tail", "5", name], capture_output=True, text=True)
                told += [f"{name}: {line}" for line in (done.stdout + done.stderr).splitlines()]
        return told

    def _containers(self) -> list[dict[str, Any]]:
        """What docker tells of each container."""
        names = tried("ps", "--all", "--quiet", "--filter", f"label={LABEL}={self.name}").split()
        found: list[dict[str, Any]] = json.loads(tried("inspect", *names) or "[]") if names else []
        return found

    def left(self) -> list[str]:
        """What there is of it."""
        kinds = (("ps", "--all"), ("network", "ls"), ("volume", "ls"))
        ours = ("--quiet", "--filter", f"label={LABEL}={self.name}")
        return [name for kind in kinds for name in docker(*kind, *ours).split()]

    def remove(self, volumes: bool = True) -> None:
        """Takes it away, with or without what was written.

        Raises:
            DockerError: something is left.
        """
        kinds = ("--volumes",) if volumes else ()
        for attempt in range(TRIES):
            try:
                self.compose("down", *kinds, "--remove-orphans", "--timeout", "0")
                if not volumes or not self.left():
                    return
            except DockerError:
                if attempt == TRIES - 1:
                    raise
        raise DockerError(f"something of the project {self.name} is left")


def overlay(parcel: Parcel, service: str, changes: Table, folder: Path) -> Path:
    """A compose file, in a folder, that has a service see the parcel, each thing at the path that it has here.

    What else it changes is in `changes`, tables of services.

    Sources are copied into the folder: whoever runs in a container may read them, whoever may not here.
    """
    volumes = [_bind(path, path) for path in parcel.places]
    for number, source in enumerate(parcel.sources):
        copy = folder / f"{number}-{source.name}"
        shutil.copyfile(source, copy)
        copy.chmod(0o644)
        volumes.append(_bind(copy, source))
    file = folder / "compose.json"
    own = {**changes.get(service, {}), "working_dir": str(Path.cwd()), "volumes": volumes}
    text = json.dumps({"services": {**changes, service: own}})
    file.write_text(text.replace("$", "$$"), encoding="utf-8")  # a $ is a variable's in such a file
    return file


def _bind(source: Path, target: Path) -> dict[str, Any]:
    return {"type": "bind", "source": str(source), "target": str(target), "read_only": True}
