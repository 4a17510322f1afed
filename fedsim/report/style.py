"""The style of the page; in a module, for Flower takes nothing but Python and a few other files to its nodes."""

STYLE = """body { margin: 0; background: var(--back); color: var(--ink); font: 15px/1.5 system-ui, "Segoe UI", Roboto,
  Helvetica, Arial, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 28px 24px 48px; }
h1 { margin: 0; font-size: 27px; line-height: 1.25; font-weight: 650; overflow-wrap: anywhere; }
h2 { margin: 0 0 12px; font-size: 19px; font-weight: 650; }
h3 { margin: 0 0 6px; font-size: 14px; font-weight: 650; overflow-wrap: anywhere; }
p { margin: 0 0 14px; max-width: 75ch; }
a { color: var(--c0); text-decoration: none; }
a:hover { text-decoration: underline; }
nav { display: flex; flex-wrap: wrap; gap: 2px 18px; margin: 14px 0 20px; font-size: 14px; }
section { margin-top: 40px; }
.note, .remark, .small { color: var(--quiet); }
.small { font-size: 13px; margin: 6px 0 0; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(max(150px, (100% - 10px * (var(--columns) - 1))
  / var(--columns)), 1fr)); gap: 10px; margin: 0 0 16px; }
.facts > div { background: var(--paper); border: 1px solid var(--grid); border-radius: 8px; padding: 10px 14px 11px; }
.facts > .bad { border-color: var(--c3); }
.facts > .bad dd { color: var(--c3); }
.facts dt { color: var(--quiet); font-size: 13px; overflow-wrap: anywhere; }
.facts dd { margin: 0; font-size: 22px; line-height: 1.3; font-weight: 600; font-variant-numeric: tabular-nums; }
.facts dd.remark { font-size: 12.5px; font-weight: 400; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 400px), 1fr)); gap: 14px;
  margin-bottom: 18px; }
figure { margin: 0; padding: 12px; background: var(--paper); border: 1px solid var(--grid); border-radius: 8px; }
figure svg * { stroke-linejoin: round; stroke-linecap: butt; }
figure svg { display: block; width: 100%; height: auto; max-height: 520px; }
.tables { display: flex; flex-wrap: wrap; gap: 20px 32px; align-items: flex-start; }
.table { max-width: 100%; min-width: 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13.5px; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 14px 4px 0; text-align: right; vertical-align: top; border-bottom: 1px solid var(--grid);
  white-space: nowrap; }
th { color: var(--quiet); font-weight: 500; }
th.word, td.word { text-align: left; }
td.word { white-space: normal; overflow-wrap: break-word; max-width: 52ch; }
details { margin-top: 8px; }
summary { cursor: pointer; color: var(--quiet); font-size: 14px; overflow-wrap: anywhere; }
pre { margin: 8px 0 0; padding: 12px 14px; overflow-x: auto; background: var(--paper); border: 1px solid var(--grid);
  border-radius: 8px; font: 12.5px/1.45 ui-monospace, Menlo, Consolas, monospace; }
@media (max-width: 560px) { main { padding: 18px 12px 32px; } .facts { grid-template-columns: 1fr 1fr; } .facts dd {
  font-size: 19px; } figure { padding: 6px; } table { font-size: 12.5px; } th, td { padding-right: 9px; } }
@media print { nav { display: none; } main { max-width: none; padding: 0; } figure, .facts > div, tr { break-inside:
  avoid; } h2, h3 { break-after: avoid; } pre { white-space: pre-wrap; } section { margin-top: 24px; } }
"""
