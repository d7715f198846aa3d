"""The report's figures, drawn with matplotlib: inline SVG whose colours follow those of the page, and PNG
for slides.
"""

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import EngFormatter, LogFormatter

from caduceus.monitor.report.bins import outlined
from caduceus.monitor.report.history import History
from caduceus.monitor.report.reported import Reported
from caduceus.page import COLOURS

AXES = {"tokens": "tokens", "step": "steps", "hours": "hours of training steps"}
"""The x axes of curves: {name: label}."""
LINE_BINS = 150
"""Number of bins of a line without a band; the minimum and maximum of each bin are drawn."""
_SERIES = [name for name in COLOURS if name.startswith("series")]
_MARKS = {"start": ("^", "series2"), "rewind": ("D", "series3"), "checkpoint": ("o", "series0")}
_MOST_SPECIES = 8
_MOST_MARKERS = 40
"""Lines with at most so many points have a mark at each point; longer lines have up to twice as many marks."""
_SIZE = (5.0, 3.4)
"""Inches; at this width letters have the right size in a column of 400 pixels."""
_INK, _FAINT, _LINE = (COLOURS[name][0] for name in ("ink", "faint", "line"))
STYLE = {
    "svg.fonttype": "none", "font.family": "DejaVu Sans", "font.size": 9, "legend.fontsize": 8, "path.simplify": False,
    "text.color": _INK, "axes.labelcolor": _INK, "axes.edgecolor": _FAINT, "xtick.color": _FAINT, "ytick.color": _FAINT,
    "axes.grid": True, "grid.color": _LINE, "grid.linewidth": 0.6, "axes.spines.top": False, "axes.spines.right": False,
    "figure.facecolor": "none", "axes.facecolor": "none", "legend.frameon": False, "axes.axisbelow": True,
}  # fmt: skip


@dataclass(frozen=True)
class Curves:
    """A figure of one quantity: name (of its files), title, unit, and the column of training rows that it shows.

    of: a monotonic function of the column's values that is drawn. valid: whether validations are drawn too.
    """

    name: str
    title: str
    unit: str
    column: str
    of: Callable[[np.ndarray], np.ndarray] = np.asarray
    valid: bool = False
    logarithmic: bool = False


def _perplexity(loss: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        perplexity = np.exp(loss)
    return np.where(np.isfinite(perplexity), perplexity, np.nan)


CURVES = (
    Curves("loss", "Loss", "nats per labelled base", "loss", valid=True),
    Curves("perplexity", "Perplexity", "exp of the loss", "loss", _perplexity, valid=True),
    Curves("throughput", "Throughput", "tokens per second", "tokens_per_second"),
    Curves("memory", "Memory at its peak", "GiB, most of any rank", "peak_memory_bytes", lambda held: held / 2**30),
    Curves("grad_norm", "Gradient norm", "before clipping", "grad_norm", logarithmic=True),
    Curves("lr", "Learning rate", "", "lr"),
)


@rc_context(STYLE)
def draw_curves(curves: Curves, runs: Sequence[Reported], axis: str) -> Figure:
    """Draw one quantity of all runs: the mean with a band from minimum to maximum, and validations as dots."""
    figure, axes = new_figure(curves.title + (f", {curves.unit}" if curves.unit else ""), axis)
    shown = []
    for number, run in enumerate(runs):
        colour, history = colour_of(number), run.history
        mean, least, most = (curves.of(of[curves.column]) for of in (history.train, history.least, history.most))
        if curves.logarithmic:
            mean, least, most = (np.where(values > 0, values, np.nan) for values in (mean, least, most))
        x = history.at(history.train["step"], axis)
        name = shortened(run.name)
        label = f"{name}, train" if curves.valid else name
        axes.plot(x, mean, color=colour, linewidth=0.9, label=label, gid=f"train-{number}")
        if history.stride > 1:
            axes.fill_between(x, least, most, color=colour, alpha=0.2, linewidth=0)
        shown.append(mean)
        if curves.valid and len(history.valid.steps):
            x, y = outlined(history.valid.steps, curves.of(history.valid.columns["valid_loss"]), LINE_BINS)
            x = history.at(x, axis)
            style = {"color": colour, "linestyle": "--", "linewidth": 1.1, "gid": f"valid-{number}"}
            axes.plot(x, y, label=f"{name}, valid", **markers(len(x)), **style)
            shown.append(y)
    if curves.logarithmic and any(np.isfinite(values).any() for values in shown):
        in_decades(axes)
    elif curves.column == "tokens_per_second":
        axes.yaxis.set_major_formatter(EngFormatter())
    elif curves.valid:
        _leave_out_first_steps(axes, shown)
    return with_legend(figure, axes)


@rc_context(STYLE)
def draw_species(runs: Sequence[Reported], axis: str) -> Figure | None:
    """Draw the validation loss of each species; None where there is at most one. The lines of a run have the same
    style.
    """
    names = sorted({name for run in runs for name in run.history.valid.columns if name.startswith("valid_loss/")})
    names = names[:_MOST_SPECIES]
    if len(names) < 2:
        return None
    figure, axes = new_figure("Validation loss per species, nats per labelled base", axis)
    for number, run in enumerate(runs):
        for place, name in enumerate(names):
            if name in run.history.valid.columns:
                species = name.partition("/")[2]
                label = shortened(species) if len(runs) == 1 else f"{shortened(run.name, 16)}, {shortened(species, 12)}"
                style = {"color": colour_of(place), "linestyle": ("-", "--", ":", "-.")[number % 4], "linewidth": 1.1}
                style |= {"gid": f"species-{number}-{place}"}
                x, y = outlined(run.history.valid.steps, run.history.valid.columns[name], LINE_BINS)
                axes.plot(run.history.at(x, axis), y, label=label, **markers(len(x)), **style)
    return with_legend(figure, axes)


@rc_context(STYLE)
def draw_events(runs: Sequence[Reported], axis: str) -> Figure:
    """Draw a lane per run with its starts, rewinds, and the checkpoints that are on the disk."""
    figure, axes = new_figure("Starts, rewinds and checkpoints", axis, (_SIZE[0], 1.4 + 0.3 * len(runs)))
    for lane, run in enumerate(runs):
        history: History = run.history
        axes.plot([0, history.at(np.array([history.steps]), axis)[0]], [lane, lane], color=_FAINT, linewidth=1)
        for kind, (marker, colour) in _MARKS.items():
            steps = np.array([event.step for event in run.events if event.kind == kind and event.step is not None])
            height = np.full(len(steps), lane + (0.18 if kind == "checkpoint" else -0.18 if kind == "rewind" else 0.0))
            where = history.at(steps, axis)
            style = {"marker": marker, "linestyle": "none", "markersize": 5, "color": COLOURS[colour][0]}
            axes.plot(where, height, label=None if lane else kind, gid=f"{kind}-{lane}", **style)
    axes.set_yticks(range(len(runs)), [shortened(run.name, 16) for run in runs])
    axes.set_ylim(len(runs) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    return with_legend(figure, axes, columns=3)


def markers(points: int, marker: str = "o") -> dict[str, Any]:
    """Arguments of matplotlib for the marks of a line, which distinguish lines: at every point, or at some points of
    long lines.

    The distance of marks is then odd, as minima and maxima alternate in an outline.
    """
    return {"marker": marker, "markersize": 3, "markevery": points // _MOST_MARKERS | 1}


def colour_of(number: int) -> str:
    return COLOURS[_SERIES[number % len(_SERIES)]][0]


def to_svg(figure: Figure, name: str, words: str) -> str:
    """SVG for a page: its colours are the page's variables, its ids are unique, and it needs no other file.

    words: the text for readers who cannot see the figure.
    """
    with rc_context({**STYLE, "svg.hashsalt": name}):
        written = io.StringIO()
        if isinstance(figure.get_layout_engine(), ConstrainedLayoutEngine):
            figure.draw_without_rendering()
            figure.set_layout_engine("none")  # it is laid out now, once for both SVG and PNG
        figure.savefig(written, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = written.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:xlink)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r'\b(id="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    for variable in ("ink", "faint", "line", *_SERIES):
        svg = svg.replace(COLOURS[variable][0], f"var(--{variable})")
    box = re.search(r'viewBox="([^"]*)"', svg)[1]
    svg = f'<svg viewBox="{box}" role="img" aria-label="{words}">' + svg[svg.index(">") + 1 :]
    return re.sub(r"\n\s*", "\n", svg)


def to_png(figure: Figure) -> bytes:
    """PNG on white, for slides."""
    written = io.BytesIO()
    with rc_context(STYLE):
        figure.savefig(written, format="png", dpi=200, facecolor="white")
    return written.getvalue()


def new_figure(title: str, axis: str, size: tuple[float, float] = _SIZE) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel(AXES.get(axis, axis))
    if axis == "tokens":
        axes.xaxis.set_major_formatter(EngFormatter())
    return figure, axes


def lay_out_like(figure: Figure, other: Figure) -> None:
    """Give a figure the layout of one that differs only in the x axis, as computing a layout takes as long as
    drawing.
    """
    figure.set_layout_engine("none")
    for axes, same in zip(figure.axes, other.axes, strict=True):
        axes.set_position(same.get_position())


def in_decades(axes: Axes) -> None:
    """Make the y axis logarithmic, with plain numbers: typesetting formulas takes as long as drawing the rest of a
    figure.
    """
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(_Plain())
    axes.yaxis.set_minor_formatter(_Plain(minor_thresholds=(1, 0.4)))


class _Plain(LogFormatter):
    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:g}" if super().__call__(x, pos) else ""


def with_legend(figure: Figure, axes: Axes, columns: int = 2) -> Figure:
    if axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside lower left", ncols=columns)
    return figure


def _leave_out_first_steps(axes: Axes, shown: Sequence[np.ndarray]) -> None:
    """Limit the y axis, so that the first steps, before the model has learnt the base composition, do not flatten the
    curves.
    """
    later = np.concatenate([values[len(values) // 20 :] if len(values) > 40 else values for values in shown])
    later = later[np.isfinite(later)]
    if len(later) and later.max() > later.min():
        margin = 0.05 * (later.max() - later.min())
        axes.set_ylim(later.min() - margin, later.max() + margin)


def shortened(text: str, longest: int = 20) -> str:
    text = text.lstrip("_").replace("$", r"\$")  # matplotlib hides labels that begin with _, and typesets $ as formulas
    half = longest // 2  # paths may differ at either end
    return text if len(text) <= longest else f"{text[:half]}…{text[half + 1 - longest :]}"
