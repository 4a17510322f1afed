"""What is sent along with an experiment, and how its engine becomes a cluster's."""

import shlex

import pytest
import tomli_w

from fedsim.config import ConfigError, read, resolve, setting
from fedsim.containers.parcel import pack, placed

CLUSTER = {"use": "ray", "address": "head:6379", "workers": 4}
COMMAND = ["run", "--set", 'engine={use="ray", address="head:6379", workers=4}', "HERE"]
TABLES = {
    "name": "mine",
    "rounds": 2,
    "data": {"use": "plugin.py:data", "file": "numbers.txt"},
    "partition": {"use": "iid", "clients": 3},
    "model": {"use": "logistic"},
    "strategy": {"use": "fedavg"},
    "clients": {"train": {"use": "plugin.py:Noted", "lr": 0.1}},
}
PLUGIN = """
from dataclasses import dataclass
from pathlib import Path
from clients.sgd import Sgd
from fedsim.data.datasets import gaussians
from neighbour import NOTE

@dataclass(frozen=True)
class Noted(Sgd):
    note: str = NOTE

def data(file: Path, seed: int = 0):
    return gaussians(examples=int(file.read_text()), classes=3, features=4, seed=seed)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with an experiment in another one."""
    there = tmp_path / 'some $HOME\'s "folder"'
    there.mkdir()
    (there / "mine.toml").write_text(tomli_w.dumps(TABLES))
    (there / "plugin.py").write_text(PLUGIN)
    (there / "neighbour.py").write_text("NOTE = 'none'\n")
    (there / "numbers.txt").write_text("60")
    (there / "unrelated.py").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FEDSIM_DATA", raising=False)
    return there


def carried(experiment, *changes, seeds=()):
    """The words of the container's command, and the experiment that `fedsim run` reads out of them."""
    words = pack(str(experiment), changes, seeds).words(COMMAND, "HERE", ("--out", "/runs"))
    given = [value for word, value in zip(words, words[1:], strict=False) if word == "--set"]
    asked, base = read(words[3], given)
    return words, resolve(asked, base)


@pytest.mark.parametrize(
    ("own", "inner"),
    [
        ({"use": "auto"}, "auto"),
        ({"use": "sequential"}, "sequential"),
        ({"use": "vectorised"}, "vectorised"),
        ({"use": "vectorised", "block": 3}, "vectorised"),
        ({"use": "ray"}, "auto"),
        ({"use": "ray", "inner": "vectorised", "block": 3, "deadline": 5.0, "retries": 4, "threads": 2}, "vectorised"),
        ({"use": "ray", "inner": "sequential", "workers": 7, "cpus": 2.0, "address": "elsewhere:1"}, "sequential"),
    ],
)
def test_an_experiment_keeps_how_its_clients_run(own, inner):
    _, asked = carried("fedavg/digits", setting("engine", own))
    kept = {key: own[key] for key in ("block", "deadline", "retries", "threads") if key in own}
    usual = {"retries": 2, "threads": 1, "cpus": 1.0, "gpus": 0.0}  # Ray's own
    expected = usual | CLUSTER | kept | {"use": "fedsim.engines.ray:Ray", "inner": inner}
    assert asked.engine == expected


def test_an_experiment_that_names_no_engine_is_run_as_auto_runs_it():
    _, asked = carried("fedavg/digits")
    assert (asked.engine["inner"], asked.engine["workers"]) == ("auto", 4)


@pytest.mark.parametrize(("key", "value"), [("gpus", 0.5), ("device", "cuda")])
def test_a_gpu_is_refused_unless_the_cluster_has_some(key, value):
    own = {"use": "fedsim.engines.ray:Ray" if key == "gpus" else "fedsim.engines.local:Sequential", key: value}
    with pytest.raises(ConfigError, match=f"engine.{key} = {value!r}.*no GPU"):
        placed(own, CLUSTER)
    assert placed(own, CLUSTER | {"gpus": 0.25})["gpus"] == 0.25


def test_an_engine_that_is_not_fedsims_is_refused():
    with pytest.raises(ConfigError, match=r"engine.use = 'mine:Engine': a cluster has workers of Ray's"):
        placed({"use": "mine:Engine"}, CLUSTER)


def test_what_belongs_to_an_experiment_is_sent_along_and_nothing_else(folder):
    parcel = pack(str(folder / "mine.toml"), (), ())
    assert [path.name for path in parcel.sources] == ["mine.toml", "neighbour.py", "plugin.py"]
    assert parcel.places == (folder / "numbers.txt",)
    assert parcel.data is None and not parcel.modules


def test_a_bundled_experiment_is_sent_too_as_the_image_may_have_another_one():
    parcel = pack("fedavg/digits", (), ())
    assert (parcel.path.name, parcel.sources, parcel.places) == ("digits.toml", (parcel.path,), ())


def test_changes_are_words_of_their_own_that_no_shell_reads(folder):
    change = "clients.train.note='a \"b\" $HOME $$ `c`; d\\e'"
    words, asked = carried(folder / "mine.toml", change, "rounds=3", seeds=(4, 5))
    assert words[:4] == [*COMMAND[:3], str(folder / "mine.toml")] and change in words
    assert (asked.clients["train"]["note"], asked.rounds) == ('a "b" $HOME $$ `c`; d\\e', 3)
    assert shlex.join(words).endswith("--seeds 4 5")


def test_a_command_without_an_engine_gets_none():
    parcel = pack("fedavg/digits", ("rounds=3",), (1, 2))
    assert parcel.words(["HERE", "x"], "HERE") == [str(parcel.path), "--set", "rounds=3", "--seeds", "1", "2", "x"]


def test_a_sweep_is_sent_whole_and_may_not_choose_the_engine(folder):
    words, asked = carried("fedavg/digits", "sweep={'clients.train.lr' = [0.1, 0.2]}")
    assert asked.sweep == {"clients.train.lr": [0.1, 0.2]}
    with pytest.raises(ConfigError, match=r"sweep: engine.use: where clients run"):
        pack("fedavg/digits", ("sweep={'engine.use' = ['sequential', 'vectorised']}",), ())


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ("rounds=0", "rounds = 0: must be int >= 1"),
        ("strategy.rate=1", "unknown key rate"),
        ("clients.train.lr='x'", "clients.train.lr = 'x'"),
        ("model.use=nothere.py:net", "there is no file 'nothere.py'"),
        ("sweep={'clients.train.lr' = [0.1, -1]}", "clients.train.lr = -1"),
    ],
)
def test_a_wrong_experiment_is_refused(change, complaint):
    with pytest.raises(ConfigError) as told:
        pack("fedavg/digits", (change,), ())
    assert complaint in str(told.value)


def test_modules_that_an_image_may_lack_are_found_with_the_key_that_names_them(folder, monkeypatch):
    (folder / "elsewhere").mkdir()
    (folder / "elsewhere" / "packaged.py").write_text("from strategies.fedavg import FedAvg\n")
    monkeypatch.syspath_prepend(str(folder / "elsewhere"))
    assert pack("fedavg/digits", ("strategy.use=packaged:FedAvg",), ()).modules == {"packaged": "strategy.use"}


def test_your_data_are_seen_where_there_are_some(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDSIM_DATA", str(tmp_path))
    assert pack("fedavg/digits", (), ()).data == tmp_path
    monkeypatch.setenv("FEDSIM_DATA", str(tmp_path / "nowhere"))  # a container's would be made by Docker
    assert pack("fedavg/digits", (), ()).data is None


def test_data_that_are_not_here_are_fetched_or_nothing_starts(tmp_path, monkeypatch):
    monkeypatch.delenv("FEDSIM_DATA", raising=False)
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path))
    monkeypatch.setenv("FEDSIM_MIRROR", "http://127.0.0.1:9")  # the port at which nobody answers
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with pytest.raises(ConnectionError, match="could not be fetched"):
        pack("fedavg/adult", (), ())
