"""The results of a fine-tuning as tables: predictions, metrics and their spread. Imports no torch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from caduceus.evaluate.columns import mean_and_spread, read_columns
from caduceus.evaluate.labelled import Task
from caduceus.evaluate.metrics import names_of


def flat_labels(task: Task, labels: Sequence[Any]) -> np.ndarray:
    """Labels in the shape of predictions: (n,), or for several (n, classes) or (n, values); n may count bases
    or bins.
    """
    return np.concatenate(list(labels)) if task.per_base else np.asarray(labels)


def summarised(task: Task, results: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Mean and sample standard deviation (0 for one seed) of each metric on the test, or without a test on
    validation.
    """
    part = "test" if "test" in results[0] else "valid"
    values = {name: np.array([result[part][name] for result in results], dtype=float) for name in names_of(task)}
    return {
        name: {"mean": float(v.mean()), "spread": float(v.std(ddof=1)) if len(v) > 1 else 0.0}
        for name, v in values.items()
    }


def output_columns(task: Task, outputs: np.ndarray) -> dict[str, Any]:
    """Predictions as columns of a table: the value or values, or the class and the probability of each class.

    With several labels, those with a probability of at least one half are named, separated by semicolons.
    """
    if task.values:
        return {f"prediction_{name}": outputs[:, n] for n, name in enumerate(task.values)}
    if task.classes is None:
        return {"prediction": outputs}
    if task.several:
        chosen = [_joined(task, row >= 0.5) for row in outputs]
    else:
        chosen = [task.classes[number] for number in outputs.argmax(1)]
    return {"prediction": chosen, **{f"p_{name}": outputs[:, n] for n, name in enumerate(task.classes)}}


def label_columns(task: Task, labels: Any) -> dict[str, Any]:
    """Labels as columns in the form of `output_columns`; a dot where there is no label."""
    flat = flat_labels(task, labels)
    if task.values:
        return {f"label_{name}": flat[:, n] for n, name in enumerate(task.values)}
    if task.classes is None:
        return {"label": flat}
    if task.several:
        return {"label": [_joined(task, row > 0) for row in flat]}
    return {"label": [task.classes[int(label)] if label >= 0 else "." for label in flat]}


def read_predictions(task: Task, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Labels and outputs for `measure`, from a table of `label_columns` and `output_columns`; not for labels
    per base.
    """
    columns = read_columns(path).values

    def stacked(names: Sequence[str]) -> np.ndarray:
        return np.stack([np.array(columns[name], dtype=float) for name in names], 1)

    if task.classes is None:
        names = [f"_{name}" for name in task.values or ()] or [""]
        labels, outputs = (stacked([f"{what}{name}" for name in names]) for what in ("label", "prediction"))
        return (labels, outputs) if task.values else (labels[:, 0], outputs[:, 0])
    outputs = stacked([f"p_{name}" for name in task.classes])
    if task.several:
        named = [set(str(label).split(";")) for label in columns["label"]]
        return np.array([[name in these for name in task.classes] for these in named], dtype=float), outputs
    numbers = {name: number for number, name in enumerate(task.classes)}
    return np.array([numbers[str(label)] for label in columns["label"]]), outputs


def _joined(task: Task, has: np.ndarray) -> str:
    return ";".join(name for name, there in zip(task.classes, has, strict=True) if there) or "."


def place_columns(task: Task, names: Sequence[Any], lengths: Sequence[int]) -> dict[str, Any]:
    """For labels per base, columns with the name of each row's sequence and the position from 0; empty for other
    labels.
    """
    if not task.per_base:
        return {}
    return {
        "name": [name for name, length in zip(names, lengths, strict=True) for _ in range(0, length, task.bin)],
        "position": [place for length in lengths for place in range(0, length, task.bin)],
    }


def told(task: Task) -> str:
    """The task in words."""
    of_values = f"regression{f' of {len(task.values)} values' if task.values else ''}"
    kind = of_values if task.classes is None else f"classification ({', '.join(task.classes[:8])})"
    by = f", by {f'{task.bin} bases' if task.bin > 1 else 'base'}" if task.per_base else ""
    return f"{kind}{', any of them' * task.several}{by}"


def table_of(result: dict[str, Any]) -> str:
    """The summary of a fine-tuning as lines of text."""
    summary = result["summary"]
    names = names_of(Task.from_json(result["task"]))
    rows = [["", *names]]
    for method in result["methods"]:
        metrics = summary[method]
        rows.append([method, *(mean_and_spread(metrics[name], 4) for name in names)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)
