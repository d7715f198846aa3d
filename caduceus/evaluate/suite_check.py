"""Looks for mistakes in the options, files and labels of a suite, before anything is computed."""

import tempfile
from pathlib import Path
from typing import Any

from caduceus.evaluate.columns import read_columns
from caduceus.evaluate.pairs import PairTable, binary_labels
from caduceus.evaluate.scores import ScoreOptions
from caduceus.evaluate.suite import Suite, SuiteRequest, SuiteTask, asked_tasks, no_data, options_of
from caduceus.evaluate.suite_data import find_tables, find_task_data
from caduceus.evaluate.suite_finetuned import fits_of
from caduceus.evaluate.variant_inputs import VariantSource
from caduceus.evaluate.variants import prepared
from caduceus.evaluate.window_svm import bins_of
from caduceus.evaluate.zero_shot import window_of


def check_suite(suite: Suite, request: SuiteRequest) -> list[str]:
    """The names of the rows that the tasks with data will have. Raises `UserError`, which names the place."""
    with tempfile.TemporaryDirectory() as folder:
        names = []
        for task in asked_tasks(suite, request):
            names += _rows_of(task, options_of(suite, task, request), request, Path(folder))
    if not names:
        raise no_data(suite, request)
    return names


def _rows_of(task: SuiteTask, options: dict[str, Any], request: SuiteRequest, converted: Path) -> list[str]:
    data, genome = Path(request.data), None if request.genome is None else Path(request.genome)
    if task.kind == "finetune":
        fits = fits_of(task.metric, options)
        found = find_task_data(data, task.folders, converted / task.name, genome)
        if found is None:
            return []
        learnt = found.tables["train"].task(fits[0].task)
        for table in found.tables.values():
            table.labelled(learnt)
        return [task.name]
    splits = ("train", "test") if task.kind == "svm" else (task.split,)
    tables = find_tables(data, task.folders, splits)
    if len(tables) < len(splits):
        return []
    if task.kind in ("svm", "pairs"):
        pairs = {split: PairTable(path, genome, options["length"]) for split, path in tables.items()}
        for table in pairs.values():
            binary_labels(table.columns)
        bins = bins_of(options, pairs["test"]) if task.kind == "svm" else [""]
        return [task.row_name(bin_) for bin_ in bins]
    path = tables[task.split]
    if task.kind == "variants":
        ScoreOptions(window=options["window"])
        prepared(VariantSource(path, genome, allow_unknown_contigs=True), None)
    if task.kind == "masked":
        window_of(options)
    if task.metric != "motif_accuracy":
        binary_labels(read_columns(path))
    return [task.name]
