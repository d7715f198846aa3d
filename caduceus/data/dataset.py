"""The sources of a run: which species, from which directories, at which weights, cut into crops. Imports no torch."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from caduceus.config import DataConfig
from caduceus.data.cache import ShardCache
from caduceus.data.crops import CropTable
from caduceus.data.order import MIXTURE_BLOCK
from caduceus.data.reader import ShardedGenome, WindowTable
from caduceus.data.remote import log_commands, refuse_commands
from caduceus.errors import UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """One species of one directory."""

    species: str
    weight: float
    """Share of the mixture, relative to the other sources."""
    table: WindowTable
    sha256: str
    """Of the genome file."""


@dataclass(frozen=True)
class Dataset:
    """The sources of one split that have crops of the wanted length, and their crops."""

    split: str
    addresses: tuple[str, ...]
    """Of the directories, in the order given."""
    fingerprints: tuple[str, ...]
    sources: tuple[Source, ...]
    crops: CropTable
    cache: ShardCache | None
    """Where the shards are kept that live elsewhere."""


def open_dataset(data: DataConfig, split: str) -> Dataset:
    """Open `data.path` and cut the windows of `split` into crops.

    Species without this split are not sources. Raises `UserError` where there is nothing to draw from.
    """
    entries = _parse_path(data.path)
    refuse_commands([path for path, _ in entries], data.allow_commands, "data.path")
    cache = ShardCache(data.cache_dir, data.cache_bytes) if data.cache_dir else None
    directories = [(ShardedGenome(path, cache), weight) for path, weight in entries]
    sources = [source for genome, weight in directories for source in _sources(genome, weight, split)]
    names = [source.species for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"data.path: species '{name}' stands in more than one of the directories")
    paths = ", ".join(genome.directory for genome, _ in directories)
    if not sources:
        raise UserError(f"data.path: no species of {paths} has windows in the split '{split}'")
    sources = _those_with_crops(sources, data, split)
    return Dataset(
        split=split,
        addresses=tuple(path for path, _ in entries),
        fingerprints=tuple(genome.fingerprint for genome, _ in directories),
        sources=tuple(sources),
        crops=CropTable([source.table for source in sources], data.seq_len, data.min_acgt),
        cache=cache,
    )


def log_dataset(dataset: Dataset, counts: Sequence[int]) -> None:
    """Say what is drawn, what is left out, and the weights as rounded (`counts` of each block of the mixture)."""
    crops = dataset.crops
    log_commands(dataset.addresses)
    log.info(
        "data: %s: %d species, %d shards, %d crops of %d bases; left out: %d bases at the ends of windows, "
        "%d crops with too few ACGT",
        dataset.split,
        len(dataset.sources),
        len(crops.shards),
        crops.size,
        crops.seq_len,
        crops.left_out_bases,
        crops.left_out_tiles,
    )
    shares = (f"{source.species} {count}" for source, count in zip(dataset.sources, counts, strict=True))
    log.info("data: samples of each species in every %d: %s", MIXTURE_BLOCK, ", ".join(shares))


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
    """The species of a directory that have windows in the split; a species without a weight weighs its bases."""
    sources = []
    for species, part in genome.parts.items():
        table = genome.table(species, split)
        if len(table.windows) == 0:
            continue
        weight = part.get("weight")
        weight = table.bases if weight is None else _positive(weight, f"{genome.directory}: the weight of {species}")
        sources.append(Source(species, directory_weight * weight, table, str(part.get("sha256"))))
    if len({genome.parts[source.species].get("weight") is None for source in sources}) > 1:
        log.warning("data: %s: some species have a weight; those without one weigh their bases", genome.directory)
    return sources


def _those_with_crops(sources: list[Source], data: DataConfig, split: str) -> list[Source]:
    longest = max(int(source.table.windows["length"].max()) for source in sources)
    if longest < data.seq_len:
        raise UserError(
            f"data.seq_len: {data.seq_len} bases, but the longest window of the split '{split}' has {longest}; "
            "choose a shorter sequence, or shard with a longer --window"
        )
    kept = []
    for source in sources:
        if CropTable([source.table], data.seq_len, data.min_acgt).size:
            kept.append(source)
        else:
            log.warning("data: %s: left out of '%s': no window holds a usable crop", source.species, split)
    if not kept:
        raise UserError(
            f"data.min_acgt: no crop of {data.seq_len} bases of the split '{split}' has {data.min_acgt:.0%} of ACGT"
        )
    return kept
