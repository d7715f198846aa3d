"""Writes the report of runs: one HTML page that needs no other file, and a PNG of each figure beside it."""

import functools
import logging
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from caduceus.errors import UserError
from caduceus.files import write_atomically
from caduceus.monitor.report.bins import binned
from caduceus.monitor.report.history import History
from caduceus.monitor.report.reported import Reported, differences, read_run
from caduceus.monitor.report.validation import validation_tables, window_drawings
from caduceus.monitor.view import clock
from caduceus.page import page, table
from caduceus.patience import is_directory

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from caduceus.monitor.report.figures import Curves

    Draw = Callable[[Sequence[Reported], str], Figure | None]

REPORT_SECONDS = 60.0
"""Seconds that the end of a run waits for its report."""
NUMBERS = 50
"""Largest number of rows in the tables of numbers; where there are more steps, rows are means over several."""
_STYLE = """
body { max-width: 1500px; }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); gap: 1.2rem;
  margin-top: .8rem; }
figure { margin: 0; min-width: 0; } figcaption { font-size: 12.5px; }
.axes label { margin-right: 1.2em; cursor: pointer; white-space: nowrap; }
.on-step, .on-hours { display: none; }
.axes:has(#by-step:checked) .on-step, .axes:has(#by-hours:checked) .on-hours { display: block; }
.axes:has(#by-step:checked) .on-tokens, .axes:has(#by-hours:checked) .on-tokens { display: none; }
.words td { white-space: normal; text-align: left; vertical-align: top; overflow-wrap: anywhere; }
.words th { text-align: left; }
.events td { white-space: nowrap; } .events td:last-child { white-space: normal; min-width: 10rem; }
@media (max-width: 600px) { body { margin: 1rem auto; padding: 0 .7rem; } }
"""
_log = logging.getLogger(__name__)


def write_report(paths: Sequence[Path], target: Path) -> None:
    """Write the report of the runs at `paths` to the file `target`, and STEM-FIGURE.png for each figure beside it.

    Raises `UserError` where a path is not a run with rows, matplotlib is missing, or the target cannot be written; the
    old target is then kept.
    """
    if is_directory(target):
        raise UserError(f"--report: {target} is a directory; give the name of a file, such as {target}/report.html")
    runs = _told_apart([read_run(path) for path in paths])
    figures, pictures = _figures(runs)
    names = ", ".join(run.name for run in runs)
    parts = [
        f"<h1>Report of {escape(names)}</h1>",
        f"<p>Made {time.strftime('%Y-%m-%d %H:%M %Z')}</p>",
        "<h2>Runs</h2>",
        _runs_table(runs),
        *(_unreadable(run) for run in runs if run.history.unreadable),
        "<h2>Curves</h2>",
        figures,
        "<h2>Validation</h2>",
        validation_tables(runs),
        "<h2>Worst and best windows of the newest validation</h2>",
        window_drawings(runs),
        "<h2>Events</h2>",
        _events_table(runs),
        "<h2>Differences between the configurations</h2>",
        _differences_table(runs),
        "<h2>Numbers</h2>",
        *(_numbers(run) for run in runs),
        *(_configuration(run) for run in runs),
    ]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for name, png in pictures.items():
            write_atomically(target.with_name(f"{target.stem}-{name}.png"), png)
        write_atomically(target, page(f"Report of {names}", parts, _STYLE))
    except OSError as error:
        raise UserError(f"--report: {target} cannot be written ({error.strerror})") from None


def report_of_finished(path: Path) -> Path | None:
    """Make RUN/report/report.html at a run's end, in a separate process; None, after one warning, where that fails.

    The separate process keeps matplotlib's memory and failures out of the trainer.
    """
    target = path / "report" / "report.html"
    command = [sys.executable, "-m", "caduceus.monitor", str(path.resolve()), "--report", str(target.resolve())]
    again = f"`python -m caduceus.monitor {path} --report {target}` makes it"
    package_root = Path(__file__).resolve().parents[3]
    try:
        subprocess.run(command, capture_output=True, text=True, check=True, timeout=REPORT_SECONDS, cwd=package_root)
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip().splitlines() or [f"status {error.returncode}"])[-1]
        _log.warning("no report was made: %s; then %s", last, again)
    except subprocess.TimeoutExpired:
        _log.warning("no report was made within %.0f s; %s", REPORT_SECONDS, again)
    except OSError as error:
        _log.warning("no report was made: %s; %s", error, again)
    else:
        return target
    return None


def _told_apart(runs: list[Reported]) -> list[Reported]:
    """The runs; where several have the same name, their paths become their names."""
    names = [run.name for run in runs]
    return [replace(run, name=str(run.path)) if names.count(run.name) > 1 else run for run in runs]


def _figures(runs: Sequence[Reported]) -> tuple[str, dict[str, bytes]]:
    """HTML of all figures, each against tokens, steps and hours, and {name: PNG} against tokens."""
    try:
        from caduceus.monitor.report import figures
    except ImportError as error:
        raise UserError(
            f"--report: matplotlib cannot be imported ({error}); install it: pip install matplotlib"
        ) from None
    parts, pictures = [], {}
    for name, words, draw, by_layer in _drawings(runs):
        variants, first = "", None
        for axis in figures.AXES:
            figure = draw(runs, axis)
            if figure is None:
                break
            if first is not None:
                figures.lay_out_like(figure, first)
            svg, first = figures.to_svg(figure, f"{name}-{axis}", escape(words)), first or figure
            if axis == "tokens":
                pictures[name] = figures.to_png(figure)
            variants += svg if by_layer else f'<div class="on-{axis}">{svg}</div>'
            if by_layer:
                break
        if variants:
            parts.append(f"<figure>{variants}<figcaption>{escape(words)}</figcaption></figure>")
    choices = "".join(
        f'<label><input type="radio" name="axis" id="by-{axis}"{" checked" * (axis == "tokens")}> {label}</label> '
        for axis, label in figures.AXES.items()
    )
    html = f'<div class="axes">Against: {choices}<div class="curves">{"".join(parts)}</div></div>'
    return html, pictures


def _drawings(runs: Sequence[Reported]) -> Iterator[tuple[str, str, "Draw", bool]]:
    """(name, words, drawing function, whether its axis is the layers) of each figure, in the page's order."""
    from caduceus.monitor.report import figures
    from caduceus.monitor.report.details import DETAILS

    species = "Validation loss per species; the values are in the tables of numbers below."
    events = "Starts, rewinds and checkpoints of each run; the table of events below has them all."
    curves = [(c.name, _words(c, runs), functools.partial(figures.draw_curves, c), False) for c in figures.CURVES]
    yield from curves[:2]
    yield "species", species, figures.draw_species, False
    yield from curves[2:]
    for detail in DETAILS:
        yield detail.name, detail.words, detail.draw, detail.by_layer
    yield "events", events, figures.draw_events, False


def _words(curves: "Curves", runs: Sequence[Reported]) -> str:
    """A text for readers who cannot see a curve: the first and last values, the minimum and maximum."""
    told = []
    for run in runs:
        history, column = run.history, curves.column
        if column not in history.first:
            told.append(f"{run.name}: unknown")
            continue
        (begun, first), (ended, last) = history.first[column], history.last[column]
        of = [np.float64(first), np.float64(last), np.nanmin(history.least[column]), np.nanmax(history.most[column])]
        first, last, least, most = (_short(float(curves.of(value))) for value in of)
        told.append(f"{run.name}: {first} at step {begun:,}, {last} at step {ended:,}, least {least}, most {most}")
    return f"{curves.title}{' of the training steps' if curves.valid else ''}. {'; '.join(told)}."


def _runs_table(runs: Sequence[Reported]) -> str:
    headings = ["run", "state", "step", "of", "tokens", "hours", "train loss", "valid loss", "best valid"]
    headings += ["perplexity", "bits per base", "tokens/s", "memory", "starts"]
    rows = []
    for run in runs:
        history = run.history
        train, valid = history.train, history.valid.columns.get("valid_loss", np.array([]))
        known = valid[~np.isnan(valid)]
        last = known[-1] if len(known) else np.nan
        best = f"{known.min():.4f} at {history.valid.steps[np.nanargmin(valid)]:,}" if len(known) else "–"
        rows.append(
            [run.name, run.state, f"{history.steps:,}", f"{run.steps:,}", f"{history.end['tokens']:,.0f}"]
            + [
                clock(history.end["hours"] * 3600),
                _shown(_mean(history.tail["loss"]), ".4f"),
                _shown(last, ".4f"),
                best,
            ]
            + [_shown(np.exp(last), ".4f"), _shown(last / np.log(2), ".4f")]
            + [_shown(_median(train["tokens_per_second"]), ",.0f")]
            + [_shown(_most(history.most["peak_memory_bytes"]) / 2**30, ".2f") + " GiB"]
            + [max(1, sum(event.kind == "start" for event in run.events))]
        )
    words = (
        "<p>Train loss: the mean of the last 50 steps, in nats per labelled base. Perplexity and bits per base are the"
    )
    return table(headings, rows) + words + " newest validation's. Hours are those of training steps.</p>"


def _events_table(runs: Sequence[Reported]) -> str:
    events = [(event, run) for run in runs for event in run.events]
    by_time = sorted(events, key=lambda pair: (pair[0].time is None, pair[0].time or pair[0].step or 0))
    rows = [
        [run.name, event.kind, "–" if event.step is None else f"{event.step:,}", _moment(event.time), event.words]
        for event, run in by_time
    ]
    if not rows:
        return "<p>none are known</p>"
    return f'<div class="words events">{table(["run", "event", "step", "time", "what"], rows)}</div>'


def _differences_table(runs: Sequence[Reported]) -> str:
    if len(runs) == 1:
        return "<p>There is one run; its configuration is at the end.</p>"
    rows = [[key, *values] for key, values in differences(list(runs))]
    headings = ["key", *(run.name for run in runs)]
    return f'<div class="words">{table(headings, rows)}</div>' if rows else "<p>none</p>"


def _numbers(run: Reported) -> str:
    history: History = run.history
    names = ["tokens", "loss", "lr", "grad_norm", "tokens_per_second", "peak_memory_bytes"]
    step = history.train["step"]
    columns = [binned(step, history.train[name], NUMBERS)[1] for name in ("step", "hours", *names)]
    train = [[f"{row[0]:.0f}", *(_shown(value, ".6g") for value in row[1:])] for row in zip(*columns, strict=True)]
    chosen = np.unique(np.linspace(0, len(history.valid.steps) - 1, NUMBERS).round().astype(int))
    columns = [name for name in history.valid.columns if "/" not in name or name.startswith("valid_loss/")]
    valid = [
        [str(history.valid.steps[at]), *(_shown(history.valid.columns[name][at], ".6g") for name in columns)]
        for at in (chosen if len(history.valid.steps) else [])
    ]
    together = f", means of about {history.rows / NUMBERS:,.0f} steps" if history.rows > NUMBERS else ""
    some = f", {len(valid)} of {len(history.valid.steps)}" if len(valid) < len(history.valid.steps) else ""
    validations = f"<h3>Validation{some}</h3>{table(['step', *columns], valid)}" if valid else ""
    training = f"<h3>Training{together}</h3>{table(['step', 'hours', *names], train)}"
    return f"<details><summary>Numbers of {escape(run.name)}</summary>{training}{validations}</details>"


def _configuration(run: Reported) -> str:
    rows = table(["key", "value"], run.config.items())
    summary = f"<summary>Configuration of {escape(run.name)}</summary>"
    return f'<details>{summary}<div class="words">{rows}</div></details>'


def _unreadable(run: Reported) -> str:
    count = run.history.unreadable
    lines = "1 line" if count == 1 else f"{count:,} lines"
    return f'<p class="warn">{escape(run.name)}: {lines} of metrics.jsonl could not be read and are left out</p>'


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def _shown(value: float, form: str) -> str:
    return "–" if np.isnan(value) else f"{value:{form}}"


def _moment(seconds: float | None) -> str:
    return "–" if seconds is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _mean(values: np.ndarray) -> float:
    return float(np.nanmean(values)) if np.isfinite(values).any() else np.nan


def _median(values: np.ndarray) -> float:
    return float(np.nanmedian(values)) if np.isfinite(values).any() else np.nan


def _most(values: np.ndarray) -> float:
    return float(np.nanmax(values)) if np.isfinite(values).any() else np.nan
