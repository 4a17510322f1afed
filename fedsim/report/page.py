"""The report as one HTML page that needs nothing besides itself: no network, no script."""

from collections.abc import Mapping, Sequence
from html import escape

from fedsim.report.content import Fact, Fold, Section, Table
from fedsim.report.formats import plain
from fedsim.report.palette import DARK, LIGHT, variables
from fedsim.report.style import STYLE

_TILES = 6  # in a row
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def page(
    title: str, subtitle: str, facts: Sequence[Fact], sections: Sequence[Section], drawings: Mapping[str, str]
) -> str:
    """The whole page, which is well-formed XML behind its first line.

    Args:
        title: what was run.
        subtitle: a line below it.
        facts: the numbers at the top.
        sections: what follows, in order.
        drawings: the name of each plot and its SVG element.
    """
    style = f":root {{ color-scheme: light dark; --back: #f7f8f9; {variables(LIGHT)} }}\n"
    style += f"@media screen and (prefers-color-scheme: dark) {{ :root {{ --back: #15171a; {variables(DARK)} }} }}\n"
    links = "".join(f'<a href="#{_anchor(part)}">{_text(part.title)}</a>' for part in sections)
    body = "\n".join(_section(part, drawings) for part in sections)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8"/>
<meta http-equiv="Content-Security-Policy" content="{escape(_POLICY)}"/>
<meta name="viewport" content="width=device-width, initial-scale=1"/>
<title>{_text(title)}</title>
<style>
{style}{STYLE}</style>
</head>
<body>
<main>
<header>
<h1>{_text(title)}</h1>
<p class="note">{_text(subtitle)}</p>
<nav>{links}</nav>
{_facts(facts)}
</header>
{body}
</main>
</body>
</html>
"""


def _text(text: object) -> str:
    return escape(plain(text))


def _anchor(section: Section) -> str:
    return escape(section.title.lower().replace(" ", "-"))


def _section(section: Section, drawings: Mapping[str, str]) -> str:
    plots = "\n".join(f"<figure>{drawings[plot.name]}</figure>" for plot in section.plots)
    tables = "\n".join(map(_table, section.tables))
    parts = [
        f'<section id="{_anchor(section)}">',
        f"<h2>{_text(section.title)}</h2>",
        f'<p class="note">{_text(section.note)}</p>' if section.note else "",
        _facts(section.facts),
        f'<div class="plots">\n{plots}\n</div>' if plots else "",
        f'<div class="tables">\n{tables}\n</div>' if tables else "",
        *map(_fold, section.folds),
        "</section>",
    ]
    return "\n".join(part for part in parts if part)


def _facts(facts: Sequence[Fact]) -> str:
    rows = max(-(-len(facts) // _TILES), 1)
    columns = -(-len(facts) // rows)  # as even as can be: 4 and 3 of 7 tiles
    told = "\n".join(
        ('<div class="bad">' if fact.bad else "<div>")
        + f"<dt>{_text(fact.name)}</dt><dd>{_text(fact.value)}</dd>"
        + (f'<dd class="remark">{_text(fact.remark)}</dd>' if fact.remark else "")
        + "</div>"
        for fact in facts
    )
    return f'<dl class="facts" style="--columns: {columns}">\n{told}\n</dl>' if told else ""


def _table(table: Table) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        classes = (' class="word"' if place in table.words else "" for place in range(len(cells)))
        return "<tr>" + "".join(f"<{tag}{c}>{_text(t)}</{tag}>" for c, t in zip(classes, cells, strict=True)) + "</tr>"

    head = f"<thead>{row(table.header, 'th')}</thead>" if table.header != ("key", "value") else ""
    body = "\n".join(row(cells, "td") for cells in table.rows)
    title = f"<h3>{_text(table.title)}</h3>" if table.title else ""
    note = f'<p class="small">{_text(table.note)}</p>' if table.note else ""
    inner = f'<div class="scroll"><table>{head}<tbody>\n{body}\n</tbody></table></div>'
    return f'<div class="table">{title}{inner}{note}</div>'


def _fold(fold: Fold) -> str:
    return f"<details><summary>{_text(fold.title)}</summary><pre>{_text(fold.text)}</pre></details>"
