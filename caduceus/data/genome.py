"""Random access to sharded genomes: any stretch of bases inside a window is one positional read. Imports no torch."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from caduceus.alphabet import reverse_complement
from caduceus.data.cache import Shard, ShardCache
from caduceus.data.format import MANIFEST, SPLITS, STRAND_SYMBOLS, ShardIndex, index_path, load_manifest, parse_manifest
from caduceus.data.remote import is_remote, join, read_chunks
from caduceus.data.shard_files import ShardFiles
from caduceus.data.shard_list import ShardList
from caduceus.data.verdicts import Verdicts
from caduceus.data.windows import LoadedWindows, MappedWindows, SplitTable, require_fit, windows_of
from caduceus.errors import UserError
from caduceus.files import sha256_of
from caduceus.patience import patiently


@dataclass(frozen=True)
class WindowTable:
    """The windows of one species and split, each once, even where both strands are stored.

    `windows` (WINDOW_DTYPE) in shard order; `runs` (WINDOW_RUN_DTYPE) are the runs of non-ACGT codes, by window.
    """

    species: str
    contigs: tuple[str, ...]
    contig_lengths: tuple[int, ...]
    shards: Sequence[Shard]
    content: LoadedWindows | MappedWindows

    @property
    def windows(self) -> np.ndarray:
        return self.content.windows

    @property
    def runs(self) -> np.ndarray:
        return self.content.runs

    @property
    def rows(self) -> np.ndarray:
        """The windows without a copy. Their shard numbers may be those of a table of the whole split."""
        return self.content.rows

    @property
    def bases(self) -> int:
        return self.content.bases

    @property
    def folders(self) -> set[Path]:
        """The folders that hold the shards."""
        return self.shards.folders if isinstance(self.shards, ShardList) else {one.path.parent for one in self.shards}


class ShardedGenome:
    """A directory of shards, opened for reading; with a `cache`, the directory may be a URL.

    `manifest`: the directory's manifest, as `read_manifest` returns it; None reads it.

    Attributes: `manifest`, `fingerprint`, and `species`, the names. Raises `UserError` where the directory, its
    manifest or an index is missing or damaged.
    """

    def __init__(
        self, directory: str | Path, cache: ShardCache | None = None, manifest: dict[str, Any] | None = None
    ) -> None:
        self.directory = str(directory)
        self._cache = cache
        self.manifest = manifest or read_manifest(self.directory, cache is not None)
        self.fingerprint: str = self.manifest["fingerprint"]
        self.parts = {part["name"]: part for part in self.manifest["species"]}
        self.species = tuple(self.parts)
        self._home = Path(directory) if cache is None else cache.directory / self.fingerprint[:16]
        self._readable: dict[str, _OpenedSpecies] = {}
        self._tables: dict[str, SplitTable] = {}
        self.checked: list[Verdicts] = []
        """Verdicts on its tables. Other processes of the node see them as long as one process keeps them."""

    def table(self, species: str, split: str) -> WindowTable:
        """The windows of a species and split, from the table or the checked indexes; empty where the split has none."""
        part = self._part(species)
        contigs = tuple(contig["name"] for contig in part["contigs"])
        lengths = tuple(contig["length"] for contig in part["contigs"])
        padded = part.get("plan", {}).get("tail") == "pad"
        entries = part["splits"].get(split, {}).get("shards", [])
        shards = ShardList(self._home, self.directory if self._cache else None, species, entries)
        mapped = self._mapped(split)
        if mapped is not None and entries:
            content = MappedWindows(mapped, mapped.species.index(species))
            return WindowTable(species, contigs, lengths, shards, content)
        indexes = [
            self._checked_index(species, shard, entry, len(contigs))
            for shard, entry in zip(shards, entries, strict=True)
        ]
        return WindowTable(species, contigs, lengths, shards, LoadedWindows(*windows_of(indexes, padded)))

    def _mapped(self, split: str) -> SplitTable | None:
        """The mapped table of a split of the whole dataset; None where the dataset has none (older versions
        made none).
        """
        table = self.manifest.get("tables", {}).get(split)
        if table is None or split in self._tables:
            return self._tables.get(split)
        paths = [self._home / table[kind]["name"] for kind in ("windows", "runs")]
        for path, kind in zip(paths, ("windows", "runs"), strict=True):
            if self._cache:
                try:
                    self._cache.fetch_file(path, join(self.directory, path.name), table[kind]["sha256"])
                except OSError as error:
                    raise UserError(f"{error}; restore it or shard again") from None
        holders = [part for part in self.manifest["species"] if split in part["splits"]]
        splits = [(part["name"], len(part["splits"][split]["shards"])) for part in holders]
        opened = SplitTable.open((paths[0], paths[1]), table, splits)
        if not self._cache:
            self._check_once([table[kind] for kind in ("windows", "runs")], holders, split)
        self._tables[split] = opened
        return opened

    def _check_once(self, files: list[dict], holders: list[dict], split: str) -> None:
        """Refuse files whose sha256 differs from the manifest's; one process of a node checks for all."""
        verdict = Verdicts([self.directory, self.fingerprint, files], 1)
        with verdict.deciding(0):
            if not verdict.sound[0]:
                for file in files:
                    if sha256_of(self._home / file["name"]) != file["sha256"]:
                        path = self._home / file["name"]
                        raise UserError(
                            f"{path}: its sha256 differs from the manifest's; --rebuild-index makes it again"
                        )
                for part in holders:
                    _require_sizes(self._home / part["name"], part["splits"][split]["shards"])
                verdict.sound[0] = True
        self.checked.append(verdict)

    def read(self, species: str, contig: str, start: int, end: int, strand: str = "+") -> np.ndarray:
        """The bases of an interval that lies inside one window, (end - start,) uint8 ASCII, case kept.

        `start` and `end` are 0-based half-open on the forward strand, for either strand. Raises `UserError` where no
        window holds the whole interval.
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

    def _checked_index(self, species: str, shard: Shard, entry: dict, contigs: int) -> ShardIndex:
        """The index of a shard. Raises `UserError` where shard, index and manifest do not fit together."""
        path = index_path(shard.path)
        if self._cache:
            origin = join(self.directory, f"{species}/{path.name}")
            try:
                self._cache.fetch_file(path, origin, entry["index_sha256"])
            except OSError as error:
                raise UserError(f"{error}; restore it or shard again") from None
        else:
            _require_size(shard.path, shard.bytes)
        try:
            content = patiently(path.read_bytes)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); restore it or shard again") from None
        if hashlib.sha256(content).hexdigest() != entry["index_sha256"]:
            raise UserError(f"{path}: its sha256 differs from the manifest's; restore it or shard again")
        index = ShardIndex.load(path)
        require_fit(index, path, entry, contigs)
        return index

    def _part(self, species: str) -> dict:
        if species not in self.parts:
            raise UserError(f"{self.directory}: no species '{species}'; it holds {', '.join(self.species)}")
        return self.parts[species]


class _OpenedSpecies:
    """Files and windows of all splits of a species, in which a window that holds an interval can be found."""

    def __init__(self, files: ShardFiles, windows: np.ndarray, contigs: Sequence[str]) -> None:
        self.files = files
        self.contigs = {name: number for number, name in enumerate(contigs)}
        self._windows = windows[np.lexsort((windows["length"], windows["start"], windows["contig"]))]
        self._ends = (self._windows["start"] + self._windows["length"]).astype(np.int64)
        # Windows may overlap or be nested, so the window that holds an interval may start long before the last window
        # that starts before it. So this has, for each row, which row up to it has the window of the same contig that
        # reaches farthest.
        span = self._ends.max(initial=0) + 1
        place = self._windows["contig"] * span + self._ends
        farthest_so_far = place == np.maximum.accumulate(place)
        self._farthest = np.maximum.accumulate(np.where(farthest_so_far, np.arange(len(place)), 0))

    def window_that_holds(self, contig: int, start: int, end: int) -> np.void | None:
        """A window (WINDOW_DTYPE) that holds a whole interval; None where there is none."""
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


def read_manifest(directory: str, is_cached: bool) -> dict[str, Any]:
    """The checked manifest of a directory, or, where shards are cached, of any address."""
    if not is_cached and is_remote(directory):
        raise UserError(f"data.cache_dir: {directory} is remote; name a local directory to keep its shards in")
    return _fetch_manifest(directory) if is_cached else load_manifest(directory)


def _fetch_manifest(directory: str) -> dict[str, Any]:
    address = join(directory, MANIFEST)
    try:
        content = b"".join(read_chunks(address))
    except OSError as error:
        raise UserError(f"data.path: {error}") from None
    return parse_manifest(content, address)


def _require_size(path: Path | str, expected: int) -> None:
    try:
        size = patiently(lambda: os.stat(path).st_size)  # noqa: PTH116 (a Path for each of very many is slow)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); restore it or shard again") from None
    if size != expected:
        raise UserError(f"{path}: {size} bytes, but the manifest says {expected}; restore it or shard again")


def _require_sizes(folder: Path, entries: list[dict]) -> None:
    for entry in entries:
        _require_size(f"{folder}/{entry['name']}", entry["bytes"])
