"""The results of a suite as a table of text and as a page with a figure. Imports no torch."""

import io
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from caduceus.evaluate.columns import mean_and_spread
from caduceus.files import write_atomically
from caduceus.page import COLOURS, page, table

_INK, _FAINT = COLOURS["ink"][0], COLOURS["faint"][0]
_STYLE = {
    "svg.fonttype": "none", "font.size": 9, "text.color": _INK, "axes.edgecolor": _FAINT, "xtick.color": _FAINT,
    "ytick.color": _FAINT, "axes.labelcolor": _INK, "axes.spines.top": False, "axes.spines.right": False,
    "figure.facecolor": "none", "axes.facecolor": "none", "legend.frameon": False,
}  # fmt: skip

_READABLE = "figure { margin: 1em 0; } figure svg { min-width: 560px; }"
"""On a narrow screen the figure has a scroll bar, as its words would be too small otherwise."""

_WIDE = (
    "body { max-width: 1600px; } figure { max-width: 900px; } table { font-size: 12.5px; } "
    "th { white-space: normal; } td, th { padding-left: 6px; padding-right: 6px; }"
)
"""The style of a page whose table has published models: all columns fit a width of 1,280 pixels."""


def cells(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows: task, metric, our model, its interval, each published model, the chosen options, and the
    number of rows.
    """
    models = list(dict.fromkeys(model for row in rows for model in row.get("published", ())))
    done = [row for row in rows if "missing" not in row]
    extra = {
        "rate, batch": [f"{row['lr']:g}, {row['batch_size']}" if "lr" in row else "" for row in done],
        "copies of train": [_copies(row) for row in done],
        "rows": [_rows(row) for row in done],
    }
    extra = {heading: column for heading, column in extra.items() if any(column)}
    headings = ["task", "metric", "this model", "95 % interval", *models, *extra]
    lines, others = [], iter(zip(*extra.values(), strict=True)) if extra else iter([()] * len(done))
    for row in rows:
        if "missing" in row:
            lines.append([row["task"], row["metric"], "missing", *[""] * (len(headings) - 3)])
            continue
        published = [row["published"].get(model) for model in models]
        lines.append(
            [
                row["task"],
                row["metric"],
                mean_and_spread(row, 3),
                _interval(row),
                *("" if numbers is None else f"{numbers[0]:.3f} ± {numbers[1]:.3f}" for numbers in published),
                *next(others),
            ]
        )
    return headings, lines


def _interval(row: dict[str, Any]) -> str:
    ends = row.get("interval", [None])
    return "–".join(f"{end:.3f}" for end in ends) if None not in ends else row.get("note", row["on"])


def _copies(row: dict[str, Any]) -> str:
    copies = row.get("copies", {})
    found = copies.get("test", copies.get("valid"))
    return "" if found is None else f"{found[0]} + {found[1]}"


def _rows(row: dict[str, Any]) -> str:
    """How many rows were scored, and how many could not be scored."""
    if "rows" not in row:
        return ""
    return f"{row['rows']:,}" + (f" ({row['without_score']:,} without a score)" if row.get("without_score") else "")


def text_table(rows: Sequence[dict[str, Any]]) -> str:
    """The results as a table for a terminal."""
    headings, lines = cells(rows)
    widths = [max(map(len, column)) for column in zip(headings, *lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in [headings, *lines]
    )


def write_page(target: Path, title: str, published: str | None, rows: Sequence[dict[str, Any]]) -> None:
    """One page of figure and table, whole or not at all."""
    headings, lines = cells(rows)
    words = (
        "The mean and, where a task is trained, the spread over seeds. The interval is a bootstrap over the rows of "
        "the test, for one seed: the one whose model was kept, or the first."
    )
    copies = (
        "Copies of train: sequences of the test that also occur in train, as they are + as their reverse complement."
    )
    parts = [f"<h1>{escape(title)}</h1>", f"<p>{words}</p>", _figure(rows), table(headings, lines)]
    if "copies of train" in headings:
        parts.append(f"<p>{copies}</p>")
    if published:
        parts.append(f"<p>Published: {escape(published)}</p>")
    parts += _missing(rows)
    wide = any(row.get("published") for row in rows)  # six further columns
    write_atomically(target, page(title, parts, _READABLE + (_WIDE if wide else "")))


def _missing(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A paragraph for each address of missing tasks, with their names."""
    named: dict[str, list[str]] = {}
    for row in rows:
        if "missing" in row:
            named.setdefault(row["missing"], []).append(row["task"])
    verbs = [(", ".join(names), "is" if len(names) == 1 else "are", address) for address, names in named.items()]
    return [f"<p>{escape(names)} {verb} missing: {escape(address)}</p>" for names, verb, address in verbs]


def _bar(row: dict[str, Any]) -> tuple[float, float]:
    """How far the error bar of a row reaches to the left and right: its spread, or where there is none its interval."""
    if row.get("spread") is not None:
        return row["spread"], row["spread"]
    low, high = row.get("interval", (None, None))
    return (0.0, 0.0) if low is None else (max(row["mean"] - low, 0.0), max(high - row["mean"], 0.0))


def _figure(rows: Sequence[dict[str, Any]]) -> str:
    """A figure with a row for each task: our model with its spread, and the published models."""
    done = [row for row in rows if row.get("mean") is not None]
    models = list(dict.fromkeys(model for row in done for model in row["published"]))
    with rc_context(_STYLE):
        figure = Figure(figsize=(7, 0.9 + 0.34 * len(done)), layout="constrained")
        axes = figure.add_subplot()
        for place, model in enumerate(models):
            colour = COLOURS[f"series{1 + place % 7}"][0]
            pairs = [(row["published"][model][0], y) for y, row in enumerate(done) if model in row["published"]]
            axes.plot(*zip(*pairs, strict=True), "o", markersize=4, color=colour, alpha=0.8, label=model)
        ours = COLOURS["series0"][0]
        values, bars = [row["mean"] for row in done], list(zip(*map(_bar, done), strict=True))
        axes.errorbar(values, range(len(done)), xerr=bars, fmt="D", color=ours, capsize=3, label="this model")
        axes.set_yticks(range(len(done)), [f"{row['task']} ({row['metric']})" for row in done])
        axes.invert_yaxis()
        axes.margins(y=0.5 / max(len(done), 1))
        figure.legend(loc="outside lower center", ncols=4, fontsize=8)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg")
    drawing = buffer.getvalue()
    drawing = drawing[drawing.index("<svg") :]
    for name in ("ink", "faint", *(f"series{n}" for n in range(8))):
        drawing = drawing.replace(COLOURS[name][0], f"var(--{name})")
    words = "The metric of each task. The bar is the spread over seeds; where nothing is trained, the interval."
    return f'<figure class="scroll">{drawing}<figcaption>{words}</figcaption></figure>'
