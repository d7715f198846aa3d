"""Classifies variants by an SVM on embeddings, as the Caduceus paper does for the causal eQTLs of GTEx.

Features: the mean hidden states of the bases around the variant, with REF and with ALT, averaged over both strands, and
the tissue. The window covers the same bases on both strands.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from caduceus.errors import UserError
from caduceus.evaluate.columns import package
from caduceus.evaluate.embed import EmbedOptions, embed
from caduceus.evaluate.metrics import interval_of, ranking
from caduceus.evaluate.model import Runner
from caduceus.evaluate.pairs import PairTable, binary_labels
from caduceus.evaluate.parts import Parts, cut
from caduceus.files import dump_json, fingerprint, sha256_of, write_atomically
from caduceus.patience import is_file
from data_prep.progress import Progress

_PART_BASES, _PART_ROWS = 1 << 23, 1024
_DISTANCE = "distance_to_nearest_tss"
_MOST_N = 0.005
"""Sequences with a larger share of N are left out, as in the paper."""


@dataclass(frozen=True)
class SvmTask:
    """A task of this kind.

    tables: "train" and "test". options: window (bases around the variant), length (of sequences that are read from a
    genome), distances (where the bins of the distance to a TSS begin), C (values of which cross-validation in train
    chooses one), rows (of train, drawn by each seed) and seeds.
    """

    tables: dict[str, Path]
    out: Path
    options: dict[str, Any]
    genome: Path | None = None


@dataclass(frozen=True)
class _Data:
    features: np.ndarray
    labels: np.ndarray
    distances: np.ndarray | None

    def within(self, low: float, high: float) -> "_Data":
        if self.distances is None:
            return self
        rows = (self.distances >= low) & (self.distances < high)
        return _Data(self.features[rows], self.labels[rows], self.distances[rows])


def window_svm(runner: Runner, task: SvmTask) -> list[dict[str, Any]]:
    """AUROC on the test for each bin of distances, with mean and spread over seeds. After a kill the same call goes on.

    Scores are distances to the SVM's decision boundary, so that the whole ranking counts.
    """
    tables = {name: PairTable(path, task.genome, task.options["length"]) for name, path in task.tables.items()}
    tissues = _tissue_codes(tables)
    data = {}
    for name, table in tables.items():
        means, shares = _window_means(runner, task, name, table)
        kept = shares < _MOST_N
        features = means if tissues is None else np.column_stack([means, tissues[name]])
        distances = table.numbers(_DISTANCE)
        data[name] = _Data(
            features[kept], binary_labels(table.columns)[kept], None if distances is None else distances[kept]
        )
    bins = bins_of(task.options, tables["test"])
    seeds = range(1, task.options["seeds"] + 1)
    rows = []
    with Progress(f"{task.out.name}, SVM", len(bins) * len(seeds), "fits") as progress:
        for name, (low, high) in bins.items():
            parts = {split: of.within(low, high) for split, of in data.items()}
            rows.append({**_row(task, parts, (low, high), seeds, progress), "bin": name})
    return rows


def bins_of(options: dict[str, Any], test: PairTable) -> dict[str, tuple[float, float]]:
    """The bins of distances, by name: each has a row of its own."""
    begins = options.get("distances") if test.columns.has(_DISTANCE) else None
    ends = [*begins[1:], np.inf] if begins else []
    bins = list(zip(begins, ends, strict=True)) if begins else [(-np.inf, np.inf)]
    return {_bin_name(low, high): (low, high) for low, high in bins}


def _bin_name(low: float, high: float) -> str:
    if low == -np.inf:
        return ""
    return f"over {low / 1000:g} kb" if high == np.inf else f"{low / 1000:g} to {high / 1000:g} kb"


def _row(
    task: SvmTask, parts: dict[str, _Data], ends: tuple[float, float], seeds: Sequence[int], progress: Progress
) -> dict[str, Any]:
    counts = {"rows": len(parts["test"].labels), "train_rows": len(parts["train"].labels)}
    for name, part in parts.items():
        if min(part.labels.sum(), (~part.labels).sum()) < (10 if name == "train" else 1):
            progress.add(len(seeds))
            return {
                "mean": np.nan,
                "spread": np.nan,
                "on": "test",
                "note": f"{name} has too few examples of a class",
                **counts,
            }
    fits = []
    for seed in seeds:
        fits.append(_fitted(task, parts, ends, seed))
        progress.add(1)
    values = [fit["auroc"] for fit in fits]
    labels, scores = parts["test"].labels, np.array(fits[0]["scores"])
    return {
        "mean": float(np.mean(values)),
        "spread": float(np.std(values, ddof=1)) if len(values) > 1 else 0.0,
        "seeds": len(values),
        "on": "test",
        "interval": list(interval_of(lambda rows: ranking("auroc", labels[rows], scores[rows]), len(labels))),
        "C": [fit["C"] for fit in fits],
        **counts,
    }


def _fitted(task: SvmTask, parts: dict[str, _Data], ends: tuple[float, float], seed: int) -> dict[str, Any]:
    """An SVM on rows of train that the seed draws; cross-validation in them chooses C. Its scores are saved at once."""
    train, test = parts["train"], parts["test"]
    digest = hashlib.sha256()
    for array in (train.features, train.labels, test.features, test.labels):
        digest.update(np.ascontiguousarray(array).tobytes())
    given = {"options": task.options, "ends": list(map(str, ends)), "seed": seed, "data": digest.hexdigest()}
    made_of = fingerprint(given)
    place = task.out / "svm" / f"{made_of[:16]}.json"
    if is_file(place):
        return json.loads(place.read_bytes())
    rng = np.random.default_rng(seed)
    rows = rng.permutation(len(train.labels))[: task.options["rows"]]
    selection, pipeline = package("sklearn.model_selection"), package("sklearn.pipeline")
    model = pipeline.make_pipeline(package("sklearn.preprocessing").StandardScaler(), package("sklearn.svm").SVC())
    folds = selection.StratifiedKFold(5, shuffle=True, random_state=seed)
    search = selection.GridSearchCV(model, {"svc__C": list(task.options["C"])}, scoring="roc_auc", cv=folds)
    try:
        search.fit(train.features[rows], train.labels[rows])
    except ValueError as error:
        raise UserError(
            f"{task.tables['train']}: no SVM can be fitted ({' '.join(str(error).split())[:200]})"
        ) from None
    scores = search.decision_function(test.features)
    found = {
        "auroc": ranking("auroc", test.labels, scores),
        "C": search.best_params_["svc__C"],
        "scores": scores.tolist(),
    }
    place.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(place, dump_json(found))
    return found


def _window_means(runner: Runner, task: SvmTask, name: str, table: PairTable) -> tuple[np.ndarray, np.ndarray]:
    """Mean hidden states with REF and with ALT, (n, 2 D), and the share of N in each row; computed in `Parts`."""
    half = task.options["window"] // 2

    def compute(rows: Sequence[int]) -> dict[str, np.ndarray]:
        means, shares = [], []
        for row in rows:
            pair = table.read(row)
            window = slice(max(pair.place - half, 0), pair.place + half + 1)
            bases = embed(runner, [pair.ref, pair.alt], EmbedOptions(pool="base"))
            means.append(np.concatenate([states[window].mean(0) for states in bases]))
            shares.append(np.mean(pair.ref == ord("N")))
        return {"means": np.stack(means), "shares": np.array(shares)}

    origin = {"model": runner.origin(), "input_sha256": sha256_of(table.path), "window": task.options["window"]}
    store = Parts(task.out / f"windows-{name}", {**origin, "length": task.options["length"]})
    parts = cut(range(len(table)), lambda row: 2 * task.options["length"], _PART_BASES, _PART_ROWS)
    store.run(f"{task.out.name}, {name}", parts, lambda row: 1, compute, "variants")
    found = list(store.load(len(parts)))
    return tuple(np.concatenate([part[key] for part in found]) for key in ("means", "shares"))


def _tissue_codes(tables: dict[str, PairTable]) -> dict[str, np.ndarray] | None:
    """The number of each row's tissue among the sorted tissues of both tables; None where a table has no tissues."""
    words = {name: table.texts("tissue") for name, table in tables.items()}
    if any(of is None for of in words.values()):
        return None
    codes = {word: code for code, word in enumerate(sorted({word for of in words.values() for word in of}))}
    return {name: np.array([codes[word] for word in of], dtype=float) for name, of in words.items()}
