"""Scores of variants by a masked language model: log-likelihood ratios, probabilities, distances of embeddings.

A window has the variant's first base at window // 2. Logarithms are natural; every ratio is ALT over REF, so a negative
one means that the model finds the alternative less likely.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from caduceus.alphabet import reverse_complement
from caduceus.errors import UserError
from caduceus.evaluate.alleles import BasesOf, Variant
from caduceus.evaluate.model import Runner
from caduceus.model.backbone import Backbone

SCORES = ("masked", "unmasked", "embedding")
STRANDS = ("average", "each", "forward")
BASES = "ACGT"


@dataclass(frozen=True)
class ScoreOptions:
    """How to score variants. scores: masked (the places of the variant are hidden), unmasked, and distances of
    embeddings.

    window: bases that the model sees. strands: scores averaged over both strands, also those of each strand, or only
    those of the forward strand; for a Caduceus-PS both strands give the same. flank: bases on either side of an
    insertion or deletion by which it is scored. batch_bases: bases of a batch; the default suits the device.
    """

    scores: tuple[str, ...] = ("masked",)
    window: int = 1024
    strands: str = "average"
    flank: int = 5
    batch_bases: int | None = None

    def __post_init__(self) -> None:
        for score in self.scores:
            if score not in SCORES:
                raise UserError(f"--scores: choose from {', '.join(SCORES)}, got {score!r}")
        if self.strands not in STRANDS:
            raise UserError(f"--strands: choose one of {', '.join(STRANDS)}, got {self.strands!r}")
        for name, least in (("window", 2), ("flank", 1), ("batch_bases", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"--{name.replace('_', '-')}: must be at least {least}, got {value}")

    def columns(self) -> list[str]:
        """The names of the scores, each a number per allele."""
        names = []
        for score, prefix in (("masked", "llr"), ("unmasked", "llr_unmasked")):
            if score in self.scores:
                names += [prefix, *([f"{prefix}_forward", f"{prefix}_reverse"] if self.strands == "each" else ())]
        if names:
            names += [*(f"p_{base}" for base in BASES), "entropy"]
        return [*names, "embedding_l2", "embedding_cosine"] if "embedding" in self.scores else names


@dataclass
class _Query:
    """A window to run, hidden at some places, and its result: log probabilities (strands, places, 4)."""

    bases: np.ndarray
    hidden: tuple[int, ...]
    places: dict[int, int] = field(default_factory=dict)
    log_p: np.ndarray | None = None
    embedding: np.ndarray | None = None

    def at(self, place: int) -> np.ndarray:
        """(strands, 4)"""
        return self.log_p[:, self.places[place]]


class _Queries:
    """The windows that variants need, without duplicates."""

    def __init__(self) -> None:
        self.by_key: dict[Hashable, _Query] = {}

    def ask(
        self, key: Hashable, read: Callable[[], np.ndarray], hidden: Sequence[int], places: Sequence[int]
    ) -> _Query:
        full_key = key, tuple(hidden)
        query = self.by_key.get(full_key)
        if query is None:
            query = self.by_key[full_key] = _Query(read(), tuple(hidden))
        for place in places:
            query.places.setdefault(place, len(query.places))
        return query

    def run(self, runner: Runner, options: ScoreOptions) -> None:
        queries = sorted(self.by_key.values(), key=lambda query: len(query.bases))
        lengths = [len(query.bases) for query in queries]
        first = 0
        while first < len(queries):
            most = max(1, runner.batch_bases(options.batch_bases) // lengths[first])
            same = lengths[first : first + most].count(lengths[first])
            _run_batch(runner, queries[first : first + same], options)
            first += same


def score_variants(
    runner: Runner, genome: BasesOf, variants: Sequence[Variant], options: ScoreOptions
) -> dict[str, np.ndarray]:
    """{name: (n,) float64} for each of `options.columns()`; NaN where it is undefined or the variant has no score."""
    queries = _Queries()
    scorers = [scorer(genome, options) for score, scorer in _SCORERS.items() if score in options.scores]
    asked = [
        [scorer.ask(queries, variant) if variant.kind and scorer.fits(variant) else None for scorer in scorers]
        for variant in variants
    ]
    with torch.no_grad(), runner.autocast():
        queries.run(runner, options)
    results = {name: np.full(len(variants), np.nan) for name in options.columns()}
    for number, (variant, found) in enumerate(zip(variants, asked, strict=True)):
        for scorer, query in zip(scorers, found, strict=True):
            if query is not None:
                for name, value in scorer.score(variant, query).items():
                    if np.isnan(results[name][number]):
                        results[name][number] = value
    return results


class _Scorer:
    def __init__(self, genome: BasesOf, options: ScoreOptions) -> None:
        self.genome, self.options = genome, options

    def bounds(self, variant: Variant) -> tuple[int, int]:
        """First base and length of the variant's window."""
        own = getattr(self.genome, "bounds", None)
        return own(variant.contig) if own else (variant.start - self.options.window // 2, self.options.window)

    def fits(self, variant: Variant) -> bool:
        """Whether the window holds the variant, and the flanks of an insertion or deletion."""
        first, length = self.bounds(variant)
        margin = self.options.flank if variant.kind == "indel" else 0
        end = variant.start + max(len(variant.ref), len(variant.alt)) + margin
        return variant.start - margin >= first and end <= first + length

    def reference(self, variant: Variant) -> tuple[Hashable, Callable[[], np.ndarray]]:
        """Key and reader of the window with the genome's bases."""
        first, length = self.bounds(variant)
        return (variant.contig, first), lambda: self.genome.read(variant.contig, first, first + length)

    def alternative(self, variant: Variant) -> tuple[Hashable, Callable[[], np.ndarray]]:
        """Key and reader of the window of the same length with the alternative."""
        first, length = self.bounds(variant)
        after = variant.start + len(variant.ref)

        def read() -> np.ndarray:
            left = self.genome.read(variant.contig, first, variant.start)
            right = self.genome.read(variant.contig, after, after + length)
            return np.concatenate([left, np.frombuffer(variant.alt.encode(), np.uint8), right])[:length]

        return (variant.contig, first, variant.start, variant.ref, variant.alt), read


class _Likelihood(_Scorer):
    """Substitutions: the sum over their places of log p(ALT) - log p(REF).

    Insertions and deletions: the sum of log p of the bases beside them in the alternative's window, minus the same sum
    in the reference's.
    """

    prefix, hides = "llr", True

    def bounds(self, variant: Variant) -> tuple[int, int]:
        """Unmasked substitutions share windows that overlap by half: their places lie in the middle half of
        a window.
        """
        if self.hides or variant.kind == "indel" or hasattr(self.genome, "bounds"):
            return super().bounds(variant)
        half = max(self.options.window // 2, 1)
        return (variant.start - self.options.window // 4) // half * half, self.options.window

    def ask(self, queries: _Queries, variant: Variant) -> list[tuple[_Query, list[int]]]:
        first, _ = self.bounds(variant)
        place = variant.start - first
        if variant.kind != "indel":
            places = [place + i for i, (r, a) in enumerate(zip(variant.ref, variant.alt, strict=True)) if r != a]
            return [(queries.ask(*self.reference(variant), places if self.hides else (), places), places)]
        asked = []
        for window, length in ((self.reference, len(variant.ref)), (self.alternative, len(variant.alt))):
            flank = range(1, self.options.flank + 1)
            places = [place - i for i in flank] + [place + length - 1 + i for i in flank]
            asked.append((queries.ask(*window(variant), places if self.hides else (), places), places))
        return asked

    def score(self, variant: Variant, asked: list[tuple[_Query, list[int]]]) -> dict[str, float]:
        named = {}
        if variant.kind != "indel":
            ((query, places),) = asked
            pairs = [(r, a) for r, a in zip(variant.ref, variant.alt, strict=True) if r != a]
            of_strands = sum(
                query.at(place)[:, BASES.index(a)] - query.at(place)[:, BASES.index(r)]
                for place, (r, a) in zip(places, pairs, strict=True)
            )
            if variant.kind == "snv":
                named = _probabilities(query.at(places[0]))
        else:
            of_strands = _flank_log_p(*asked[1]) - _flank_log_p(*asked[0])
        of_strands = -of_strands if variant.swapped else of_strands
        named[self.prefix] = of_strands.mean()
        if self.options.strands == "each":
            named |= {f"{self.prefix}_forward": of_strands[0], f"{self.prefix}_reverse": of_strands[-1]}
        return named


class _Unmasked(_Likelihood):
    prefix, hides = "llr_unmasked", False


class _Distance(_Scorer):
    """The distance between the mean embeddings of the windows with each allele."""

    def ask(self, queries: _Queries, variant: Variant) -> tuple[_Query, _Query]:
        return tuple(queries.ask(*window(variant), (), ()) for window in (self.reference, self.alternative))

    def score(self, variant: Variant, asked: tuple[_Query, _Query]) -> dict[str, float]:
        one, other = (query.embedding for query in asked)
        cosine = one @ other / (np.linalg.norm(one) * np.linalg.norm(other))
        return {"embedding_l2": np.linalg.norm(one - other), "embedding_cosine": 1 - cosine}


_SCORERS = {"masked": _Likelihood, "unmasked": _Unmasked, "embedding": _Distance}


def _flank_log_p(query: _Query, places: list[int]) -> np.ndarray:
    """The sum of log p of the bases A, C, G and T at these places, (strands,)."""
    known = [(place, BASES.find(chr(query.bases[place]))) for place in places]
    return sum((query.at(place)[:, base] for place, base in known if base >= 0), np.zeros(len(query.log_p)))


def _probabilities(log_p: np.ndarray) -> dict[str, float]:
    """Probabilities of the four bases, a geometric mean over strands (strands, 4), and their entropy in nats."""
    p = np.exp(log_p.mean(0))
    p /= p.sum()
    entropy = -(p * np.log(np.maximum(p, 1e-300))).sum()
    return {**{f"p_{base}": value for base, value in zip(BASES, p, strict=True)}, "entropy": entropy}


def _run_batch(runner: Runner, queries: Sequence[_Query], options: ScoreOptions) -> None:
    """Run queries of the same length on the strands that `options` asks for, and store the result of each."""
    both = not runner.config.rcps and options.strands != "forward"
    length = len(queries[0].bases)
    rows = [(number, place) for number, query in enumerate(queries) for place in query.places]
    hidden = [(number, place) for number, query in enumerate(queries) for place in query.hidden]
    log_ps, embeddings = [], []
    for reverse in (False, True)[: 1 + both]:
        bases = [reverse_complement(query.bases) if reverse else query.bases for query in queries]
        ids = runner.ids(np.stack(bases))
        where = [(n, length - 1 - place if reverse else place) for n, place in hidden]
        ids[tuple(np.array(where, dtype=np.int64).reshape(-1, 2).T)] = runner.config.vocabulary.mask
        held = Backbone.forward(runner.model, ids).held
        picked = [(n, length - 1 - place if reverse else place) for n, place in rows]
        log_p = _log_p(runner, held, np.array(picked, dtype=np.int64).reshape(-1, 2))
        log_ps.append(log_p[:, ::-1] if reverse else log_p)
        if "embedding" in options.scores:
            strands = runner.model.by_strand(held)
            strands = strands[:1] if options.strands == "forward" else strands
            embeddings.append(strands.mean((0, 2), dtype=torch.float64).cpu().numpy())
    ends = np.cumsum([len(query.places) for query in queries])
    for number, query in enumerate(queries):
        query.log_p = np.stack([log_p[ends[number] - len(query.places) : ends[number]] for log_p in log_ps])
        if embeddings:
            query.embedding = np.mean([embedding[number] for embedding in embeddings], 0)


def _log_p(runner: Runner, held: torch.Tensor, rows: np.ndarray) -> np.ndarray:
    """log p of A, C, G, T at rows (n, 2) of (sequence, place), (n, 4) float64."""
    picked = held[:, rows[:, 0], rows[:, 1]]
    logits = runner.model.head(picked[:, None], runner.model.head_rows())[0]
    bases = logits[:, list(runner.config.vocabulary.bases)]
    return torch.log_softmax(bases.double(), -1).cpu().numpy()


def log_p_at(
    runner: Runner,
    sequences: Sequence[np.ndarray],
    places: Sequence[Sequence[int]],
    hidden: bool,
    options: ScoreOptions,
) -> np.ndarray:
    """log p of A, C, G and T at places of each sequence, hidden or shown, (n, places, 4) float64, averaged over
    strands.

    Every sequence must have the same number of places.
    """
    queries = _Queries()
    asked = [
        queries.ask(number, lambda bases=bases: bases, where if hidden else (), where)
        for number, (bases, where) in enumerate(zip(sequences, places, strict=True))
    ]
    with torch.no_grad(), runner.autocast():
        queries.run(runner, options)
    return np.stack(
        [np.stack([query.at(place).mean(0) for place in where]) for query, where in zip(asked, places, strict=True)]
    )
