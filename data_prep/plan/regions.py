"""Which bases of each contig belong to which split, before they are cut into windows."""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from caduceus.data.shards import SPLITS
from caduceus.errors import UserError
from data_prep.plan.bed import BedRow, read_bed
from data_prep.plan.contigs import Selection
from data_prep.plan.intervals import EMPTY, intersection, union
from data_prep.plan.options import PlanOptions, option_name
from data_prep.plan.windows import hash_rows

_BLOCK = 3  # what the hash is for


@dataclass
class Regions:
    """Per used contig: `splits`, each split's intervals as given (rows may overlap), and the `excluded` set.

    `notes` count what was given but cannot be used.
    """

    splits: dict[str, dict[str, np.ndarray]]
    excluded: dict[str, np.ndarray]
    notes: list[str] = field(default_factory=list)


def build_regions(selection: Selection, options: PlanOptions) -> Regions:
    """The regions that the options ask for: whole contigs or the rows of `--intervals`, split as they say."""
    notes: list[str] = []
    whole = {name: np.array([[0, length]], dtype=np.int64) for name, length in selection.used.items()}
    if options.intervals is None:
        splits = split_regions(whole, selection, options)
    else:
        splits = interval_regions(Path(options.intervals), selection, options, notes)
    excluded = dict.fromkeys(whole, EMPTY)
    for path in options.exclude_bed:
        for name, rows in _rows_by_contig(Path(path), read_bed(Path(path)), selection, "--exclude-bed", notes).items():
            # A row may end beyond its contig where the genome is a part of the assembly that the list is for.
            bounds = np.array([[row.start, row.end] for row in rows], dtype=np.int64)
            excluded[name] = union(np.concatenate([excluded[name], np.minimum(bounds, selection.used[name])]))
    return Regions(splits, excluded, notes)


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
    rows = read_bed(path)
    by_contig = _rows_by_contig(path, rows, selection, "--intervals", notes)
    for name, of_contig in by_contig.items():
        for row in of_contig:
            if row.end > selection.used[name]:
                raise UserError(
                    f"{path}:{row.line}: ends at {row.end:,}, beyond {name} with {selection.used[name]:,} bases; "
                    "is it for another assembly?"
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
        raise UserError(f"{path} names splits in column 4; leave out the other options that make splits")
    return {
        name: {
            split: _bounds([row for row in by_contig.get(name, []) if row.name == split])
            for split in SPLITS
        }
        for name in selection.used
    }  # fmt: skip


def _rows_by_contig(
    path: Path, rows: list[BedRow], selection: Selection, option: str, notes: list[str]
) -> dict[str, list[BedRow]]:
    found: dict[str, list[BedRow]] = {}
    unused: dict[str, int] = {}
    names: dict[str, str | None] = {}
    for row in rows:
        if row.contig not in names:
            names[row.contig] = selection.find(row.contig)
        name = names[row.contig]
        if name is None:
            unused[row.contig] = unused.get(row.contig, 0) + 1
        else:
            found.setdefault(name, []).append(row)
    if not found:
        raise UserError(
            f"{option}: none of the contigs in {path} ({', '.join(list(unused)[:3])}, …) is used here "
            f"({', '.join(list(selection.used)[:3])}, …); --aliases takes a table of names"
        )
    if unused:
        shown = ", ".join(list(unused)[:4]) + (", …" if len(unused) > 4 else "")
        notes.append(f"{option}: {sum(unused.values())} of {len(rows)} rows are on contigs that are not used: {shown}")
    return found


def _bounds(rows: list[BedRow]) -> np.ndarray:
    return np.array([[row.start, row.end] for row in rows], dtype=np.int64).reshape(-1, 2)


def _split_by_blocks(name: str, length: int, rows: np.ndarray, options: PlanOptions) -> dict[str, np.ndarray]:
    """Blocks of `--split-block` bases from the contig's start; a hash of name and number says each one's split."""
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
