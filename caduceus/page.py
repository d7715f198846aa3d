"""The look of every report: one HTML page that needs no other file, light or dark as the reader's system is set."""

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

COLOURS = {
    "ink": ("#1c2733", "#e4e9ee"),
    "faint": ("#5d6976", "#9aa6b3"),
    "line": ("#d9dfe5", "#3a4551"),
    "paper": ("#ffffff", "#141a21"),
    "train": ("#3566a8", "#6d9be0"),
    "valid": ("#b8620f", "#f0a557"),
    "test": ("#2f8159", "#5fc091"),
    "dropped": ("#c9ced4", "#56616d"),
    "bare": ("#eef1f4", "#252e38"),
    "series0": ("#2f66b0", "#72a4ec"),
    "series1": ("#bd5b00", "#f5a04f"),
    "series2": ("#2b8057", "#62c696"),
    "series3": ("#b03a55", "#f0839a"),
    "series4": ("#7350b5", "#b59af0"),
    "series5": ("#7d6a14", "#d6c05a"),
    "series6": ("#16808a", "#5fcad4"),
    "series7": ("#6b4a3a", "#c9a08c"),
}
"""{name: (in light, in dark)}: CSS variables of every page."""


def _variables(dark: bool) -> str:
    return " ".join(f"--{name}: {colours[dark]};" for name, colours in COLOURS.items())


_STYLE = f"""
:root {{ color-scheme: light dark; {_variables(False)} }}
@media (prefers-color-scheme: dark) {{ :root {{ {_variables(True)} }} }}
body {{ font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 960px;
  margin: 2.5rem auto; padding: 0 1rem; overflow-wrap: break-word; }}
h1 {{ font-size: 1.5rem; margin: 0 0 .2rem; }} h2 {{ font-size: 1.15rem; margin: 2.2rem 0 .6rem; }}
p, li, figcaption {{ color: var(--faint); margin: .2rem 0; }} .scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100%; font-size: 14px; }}
th {{ font-weight: 600; color: var(--faint); }} th, td {{ padding: .3rem .55rem; text-align: right;
  border-bottom: 1px solid var(--line); white-space: nowrap; }} th:first-child, td:first-child {{ text-align: left; }}
svg {{ display: block; width: 100%; height: auto; }} svg.wide {{ min-width: 700px; }}
svg text {{ fill: var(--ink); font-size: 10px; }}
.key span {{ display: inline-block; width: .8em; height: .8em; margin: 0 .35em 0 1em; border-radius: 2px; }}
.warn {{ color: var(--valid); font-weight: 600; }}
summary {{ cursor: pointer; font-weight: 600; padding: .4rem 0; }}
"""


def page(title: str, parts: Iterable[str], style: str = "") -> bytes:
    """A whole page made of `parts`, which are HTML; `style` is CSS that this page needs beyond the common one."""
    viewport = '<meta name="viewport" content="width=device-width, initial-scale=1">'
    head = f'<meta charset="utf-8">{viewport}<title>{escape(title)}</title><style>{_STYLE}{style}</style>'
    body = "\n".join(parts)
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n{body}\n</body></html>\n'.encode()


def table(headings: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table of plain text (escaped) as HTML; where it is wider than the page, it has a scroll bar."""
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in headings)
    body = "".join("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll" tabindex="0"><table><tr>{head}</tr>{body}</table></div>'
