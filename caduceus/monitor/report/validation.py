"""The report's tables of the newest validation: per species, and what is taken for what."""

from collections.abc import Sequence
from html import escape

import numpy as np

from caduceus.monitor.report.runs import Reported
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


def validation_tables(runs: Sequence[Reported]) -> str:
    """HTML of both tables; empty where no run was validated."""
    validated = [run for run in runs if len(run.history.valid_steps)]
    if not validated:
        return "<p>None of the runs was validated.</p>"
    rows = [row for run in validated for row in _species(run)]
    words = (
        "<p>Of the newest validation: loss in nats per labelled base, of all, of upper-case bases and of soft-masked "
        "ones; share of bases predicted right; how far the predictions of the strands are apart (0 to 1).</p>"
    )
    heads = ["run", "species", "step", *_COLUMNS, "perplexity", "bits per base", "epoch"]
    return table(heads, rows[:_MOST_SPECIES]) + words + "".join(_confusion(run) for run in validated)


def _species(run: Reported) -> list[list[str]]:
    valid, vitals = run.history.valid, run.history.vitals
    names = [name.removeprefix("valid_loss") for name in valid if name.startswith("valid_loss/")]
    rows = []
    for suffix in ["", *sorted(names)] if len(names) > 1 else names:
        values = [valid.get(f"{column}{suffix}", np.array([np.nan]))[-1] for column in _COLUMNS.values()]
        loss, epoch = values[0], vitals.get(f"epoch{suffix}", np.array([np.nan]))[-1]
        told = [*(_shown(value, ".4f") for value in values), _shown(np.exp(loss), ".4f")]
        species = suffix.removeprefix("/") or "all"
        step = f"{run.history.valid_steps[-1]:,}"
        rows.append([run.name, species, step, *told, _shown(loss / np.log(2), ".4f"), _shown(epoch, ".3g")])
    return rows


def _confusion(run: Reported) -> str:
    valid = run.history.valid
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
