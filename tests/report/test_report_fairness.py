"""How far groups are apart has a section of its own, and no other one speaks of it."""

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fedsim.evaluation import Evaluation, disparities, spread
from fedsim.report import read_run, write_report
from fedsim.report.content import Table
from fedsim.report.fairness import fairness, gaps
from fedsim.report.measures import apart, curved, notions
from fedsim.runs import Run

NAMES = {"y": ("no", "yes"), "a": ("left", "right")}
# Two clients; rows the truth, columns the prediction. P(yes): left 70 of 200, right 60 of 300.
GROUPS = [
    [[[60, 0], [30, 10]], [[20, 0], [0, 30]]],
    [[[40, 20], [0, 40]], [[200, 10], [20, 20]]],
]


def evaluated(groups: Tensor, part: str) -> tuple[Evaluation, dict[str, float]]:
    """What a run's evaluation finds out of confusions (C, G, K, K), and the metrics that it writes down."""
    pooled = {name: float(value) for name, value in disparities(groups.sum(0)).items()}
    pooled |= {"examples": float(groups.sum()), "accuracy": 0.75}
    clients = {name: value.numpy() for name, value in disparities(groups).items()}
    clients["examples"] = groups.sum((1, 2, 3)).double().numpy()
    clients = {"client": 10 + np.arange(float(len(groups))), "accuracy": np.full(len(groups), 0.75)} | clients
    found = Evaluation(pooled, clients, groups.sum((0, 1)), {}, groups=groups)
    metrics = {f"{part}/{name}": value for name, value in pooled.items() if name != "examples"}
    return found, metrics | ({f"clients/{n}": v for n, v in spread(found).items()} if part == "clients" else {})


def make(
    root: Path, groups: Tensor, parts: tuple[str, ...] = ("clients",), names: dict[str, tuple[str, ...]] = NAMES
) -> Path:
    """A run of two rounds, in the first of which everybody was treated alike."""
    run = Run.create(root, "fair", 1, 'name = "fair"\nrounds = 2\n', {"num_clients": len(groups)})
    alike = groups.sum((1, 3), keepdim=True).expand(groups.shape)
    for number, counts in ((1, alike), (2, groups)):
        found = {part: evaluated(counts, part) for part in parts}
        metrics = {name: value for _, measures in found.values() for name, value in measures.items()}
        run.record({"round": number, "train/loss": 1 / number} | metrics)
    run.save_evaluation(2, {part: evaluation for part, (evaluation, _) in found.items()}, names)
    return run.path


def section(path: Path) -> dict[str, Table]:
    """The tables of the section, by their titles."""
    found = fairness(read_run(path))
    assert found is not None
    return {table.title: table for table in found.tables}


def parsed(index: Path) -> ElementTree.Element:
    return ElementTree.fromstring(index.read_text(encoding="utf-8").removeprefix("<!DOCTYPE html>\n"))


def texts(index: Path, heading: str) -> str:
    """All that a section of the page says."""
    (found,) = (part for part in parsed(index).iter("section") if part.findtext("h2") == heading)
    return " ".join(text for text in found.itertext() if text.strip())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("fair"), torch.tensor(GROUPS))


def test_each_notion_has_a_row_with_gaps_and_deviations_over_all_and_at_the_worst_client(run):
    table = section(run)["Clients’ test parts"]
    assert table.header[:3] == ("notion", "gap", "deviation")
    gap, pooled = 70 / 200 - 60 / 300, 130 / 500
    local = [30 / 50 - 10 / 100, 60 / 100 - 30 / 250]
    deviation = max(30 / 50 - 40 / 150, 60 / 100 - 90 / 350)
    assert table.rows[0] == (
        "demographic parity",
        *(f"{gap:.3f}", f"{max(70 / 200 - pooled, pooled - 60 / 300):.3f}"),
        *(f"{sum(local) / 2:.3f}", f"{max(local):.3f}", "10", f"{deviation:.3f}"),
    )
    assert [row[0] for row in table.rows] == ["demographic parity", "equal opportunity", "equalised odds"]
    assert all(len(row) == len(table.header) for row in table.rows)
    assert table.rows[1][1:] == table.rows[2][1:]  # of two classes


def test_each_group_has_its_rates_and_of_two_classes_one_is_told(run):
    table = section(run)["Clients’ test parts, by group"]
    assert table.header == ("", "left", "right", "all", "gap")
    assert table.rows == (
        ("examples", "200", "300", "500", "–"),
        ("accuracy", "0.750", "0.900", "0.840", "0.150"),
        ("P(yes)", "0.350", "0.200", "0.260", "0.150"),
        ("P(yes | no)", f"{20 / 120:.3f}", f"{10 / 230:.3f}", f"{30 / 350:.3f}", f"{20 / 120 - 10 / 230:.3f}"),
        ("P(yes | yes)", "0.625", f"{50 / 70:.3f}", f"{100 / 150:.3f}", f"{50 / 70 - 0.625:.3f}"),
    )


def test_gaps_are_among_the_first_numbers_with_that_of_the_worst_client(run):
    assert [(fact.name, fact.value, fact.remark) for fact in gaps(read_run(run))][0] == (
        *("Demographic parity gap", "0.150", "0.500 at the worst client"),
    )
    index = write_report(run)
    tiles = next(part for part in parsed(index).iter("dl") if part.get("class") == "facts")
    assert [tile[0].text for tile in tiles][:4] == [
        *("Clients’ accuracy", "Demographic parity gap", "Equal opportunity gap", "Equalised odds gap")
    ]


def test_the_section_comes_after_the_curves_and_the_others_do_not_speak_of_it(run):
    index = write_report(run)
    assert [heading.text for heading in parsed(index).iter("h2")][:4] == ["Curves", "Fairness", "Clients", "Classes"]
    for other in ("Curves", "Clients", "Classes"):
        assert not [word for word in ("parity", "opportunity", "odds") if word in texts(index, other)]
    assert not {path.stem for path in index.parent.glob("metric-*parity*")}
    assert {path.stem for path in index.parent.glob("fairness*.svg")} == {"fairness-clients", "fairness-local-clients"}
    summary = (index.parent / "summary.md").read_text(encoding="utf-8")
    assert "## Fairness" in summary and "| demographic parity | 0.150 |" in summary


def test_a_curve_never_hides_another(run, tmp_path):
    curves = texts(write_report(run), "Fairness")
    assert "equal opportunity, equalised odds" in curves
    several = torch.tensor([[[[9, 1, 0], [0, 9, 1], [1, 1, 8]], [[9, 0, 1], [0, 9, 1], [1, 1, 8]]]])
    index = write_report(make(tmp_path, several))
    assert "equal opportunity, equalised odds" not in texts(index, "Fairness")


def test_the_common_test_set_comes_first_and_has_no_worst_client(tmp_path):
    path = make(tmp_path, torch.tensor(GROUPS), ("clients", "test"))
    assert list(section(path)) == [
        *("Test set", "Test set, by group", "Clients’ test parts", "Clients’ test parts, by group")
    ]
    assert section(path)["Test set"].header == ("notion", "gap", "deviation")
    found = fairness(read_run(path))
    assert found is not None
    assert [plot.name for plot in found.plots] == ["fairness-test", "fairness-clients", "fairness-local-clients"]
    only = make(tmp_path / "only", torch.tensor(GROUPS), ("test",))
    assert [fact.remark for fact in gaps(read_run(only))] == ["", "", ""]


def test_who_is_not_there_has_no_rate_and_is_in_no_gap(tmp_path):
    groups = torch.tensor([[[[3, 1], [0, 0]], [[2, 0], [1, 1]], [[0, 0], [0, 0]]]])
    names = {"y": ("no", "yes"), "a": ("one", "two", "three")}
    rows = section(make(tmp_path, groups, names=names))["Clients’ test parts, by group"].rows
    assert rows[0] == ("examples", "4", "4", "0", "8", "–")
    assert rows[2] == ("P(yes)", "0.250", "0.250", "–", "0.250", "0.000")
    assert rows[4] == ("P(yes | yes)", "–", "0.500", "–", "0.500", "0.000")


def test_of_many_rates_those_that_differ_most_are_shown_in_their_order(tmp_path):
    generator = torch.Generator().manual_seed(0)
    groups = torch.randint(1, 9, (1, 2, 7, 7), generator=generator)
    groups[0, 0, 2, 5] = 500
    names = {"y": tuple("abcdefg"), "a": ("left", "right")}
    table = section(make(tmp_path, groups, names=names))["Clients’ test parts, by group"]
    assert len(table.rows) == 1 + 20 and "The 20 of 57 rates that differ most." in table.note
    counts = groups[0].double().numpy()
    rates = {f"P({b} | {a})": counts[:, i, j] / counts[:, i].sum(1) for i, a in enumerate("abcdefg")
             for j, b in enumerate("abcdefg")}  # fmt: skip
    rates |= {f"P({b})": counts[:, :, j].sum(1) / counts.sum((1, 2)) for j, b in enumerate("abcdefg")}
    rates["accuracy"] = counts.trace(axis1=1, axis2=2) / counts.sum((1, 2))
    most = sorted(rates, key=lambda name: -np.ptp(rates[name]))[:20]
    assert {row[0] for row in table.rows[1:]} == set(most) and "P(f | c)" in most
    for name, left, right, _, gap in table.rows[1:]:
        assert (left, right) == tuple(f"{value:.3f}" for value in rates[name])
        assert gap == f"{np.ptp(rates[name]):.3f}"


def test_groups_without_names_go_by_their_numbers_and_names_are_no_markup(tmp_path):
    odd = {"y": ("<b>no</b>",), "a": ("$left$ | x",)}
    index = write_report(make(tmp_path, torch.tensor(GROUPS), names=odd))
    table = section(index.parents[1])["Clients’ test parts, by group"]
    assert table.header == ("", "$left$ | x", "1", "all", "gap") and table.rows[2][0] == "P(1)"
    assert "P(1 | <b>no</b>)" in texts(index, "Fairness") and "<b>" not in index.read_text(encoding="utf-8")


def test_a_randomised_classifier_counts_in_fractions(tmp_path):
    groups = torch.tensor(GROUPS).double() * 0.75 + 0.25
    table = section(make(tmp_path, groups))["Clients’ test parts, by group"]
    yes = sum(client[0][label][1] * 0.75 + 0.25 for client in GROUPS for label in (0, 1))
    assert table.rows[2][1] == f"{yes / (200 * 0.75 + 8 * 0.25):.3f}"


def test_a_run_whose_last_evaluation_is_not_there_has_its_metrics_still(run, tmp_path):
    (tmp_path / "run").mkdir()
    for name in ("experiment.toml", "metrics.jsonl"):
        (tmp_path / "run" / name).write_bytes((run / name).read_bytes())
    (table,) = section(tmp_path / "run").values()
    assert table.header == ("notion", "gap", "deviation")
    assert table.rows[0][1] == "0.150"
    assert write_report(tmp_path / "run").is_file()


def test_a_run_without_groups_says_nothing_of_them(tmp_path):
    run = Run.create(tmp_path, "plain", 1, "rounds = 1\n", {})
    run.record({"round": 1, "test/accuracy": 0.5, "test/accuracy_gap": 0.25, "gap": 1, "deviation": 2})
    record = read_run(run.path)
    assert fairness(record) is None and gaps(record) == []
    index = write_report(run.path)
    assert "Fairness" not in index.read_text(encoding="utf-8")
    assert "test/accuracy_gap" in texts(index, "Curves")


def test_a_notion_has_a_gap_and_a_deviation_of_the_same_part():
    names = {f"test/{notion}_{end}" for notion in ("b", "a") for end in ("gap", "deviation")}
    names |= {"test/c_gap", "clients/c_deviation", "train/d_gap", "train/d_deviation", "x/y/e_gap", "x/y/e_deviation"}
    assert notions(names) == {"test": ["a", "b"]}
    local = {"clients/local_a_gap", "clients/local_a_deviation"}
    assert notions(names | local) == {"test": ["a", "b"]}
    pooled = {"clients/a_gap", "clients/a_deviation"}
    assert notions(names | local | pooled) == {"test": ["a", "b"], "clients": ["a"]}
    own = {name for name in names if name.startswith("test/") and "/c_" not in name}
    assert apart(names | local | pooled | {"test/accuracy"}) == own | local | pooled


def test_every_metric_has_a_curve_or_is_in_the_section(run):
    record = read_run(run)
    assert set(curved(record)) | apart(record.metrics) == record.metrics.keys() - {"round"}
    assert not set(curved(record)) & apart(record.metrics)
    assert len(apart(record.metrics)) == 2 * 2 * 3


def test_groups_that_do_not_fit_the_classes_are_refused(run, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "experiment.toml").write_text("rounds = 1\n")
    for damaged in ([[1, 2], [3, 4]], [[[1]]], [[[1, 2, 3], [4, 5, 6]]]):
        found = {"test": {"confusion": [[1, 2], [3, 4]], "groups": damaged}}
        (tmp_path / "run" / "evaluation.json").write_text(json.dumps(found))
        with pytest.raises(ValueError, match=r"evaluation.json is damaged: test.groups has shape"):
            read_run(tmp_path / "run")
