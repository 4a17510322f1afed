import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import matplotlib
import numpy as np
import pytest

from fedsim.report import write_report
from fedsim.report.drawing import thin
from fedsim.report.failures import grouped
from fedsim.report.measures import direction
from fedsim.report.palette import DARK, LIGHT
from fedsim.report.reading import Failure

EVIL = "</title><script>alert('x')</script> $x & \"y\" \x1b[31m"
NAMESPACES = ("http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink")
VOID = {"meta"}


def make(
    path: Path,
    *,
    rounds: int = 6,
    evaluate: bool = True,
    clients: int = 0,
    classes: tuple[str, ...] = (),
    failures: tuple[dict[str, object], ...] = (),
    name: str = "digits",
) -> Path:
    path.mkdir(parents=True)
    tables = f'name = {json.dumps(name)}\nseed = 1\nrounds = {rounds}\n[strategy]\nuse = "strategies.fedavg:FedAvg"\n'
    (path / "experiment.toml").write_text(tables + "[clients.train]\nlr = 0.1\n")
    (path / "environment.json").write_text(json.dumps({"engine": name, "num_clients": 20, "command": ["a b", name]}))
    with (path / "metrics.jsonl").open("w") as file:
        for number in range(1, rounds + 1):
            line = {"round": number, "seconds": 0.5, "clients": 10, "failed": 0, "bytes_down": 1000, "bytes_up": 500}
            if evaluate:
                line |= {"test/accuracy": 1 - 1 / (number + 1), "test/loss": 1 / number}
            file.write(json.dumps(line | {f"dual/{name}": 0.1 * number}) + "\n")
    if clients:
        row = np.arange(clients)
        table = np.column_stack([row, row % 50 + 1, (row % 11) / 10])
        np.savetxt(path / "clients.csv", table, "%g", ",", header="client,examples,accuracy", comments="")
    if classes:
        counts = (np.eye(len(classes), dtype=int) * 8 + 1).tolist()
        found = {"round": rounds, "test": {"confusion": counts, "classes": classes}}
        (path / "evaluation.json").write_text(json.dumps(found))
    if failures:
        (path / "failures.jsonl").write_text("".join(json.dumps(failure) + "\n" for failure in failures))
    return path


def parsed(index: Path) -> ElementTree.Element:
    text = index.read_text(encoding="utf-8")
    assert text.startswith("<!DOCTYPE html>\n")
    return ElementTree.fromstring(text.removeprefix("<!DOCTYPE html>\n"))


def headings(index: Path) -> list[str]:
    return [heading.text or "" for heading in parsed(index).iter("h2")]


def facts(index: Path) -> dict[str, str]:
    first = next(part for part in parsed(index).iter("dl") if part.get("class") == "facts")
    return {part[0].text or "": part[1].text or "" for part in first}


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    failures = ({"round": 2, "client": 3, "reason": f"Traceback\nValueError: {EVIL}"},)
    classes = ("<b>cat</b>", "$dog$ $", "_x")
    return write_report(
        make(tmp_path_factory.mktemp("full") / "run", clients=20, classes=classes, failures=failures, name=EVIL)
    )


def test_a_report_has_every_section_in_reading_order(full):
    assert headings(full) == [
        *("Curves", "Clients", "Classes", "Traffic", "Time", "Failures", "Configuration", "Environment")
    ]
    assert facts(full) == {
        "Test accuracy": f"{1 - 1 / 7:.3f}",
        "Test loss": f"{1 / 6:.3f}",
        "Rounds": "6",
        "Clients": "20",
        "Time": "3.0 s",
        "Traffic": "9 kB",
        "Failures": "1",
    }


def test_the_tiles_are_spread_evenly_and_that_of_failures_stands_out(full, tmp_path):
    first = next(part for part in parsed(full).iter("dl") if part.get("class") == "facts")
    assert len(first) == 7 and first.get("style") == "--columns: 4"
    assert [tile[0].text for tile in first if tile.get("class") == "bad"] == ["Failures"]
    assert 'class="bad"' not in write_report(make(tmp_path / "run")).read_text(encoding="utf-8")


def test_the_page_is_well_formed_and_its_ids_are_unique_and_links_lead_somewhere(full):
    page = parsed(full)
    ids = [element.get("id") for element in page.iter() if element.get("id")]
    assert len(ids) == len(set(ids))
    links = [element.get("href", "") for element in page.iter("a")]
    links += [element.get("{http://www.w3.org/1999/xlink}href", "") for element in page.iter()]
    inside = [link for link in links if link and not link.startswith("data:")]
    assert inside and all(link.startswith("#") and link[1:] in ids for link in inside)
    assert all(use in ids for use in re.findall(r"url\(#([^)]*)\)", full.read_text()))


def test_the_page_needs_nothing_besides_itself(full):
    text = full.read_text()
    assert set(re.findall(r"(?:https?:)?//[a-z][^\"'\s<)]*", text)) <= set(NAMESPACES)
    tags = {element.tag.split("}")[-1] for element in parsed(full).iter()}
    assert not tags & {"script", "link", "iframe", "object", "embed", "img", "base", "form", "video", "audio"}
    for element in parsed(full).iter():
        assert not any(
            name.split("}")[-1].lower() in ("src", "srcset") or name.startswith("on") for name in element.attrib
        )
    assert "@import" not in text


def test_what_the_files_say_is_text_never_markup(full):
    text = full.read_text()
    assert "<script" not in text and "<b>" not in text and "\x1b" not in text
    title = parsed(full).find("head/title")
    assert title is not None and title.text == EVIL.replace("\x1b", "\N{REPLACEMENT CHARACTER}")
    summary = (full.parent / "summary.md").read_text()
    assert "<script" not in summary and "<b>" not in summary


def test_plots_are_files_and_no_figure_of_pyplot(full):
    svg, png = ({path.stem for path in full.parent.glob(f"*.{kind}")} for kind in ("svg", "png"))
    assert svg == png >= {"traffic", "time", "clients-histogram", "clients-examples", "confusion-test"}
    assert len(list(parsed(full).iter("figure"))) == len(svg)
    assert matplotlib.rcParams["text.parse_math"] is True  # left as it was


def test_colours_of_plots_follow_the_page_into_the_dark(full):
    text = full.read_text()
    drawings = "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))
    assert "var(--ink)" in drawings and not [colour for colour in LIGHT.values() if colour in drawings]
    assert set(re.findall(r"var\(--(\w+)\)", text)) <= LIGHT.keys() | {"back", "columns"}
    assert LIGHT.keys() == DARK.keys()


def test_the_same_run_gives_the_same_report(full):
    before = full.read_bytes()
    stale = full.parent / "metric-99-gone.svg"
    stale.write_text("an earlier report had more")
    assert write_report(full.parent.parent).read_bytes() == before
    assert not stale.exists()


def test_the_summary_has_the_numbers_of_the_page(full):
    summary = (full.parent / "summary.md").read_text()
    for name, value in facts(full).items():
        assert f"- {name}: **{value}**" in summary
    assert [line[3:] for line in summary.splitlines() if line.startswith("## ")] == headings(full)


def test_what_was_not_recorded_is_left_out(tmp_path):
    index = write_report(make(tmp_path / "run", evaluate=False))
    assert headings(index) == ["Curves", "Traffic", "Time", "Configuration", "Environment"]
    assert "Test accuracy" not in facts(index)
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "experiment.toml").write_text("rounds = 3\n")
    index = write_report(bare)
    assert headings(index) == ["Configuration"]
    assert facts(index) == {"Rounds": "0"}


def test_a_run_of_one_round_has_a_report(tmp_path):
    index = write_report(make(tmp_path / "run", rounds=1, clients=1, classes=("a",)))
    assert {"Curves", "Clients", "Classes"} <= set(headings(index))


def test_values_that_are_not_finite_are_said_to_be_so(tmp_path):
    run = make(tmp_path / "run", evaluate=False)
    lines = [{"round": n, "test/loss": None if n > 1 else 2.5, "train/loss": None} for n in (1, 2, 3)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    index = write_report(run)
    assert facts(index)["Test loss"] == "not finite"
    text = index.read_text()
    assert "test/loss was not finite in 2 rounds, first in round 2." in text
    assert "best 2.500, round 1" in text


def test_a_run_that_ended_early_because_it_had_converged_says_so_and_one_that_broke_off_does_not(tmp_path):
    run = make(tmp_path / "run", rounds=6)
    file = run / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()[:4]]
    told = []
    for extra in ({}, {"converged": 1}):
        file.write_text("".join(json.dumps(line) + "\n" for line in [*lines[:-1], lines[-1] | extra]))
        index = write_report(run)
        assert facts(index)["Rounds"] == "4" and headings(index)[0] == "Curves"
        assert not any("converged" in path.stem for path in index.parent.glob("*.svg"))
        told.append(index.read_text(encoding="utf-8"))
    assert "of 6 asked for" in told[0] and "then it had converged" not in told[0]
    assert "then it had converged; 6 allowed" in told[1] and "asked for" not in told[1]
    whole = write_report(make(tmp_path / "whole", rounds=4)).read_text(encoding="utf-8")
    assert "asked for" not in whole and "allowed" not in whole


@pytest.mark.slow
def test_long_runs_with_many_clients_stay_small(tmp_path):
    index = write_report(make(tmp_path / "run", rounds=10_000, clients=200_000))
    assert index.stat().st_size < 2_000_000


def test_thinning_keeps_the_mean_and_what_the_curve_reaches():
    y = np.random.default_rng(0).normal(size=1000)
    x, mean, low, high = thin(np.arange(1, 1001), y, most=100)
    blocks = y.reshape(100, 10)
    np.testing.assert_allclose(mean, blocks.mean(axis=1))
    np.testing.assert_array_equal(low, blocks.min(axis=1))
    np.testing.assert_array_equal(high, blocks.max(axis=1))
    np.testing.assert_array_equal(x, np.arange(5.5, 1000, 10))
    y[:10] = np.nan
    assert np.isnan(thin(np.arange(1000), y, most=100)[1]).tolist() == [True] + [False] * 99
    assert thin(np.arange(5), y[:5], most=5)[1] is not None


def test_failures_that_differ_in_numbers_only_are_one_reason():
    found = grouped(
        (
            Failure(1, 2, "dropped out"),
            Failure(1, 3, "Traceback\n  line 3\nValueError: client 3 gave 0.5\n"),
            Failure(4, 12, "Traceback\n  line 9\nValueError: client 12 gave 7\n"),
        )
    )
    assert [[failure.client for failure in group] for group in found] == [[3, 12], [2]]


def test_what_went_wrong_and_was_made_good_has_a_section_of_its_own(tmp_path):
    died = "a worker died: {}, and was replaced; it was at client {} and 3 more"
    incidents = tuple({"round": n, "client": None, "reason": died.format("<SIGKILL>", n)} for n in (2, 3))
    text = write_report(make(tmp_path / "run", failures=incidents)).read_text(encoding="utf-8")
    assert "Incidents" in text and "&lt;SIGKILL&gt;" in text and "2 times something went wrong" in text
    assert "every client answered" in text  # none of it is a failure
    assert "Incidents" not in write_report(make(tmp_path / "other")).read_text(encoding="utf-8")


def test_a_measure_knows_which_way_is_better():
    names = {
        "test/accuracy": 1,
        "clients/hr@10": 1,
        "test/loss": -1,
        "test/accuracy_gap": -1,
        "clients/demographic_parity_gap": -1,
        "clients/local_equalised_odds_deviation": -1,
        "deviation": -1,
        "clients/accuracy/deviations": 0,
        "clients/accuracy/std": 0,
    }
    assert {name: direction(name) for name in names} == names
