"""The sources of a split: which species, from which directories, at which weights, cut into crops. Imports no torch."""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np

from caduceus.allocator import give_back_freed_memory
from caduceus.alphabet import IS_ACGT_BYTE
from caduceus.config import DataConfig
from caduceus.data.cache import ShardCache
from caduceus.data.crops import CropTable
from caduceus.data.genome import ShardedGenome, WindowTable, read_manifest
from caduceus.data.order import MIXTURE_BLOCK
from caduceus.data.remote import log_commands, refuse_commands
from caduceus.data.shard_files import ShardFiles
from caduceus.data.verdicts import Verdicts
from caduceus.errors import UserError
from caduceus.patience import patiently

log = logging.getLogger(__name__)

_LOOKED_AT = 4096
"""Number of a source's windows that are examined first; all of them are examined only if these do not suffice."""
_LITTLE_USED = 0.5
"""If crops hold less than this share of a species' bases, a warning is logged."""


@dataclass(frozen=True)
class Source:
    """One species of one directory."""

    species: str
    weight: float
    """Share of the mixture, relative to the other sources."""
    table: WindowTable
    sha256: str
    """Hash of the genome file."""


@dataclass(frozen=True)
class SplitSources:
    """The sources of one split that have crops of the wanted length, and their crops."""

    split: str
    addresses: tuple[str, ...]
    """Addresses of the directories, in the order given."""
    fingerprints: tuple[str, ...]
    sources: tuple[Source, ...]
    crops: CropTable
    cache: ShardCache | None
    """The local copies of remote shards."""
    checked: tuple[Verdicts, ...] = ()
    """Verdicts on the tables, which are kept so that later processes of this node see them."""

    def identity(self) -> list[Any]:
        """Plain values that differ for other windows, and where local tars were replaced.

        The time of each folder of shards tells that one of its shards was replaced, for any number of shards.
        """
        names = [source.species for source in self.sources]
        folders = [] if self.cache else sorted({folder for one in self.sources for folder in one.table.folders})
        statuses = [(str(folder), patiently(folder.stat)) for folder in folders]
        seen = [(path, status.st_ino, status.st_mtime_ns) for path, status in statuses]
        return [self.split, self.addresses, self.fingerprints, names, seen]


_at_hand: ContextVar[Mapping[str, dict[str, Any]] | None] = ContextVar("manifests", default=None)


def read_manifests(data: DataConfig) -> dict[str, dict[str, Any]]:
    """The checked manifests of `data.path` by their addresses. Raises `UserError` as `open_sources` does."""
    paths = [path for path, _ in _parse_path(data.path)]
    refuse_commands(paths, data.allow_commands, "data.path")
    return {path: read_manifest(path, bool(data.cache_dir)) for path in paths}


@contextmanager
def using_manifests(manifests: Mapping[str, dict[str, Any]]) -> Iterator[None]:
    """Within the block, directories at these addresses are opened with the given manifests, and no file is read.

    One of many ranks reads and checks the manifests, once for all splits, and the others are given them.
    """
    before = _at_hand.set(manifests)
    try:
        yield
    finally:
        _at_hand.reset(before)


def open_sources(data: DataConfig, split: str) -> SplitSources:
    """Open `data.path` and cut the windows of `split` into crops.

    Species without this split are not sources. Raises `UserError` where no species has a crop to draw, and, unless
    `data.allow_unused_species` is set, where one of the species has none.
    """
    entries = _parse_path(data.path)
    refuse_commands([path for path, _ in entries], data.allow_commands, "data.path")
    cache = ShardCache(data.cache_dir, data.cache_bytes) if data.cache_dir else None
    known = _at_hand.get() or {}
    directories = [(ShardedGenome(path, cache, known.get(path)), weight) for path, weight in entries]
    sources = [source for genome, weight in directories for source in _sources(genome, weight, split)]
    for name, times in Counter(source.species for source in sources).items():
        if times > 1:
            raise UserError(f"data.path: species '{name}' stands in more than one of the directories")
    paths = ", ".join(genome.directory for genome, _ in directories)
    if not sources:
        raise UserError(f"data.path: no species of {paths} has windows in the split '{split}'")
    sources = _those_of_use(sources, data, split, cache)
    crops = CropTable([source.table for source in sources], data.seq_len, data.min_acgt, data.pack)
    give_back_freed_memory()  # of a manifest's text and a table's sums, as much as what is kept
    return SplitSources(
        split=split,
        addresses=tuple(path for path, _ in entries),
        fingerprints=tuple(genome.fingerprint for genome, _ in directories),
        sources=tuple(sources),
        crops=crops,
        cache=cache,
        checked=tuple(verdict for genome, _ in directories for verdict in genome.checked),
    )


def log_sources(split_sources: SplitSources, counts: np.ndarray, bases: np.ndarray, epochs_differ: bool) -> None:
    """Log what is drawn, what is left out, and the rounded weights.

    `counts` (stages, S): samples of each source per block, for each stage of the mixture. `bases` (S,): bases of each
    source in crops of its first epoch.
    """
    crops = split_sources.crops
    log_commands(split_sources.addresses)
    log.info(
        "data: %s: %d species, %d shards, %d crops of %d bases; left out: %d bases at the ends of windows, "
        "%d crops with too few ACGT",
        split_sources.split,
        len(split_sources.sources),
        len(crops.shards),
        crops.size,
        crops.seq_len,
        crops.left_out_bases,
        crops.left_out_tiles,
    )
    shares_used = bases / [source.table.bases for source in split_sources.sources]
    used_by_source = list(zip(split_sources.sources, shares_used, strict=True))
    unseen = (f"{source.species} {1 - used:.2%}" for source, used in used_by_source)
    others = " in its first epoch; others are tiled differently" if epochs_differ else ""
    log.info("data: %s: bases of each species that no crop holds: %s%s", split_sources.split, ", ".join(unseen), others)
    for source, used in used_by_source:
        if used < _LITTLE_USED:
            log.warning(
                "data: %s: crops hold only %.1f %% of the bases of %s; the others lie in windows shorter than %d, "
                "at the ends of windows, or in crops with too few ACGT",
                split_sources.split,
                100 * used,
                source.species,
                crops.seq_len,
            )
    for number, stage in enumerate(counts.tolist(), start=1):
        shares = (f"{source.species} {count}" for source, count in zip(split_sources.sources, stage, strict=True))
        which = f" in stage {number} of {len(counts)} of data.species_weights" if len(counts) > 1 else ""
        log.info("data: samples of each species in every %d%s: %s", MIXTURE_BLOCK, which, ", ".join(shares))


def _parse_path(path: Any) -> list[tuple[str, float]]:
    """(directory, weight) of every entry of `data.path`."""
    if not path:
        raise UserError("data.path: give a directory of shards, or a list of {path, weight}")
    if isinstance(path, str):
        return [(path, 1.0)]
    entries = []
    for entry in path if isinstance(path, list) else [path]:
        if not isinstance(entry, dict) or not isinstance(entry.get("path"), str) or set(entry) - {"path", "weight"}:
            raise UserError(f"data.path: expected a directory, or a list of {{path, weight}}; got {entry!r}")
        entries.append(
            (entry["path"], _positive(entry.get("weight", 1.0), f"data.path: the weight of {entry['path']}"))
        )
    return entries


def _positive(value: Any, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise UserError(f"{what} must be a positive number, got {value!r}")
    return float(value)


def _sources(genome: ShardedGenome, directory_weight: float, split: str) -> list[Source]:
    """The species of a directory that have windows in the split. The weight of a species is its number of bases unless
    one is given.
    """
    sources = []
    for species, part in genome.parts.items():
        table = genome.table(species, split)
        if len(table.rows) == 0:
            continue
        weight = part.get("weight")
        weight = table.bases if weight is None else _positive(weight, f"{genome.directory}: the weight of {species}")
        sources.append(Source(species, directory_weight * weight, table, str(part.get("sha256"))))
    if len({genome.parts[source.species].get("weight") is None for source in sources}) > 1:
        log.warning(
            "data: %s: some species have a weight; for those without one the weight is their number of bases",
            genome.directory,
        )
    return sources


def _those_of_use(sources: list[Source], data: DataConfig, split: str, cache: ShardCache | None) -> list[Source]:
    """The sources that have something to learn from. Raises `UserError` for the others, unless the user allows leaving
    them out.
    """
    problems = [_why_useless(source, data, split, cache) for source in sources]
    kept = [source for source, problem in zip(sources, problems, strict=True) if problem is None]
    for problem in filter(None, problems):
        if not kept:
            raise UserError(problem)
        if not data.allow_unused_species:
            raise UserError(
                f"{problem}. Its share of the samples would go to the others: leave it out of data.path, or allow this "
                "with data.allow_unused_species=true"
            )
        log.warning("data: left out, and its share goes to the others: %s", problem)
    return kept


def _why_useless(source: Source, data: DataConfig, split: str, cache: ShardCache | None) -> str | None:
    """Why a source has nothing to learn from in sequences of the wanted length, in one line; None where it has."""
    where = f"of species '{source.species}' in the split '{split}'"
    if not data.pack and not _reaches(source.table, data.seq_len):
        longest = int(source.table.rows["length"].max())
        return (
            f"data.seq_len: {data.seq_len} bases, but the longest window {where} has {longest}; choose a shorter "
            "sequence, fill sequences with several windows by data.pack=true, or, where contigs are longer than that, "
            "shard with a longer --window"
        )
    if not _has_a_crop(source.table, data):
        return f"data.min_acgt: no crop of {data.seq_len} bases {where} has {data.min_acgt:.0%} of ACGT; lower it"
    if data.repeat_weight == 0 and not _has_upper_case(source.table, 0 if data.pack else data.seq_len, cache):
        return (
            f"data.repeat_weight: 0, but all bases {where} are lower case (soft-masked), so no base counts; choose a "
            "weight above 0"
        )
    return None


def _reaches(table: WindowTable, seq_len: int) -> bool:
    """Whether any window is that long."""
    lengths = table.rows["length"]
    return bool(np.any(lengths[:_LOOKED_AT] >= seq_len) or np.any(lengths[_LOOKED_AT:] >= seq_len))


def _has_a_crop(table: WindowTable, data: DataConfig) -> bool:
    """Whether any crop of a source has enough ACGT. Mostly a window of nothing but ACGT answers that at once."""
    some = table.rows[:_LOOKED_AT]
    if np.any((some["length"] >= data.seq_len) & (some["acgt"] == some["length"])):
        return True
    return CropTable([table], data.seq_len, data.min_acgt, data.pack).size > 0


def _has_upper_case(table: WindowTable, seq_len: int, cache: ShardCache | None) -> bool:
    """Whether any A, C, G or T in a window of at least `seq_len` is upper case."""
    of_length = table.rows["length"] >= seq_len
    if np.any(of_length & (table.rows["acgt"] > table.rows["lower"])):
        return True
    windows = table.windows[of_length]
    # The index counts lower-case N as well: such windows have to be read, the likeliest first.
    unclear = windows[(windows["lower"] < windows["length"]) & (windows["acgt"] > 0)]
    files = ShardFiles(table.shards, cache)
    for window in unclear[np.argsort(unclear["lower"].astype(np.int64) - unclear["acgt"], kind="stable")[::-1]]:
        bases = np.empty(int(window["length"]), np.uint8)
        try:
            files.read_into(int(window["shard"]), int(window["offset"]), bases)
        except OSError:
            return True  # reading samples will report this
        if np.any(IS_ACGT_BYTE[bases] & (bases < ord("a"))):
            return True
    return False
