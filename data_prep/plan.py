"""One species: genome and options -> which windows stand in which shard, in which order."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from caduceus.data.shards import SPLITS, shard_name
from caduceus.errors import UserError
from data_prep.aliases import AliasTable, read_aliases
from data_prep.composition import Composition, Scan
from data_prep.contigs import Selection, select_contigs
from data_prep.genome import Genome
from data_prep.intervals import size
from data_prep.options import PlanOptions
from data_prep.regions import Regions, build_regions
from data_prep.tar_format import END, SampleJson, member_size
from data_prep.windows import DROPPED, ContigWindows, contig_windows, footprint, hash_rows

_KEY_NAME_CHARACTERS = 24
_SHUFFLE, _STRAND = 1, 2  # what a hash is for


@dataclass(frozen=True)
class SpeciesRequest:
    """What the user asks for: one species and where its genome is."""

    name: str
    fasta: Path
    assembly: str
    options: PlanOptions
    weight: float = 1.0
    """Share in the mixture, relative to the other species'."""
    weight_exponent: float | None = None
    """With an exponent a, the weight is multiplied by (train bases)^a."""
    cache_dir: Path | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,31}", self.name):
            raise UserError(f"species '{self.name}': use up to 32 letters, digits, '_' and '-', as it names a folder")


@dataclass(frozen=True)
class ShardPlan:
    """One tar to be written: the rows of the plan's windows in stored order, and the tar's size in bytes."""

    split: str
    name: str
    rows: np.ndarray
    size: int


@dataclass(frozen=True)
class SpeciesPlan:
    """Everything about a species but its bytes. `strands` (windows, 2) bool: is + stored, is - stored."""

    request: SpeciesRequest
    contigs: dict[str, int]
    contig_keys: list[str]
    windows: np.ndarray  # WINDOW_DTYPE, in genome order
    strands: np.ndarray
    shards: list[ShardPlan]
    report: dict[str, Any]


def identity(request: SpeciesRequest, genome: Genome) -> dict[str, Any]:
    """What decides the bytes of a species, as plain values: another identity is another dataset."""
    return {
        "species": request.name,
        "assembly": request.assembly,
        "file": genome.path.name,
        "sha256": genome.sha256,
        "plan": {
            **request.options.as_plan(),
            "weight": request.weight,
            "weight_exponent": request.weight_exponent,
        },
    }


def plan_species(request: SpeciesRequest, genome: Genome, scans: Mapping[str, Scan]) -> SpeciesPlan:
    """Plan the shards of a species; `scans` holds every contig of the genome."""
    options = request.options
    aliases = read_aliases(Path(options.aliases)) if options.aliases else AliasTable()
    selection = select_contigs(genome.contigs, genome.descriptions, options, aliases)
    regions = build_regions(selection, options)
    planned = [
        contig_windows(row, length, regions.splits[name], regions.excluded[name], scans[name], options)
        for row, (name, length) in enumerate(selection.used.items())
    ]
    windows = np.concatenate([contig.windows for contig in planned])
    _require_windows(windows, selection, regions, planned, options)
    strands = choose_strands(windows, options)
    keys = contig_keys(selection.used)
    return SpeciesPlan(
        request=request,
        contigs=selection.used,
        contig_keys=keys,
        windows=windows,
        strands=strands,
        shards=cut_shards(request, list(selection.used), windows, strands),
        report=report(selection, regions, scans, planned),
    )


def choose_strands(windows: np.ndarray, options: PlanOptions) -> np.ndarray:
    """Which strands of each window are stored, (windows, 2) bool for + and -."""
    if options.strands == "both":
        return np.ones((len(windows), 2), dtype=bool)
    if options.strands == "forward":
        return np.tile([True, False], (len(windows), 1))
    coin = hash_rows(options.seed, _STRAND, windows["contig"], windows["start"], windows["end"]) & np.uint64(1)
    return np.stack([coin == 0, coin == 1], axis=1)


def cut_shards(
    request: SpeciesRequest, contigs: list[str], windows: np.ndarray, strands: np.ndarray
) -> list[ShardPlan]:
    """Shuffle each split's windows by the seed and cut them into tars of at most `--shard-bytes`.

    A window's strands stay together, so that one reading of the genome serves both; a window larger than a shard
    has one to itself.
    """
    options = request.options
    order = hash_rows(options.seed, _SHUFFLE, windows["contig"], windows["start"], windows["end"], windows["split"])
    shards = []
    for number, split in enumerate(SPLITS):
        rows = np.flatnonzero(windows["split"] == number)
        rows = rows[np.argsort(order[rows], kind="stable")]
        sizes = np.cumsum(_tar_bytes(request, split, contigs, windows[rows]) * strands[rows].sum(axis=1))
        first = 0
        while first < len(rows):
            before = sizes[first - 1] if first else 0
            last = int(np.searchsorted(sizes, before + options.shard_bytes - len(END), side="right"))
            last = max(last, first + 1)
            name = shard_name(split, sum(shard.split == split for shard in shards))
            shards.append(ShardPlan(split, name, rows[first:last], int(sizes[last - 1] - before) + len(END)))
            first = last
    return shards


def _tar_bytes(request: SpeciesRequest, split: str, contigs: list[str], windows: np.ndarray) -> np.ndarray:
    """Bytes of each window's sample on one strand, (n,) int64."""
    start, end, pad = (windows[key].astype(np.int64) for key in ("start", "end", "pad"))
    json_bytes = np.empty(len(windows), dtype=np.int64)
    for contig in np.unique(windows["contig"]):
        of_contig = windows["contig"] == contig
        text = SampleJson(request.name, request.assembly, contigs[contig], split)
        json_bytes[of_contig] = text.size(start[of_contig], end[of_contig], pad[of_contig])
    return member_size(end - start + pad) + member_size(json_bytes)


def contig_keys(contigs: Mapping[str, int]) -> list[str]:
    """A short name for keys per contig, unique within the species: letters, digits and '_' only."""
    taken: set[str] = set()
    keys = []
    for name in contigs:
        base = key = re.sub(r"[^A-Za-z0-9_]", "_", name)[:_KEY_NAME_CHARACTERS]
        copies = 1
        while key in taken:
            copies += 1
            key = f"{base}_{copies}"
        taken.add(key)
        keys.append(key)
    return keys


def report(
    selection: Selection, regions: Regions, scans: Mapping[str, Scan], planned: list[ContigWindows]
) -> dict[str, Any]:
    """Where every base of the genome file went: `kept` and all of `dropped` add up to `bases`."""
    total = sum((scan.composition for scan in scans.values()), Composition())
    dropped = {reason: sum(contig.dropped[reason] for contig in planned) for reason in DROPPED}
    dropped["left_out_contigs"] = sum(sum(contigs.values()) for contigs in selection.left_out.values())
    splits = {}
    for number, split in enumerate(SPLITS):
        of_split = [contig.windows[contig.windows["split"] == number] for contig in planned]
        bases = sum(size(footprint(table)) for table in of_split)
        splits[split] = {"windows": sum(map(len, of_split)), "bases": bases}
    return {
        "bases": total.bases,
        "acgt": total.acgt,
        "n": total.n,
        "lower": total.lower,
        "gc": total.gc,
        "kept": sum(contig.kept for contig in planned),
        "dropped": dropped,
        "low_acgt_windows": sum(contig.low_acgt_windows for contig in planned),
        "splits": splits,
        "leakage": {key: sum(contig.leaked[key] for contig in planned) for key in ("valid", "test", "either")},
        "notes": regions.notes,
        "left_out": {
            kind: {"contigs": len(contigs), "bases": sum(contigs.values()), "names": list(contigs)[:20]}
            for kind, contigs in selection.left_out.items()
        },
    }


def _require_windows(
    windows: np.ndarray, selection: Selection, regions: Regions, planned: list[ContigWindows], options: PlanOptions
) -> None:
    if len(windows) == 0:
        poor = sum(contig.low_acgt_windows for contig in planned)
        if poor:
            raise UserError(f"all {poor:,} windows have less than {options.min_acgt:.0%} ACGT; lower --min-acgt")
        longest = max(selection.used.values())
        raise UserError(
            f"no window: no segment is as long as the shortest window, {options.min_window:,} bases "
            f"(the longest contig has {longest:,}); lower --min-window"
        )
    for number, split in enumerate(SPLITS):
        fraction = {"valid": options.valid_fraction, "test": options.test_fraction}.get(split, 0)
        asked = fraction or any(len(of_contig.get(split, ())) for of_contig in regions.splits.values())
        if asked and not (windows["split"] == number).any():
            raise UserError(f"the {split} split gives no window; choose other contigs, intervals or blocks for it")
