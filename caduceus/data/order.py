"""Which sample is the g-th one: closed forms of the seed and the number, over arrays of numbers. Imports no torch.

Nothing is replayed: a permutation is a Feistel network on just enough bits, applied again until the result lies inside
the domain (cycle walking; Black & Rogaway 2002, "Ciphers with arbitrary finite domains").
"""

from collections import OrderedDict
from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

import numpy as np

from caduceus.errors import UserError

MIXTURE_BLOCK = 65536
"""Block of samples in which the shares of the sources are exact."""
_ROUNDS = 8
_TABLES_KEPT = 4
_BLOCKS_KEPT = 4096
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class Purpose(IntEnum):
    """The first number of every key, so that two uses of randomness never share a key."""

    MIXTURE = 1
    SHARDS = 2
    CROP = 3
    STRAND = 4
    MASK = 5
    VALIDATION = 6
    SUBSTITUTE = 7
    OFFSET = 8
    STAGE = 9


def mix(x: np.ndarray) -> np.ndarray:
    """Bijective 64-bit hash, (n,) uint64: the finaliser of splitmix64 (Steele et al. 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def key(*numbers: int | np.ndarray) -> np.ndarray:
    """64-bit keys from tuples of integers, (n,) uint64: scalars and (n,) arrays broadcast."""
    state = np.zeros(1, np.uint64)
    for number in numbers:
        state = mix((state + _GOLDEN) ^ np.atleast_1d(number).astype(np.uint64))
    return state


def permute(position: np.ndarray, size: int | np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Image of each position under the keyed bijection of 0 … size-1, (n,) int64; arguments broadcast.

    Every element may have its own size and key.
    """
    position, size, keys = np.broadcast_arrays(np.atleast_1d(position), size, keys)
    bits = np.frexp((size - 1).astype(np.float64))[1]  # bits of the largest position; exact up to 2^53
    right_bits = ((bits + 1) // 2).astype(np.uint64)
    left_bits = (bits // 2).astype(np.uint64)
    image = _feistel(position.astype(np.uint64), left_bits, right_bits, keys).astype(np.int64)
    outside = np.flatnonzero(image >= size)
    while len(outside):
        walked = _feistel(
            image[outside].astype(np.uint64), left_bits[outside], right_bits[outside], keys[outside]
        ).astype(np.int64)
        image[outside] = walked
        outside = outside[walked >= size[outside]]
    return image


def _feistel(x: np.ndarray, left_bits: np.ndarray, right_bits: np.ndarray, keys: np.ndarray) -> np.ndarray:
    one = np.uint64(1)
    left_mask = (one << left_bits) - one
    right_mask = (one << right_bits) - one
    left, right = x >> right_bits, x & right_mask
    round_key = keys
    for _ in range(_ROUNDS // 2):
        round_key = round_key + _GOLDEN
        left = left ^ (mix(round_key + right) & left_mask)
        round_key = round_key + _GOLDEN
        right = right ^ (mix(round_key + left) & right_mask)
    return (left << right_bits) | right


def largest_remainder(weights: Sequence[float], total: int) -> np.ndarray:
    """Whole numbers in proportion to weights (S,) that add up to `total`, (S,) int64.

    Each is at least 1, but 0 for a weight of 0; at least one weight must be above 0.
    """
    if len(weights) > total:
        raise UserError(f"data.path: {len(weights)} sources, but a mixture holds at most {total}")
    exact = np.asarray(weights, np.float64) / np.sum(weights) * total
    counts = np.maximum(np.floor(exact).astype(np.int64), exact > 0)
    while (missing := total - int(counts.sum())) > 0:
        counts[np.argsort(counts - exact, kind="stable")[:missing]] += 1
    while (excess := int(counts.sum()) - total) > 0:
        reducible = np.flatnonzero(counts > 1)
        counts[reducible[np.argsort((exact - counts)[reducible], kind="stable")[:excess]]] -= 1
    return counts


class Mixture:
    """Maps every sample to a source and the source's own sample number; shares are exact in each block of
    `MIXTURE_BLOCK`.

    A source's own numbers go up with g, so that its epochs follow each other. This needs a table of the current block,
    which is computed from (seed, block) alone.
    """

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        self.counts = largest_remainder(weights, MIXTURE_BLOCK)
        """(S,) int64: samples of each source per block."""
        self._first = np.cumsum(self.counts) - self.counts
        self._seed = seed
        self._tables: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()

    def locate(self, g: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Samples g (n,) int64 -> source (n,) and the source's own sample number (n,), both int64."""
        blocks, position = np.divmod(g, MIXTURE_BLOCK)
        source, k = np.empty_like(g), np.empty_like(g)
        for block in np.unique(blocks).tolist():
            here = blocks == block
            block_source, block_number = self._table(block)
            source[here] = one = block_source[position[here]]
            k[here] = block * self.counts[one] + block_number[position[here]]
        return source, k

    def drawn(self, g: int) -> np.ndarray:
        """How many of the first `g` samples come from each source, (S,) int64."""
        block, position = divmod(g, MIXTURE_BLOCK)
        source, _ = self._table(block)
        return block * self.counts + np.bincount(source[:position], minlength=len(self.counts))

    def _table(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Source of each position of a block, and how many samples of that source precede it in the block."""
        if block not in self._tables:
            if len(self._tables) >= _TABLES_KEPT:
                self._tables.popitem(last=False)
            place = permute(np.arange(MIXTURE_BLOCK), MIXTURE_BLOCK, key(self._seed, Purpose.MIXTURE, block))
            source = np.searchsorted(self._first, place, side="right") - 1
            by_source = np.argsort(source, kind="stable")
            number = np.empty(MIXTURE_BLOCK, np.int64)
            number[by_source] = np.arange(MIXTURE_BLOCK) - self._first[source[by_source]]
            self._tables[block] = source, number
        return self._tables[block]


class StagedMixture:
    """Mixtures that follow each other. `stages`: (first sample, weights) of each, the first from sample 0 on.

    Every source's own numbers, and so its epochs, continue from stage to stage. Attribute: `counts` (stages, S), the
    samples of each source per block.
    """

    def __init__(self, stages: Sequence[tuple[int, Sequence[float]]], seed: int) -> None:
        self._first = np.array([first for first, _ in stages], np.int64)
        seeds = [seed, *(int(key(seed, Purpose.STAGE, number)[0]) for number in range(1, len(stages)))]
        self._mixtures = [Mixture(weights, own) for (_, weights), own in zip(stages, seeds, strict=True)]
        self.counts = np.stack([mixture.counts for mixture in self._mixtures])
        lengths = np.diff(self._first).tolist()
        drawn = [mixture.drawn(length) for mixture, length in zip(self._mixtures, lengths, strict=False)]
        self._before = np.cumsum([np.zeros_like(self.counts[0]), *drawn], axis=0)

    def locate(self, g: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Samples g (n,) int64 -> source (n,) and the source's own sample number (n,), both int64."""
        stages = np.searchsorted(self._first, g, side="right") - 1
        source, k = np.empty_like(g), np.empty_like(g)
        for stage in np.unique(stages).tolist():
            here = stages == stage
            source[here], own = self._mixtures[stage].locate(g[here] - self._first[stage])
            k[here] = self._before[stage][source[here]] + own
        return source, k

    def drawn(self, g: int) -> np.ndarray:
        """How many of the first `g` samples come from each source, (S,) int64."""
        stage = int(np.searchsorted(self._first, g, side="right")) - 1
        return self._before[stage] + self._mixtures[stage].drawn(g - int(self._first[stage]))


class EpochOrder:
    """Which crop a source's k-th sample is: every epoch visits each crop once, in its own order.

    `crops_of_shard` (H,): the number of crops in each shard, source after source; `shards_of_source` (S,): the number
    of shards of each source. Crops are numbered over all sources in that order. With `shuffle_block` above 0, an epoch
    permutes a source's shards, groups them in blocks of that many shards, and shuffles crops only within a block.
    """

    def __init__(
        self, crops_of_shard: np.ndarray, shards_of_source: Sequence[int], seed: int, shuffle_block: int = 0
    ) -> None:
        self._seed = seed
        self._shuffle_block = shuffle_block
        self._known_blocks: OrderedDict[tuple[int, int], _Blocks] = OrderedDict()
        self._crops_of_shard = np.asarray(crops_of_shard, np.int64)
        self._shard_first = np.cumsum(self._crops_of_shard) - self._crops_of_shard
        self._source_shards = np.cumsum([0, *shards_of_source])
        crops_before = np.concatenate([[0], np.cumsum(self._crops_of_shard)])
        self._source_first = crops_before[self._source_shards[:-1]]
        self.sizes = np.diff(crops_before[self._source_shards])
        """(S,) int64: crops of each source."""

    def locate(self, source: np.ndarray, k: np.ndarray) -> np.ndarray:
        """Crop number of each source's own sample k, (n,) int64."""
        epoch, position = np.divmod(k, self.sizes[source])
        if self._shuffle_block == 0:
            keys = key(self._seed, Purpose.CROP, source, epoch)
            return self._source_first[source] + permute(position, self.sizes[source], keys)
        return self._locate_in_blocks(source, epoch, position)

    def draw(self, source: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """The number of a random crop of each source, (n,) int64, chosen by the keys (n,) alone."""
        return self._source_first[source] + (keys % self.sizes[source].astype(np.uint64)).astype(np.int64)

    def _locate_in_blocks(self, source: np.ndarray, epoch: np.ndarray, position: np.ndarray) -> np.ndarray:
        together = [
            (self._blocks(*pair), (source == pair[0]) & (epoch == pair[1]))
            for pair in {*zip(source.tolist(), epoch.tolist(), strict=True)}
        ]
        block, first, size, crops = (np.empty_like(position) for _ in range(4))
        for blocks, here in together:
            block[here] = number = np.searchsorted(blocks.edges, position[here], side="right") - 1
            first[here], size[here] = blocks.edges[number], np.diff(blocks.edges)[number]
        keys = key(self._seed, Purpose.CROP, source, epoch, block)
        shuffled = first + permute(position - first, size, keys)
        for blocks, here in together:
            slot = np.searchsorted(blocks.before_shard, shuffled[here], side="right") - 1
            crops[here] = self._shard_first[blocks.shards[slot]] + shuffled[here] - blocks.before_shard[slot]
        return crops

    def _blocks(self, source: int, epoch: int) -> "_Blocks":
        if (source, epoch) not in self._known_blocks:
            if len(self._known_blocks) >= _BLOCKS_KEPT:
                self._known_blocks.popitem(last=False)
            first, end = self._source_shards[source : source + 2]
            keys = key(self._seed, Purpose.SHARDS, source, epoch)
            shards = first + permute(np.arange(end - first), end - first, keys)
            before_shard = np.concatenate([[0], np.cumsum(self._crops_of_shard[shards])])
            edges = before_shard[[*range(0, len(shards), self._shuffle_block), len(shards)]]
            self._known_blocks[source, epoch] = _Blocks(shards, before_shard, edges)
        return self._known_blocks[source, epoch]


class _Blocks(NamedTuple):
    """How an epoch of a source orders its shards."""

    shards: np.ndarray
    """(n,) shards in the epoch's order."""
    before_shard: np.ndarray
    """(n + 1,) crops before each shard."""
    edges: np.ndarray
    """(blocks + 1,) crops before each block."""
