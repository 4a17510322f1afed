"""What is installed is the whole of fedsim, and works where no checkout is near."""

import importlib
import json
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from fedsim.containers import COMPOSITIONS

ROOT = Path(__file__).parents[1]
PACKAGES = ("fedsim", "strategies", "clients", "experiments")
COMPOSED = {composition.file for composition in COMPOSITIONS.values()}  # what `fedsim launch` starts
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
GROUPS = PROJECT["entry-points"]
DECLARED = [(group, name, target) for group, targets in GROUPS.items() for name, target in targets.items()]


def run(*command: str | Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """What a command says in a folder, with nothing of ours in its environment."""
    ours = re.compile("PYTHON|VIRTUAL_ENV|COV|FEDSIM_")
    clean = {name: value for name, value in os.environ.items() if not ours.match(name)}
    return subprocess.run([str(part) for part in command], cwd=folder, env=clean, capture_output=True, text=True)


def succeed(*command: str | Path, folder: Path) -> str:
    """As `run`, but only what goes well."""
    done = run(*command, folder=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def members(wheel: Path) -> set[str]:
    """The files in a wheel, without its own metadata."""
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def sources() -> set[str]:
    """The files of the checkout that belong into a wheel."""
    wanted = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    wanted += [path for end in ("*.toml", "README.md") for path in (ROOT / "experiments").rglob(end)]
    files = {path.relative_to(ROOT).as_posix() for path in (*wanted, ROOT / "fedsim" / "py.typed")}
    return files | {f"fedsim/docker/{name}" for name in COMPOSED if (ROOT / "docker" / name).is_file()}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """fedsim, built without a network."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip", "wheel", "--no-index", "--no-deps", "--no-build-isolation")
    succeed(*pip, "--wheel-dir", folder, ROOT, folder=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def programs(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of an environment that has the wheel, and other people's packages from the one that tests run in.

    A folder named in a .pth file is searched last, and its own .pth files, such as that of an editable install, are not
    read.
    """
    home = tmp_path_factory.mktemp("installed") / "env"
    venv.create(home, symlinks=True, with_pip=False)
    (site,) = home.glob("lib/python*/site-packages")
    folders = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site / "others.pth").write_text("\n".join(sorted(folders)) + "\n", encoding="utf-8")
    pip = (sys.executable, "-m", "pip", "--python", home / "bin" / "python", "install", "--no-index", "--no-deps")
    succeed(*pip, "--ignore-installed", wheel, folder=home)
    return home / "bin"


@pytest.mark.parametrize(("group", "name", "target"), DECLARED)
def test_every_short_name_stands_for_something_callable(group, name, target):
    module, _, attribute = target.partition(":")
    assert callable(getattr(importlib.import_module(module), attribute))


def test_the_lock_satisfies_every_requirement_of_the_project():
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    pins = {canonicalize_name(name): version for name, version in pins.items()}
    extras = PROJECT["optional-dependencies"]
    wanted = [Requirement(line) for line in (*PROJECT["dependencies"], *extras["dev"])]
    (own,) = [requirement for requirement in wanted if requirement.name == "fedsim"]
    wanted += [Requirement(line) for extra in own.extras for line in extras[extra]]
    unmet = [
        str(requirement)
        for requirement in wanted
        if requirement != own and not requirement.specifier.contains(pins.get(canonicalize_name(requirement.name), "0"))
    ]
    assert not unmet
    assert "torch" in pins  # the lock was read


@pytest.mark.slow
def test_a_wheel_holds_all_modules_and_experiments_and_nothing_else(wheel):
    assert members(wheel) == sources()
    assert {"fedsim/py.typed", "fedsim/data/files.py", "experiments/fedavg/digits.toml"} <= members(wheel)
    assert "fedsim/docker/compose.ray.yaml" in members(wheel)


@pytest.mark.slow
def test_an_installed_fedsim_is_the_one_that_is_imported(programs, tmp_path):
    for package in PACKAGES:
        place = succeed(programs / "python", "-c", f"import {package}; print({package}.__file__)", folder=tmp_path)
        assert Path(place).is_relative_to(programs.parent)
    listed = succeed(programs / "python", "-c", "import sys; print(*sys.path, sep='\\n')", folder=tmp_path)
    assert str(ROOT) not in listed.splitlines()


@pytest.mark.slow
def test_an_installed_fedsim_runs_an_experiment_in_an_empty_folder(programs, tmp_path):
    succeed(programs / "fedsim", "run", "fedavg/digits", "--set", "rounds=2", folder=tmp_path)
    (metrics,) = tmp_path.glob("runs/*/*/metrics.jsonl")
    rounds = [json.loads(line)["round"] for line in metrics.read_text(encoding="utf-8").splitlines()]
    assert [number for number in rounds if number > 0] == [1, 2]  # round 0 is the model before it is trained
    assert (metrics.parent / "report" / "index.html").is_file()


@pytest.mark.slow
def test_an_installed_fedsim_has_what_it_launches(programs, tmp_path):
    code = "from fedsim.containers import COMPOSITIONS, composition; print(composition.path(COMPOSITIONS['ray']))"
    (place,) = succeed(programs / "python", "-c", code, folder=tmp_path).split()
    assert Path(place).is_relative_to(programs.parent)
    assert Path(place).read_bytes() == (ROOT / "docker" / "compose.ray.yaml").read_bytes()


@pytest.mark.slow
def test_a_folder_that_hides_ours_is_named_and_nothing_is_run(programs, tmp_path):
    hiding = tmp_path / "strategies"
    hiding.mkdir()
    (hiding / "__init__.py").touch()
    command = ("-m", "fedsim", "run", "fedavg/digits", "--set", "rounds=2")
    done = run(programs / "python", *command, folder=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert str(hiding) in "".join(done.stderr.split())  # however wide the lines are
    assert not list(tmp_path.glob("runs/*/*/metrics.jsonl"))
