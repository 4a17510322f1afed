"""Writing a run's report into its directory."""

from pathlib import Path

from fedsim.report.drawing import inline, save, style
from fedsim.report.markdown import markdown
from fedsim.report.page import page
from fedsim.report.reading import read_run
from fedsim.report.sections import headline, sections, subtitle


def write_report(run: str | Path) -> Path:
    """Makes report/ in a run's directory, anew, and gives the path of its index.html.

    Raises:
        FileNotFoundError: the directory is not that of a run.
        ValueError: a file in it is damaged.
    """
    record = read_run(run)
    folder = record.path / "report"
    folder.mkdir(exist_ok=True)
    drawings: dict[str, str] = {}
    with style():
        parts = sections(record)
        for plot in (plot for section in parts for plot in section.plots):
            drawings[plot.name] = inline(save(plot, folder), plot.name, plot.title)
    for old in (*folder.glob("*.svg"), *folder.glob("*.png")):
        if old.stem not in drawings:
            old.unlink()
    told = (record.name, subtitle(record), headline(record), parts)
    (folder / "summary.md").write_text(markdown(*told), encoding="utf-8")
    index = folder / "index.html"
    index.write_text(page(*told, drawings), encoding="utf-8")
    return index
