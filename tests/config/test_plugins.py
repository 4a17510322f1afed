"""From the `use` of a table to the callable that it names."""

import subprocess
import sys
from pathlib import Path

import pytest

import clients.sgd
from fedsim import networks, sampling
from fedsim.config import ConfigError, find, fingerprints, names
from fedsim.config.plugins import absolute, closest, shown

PLUGIN = """
from dataclasses import dataclass

@dataclass
class Thing:
    size: int = 1

    @staticmethod
    def small():
        return Thing(0)

def make():
    return Thing(3)
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(PLUGIN)
    return path


def test_a_module_and_a_name_give_what_is_called_so():
    assert find("fedsim.networks:mlp", "fedsim.models", "model.use") is networks.mlp


def test_a_name_may_lie_inside_a_class(file):
    assert find(f"{file}:Thing.small", "fedsim.models", "model.use")().size == 0


@pytest.mark.parametrize(
    ("short", "group", "target"),
    [
        ("mlp", "fedsim.models", networks.mlp),
        ("sgd", "fedsim.clients", clients.sgd.Sgd),
        ("uniform", "fedsim.samplers", sampling.uniform),
    ],
)
def test_a_short_name_is_an_entry_point_of_its_group(short, group, target):
    assert find(short, group, "somewhere") is target


def test_every_short_name_leads_to_something_callable():
    groups = [
        f"fedsim.{part}"
        for part in ["strategies", "clients", "datasets", "partitions", "splits", "models", "samplers", "engines"]
    ]
    assert all(names(group) for group in groups)
    for group in groups:
        for short in names(group):
            assert callable(find(short, group, "somewhere"))


def test_a_short_name_of_another_group_is_unknown():
    with pytest.raises(ConfigError, match=r"model.use = 'sgd': no entry point of that name in fedsim.models"):
        find("sgd", "fedsim.models", "model.use")


def test_a_file_is_looked_for_beside_the_experiment_and_then_in_the_current_folder(tmp_path, monkeypatch):
    for folder in ("beside", "current"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "both.py").write_text(f"def where(): return {folder!r}")
    (tmp_path / "current" / "one.py").write_text("def where(): return 'current'")
    monkeypatch.chdir(tmp_path / "current")
    assert find("both.py:where", "", "model.use", tmp_path / "beside")() == "beside"
    assert find("both.py:where", "", "model.use")() == "current"
    assert find("one.py:where", "", "model.use", tmp_path / "beside")() == "current"
    with pytest.raises(ConfigError, match=r"there is no file 'none.py' \(looked in .*beside, .*current\)"):
        find("none.py:where", "", "model.use", tmp_path / "beside")


def test_two_tables_that_name_one_file_share_its_module(file):
    thing, make = (find(f"{file}:{name}", "", "model.use") for name in ("Thing", "make"))
    assert isinstance(make(), thing)


def test_a_file_that_was_changed_is_read_again(file):
    before = find(f"{file}:make", "", "model.use")
    file.write_text(PLUGIN.replace("Thing(3)", "Thing(4)"))
    after = find(f"{file}:make", "", "model.use")
    assert (before().size, after().size) == (3, 4)


def test_what_a_file_defines_knows_its_module(file):
    thing = find(f"{file}:Thing", "", "model.use")
    assert sys.modules[thing.__module__].Thing is thing


def test_a_file_that_fails_leaves_no_module_behind(tmp_path):
    (tmp_path / "fails.py").write_text("raise RuntimeError('by design')")
    with pytest.raises(ConfigError, match="importing .*fails.py, line 1, failed: RuntimeError: by design"):
        find("fails.py:x", "", "model.use", tmp_path)
    assert not [name for name in sys.modules if name.startswith("fedsim_plugin_fails")]


def test_a_file_that_ends_the_program_when_imported_is_an_error(tmp_path):
    (tmp_path / "leaves.py").write_text("raise SystemExit(0)")
    with pytest.raises(ConfigError, match="SystemExit: 0"):
        find("leaves.py:x", "", "model.use", tmp_path)


def test_a_module_that_lies_here_as_a_file_is_pointed_out(file, tmp_path):
    file.rename(tmp_path / "apart.py")
    with pytest.raises(ConfigError, match=r"there is no module 'apart'; for the file write 'apart.py:make'"):
        find("apart:make", "", "model.use", tmp_path)


def test_a_mistyped_name_is_recognised():
    with pytest.raises(ConfigError, match="has no 'mpl'; did you mean mlp\\?"):
        find("fedsim.networks:mpl", "", "model.use")
    with pytest.raises(ConfigError, match="did you mean dirichlet\\?"):
        find("dirichelt", "fedsim.partitions", "partition.use")


def test_a_name_like_no_other_is_answered_with_all_there_are():
    assert closest("xyz", ["b", "a"]) == "; there are a, b"
    assert closest("xyz", []) == ""


@pytest.mark.parametrize("use", [3, None, True, ["a:b"], {"use": "a:b"}, ""])
def test_what_is_no_name_is_refused(use):
    with pytest.raises(ConfigError, match=r"^model.use = .*must be 'package.module:name', 'file.py:name' or a short"):
        find(use, "fedsim.models", "model.use")


def test_the_path_of_a_file_is_made_absolute_and_nothing_else(file, tmp_path):
    assert absolute("mine.py:make", tmp_path) == f"{file}:make"
    assert absolute(f"{file}:make", None) == f"{file}:make"
    assert absolute("fedsim.networks:mlp", tmp_path) == "fedsim.networks:mlp"
    assert absolute("mlp", tmp_path) == "mlp"


def test_a_long_value_is_shown_in_part():
    assert shown("a") == "'a'"
    assert len(shown("a" * 10**6)) < 130
    assert "1000002 characters" in shown("a" * 10**6)


HIDING = {
    "an empty package": {"__init__.py": ""},  # the module is missing
    "a package with the module": {"__init__.py": "", "fedavg.py": "class FedAvg: ..."},
    "a folder that is no package": {},
}
FINDS = (
    "from fedsim.config import find, ConfigError\n"
    "try: print(find('fedavg', 'fedsim.strategies', 'strategy.use').__name__)\n"
    "except ConfigError as error: print(error)\n"
)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What is found in processes that are started where there is a folder named strategies: (the folder, what is said).

    They work at the same time: each imports fedsim anew.
    """
    folders = {kind: tmp_path_factory.mktemp("hiding") / "strategies" for kind in HIDING}
    started = {}
    for kind, folder in folders.items():
        folder.mkdir()
        for name, text in HIDING[kind].items():
            (folder / name).write_text(text)
        command = [sys.executable, "-c", FINDS]
        started[kind] = subprocess.Popen(command, cwd=folder.parent, stdout=subprocess.PIPE, text=True)
    said = {kind: process.communicate()[0] for kind, process in started.items()}
    assert [process.returncode for process in started.values()] == [0] * len(HIDING)
    return {kind: (folder, said[kind]) for kind, folder in folders.items()}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["an empty package", "a package with the module"])
def test_a_users_folder_that_hides_ours_is_named(found, kind):
    folder, said = found[kind]
    assert "hides fedsim's own package 'strategies'" in said
    assert str(folder) in said
    assert "rename it, or start fedsim from another folder" in said


@pytest.mark.slow
def test_a_users_folder_that_is_no_package_hides_nothing(found):
    assert found["a folder that is no package"][1] == "FedAvg\n"


def test_a_file_may_import_its_neighbour_which_hides_nothing(tmp_path):
    (tmp_path / "neighbour_of_mine.py").write_text("def make(): return 'neighbour'")
    (tmp_path / "tomllib.py").write_text("def make(): return 'hides'")
    (tmp_path / "near.py").write_text("from neighbour_of_mine import make\nimport tomllib\nloads = tomllib.loads\n")
    assert find("near.py:make", "", "model.use", tmp_path)() == "neighbour"
    assert find("near.py:loads", "", "model.use", tmp_path)("a = 1") == {"a": 1}


@pytest.mark.parametrize(
    ("content", "line"), [("import json\n\njson.loads('{')", 3), ("x = 1\ndef thing(:", 2), ("def f():\n  1/0\nf()", 2)]
)
def test_a_file_that_fails_is_told_with_the_line(content, line, tmp_path):
    (tmp_path / "fails.py").write_text(content)
    with pytest.raises(ConfigError, match=f"importing .*fails.py, line {line}, failed: "):
        find("fails.py:x", "", "model.use", tmp_path)


def test_plug_in_files_have_fingerprints_that_change_with_them(file):
    tables = {"a": {"use": f"{file}:make", "b": {"use": "fedsim.networks:mlp"}}, "c": 1}
    before = fingerprints(tables)
    assert before == fingerprints(tables) and list(before) == [str(file)]
    file.write_text(PLUGIN + "\n")
    assert fingerprints(tables) != before
