"""Tasks of suites that a model solves without training for them: how well its scores rank labelled rows.

A score is larger where the label should be 1.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from caduceus.errors import UserError
from caduceus.evaluate.alleles import Variant
from caduceus.evaluate.columns import Columns, read_columns
from caduceus.evaluate.metrics import RANKINGS, interval_of, ranking
from caduceus.evaluate.model import Runner
from caduceus.evaluate.pairs import Pair, PairTable, binary_labels
from caduceus.evaluate.parts import Parts, cut
from caduceus.evaluate.scores import BASES, ScoreOptions, log_p_at, score_variants
from caduceus.evaluate.variant_inputs import CONTIG, OwnSequences, VariantSource, whole_numbers
from caduceus.evaluate.variants import is_scored, score_file
from caduceus.evaluate.windows import checked_bases
from caduceus.files import sha256_of

_SCORES: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray]]] = {
    "minus_llr": ("masked", lambda found: -found),
    "abs_llr": ("masked", np.abs),
    "minus_llr_unmasked": ("unmasked", lambda found: -found),
    "embedding_l2": ("embedding", lambda found: found),
    "embedding_cosine": ("embedding", lambda found: found),
}
"""{score of a task: (the score that it is computed from, the function)}; its column is the name without the prefix
before `llr`.
"""
_PART_BASES, _PART_ROWS = 1 << 22, 1024


@dataclass(frozen=True)
class ZeroShot:
    """A task that is measured by ranking: its files, the folder for results of parts, and the suite's
    options for it.
    """

    path: Path
    out: Path
    metric: str
    options: dict[str, Any]
    genome: Path | None = None


def variants(runner: Runner, task: ZeroShot) -> dict[str, Any]:
    """Measure a labelled table of variants, with a genome or with their own sequences, scored like in the verb
    `variants`.
    """
    kind, column, turn = _score(task)
    options = ScoreOptions((kind,), window=task.options["window"])
    scored = task.out / "scores.parquet"
    source = VariantSource(task.path, task.genome, allow_unknown_contigs=True)
    if not is_scored(runner, source, scored, options):
        score_file(runner, source, scored, options)
    columns = read_columns(scored)
    scores = turn(np.array([np.nan if value is None else value for value in columns.values[column]], dtype=float))
    return _ranked(task, binary_labels(columns), scores, _chromosomes(columns, task))


def pairs(runner: Runner, task: ZeroShot) -> dict[str, Any]:
    """Measure rows with the sequences of REF and ALT, which differ in one run of bases."""
    kind, column, turn = _score(task)
    table = PairTable(task.path, task.genome, task.options["length"])
    options = ScoreOptions((kind,))

    def compute(rows: Sequence[int]) -> dict[str, np.ndarray]:
        found = [table.read(row) for row in rows]
        own = OwnSequences([pair.ref for pair in found], [0] * len(found))
        return {column: score_variants(runner, own, [_difference(n, p) for n, p in enumerate(found)], options)[column]}

    found = _by_rows(runner, task, len(table), task.options["length"], compute)
    return _ranked(task, binary_labels(table.columns), turn(found[column]), _chromosomes(table.columns, task))


def masked(runner: Runner, task: ZeroShot) -> dict[str, Any]:
    """Measure sequences with hidden bases: the mean probability of the true bases, or whether each is the likeliest.

    `places`: the positions of these bases, from 0; with `window` the model sees so many bases around the first of them.
    """
    columns, places = read_columns(task.path), list(task.options["places"])
    sequences = _sequences(columns, "sequence")
    for bases, place in zip(sequences, columns.places, strict=True):
        if len(bases) <= max(places):
            raise UserError(f"{place}: the sequence has {len(bases):,} bases, so it has no base {max(places):,}")
    first, end = window_of(task.options)

    def compute(rows: Sequence[int]) -> dict[str, np.ndarray]:
        cut_out = [sequences[row][first:end] for row in rows]
        where = [[place - first for place in places]] * len(cut_out)
        return {"log_p": log_p_at(runner, cut_out, where, True, ScoreOptions())}

    found = _by_rows(runner, task, len(sequences), max(map(len, sequences)), compute)["log_p"]
    true = np.array([[BASES.find(chr(bases[place])) for place in places] for bases in sequences])
    if task.metric == "motif_accuracy":
        right = (found.argmax(2) == true).all(1)
        return _row(task, lambda rows: float(right[rows].mean()), len(right))
    p = np.take_along_axis(np.exp(found), np.maximum(true, 0)[..., None], 2)[..., 0] * (true >= 0)
    return _ranked(task, binary_labels(columns), p.mean(1), None)


def window_of(options: dict[str, Any]) -> tuple[int, int | None]:
    """Begin and end of what the model sees of a sequence with hidden bases; None: all of it. Raises `UserError` for a
    window without these bases.
    """
    window, places = options.get("window"), options["places"]
    if window is None:
        return 0, None
    first = max(places[0] - window // 2, 0)
    if window < 1 or first + window <= max(places):
        least = 2 * (max(places) - places[0]) + 1
        raise UserError(f"--window: must be at least {least}, to hold the hidden bases; got {window}")
    return first, first + window


def structural(runner: Runner, task: ZeroShot) -> dict[str, Any]:
    """Measure structural variants, given as RefSeq and MutSeq: how much less likely the bases on both sides of the
    break become.

    `left` and `right`: the first and last deleted base in RefSeq, from 1; the break in MutSeq is at its middle.
    """
    columns, flank = read_columns(task.path), task.options["flank"]
    sides = {name: _sequences(columns, name) for name in ("RefSeq", "MutSeq")}
    left, right = (whole_numbers(columns, (name,), "the ends of the variant, from 1") for name in ("left", "right"))
    places = []
    for row, place in enumerate(columns.places):
        middle, step = len(sides["MutSeq"][row]) // 2, range(flank)
        of_ref = [left[row] - flank - 1 + n for n in step] + [right[row] + n for n in step]
        of_mut = [middle - flank + n for n in range(2 * flank)]
        for name, found in (("RefSeq", of_ref), ("MutSeq", of_mut)):
            if min(found) < 0 or max(found) >= len(sides[name][row]):
                raise UserError(f"{place}: the {flank} bases beside the break reach beyond {name}")
        places.append((of_ref, of_mut))

    def compute(rows: Sequence[int]) -> dict[str, np.ndarray]:
        found = [
            log_p_at(
                runner, [sides[name][row] for row in rows], [places[row][n] for row in rows], False, ScoreOptions()
            )
            for n, name in enumerate(sides)
        ]
        return {"change": found[1] - found[0]}

    longest = max(len(bases) for side in sides.values() for bases in side)
    change = _by_rows(runner, task, len(places), longest, compute)["change"]
    bases = [
        [BASES.find(chr(side[place])) for place in found]
        for side, (_, found) in zip(sides["MutSeq"], places, strict=True)
    ]
    true = np.array(bases)
    of_true = np.take_along_axis(change, np.maximum(true, 0)[..., None], 2)[..., 0] * (true >= 0)
    return _ranked(task, binary_labels(columns), -of_true.mean(1), None)


KINDS: dict[str, Callable[[Runner, ZeroShot], dict[str, Any]]] = {
    "variants": variants,
    "pairs": pairs,
    "masked": masked,
    "structural": structural,
}


def check_score(name: str) -> None:
    """Raise `UserError` for a score that a task cannot have."""
    if name not in _SCORES:
        raise UserError(f"score: choose one of {', '.join(_SCORES)}, got {name!r}")


def _score(task: ZeroShot) -> tuple[str, str, Callable[[np.ndarray], np.ndarray]]:
    name = task.options["score"]
    kind, turn = _SCORES[name]
    return kind, name.removeprefix("minus_").removeprefix("abs_"), turn


def _by_rows(
    runner: Runner, task: ZeroShot, count: int, length: int, compute: Callable[[Sequence[int]], dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """The results of `compute` for all rows, computed in `Parts`, so that a kill loses at most one part."""
    origin = {"model": runner.origin(), "options": task.options, "input_sha256": sha256_of(task.path)}
    if task.genome is not None:
        origin["genome_sha256"] = sha256_of(task.genome)
    store = Parts(task.out / "scores", origin)
    parts = cut(range(count), lambda row: length, _PART_BASES, _PART_ROWS)
    store.run(task.out.name, parts, lambda row: 1, compute, "rows")
    found = list(store.load(len(parts)))
    return {name: np.concatenate([part[name] for part in found]) for name in found[0]}


def _sequences(columns: Columns, name: str) -> list[np.ndarray]:
    texts = columns.values[columns.find(name, what="the sequences")]
    return [
        checked_bases("" if text is None else str(text), place)
        for text, place in zip(texts, columns.places, strict=True)
    ]


def _difference(number: int, pair: Pair) -> Variant:
    """The run of bases in which a pair's sequences differ, as a variant on the contig `number`."""
    ref, alt = pair.ref.tobytes().decode(), pair.alt.tobytes().decode()
    if len(ref) != len(alt):
        return Variant(str(number), pair.place, "", "", None, note="lengths differ")
    differ = np.flatnonzero(pair.ref != pair.alt)
    run = slice(int(differ[0]), int(differ[-1]) + 1)
    kind = "snv" if len(differ) == 1 else "mnv"
    known = set(ref[run]) | set(alt[run]) <= set(BASES)
    return Variant(
        str(number), run.start, ref[run], alt[run], kind if known else None, note="" if known else "not ACGT"
    )


def _chromosomes(columns: Columns, task: ZeroShot) -> np.ndarray | None:
    if not task.metric.endswith("_by_chrom"):
        return None
    values = columns.values[columns.find(*CONTIG, what="the chromosome")]
    return np.array([str(value) for value in values])


def _ranked(task: ZeroShot, labels: np.ndarray, scores: np.ndarray, groups: np.ndarray | None) -> dict[str, Any]:
    """The row of a task: its metric over the rows with a score, and its interval."""
    there = np.isfinite(scores)
    if not there.any():
        raise UserError(f"{task.path}: none of its {len(labels):,} rows has a score; --genome may be another genome")
    labels, scores = labels[there], scores[there]
    groups = groups[there] if groups is not None else np.zeros(len(labels), dtype=np.int64)
    row = _row(task, lambda rows: ranking(task.metric, labels[rows], scores[rows], groups[rows]), len(labels))
    rows = np.arange(len(labels))
    others = [name for name in RANKINGS if "_by_" not in name or task.metric.endswith("_by_chrom")]
    row["metrics"] = {name: ranking(name, labels[rows], scores[rows], groups) for name in others}
    return {**row, "positives": int(labels.sum()), "without_score": int((~there).sum())}


def _row(task: ZeroShot, statistic: Callable[[np.ndarray], float], count: int) -> dict[str, Any]:
    value = statistic(np.arange(count)) if count else np.nan
    interval = list(interval_of(statistic, count)) if count else [np.nan, np.nan]
    return {"mean": value, "interval": interval, "on": "test", "rows": count}
