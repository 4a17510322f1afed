"""The image: what it holds, what it does not hold, and that it runs with few rights."""

import json
import os
import re
import socket
import tomllib
from pathlib import Path

import pytest

from .conftest import ROOT, call, lines

pytestmark = pytest.mark.docker
# As little as a container can be given.
BARE = ("--rm", "--network=none", "--read-only", "--tmpfs=/tmp", "--cap-drop=ALL", "--security-opt=no-new-privileges")
ACCOUNTS = (
    "passwd",
    "passwd-",
    "group",
    "group-",
    "shadow",
    "shadow-",
    "gshadow",
    "gshadow-",
    "subuid",
    "subuid-",
    "subgid",
    "subgid-",
)
DIGITS = ("run", "fedavg/digits", "--set", "rounds=3", "--out", "/tmp/runs")


def inside(image: str, script: str) -> str:
    """What a shell says in the image."""
    return call("run", *BARE, "--entrypoint", "sh", image, "-c", script).stdout


@pytest.fixture(scope="module")
def config(image):
    return json.loads(call("inspect", "--format", "{{json .Config}}", image).stdout)


@pytest.fixture(scope="module")
def base(image):
    """The image that it was built from."""
    given = re.search(r"BASE_IMAGE=(\S+)", os.environ.get("DOCKER_BUILD", ""))
    default = re.search("^ARG BASE_IMAGE=(.*)$", (ROOT / "docker" / "Dockerfile").read_text(), re.MULTILINE)
    name = (given or default)[1]
    if call("inspect", name, check=False).returncode:  # a build keeps what it fetched to itself
        call("pull", name)
    return name


def history(image):
    """The steps that made it, the last one first."""
    return lines("history", "--no-trunc", "--format", "{{.CreatedBy}}", image)


def files(image):
    """All files in it."""
    command = "find / -xdev -path /proc -prune -o -path /sys -prune -o -type f -print"
    return set(lines("run", "--rm", "--network=none", "--user=0", "--entrypoint", "sh", image, "-c", command))


def test_it_is_fedsim(image):
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert call("run", *BARE, image, "--version").stdout.strip() == f"fedsim {version}"
    assert "fedavg/digits" in call("run", *BARE, image, "list").stdout
    assert "Simulates federated learning" in call("run", *BARE, image).stdout


@pytest.mark.parametrize("user", ["", "12345:12345"])
def test_an_experiment_runs_without_rights_and_without_a_place_to_write_but_tmp(image, user):
    said = call("run", *BARE, *(["--user", user] if user else []), image, *DIGITS)
    assert "after 3 rounds" in said.stdout and not re.search("[Ww]arning", said.stderr), said.stderr


def test_its_user_is_nobody_special(config, image):
    assert config["User"] == "fedsim" and config["Entrypoint"] == ["fedsim"]
    assert inside(image, "id -u; id -g; grep CapEff /proc/self/status").split() == ["1000", "1000", "CapEff:", "0" * 16]
    assert inside(image, "touch /opt/fedsim/new /usr/new 2>&1 || true").count("Read-only") == 2
    # Nor may it change the program where the file system could be written.
    kept = ("run", "--rm", "--network=none", "--entrypoint", "sh", image, "-c", "touch /opt/fedsim/new")
    assert "Permission denied" in call(*kept, check=False).stderr


def test_its_check_of_health_is_one(config, image):
    assert config["Healthcheck"]["Test"] == ["CMD", "fedsim", "--version"]


def test_nothing_in_it_tells_its_maker_that_it_ran(config):
    expected = {
        "FLWR_TELEMETRY_ENABLED=0",
        "FLWR_DISABLE_UPDATE_CHECK=1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1",
        "RAY_USAGE_STATS_ENABLED=0",
    }
    assert expected <= set(config["Env"])


def test_it_says_what_it_is(config):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    labels = {name.removeprefix("org.opencontainers.image."): value for name, value in config["Labels"].items()}
    assert labels["title"] == project["name"] and labels["licenses"] == project["license"]
    assert labels["description"] in project["description"]
    assert {"version", "revision"} <= labels.keys()


def test_versions_are_those_of_the_lock(image):
    found = inside(
        image, "python -c 'import importlib.metadata as m; [print(d.name, d.version) for d in m.distributions()]'"
    )
    canonical = {re.sub("[-_.]+", "-", name).lower(): version for name, version in map(str.split, found.splitlines())}
    locked = re.findall(r"^([^#\s=]+)==(\S+)$", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    pinned = {re.sub("[-_.]+", "-", name).lower(): version for name, version in locked}
    there = canonical.keys() & pinned.keys()
    assert {"torch", "ray", "flwr", "numpy", "scipy"} <= there
    assert not {name for name in there if canonical[name].partition("+")[0] != pinned[name]}
    assert not {"pytest", "ruff", "mypy", "hatchling", "pip"} & canonical.keys()


def test_nothing_is_added_to_the_base_but_fedsim_and_what_it_needs(image, base):
    places = ("/opt/fedsim/", "/home/fedsim/", "/etc/")  # in the last stand the names of users
    added = sorted(files(image) - files(base))
    assert len(added) > 10_000 and not [path for path in added if not path.startswith(places)]
    assert {path for path in added if path.startswith("/etc/")} <= {f"/etc/{name}" for name in ACCOUNTS}
    assert not [path for path in added if re.search(r"\.whl$|\.a$|/\.cache/|/tests/|pip/|/bin/(ruff|pytest)", path)]
    folder = ROOT / "docker" / "flower"
    ours = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    there = {path.partition("/flower/")[2] for path in added if path.startswith("/opt/fedsim/flower/")}
    assert there == {path for path in ours if "cache" not in path} >= {"app/pyproject.toml", "certify.py"}
    assert inside(image, "command -v gcc cc make hatchling ruff pytest || true") == ""


def test_neither_its_history_nor_its_environment_gives_anything_away(config, base, image):
    theirs, known = history(base), json.loads(call("inspect", "--format", "{{json .Config.Env}}", base).stdout) or []
    steps = history(image)
    ours = steps[: len(steps) - len(theirs)]
    assert steps[len(ours) :] == theirs and len(ours) > 8  # all that is told of is looked at, but for the base's own
    told = "\n".join(
        [*ours, *(entry for entry in config["Env"] if entry not in known), *map(str, config["Labels"].items())]
    )
    assert "COPY /opt/fedsim /opt/fedsim" in told
    for given_away in ("://", "secret", "token", "password", "pip.conf", "index-url", "PIP_", "localhost", "mnt/"):
        assert given_away not in told, given_away
    for path in {str(ROOT), str(ROOT.parent), str(Path.home()), socket.gethostname()} - {"/"}:
        assert path not in told, path
    settings = [value for name, value in os.environ.items() if re.match("PIP_(CERT|.*INDEX.*|FIND_LINKS)", name)]
    assert not [value for value in settings if value in told]


def test_nor_do_the_files_that_it_is_made_from():
    made = [path for path in (ROOT / "docker").rglob("*") if path.suffix in {".yaml", ".py", ".toml"}]
    assert {path.name for path in made} >= {"compose.ray.yaml", "compose.flower.yaml", "certify.py"}
    text = "\n".join(
        path.read_text() for path in (ROOT / "Makefile", ROOT / ".dockerignore", ROOT / "docker/Dockerfile", *made)
    )
    addresses = set(re.findall(r"://([^/\s]+)", text))
    assert addresses == {"download.pytorch.org"}  # where torch's builds are for everybody
    assert not re.search("# *syntax *=|<<-?['\"]?[A-Z]|--build-context", text)  # what an engine 20.10 does not know


def test_what_is_sent_to_the_engine_is_what_a_wheel_is_made_of_and_what_starts_flowers_containers():
    kept = {line[2:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!/")}
    packages = {"clients", "experiments", "fedsim", "strategies"}
    assert kept == packages | {"docker/flower", "LICENSE", "README.md", "pyproject.toml", "requirements.lock"}
