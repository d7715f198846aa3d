"""Plans a species: from genome and options to the windows of each shard, in order."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from caduceus.data.format import SPLITS, shard_name
from caduceus.errors import UserError
from data_prep.genome.genome import Genome
from data_prep.plan.aliases import AliasTable, read_aliases
from data_prep.plan.composition import Composition, Scan
from data_prep.plan.contigs import Selection, alias_notes, describe_left_out, refuse_small_share, select_contigs
from data_prep.plan.options import PlanOptions
from data_prep.plan.regions import Regions, build_regions
from data_prep.plan.windows import GenomeWindows, cut_windows, hash_rows
from data_prep.tar_format import END, SampleJson, json_sizes, member_size

_KEY_NAME_CHARACTERS = 24
_SHUFFLE, _STRAND = 1, 2  # the purpose of a hash


@dataclass(frozen=True)
class SpeciesRequest:
    """What the user asks for: a species, and where its genome is."""

    name: str
    fasta: Path
    assembly: str
    options: PlanOptions
    weight: float = 1.0
    """Share in the mixture, relative to the other species."""
    weight_exponent: float | None = None
    """With an exponent a, the weight is multiplied by (bases of train)^a."""
    cache_dir: Path | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,31}", self.name):
            raise UserError(f"species '{self.name}': use up to 32 letters, digits, '_' and '-', as it names a folder")


@dataclass(frozen=True)
class ShardPlan:
    """A tar to write: the rows of the plan's windows in stored order, and the tar's size in bytes."""

    split: str
    name: str
    rows: np.ndarray
    size: int


@dataclass(frozen=True)
class SpeciesPlan:
    """Everything about a species except its bytes. `strands` (windows, 2) bool: whether + and - are stored."""

    request: SpeciesRequest
    contigs: dict[str, int]
    contig_keys: list[str]
    windows: np.ndarray  # PLANNED_DTYPE, in genome order
    strands: np.ndarray
    shards: list[ShardPlan]
    report: dict[str, Any]


def identity(request: SpeciesRequest, genome: Genome) -> dict[str, Any]:
    """The plain values that decide the bytes of a species: with other values it is another dataset."""
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


def plan_species(
    request: SpeciesRequest, genome: Genome, scans: Mapping[str, Scan], near: Mapping[str, np.ndarray] | None = None
) -> SpeciesPlan:
    """Plan the shards of a species; `scans`: the scan of every contig of the genome.

    `near`: by contig, the stretches of train that are near copies of held-out sequence, rows of `NEAR_DTYPE`. Raises
    `UserError` where there is no window.
    """
    options = request.options
    aliases = read_aliases(Path(options.aliases)) if options.aliases else AliasTable()
    selection = select_contigs(genome.contigs, genome.descriptions, options, aliases)
    notes = alias_notes(aliases, selection, options)
    refuse_small_share(selection, options)
    regions = build_regions(selection, options)
    at_level = None if near is None else regions.leave_out(near, options.homology or 1.0)
    planned = cut_windows(
        list(selection.used.values()),
        [regions.splits[name] for name in selection.used],
        [regions.excluded[name] for name in selection.used],
        [scans[name] for name in selection.used],
        options,
    )
    _require_windows(selection, regions, planned, options)
    return assembled(
        request,
        contigs=selection.used,
        windows=planned.windows,
        report=account(selection, regions, scans, planned, [*genome.notes, *notes])
        | ({} if at_level is None else {"near_copies": at_level}),
    )


def assembled(
    request: SpeciesRequest, contigs: dict[str, int], windows: np.ndarray, report: dict[str, Any]
) -> SpeciesPlan:
    """The plan that follows from a species' windows (PLANNED_DTYPE, in genome order) on its contigs."""
    strands = choose_strands(windows, request.options)
    return SpeciesPlan(
        request=request,
        contigs=contigs,
        contig_keys=contig_keys(contigs),
        windows=windows,
        strands=strands,
        shards=cut_shards(request, list(contigs), windows, strands),
        report=report,
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
    """Shuffle each split's windows with the seed, and divide them into tars of at most `--shard-bytes`.

    A window's strands stay together, so that the genome is read once for both; a window larger than a shard gets a
    shard of its own.
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
    used, number = np.unique(windows["contig"], return_inverse=True)
    fixed = [SampleJson(request.name, request.assembly, contigs[row], split).fixed_bytes for row in used]
    json_bytes = json_sizes(np.array(fixed, dtype=np.int64)[number], start, end, pad)
    return member_size(end - start + pad) + member_size(json_bytes)


def contig_keys(contigs: Mapping[str, int]) -> list[str]:
    """A short name of each contig for keys, unique within the species, of letters, digits and '_' only."""
    taken: set[str] = set()
    copies: dict[str, int] = {}
    keys = []
    for name in contigs:
        base = key = re.sub(r"[^A-Za-z0-9_]", "_", name)[:_KEY_NAME_CHARACTERS]
        while key in taken:
            copies[base] = copies.get(base, 1) + 1
            key = f"{base}_{copies[base]}"
        taken.add(key)
        keys.append(key)
    return keys


def account(
    selection: Selection,
    regions: Regions,
    scans: Mapping[str, Scan],
    planned: GenomeWindows,
    notes: list[str],
) -> dict[str, Any]:
    """What became of every base of the genome file: `kept` and all of `dropped` add up to `bases`."""
    total = sum((scan.composition for scan in scans.values()), Composition())
    dropped = dict(planned.dropped)
    dropped["left_out_contigs"] = sum(sum(contigs.values()) for contigs in selection.left_out.values())
    counts = np.bincount(planned.windows["split"], minlength=len(SPLITS)).tolist()
    splits = {
        split: {"windows": windows, "bases": planned.split_bases[split]}
        for split, windows in zip(SPLITS, counts, strict=True)
    }
    return {
        "bases": total.bases,
        "acgt": total.acgt,
        "n": total.n,
        "lower": total.lower,
        "gc": total.gc,
        "kept": planned.kept,
        "dropped": dropped,
        "low_acgt_windows": planned.low_acgt_windows,
        "splits": splits,
        "leakage": planned.leaked,
        "notes": notes + regions.notes,
        "left_out": describe_left_out(selection),
    }


def _require_windows(selection: Selection, regions: Regions, planned: GenomeWindows, options: PlanOptions) -> None:
    if len(planned.windows) == 0:
        poor = planned.low_acgt_windows
        if poor:
            raise UserError(f"all {poor:,} windows have less than {options.min_acgt:.0%} ACGT; lower --min-acgt")
        longest = max(selection.used.values())
        raise UserError(
            f"no window: every segment is shorter than the shortest window, {options.min_window:,} bases (the longest "
            f"contig has {longest:,}); lower --min-window"
        )
    for number, split in enumerate(SPLITS):
        fraction = {"valid": options.valid_fraction, "test": options.test_fraction}.get(split, 0)
        asked = fraction or any(len(of_contig.get(split, ())) for of_contig in regions.splits.values())
        if asked and not (planned.windows["split"] == number).any():
            raise UserError(f"the {split} split gives no window; choose other contigs, intervals or blocks for it")
