"""Random access to sharded genomes: any stretch of bases inside a window is one positional read. Imports no torch."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from caduceus.alphabet import reverse_complement
from caduceus.data.cache import Shard, ShardCache
from caduceus.data.format import MANIFEST, SPLITS, STRAND_SYMBOLS, ShardIndex, index_path, load_manifest, parse_manifest
from caduceus.data.remote import is_remote, join, read_chunks
from caduceus.data.shard_files import ShardFiles
from caduceus.errors import UserError

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
