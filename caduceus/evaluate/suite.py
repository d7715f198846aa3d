"""Runs a benchmark of many tasks with one command; tasks without data are named, and published numbers are shown too.

OUT/TASK/          what each task has computed, from which the same command goes on
OUT/suite.json     a row for each task        OUT/suite.html   the same to look at
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from caduceus.errors import UserError
from caduceus.evaluate.columns import mean_and_spread
from caduceus.evaluate.fitting import ranks_of
from caduceus.evaluate.metrics import CLASSIFICATION, RANKINGS, REGRESSION
from caduceus.evaluate.model import Runner
from caduceus.evaluate.suite_data import find_tables, find_task_data
from caduceus.evaluate.suite_finetuned import finetuned
from caduceus.evaluate.suite_page import write_page
from caduceus.evaluate.window_svm import SvmTask, window_svm
from caduceus.evaluate.zero_shot import KINDS, ZeroShot, check_score
from caduceus.files import dump_json, without_nan, write_atomically
from caduceus.patience import is_directory, patiently
from caduceus.presets import preset, preset_list

_FINETUNE = {"epochs", "lr", "batch_size", "weight_decay", "seeds", "pool", "valid_share", "learns"}
_OPTIONS = {
    "finetune": _FINETUNE,
    "variants": {"score", "window"},
    "pairs": {"score", "length"},
    "masked": {"places", "window"},
    "structural": {"flank"},
    "svm": {"window", "length", "distances", "C", "rows", "seeds"},
}
"""The keys of a suite's protocol, and of a task of each kind."""
_METRICS = {
    "finetune": (*CLASSIFICATION, *REGRESSION),
    "masked": (*RANKINGS, "motif_accuracy"),
    "svm": ("auroc",),
    **dict.fromkeys(("variants", "pairs", "structural"), RANKINGS),
}


@dataclass(frozen=True)
class SuiteTask:
    """One task: its possible places in the data's folder, its metric, and the published numbers {model: (mean,
    spread)}.

    kind: finetune; variants, pairs, masked or structural (see `caduceus.evaluate.zero_shot`); or svm. options: its own
    options, besides the suite's protocol. split: the split that is measured, where it is not test.
    """

    name: str
    folders: list[str]
    metric: str
    published: dict[str, tuple[float, float]]
    kind: str
    options: dict[str, Any]
    split: str

    def row_name(self, bin_: str) -> str:
        """The name of the row of a bin, which is empty where a task has one row."""
        return ", ".join(filter(None, [self.name, bin_]))


@dataclass(frozen=True)
class Suite:
    """A benchmark of configs/suite/. `protocol`: options of its tasks; where lr and batch_size are lists, validation
    chooses a value.
    """

    name: str
    title: str
    source: str
    expects: str
    published: str | None
    protocol: dict[str, Any]
    tasks: list[SuiteTask]


def load_suite(name: str | Path) -> Suite:
    """A suite, by its name or file. Raises `UserError`, which names the file, where it is not sound."""
    path = preset("suite", name)
    try:
        values: Any = OmegaConf.to_container(patiently(lambda: OmegaConf.load(path)))
        kind = values.get("kind", "finetune")
        suite = Suite(
            path.stem,
            values["title"],
            values["source"],
            values["expects"],
            values.get("published"),
            values["protocol"],
            [_task(task, given, kind) for task, given in values["tasks"].items()],
        )
        _check(suite)
    except FileNotFoundError:
        raise UserError(
            f"--suite: there is no suite {name!r}; there are\n{preset_list('suite')}".replace("\n", " ")
        ) from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (OmegaConfBaseException, KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: not a suite ({type(error).__name__}: {' '.join(str(error).split())[:200]})") from None
    return suite


def _task(name: str, given: dict[str, Any], kind: str) -> SuiteTask:
    own = {"folders", "metric", "published", "kind", "split"}
    published = {model: (mean, spread) for model, (mean, spread) in given.get("published", {}).items()}
    options = {key: value for key, value in given.items() if key not in own}
    folders = given.get("folders", [name])
    return SuiteTask(
        name, folders, given["metric"], published, given.get("kind", kind), options, given.get("split", "test")
    )


def _check(suite: Suite) -> None:
    kinds = {task.kind for task in suite.tasks}
    if unknown := kinds - _OPTIONS.keys():
        raise UserError(f"kind: choose one of {', '.join(_OPTIONS)}, got {min(unknown)!r}")
    if unknown := suite.protocol.keys() - set().union(*(_OPTIONS[kind] for kind in kinds)):
        raise UserError(f"protocol: unknown key {min(unknown)!r}")
    for task in suite.tasks:
        if unknown := task.options.keys() - _OPTIONS[task.kind]:
            raise UserError(
                f"{task.name}: unknown key {min(unknown)!r}; {task.kind} takes {', '.join(_OPTIONS[task.kind])}"
            )
        if task.metric not in _METRICS[task.kind]:
            raise UserError(f"{task.name}: metric: choose one of {', '.join(_METRICS[task.kind])}, got {task.metric!r}")
        options = {**suite.protocol, **task.options}
        optional = {"distances", "valid_share", "learns", *(["window"] if task.kind == "masked" else [])}
        if missing := _OPTIONS[task.kind] - optional - options.keys():
            raise UserError(f"{task.name}: {min(missing)} is missing")
        if task.kind in ("variants", "pairs"):
            check_score(options["score"])


@dataclass(frozen=True)
class SuiteRequest:
    """What to run of a suite.

    data: the folder of the tasks' folders. tasks: the names of the tasks to run, None for all. genome: for tasks that
    are tables of places. protocol: options that override those of the suite and its tasks.
    """

    data: str | Path
    tasks: list[str] | None = None
    genome: str | Path | None = None
    protocol: dict[str, Any] | None = None


def run_suite(
    runner: Runner, suite: Suite, request: SuiteRequest, out: str | Path, say: Callable[[str], None] = print
) -> list[dict[str, Any]]:
    """Run the tasks with data, and write suite.json and suite.html to `out`. After a kill the same call goes on.

    Returns a row for each task, or each bin of one: its result, or `missing`, which says where to get the data.
    """
    tasks = asked_tasks(suite, request)
    with ranks_of(runner) as ranks:
        rows = _rows_of(runner, suite, tasks, request, Path(out), say if ranks.is_main else lambda line: None)
        with ranks.agreeing():
            if ranks.is_main:
                protocol = {**suite.protocol, **(request.protocol or {})}
                result = {"suite": suite.name, "model": runner.origin(), "protocol": protocol, "tasks": rows}
                write_atomically(Path(out) / "suite.json", dump_json(result))
                write_page(Path(out) / "suite.html", suite.title, suite.published, rows)
    return rows


def _rows_of(
    runner: Runner,
    suite: Suite,
    tasks: list[SuiteTask],
    request: SuiteRequest,
    out: Path,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    data, rows = Path(request.data), []
    for task in tasks:
        found = _run_task(runner, task, options_of(suite, task, request), request, out, say)
        if not found:
            found = [{"task": task.name, "metric": task.metric, "missing": f"{suite.source} ({suite.expects})"}]
            say(f"{task.name}: not in {data} (looked for {', '.join(task.folders)}); from {suite.source}")
        rows += found
    if all("missing" in row for row in rows):
        raise no_data(suite, request)
    return without_nan(rows)


def no_data(suite: Suite, request: SuiteRequest) -> UserError:
    """The error of a folder that has none of the tasks."""
    return UserError(
        f"--data: {request.data} has none of the tasks; it should hold {suite.expects}, from {suite.source}"
    )


def options_of(suite: Suite, task: SuiteTask, request: SuiteRequest) -> dict[str, Any]:
    """The options of a task: those of the request, else its own, else those of the suite's protocol."""
    options = {**suite.protocol, **task.options, **(request.protocol or {})}
    return {key: value for key, value in options.items() if key in _OPTIONS[task.kind]}


def asked_tasks(suite: Suite, request: SuiteRequest) -> list[SuiteTask]:
    """The tasks that a request names, or all. Raises `UserError` where there is no such task, or no folder of data."""
    if not is_directory(request.data):
        raise UserError(f"--data: {request.data} is not a folder; it should hold {suite.expects}")
    names = request.tasks
    known = {task.name: task for task in suite.tasks}
    for name in names or ():
        if name not in known:
            raise UserError(f"--tasks: {suite.name} has no task {name!r}, but {', '.join(known)}")
    return [known[name] for name in names] if names else suite.tasks


def _run_task(
    runner: Runner,
    task: SuiteTask,
    options: dict[str, Any],
    request: SuiteRequest,
    out: Path,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """The rows of a task; None where its data are missing."""
    data, genome = Path(request.data), None if request.genome is None else Path(request.genome)
    if task.kind == "finetune":
        found = find_task_data(data, task.folders, out / "tables" / task.name, genome)
        if found is None:
            return []
        for note in found.notes:
            say(f"note: {note}")
        rows = [finetuned(runner, task.metric, found, options, out / task.name, say)]
    elif task.kind == "svm":
        tables = find_tables(data, task.folders, ("train", "test"))
        if len(tables) < 2:
            return []
        rows = window_svm(runner, SvmTask(tables, out / task.name, options, genome))
    else:
        tables = find_tables(data, task.folders, (task.split,))
        if not tables:
            return []
        asked = ZeroShot(tables[task.split], out / task.name, task.metric, options, genome)
        rows = [KINDS[task.kind](runner, asked)]
    published = {model: list(numbers) for model, numbers in task.published.items()}
    named = [{"task": task.row_name(row.pop("bin", "")), "metric": task.metric, **row} for row in rows]
    for row in named:
        row["published"] = published
        say(f"{row['task']}: {task.metric} {mean_and_spread(row, 4)}")
    return named
