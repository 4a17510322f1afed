"""What the terminal shows: written to a console that records it."""

import io

import pytest
from rich.console import Console

from fedsim.progress import Lines, Live, Silent, display, told


def plain() -> Console:
    return Console(file=io.StringIO(), width=40)


def written(console: Console) -> str:
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def metrics(round: int, **others: float) -> dict[str, float]:
    return {"round": round, "seconds": 0.5, "clients": 10, "failed": 0} | others


def test_the_first_the_last_and_every_evaluated_round_have_a_line():
    console = plain()
    with Lines(console, "name", 6) as lines:
        for number in range(1, 7):
            lines.show(metrics(number, **({"test/accuracy": number / 10} if number == 4 else {})))
    shown = written(console).splitlines()
    assert [line.split()[2] for line in shown] == ["1/6", "4/6", "6/6"]
    assert all(line.startswith("name  round ") for line in shown)
    assert "test/accuracy 0.4000" in shown[1]
    assert shown[-1].endswith("0 s left")


def test_a_line_is_never_broken_however_narrow_the_console():
    console = plain()
    Lines(console, "a-name-that-is-rather-long" * 3, 1).show(metrics(1, **{"test/accuracy": 0.5, "train/loss": 0.25}))
    assert written(console).count("\n") == 1


def test_after_ten_seconds_a_line_is_due_without_an_evaluation():
    console = plain()
    lines = Lines(console, "name", 9)
    lines.show(metrics(1))
    lines.show(metrics(2))
    assert len(written(console).splitlines()) == 1
    lines.last -= 11
    lines.show(metrics(3))
    lines.show(metrics(4))
    assert len(written(console).splitlines()) == 2


def test_a_resumed_run_counts_on_and_its_first_line_is_of_the_round_that_comes_next():
    console = plain()
    lines = Lines(console, "name", 10, done=6)
    lines.began -= 8
    for number in (7, 8, 9):
        lines.show(metrics(number))
    shown = written(console).splitlines()
    assert len(shown) == 1
    assert "round 7/10" in shown[0]
    assert "24 s left" in shown[0]  # eight seconds for one round, three to go


def test_brackets_are_shown_as_they_are():
    for kind in (Lines, Live):
        console = Console(file=io.StringIO(), width=200, force_terminal=True, color_system=None)
        with kind(console, "[red]name[/]", 1) as shown:
            shown.show(metrics(1, **{"test/[b]": 0.5}))
        assert "[red]name[/]" in written(console)
        assert "test/[b] 0.5000" in written(console)


@pytest.mark.parametrize("width", [60, 80, 200])
def test_a_bar_shows_rounds_and_the_latest_of_each_metric(width):
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    with Live(console, "a-name-of-an-experiment", 400, done=1) as bar:
        bar.show(metrics(2, **{"test/accuracy": 0.25}))
        bar.show(metrics(300, **{"train/loss": 1.5}))
        assert bar.progress.tasks[0].completed == 300
    lines = written(console).splitlines()
    assert any("a-name-of-an-experiment" in line and "300/400" in line for line in lines)
    words = "  test/accuracy 0.2500  train/loss 1.5000  20 clients/s"
    assert any(words in line for line in lines)


def test_a_bar_begins_where_a_resumed_run_goes_on():
    bar = Live(Console(file=io.StringIO()), "name", 4, done=3)
    assert (bar.progress.tasks[0].completed, bar.progress.tasks[0].total) == (3, 4)


def test_a_bar_is_taken_down_when_a_round_fails():
    console = Console(file=io.StringIO(), width=200, force_terminal=True)
    bar = Live(console, "name", 4)
    with pytest.raises(RuntimeError, match="by design"), bar:
        raise RuntimeError("by design")
    assert not bar.live.is_started


def test_nothing_is_shown_silently(capsys):
    with Silent() as silent:
        silent.show(metrics(1))
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ({"round": 1, "seconds": 0.5, "clients": 10, "failed": 0}, "20 clients/s"),
        ({"round": 1, "seconds": 0.0, "clients": 10, "failed": 0}, ""),
        ({"round": 1, "seconds": 2.0, "clients": 10, "failed": 3}, "5 clients/s  3 failed"),
        ({"round": 1, "train/loss": 0.5, "test/accuracy": 1.0}, "test/accuracy 1.0000  train/loss 0.5000"),
        (
            {"round": 1, "test/loss": 0.5, "test/hr": 0.1, "test/ndcg": 0.2, "test/more": 0.3},
            "test/hr 0.1000  test/ndcg 0.2000",
        ),
        ({"round": 1, "train/loss": float("nan")}, "train/loss nan"),
        (
            {"round": 1, "train/loss": 1234567.0, "test/accuracy": 0.00025},
            "test/accuracy 0.00025  train/loss 1.23457e+06",
        ),
        ({"round": 1, "train/loss": 1e4, "test/accuracy": 0.0}, "test/accuracy 0.0000  train/loss 10000.0000"),
    ],
)
def test_the_metrics_that_matter_most_are_told_in_a_few_words(found, words):
    assert told(found) == words


def test_where_there_is_no_terminal_there_are_lines(monkeypatch):
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.delenv("TTY_COMPATIBLE", raising=False)
    assert isinstance(display("name", 3), Lines)
    monkeypatch.setenv("FORCE_COLOR", "1")  # which makes rich take anything for a terminal
    assert isinstance(display("name", 3), Live)


def test_what_went_wrong_is_written_and_stays():
    console = plain()
    Lines(console, "name", 9).warn("round 2: a [worker] died " + "x" * 60)
    assert written(console) == "name  round 2: a [worker] died " + "x" * 60 + "\n"
    bar = Console(file=io.StringIO(), width=40, force_terminal=True)
    with Live(bar, "name", 9) as live:
        live.show(metrics(1))
        live.warn("a [worker] died")
        live.show(metrics(2))
    assert written(bar).count("a [worker] died") == 1  # the bar is drawn anew, it is not
    Silent().warn("nobody sees this")


def test_recommendations_are_told_with_what_mostpop_reaches_where_that_is_known():
    found = {"clients/hr_5": 0.1, "clients/hr_10": 0.3, "clients/ndcg_10": 0.2, "clients/full_hr_10": 0.05}
    assert told(found) == "clients/hr_10 0.3000  clients/ndcg_10 0.2000"
    beside = told(found | {"clients/mostpop_hr_10": 0.25, "clients/mostpop_ndcg_10": 0.125})
    assert beside == "clients/hr_10 0.3000 (MostPop 0.2500)  clients/ndcg_10 0.2000 (MostPop 0.1250)"
