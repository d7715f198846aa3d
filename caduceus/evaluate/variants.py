"""Scores files of variants, or all substitutions of regions, and writes files. See `caduceus.evaluate.scores`."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from caduceus.bed import read_bed
from caduceus.distributed.ranks import Ranks
from caduceus.errors import UserError
from caduceus.evaluate.alleles import MISMATCHES, Variant, prepare
from caduceus.evaluate.columns import as_text, check_table_name, ending, write_columns
from caduceus.evaluate.model import Runner
from caduceus.evaluate.parts import Parts, cut
from caduceus.evaluate.scores import BASES, ScoreOptions, score_variants
from caduceus.evaluate.tracks import check_tracks, write_tracks
from caduceus.evaluate.variant_inputs import ALT, VariantFile, VariantSource
from caduceus.evaluate.variant_labels import Labels, areas
from caduceus.evaluate.vcf import write_vcf
from caduceus.evaluate.windows import Windows
from caduceus.files import sha256_of

_PART = 2048
_TOO_LONG = "longer than the window"
_SIGN = "log p(ALT) - log p(REF), natural log: negative where the model finds ALT less likely than REF"
_INFO = {
    "llr": ("LLR", "A", f"{_SIGN}; the places hidden"),
    "llr_forward": ("LLR_FORWARD", "A", "LLR of the forward strand"),
    "llr_reverse": ("LLR_REVERSE", "A", "LLR of the reverse strand"),
    "llr_unmasked": ("LLR_UNMASKED", "A", f"{_SIGN}; the places shown"),
    "llr_unmasked_forward": ("LLR_UNMASKED_FORWARD", "A", "LLR_UNMASKED of the forward strand"),
    "llr_unmasked_reverse": ("LLR_UNMASKED_REVERSE", "A", "LLR_UNMASKED of the reverse strand"),
    "embedding_l2": ("L2", "A", "Euclidean distance of the mean embeddings of the windows with REF and ALT"),
    "embedding_cosine": ("COSINE", "A", "Cosine distance of the mean embeddings of the windows with REF and ALT"),
    "entropy": ("ENTROPY", "1", "Of the four probabilities, in nats; of substitutions of one base"),
}


@dataclass(frozen=True)
class Scored:
    """The summary of scoring a file. counts: variants with a score, by kind, and those without one, by reason. areas:
    for labelled variants, see `caduceus.evaluate.variant_labels`.
    """

    counts: dict[str, int]
    areas: dict[str, float]


def score_file(
    runner: Runner,
    source: VariantSource,
    out: str | Path,
    options: ScoreOptions,
    labels: Labels | None = None,
    ranks: Ranks | None = None,
) -> Scored:
    """Score the variants of a file and write them to `out`: the VCF with scores added to INFO, or a table.

    After a kill the same call goes on. ranks: the ranks that share the work; by default all that were started with this
    process.
    """
    is_vcf = ending(out) == ".vcf"
    if is_vcf and ending(source.input) != ".vcf":
        raise UserError(f"--out: {out} is a VCF, but {source.input} is not; choose .tsv, .csv or .parquet")
    check_table_name(out, ".vcf")
    file, variants, known = prepared(source, labels)
    store = _store(runner, source, out, options, labels, ranks)
    parts = cut(variants, lambda variant: 1, _PART, _PART)

    def compute(part: Sequence[Variant]) -> dict[str, np.ndarray]:
        return score_variants(runner, file.genome, part, options)

    store.run("scoring", parts, lambda variant: 1, compute, "variants")
    found = Scored({}, {})
    with store.writing() as writes:
        if writes:
            scores = _joined(store, len(parts), options)
            rows = zip(*scores.values(), strict=True)
            notes = [_note(variant, row) for variant, row in zip(variants, rows, strict=True)]
            found = Scored(_counts(variants, notes), {} if known is None else areas(known, scores))
            if is_vcf:
                _write_vcf(out, file, scores, notes)
            else:
                kinds = [variant.kind or "" for variant in variants]
                write_columns(out, {**_given(file), "kind": kinds, "note": notes, **scores})
            store.finish(counts=found.counts, areas=found.areas)
    return store.ranks.broadcast(found)


def is_scored(runner: Runner, source: VariantSource, out: str | Path, options: ScoreOptions) -> bool:
    """Whether an earlier equal call of `score_file` has written `out`."""
    return _store(runner, source, out, options).is_finished()


def _store(
    runner: Runner,
    source: VariantSource,
    out: str | Path,
    options: ScoreOptions,
    labels: Labels | None = None,
    ranks: Ranks | None = None,
) -> Parts:
    given = {key: value and str(value) for key, value in asdict(source).items()}
    if labels is not None:
        given |= {"labels": asdict(labels)}
    return Parts(out, _origin(runner, options, source.input, source.genome, given), ranks)


def prepared(source: VariantSource, labels: Labels | None) -> tuple[VariantFile, list[Variant], np.ndarray | None]:
    """A file's alleles, the variant of each, and with `labels` 1, 0 or NaN for each."""
    if source.ref_mismatch not in MISMATCHES:
        raise UserError(f"--ref-mismatch: choose one of {', '.join(MISMATCHES)}, got {source.ref_mismatch!r}")
    file = source.read()
    known = None if labels is None else labels.of(file)
    return file, prepare(file.alleles, file.genome, source.ref_mismatch, source.allow_unknown_contigs), known


def _counts(variants: list[Variant], notes: list[str]) -> dict[str, int]:
    """How many variants have a score, by kind, and how many do not, by reason."""
    pairs = zip(variants, notes, strict=True)
    return dict(sorted(Counter(note if not v.kind or note == _TOO_LONG else v.kind for v, note in pairs).items()))


def _note(variant: Variant, scores: tuple[float, ...]) -> str:
    if variant.kind and np.isnan(scores).all():
        return _TOO_LONG
    return "swapped" if variant.swapped else variant.note


@dataclass(frozen=True)
class Places:
    """Some places of a contig, [start, end)."""

    contig: str
    start: int
    end: int


def score_every_snv(
    runner: Runner,
    bed: str | Path,
    genome: str | Path,
    out: str | Path,
    options: ScoreOptions,
    aliases: str | Path | None = None,
    tracks: str | Path | None = None,
) -> dict[str, int]:
    """Score all three substitutions at every place in a BED's rows; write a table of chrom, pos (from 1), ref, alt,
    scores.

    Places without A, C, G or T have no rows. After a kill the same call goes on. tracks: the prefix of the names of
    bigWig files (see `caduceus.evaluate.tracks`); None writes none.
    """
    check_table_name(out)
    if tracks is not None:
        check_tracks(tracks, options.columns())
    windows = Windows(genome, aliases)
    regions = []
    for row in read_bed(Path(bed)).rows:
        contig = windows.require(row.contig, f"{bed}:{row.line}")
        if row.end > windows.contigs[contig]:
            raise UserError(f"{bed}:{row.line}: ends beyond {contig} with {windows.contigs[contig]:,} bases")
        step = _PART // 3
        regions += [Places(contig, at, min(at + step, row.end)) for at in range(row.start, row.end, step)]
    if not regions:
        raise UserError(f"{bed}: holds no interval")
    store = Parts(out, _origin(runner, options, bed, genome, {"every_snv": str(bed)}))

    def compute(part: Sequence[Places]) -> dict[str, np.ndarray]:
        variants = _all_snvs(windows, part[0])
        named = {
            "chrom": np.array([variant.contig for variant in variants], dtype=str),
            "pos": np.array([variant.start + 1 for variant in variants], dtype=np.int64),
            "ref": np.array([variant.ref for variant in variants], dtype=str),
            "alt": np.array([variant.alt for variant in variants], dtype=str),
        }
        return named | score_variants(runner, windows, variants, options)

    parts = [[places] for places in regions]
    store.run("scoring", parts, lambda places: places.end - places.start, compute, "places")
    with store.writing() as writes:
        if writes:
            tables = list(store.load(len(parts)))
            columns = {name: np.concatenate([table[name] for table in tables]) for name in tables[0]}
            write_columns(out, columns)
            if tracks is not None:
                write_tracks(tracks, windows.contigs, columns)
            store.finish(counts={"snv": len(columns["pos"])})
    return {"places": sum(places.end - places.start for places in regions)}


def _all_snvs(windows: Windows, places: Places) -> list[Variant]:
    bases = windows.read(places.contig, places.start, places.end).tobytes().decode()
    return [
        Variant(places.contig, place, ref, alt, "snv")
        for place, ref in enumerate(bases, places.start)
        if ref in BASES
        for alt in BASES
        if alt != ref
    ]


def _origin(
    runner: Runner, options: ScoreOptions, input_: str | Path, genome: str | Path | None, source: dict[str, Any]
) -> dict[str, Any]:
    return {
        "verb": "variants",
        "model": runner.origin(),
        "input_sha256": sha256_of(input_),
        "genome_sha256": genome and sha256_of(genome),
        "source": source,
        "options": asdict(options),
    }


def _joined(store: Parts, count: int, options: ScoreOptions) -> dict[str, np.ndarray]:
    tables = list(store.load(count))
    return {name: np.concatenate([table[name] for table in tables]) for name in options.columns()}


def _given(file: VariantFile) -> dict[str, Sequence[Any]]:
    """The first columns of the output's rows: those of the input table."""
    if file.columns is not None:
        given = {name: [column[row] for row in file.rows] for name, column in file.columns.values.items()}
        return {**given, file.columns.find(*ALT, what="ALT"): [allele.alt for allele in file.alleles]}
    records = [file.vcf.records[row] for row in file.rows]
    return {
        "chrom": [record.contig for record in records],
        "pos": [record.pos for record in records],
        "id": [record.fields[2] for record in records],
        "ref": [record.ref for record in records],
        "alt": [allele.alt for allele in file.alleles],
    }


def _write_vcf(out: str | Path, file: VariantFile, scores: dict[str, np.ndarray], notes: list[str]) -> None:
    lines = [
        f'##INFO=<ID=CADUCEUS_{key},Number={number},Type=Float,Description="{words}">'
        for name, (key, number, words) in _INFO.items()
        if name in scores
    ]
    if "entropy" in scores:
        lines.append(
            '##INFO=<ID=CADUCEUS_P,Number=4,Type=Float,Description="Probabilities of A, C, G, T at the place, of '
            'substitutions of one base">'
        )
    lines.append('##INFO=<ID=CADUCEUS_NOTE,Number=A,Type=String,Description="Why an ALT has no score, or swapped">')
    by_row: list[list[int]] = [[] for _ in file.vcf.records]
    for number, row in enumerate(file.rows):
        by_row[row].append(number)
    write_vcf(out, file.vcf, lines, [_pairs(scores, notes, numbers) for numbers in by_row])


def _pairs(scores: dict[str, np.ndarray], notes: list[str], numbers: list[int]) -> list[tuple[str, str]]:
    """The entries of INFO for a record with these alleles, without empty ones."""
    pairs = []
    for name, (key, number, _) in _INFO.items():
        if name in scores:
            values = [as_text(scores[name][n]) or "." for n in numbers]
            shown = values if number == "A" else [next((v for v in values if v != "."), ".")]
            pairs.append((f"CADUCEUS_{key}", ",".join(shown)))
    if "entropy" in scores:
        snv = next((n for n in numbers if not np.isnan(scores["entropy"][n])), None)
        if snv is not None:
            pairs.append(("CADUCEUS_P", ",".join(as_text(scores[f"p_{base}"][snv]) for base in BASES)))
    said = [notes[n].replace(" ", "_") or "." for n in numbers if notes[n] != "no alternative"]
    pairs.append(("CADUCEUS_NOTE", ",".join(said)))
    return [(key, value) for key, value in pairs if set(value) - {".", ","}]
