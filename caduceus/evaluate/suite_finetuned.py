"""Runs tasks of suites for which a model is fine-tuned; validation chooses learning rate and batch size."""

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from caduceus.evaluate.finetune import FinetuneOptions, finetune
from caduceus.evaluate.fitting import FitOptions
from caduceus.evaluate.labelled import Task
from caduceus.evaluate.metrics import bootstrap_interval, interval_of, is_better, measure
from caduceus.evaluate.model import Runner
from caduceus.evaluate.results import read_predictions
from caduceus.evaluate.suite_data import TaskData


def finetuned(
    runner: Runner, metric: str, data: TaskData, protocol: dict[str, Any], out: Path, say: Callable[[str], None]
) -> dict[str, Any]:
    """The row of a task: the result that is best on validation, and its folder under `out`."""
    best, best_value, best_place = None, None, None
    for options in fits_of(metric, protocol):
        lr, batch = options.fit.lr, options.fit.batch_size
        place = out / f"lr-{lr:g}-batch-{batch}"
        say(f"{out.name}, rate {lr:g}, batch {batch}:")
        result = finetune(runner, data.tables, place, options, say)
        value = _mean([seed["valid"][metric] for seed in result["results"]["full"]])
        if best is None or is_better(metric, value, best_value):
            best, best_value, best_place = {"lr": lr, "batch_size": batch, "result": result}, value, place
    row = {
        **best["result"]["summary"]["full"][metric],
        "seeds": protocol["seeds"],
        "lr": best["lr"],
        "batch_size": best["batch_size"],
        "on": "test" if "test" in data.tables else "validation",
        "copies": best["result"]["copies"],
    }
    if "test" in data.tables:
        row["interval"] = _interval(best_place, best["result"], metric)
    return row


def fits_of(metric: str, protocol: dict[str, Any]) -> list[FinetuneOptions]:
    """The options of each fine-tuning: all rates with all sizes of a batch. Raises `UserError` for those that cannot
    be.
    """
    base = FitOptions(epochs=protocol["epochs"], weight_decay=protocol["weight_decay"])
    return [
        FinetuneOptions(
            pool=protocol["pool"],
            seeds=protocol["seeds"],
            valid_share=protocol.get("valid_share", 0.1),
            metric=metric,
            task=protocol.get("learns", "classification"),
            fit=replace(base, lr=lr, batch_size=batch),
        )
        for lr, batch in product(_listed(protocol["lr"]), _listed(protocol["batch_size"]))
    ]


def _mean(values: list[float | None]) -> float:
    return float(np.mean([np.nan if value is None else value for value in values]))


def _interval(place: Path, result: dict[str, Any], metric: str) -> list[float]:
    """95 % bootstrap interval over the test's sequences, for the model that was kept."""
    task = Task.from_json(result["task"])
    if task.bin == 1:
        return list(bootstrap_interval(task, metric, *read_predictions(task, place / "predictions.tsv")))
    with np.load(place / "predictions.npz") as arrays:
        labels, outputs = arrays["labels"], arrays["predictions"]

    def of(rows: np.ndarray) -> float:
        picked, predicted = (array[rows].reshape(-1, array.shape[-1]) for array in (labels, outputs))
        return measure(task, picked, predicted, [metric])[metric]

    return list(interval_of(of, len(labels)))


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]
