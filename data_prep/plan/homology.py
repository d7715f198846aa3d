"""Near copies of held-out sequence: which parts of train share most of their k-mers with valid or test.

Sampled k-mers of both strands (FracMinHash: Irber et al. 2022) of all held-out windows are one sorted table, and
stretches of train are looked up in it: containment, which is asked here, needs no sketch of every stretch, nor pairs of
them, as tools that compare genomes (sourmash, mash) make. So a few passes over the bases in numpy do.
"""

import numpy as np

from data_prep.plan.intervals import EMPTY, union
from data_prep.plan.windows import mix

K = 21
"""Bases of a k-mer: longer than chance repeats in a genome."""
STRETCH = 4096
"""Bases that are judged together, at every half of it."""
FEWEST = 16
"""Sampled k-mers below which a stretch tells nothing, as where it is soft-masked."""
_SAMPLED = np.uint64(2**64 // 16)
"""Hashes below it are kept: one in 16."""
_CODES = np.full(256, 4, np.uint8)
_CODES[np.frombuffer(b"ACGT", np.uint8)] = [0, 1, 2, 3]  # lower case, soft-masked, is no base here
_BLOCK = 1 << 20


def sampled_kmers(bases: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Hashes (n,) uint64 of sampled k-mers of ASCII bases (L,) uint8, the same for both strands, and their starts (n,).

    K-mers with a soft-masked base, or with one that is not A, C, G or T, are none.
    """
    hashes, starts = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)]
    for first in range(0, max(0, len(bases) - K + 1), _BLOCK):
        codes = _CODES[bases[first : first + _BLOCK + K - 1]]
        forward, reverse = _words(codes), _words(3 - codes[::-1])[::-1]
        unknown = np.cumsum(np.concatenate([[0], codes == 4]))
        found = mix(np.minimum(forward, reverse))
        kept = np.flatnonzero((found < _SAMPLED) & (unknown[K:] == unknown[:-K]))
        hashes.append(found[kept])
        starts.append(kept + first)
    return np.concatenate(hashes), np.concatenate(starts)


def _words(codes: np.ndarray) -> np.ndarray:
    """The numbers of all k-mers, two bits a base, (L - K + 1,) uint64."""
    single = (codes & 3).astype(np.uint64)
    words, length = single, 1
    while 2 * length <= K:
        words, length = (words[:-length] << np.uint64(2 * length)) | words[length:], 2 * length
    while length < K:
        words, length = (words[:-1] << np.uint64(2)) | single[length:], length + 1
    return words


def copies(bases: np.ndarray, held_out: np.ndarray, share: float) -> np.ndarray:
    """Stretches of bases of which at least `share` of the sampled k-mers are in `held_out`, as a set (n, 2) int64.

    `held_out`: sorted hashes.
    """
    hashes, starts = sampled_kmers(bases)
    if not len(held_out) or not len(hashes):
        return EMPTY
    places = np.minimum(np.searchsorted(held_out, hashes), len(held_out) - 1)
    shared = np.concatenate([[0], np.cumsum(held_out[places] == hashes)])
    first = np.arange(0, max(1, len(bases) - STRETCH // 2), STRETCH // 2)
    end = np.minimum(first + STRETCH, len(bases))
    left, right = np.searchsorted(starts, first), np.searchsorted(starts, end)
    counts = right - left
    near = (counts >= FEWEST) & (shared[right] - shared[left] >= share * counts)
    return union(np.stack([first, end], axis=1)[near])
