"""From samples to tokens and labels, by one positional read each; retries and substitutes after failures. Imports no
torch.
"""

import time
import zlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from caduceus.alphabet import COMPLEMENT_BYTE
from caduceus.config import Config
from caduceus.data.cache import Prefetcher, UnavailableError
from caduceus.data.format import STRAND_SYMBOLS
from caduceus.data.objective import Objective, SampleArrays
from caduceus.data.region_weights import RegionWeights
from caduceus.data.remote import log_commands
from caduceus.data.samples import mask_rates
from caduceus.data.shard_files import ShardFiles
from caduceus.data.split_sources import SplitSources
from caduceus.data.verdicts import Verdicts
from caduceus.errors import UserError

READ_WAITS = (0.1, 0.5)
"""Seconds before the second and the third attempt to read a window."""
_FINAL_ERRORS = (UnavailableError, FileNotFoundError, PermissionError)
_CRC_MISMATCH = "its crc32 differs from the index's"
_NO_BASES = "bytes that are not bases"
_UNREAD_BY_A_PEER = "not all the ranks that share it could read it"
SUBSTITUTES = 10
"""Crops that are tried in place of one that cannot be read."""


class SampleReader:
    """Reads samples, or the slice `positions` of each. Safe to pickle and to fork.

    With `data.check_crc`, a window's crc32 is checked when it is first read from on this node, unless a cache has
    checked the shard's sha256 since the start. A failing read is retried, then the sample is replaced by `substitute(g,
    attempt)`; where there is no `substitute`, it raises `UserError`. Of the peers that share a sample, perhaps only one
    meets a failing disk or a byte that is not a base, so they have to agree on the crops to take.
    """

    def __init__(
        self,
        split_sources: SplitSources,
        config: Config,
        positions: tuple[int, int] | None = None,
        substitute: Callable[[int, int], np.ndarray] | None = None,
    ) -> None:
        self._split_sources = split_sources
        self._crops = split_sources.crops
        self._files = ShardFiles(split_sources.crops.shards, split_sources.cache)
        rates = None if substitute is None else mask_rates(config)
        self._objective = Objective(config.data, config.model.vocabulary, positions, rates)
        bed = config.data.weights_bed
        self._weights = None if bed is None else RegionWeights(split_sources, bed, config.data.weights_elsewhere)
        self._substitute = substitute
        self._verdicts = Verdicts(split_sources.identity(), len(self._crops.windows)) if config.data.check_crc else None
        self._damaged_windows: set[int] = set()
        self._invalid_crops: set[tuple[int, int]] = set()
        self._prefetcher: Prefetcher | None = None

    def read(self, samples: np.ndarray, least: np.ndarray | None = None, repeats: bool = False) -> SampleArrays:
        """Tokens of samples (B,) SAMPLE_DTYPE.

        `least` (B,): the first crop that is tried for each sample, 0 for its own (the default), n for its n-th
        substitute. With `repeats`, the arrays tell which bases are soft-masked.
        """
        if least is None:
            least = np.zeros(len(samples), np.int64)
        while True:
            taken, choices, bases, notes = self._read_bases(samples, least)
            packed = taken["begin"] < 0
            mirrored = taken["strand"] != np.where(packed, 0, self._crops.windows["strand"][taken["window"]])
            arrays, invalid = self._objective.tokens(bases, mirrored, taken, repeats)
            if not invalid.any():
                if packed.any():
                    self._objective.separate(arrays, self._starts(taken))
                if self._weights is not None:
                    self._objective.weigh(arrays, self._weights.of(taken))
                return replace(arrays, substituted=notes, choices=choices)
            self._condemn(taken[invalid > 0])

    def what_decides_the_weights(self) -> dict[str, Any]:
        """The fingerprint of the files in `data.weights_bed`; empty where there are none."""
        return {} if self._weights is None else {"weights": self._weights.fingerprint}

    def prefetch(self, samples: np.ndarray, first: int) -> None:
        """Begin to fetch the shards of this reader's samples number `first`, `first` + 1, …, while others are read."""
        if self._split_sources.cache is None:
            return
        if self._prefetcher is None:
            self._prefetcher = Prefetcher(self._split_sources.cache)
        shards = self._crops.windows["shard"][samples["window"]].tolist()
        self._prefetcher.want([self._crops.shards[shard] for shard in shards], first)

    def advance(self, sample: int) -> None:
        """Note that all of this reader's samples before number `sample` have been read."""
        if self._prefetcher is not None:
            self._prefetcher.advance(sample)

    def log(self) -> None:
        """Log the commands that the reading runs."""
        log_commands(self._split_sources.addresses)

    def describe(self, sample: np.void) -> dict[str, Any]:
        """Where a sample lies: species, contig, start, end (0-based half-open, forward strand) and strand.

        A packed sample is described by its first piece. Bases of the sample beyond `end` are the padding of `--tail
        pad`; `end` equals `start` where all bases are padding.
        """
        where = self._describe_with_padding(sample)
        window = self._crops.windows[sample["window"]]
        try:
            genome_end = self._files.genome_end(window)
        except OSError as error:
            raise UserError(f"{error}; restore the shard or shard again") from None
        return {**where, "end": max(where["start"], min(where["end"], genome_end))}

    def _describe_with_padding(self, sample: np.void) -> dict[str, Any]:
        window = self._crops.windows[sample["window"]]
        source = self._split_sources.sources[int(self._crops.source_of(sample["window"]))]
        pieces = self._crops.pieces(int(sample["window"]), int(sample["begin"]))
        start = int(window["start"]) + int(pieces.begin[0])
        return {
            "species": source.species,
            "contig": source.table.contigs[window["contig"]],
            "start": start,
            "end": start + int(pieces.length[0]),
            "strand": STRAND_SYMBOLS[sample["strand"]],
        }

    def _starts(self, samples: np.ndarray) -> np.ndarray:
        """(B, L) bool, True at the first positions of packed sequences, and of the filling after them."""
        length = self._crops.seq_len
        starts = np.zeros((len(samples), length), bool)
        for row, sample in enumerate(samples):
            if sample["begin"] < 0:
                pieces = self._crops.pieces(int(sample["window"]), int(sample["begin"]))
                borders = np.append(pieces.offset, pieces.offset[-1] + pieces.length[-1])
                borders = length - borders if sample["strand"] == 1 else borders
                starts[row, borders[borders < length]] = True
                starts[row, 0] = True
        return starts

    def _read_bases(
        self, samples: np.ndarray, least: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, tuple[str, ...]]:
        """The samples that were taken, which choices (B,) they are, their bases (B, n) uint8, and a line for each
        substitute.
        """
        bases = np.empty((len(samples), self._objective.end - self._objective.first), np.uint8)
        taken, choices, notes = samples, least, []
        shards, offsets = self._stored_places(samples)
        sound = (self._sound(samples["window"]) & (least == 0) & (samples["begin"] >= 0)).tolist()
        for row, (shard, offset) in enumerate(zip(shards.tolist(), offsets.tolist(), strict=True)):
            if sound[row] and not self._invalid_crops:
                try:
                    self._files.read_into(shard, offset, bases[row])
                    continue
                except OSError:
                    pass
            sample, choice, note = self._read_carefully(samples[row : row + 1], bases[row], int(least[row]))
            if note:
                taken, choices = (samples.copy(), least.copy()) if taken is samples else (taken, choices)
                taken[row], choices[row] = sample[0], choice
                notes.append(note)
        return taken, choices, bases, tuple(notes)

    def _stored_places(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The shard (B,) of each sample, and the offset (B,) in the shard of the stored bases of the slice."""
        windows = self._crops.windows[samples["window"]]
        from_left = samples["begin"] + self._objective.first
        from_right = samples["begin"] + self._crops.seq_len - self._objective.end
        forward = np.where(samples["strand"] == 1, from_right, from_left)
        mirrored = windows["length"].astype(np.int64) - forward - (self._objective.end - self._objective.first)
        stored = np.where(windows["strand"] == 1, mirrored, forward)
        return windows["shard"], windows["offset"].astype(np.int64) + stored

    def _read_carefully(self, sample: np.ndarray, buffer: np.ndarray, least: int) -> tuple[np.ndarray, int, str | None]:
        """Fill `buffer` with a sample (1,) or a substitute. Returns the sample taken, which choice it is, and a line
        for a substitute.
        """
        problem = self._try_to_read(sample, buffer) if least == 0 else _UNREAD_BY_A_PEER
        if problem is None:
            return sample, 0, None
        place = self._place(sample[0])
        if self._substitute is None:
            raise UserError(f"{place}: {problem}; restore the shard or shard again")
        g = int(sample["g"][0])
        for choice in range(max(1, least), SUBSTITUTES + 1):
            other = self._substitute(g, choice - 1)
            if self._try_to_read(other, buffer) is None:
                return other, choice, f"sample {g}: {place}: {problem}; took {self._place(other[0])} instead"
        raise UserError(f"{place}: {problem}; {SUBSTITUTES} other crops could not be read either; restore the shards")

    def _try_to_read(self, sample: np.ndarray, buffer: np.ndarray) -> str | None:
        """Fill `buffer` with a sample (1,) from sound windows, with retries. Returns what is wrong, or None."""
        window, begin = int(sample["window"][0]), int(sample["begin"][0])
        if (window, begin) in self._invalid_crops:
            return _NO_BASES
        if begin >= 0:
            (shard,), (offset,) = (values.tolist() for values in self._stored_places(sample))
            return self._try_to_read_stored(window, shard, offset, buffer)
        buffer[:] = ord("N")  # positions after the last piece
        pieces = zip(*(values.tolist() for values in self._crops.pieces(window, begin)), strict=True)
        for number, first, place, length in pieces:
            row, piece = self._crops.windows[number], buffer[place : place + length]
            reverse = row["strand"] == 1
            offset = int(row["offset"]) + (int(row["length"]) - first - length if reverse else first)
            problem = self._try_to_read_stored(number, int(row["shard"]), offset, piece)
            if problem is not None:
                return problem
            if reverse:
                piece[:] = COMPLEMENT_BYTE[piece[::-1]]
        return None

    def _try_to_read_stored(self, window: int, shard: int, offset: int, buffer: np.ndarray) -> str | None:
        """Fill `buffer` with stored bases of a window that is sound, with retries. Returns what is wrong, or None."""
        if window in self._damaged_windows:
            return _CRC_MISMATCH
        for wait in (*READ_WAITS, None):
            try:
                if self._sound(window) or self._check(window):
                    self._files.read_into(shard, offset, buffer)
                    return None
                problem = _CRC_MISMATCH
            except OSError as error:
                problem = str(error)
                if isinstance(error, _FINAL_ERRORS):
                    break
            self._files.forget(shard)
            if wait is not None:
                time.sleep(wait)
        if problem is _CRC_MISMATCH:
            self._damaged_windows.add(window)
        return problem

    def _condemn(self, samples: np.ndarray) -> None:
        """Never again take these crops, which hold bytes that are not bases."""
        if self._substitute is None:
            raise UserError(f"{self._place(samples[0])}: {_NO_BASES}; restore the shard or shard again")
        self._invalid_crops.update(zip(samples["window"].tolist(), samples["begin"].tolist(), strict=True))

    def _sound(self, windows: np.ndarray | int) -> np.ndarray:
        """Whether windows need no check, or have passed it."""
        return np.ones(np.shape(windows), bool) if self._verdicts is None else self._verdicts.sound[windows]

    def _check(self, window: int) -> bool:
        """Whether a window's stored bases have the crc32 of the index."""
        row = self._crops.windows[window]
        shard = int(row["shard"])
        with self._verdicts.deciding(window):
            if self._verdicts.sound[window]:
                return True
            if not self._files.is_checked(shard):
                stored = np.empty(int(row["length"]), np.uint8)
                self._files.read_into(shard, int(row["offset"]), stored)
                if zlib.crc32(stored) != row["crc32"]:
                    return False
            self._verdicts.sound[window] = True
            return True

    def _place(self, sample: np.void) -> str:
        where = self._describe_with_padding(sample)
        shard = self._crops.shards[self._crops.windows["shard"][sample["window"]]]
        return f"{shard.path}: {where['species']} {where['contig']}:{where['start']}-{where['end']}"
