"""A launch: what it needs is checked, it runs, its runs are brought here, and nothing of it stays in Docker."""

import shutil
import signal
import tempfile
import tomllib
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import tomli_w

from fedsim.config import ConfigError
from fedsim.containers import composition as compositions
from fedsim.containers import docker as engine
from fedsim.containers.composition import COMPOSITIONS, EXPERIMENT, RUNS, Composition, Service
from fedsim.containers.docker import DockerError
from fedsim.containers.parcel import Parcel, Table, pack
from fedsim.containers.project import Project, Screen, overlay
from fedsim.runs import Run

INTERRUPTS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class Order(NamedTuple):
    """What is to be launched."""

    where: str  # "ray", "flower"
    experiment: str
    changes: Sequence[str] = ()
    seeds: Sequence[int] = ()
    workers: int | None = None  # as many as the compose file has
    image: str = "fedsim"
    root: Path = Path("runs")
    screen: Screen | None = None  # None: there is no terminal


class Launched(NamedTuple):
    """What became of it."""

    code: int  # 0 done, 1 the run failed, 2 it was refused, 130 interrupted
    runs: list[Path]  # here
    whole: bool  # whether they hold all that there is to go on with, and not nodes some of it
    told: list[str]  # what else is to be known, and went wrong


def launch(order: Order, say: Callable[[str], None]) -> Launched:
    """Runs an experiment in containers, and shows what it shows.

    Args:
        order: what, where.
        say: is told what happens.

    Raises:
        ConfigError: something is not right, or not there; nothing was started.
        ConnectionError: the experiment's data could not be fetched; nothing was started.
        DockerError: Docker failed. Nothing is left of what was started.
    """
    composition, parcel = _read(order)
    memory = engine.check_engine()
    file = compositions.path(composition)
    env = compositions.variables(composition, order.image, order.workers, parcel.data)
    there = compositions.services(file, env)
    parts = compositions.scaled(composition, there, order.workers)
    command = next(part.command for part in parts if part.name == composition.service)
    words = parcel.words(command, EXPERIMENT, () if composition.nodes else ("--out", RUNS))
    _check(order, composition, parcel, parts, memory)
    with _interruptible(), _folder(order.root) as folder:
        name = f"fedsim-launch-{uuid.uuid4().hex[:8]}"
        keys = folder / "keys"
        more = overlay(parcel, composition.service, compositions.changes(composition, file, there, parts, keys), folder)
        project = Project(name, (file, more), composition, env | {"FEDSIM_KEYS": str(keys)})
        say(f"starting {compositions.told(parts, composition.service)}: {name}")
        return _carried_out(project, words, parcel, order, folder, say)


def _read(order: Order) -> tuple[Composition, Parcel]:
    """The composition and the parcel; raises for an experiment that is wrong, or cannot be run there."""
    if order.where not in COMPOSITIONS:
        raise ConfigError(f"launch {order.where!r}: must be one of {', '.join(COMPOSITIONS)}")
    composition, parcel = COMPOSITIONS[order.where], pack(order.experiment, order.changes, order.seeds)
    files = [path for path in (*parcel.sources, *parcel.places) if path != parcel.path]
    if composition.nodes and files:
        raise ConfigError(
            f"{order.where} has nodes, to which an experiment travels, but no file that it names: the image would have "
            f"to have {', '.join(map(str, files))}"
        )
    return composition, parcel


def _check(order: Order, composition: Composition, parcel: Parcel, parts: list[Service], memory: int) -> None:
    """Raises ConfigError for all that Docker lacks."""
    engine.check_image(order.image)
    compositions.check_memory(compositions.path(composition), parts, memory)
    if engine.engine_address().startswith(("unix:", "npipe:")):  # else its ports are another machine's
        compositions.check_ports(parts)
    if missing := engine.missing_modules(order.image, list(parcel.modules)):
        raise ConfigError(
            f"{parcel.modules[missing[0]]} names the module {missing[0]!r}, which is not in the image {order.image!r}: "
            "name its file instead, 'path/to/file.py:name', which is sent along, or take an --image that has it "
            f"(FROM {order.image}, and pip install)"
        )


def _carried_out(
    project: Project, words: list[str], parcel: Parcel, order: Order, folder: Path, say: Callable[[str], None]
) -> Launched:
    """Starts it, follows it, and takes it away, whatever happens meanwhile."""
    code, told = 1, list[str]()
    try:
        project.certify()
        project.start(words, order.screen)
        say("")
        code = project.follow()
    except KeyboardInterrupt:
        code = 130
    except DockerError as error:
        told = [f"docker: {error}"]
    finally:
        with _undisturbed():
            say("bringing the run back, and taking the containers away")
            told = project.deaths() or [*told, *(project.ailing() if told else [])]
            runs = _brought_back(project, folder / "there", parcel.engine, order.root)
            say("")
    return Launched(code if code in (0, 2, 130) else 1, runs, not project.composition.nodes, told)


def _brought_back(project: Project, folder: Path, own: Table, root: Path) -> list[Path]:
    """The directories of the runs, which are here now; the project is gone.

    Raises:
        DockerError: something is left of it, and the message says where the runs are.
    """
    try:
        folder.mkdir()
        runs = _settled(folder, own, root) if project.fetch(folder) else []
    except (DockerError, OSError) as error:
        with suppress(DockerError):  # where the engine is gone, all is still there when it comes back
            project.remove(volumes=False)
        volume, image = f"{project.name}_runs", project.env["FEDSIM_IMAGE"]
        raise DockerError(
            f"{error}: so the runs stay in Docker, in the volume {volume}; from there they come by "
            f"`docker run --rm --volume {volume}:/runs --entrypoint tar {image} -C /runs -c . | tar -x`"
        ) from error
    try:
        project.remove()
    except DockerError as error:
        raise DockerError(
            f"{error}: take it away by `docker compose --project-name {project.name} down --volumes --remove-orphans`"
        ) from error
    return runs


def _settled(folder: Path, own: Table, root: Path) -> list[Path]:
    """Moves runs into the folder where they belong, next to what is there; their own engine is theirs again."""
    runs = []
    for path in sorted(folder.glob("*/*")):
        target = root / path.parent.name / path.name
        if (path / "experiment.toml").is_file():
            Run.open(path).describe(_own_engine(path, own))
            target = _free(target)
            runs.append(target)
        shutil.copytree(path, target, dirs_exist_ok=True)
    return runs


def _own_engine(path: Path, own: Table) -> str:
    """A run's experiment without the cluster, which is gone: the same bits come out of its own engine."""
    tables: dict[str, Any] = tomllib.loads((path / "experiment.toml").read_text(encoding="utf-8"))
    return tomli_w.dumps(tables | {"engine": dict(own)})


def _free(path: Path) -> Path:
    """This path, or with a number behind it if there is something."""
    numbered = (path.with_name(f"{path.name}-{number}") for number in range(2, 1000))
    return next(each for each in (path, *numbered) if not each.exists())


@contextmanager
def _folder(root: Path) -> Iterator[Path]:
    """A folder for what is on its way, beside the runs."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        place = tempfile.TemporaryDirectory(prefix=".launch-", dir=root.resolve())
    except OSError as error:
        raise ConfigError(f"no directory can be made for the run in {root}: {error}") from error
    with place as name:
        yield Path(name)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Inside, a signal that asks for the end is an interrupt, unless it is ignored, as by nohup."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    heard = [number for number in INTERRUPTS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, interrupt) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Inside, such a signal is not heard."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in INTERRUPTS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
