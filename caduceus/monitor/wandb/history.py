"""Converts rows of metrics.jsonl into those of W&B's history: one row per step, with names in sections."""

import math
from collections.abc import Iterable
from typing import Any

from caduceus.run.machine import OF_GPUS, OF_NODES

_AXES = ("step", "samples", "tokens")
_SPACES = {
    "train": ("loss", "loss_nonrepeat", "loss_repeat", "lr", "epoch"),
    "health": (
        *("skipped_steps", "substituted_samples", "grad_norm", "update_ratio", "residual_rms", "mixer_rms"),
        *(f"{what}_{quantile}" for what in ("dt", "decay") for quantile in ("p05", "p50", "p95")),
    ),
    "hardware": (*OF_NODES, *OF_GPUS),
}
_SPACE_OF = {name: space for space, names in _SPACES.items() for name in names}
SAME = 1e-3
"""Largest relative difference at which a step that was made again counts as the same, with other rounding."""


def wandb_row(row: dict[str, Any]) -> dict[str, Any]:
    """A row of metrics.jsonl under W&B's names, such as train/loss and hardware/cpu_percent/NODE; null becomes NaN
    again.
    """
    told = {key: value for key, value in row.items() if key != "evaluated"}
    return {wandb_name(key): math.nan if value is None else value for key, value in told.items()}


def wandb_name(key: str) -> str:
    """W&B's name of a key of metrics.jsonl: loss/hg38 is train/loss/hg38, valid_loss/hg38 is valid/loss/hg38."""
    if key in _AXES or key.startswith("eval/"):
        return key
    if key.startswith("valid_"):
        return key.replace("_", "/", 1)
    if key in ("best_step", "best_valid_loss"):
        return f"valid/{key.replace('valid_', '')}"
    if key == "grad_norm":  # the total norm; those of the kinds of parameters have their own section
        return "train/grad_norm"
    return f"{_SPACE_OF.get(key.partition('/')[0], 'perf')}/{key}"


def is_for_wandb(row: dict[str, Any], every: int) -> bool:
    """Whether W&B gets the row of a step: every `every`-th, and every row with more than a step's usual numbers."""
    told = "valid_loss" in row or any("/" in key and not key.startswith("loss/") for key in row)
    return told or row["step"] % every == 0


def merged(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per step, in the order of steps: the numbers of a validation are added to those of its training step."""
    steps: dict[int, dict[str, Any]] = {}
    for row in rows:
        steps.setdefault(row["step"], {}).update(row)
    return [steps[step] for step in sorted(steps)]


def essence(row: dict[str, Any]) -> dict[str, Any]:
    """The numbers that distinguish two versions of a step: its samples and losses."""
    return {key: row.get(key) for key in ("step", "samples", "loss", "valid_loss")}


def is_same_step(sent: dict[str, Any], row: dict[str, Any]) -> bool:
    """Whether a step that was made again equals the one that was sent, except for times and rounding."""
    now = essence(row)
    if sent.get("samples") != now["samples"]:
        return False
    return all(_close(sent.get(key), now[key]) for key in ("loss", "valid_loss"))


def _close(a: float | None, b: float | None) -> bool:
    if a is None or b is None:
        return a is b
    return math.isclose(a, b, rel_tol=SAME)
