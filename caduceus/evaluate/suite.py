"""A benchmark of many tasks by one command: what is there is run, what is missing is named, beside published numbers.

OUT/TASK/lr-…-batch-…/   a fine-tuning each (see `caduceus.evaluate.finetune`)
OUT/suite.json           a row for each task        OUT/suite.html   the same to look at
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from caduceus.errors import UserError
from caduceus.evaluate.columns import read_columns
from caduceus.evaluate.finetune import FinetuneOptions, finetune
from caduceus.evaluate.fitting import FitOptions
from caduceus.evaluate.labelled import Task
from caduceus.evaluate.metrics import bootstrap_interval, is_better
from caduceus.evaluate.model import Runner
from caduceus.evaluate.suite_data import TaskData, find_task_data
from caduceus.evaluate.suite_page import write_page
from caduceus.files import dump_json, write_atomically
from caduceus.presets import preset, preset_list

_PROTOCOL = {"epochs", "lr", "batch_size", "weight_decay", "seeds", "pool", "valid_share"}


@dataclass(frozen=True)
class SuiteTask:
    """One task: where it may lie below the data's folder, its metric, and {model: (mean, spread)} as published."""

    name: str
    folders: list[str]
    metric: str
    published: dict[str, tuple[float, float]]


@dataclass(frozen=True)
class Suite:
    """A benchmark of configs/suite/. `protocol`: options of a fine-tuning; of lists, each is tried on validation."""

    name: str
    title: str
    source: str
    expects: str
    published: str | None
    protocol: dict[str, Any]
    tasks: list[SuiteTask]


def load_suite(name: str | Path) -> Suite:
    """A suite by its name or file; what is wrong with it is a `UserError` that names it."""
    path = preset("suite", name)
    try:
        values: Any = OmegaConf.to_container(OmegaConf.load(path))
        tasks = [
            SuiteTask(
                task,
                given.get("folders", [task]),
                given["metric"],
                {model: (mean, spread) for model, (mean, spread) in given.get("published", {}).items()},
            )
            for task, given in values["tasks"].items()
        ]
        suite = Suite(
            path.stem,
            values["title"],
            values["source"],
            values["expects"],
            values.get("published"),
            values["protocol"],
            tasks,
        )
    except FileNotFoundError:
        raise UserError(f"--suite: no suite {name!r}; there are\n{preset_list('suite')}".replace("\n", " ")) from None
    except (OmegaConfBaseException, KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: not a suite ({type(error).__name__}: {' '.join(str(error).split())[:200]})") from None
    if unknown := suite.protocol.keys() - _PROTOCOL:
        raise UserError(f"{path}: protocol: unknown key {min(unknown)!r}")
    return suite


@dataclass(frozen=True)
class SuiteRequest:
    """data: the folder that has the tasks' folders. tasks: names of those to run, None for all. genome: for tasks that
    are tables of places. protocol: options that win over the suite's."""

    data: str | Path
    tasks: list[str] | None = None
    genome: str | Path | None = None
    protocol: dict[str, Any] | None = None


def run_suite(
    runner: Runner, suite: Suite, request: SuiteRequest, out: str | Path, say: Callable[[str], None] = print
) -> list[dict[str, Any]]:
    """Run the tasks that are there, and write suite.json and suite.html to `out`; killed, the same call goes on.

    Returns a row for each task: its result, or `missing`, which says where the data come from.
    """
    out, data = Path(out), Path(request.data)
    if not data.is_dir():
        raise UserError(f"--data: {data} is no folder; it should hold {suite.expects}")
    chosen = _chosen(suite, request.tasks)
    protocol = {**suite.protocol, **(request.protocol or {})}
    rows = []
    for task in chosen:
        genome = None if request.genome is None else Path(request.genome)
        found = find_task_data(data, task.folders, out / "tables" / task.name, genome)
        if found is None:
            rows.append({"task": task.name, "metric": task.metric, "missing": f"{suite.source} ({suite.expects})"})
            say(f"{task.name}: not in {data} (looked for {', '.join(task.folders)}); from {suite.source}")
            continue
        for note in found.notes:
            say(f"note: {note}")
        rows.append(_run_task(runner, task, found, protocol, out, say))
    if all("missing" in row for row in rows):
        raise UserError(f"--data: {data} has none of the tasks; it should hold {suite.expects}, from {suite.source}")
    result = {"suite": suite.name, "model": runner.origin(), "protocol": protocol, "tasks": rows}
    write_atomically(out / "suite.json", dump_json(result))
    write_page(out / "suite.html", suite.title, suite.published, rows)
    return rows


def _chosen(suite: Suite, names: list[str] | None) -> list[SuiteTask]:
    known = {task.name: task for task in suite.tasks}
    for name in names or ():
        if name not in known:
            raise UserError(f"--tasks: {suite.name} has no task {name!r}, but {', '.join(known)}")
    return [known[name] for name in names] if names else suite.tasks


def _run_task(
    runner: Runner, task: SuiteTask, data: TaskData, protocol: dict[str, Any], out: Path, say: Callable[[str], None]
) -> dict[str, Any]:
    """Fine-tune with each learning rate and batch of the protocol, and keep what is best on validation."""
    best, best_value, best_place = None, None, None
    base = FitOptions(epochs=protocol["epochs"], weight_decay=protocol["weight_decay"])
    for lr, batch in product(_listed(protocol["lr"]), _listed(protocol["batch_size"])):
        place = out / task.name / f"lr-{lr:g}-batch-{batch}"
        say(f"{task.name}, rate {lr:g}, batch {batch}:")
        fit = replace(base, lr=lr, batch_size=batch)
        options = FinetuneOptions(
            pool=protocol["pool"],
            seeds=protocol["seeds"],
            valid_share=protocol.get("valid_share", 0.1),
            metric=task.metric,
            task="classification",
            fit=fit,
        )
        result = finetune(runner, data.tables, place, options, say)
        value = float(np.mean([seed["valid"][task.metric] for seed in result["results"]["full"]]))
        if best is None or is_better(task.metric, value, best_value):
            best, best_value, best_place = {"lr": lr, "batch_size": batch, "result": result}, value, place
    found = best["result"]["summary"]["full"][task.metric]
    row = {
        "task": task.name,
        "metric": task.metric,
        **found,
        "seeds": protocol["seeds"],
        "lr": best["lr"],
        "batch_size": best["batch_size"],
        "on": "test" if "test" in data.tables else "validation",
        "copies": best["result"]["copies"],
        "published": {model: list(numbers) for model, numbers in task.published.items()},
    }
    if "test" in data.tables:
        row["interval"] = _interval(best_place / "predictions.tsv", best["result"], task.metric)
    say(f"{task.name}: {task.metric} {found['mean']:.4f} ± {found['spread']:.4f}")
    return row


def _interval(predictions: Path, result: dict[str, Any], metric: str) -> list[float]:
    """95 % bootstrap interval over the test's sequences, of the model that was kept."""
    task = Task.from_json(result["task"])
    columns = read_columns(predictions).values
    numbers = {name: number for number, name in enumerate(task.classes)}
    labels = np.array([numbers[label] for label in columns["label"]])
    outputs = np.stack([np.array(columns[f"p_{name}"], dtype=float) for name in task.classes], 1)
    return list(bootstrap_interval(task, metric, labels, outputs))


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]
