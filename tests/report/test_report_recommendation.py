"""Recommendations in a report: beside MostPop over rounds and by group, and in no table without it."""

import csv
import math
import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedsim
from fedsim.config import assemble, read
from fedsim.data.federation import Federation
from fedsim.files import as_csv
from fedsim.ranking import WANTED
from fedsim.report import compare, read_run, write_report
from fedsim.report.clients import over_clients
from fedsim.report.comparison import as_markdown, as_table, draw
from fedsim.report.content import Table
from fedsim.report.drawing import Plot
from fedsim.report.recommendation import by_kind, quarters, recommendation, recommendations
from fedsim.runs import Run

SMALL = ["data.users=40", "data.items=100", "split.negatives=20", "model.dim=4", "evaluate_every=2"]
POPULAR = 0.28


def make(
    root: Path,
    *,
    popular: float | None = POPULAR,
    columns: dict[str, Any] | None = None,
    measured: tuple[str, ...] = ("hr_10", "ndcg_10", "full_hr_10"),
    seed: int = 1,
    name: str = "taste",
    extra: str = "",
) -> Path:
    """A run of 4 rounds, evaluated in every second one."""
    run = Run.create(root, name, seed, f'name = "{name}"\nseed = {seed}\nrounds = 4\n{extra}', {"num_clients": 8})
    for number in range(1, 5):
        line: dict[str, float] = {"round": number, "train/loss": 1 / number}
        if number % 2 == 0:
            for place, told in enumerate(measured):
                line[f"clients/{told}"] = number / 10 + place / 100
                line[f"clients/{told}/std"] = 0.5
                line |= {} if popular is None else {f"clients/mostpop_{told}": popular + place / 100}
        run.record(line)
    run.save_evaluation(4, {}, {})
    if columns is not None:
        arrays = {key: np.array(values, dtype=np.float64) for key, values in columns.items()}
        (run.path / "clients.csv").write_text(as_csv(arrays))
    return run.path


def eight(**changes: Any) -> dict[str, Any]:
    """Eight users."""
    return {
        "client": range(8),
        "examples": [1] * 8,
        "hr_10": [1, 0, 1, 1, 0, 0, 1, 0],
        "ndcg_10": [0.5] * 8,
        "mostpop_hr_10": [0, 0, 0, 0, 1, 1, 1, 1],
        "activity": [8, 7, 6, 5, 4, 3, 2, 1],
        "popularity": [1, 1, 1, 1, 1, 9, 9, 9],
    } | changes


def plots(path: Path) -> dict[str, Plot]:
    found = recommendation(read_run(path))
    assert found is not None and found.title == "Recommendation"
    return {plot.name: plot for plot in found.plots}


def table(path: Path, title: str) -> dict[str, tuple[str, ...]]:
    """A table of the section by its first column, with its header as row "header"."""
    found = recommendation(read_run(path))
    assert found is not None
    (one,) = (each for each in found.tables if each.title == title)
    return {"header": one.header[1:]} | {row[0]: row[1:] for row in one.rows}


def headings(index: Path) -> list[str | None]:
    page = ElementTree.fromstring(index.read_text(encoding="utf-8").removeprefix("<!DOCTYPE html>\n"))
    return [heading.text for heading in page.iter("h2")]


# Over rounds.


def test_over_rounds_the_method_is_a_curve_and_mostpop_a_line(tmp_path):
    found = plots(make(tmp_path))
    assert list(found) == ["recommendation-hr-10", "recommendation-ndcg-10", "recommendation-full-hr-10"]
    for place, plot in enumerate(found.values()):
        (axes,) = plot.figure.axes
        own, popular = axes.lines
        assert (own.get_label(), popular.get_label()) == ("taste", "MostPop")
        assert np.array(own.get_xdata()).tolist() == [2, 4]
        assert np.array(own.get_ydata()).tolist() == pytest.approx([0.2 + place / 100, 0.4 + place / 100])
        assert set(np.array(popular.get_ydata())) == {POPULAR + place / 100}
        assert axes.get_ylim()[0] == 0


def test_each_table_has_a_row_of_mostpop_and_so_has_the_headline(tmp_path):
    path = make(tmp_path)
    assert table(path, "Among drawn negatives") == {
        "header": ("HR@10", "NDCG@10"),
        "taste": ("0.400", "0.410"),
        "its best in any round": ("0.400", "0.410"),
        "MostPop": ("0.280", "0.290"),
    }
    assert table(path, "Among all items")["MostPop"] == ("0.300",)
    assert [fact[:3] for fact in recommendations(read_run(path))] == [
        ("HR@10", "0.400", "MostPop 0.280"),
        ("NDCG@10", "0.410", "MostPop 0.290"),
    ]


@pytest.mark.parametrize(("part", "told"), [("validation", " (validation)"), ("test", "")])
def test_what_is_measured_on_validation_items_is_told_to_be(tmp_path, part, told):
    record = read_run(make(tmp_path, extra=f'[clients.evaluate]\npart = "{part}"\n'))
    assert [fact[0] for fact in recommendations(record)] == [f"HR@10{told}", f"NDCG@10{told}"]
    found = recommendation(record)
    assert found is not None and ("the one for validation" in found.note) == bool(told)


def test_where_popularity_is_not_known_there_is_no_mostpop_and_no_error(tmp_path):
    without = eight()
    del without["mostpop_hr_10"], without["popularity"]
    path = make(tmp_path, popular=None, columns=without)
    found = recommendation(read_run(path))
    assert found is not None and "It is not known here" in found.note
    assert not any("MostPop" in row[0] for each in found.tables for row in each.rows)
    assert list(plots(path)) == [
        *("recommendation-hr-10", "recommendation-ndcg-10", "recommendation-full-hr-10", "recommendation-activity"),
    ]
    assert [fact.remark for fact in recommendations(read_run(path))] == ["best 0.400, round 4", "best 0.410, round 4"]
    assert "Recommendation" in headings(write_report(path))


def test_other_numbers_of_proposals_do_as_well(tmp_path):
    path = make(tmp_path, measured=("hr_1", "hr_7", "ndcg_7"))
    assert list(plots(path)) == ["recommendation-hr-7", "recommendation-ndcg-7"]
    assert table(path, "Among drawn negatives")["header"] == ("HR@1", "HR@7", "NDCG@7")


def test_a_run_that_recommends_nothing_has_no_such_section(tmp_path):
    path = make(tmp_path, measured=("accuracy", "loss"))
    assert recommendation(read_run(path)) is None and recommendations(read_run(path)) == []
    assert "Recommendation" not in headings(write_report(path))


def test_what_the_section_tells_is_not_told_again_as_curves_and_clients(tmp_path):
    path = make(tmp_path, columns=eight())
    index = write_report(path)
    assert headings(index)[:2] == ["Curves", "Recommendation"] and "Clients" not in headings(index)
    assert {file.name for file in index.parent.glob("metric-*.svg")} == {"metric-01-training-loss.svg"}
    assert len(list(index.parent.glob("recommendation-*.png"))) == 5
    assert over_clients(read_run(make(tmp_path, columns=eight(loss=range(8)), seed=2))) is not None


# Groups.


@pytest.mark.parametrize("seed", range(20))
def test_quarters_are_disjoint_never_empty_in_order_and_keep_equal_ones_together(seed):
    random = np.random.default_rng(seed)
    values = random.integers(0, random.integers(1, 30), random.integers(1, 60)).astype(float)
    found = quarters(values)
    assert np.stack(found).sum(0).tolist() == [1] * len(values) and all(some.any() for some in found)
    assert len(found) <= 4
    for lower, upper in zip(found, found[1:], strict=False):
        assert values[lower].max() < values[upper].min()
    for share in (0.25, 0.5, 0.75):  # a group ends at each value that a quarter of the users reach, or two, or three
        reached = np.sort(values)[math.ceil(share * len(values)) - 1]
        assert reached in {values[some].max() for some in found}


def test_distinct_values_make_four_groups_of_about_the_same_size():
    for number in (4, 5, 41, 300):
        assert {int(some.sum()) for some in quarters(np.arange(float(number)))} <= {number // 4, number // 4 + 1}
        assert len(quarters(np.arange(float(number)))) == 4
    assert [some.tolist() for some in quarters(np.array([3.0, 3.0]))] == [[True, True]]
    assert [int(some.sum()) for some in quarters(np.array([1.0] * 9 + [2.0]))] == [9, 1]
    assert quarters(np.zeros(0)) == []


def test_the_groups_hits_are_their_means_with_binomial_errors(tmp_path):
    path = make(tmp_path, columns=eight())
    assert table(path, "By user activity") == {
        "header": ("1–2", "3–4", "5–6", "7–8"),
        "users": ("2", "2", "2", "2"),
        "HR@10 among drawn negatives": ("0.500 ± 0.354", "0.000 ± 0.000", "1.000 ± 0.000", "0.500 ± 0.354"),
        "MostPop’s HR@10 among drawn negatives": (*["1.000 ± 0.000"] * 2, *["0.000 ± 0.000"] * 2),
    }
    own, popular = (
        (2 / 3 * 0 + 3 / 5, 1 / 5),
        (1 / 3, 1.0),
    )  # of five users whose item one has, of three where nine have
    groups = by_kind(read_run(path), "popularity")
    assert [(group.bounds, group.n) for group in groups] == [("1", 5), ("9", 3)]
    assert [group.hits["hr_10"] for group in groups] == pytest.approx([own[0], popular[0]])
    assert [group.hits["mostpop_hr_10"] for group in groups] == pytest.approx([own[1], popular[1]])
    assert groups[0].error("hr_10") == pytest.approx(math.sqrt(0.6 * 0.4 / 5))


def test_bars_of_the_method_and_of_mostpop_stand_side_by_side(tmp_path):
    plot = plots(make(tmp_path, columns=eight()))["recommendation-activity"]
    (axes,) = plot.figure.axes
    bars = [patch for patch in axes.patches if patch.get_width() > 0]  # type: ignore[attr-defined]
    edges = sorted((bar.get_x(), bar.get_x() + bar.get_width(), bar.get_height()) for bar in bars)  # type: ignore[attr-defined]
    assert all(one[1] <= other[0] + 1e-9 for one, other in zip(edges, edges[1:], strict=False)), "none covers another"
    assert [height for *_, height in edges] == [0.5, 1, 0, 1, 1, 0, 0.5, 0]
    assert [text.get_text() for text in axes.get_xticklabels()] == [
        *("1–2\n2 users", "3–4\n2 users", "5–6\n2 users", "7–8\n2 users"),
    ]


def test_labels_do_not_overlap_however_large_their_numbers(tmp_path):
    big = np.array([1_000_000, 2_000_000, 3_000_000, 4_000_000]).repeat(2) + np.arange(8)
    plot = plots(make(tmp_path, columns=eight(activity=big)))["recommendation-activity"]
    plot.figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in plot.figure.axes[0].get_xticklabels()]
    assert all(one.x1 < other.x0 for one, other in zip(boxes, boxes[1:], strict=False))


def test_users_without_a_held_out_item_are_in_no_group(tmp_path):
    nan = float("nan")
    some = eight(
        examples=[1] * 7 + [0],
        hr_10=[1, 0, 1, 1, 0, 0, 1, nan],
        mostpop_hr_10=[1] * 7 + [nan],
        popularity=[1] * 7 + [nan],
    )
    record = read_run(make(tmp_path, columns=some))
    assert [sum(group.n for group in by_kind(record, kind)) for kind in ("activity", "popularity")] == [7, 7]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activity": [1] * 7 + [-2]}, "activity of client 7 must be a number >= 0, got -2"),
        ({"popularity": [1, float("nan")] + [1] * 6}, "popularity of client 1 must be a number >= 0, got nan"),
        ({"hr_10": [1, 0, 0.5] + [1] * 5}, "hr_10 of client 2 must be 0 or 1, got 0.5"),
        ({"mostpop_hr_10": [1] * 7 + [float("nan")]}, "mostpop_hr_10 of client 7 must be 0 or 1, got nan"),
    ],
)
def test_a_damaged_file_is_told(tmp_path, change, message):
    path = make(tmp_path, columns=eight(**change))
    with pytest.raises(ValueError, match=f"clients.csv is damaged: {message}"):
        write_report(path)


# Runs.


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    changes = [*SMALL, "rounds=4", "checkpoint_every=2", "keep_checkpoints=all"]
    return fedsim.run("fedrecgel/latent-factors", changes=changes, root=tmp_path_factory.mktemp("runs")).path


@pytest.fixture(scope="module")
def federation():
    found = assemble(*read("fedrecgel/latent-factors", SMALL)).federation
    assert isinstance(found, Federation)
    return found


@pytest.mark.parametrize("kind", ["activity", "popularity"])
def test_of_a_real_run_the_groups_are_those_of_a_plain_loop_over_users(run, federation, kind):
    counts = np.zeros(100)
    for user in range(40):
        np.add.at(counts, federation.examples(user)["item"].numpy(), 1)
    told = []
    with (run / "clients.csv").open() as file:
        own = [float(row["hr_10"]) for row in csv.DictReader(file)]
    for user in range(40):
        data = federation.examples(user, "test")
        held, drawn = data["item"][data["y"] == WANTED].numpy(), data["item"][data["y"] == 0].numpy()
        hit = (counts[drawn] >= counts[held]).sum() < 10
        told.append((len(federation.examples(user)["item"]) if kind == "activity" else counts[held][0], own[user], hit))
    groups = by_kind(read_run(run), kind)
    assert sum(group.n for group in groups) == 40
    for group in groups:
        some = [(hit, popular) for value, hit, popular in told if group.low <= value <= group.high]
        assert len(some) == group.n
        assert group.hits["hr_10"] == pytest.approx(np.mean([hit for hit, _ in some]))
        assert group.hits["mostpop_hr_10"] == pytest.approx(np.mean([popular for _, popular in some]))


def test_its_report_is_written_and_its_mostpop_is_that_of_its_groups(run):
    index = write_report(run)
    assert {file.stem for file in index.parent.glob("recommendation-*.svg")} == {
        *("recommendation-hr-10", "recommendation-ndcg-10", "recommendation-full-hr-10", "recommendation-full-ndcg-10"),
        *("recommendation-activity", "recommendation-popularity"),
    }
    groups = by_kind(read_run(run), "activity")
    pooled = sum(group.n * group.hits["mostpop_hr_10"] for group in groups) / 40
    assert read_run(run).series("clients/mostpop_hr_10")[1].tolist() == pytest.approx([pooled, pooled])


def test_a_run_that_is_resumed_ends_with_the_same_users(run, tmp_path):
    expected = (run / "clients.csv").read_text()
    again = Path(shutil.copytree(run, tmp_path / "again"))
    (again / "checkpoints" / "round-000004.safetensors").unlink()  # as if it had been killed before that was written
    (again / "clients.csv").write_text("client,examples\n")
    resumed = fedsim.resume(again)
    assert (again / "clients.csv").read_text() == expected
    assert [line["round"] for line in resumed.metrics] == [1, 2, 3, 4]
    assert recommendation(read_run(again)) is not None


# Comparisons.


def rows(path: list[Path]) -> dict[str, tuple[str, ...]]:
    found: Table = as_table(compare(path))
    return {row[0]: row for row in found.rows}


def test_a_comparison_has_mostpop_once_for_the_same_data_and_draws_it(tmp_path):
    paths = [make(tmp_path / str(seed), seed=seed) for seed in (1, 2, 3)]
    paths.append(make(tmp_path / "other", name="other"))
    found = compare(paths, tmp_path / "out")
    assert found.columns[:4] == ("clients/hr_10", "clients/ndcg_10", "clients/full_hr_10", "best")
    told = as_table(found)
    assert [row[0] for row in told.rows] == ["taste", "other", "MostPop"]
    assert told.rows[-1][1:] == ("0.280", "0.290", "0.300", "0.280", "–", "–", "–", "n=3")
    assert "| MostPop |" in (tmp_path / "out" / "comparison.md").read_text()
    assert "MostPop" in (tmp_path / "out" / "comparison.svg").read_text()


def test_of_other_data_there_is_another_row(tmp_path):
    paths = [
        make(tmp_path / "one", extra='[data]\nuse = "one"\n'),
        make(tmp_path / "two", extra='[data]\nuse = "two"\n', popular=0.1),
        make(tmp_path / "again", extra='[data]\nuse = "two"\n', popular=0.1, name="again"),
    ]
    found = rows(paths)
    assert list(found) == ["taste", "again", "MostPop, one", "MostPop, two"]
    assert [found[name][2] for name in ("MostPop, one", "MostPop, two")] == ["0.280", "0.100"]


def test_data_that_are_drawn_with_the_seed_have_a_row_for_the_seeds_that_were_run(tmp_path):
    same = {1: 0.1, 2: 0.3}
    paths = [make(tmp_path / f"a{seed}", seed=seed, popular=value) for seed, value in same.items()]
    paths += [make(tmp_path / f"b{seed}", seed=seed, popular=value, name="b") for seed, value in same.items()]
    deviation = math.sqrt(2 * 0.1**2)
    found = rows(paths)
    assert list(found) == ["taste", "b", "MostPop"]
    assert found["MostPop"][1] == f"0.200 ± {deviation:.3f}" and found["MostPop"][-1] == "n=2"
    found = rows([*paths, make(tmp_path / "c", seed=9, popular=0.5, name="c")])
    assert list(found) == ["taste", "b", "c", "MostPop, seeds 1, 2", "MostPop, seed 9"]


def test_runs_without_it_and_runs_that_do_not_recommend_have_no_such_row(tmp_path):
    assert list(rows([make(tmp_path / "a", popular=None)])) == ["taste"]
    found = compare([make(tmp_path / "b", measured=("accuracy",))])
    assert found.columns[0] == "clients/accuracy" and found.references == ()
    assert "MostPop" not in as_markdown(found) and draw(found, tmp_path)


def test_of_two_runs_that_know_it_and_one_that_does_not_the_row_is_of_the_two(tmp_path):
    paths = [make(tmp_path / str(seed), seed=seed, popular=None if seed == 3 else 0.28) for seed in (1, 2, 3)]
    assert rows(paths)["MostPop"][-1] == "n=2"


def test_who_measures_less_of_the_same_data_shares_its_row(tmp_path):
    every = make(tmp_path / "all", extra="[clients.evaluate]\nfull = true\nat = [5, 10]\n")
    less = make(tmp_path / "less", extra="[clients.evaluate]\nfull = false\nat = [10]\n", measured=("hr_10", "ndcg_10"))
    for paths in ([every, less], [less, every]):
        (popular,) = (row for row in as_table(compare(paths)).rows if row[0].startswith("MostPop"))
        assert popular[0] == "MostPop" and {"0.280", "0.290", "0.300"} <= set(popular)


def test_namesakes_of_one_seed_are_told_apart_by_what_differs(tmp_path):
    paths = [
        make(tmp_path / str(number), extra=f"[split]\nnegatives = {number}\n", popular=1 / number) for number in (9, 99)
    ]
    assert [row.name for row in compare(paths).references] == ["MostPop, negatives = 9", "MostPop, negatives = 99"]
    paths = [make(tmp_path / f"x{some}", extra=f"[model]\ndim = {some}\n", popular=1 / some) for some in (4, 8)]
    assert [row.name for row in compare(paths).references] == ["MostPop, seed 1, dim = 4", "MostPop, seed 1, dim = 8"]
