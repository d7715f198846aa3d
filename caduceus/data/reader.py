"""Random access to sharded genomes: any stretch of bases inside a window is one positional read. Imports no torch."""

import hashlib
import json
import os
import tarfile
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from caduceus.alphabet import reverse_complement
from caduceus.data.cache import Shard, ShardCache
from caduceus.data.remote import is_remote, join, read_chunks
from caduceus.data.shards import MANIFEST, SPLITS, STRAND_SYMBOLS, ShardIndex, index_path, load_manifest, parse_manifest
from caduceus.errors import UserError

MAX_OPEN_FILES = 128
"""Descriptors one process keeps open; hundreds of species have more shards than a process may open."""
MAX_OPEN_CACHED = 4
"""The same for cached shards: one that was evicted takes its disk space until the last process closes it."""

WINDOW_DTYPE = np.dtype(
    [
        ("shard", "<u4"),  # row of the table's shard list
        ("offset", "<u8"),  # of the first stored base, in bytes from the start of the tar
        ("length", "<u4"),  # bases
        ("contig", "<u4"),  # row of the species' contig table
        ("start", "<u8"),  # on the forward strand, 0-based
        ("strand", "u1"),  # of the stored bases: 0 is +, 1 is -
        ("acgt", "<u4"),  # count of A, C, G and T in either case
        ("lower", "<u4"),  # count of lower-case bases, also of those that are not ACGT
        ("crc32", "<u4"),  # of the stored bases
        ("may_be_padded", "?"),  # whether its end may be N of `--tail pad` and not the genome's
    ]
)
WINDOW_RUN_DTYPE = np.dtype(
    [
        ("window", "<u4"),  # row of the window table
        ("start", "<u4"),  # first position of the run in the window, on the forward strand
        ("length", "<u4"),
    ]
)


class ShardFiles:
    """Positional reads from shards with a bounded number of open files. Safe to pickle and to fork."""

    def __init__(self, shards: Sequence[Shard], cache: ShardCache | None = None) -> None:
        self.shards = shards
        self._cache = cache
        self._most = MAX_OPEN_CACHED if cache else MAX_OPEN_FILES
        self._open: OrderedDict[int, int] = OrderedDict()
        self._ends: dict[tuple[int, int], int] = {}

    def read_into(self, file: int, offset: int, buffer: np.ndarray) -> None:
        """Fill `buffer` (n,) uint8 from byte `offset` of file number `file`. Raises OSError, also where it ends."""
        descriptor = self._descriptor(file)
        view = memoryview(buffer)
        while view:
            count = os.preadv(descriptor, [view], offset)
            if count == 0:
                raise OSError(f"{self.shards[file].path}: ends before byte {offset + len(view)}")
            view, offset = view[count:], offset + count

    def is_checked(self, file: int) -> bool:
        """Whether a cache has found the whole file to be the manifest's since the start. Raises OSError."""
        if self._cache is None:
            return False
        self._descriptor(file)
        return self._cache.has_checked(self.shards[file])

    def identities(self) -> list[tuple]:
        """What tells the files from others, and local ones from what may stand in their place later."""
        if self._cache:
            return [(str(shard.path), shard.sha256) for shard in self.shards]
        statuses = ((str(shard.path), shard.path.stat()) for shard in self.shards)
        return [(path, status.st_ino, status.st_size, status.st_mtime_ns) for path, status in statuses]

    def genome_end(self, window: np.void) -> int:
        """Where the genome's bases of a window (WINDOW_DTYPE) end in the contig. Raises OSError.

        Only KEY.json tells, which follows the bases: padding that the index lists looks like N of the genome, and less
        than 16 is not listed; a segment may end anywhere, at a gap or an excluded interval, so neither the contig's
        length nor the neighbouring windows say it.
        """
        start, length = int(window["start"]), int(window["length"])
        if not window["may_be_padded"]:
            return start + length
        file, offset = int(window["shard"]), int(window["offset"])
        if (file, offset) not in self._ends:
            header = np.empty(tarfile.BLOCKSIZE, np.uint8)
            at = offset + length + -length % tarfile.BLOCKSIZE
            self.read_into(file, at, header)
            try:
                member = tarfile.TarInfo.frombuf(header.tobytes(), "utf-8", "strict")
                text = np.empty(member.size, np.uint8)
                self.read_into(file, at + tarfile.BLOCKSIZE, text)
                described = json.loads(text.tobytes())
                if described["end"] - start + described.get("pad", 0) != length:
                    raise ValueError("other bases than the index")
            except (tarfile.HeaderError, ValueError, KeyError, TypeError) as error:
                raise OSError(f"{self.shards[file].path}: byte {at}: no description of a sample ({error!r})") from None
            self._ends[file, offset] = described["end"]
        return self._ends[file, offset]

    def forget(self, file: int) -> None:
        """Close a file, and have a cached one fetched again when it is next read."""
        if file in self._open:
            os.close(self._open.pop(file))
        if self._cache:
            self.shards[file].path.unlink(missing_ok=True)

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    def _descriptor(self, file: int) -> int:
        if file in self._open:
            self._open.move_to_end(file)
            return self._open[file]
        if len(self._open) >= self._most:
            os.close(self._open.popitem(last=False)[1])
        shard = self.shards[file]
        self._open[file] = self._cache.open(shard) if self._cache else os.open(shard.path, os.O_RDONLY | os.O_CLOEXEC)
        return self._open[file]

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_open": OrderedDict()}

    def __del__(self) -> None:
        self.close()


@dataclass(frozen=True)
class WindowTable:
    """The windows of one species and split, each once however many strands are stored.

    `windows` (WINDOW_DTYPE) in shard order; `runs` (WINDOW_RUN_DTYPE) are the runs of non-ACGT codes, by window.
    """

    species: str
    contigs: tuple[str, ...]
    shards: tuple[Shard, ...]
    windows: np.ndarray
    runs: np.ndarray

    @property
    def bases(self) -> int:
        return int(self.windows["length"].sum(dtype=np.int64))


class ShardedGenome:
    """A directory of shards, opened for reading; with a `cache`, the directory may be a URL.

    Attributes: `manifest`, `fingerprint`, and `species`, the names. Raises `UserError` where the directory, its
    manifest or an index is missing or damaged.
    """

    def __init__(self, directory: str | Path, cache: ShardCache | None = None) -> None:
        self.directory = str(directory)
        self._cache = cache
        if cache is None and is_remote(self.directory):
            raise UserError(f"data.cache_dir: {directory} is remote; name a local directory to keep its shards in")
        self.manifest = load_manifest(directory) if cache is None else _fetch_manifest(self.directory)
        self.fingerprint: str = self.manifest["fingerprint"]
        self.parts = {part["name"]: part for part in self.manifest["species"]}
        self.species = tuple(self.parts)
        self._home = Path(directory) if cache is None else cache.directory / self.fingerprint[:16]
        self._readable: dict[str, _OpenedSpecies] = {}

    def table(self, species: str, split: str) -> WindowTable:
        """The windows of a species and split, from its checked indexes; empty where the split has none."""
        part = self._part(species)
        contigs = tuple(contig["name"] for contig in part["contigs"])
        padded = part.get("plan", {}).get("tail") == "pad"
        shards, samples, runs, sample_count = [], [], [], 0
        for entry in part["splits"].get(split, {}).get("shards", []):
            shard = self._shard(species, entry)
            index = self._checked_index(species, shard, entry, len(contigs))
            stored = np.zeros(len(index.samples), WINDOW_DTYPE)
            for name in ("offset", "length", "contig", "start", "strand", "acgt", "lower", "crc32"):
                stored[name] = index.samples[name]
            stored["may_be_padded"] = padded & (index.samples["acgt"] < index.samples["length"])
            stored["shard"] = len(shards)
            runs_here = np.zeros(len(index.runs), WINDOW_RUN_DTYPE)
            for name, column in (("window", "sample"), ("start", "start"), ("length", "length")):
                runs_here[name] = index.runs[column]
            runs_here["window"] += sample_count
            sample_count += len(stored)
            shards.append(shard)
            samples.append(stored)
            runs.append(runs_here)
        samples = np.concatenate([np.zeros(0, WINDOW_DTYPE), *samples])
        runs = np.concatenate([np.zeros(0, WINDOW_RUN_DTYPE), *runs])
        rows = _one_row_per_window(samples)
        return WindowTable(species, contigs, tuple(shards), samples[rows], _forward_runs(samples, runs, rows))

    def read(self, species: str, contig: str, start: int, end: int, strand: str = "+") -> np.ndarray:
        """The bases of an interval that lies inside one window, (end - start,) uint8 ASCII, case kept.

        `start` and `end` are 0-based half-open on the forward strand, whichever strand is asked for.
        """
        if strand not in STRAND_SYMBOLS:
            raise UserError(f"strand: choose + or -, got '{strand}'")
        opened = self._opened(species)
        if contig not in opened.contigs:
            raise UserError(f"{self.directory}: {species} has no contig '{contig}'")
        window = opened.window_that_holds(opened.contigs[contig], start, end)
        if window is None:
            raise UserError(
                f"{species} {contig}:{start}-{end}: no window of {self.directory} holds all of this interval"
            )
        begin = start - int(window["start"])
        stored_minus = bool(window["strand"])
        if stored_minus:
            begin = int(window["start"]) + int(window["length"]) - end
        bases = np.empty(end - start, np.uint8)
        opened.files.read_into(int(window["shard"]), int(window["offset"]) + begin, bases)
        return bases if stored_minus == (strand == "-") else reverse_complement(bases)

    def _opened(self, species: str) -> "_OpenedSpecies":
        if species not in self._readable:
            tables = [self.table(species, split) for split in SPLITS]
            shards = [shard for table in tables for shard in table.shards]
            windows = np.concatenate([table.windows for table in tables])
            shards_before = np.cumsum([0] + [len(table.shards) for table in tables[:-1]])
            windows["shard"] += np.repeat(shards_before, [len(table.windows) for table in tables]).astype(np.uint32)
            self._readable[species] = _OpenedSpecies(ShardFiles(shards, self._cache), windows, tables[0].contigs)
        return self._readable[species]

    def _shard(self, species: str, entry: dict) -> Shard:
        path = self._home / species / entry["name"]
        origin = join(self.directory, f"{species}/{entry['name']}") if self._cache else None
        return Shard(path, entry["bytes"], entry["sha256"], origin)

    def _checked_index(self, species: str, shard: Shard, entry: dict, contigs: int) -> ShardIndex:
        """The index of a shard, refused where shard, index and manifest do not fit together."""
        path = index_path(shard.path)
        if self._cache:
            origin = join(self.directory, f"{species}/{path.name}")
            try:
                self._cache.fetch_file(path, origin, entry["index_sha256"])
            except OSError as error:
                raise UserError(f"{error}; restore it or shard again") from None
        else:
            _require_size(shard)
        try:
            content = path.read_bytes()
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); restore it or shard again") from None
        if hashlib.sha256(content).hexdigest() != entry["index_sha256"]:
            raise UserError(f"{path}: its sha256 is not the manifest's; restore it or shard again")
        index = ShardIndex.load(path)
        _require_fit(index, path, entry, contigs)
        return index

    def _part(self, species: str) -> dict:
        if species not in self.parts:
            raise UserError(f"{self.directory}: no species '{species}'; it holds {', '.join(self.species)}")
        return self.parts[species]


class _OpenedSpecies:
    """Files and windows of all splits of a species, to find the window that holds an interval."""

    def __init__(self, files: ShardFiles, windows: np.ndarray, contigs: Sequence[str]) -> None:
        self.files = files
        self.contigs = {name: number for number, name in enumerate(contigs)}
        self._windows = windows[np.lexsort((windows["length"], windows["start"], windows["contig"]))]
        self._ends = (self._windows["start"] + self._windows["length"]).astype(np.int64)
        # Windows may overlap or be nested, so what holds an interval may start long before the last window that
        # starts before it: for each row, the row up to it whose window of the same contig reaches farthest.
        span = self._ends.max(initial=0) + 1
        place = self._windows["contig"] * span + self._ends
        farthest_so_far = place == np.maximum.accumulate(place)
        self._farthest = np.maximum.accumulate(np.where(farthest_so_far, np.arange(len(place)), 0))

    def window_that_holds(self, contig: int, start: int, end: int) -> np.void | None:
        """A window (WINDOW_DTYPE) that holds the whole of an interval, if there is one."""
        first, last = np.searchsorted(self._windows["contig"], [contig, contig + 1])
        row = first + int(np.searchsorted(self._windows["start"][first:last], start, side="right")) - 1
        if row < first or start >= end:
            return None
        farthest = self._farthest[row]
        if end > self._ends[farthest]:
            return None
        if not self._windows["may_be_padded"][farthest]:
            return self._windows[farthest]
        rows = first + np.flatnonzero(self._ends[first : row + 1] >= end)
        windows = (self._windows[row] for row in rows)
        return next((window for window in windows if end <= self.files.genome_end(window)), None)


def _fetch_manifest(directory: str) -> dict:
    address = join(directory, MANIFEST)
    try:
        content = b"".join(read_chunks(address))
    except OSError as error:
        raise UserError(f"data.path: {error}") from None
    return parse_manifest(content, address)


def _require_size(shard: Shard) -> None:
    try:
        size = shard.path.stat().st_size
    except OSError as error:
        raise UserError(f"{shard.path}: cannot be read ({error.strerror}); restore it or shard again") from None
    if size != shard.bytes:
        raise UserError(f"{shard.path}: {size} bytes, but the manifest says {shard.bytes}; restore it or shard again")


def _require_fit(index: ShardIndex, path: Path, entry: dict, contigs: int) -> None:
    samples, runs = index.samples, index.runs
    fits = (
        len(samples) == entry["samples"]
        and np.all(samples["offset"] + samples["length"] <= entry["bytes"])
        and np.all(samples["contig"] < contigs)
        and np.all(samples["strand"] <= 1)
        and np.all(runs["sample"] < len(samples))
        and np.all(runs["start"].astype(np.int64) + runs["length"] <= samples["length"][runs["sample"]])
    )
    if not fits:
        raise UserError(f"{path}: the index does not describe {entry['name']}; restore it or shard again")


def _one_row_per_window(samples: np.ndarray) -> np.ndarray:
    """Rows of `samples` that name each window once, the forward strand where both are stored, in tar order."""
    order = np.lexsort((samples["strand"], samples["length"], samples["start"], samples["contig"]))
    place = samples[["contig", "start", "length"]][order]
    first = np.ones(len(order), bool)
    first[1:] = place[1:] != place[:-1]
    return np.sort(order[first])


def _forward_runs(samples: np.ndarray, runs: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The runs of the chosen rows, renumbered and in forward coordinates."""
    window_of_sample = np.full(len(samples), -1, np.int64)
    window_of_sample[rows] = np.arange(len(rows))
    runs = runs[window_of_sample[runs["window"]] >= 0]
    sample = samples[runs["window"]]
    mirrored = sample["length"] - runs["start"] - runs["length"]
    runs["start"] = np.where(sample["strand"] == 1, mirrored, runs["start"])
    runs["window"] = window_of_sample[runs["window"]]
    return runs
