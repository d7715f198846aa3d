"""Draws a window of a validation: its loss along the contig, and a stretch base by base."""

from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.textpath import TextPath
from matplotlib.transforms import Affine2D

from caduceus.monitor.report.figures import STYLE
from caduceus.page import COLOURS

_COLOUR = {"A": "series2", "C": "series0", "G": "series1", "T": "series3"}
"""Colours of sequence logos: A green, C blue, G orange, T red."""
_INK, _FAINT, _LINE, _MARK = (COLOURS[name][0] for name in ("ink", "faint", "line", "series4"))
_REPEAT = COLOURS["dropped"][0]
_LEAST_DRAWN = 0.03
"""Letters with a smaller probability than this are not drawn."""
_LETTERS = {base: TextPath((0, 0), base, size=1) for base in "ACGT"}


@rc_context({**STYLE, "axes.grid": False})
def draw_window(window: dict[str, Any]) -> Figure:
    """Draw the loss in 200 bins of the window, and below it, for the stretch, predicted bases above true ones."""
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    along, bases = figure.subplots(2, 1, height_ratios=(1, 1.3))
    along.set_title(title_of(window), loc="left", fontsize=10)
    _draw_loss(along, window)
    _draw_bases(bases, window)
    return figure


def title_of(window: dict[str, Any]) -> str:
    """A title such as: hg38, worst window: chr8:1,000-2,024 (+), loss 1.3862."""
    where = f"crop {window.get('sample')}"
    if "contig" in window:
        where = f"{window['contig']}:{window['start'] + 1:,}-{window['end']:,} ({window['strand']})"
    return (
        f"{window['species']}, {window['kind']} window: {where}, loss {window['loss']:.4f}, {window['accuracy']:.0%} "
        "of the labelled bases correct"
    )


def _draw_loss(axes: Axes, window: dict[str, Any]) -> None:
    loss = np.array([np.nan if value is None else value for value in window["bins"]["loss"]])
    first, last = _ends(window)
    edges = np.linspace(first, last, len(loss) + 1)
    centres = (edges[1:] + edges[:-1]) / 2
    known = ~np.isnan(loss)
    axes.plot(centres[known], loss[known], color=_INK, linewidth=0.9)
    axes.axhline(np.log(4), color=_FAINT, linewidth=0.7, linestyle=":")
    axes.set_ylim(0, max(1.5, 1.05 * np.nanmax(loss)))
    height = axes.get_ylim()[1]
    share = np.array(window["bins"]["repeat"])
    axes.fill_between(edges, 0, np.r_[share, share[-1:]] * height, step="post", color=_REPEAT, alpha=0.5, linewidth=0)
    start = window["stretch"]["start"] + 1
    axes.axvspan(start, start + len(window["stretch"]["bases"]), color=_MARK, alpha=0.35, linewidth=0)
    axes.set_xlim(first, last)
    axes.set_ylabel("loss, nats")
    axes.xaxis.set_major_formatter("{x:,.0f}")


def _draw_bases(axes: Axes, window: dict[str, Any]) -> None:
    stretch = window["stretch"]
    first = stretch["start"] + 1
    for place, base in enumerate(stretch["bases"]):
        labelled, x = stretch["labelled"][place], first + place
        if stretch["repeat"][place]:
            axes.axvspan(x - 0.5, x + 0.5, color=_REPEAT, alpha=0.5, linewidth=0)
        colour = COLOURS[_COLOUR[base]][0] if base in _COLOUR and labelled else _FAINT
        style = {"ha": "center", "va": "center", "fontsize": 7, "color": colour}
        axes.text(x, -0.12, base, fontweight="bold" if labelled else "normal", **style)
        if labelled:
            _draw_letters(axes, x, dict(zip("ACGT", stretch["likelihood"][place], strict=True)))
    axes.set_xlim(first - 0.5, first + len(stretch["bases"]) - 0.5)
    axes.set_ylim(-0.25, 1)
    axes.set_yticks([-0.12, 0, 0.5, 1], ["true", "0", "0.5", "1"])
    axes.set_ylabel("likelihood")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("position, 1-based. Letters above: predicted for labelled bases. Grey: soft-masked. Dots: log 4")


def _draw_letters(axes: Axes, x: float, likelihood: dict[str, float]) -> None:
    """Draw letters on top of each other with heights equal to their probabilities, the likeliest on top."""
    bottom = 0.0
    for base, height in sorted(likelihood.items(), key=lambda item: item[1]):
        if height >= _LEAST_DRAWN:
            letter = _LETTERS[base]
            box = letter.get_extents()
            scaled = Affine2D().translate(-box.x0, -box.y0).scale(0.9 / box.width, height / box.height)
            path = scaled.translate(x - 0.45, bottom).transform_path(letter)
            axes.add_patch(PathPatch(path, color=COLOURS[_COLOUR[base]][0], linewidth=0))
        bottom += height


def _ends(window: dict[str, Any]) -> tuple[int, int]:
    """First and last position, 1-based; for a crop without coordinates, positions in the crop."""
    start = window.get("start", 0)
    return start + 1, start + window["bases"]
