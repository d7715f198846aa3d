"""Decides which bases of each contig belong to which split, before they are cut into windows."""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import numpy as np

from caduceus.bed import Bed, BedRow, read_bed
from caduceus.data.format import SPLITS
from caduceus.errors import UserError
from caduceus.tables import refuse_line
from data_prep.plan.annotation import read_genes
from data_prep.plan.contigs import Selection
from data_prep.plan.homology import LEVELS, copies
from data_prep.plan.intervals import EMPTY, difference, intersection, size, union
from data_prep.plan.options import PlanOptions, option_name
from data_prep.plan.windows import hash_rows

_BLOCK = 3  # the purpose of a hash


@dataclass
class Regions:
    """The regions of each used contig.

    `splits`: each split's intervals as given (rows may overlap); `excluded`: a set. `notes` count what was given but
    cannot be used.
    """

    splits: dict[str, dict[str, np.ndarray]]
    excluded: dict[str, np.ndarray]
    notes: list[str] = field(default_factory=list)

    def leave_out(self, near: Mapping[str, np.ndarray], share: float) -> dict[str, int]:
        """Remove stretches from train, by contig (`NEAR_DTYPE`), with at least the share `share` of their k-mers in
        held-out sequence.

        A note says how many bases that is. Returns the number of near bases at each of `LEVELS`, by the level's name.
        """
        bases, at_level = 0, dict.fromkeys(map(str, LEVELS), 0)
        for name, stretches in near.items():
            of_contig = self.splits[name]
            held_out = union(np.concatenate([EMPTY, *(rows for split, rows in of_contig.items() if split != "train")]))
            left_out = difference(copies(stretches, share), held_out)
            self.excluded[name] = union(np.concatenate([self.excluded[name], left_out]))
            bases += size(left_out)
            for level in LEVELS:
                at_level[str(level)] += size(difference(copies(stretches, level), held_out))
        self.notes.append(f"--homology: {bases:,} bp of train are near copies of valid or test, and left out of it")
        return at_level


def build_regions(selection: Selection, options: PlanOptions) -> Regions:
    """The regions that the options ask for: whole contigs, genes, or the rows of `--intervals`, divided into splits."""
    notes: list[str] = []
    whole = {name: np.array([[0, length]], dtype=np.int64) for name, length in selection.used.items()}
    if options.around is not None:
        splits = split_regions(regions_around_genes(selection, options, notes), selection, options)
    elif options.intervals is None:
        splits = split_regions(whole, selection, options)
    else:
        splits = interval_regions(Path(options.intervals), selection, options, notes)
    excluded = dict.fromkeys(whole, EMPTY)
    for path in map(Path, options.exclude_bed):
        for name, bases in excluded_bases(path, selection, options, notes).items():
            excluded[name] = union(np.concatenate([excluded[name], bases]))
    return Regions(splits, excluded, notes)


def excluded_bases(path: Path, selection: Selection, options: PlanOptions, notes: list[str]) -> dict[str, np.ndarray]:
    """The rows of a BED file of excluded regions, by used contig, (n, 2), cut off at the contigs' ends."""
    bed = read_bed(path)
    if not bed.rows:
        notes.append(f"--exclude-bed: {path.name} holds no interval: nothing is excluded by it")
    excluded: dict[str, np.ndarray] = {}
    for name, rows in _rows_by_contig(bed, selection, options, "--exclude-bed", notes).items():
        length = selection.used[name]
        excluded[name] = np.minimum(_bounds(rows), length)
        cut = sum(row.end > length for row in rows)
        if cut:
            notes.append(f"--exclude-bed: {cut} of {len(bed.rows)} rows of {path.name} reach beyond the end of {name}")
    return excluded


def regions_around_genes(selection: Selection, options: PlanOptions, notes: list[str]) -> dict[str, np.ndarray]:
    """The genes of `--around` with their flanks, by used contig, as a set (n, 2)."""
    bed, kind = read_genes(Path(str(options.around)))
    by_contig = _rows_by_contig(bed, selection, options, "--around", notes)
    if not by_contig:
        raise _none_used("--around", bed, selection)
    regions = dict.fromkeys(selection.used, EMPTY)
    for name, rows in by_contig.items():
        length = selection.used[name]
        for row in rows:
            if row.end > length:
                refuse_line(
                    bed.path,
                    row.line,
                    f"ends at {row.end:,}, beyond {name} with {length:,} bases; it may be for another assembly",
                )
        regions[name] = union(np.clip(_bounds(rows) + [-options.flank, options.flank], 0, length))
    notes.append(f"--around: {sum(map(len, by_contig.values())):,} {kind} of {bed.path.name}")
    return regions


def split_regions(
    regions: Mapping[str, np.ndarray], selection: Selection, options: PlanOptions
) -> dict[str, dict[str, np.ndarray]]:
    """Split each contig's rows by the contig's name, or by hashed blocks."""
    if options.split_block is not None:
        return {name: _split_by_blocks(name, selection.used[name], rows, options) for name, rows in regions.items()}
    held_out = splits_by_contig(selection, options)
    return {name: {held_out.get(name, "train"): rows} for name, rows in regions.items()}


def splits_by_contig(selection: Selection, options: PlanOptions) -> dict[str, str]:
    """Contig -> split, for the contigs that `--valid-contigs` and `--test-contigs` name."""
    splits: dict[str, str] = {}
    for split in ("valid", "test"):
        key = f"{split}_contigs"
        for name in getattr(options, key):
            found = selection.find(name)
            if found is None:
                raise UserError(f"{option_name(key)}: {_why_absent(name, selection)}")
            if splits.setdefault(found, split) != split:
                raise UserError(f"--valid-contigs and --test-contigs both name {found}; choose one split")
    return splits


def interval_regions(
    path: Path, selection: Selection, options: PlanOptions, notes: list[str]
) -> dict[str, dict[str, np.ndarray]]:
    """The rows of a BED file, split by its fourth column where it has one."""
    bed = read_bed(path)
    if not bed.rows:
        raise UserError(f"--intervals: {path} holds no interval, so there is nothing to use; leave the option out")
    rows = bed.rows
    by_contig = _rows_by_contig(bed, selection, options, "--intervals", notes)
    if not by_contig:
        raise _none_used("--intervals", bed, selection)
    for name, of_contig in by_contig.items():
        for row in of_contig:
            if row.end > selection.used[name]:
                raise UserError(
                    f"{path}:{row.line}: ends at {row.end:,}, beyond {name} with {selection.used[name]:,} bases; "
                    "it may be for another assembly"
                )
            if options.interval_mode != "tile" and row.end - row.start > options.window:
                raise UserError(
                    f"{path}:{row.line}: has {row.end - row.start:,} bases, and no window is longer than --window "
                    f"{options.window:,}; raise that, or cut rows with --interval-mode tile"
                )
    named = [row for row in rows if row.name is not None]
    if not named:
        bounds = {name: _bounds(of_contig) for name, of_contig in by_contig.items()}
        return split_regions({name: bounds.get(name, EMPTY) for name in selection.used}, selection, options)
    if len(named) < len(rows):
        line = next(row.line for row in rows if row.name is None)
        raise UserError(f"{path}:{line}: has no split in column 4, but line {named[0].line} has")
    for row in rows:
        if row.name not in SPLITS:
            raise UserError(f"{path}:{row.line}: column 4 must be train, valid or test, got '{row.name}'")
    if options.valid_contigs or options.test_contigs or options.split_block is not None:
        raise UserError(f"{path} names splits in column 4; leave out the options that make splits")
    return {
        name: {
            split: _bounds([row for row in by_contig.get(name, []) if row.name == split])
            for split in SPLITS
        }
        for name in selection.used
    }  # fmt: skip


def _none_used(option: str, bed: Bed, selection: Selection) -> UserError:
    named = _some({row.contig: 1 for row in bed.rows}, 3)
    return UserError(
        f"{option}: none of the contigs in {bed.path} ({named}) is used here ({_some(selection.used, 3)}); --aliases "
        "takes a table of names"
    )


def _rows_by_contig(
    bed: Bed, selection: Selection, options: PlanOptions, option: str, notes: list[str]
) -> dict[str, list[BedRow]]:
    """The rows on each used contig. Raises `UserError` for a row on an unknown contig, or beyond the end of one."""
    found: dict[str, list[BedRow]] = {}
    unused: dict[str, int] = {}
    unknown: dict[str, int] = {}
    names = {contig: selection.find(contig) for contig in dict.fromkeys(row.contig for row in bed.rows)}
    left_out = {contig for contig, name in names.items() if name is None and selection.knows(contig)}
    for row in bed.rows:
        name = names[row.contig]
        if name is not None and row.start < selection.used[name]:
            found.setdefault(name, []).append(row)
        elif row.contig in left_out:
            unused[row.contig] = unused.get(row.contig, 0) + 1
        elif options.allow_unknown_contigs:
            unknown[row.contig] = unknown.get(row.contig, 0) + 1
        else:
            _refuse_unknown(bed.path, row, selection)
    for rows, where in ((unused, "on contigs that are not used"), (unknown, "on places that the genome does not hold")):
        if rows:
            notes.append(f"{option}: {sum(rows.values())} of {len(bed.rows)} rows are {where}: {_some(rows, 4)}")
    if bed.empty_rows:
        count, lines = len(bed.empty_rows), _some(dict.fromkeys(map(str, bed.empty_rows)), 4)
        notes.append(f"{option}: {count} rows of {bed.path.name} are of zero length: lines {lines}")
    return found


def _refuse_unknown(path: Path, row: BedRow, selection: Selection) -> NoReturn:
    name = selection.find(row.contig)
    if name is None:
        known = _some(selection.used, 3)
        message = f"the genome has no contig '{row.contig}', but {known}; --aliases takes a table of names"
    else:
        message = f"starts at {row.start:,}, beyond the end of {name} with {selection.used[name]:,} bases"
    refuse_line(path, row.line, f"{message}; --allow-unknown-contigs passes over such rows")


def _some(names: Mapping[str, object], count: int) -> str:
    return ", ".join(list(names)[:count]) + (", …" if len(names) > count else "")


def _bounds(rows: list[BedRow]) -> np.ndarray:
    return np.array([[row.start, row.end] for row in rows], dtype=np.int64).reshape(-1, 2)


def _split_by_blocks(name: str, length: int, rows: np.ndarray, options: PlanOptions) -> dict[str, np.ndarray]:
    """Blocks of `--split-block` bases from the contig's start; a hash of name and number decides each block's split."""
    starts = np.arange(0, length, options.split_block, dtype=np.int64)
    blocks = np.stack([starts, np.minimum(starts + options.split_block, length)], axis=1)
    contig = np.full(len(starts), zlib.crc32(name.encode()), dtype=np.uint64)
    uniform = hash_rows(options.seed, _BLOCK, contig, np.arange(len(starts))) / 2.0**64
    valid, held_out = options.valid_fraction, options.valid_fraction + options.test_fraction
    split = np.where(uniform < valid, "valid", np.where(uniform < held_out, "test", "train"))
    return {each: intersection(union(rows), union(blocks[split == each])) for each in SPLITS}


def _why_absent(name: str, selection: Selection) -> str:
    kind = selection.kind_of_left_out(name)
    if kind is not None:
        return f"contig {name} is left out ({kind}); name it in --include to use it"
    known = list(selection.used)
    shown = ", ".join(known[:8]) + (f", … ({len(known)} in all)" if len(known) > 8 else "")
    return f"no contig '{name}'; the genome has {shown}"
