"""Loss weights of the regions that `data.weights_bed` names. Imports no torch."""

import itertools
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np

from caduceus.bed import BedRow, read_bed
from caduceus.data.crops import CropTable
from caduceus.data.split_sources import Source, SplitSources
from caduceus.errors import UserError
from caduceus.files import sha256_of
from caduceus.tables import refuse_line

log = logging.getLogger(__name__)
_Regions = dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]]
"""By contig's number: starts, ends and weights, sorted."""


class RegionWeights:
    """Weights of the bases of crops, by their places in the genome. Attribute: `fingerprint`, {species: sha256 of its
    file}.
    """

    def __init__(self, split_sources: SplitSources, weights_bed: Any, elsewhere: float) -> None:
        self._crops: CropTable = split_sources.crops
        self._elsewhere = np.float32(elsewhere)
        files = _files(weights_bed, [source.species for source in split_sources.sources])
        self._regions = [
            _regions(source, files.get(source.species), split_sources.split) for source in split_sources.sources
        ]
        for source, regions in zip(split_sources.sources, self._regions, strict=True):
            if regions and not any(_counts(window, regions, elsewhere) for window in source.table.rows):
                raise UserError(
                    f"data.weights_bed: all bases of species '{source.species}' in the split '{split_sources.split}' "
                    "have weight 0, so that none counts; choose a weight above 0 for some, or data.weights_elsewhere"
                )
        self.fingerprint = {species: sha256_of(path) for species, path in files.items()}

    def of(self, samples: np.ndarray) -> np.ndarray:
        """Weights (B, seq_len) float32 of samples (B,) SAMPLE_DTYPE, along the strands that they show."""
        weights = np.ones((len(samples), self._crops.seq_len), np.float32)
        for row, sample in enumerate(samples):
            source = int(self._crops.source_of(sample["window"]))
            if self._regions[source]:
                forward = self._of_sample(sample, self._regions[source])
                weights[row] = forward[::-1] if sample["strand"] == 1 else forward
        return weights

    def _of_sample(self, sample: np.void, regions: _Regions) -> np.ndarray:
        """Weights of all positions of a sample on the forward strand, (seq_len,) float32."""
        weights = np.full(self._crops.seq_len, self._elsewhere)
        pieces = self._crops.pieces(int(sample["window"]), int(sample["begin"]))
        for window, begin, offset, length in zip(*(values.tolist() for values in pieces), strict=True):
            of_window = self._crops.windows[window]
            if int(of_window["contig"]) not in regions:
                continue
            starts, ends, values = regions[int(of_window["contig"])]
            left = int(of_window["start"]) + begin
            for row in range(np.searchsorted(ends, left, "right"), np.searchsorted(starts, left + length, "left")):
                here = slice(offset + max(starts[row] - left, 0), offset + min(ends[row] - left, length))
                weights[here] = values[row]
        return weights


def _files(given: Any, species: list[str]) -> dict[str, Path]:
    """The BED file of each species that has one."""
    if isinstance(given, str):
        if len(species) > 1:
            raise UserError(
                f"data.weights_bed: one file, but {len(species)} species ({', '.join(species[:4])}); give {{species: "
                "file}"
            )
        return {species[0]: Path(given)}
    if not isinstance(given, dict) or not all(isinstance(path, str) for path in given.values()):
        raise UserError(f"data.weights_bed: expected a BED file, or {{species: file}}; got {given!r}")
    for name in given:
        if name not in species:
            raise UserError(f"data.weights_bed: no species '{name}' in data.path; there are {', '.join(species)}")
    return {name: Path(path) for name, path in given.items()}


def _regions(source: Source, path: Path | None, split: str) -> _Regions:
    """A species' regions. How many rows are on contigs that its shards do not have is told with the split of train."""
    if path is None:
        return {}
    numbers = {name: number for number, name in enumerate(source.table.contigs)}
    by_contig: dict[int, list[tuple[BedRow, float]]] = {}
    unused: dict[str, int] = {}
    rows = read_bed(path).rows
    for row in rows:
        number, weight = numbers.get(row.contig), _weight(path, row)
        if number is None:
            unused[row.contig] = unused.get(row.contig, 0) + 1
            continue
        length = source.table.contig_lengths[number]
        if row.end > length:
            what = f"ends at {row.end:,}, beyond {row.contig} with {length:,} bases"
            refuse_line(path, row.line, f"{what}; it may be for another assembly")
        by_contig.setdefault(number, []).append((row, weight))
    if not by_contig:
        raise UserError(
            f"data.weights_bed: {path} names no contig of {source.species}, which has "
            f"{', '.join(source.table.contigs[:3])}, …"
        )
    if unused and split == "train":
        shown = ", ".join(list(unused)[:4]) + (", …" if len(unused) > 4 else "")
        count = f"{sum(unused.values()):,} of {len(rows):,} rows"
        log.warning("data.weights_bed: %s of %s are on contigs that %s lacks: %s", count, path, source.species, shown)
    return {contig: _sorted(path, of_contig) for contig, of_contig in by_contig.items()}


def _counts(window: np.void, regions: _Regions, elsewhere: float) -> bool:
    """Whether any base of a window has a weight above 0."""
    first = int(window["start"])
    last = first + int(window["length"])
    if int(window["contig"]) not in regions:
        return elsewhere > 0
    starts, ends, values = regions[int(window["contig"])]
    here = slice(np.searchsorted(ends, first, "right"), np.searchsorted(starts, last, "left"))
    in_regions = int((np.minimum(ends[here], last) - np.maximum(starts[here], first)).sum())
    return bool((values[here] > 0).any()) or (elsewhere > 0 and in_regions < last - first)


def _sorted(path: Path, rows: list[tuple[BedRow, float]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rows.sort(key=lambda pair: pair[0].start)
    for (before, _), (row, _) in itertools.pairwise(rows):
        if row.start < before.end:
            refuse_line(
                path,
                row.line,
                f"overlaps line {before.line}, so two weights are given for the same bases; let regions not overlap",
            )
    starts, ends = (np.array([getattr(row, name) for row, _ in rows], np.int64) for name in ("start", "end"))
    return starts, ends, np.array([weight for _, weight in rows], np.float32)


def _weight(path: Path, row: BedRow) -> float:
    try:
        weight = float(row.name or "")
    except ValueError:
        weight = -1.0
    if not 0 <= weight < math.inf:
        refuse_line(path, row.line, f"column 4 must be a weight, a number of at least 0; got {row.name or 'nothing'!r}")
    return weight
