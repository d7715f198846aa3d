"""Figures of the numbers in rows besides losses and rates: regions, strands, kinds of parameters, layers, epochs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from caduceus.monitor.report.bins import outlined
from caduceus.monitor.report.figures import (
    LINE_BINS,
    STYLE,
    colour_of,
    in_decades,
    markers,
    new_figure,
    shortened,
    with_legend,
)
from caduceus.monitor.report.reported import Reported

_DASHES = ("-", "--", ":", "-.")
_COLOURS = 8
_MOST_LINES = 12


@dataclass(frozen=True)
class DetailFigure:
    """A figure: name (of its files), title, and words for its caption; `draw` returns None where there is nothing to
    show.

    by_layer: whether it shows the layers, from the newest row with numbers about them, so that no other axis makes
    sense.
    """

    name: str
    words: str
    draw: Callable[[Sequence[Reported], str], Figure | None]
    by_layer: bool = False


def _of_validations(title: str, columns: dict[str, str]) -> Callable[[Sequence[Reported], str], Figure | None]:
    """A function that draws these columns of the validations, {label: column}."""

    def draw(runs: Sequence[Reported], axis: str) -> Figure | None:
        known = [run.history.valid.columns for run in runs]
        series = [[(label, of[name]) for label, name in columns.items() if name in of] for of in known]
        return _lines(title, runs, axis, series, [run.history.valid.steps for run in runs])

    return draw


def _of_vitals(title: str, prefix: str, logarithmic: bool) -> Callable[[Sequence[Reported], str], Figure | None]:
    """A function that draws each column `prefix`/NAME of the steps with numbers about the network."""

    def draw(runs: Sequence[Reported], axis: str) -> Figure | None:
        series = [
            [(n.partition("/")[2], v) for n, v in run.history.vitals.columns.items() if n.startswith(f"{prefix}/")]
            for run in runs
        ]
        figure = _lines(title, runs, axis, series, [run.history.vitals.steps for run in runs])
        if figure is not None and logarithmic:
            in_decades(figure.axes[0])
        return figure

    return draw


def _of_machines(title: str, column: str) -> Callable[[Sequence[Reported], str], Figure | None]:
    """A function that draws a column of each node or GPU; if there are many, those furthest from the median."""

    def draw(runs: Sequence[Reported], axis: str) -> Figure | None:
        series = []
        for run in runs:
            columns = run.history.machines.columns
            found = [(n.partition("/")[2], values) for n, values in columns.items() if n.startswith(f"{column}/")]
            means = np.array([np.nanmean(values) for _, values in found])
            order = np.argsort(-np.abs(means - np.median(means)), kind="stable") if found else []
            series.append([found[at] for at in sorted(order[:_MOST_LINES])])
        return _lines(title, runs, axis, series, [run.history.machines.steps for run in runs])

    return draw


def _of_evaluations(runs: Sequence[Reported], axis: str) -> Figure | None:
    """Draw the numbers of evaluations, each at its own steps."""
    series = [list(run.history.evaluations.columns.items()) for run in runs]
    return _lines("Evaluations", runs, axis, series, [run.history.evaluations.steps for run in runs])


@rc_context(STYLE)
def _lines(
    title: str,
    runs: Sequence[Reported],
    axis: str,
    series: Sequence[Sequence[tuple[str, np.ndarray]]],
    steps: Sequence[np.ndarray],
) -> Figure | None:
    """Draw lines with a colour for each label, and dashes for each run. series: the (label, values) of each run."""
    labels = list(dict.fromkeys(label for lines in series for label, _ in lines))[:_MOST_LINES]
    if not labels:
        return None
    figure, axes = new_figure(title, axis)
    named = {""}
    for number, (run, lines) in enumerate(zip(runs, series, strict=True)):
        for label, values in lines:
            if label in labels:
                known = ~np.isnan(values)
                x, y = outlined(steps[number][known], values[known], LINE_BINS)
                place = labels.index(label)
                style = {"color": colour_of(place), "linestyle": _DASHES[number % len(_DASHES)], "linewidth": 1.1}
                style |= {"gid": f"line-{number}-{place}", **markers(len(x), "os"[place // _COLOURS % 2])}
                axes.plot(run.history.at(x, axis), y, label=None if label in named else shortened(label), **style)
                named.add(label)
    _name_dashes(axes, runs)
    return with_legend(figure, axes, columns=3)


def _by_layer(title: str, names: Sequence[str], of: Callable = np.asarray) -> Callable:
    """A function that draws statistics over the layers, from the newest row with them: the first as a line, others
    thin.
    """

    @rc_context(STYLE)
    def draw(runs: Sequence[Reported], axis: str) -> Figure | None:
        if not any(f"{names[0]}/00" in run.history.vitals.columns for run in runs):
            return None
        figure, axes = new_figure(title, "layer")
        for number, run in enumerate(runs):
            for place, name in enumerate(names):
                layers = sorted(key for key in run.history.vitals.columns if key.startswith(f"{name}/"))
                if not layers:
                    continue
                values = of(np.array([run.history.vitals.columns[key][-1] for key in layers]))
                style = {"color": colour_of(number), "linestyle": _DASHES[place], "gid": f"layer-{number}-{place}"}
                style |= {"linewidth": 0.8 if place else 1.4, "marker": "o", "markersize": 2 if place else 3}
                label = f"{shortened(run.name, 14)}, {_WORDS[name]}" if len(runs) > 1 else _WORDS[name]
                axes.plot(range(len(layers)), values, label=label, **style)
        in_decades(axes)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        return with_legend(figure, axes)

    return draw


def _name_dashes(axes: Axes, runs: Sequence[Reported]) -> None:
    if len(runs) > 1:
        for number, run in enumerate(runs):
            axes.plot([], [], color="#888888", linestyle=_DASHES[number % len(_DASHES)], label=shortened(run.name))


def _reach(decay: np.ndarray) -> np.ndarray:
    """Bases after which a state has shrunk to 1/e."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return -1 / np.log(decay)


_WORDS = {
    "dt_p50": "median",
    "dt_p05": "5 % are below",
    "dt_p95": "95 % are below",
    "decay_p50": "median",
    "decay_p05": "5 % are below",
    "decay_p95": "95 % are below",
    "residual_rms": "residual stream before it",
    "mixer_rms": "what it adds",
}
DETAILS = (
    DetailFigure(
        "regions",
        "Validation loss of bases in upper case (non-repeat) and in lower case (soft-masked: repeats).",
        _of_validations(
            "Validation loss by region, nats", {"non-repeat": "valid_loss_nonrepeat", "repeat": "valid_loss_repeat"}
        ),
    ),
    DetailFigure(
        "accuracy",
        "Share of labelled bases for which the likeliest of A, C, G and T is the true one.",
        _of_validations(
            "Accuracy in validation",
            {"all": "valid_accuracy", "non-repeat": "valid_accuracy_nonrepeat", "repeat": "valid_accuracy_repeat"},
        ),
    ),
    DetailFigure(
        "strands",
        "How far the predictions from both strands are apart, as total variation distance (0 to 1); 0, except for "
        "rounding, for an equivariant model.",
        _of_validations("Disagreement of the strands", {"": "valid_rc_disagreement"}),
    ),
    DetailFigure(
        "gradients",
        "Gradient norm by kind of parameter, before clipping.",
        _of_vitals("Gradient norm by kind of parameter", "grad_norm", True),
    ),
    DetailFigure(
        "updates",
        "Norm of a step's update over the norm of the weights, by kind of parameter.",
        _of_vitals("Update-to-weight ratio", "update_ratio", True),
    ),
    DetailFigure(
        "steps",
        "Step sizes dt of each layer, in the newest row with numbers about layers.",
        _by_layer("Step sizes by layer", ("dt_p50", "dt_p05", "dt_p95")),
        by_layer=True,
    ),
    DetailFigure(
        "reach",
        "Bases after which a state has shrunk to 1/e, of each layer, over channels and states.",
        _by_layer("Reach of states by layer, bases", ("decay_p50", "decay_p05", "decay_p95"), _reach),
        by_layer=True,
    ),
    DetailFigure(
        "scales",
        "Root mean square of the residual stream before each layer, and of the output that its mixer adds.",
        _by_layer("Scale of activations by layer", ("residual_rms", "mixer_rms")),
        by_layer=True,
    ),
    *(
        DetailFigure(name, f"{words} If there are more than {_MOST_LINES}, those furthest from the median.", draw)
        for name, words, draw in (
            ("processors", "Use of each node's processors.", _of_machines("Processors by node, %", "cpu_percent")),
            ("node_memory", "Use of each node's memory.", _of_machines("Memory by node, %", "memory_percent")),
            (
                "network",
                "Bytes per second that each node received from the network.",
                _of_machines("Network, received by node, bytes/s", "network_received_bytes_per_second"),
            ),
            ("gpus", "Use of each GPU.", _of_machines("Utilization by GPU, %", "gpu_percent")),
            ("gpu_memory", "Use of each GPU's memory.", _of_machines("Memory by GPU, %", "gpu_memory_percent")),
            ("gpu_watts", "Power that each GPU draws.", _of_machines("Power by GPU, watts", "gpu_watts")),
        )
    ),
    DetailFigure("evaluations", "Numbers of the run's evaluations; metrics.jsonl has all of them.", _of_evaluations),
    DetailFigure(
        "epochs", "How often the crops of each species were seen.", _of_vitals("Epochs by species", "epoch", False)
    ),
)
