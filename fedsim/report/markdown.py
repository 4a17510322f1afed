"""The report as Markdown."""

from collections.abc import Sequence

from fedsim.report.content import Fact, Section, Table
from fedsim.report.formats import plain


def markdown(title: str, subtitle: str, facts: Sequence[Fact], sections: Sequence[Section]) -> str:
    """The same numbers and tables as on the page, and links to the plots; what the page folds is left out."""
    parts = [f"# {cell(title)}", cell(subtitle), _facts(facts)]
    for section in sections:
        parts += [f"## {cell(section.title)}", cell(section.note), _facts(section.facts)]
        parts.append("\n".join(f"![{cell(plot.title)}]({plot.name}.png)" for plot in section.plots))
        parts += map(as_table, section.tables)
    return "\n\n".join(part for part in parts if part) + "\n"


def as_table(table: Table) -> str:
    """A table, with its title above and its note below."""
    rule = " | ".join("---" if place in table.words else "---:" for place in range(len(table.header)))
    lines = [" | ".join(map(cell, row)) for row in (table.header, *table.rows)]
    body = "\n".join(f"| {line} |" for line in (lines[0], rule, *lines[1:]))
    return "\n\n".join(
        part for part in (f"### {cell(table.title)}" if table.title else "", body, cell(table.note)) if part
    )


def cell(text: object) -> str:
    """Text in one line, in which nothing is markup."""
    line = " ".join(plain(text).split())
    for sign in "\\|`*[]":
        line = line.replace(sign, f"\\{sign}")
    return line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _facts(facts: Sequence[Fact]) -> str:
    told = ((fact.name, fact.value, fact.remark) for fact in facts)
    return "\n".join(
        f"- {cell(name)}: **{cell(value)}**" + (f" ({cell(more)})" if more else "") for name, value, more in told
    )
