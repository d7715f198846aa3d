"""The composition of a stretch of bases: counts of GC, AT, N and lower case, and where the bases are not ACGT."""

from dataclasses import dataclass

import numpy as np

from caduceus.alphabet import IS_ACGT_BYTE
from data_prep.plan.intervals import EMPTY, union

_BLOCK = 1 << 18  # fits the second-level cache, so that the passes below are not slowed down by memory
_LOWER = np.uint8(0x20)
_FOLD_CASE = np.uint8(0xDF)
_FOLD_CG = np.uint8(0xFB)  # C and G differ in this one bit
_IS_NOT_ACGT = (~IS_ACGT_BYTE).tobytes()
_A, _C, _T, _N = (np.uint8(base) for base in b"ACTN")


@dataclass(frozen=True)
class Composition:
    """Counts over some bases; all but `lower` count upper and lower case together."""

    bases: int = 0
    gc: int = 0
    at: int = 0
    n: int = 0
    lower: int = 0

    @property
    def acgt(self) -> int:
        return self.gc + self.at

    def __add__(self, other: "Composition") -> "Composition":
        return Composition(
            self.bases + other.bases,
            self.gc + other.gc,
            self.at + other.at,
            self.n + other.n,
            self.lower + other.lower,
        )


def composition(bases: np.ndarray) -> Composition:
    """Counts over ASCII bases, (L,) uint8."""
    gc = at = n = lower = 0
    for start in range(0, len(bases), _BLOCK):
        block = bases[start : start + _BLOCK]
        upper = block & _FOLD_CASE
        block_gc = np.count_nonzero((upper & _FOLD_CG) == _C)
        block_at = np.count_nonzero(upper == _A) + np.count_nonzero(upper == _T)
        lower += np.count_nonzero(block & _LOWER)
        if block_gc + block_at < len(block):
            n += np.count_nonzero(upper == _N)
        gc += block_gc
        at += block_at
    return Composition(len(bases), int(gc), int(at), int(n), int(lower))


def runs_where(mask: np.ndarray) -> np.ndarray:
    """Maximal runs of True in (L,) bool, as (n, 2) int64 half-open intervals."""
    edges = np.flatnonzero(mask[1:] != mask[:-1]) + 1
    first = [0] if len(mask) and mask[0] else []
    last = [len(mask)] if len(mask) and mask[-1] else []
    return np.concatenate([first, edges, last]).astype(np.int64).reshape(-1, 2)


def non_acgt_runs(bases: np.ndarray) -> np.ndarray:
    """Maximal runs of bases other than A, C, G and T, (n, 2) int64."""
    # `translate` is several times faster than indexing a table
    return runs_where(np.frombuffer(bases.tobytes().translate(_IS_NOT_ACGT), dtype=bool))


@dataclass(frozen=True)
class Scan:
    """A scanned stretch of a contig: its composition, and the runs of non-ACGT and of N in contig coordinates."""

    composition: Composition
    non_acgt: np.ndarray
    n_runs: np.ndarray


def scan(bases: np.ndarray, start: int) -> Scan:
    """Scan ASCII bases (L,) uint8 that begin at position `start` of their contig."""
    counts = composition(bases)
    if counts.acgt == counts.bases:
        return Scan(counts, EMPTY, EMPTY)
    non_acgt = non_acgt_runs(bases) + start
    if counts.acgt + counts.n == counts.bases:
        return Scan(counts, non_acgt, non_acgt)
    return Scan(counts, non_acgt, runs_where((bases & _FOLD_CASE) == _N) + start)


def join_scans(pieces: list[Scan]) -> Scan:
    """The scan of a contig from the scans of its pieces; runs that cross a border become one."""
    if len(pieces) == 1:
        return pieces[0]
    total = sum((piece.composition for piece in pieces), Composition())
    non_acgt = union(np.concatenate([EMPTY, *(piece.non_acgt for piece in pieces)]))
    return Scan(total, non_acgt, union(np.concatenate([EMPTY, *(piece.n_runs for piece in pieces)])))
