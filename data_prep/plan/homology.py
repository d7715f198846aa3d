"""Finds near copies of held-out sequence: parts of train that share most of their k-mers with valid or test.

Sampled k-mers of both strands (FracMinHash: Irber et al. 2022) of all held-out windows form one sorted table, in which
stretches of train are looked up. The question is containment, so it needs neither a sketch of every stretch nor pairs
of stretches, as tools that compare genomes (sourmash, mash) do. A few passes over the bases in numpy suffice.
"""

import numpy as np

from data_prep.plan.intervals import union
from data_prep.plan.windows import mix

K = 21
"""Bases of a k-mer: more than a repeat by chance has in a genome."""
STRETCH = 4096
"""Bases of a stretch, which is judged as a whole; a stretch begins at every half of this length."""
FEWEST = 16
"""A stretch with fewer sampled k-mers, such as a soft-masked one, is not judged."""
_SAMPLED = np.uint64(2**64 // 16)
"""Hashes below this are kept: one in 16."""
_CODES = np.full(256, 4, np.uint8)
_CODES[np.frombuffer(b"ACGT", np.uint8)] = [0, 1, 2, 3]  # lower case (soft-masked) does not count as a base here
_BLOCK = 1 << 20


def sampled_kmers(bases: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Hashes (n,) uint64 of sampled k-mers of ASCII bases (L,) uint8, the same for both strands, and their starts (n,).

    K-mers with a soft-masked base, or with one that is not A, C, G or T, are left out.
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


NEAR_DTYPE = np.dtype([("start", np.int64), ("end", np.int64), ("shared", np.int64), ("kmers", np.int64)])
"""A stretch of a contig: the number of its sampled k-mers, and of those that also occur in held-out sequence."""
NO_STRETCHES = np.zeros(0, NEAR_DTYPE)
LEVELS = (0.1, 0.25, 0.5, 0.75, 0.9)
"""Shares of k-mers for which the report counts near copies."""


def near_stretches(bases: np.ndarray, held_out: np.ndarray, least: float) -> np.ndarray:
    """The stretches of `bases` with at least the share `least` of their k-mers in `held_out` (sorted hashes), as rows
    of `NEAR_DTYPE`.
    """
    hashes, starts = sampled_kmers(bases)
    if not len(held_out) or not len(hashes):
        return NO_STRETCHES
    places = np.minimum(np.searchsorted(held_out, hashes), len(held_out) - 1)
    shared = np.concatenate([[0], np.cumsum(held_out[places] == hashes)])
    first = np.arange(0, max(1, len(bases) - STRETCH // 2), STRETCH // 2)
    end = np.minimum(first + STRETCH, len(bases))
    left, right = np.searchsorted(starts, first), np.searchsorted(starts, end)
    found = np.zeros(len(first), NEAR_DTYPE)
    found["start"], found["end"] = first, end
    found["shared"], found["kmers"] = shared[right] - shared[left], right - left
    return found[(found["kmers"] >= FEWEST) & (found["shared"] >= least * found["kmers"])]


def copies(stretches: np.ndarray, share: float) -> np.ndarray:
    """The bases of the stretches with at least the share `share` of their k-mers in held-out sequence, as a set (n, 2)
    int64.
    """
    near = stretches[stretches["shared"] >= share * stretches["kmers"]]
    return union(np.stack([near["start"], near["end"]], axis=1))
