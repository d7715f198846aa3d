"""The `evaluations` of a run: verbs on the model while it trains. They are checked at the start, and each returns
numbers by name.

The files of a verb lie in RUN/evaluations/NAME, from its newest evaluation.
"""

import argparse
import math
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from caduceus.arguments import Parser
from caduceus.config import Config, overridden
from caduceus.config.evaluations import SPACE, Evaluation, evaluations_of
from caduceus.data.loader import ValidationLoader, build_validation
from caduceus.distributed.ranks import Ranks
from caduceus.errors import UserError
from caduceus.evaluate import commands
from caduceus.evaluate.embed import EmbedOptions, check_places, embed_file
from caduceus.evaluate.finetune import finetune
from caduceus.evaluate.heldout import held_out_loss
from caduceus.evaluate.labelled import Task, find_task
from caduceus.evaluate.metrics import check_metric, names_of
from caduceus.evaluate.model import Runner, layer_number
from caduceus.evaluate.parts import alone
from caduceus.evaluate.probe import ProbeOptions, probe, read_tables
from caduceus.evaluate.scores import ScoreOptions
from caduceus.evaluate.sequences import SequenceSource
from caduceus.evaluate.suite import load_suite, run_suite
from caduceus.evaluate.suite_check import check_suite
from caduceus.evaluate.variant_inputs import VariantSource
from caduceus.evaluate.variant_labels import area_names
from caduceus.evaluate.variants import prepared, score_file

_OF_THE_RUN = ("model", "run", "export", "config", "out", "device", "precision")
"""Options of verbs that the run itself sets."""
Numbers = dict[str, float | None]


class InLoop(ABC):
    """One evaluation of a run. `numbers`: the names that `run` returns, as far as they are known before; `check` sets
    it.
    """

    def __init__(self, evaluation: Evaluation, config: Config) -> None:
        self.name, self.every, self.key = evaluation.name, evaluation.every, evaluation.key
        self.config = config
        self.out = Path(config.run.dir) / "evaluations" / evaluation.name / self.file
        self.arguments = _parsed(evaluation, config, self.out)
        self.numbers: list[str] = []

    file = ""
    """The name of the verb's output, in the evaluation's own folder."""

    @abstractmethod
    def check(self) -> None:
        """Raise `UserError` for mistakes that can be seen before the first evaluation. Only the main rank calls it."""

    @abstractmethod
    def run(self, runner: Runner, ranks: Ranks) -> Numbers:
        """The numbers of the model, computed by all ranks together: the same on each, and an error on one is raised on
        all.
        """

    def row(self, numbers: Numbers) -> dict[str, float]:
        """The numbers under their names in metrics.jsonl; NaN for undefined ones."""
        known = {name: math.nan if value is None else value for name, value in numbers.items()}
        return {f"{SPACE}{self.name}/{name}": value for name, value in known.items()}

    def ready(self) -> Path:
        """The path of the output; its folder is made."""
        self.out.parent.mkdir(parents=True, exist_ok=True)
        return self.out


def evaluations_in(config: Config) -> list[InLoop]:
    """The evaluations of a configuration, their options parsed but not yet checked."""
    return [_KINDS[one.verb](one, config) for one in evaluations_of(config.evaluations)]


def check_evaluations(found: Iterable[InLoop], best: str | None) -> None:
    """Raise a `UserError`, which names the key, for mistakes in evaluations or in `checkpoint.best`."""
    for one in found:
        try:
            one.check()
        except UserError as error:
            raise type(error)(f"{one.key}: {error}") from None
        known = list(one.row(dict.fromkeys(one.numbers, 0.0)))
        if best is not None and best.startswith(f"{SPACE}{one.name}/") and best not in known:
            raise UserError(f"checkpoint.best: {one.key} gives no {best}, but {', '.join(known) or 'no number'}")


def _parsed(evaluation: Evaluation, config: Config, out: Path) -> argparse.Namespace:
    """The verb's options, from their values in the configuration."""
    parser = Parser(prog=evaluation.key, add_help=False)
    verbs = parser.add_subparsers(dest="command", parser_class=Parser)
    commands.add_verbs(verbs)
    known = {a.dest: a for a in verbs.choices[evaluation.verb]._actions if a.dest not in (*_OF_THE_RUN, "help")}
    words: list[str] = []
    positional: list[str] = []
    for name, value in evaluation.options.items():
        if name in _OF_THE_RUN:
            raise UserError(f"{evaluation.key}.{name}: the run itself sets this; leave it out")
        if name not in known:
            raise UserError(f"{evaluation.key}: {evaluation.verb} has no option '{name}'; it has {', '.join(known)}")
        if known[name].option_strings:
            words += _words(known[name], value)
        else:
            positional += map(str, value if isinstance(value, list) else [value])
    source = ["--run" if evaluation.verb == "heldout" else "--model", str(config.run.dir)]
    target = [] if evaluation.verb == "heldout" else ["--out", str(out)]
    try:
        return parser.parse_args([evaluation.verb, *source, *target, *words, *positional])
    except UserError as error:
        raise UserError(f"{evaluation.key}: {str(error).removesuffix('; see --help')}") from None


def _words(action: argparse.Action, value: Any) -> list[str]:
    option = action.option_strings[-1]
    if value is None or (action.nargs == 0 and value is False):
        return []
    if action.nargs == 0 and value is True:
        return [option]
    if isinstance(value, list):
        return [option, *map(str, value)] if action.nargs else [f"{option}={','.join(map(str, value))}"]
    return [option, str(value)] if action.nargs else [f"{option}={value}"]


class _HeldOut(InLoop):
    """The loss on other held-out sequences, computed like a validation. Every rank takes its share of the batches."""

    _batches: ValidationLoader | None = None

    def _of_share(self, rank: int, world: int, device: Any = "cpu") -> ValidationLoader:
        config = overridden(self.config, self.arguments.overrides)
        if config.model != self.config.model:
            raise UserError("overrides: the model is the run's, so its keys cannot be changed here")
        return build_validation(config, self.arguments.split, rank=rank, world=world, device=device)

    def check(self) -> None:
        species = self._of_share(1, 2).species  # the numbers of rank 1, as rank 0 logs
        suffixes = ["", *(f"/{name}" for name in species)]
        self.numbers = [f"{name}{suffix}" for suffix in suffixes for name in ("loss", "accuracy")]
        self.numbers += ["perplexity", "bits_per_base"]

    def run(self, runner: Runner, ranks: Ranks) -> Numbers:
        with ranks.agreeing():
            self._batches = self._batches or self._of_share(ranks.rank, ranks.world, ranks.device)
        row = held_out_loss(
            runner.model, self._batches, ranks.device, runner.precision, add_up=ranks.sum, each=ranks.together
        )
        return {key.removeprefix("valid_"): value for key, value in row.items()}


class _Embed(InLoop):
    file = "embeddings.npz"

    def check(self) -> None:
        source, options = commands.picked(self.arguments, SequenceSource), commands.picked(self.arguments, EmbedOptions)
        layer_number(options.layer, self.config.model)
        check_places(source.items(), source, options)

    def run(self, runner: Runner, ranks: Ranks) -> Numbers:
        source, options = commands.picked(self.arguments, SequenceSource), commands.picked(self.arguments, EmbedOptions)
        embed_file(runner, source, self.ready(), options, ranks)
        return {}


class _Variants(InLoop):
    file = "scores.tsv"

    def check(self) -> None:
        if self.arguments.every_snv is not None or self.arguments.label is None:
            raise UserError(
                "numbers about variants need labels; give a file with input, and the name of the labels with label"
            )
        prepared(commands.picked(self.arguments, VariantSource), commands.labels_asked(self.arguments))
        self.numbers = area_names(commands.picked(self.arguments, ScoreOptions).columns())

    def run(self, runner: Runner, ranks: Ranks) -> Numbers:
        source, options = commands.picked(self.arguments, VariantSource), commands.picked(self.arguments, ScoreOptions)
        return score_file(runner, source, self.ready(), options, commands.labels_asked(self.arguments), ranks).areas


class _Probe(InLoop):
    file = "probe.json"

    def check(self) -> None:
        options = commands.picked(self.arguments, ProbeOptions)
        task, _, _ = read_tables(commands.labelled_tables(self.arguments), options)
        layer_number(options.layer, self.config.model)
        self.numbers = list(names_of(task))

    def run(self, runner: Runner, ranks: Ranks) -> Numbers:
        tables, options = commands.labelled_tables(self.arguments), commands.picked(self.arguments, ProbeOptions)
        metrics = probe(runner, tables, self.ready(), options, ranks)["metrics"]
        return metrics.get("test", metrics["valid"])


class _OnMain(InLoop):
    """An evaluation in one process: on the main rank, while the others wait."""

    @abstractmethod
    def compute(self, runner: Runner, say: Callable[[str], None]) -> Numbers:
        """The numbers, on the main rank."""

    def run(self, runner: Runner, ranks: Ranks) -> Numbers:
        numbers: Numbers = {}
        with ranks.agreeing():
            if ranks.is_main:
                shutil.rmtree(self.out, ignore_errors=True)  # the files of an earlier step's model
                with alone():
                    numbers = self.compute(runner, lambda line: None)
        return ranks.broadcast(numbers)


class _Finetune(_OnMain):
    file = "finetuned"

    def check(self) -> None:
        tables, options = commands.labelled_tables(self.arguments), commands.finetune_options(self.arguments)
        task = find_task(tables["train"], options.task)
        check_metric(options.metric, task)
        for table in tables.values():
            table.labelled(task)
        self.numbers = [f"{prefix}{name}" for prefix in self._prefixes(options.methods) for name in names_of(task)]

    def compute(self, runner: Runner, say: Callable[[str], None]) -> Numbers:
        tables, options = commands.labelled_tables(self.arguments), commands.finetune_options(self.arguments)
        result = finetune(runner, tables, self.ready(), options, say)
        return {
            f"{prefix}{name}": result["summary"][method][name]["mean"]
            for prefix, method in zip(self._prefixes(options.methods), options.methods, strict=True)
            for name in names_of(Task.from_json(result["task"]))
        }

    def _prefixes(self, methods: list[str]) -> list[str]:
        """The prefix of each method's numbers: none for the fine-tuning itself, the method's name for the others."""
        return ["", *(f"{method}/" for method in methods[1:])]


class _Suite(_OnMain):
    file = "suite"

    def check(self) -> None:
        request = commands.suite_request(self.arguments)
        self.numbers = [*check_suite(load_suite(self.arguments.suite), request), "mean"]

    def compute(self, runner: Runner, say: Callable[[str], None]) -> Numbers:
        suite, request = load_suite(self.arguments.suite), commands.suite_request(self.arguments)
        rows = run_suite(runner, suite, request, self.ready(), say)
        means = {row["task"]: row["mean"] for row in rows if row.get("mean") is not None}
        return {**means, "mean": math.fsum(means.values()) / len(means) if means else math.nan}


_KINDS: dict[str, type[InLoop]] = {
    "heldout": _HeldOut,
    "embed": _Embed,
    "variants": _Variants,
    "probe": _Probe,
    "finetune": _Finetune,
    "suite": _Suite,
}
