"""What the README shows works as it stands there."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import fedsim
from fedsim.config import find
from fedsim.networks import mlp
from fedsim.testing import check_client, ragged

README = Path(__file__).parents[1] / "README.md"


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(), re.DOTALL)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with the files of the section on a method of one's own, and the current one."""
    for language, name in (("python", "mine.py"), ("toml", "mine.toml"), ("toml", "first.toml")):
        start = "name =" if name == "first.toml" else f"# {name}"
        (tmp_path / name).write_text(next(block for block in blocks(language) if block.startswith(start)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_method_of_ones_own_takes_less_than_60_lines_and_learns(folder):
    assert len((folder / "mine.py").read_text().splitlines()) < 60
    result = fedsim.run("mine.toml")
    assert result.last("test/accuracy") > 0.9
    engine = (result.path / "environment.json").read_text()
    assert "Vectorised" in engine


def test_its_client_keeps_the_promises(folder):
    clipped = find("mine.py:ClippedSgd", "fedsim.clients", "here")
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(50, 6, generator=generator), torch.randint(3, (50,), generator=generator)
    federation = fedsim.divide(
        fedsim.Dataset("random", {"x": x, "y": y}, names={"y": ("0", "1", "2")}),
        fedsim.Partition(torch.arange(50).numpy(), torch.tensor([0, 50]).numpy()),
    )
    model = mlp(federation, hidden=[8])
    example = next(block for block in blocks("python") if "check_client" in block)
    exec(example, {"ClippedSgd": clipped, "model": model, "x": x, "y": y})
    with pytest.raises(AssertionError, match="failed"):  # the same check does object to a client that is wrong
        check_client(clipped(model, bound=float("nan")), {"params": model.params}, ragged({"x": x, "y": y}))


def test_ratings_of_ones_own_are_recommended_from(folder):
    generator = torch.Generator().manual_seed(0)
    users = [torch.randperm(400, generator=generator)[:20].tolist() for _ in range(15)]
    lines = [f"u{user}::{item}::4::{time}" for user, items in enumerate(users) for time, item in enumerate(items)]
    (folder / "ratings.dat").write_text("\n".join(lines))
    recommender = next(block for block in blocks("toml") if "ratings.dat" in block)
    (folder / "ratings.toml").write_text('name = "own"\nrounds = 2\n' + recommender)
    result = fedsim.run("ratings.toml")
    assert result.last("clients/full_hr_10") <= 1 and 0 <= result.last("clients/mostpop_hr_10") <= 1


def test_the_first_experiment_and_the_call_from_python_run(folder):
    first = fedsim.run("first.toml", changes=["rounds=2"])
    assert [line["round"] for line in first.metrics] == [1, 2] and first.last("clients/accuracy") > 0
    example = next(block for block in blocks("python") if "fedsim.run" in block).replace("rounds=10", "rounds=1")
    exec(example)
    loading = next(block for block in blocks("python") if "fedsim.load" in block)
    found: dict[str, Any] = {"fedsim": fedsim}
    exec(loading, found)
    assert found["scores"].shape == (len(found["parts"].federation.test["y"]), 10)
    loop = next(block for block in blocks("python") if "fedsim.rounds" in block)
    exec(loop, {"fedsim": fedsim})


def test_a_data_set_of_ones_own_is_a_function(folder):
    (folder / "data.py").write_text(next(block for block in blocks("python") if block.startswith("# data.py")))
    result = fedsim.run("first.toml", changes=["data.use=data.py:stripes", "rounds=2"])
    assert result.last("clients/accuracy") > 0.3
    assert '"middle"' in (result.path / "evaluation.json").read_text()


def test_what_it_says_of_a_mistake_is_what_is_said(folder):
    with pytest.raises(fedsim.ConfigError, match="strategy.rate = 1: fedavg takes lr; unknown key rate"):
        fedsim.run("first.toml", changes=["strategy.rate=1"])
    assert "`strategy.rate = 1: fedavg takes lr; unknown key rate`" in README.read_text()


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README.read_text()):
        assert target.startswith("https://") or (README.parent / target).exists(), target


def test_the_best_of_any_classifier_is_as_accurate_as_it_says():
    example = next(block for block in blocks("python") if "optimum" in block)
    names: dict[str, object] = {}
    exec(example, names)
    told = re.search(r"# (0\.\d+), and", example)
    assert told and round(names["best"].accuracy, 4) == float(told[1])
