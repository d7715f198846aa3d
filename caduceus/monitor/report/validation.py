"""The newest validation in the report: tables per species, confusion matrices, and drawings of windows."""

from collections.abc import Sequence
from html import escape

import numpy as np

from caduceus.monitor.report.reported import Reported
from caduceus.monitor.windows import windows_of
from caduceus.page import table

_COLUMNS = {
    "loss": "valid_loss",
    "non-repeat": "valid_loss_nonrepeat",
    "repeat": "valid_loss_repeat",
    "accuracy": "valid_accuracy",
    "of non-repeat": "valid_accuracy_nonrepeat",
    "of repeat": "valid_accuracy_repeat",
    "strands apart": "valid_rc_disagreement",
}
_MOST_SPECIES = 500
_MOST_WINDOWS = 8


def validation_tables(runs: Sequence[Reported]) -> str:
    """HTML of both tables; a sentence where no run was validated."""
    validated = [run for run in runs if len(run.history.valid.steps)]
    if not validated:
        return "<p>None of the runs was validated.</p>"
    rows = [row for run in validated for row in _species(run)]
    words = (
        "<p>The newest validation: loss in nats per labelled base, for all bases, for upper-case and for soft-masked "
        "ones; share of bases that are predicted correctly; how far the predictions from both strands are apart (0 to "
        "1).</p>"
    )
    heads = ["run", "species", "step", *_COLUMNS, "perplexity", "bits per base", "epoch"]
    return table(heads, rows[:_MOST_SPECIES]) + words + "".join(_confusion(run) for run in validated)


def window_drawings(runs: Sequence[Reported]) -> str:
    """HTML of the worst and best windows of each run's newest validation, from `RUN/windows`."""
    from caduceus.monitor.report.figures import to_svg
    from caduceus.monitor.report.tracks import draw_window, title_of

    parts = []
    for number, run in enumerate(runs):
        steps = run.history.valid.steps
        windows = windows_of(run.path, int(steps[-1])) if len(steps) else []
        if windows:
            parts.append(f"<h3>{escape(run.name)}, step {steps[-1]:,}</h3>")
        for place, window in enumerate(windows[:_MOST_WINDOWS]):
            svg = to_svg(draw_window(window), f"window-{number}-{place}", escape(title_of(window)))
            parts.append(f'<div class="scroll">{svg.replace("<svg ", """<svg class="wide" """, 1)}</div>')
        if len(windows) > _MOST_WINDOWS:
            parts.append(
                f"<p>{len(windows) - _MOST_WINDOWS} more are drawn in {escape(str(run.path / 'windows'))}.</p>"
            )
    return "".join(parts) or "<p>No windows were kept.</p>"


def _species(run: Reported) -> list[list[str]]:
    valid, vitals = run.history.valid.columns, run.history.vitals.columns
    names = [name.removeprefix("valid_loss") for name in valid if name.startswith("valid_loss/")]
    rows = []
    for suffix in ["", *sorted(names)] if len(names) > 1 else names:
        values = [valid.get(f"{column}{suffix}", np.array([np.nan]))[-1] for column in _COLUMNS.values()]
        loss, epoch = values[0], vitals.get(f"epoch{suffix}", np.array([np.nan]))[-1]
        told = [*(_shown(value, ".4f") for value in values), _shown(np.exp(loss), ".4f")]
        species = suffix.removeprefix("/") or "all"
        step = f"{run.history.valid.steps[-1]:,}"
        rows.append([run.name, species, step, *told, _shown(loss / np.log(2), ".4f"), _shown(epoch, ".3g")])
    return rows


def _confusion(run: Reported) -> str:
    valid = run.history.valid.columns
    if "valid_confusion/AA" not in valid:
        return ""
    shares = [
        [
            true,
            *(_shown(valid.get(f"valid_confusion/{true}{taken}", np.array([np.nan]))[-1], ".1%") for taken in "ACGT"),
        ]
        for true in "ACGT"
    ]
    heading = f"<h3>What {escape(run.name)} takes for what</h3>"
    return heading + table(["true base", *(f"taken for {base}" for base in "ACGT")], shares)


def _shown(value: float, form: str) -> str:
    return "–" if np.isnan(value) else f"{value:{form}}"
