"""A linear probe: logistic or ridge regression on the embeddings of a frozen model."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from caduceus.distributed.ranks import Ranks
from caduceus.errors import UserError
from caduceus.evaluate.baselines import fit_linear
from caduceus.evaluate.embed import EmbedOptions, embed
from caduceus.evaluate.labelled import Labelled, LabelledTable, Task, find_task, split_off
from caduceus.evaluate.metrics import check_metric, measure
from caduceus.evaluate.model import Runner
from caduceus.evaluate.parts import Parts, cut
from caduceus.evaluate.pools import check_pool
from caduceus.files import dump_json, sha256_of, write_atomically

_PART_BASES, _PART_SEQUENCES = 1 << 22, 4096


@dataclass(frozen=True)
class ProbeOptions:
    """The options of a probe.

    task: auto, classification or regression. pool: mean, max, centre or middle:BEFORE:AFTER. layer: as in
    `EmbedOptions`. valid_share: the share of train on which the penalty is chosen, where there is no table "valid".
    metric: the metric that chooses the penalty. batch_bases: bases of a batch; the default suits the device.
    """

    task: str = "auto"
    pool: str = "mean"
    layer: int = -1
    valid_share: float = 0.1
    metric: str | None = None
    batch_bases: int | None = None

    def __post_init__(self) -> None:
        check_pool(self.pool)
        if not 0 < self.valid_share < 1:
            raise UserError(f"--valid-share: must be between 0 and 1, got {self.valid_share}")

    @property
    def embedding(self) -> EmbedOptions:
        """The options of the embedding: both strands, concatenated."""
        return EmbedOptions(pool=self.pool, layer=self.layer, strands="concatenate", batch_bases=self.batch_bases)


def read_tables(tables: dict[str, LabelledTable], options: ProbeOptions) -> tuple[Task, str, dict[str, Labelled]]:
    """The task, the metric that chooses the penalty, and the sequences of train, valid and test."""
    task = find_task(tables["train"], options.task)
    if task.per_base:
        raise UserError(
            "--task: a probe needs labels of sequences, not of single bases; use finetune --frozen for these"
        )
    metric = check_metric(options.metric, task)
    data = {name: table.labelled(task) for name, table in tables.items()}
    if len(data["train"]) < 2:
        raise UserError(f"{tables['train'].path}: one sequence is not enough to learn from")
    if "valid" not in data:
        data["train"], data["valid"] = split_off(data["train"], options.valid_share, seed=1)
    return task, metric, data


def probe(
    runner: Runner,
    tables: dict[str, LabelledTable],
    out: str | Path,
    options: ProbeOptions | None = None,
    ranks: Ranks | None = None,
) -> dict[str, Any]:
    """Fit a linear model on the embeddings of `tables` ("train", and optionally "valid" and "test").

    Returns its metrics on each table, and writes them to `out` as JSON. After a kill the same call goes on with the
    missing embeddings. ranks: the ranks that share the work; by default all that were started with this process.
    """
    options = options or ProbeOptions()
    task, metric, data = read_tables(tables, options)
    origin = {
        "verb": "probe",
        "model": runner.origin(),
        "options": asdict(options),
        "tables": {name: {**asdict(table), "path": str(table.path)} for name, table in tables.items()},
        "sha256": {name: sha256_of(table.path) for name, table in tables.items()},
    }
    sequences = [bases for labelled in data.values() for bases in labelled.bases]
    parts = cut(sequences, len, _PART_BASES, _PART_SEQUENCES)
    store = Parts(out, origin, ranks)

    def compute(part: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        return {"embeddings": embed(runner, part, options.embedding)}

    store.run("embedding", parts, len, compute, "bases")
    result: dict[str, Any] = {}
    with store.writing() as writes:
        if writes:
            features = np.concatenate([arrays["embeddings"] for arrays in store.load(len(parts))])
            ends = np.cumsum([len(labelled) for labelled in data.values()])[:-1]
            of = dict(zip(data, np.split(features, ends), strict=True))
            predict = fit_linear(task, metric, *((of[name], data[name].labels) for name in ("train", "valid")))
            measured = {
                name: measure(task, data[name].labels, predict(of[name])) for name in ("valid", "test") if name in data
            }
            result = {"task": task.to_json(), "metric": metric, "metrics": measured}
            write_atomically(out, dump_json({**store.origin, **result}))
            store.drop()
    return store.ranks.broadcast(result)
