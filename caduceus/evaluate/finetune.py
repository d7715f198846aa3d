"""Fine-tuning of a model on labelled sequences, beside baselines on the same split.

OUT/result.json    everything that was measured
OUT/model/         the fine-tuned model of the seed that is best on validation, which `predict` takes
OUT/predictions.tsv   that model's on the test
OUT/unfinished/    what is finished of it, until result.json is there
"""

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from caduceus.errors import UserError
from caduceus.evaluate.baselines import fit_linear, kmer_counts
from caduceus.evaluate.classifier import POOLS, Cnn, HeadOnly, SequenceModel
from caduceus.evaluate.columns import mean_and_spread, write_columns
from caduceus.evaluate.embed import EmbedOptions, embed
from caduceus.evaluate.fitting import Examples, Fit, FitOptions
from caduceus.evaluate.labelled import Labelled, LabelledTable, Task, copies, find_task, split_off
from caduceus.evaluate.metrics import check_metric, is_better, measure, names_of
from caduceus.evaluate.model import Runner
from caduceus.files import dump_json, sha256_of, write_atomically
from caduceus.model.heads import CaduceusForMaskedLM
from data_prep.progress import Progress

BASELINES = ("random", "cnn", "kmer")
_UNFINISHED, _RESULT = "unfinished", "result.json"


@dataclass(frozen=True)
class FinetuneOptions:
    """task: auto, classification or regression. pool: mean, max or centre. frozen: only the head is trained, on the
    embeddings of both strands. probe: also a linear model on embeddings. baselines: random (the same network without
    pre-training), cnn, kmer. seeds: runs, from 1 on, which differ in validation split, head and order.
    """

    task: str = "auto"
    pool: str = "mean"
    frozen: bool = False
    probe: bool = False
    baselines: tuple[str, ...] = ()
    seeds: int = 1
    valid_share: float = 0.1
    metric: str | None = None
    fit: FitOptions = field(default_factory=FitOptions)

    def __post_init__(self) -> None:
        if self.pool not in POOLS:
            raise UserError(f"--pool: choose one of {', '.join(POOLS)}, got {self.pool!r}")
        for name in self.baselines:
            if name not in BASELINES:
                raise UserError(f"--baseline: choose among {', '.join(BASELINES)}, got {name!r}")
        if self.seeds < 1:
            raise UserError(f"--seeds: must be at least 1, got {self.seeds}")
        if not 0 < self.valid_share < 1:
            raise UserError(f"--valid-share: must be between 0 and 1, got {self.valid_share}")

    @property
    def methods(self) -> list[str]:
        """What is trained, the fine-tuning itself first."""
        return ["frozen" if self.frozen else "full", *(["probe"] if self.probe else []), *self.baselines]


def finetune(
    runner: Runner,
    tables: dict[str, LabelledTable],
    out: str | Path,
    options: FinetuneOptions,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Fine-tune on `tables` ("train", and where there are any "valid" and "test") and write the folder `out`.

    Returns what stands in result.json: for each method the metrics of each seed on validation and test, and their mean
    and spread. After a kill, the same call goes on with what is not finished.
    """
    study = _Study(runner, tables, Path(out), options)
    if (finished := study.finished()) is not None:
        say(f"{out}: is there already")
        return finished
    study.begin(say)
    for method in options.methods:
        for seed in range(1, options.seeds + 1):
            study.run(method, seed)
    return study.finish()


class _Study:
    """One fine-tuning: its data, and what is kept of each method and seed."""

    def __init__(self, runner: Runner, tables: dict[str, LabelledTable], out: Path, options: FinetuneOptions) -> None:
        self.runner, self.out, self.options = runner, out, options
        self.folder = out / _UNFINISHED
        self.task = find_task(tables["train"], options.task)
        self.metric = check_metric(options.metric, self.task)
        self.data = {name: table.labelled(self.task) for name, table in tables.items()}
        if len(self.data["train"]) < 2:
            raise UserError(f"{tables['train'].path}: one sequence is too few to learn from")
        self.origin = {
            "model": runner.origin(),
            "options": asdict(options),
            "tables": {name: {**asdict(table), "path": str(table.path)} for name, table in tables.items()},
            "sha256": {name: sha256_of(table.path) for name, table in tables.items()},
        }

    def finished(self) -> dict[str, Any] | None:
        """What an earlier call like this one wrote, if it came to its end."""
        if (self.out / _UNFINISHED).exists() or not (self.out / _RESULT).is_file():
            return None
        result = json.loads((self.out / _RESULT).read_bytes())
        return result if {key: result.get(key) for key in self.origin} == json.loads(dump_json(self.origin)) else None

    def begin(self, say: Callable[[str], None]) -> None:
        """Make the folder, drop what is there of another command, and say what is going to be done."""
        stamp, content = self.folder / "made-from.json", dump_json(self.origin)
        ours = self.folder.is_dir() or (self.out / _RESULT).is_file()
        if self.out.is_file() or (self.out.is_dir() and not ours and any(self.out.iterdir())):
            raise UserError(f"--out: {self.out} holds other files; choose a new folder")
        if self.folder.is_dir() and not (stamp.is_file() and stamp.read_bytes() == content):
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(stamp, content)
        kind = "regression" if self.task.classes is None else f"classification ({', '.join(self.task.classes[:8])})"
        counts = ", ".join(f"{len(data):,} {name}" for name, data in self.data.items())
        strands = (
            "conjoined in training and test" if self.runner.config.rcps else "forward in training, both averaged after"
        )
        say(f"{kind}, {counts}; chosen by {self.metric} on validation; strands: {strands}")
        for name, (exact, reverse) in self.copies.items():
            if exact or reverse:
                say(f"note: {exact:,} sequences of {name} also stand in train, {reverse:,} as reverse complement")

    @cached_property
    def copies(self) -> dict[str, tuple[int, int]]:
        """How many sequences of valid and test stand in train: as they are, and only as their reverse complement."""
        others = [name for name in ("valid", "test") if name in self.data]
        return {name: copies(self.data["train"].bases, self.data[name].bases) for name in others}

    def run(self, method: str, seed: int) -> None:
        """Train by one method under one seed and keep what it gives, unless that is there."""
        place = self.folder / f"{method}-{seed}"
        if place.with_suffix(".json").is_file():
            return
        torch.manual_seed(seed)
        if "valid" in self.data:
            train, valid = self.data["train"], self.data["valid"]
        else:
            train, valid = split_off(self.data["train"], self.options.valid_share, seed)
        parts = {"train": train, "valid": valid, **({"test": self.data["test"]} if "test" in self.data else {})}
        if method in ("probe", "kmer"):
            result, outputs = self._linear(method, parts)
        else:
            result, outputs = self._network(method, parts, seed, place)
        if outputs is not None:
            result["test"] = measure(self.task, parts["test"].labels, outputs)
            np.save(place.with_suffix(".npy"), outputs)
        write_atomically(place.with_suffix(".json"), dump_json(result))
        place.with_suffix(".pt").unlink(missing_ok=True)

    def _linear(self, method: str, parts: dict[str, Labelled]) -> tuple[dict[str, Any], np.ndarray | None]:
        of = self._embedded if method == "probe" else kmer_counts
        features = {name: of(data.bases) for name, data in parts.items()}
        pairs = [(features[name], parts[name].labels) for name in ("train", "valid")]
        predict = fit_linear(self.task, self.metric, *pairs)
        result = {"valid": measure(self.task, parts["valid"].labels, predict(features["valid"]))}
        return result, predict(features["test"]) if "test" in parts else None

    def _network(
        self, method: str, parts: dict[str, Labelled], seed: int, place: Path
    ) -> tuple[dict[str, Any], np.ndarray | None]:
        net = self._net(method, seed)
        inputs = {n: list(self._embedded(d.bases)) if method == "frozen" else d.bases for n, d in parts.items()}
        sizes = {name: [1 if method == "frozen" else len(bases) for bases in d.bases] for name, d in parts.items()}
        examples = {name: Examples(inputs[name], data.labels, sizes[name]) for name, data in parts.items()}
        most = self.runner.batch_bases(self.options.fit.batch_bases)
        fit = Fit(net, self.task, self.metric, self.options.fit, self.runner, most)
        total = self.options.fit.epochs * len(parts["train"])
        with Progress(f"{method}, seed {seed}", total, "sequences") as progress:
            result = fit.run(examples["train"], examples["valid"], seed, place.with_suffix(".pt"), progress.add)
        if method == self.options.methods[0]:
            self._as_model(net).save(place, {**self.origin, "seed": seed})
        return result, fit.outputs(examples["test"]) if "test" in examples else None

    def _net(self, method: str, seed: int) -> nn.Module:
        if method == "cnn":
            net: nn.Module = Cnn(self.task.outputs)
        elif method == "frozen":
            net = HeadOnly(nn.Linear(self.runner.config.d_model, self.task.outputs))
        elif method == "random":
            net = SequenceModel(CaduceusForMaskedLM(self.runner.config), self.task, self.options.pool)
            net.backbone.init_weights(torch.Generator().manual_seed(seed))
        else:
            net = SequenceModel(copy.deepcopy(self.runner.model), self.task, self.options.pool)
        return net.to(self.runner.device)

    def _as_model(self, net: nn.Module) -> SequenceModel:
        if isinstance(net, SequenceModel):
            return net
        model = SequenceModel(self.runner.model, self.task, self.options.pool)
        model.head = net.head
        return model

    def _embedded(self, sequences: list[np.ndarray]) -> np.ndarray:
        """Embeddings of both strands, (n, 2 D), each sequence computed once."""
        options = EmbedOptions(pool=self.options.pool, strands="concatenate")
        new = [bases for bases in sequences if bases.tobytes() not in self._embeddings]
        for bases, vector in zip(new, embed(self.runner, new, options) if new else (), strict=True):
            self._embeddings[bases.tobytes()] = vector
        return np.stack([self._embeddings[bases.tobytes()] for bases in sequences])

    @cached_property
    def _embeddings(self) -> dict[bytes, np.ndarray]:
        return {}

    def finish(self) -> dict[str, Any]:
        """Write the results and the best seed's model, and drop what is no longer needed."""
        found = {
            method: [
                json.loads((self.folder / f"{method}-{seed}.json").read_bytes())
                for seed in range(1, self.options.seeds + 1)
            ]
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
            labels = self.data["test"].labels
            shown = labels if self.task.classes is None else [self.task.classes[label] for label in labels]
            columns = {"label": shown, **output_columns(self.task, np.load(chosen.with_suffix(".npy")))}
            write_columns(self.out / "predictions.tsv", columns)
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


def summarised(task: Task, results: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Mean and spread (of the sample; 0 for one seed) of each metric on the test, or without one on validation."""
    part = "test" if "test" in results[0] else "valid"
    values = {name: np.array([result[part][name] for result in results], dtype=float) for name in names_of(task)}
    return {
        name: {"mean": float(v.mean()), "spread": float(v.std(ddof=1)) if len(v) > 1 else 0.0}
        for name, v in values.items()
    }


def output_columns(task: Task, outputs: np.ndarray) -> dict[str, Any]:
    """Predictions as columns of a table: the value, or the class and the probability of each."""
    if task.classes is None:
        return {"prediction": outputs}
    chosen = [task.classes[number] for number in outputs.argmax(1)]
    return {"prediction": chosen, **{f"p_{name}": outputs[:, n] for n, name in enumerate(task.classes)}}


def table_of(result: dict[str, Any]) -> str:
    """The summary of a fine-tuning as lines to read."""
    summary = result["summary"]
    names = names_of(Task.from_json(result["task"]))
    rows = [["", *names]]
    for method in result["methods"]:
        metrics = summary[method]
        rows.append([method, *(mean_and_spread(metrics[name], 4) for name in names)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)
