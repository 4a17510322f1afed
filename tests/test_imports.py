"""Who may import whom: the order of the house, read out of the source of every module."""

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("fedsim", "strategies", "clients")

# The rooms of fedsim, from left to right: a module may import those to its left. A package is in one room with all that
# is in it; two names in one room know nothing of each other.
ROOMS = (
    {"ranges", "files"},
    {"randomness", "rows"},
    {"tree"},
    {"task"},
    {"client", "layers"},
    {"model", "optim", "personal", "data"},
    {"networks"},
    {"engines"},
    {"fairness", "transport", "ranking", "forgetting", "sharpness", "stability"},
    {"evaluation"},
    {"method"},
    {"flower"},
    {"strategy"},
    {"sampling"},
    {"foreign"},
    {"simulation"},
    {"checkpoints"},
    {"runs"},
    {"config"},
    {"environment", "progress", "trackers", "report"},
    {"job"},
    {"launch", "doctor", "testing", "containers"},
    {"certificate"},
    {"apps"},
    {"cli"},
    {"__init__", "__main__"},  # what fedsim shows to others, and `python -m fedsim`
)
# One module for each outside world.
CONFINED = {
    "flwr": ("fedsim.flower", "fedsim.strategy", "fedsim.apps"),
    "ray": ("fedsim.engines.ray",),
    "pydantic": ("fedsim.config",),
    "rich": ("fedsim.cli", "fedsim.progress"),
    "typer": ("fedsim.cli", "fedsim.progress"),
    "ot": ("fedsim.transport",),
    "pooch": ("fedsim.data.files",),
    "matplotlib": ("fedsim.report", "fedsim.data.describe"),
}


def sources() -> dict[str, Path]:
    """Every module of the three packages, by its full name; a package's own ends in .__init__."""
    paths = (path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in sorted(paths)}


MODULES = sources()


def imported(name: str, source: str) -> Iterator[str]:
    """The full names of what a module imports, wherever in it that stands."""
    package = name.rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            yield from (f"{origin}.{alias.name}" for alias in node.names)


def within(name: str, places: tuple[str, ...]) -> bool:
    """Whether a name is one of these places or inside one."""
    return any(name == place or name.startswith(f"{place}.") for place in places)


def room(name: str) -> int | None:
    """The number of the room in which a name directly in fedsim stands, None if it has none."""
    return next((number for number, names in enumerate(ROOMS) if name in names), None)


def out_of_order(own: str, target: str) -> bool:
    """Whether something of fedsim, such as fedsim.tree.take, does not stand to the left of `own`."""
    other = "".join(target.split(".")[1:2])
    if room(other) is None:
        other = "__init__"  # one of fedsim's public names
    return own != other and room(own) <= room(other)


def faults(name: str, source: str) -> list[str]:
    """What is wrong with the imports of a module; [] if nothing is."""
    package, own = name.split(".")[:2]
    if package == "fedsim" and room(own) is None:
        return [f"{name} has no room: give {own!r} one in ROOMS of tests/test_imports.py, as far left as can be"]
    found = []
    for target in imported(name, source):
        world = target.split(".")[0]
        if world in {*PACKAGES, "experiments", "tests"} - {"fedsim", package}:
            found.append(f"{name} imports {target}, a stranger to {package}")
        if world in CONFINED and not within(name, CONFINED[world]):
            found.append(f"{name} imports {target}: only {' and '.join(CONFINED[world])} may know {world}")
        if world == package == "fedsim" and out_of_order(own, target):
            found.append(f"{name} imports {target}, which does not stand to the left of {own}")
    return found


def test_the_walk_finds_modules_of_all_three_packages():
    some = {"fedsim.__init__", "fedsim.tree", "fedsim.data.federation", "strategies.fedavg", "clients.sgd"}
    assert some <= MODULES.keys()


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_only_what_the_order_of_the_house_allows(name):
    assert not faults(name, MODULES[name].read_text(encoding="utf-8"))


def test_no_module_is_in_two_rooms():
    names = [name for names in ROOMS for name in names]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("name", "source", "complaint"),
    [
        ("fedsim.task", "from fedsim.client import Client", "does not stand to the left of task"),
        (
            "fedsim.tree",
            "def late():\n    from fedsim import simulation",
            "does not stand to the left of tree",
        ),
        ("fedsim.optim", "import fedsim.model", "does not stand to the left of optim"),
        ("fedsim.engines.local", "from ..strategy import Strategy", "does not stand to the left of engines"),
        ("fedsim.runs", "from fedsim import Client", "does not stand to the left of runs"),
        ("fedsim.__init__", "import strategies.fedavg", "a stranger to fedsim"),
        ("strategies.fedavg", "from clients.sgd import Sgd", "a stranger to strategies"),
        ("clients.sgd", "if True:\n    import strategies", "a stranger to clients"),
        ("fedsim.data.images", "import tests.data", "a stranger to fedsim"),
        ("fedsim.engines.local", "import ray.util", "only fedsim.engines.ray may know ray"),
        ("strategies.fedavg", "from flwr.serverapp.strategy import FedAvg", "may know flwr"),
        ("fedsim.data.federation", "import matplotlib.pyplot as plt", "may know matplotlib"),
        ("fedsim.client_store", "", "give 'client_store' one in ROOMS"),
    ],
)
def test_an_import_against_the_order_is_reported(name, source, complaint):
    (fault,) = faults(name, source)
    assert complaint in fault


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("fedsim.client", "import torch\nfrom fedsim import tree\nfrom fedsim.task import Reply"),
        ("fedsim.data.images", "from fedsim.data.files import load\nfrom . import dataset"),
        ("fedsim.networks", "from fedsim.model import Model"),
        ("fedsim.launch", "from fedsim import progress, report, trackers"),
        ("fedsim.cli.show", "import rich.table\nfrom fedsim.launch import launch"),
        ("fedsim.engines.ray", "import ray"),
        ("fedsim.strategy", "import flwr.serverapp.strategy"),
        ("strategies.fedopt", "from fedsim import Strategy\nfrom strategies.fedavg import FedAvg"),
        ("fedsim.tree", "import rays, otter"),
    ],
)
def test_an_import_to_the_left_is_allowed(name, source):
    assert not faults(name, source)
