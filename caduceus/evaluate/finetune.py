"""Fine-tuning of a model on labelled sequences, with baselines on the same split.

OUT/result.json    everything that was measured
OUT/model/         the fine-tuned model of the seed that is best on validation, which `predict` takes
OUT/predictions.tsv   that model's on the test; .npz for labels of bins
OUT/runs/full-1/   the run directory of a fit: config.yaml, metrics.jsonl, events.jsonl, logs/
OUT/unfinished/    what is finished of it, until result.json is there
"""

import copy
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from caduceus.distributed.ranks import Ranks
from caduceus.errors import UserError
from caduceus.evaluate.adapters import add_adapters, merge_adapters
from caduceus.evaluate.baselines import fit_linear, kmer_counts
from caduceus.evaluate.binned import BinnedTable
from caduceus.evaluate.classifier import Cnn, HeadOnly, SequenceModel
from caduceus.evaluate.columns import write_columns
from caduceus.evaluate.embed import EmbedOptions, embed
from caduceus.evaluate.examples import Examples
from caduceus.evaluate.fitting import Fit, FitOptions, measured, predicted, ranks_of
from caduceus.evaluate.labelled import Labelled, LabelledTable, copies, split_off
from caduceus.evaluate.metrics import check_metric, is_better, measure
from caduceus.evaluate.model import Runner
from caduceus.evaluate.pools import check_pool
from caduceus.evaluate.results import label_columns, output_columns, place_columns, summarised, told
from caduceus.files import dump_json, replacing, sha256_of, write_atomically
from caduceus.model.heads import CaduceusForMaskedLM
from caduceus.patience import exists, is_directory, is_file

BASELINES, STRANDS = ("random", "cnn", "kmer"), ("auto", "post-hoc", "augment")
_UNFINISHED, _RESULT, _RUNS = "unfinished", "result.json", "runs"


@dataclass(frozen=True)
class FinetuneOptions:
    """The options of a fine-tuning.

    task: auto, classification, regression, multilabel or per-base. pool: mean, max, centre or middle:BEFORE:AFTER.
    frozen: train only the head, on the embeddings of both strands. lora: rank of adapters that are trained with the
    head, instead of the weights; 0: none. probe: also fit a linear model on embeddings. baselines: random (the same
    network without pre-training), cnn, kmer. seeds: number of runs, which differ in validation split, head and order.
    strands, for models that are not equivariant: post-hoc (which auto takes) shows the forward strand in training,
    augment shows either, by a coin.
    """

    task: str = "auto"
    pool: str = "mean"
    frozen: bool = False
    lora: int = 0
    probe: bool = False
    baselines: tuple[str, ...] = ()
    seeds: int = 1
    valid_share: float = 0.1
    metric: str | None = None
    strands: str = "auto"
    fit: FitOptions = field(default_factory=FitOptions)

    def __post_init__(self) -> None:
        check_pool(self.pool)
        if self.strands not in STRANDS:
            raise UserError(f"--strands: choose one of {', '.join(STRANDS)}, got {self.strands!r}")
        for name in self.baselines:
            if name not in BASELINES:
                raise UserError(f"--baseline: choose from {', '.join(BASELINES)}, got {name!r}")
        if self.lora < 0 or (self.lora and self.frozen):
            raise UserError(f"--lora: must be a rank of at least 1, and does not go with --frozen; got {self.lora}")
        if self.seeds < 1:
            raise UserError(f"--seeds: must be at least 1, got {self.seeds}")
        if not 0 < self.valid_share < 1:
            raise UserError(f"--valid-share: must be between 0 and 1, got {self.valid_share}")

    @property
    def main(self) -> str:
        """The method of the fine-tuning itself: frozen, lora or full."""
        return "frozen" if self.frozen else "lora" if self.lora else "full"

    @property
    def methods(self) -> list[str]:
        """The methods that are trained, the fine-tuning itself first."""
        return [self.main, *(["probe"] if self.probe else []), *self.baselines]


def finetune(
    runner: Runner,
    tables: Mapping[str, LabelledTable | BinnedTable],
    out: str | Path,
    options: FinetuneOptions,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Fine-tune on `tables` ("train", and optionally "valid" and "test") and write the folder `out`.

    Returns the content of result.json: for each method the metrics of each seed on validation and test, and their mean
    and spread. After a kill, the same call goes on with unfinished parts.
    """
    with ranks_of(runner) as ranks:
        study = _Study(runner, tables, Path(out), options, ranks)
        finished = study.finished()
        if finished is not None:
            study.say(say, f"{out}: is there already")
            return finished
        study.begin(say)
        for method in options.methods:
            for seed in range(1, options.seeds + 1):
                study.run(method, seed)
        return study.finish()


class _Study:
    """One fine-tuning: its data, and the saved results of each method and seed."""

    def __init__(
        self,
        runner: Runner,
        tables: Mapping[str, LabelledTable | BinnedTable],
        out: Path,
        options: FinetuneOptions,
        ranks: Ranks,
    ) -> None:
        self.runner, self.out, self.options, self.ranks = runner, out, options, ranks
        self.folder = out / _UNFINISHED
        self._embeddings: dict[bytes, np.ndarray] = {}
        self.task = tables["train"].task(options.task)
        if self.task.per_base and (options.probe or "kmer" in options.baselines):
            raise UserError("--probe, --baseline kmer: need labels of sequences, not of single bases")
        if self.task.bin > 1 and options.frozen:
            raise UserError("--frozen: keeps the embeddings of every base, which labels of bins are too many for")
        if runner.config.rcps and options.strands != "auto":
            raise UserError(
                f"--strands: {options.strands} is for models that are not equivariant; a Caduceus-PS conjoins strands"
            )
        self.metric = check_metric(options.metric, self.task)
        self.data = {name: table.labelled(self.task) for name, table in tables.items()}
        if len(self.data["train"]) < 2:
            raise UserError(f"{tables['train'].path}: one sequence is not enough to learn from")
        self.origin = {
            "model": runner.origin(),
            "options": asdict(options),
            "tables": {name: {**asdict(table), "path": str(table.path)} for name, table in tables.items()},
            "sha256": {name: sha256_of(table.path) for name, table in tables.items()},
        }

    def finished(self) -> dict[str, Any] | None:
        """The result of an earlier equal call, if it finished."""
        return self._by_main(self._finished)

    def _finished(self) -> dict[str, Any] | None:
        if exists(self.out / _UNFINISHED) or not is_file(self.out / _RESULT):
            return None
        result = json.loads((self.out / _RESULT).read_bytes())
        return result if {key: result.get(key) for key in self.origin} == json.loads(dump_json(self.origin)) else None

    def say(self, say: Callable[[str], None], line: str) -> None:
        """Say a line, on the main rank only."""
        if self.ranks.is_main:
            say(line)

    def _by_main(self, work: Callable[[], Any]) -> Any:
        """The result of `work` on the main rank, on every rank."""
        found = None
        with self.ranks.agreeing():
            if self.ranks.is_main:
                found = work()
        return self.ranks.broadcast(found)

    def begin(self, say: Callable[[str], None]) -> None:
        """Make the folder, remove the parts of another command, and say what will be done."""
        self._by_main(lambda: self._begin(say))

    def _begin(self, say: Callable[[str], None]) -> None:
        stamp, content = self.folder / "made-from.json", dump_json(self.origin)
        ours = is_directory(self.folder) or is_file(self.out / _RESULT)
        if is_file(self.out) or (is_directory(self.out) and not ours and any(self.out.iterdir())):
            raise UserError(f"--out: {self.out} holds other files; choose a new folder")
        if is_directory(self.folder) and not (is_file(stamp) and stamp.read_bytes() == content):
            shutil.rmtree(self.folder)
        if not is_directory(self.folder):
            shutil.rmtree(self.out / _RUNS, ignore_errors=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(stamp, content)
        counts = ", ".join(f"{len(data):,} {name}" for name, data in self.data.items())
        say(f"{told(self.task)}, {counts}; chosen by {self.metric} on validation; strands: {self._told_strands()}")
        for name, (exact, reverse) in self.copies.items():
            if exact or reverse:
                say(f"note: {exact:,} sequences of {name} also occur in train, {reverse:,} as reverse complement")

    def _told_strands(self) -> str:
        if self.runner.config.rcps:
            return "conjoined in training and test"
        shown = "either by a coin" if self.options.strands == "augment" else "forward"
        return f"{shown} in training, both averaged after (post-hoc)"

    @cached_property
    def copies(self) -> dict[str, tuple[int, int]]:
        """How many sequences of valid and test occur in train: as they are, and only as their reverse complement."""
        others = [name for name in ("valid", "test") if name in self.data]
        return {name: copies(self.data["train"].bases, self.data[name].bases) for name in others}

    def run(self, method: str, seed: int) -> None:
        """Train with one method and seed and save the results, unless they exist."""
        place = self.folder / f"{method}-{seed}"
        if self._by_main(place.with_suffix(".json").is_file):
            return
        torch.manual_seed(seed)
        if "valid" in self.data:
            train, valid = self.data["train"], self.data["valid"]
        else:
            train, valid = split_off(self.data["train"], self.options.valid_share, seed)
        parts = {"train": train, "valid": valid, **({"test": self.data["test"]} if "test" in self.data else {})}
        if method in ("probe", "kmer"):
            features = {name: self._features(method, data.bases) for name, data in parts.items()}
            self._by_main(lambda: self._linear(features, parts, place))
        else:
            self._network(method, parts, seed, place)

    def _linear(self, features: dict[str, np.ndarray], parts: dict[str, Labelled], place: Path) -> None:
        pairs = [(features[name], parts[name].labels) for name in ("train", "valid")]
        predict = fit_linear(self.task, self.metric, *pairs)
        result = {"valid": measure(self.task, parts["valid"].labels, predict(features["valid"]))}
        if "test" in parts:
            outputs = predict(features["test"])
            result["test"] = measure(self.task, parts["test"].labels, outputs)
            np.save(place.with_suffix(".npy"), outputs)
        write_atomically(place.with_suffix(".json"), dump_json(result))

    def _features(self, method: str, bases: list[np.ndarray]) -> np.ndarray:
        return self._embedded(bases) if method == "probe" else kmer_counts(bases)

    def _network(self, method: str, parts: dict[str, Labelled], seed: int, place: Path) -> None:
        net = self._net(method, seed)
        frozen = method == "frozen"
        inputs = {n: list(self._embedded(d.bases)) if frozen else d.bases for n, d in parts.items()}
        one = frozen and not self.task.per_base
        sizes = {name: [1] * len(d) if one else d.sizes for name, d in parts.items()}
        examples = {name: Examples(inputs[name], data.labels, sizes[name]) for name, data in parts.items()}
        augment = self.options.strands == "augment" and method in ("full", "lora", "random")
        fit = Fit(net, self.task, self.metric, self.options.fit, self.runner, self.ranks, augment)
        result = fit.run(examples["train"], examples["valid"], seed, self.out / _RUNS / place.name)
        outputs = fit.outputs(examples["test"]) if "test" in examples else None
        self._by_main(lambda: self._keep(method, net, seed, result, examples.get("test"), outputs, place))

    def _keep(
        self,
        method: str,
        net: nn.Module,
        seed: int,
        result: dict[str, Any],
        test: Examples | None,
        outputs: list[np.ndarray] | None,
        place: Path,
    ) -> None:
        """Write the results of a fit, and its record last."""
        if method == self.options.main:
            self._as_model(net).save(place, {**self.origin, "seed": seed})
        if test is not None and outputs is not None:
            result["test"] = measured(self.task, test, outputs)
            np.save(place.with_suffix(".npy"), predicted(self.task, outputs))
        write_atomically(place.with_suffix(".json"), dump_json(result))

    def _net(self, method: str, seed: int) -> nn.Module:
        if method == "cnn":
            net: nn.Module = Cnn(self.task)
        elif method == "frozen":
            net = HeadOnly(nn.Linear(self.runner.config.d_model, self.task.outputs))
        elif method == "random":
            net = SequenceModel(CaduceusForMaskedLM(self.runner.config), self.task, self.options.pool)
            net.backbone.init_weights(torch.Generator().manual_seed(seed))
        else:
            net = SequenceModel(copy.deepcopy(self.runner.model), self.task, self.options.pool)
            if method == "lora":
                add_adapters(net.backbone, self.options.lora)
        return net.to(self.runner.device)

    def _as_model(self, net: nn.Module) -> SequenceModel:
        if isinstance(net, SequenceModel):
            merge_adapters(net.backbone)
            return net
        model = SequenceModel(self.runner.model, self.task, self.options.pool)
        model.head = net.head
        return model

    def _embedded(self, sequences: list[np.ndarray]) -> Any:
        """Embeddings of both strands, (n, 2 D), or per base a list of (L, 2 D); each sequence is computed once."""
        pool = "base" if self.task.per_base else self.options.pool
        options = EmbedOptions(pool=pool, strands="concatenate")
        new = list({bases.tobytes(): bases for bases in sequences if bases.tobytes() not in self._embeddings}.values())
        mine = new[self.ranks.rank :: self.ranks.world]
        vectors = embed(self.runner, mine, options) if mine else ()
        by_bases = {bases.tobytes(): vector for bases, vector in zip(mine, vectors, strict=True)}
        of_ranks: Any = self.ranks.gather_objects(by_bases)
        for of_rank in of_ranks:
            self._embeddings |= of_rank
        found: Any = [self._embeddings[bases.tobytes()] for bases in sequences]
        return found if self.task.per_base else np.stack(found)

    def finish(self) -> dict[str, Any]:
        """Write the results and the best seed's model, and remove what is no longer needed."""
        return self._by_main(self._finish)

    def _finish(self) -> dict[str, Any]:
        seeds = range(1, self.options.seeds + 1)
        found = {
            method: [json.loads((self.folder / f"{method}-{seed}.json").read_bytes()) for seed in seeds]
            for method in self.options.methods
        }
        main, best = self.options.methods[0], 0
        for place, result in enumerate(found[main]):
            if is_better(self.metric, result["valid"][self.metric], found[main][best]["valid"][self.metric]):
                best = place
        chosen = self.folder / f"{main}-{best + 1}"
        shutil.rmtree(self.out / "model", ignore_errors=True)
        shutil.copytree(chosen, self.out / "model")
        if "test" in self.data:
            self._write_predictions(self.data["test"], np.load(chosen.with_suffix(".npy")))
        summary = {method: summarised(self.task, results) for method, results in found.items()}
        result = {
            **self.origin,
            "task": self.task.to_json(),
            "metric": self.metric,
            "methods": self.options.methods,
            "copies": self.copies,
            "results": found,
            "summary": summary,
            "seed_of_model": best + 1,
        }
        write_atomically(self.out / _RESULT, dump_json(result))
        shutil.rmtree(self.folder)
        return json.loads(dump_json(result))

    def _write_predictions(self, data: Labelled, outputs: np.ndarray) -> None:
        if self.task.bin > 1:  # numbers that no text table could hold
            labels = np.stack(list(data.labels))
            with replacing(self.out / "predictions.npz") as file:
                np.savez(file, labels=labels, predictions=outputs.reshape(labels.shape).astype(np.float32))
            return
        shown = {**label_columns(self.task, data.labels), **output_columns(self.task, outputs)}
        columns = {**place_columns(self.task, range(len(data)), data.sizes), **shown}
        write_columns(self.out / "predictions.tsv", columns)
