"""Uses the demo's model: a map of windows by their embeddings, and scores of the substitutions in an exon."""

import csv
import gzip
from pathlib import Path

import matplotlib
import numpy as np

from data_prep.genome.genome import open_genome

matplotlib.use("Agg")
from matplotlib import pyplot as plt

WINDOW = 256
"""Bases of a window on the map."""
PLACES = 60
"""Number of the exon's bases whose substitutions are scored."""
KINDS = {"coding": "tab:orange", "repeat": "tab:blue", "neither": "tab:gray"}
_MOST = 150
"""Largest number of windows per kind."""
_MOSTLY, _HARDLY = 0.7, 0.05
"""A window is of a kind from the first share of its bases on, and not of it up to the second."""


def coding_intervals(annotation: Path) -> list[tuple[int, int]]:
    """The coding stretches [start, end) in a GTF of one contig."""
    with gzip.open(annotation, "rt") as file:
        rows = (line.split("\t") for line in file if not line.startswith("#"))
        return sorted({(int(row[3]) - 1, int(row[4])) for row in rows if row[2] == "CDS"})


def write_places(genome: Path, annotation: Path, folder: Path) -> tuple[Path, Path]:
    """Write BED files for a genome of one contig: windows, named by their kind, and a stretch of an exon.

    Repeats are lower-case bases, coding bases are those of the annotation; mixed windows, and windows with gaps, are
    left out.
    """
    opened = open_genome(genome)
    ((contig, length),) = opened.contigs.items()
    text = np.frombuffer(opened.read(contig, 0, length), np.uint8)
    coding = np.zeros(length, dtype=bool)
    intervals = coding_intervals(annotation)
    for start, end in intervals:
        coding[start:end] = True
    known = np.isin(text, np.frombuffer(b"ACGTacgt", np.uint8))
    of_coding, of_repeat, of_known = (_shares(marked) for marked in (coding, text >= ord("a"), known))
    found = [
        ("coding", (of_coding >= _MOSTLY) & (of_repeat <= _HARDLY)),
        ("repeat", (of_repeat >= _MOSTLY) & (of_coding <= _HARDLY)),
        ("neither", (of_coding <= _HARDLY) & (of_repeat <= _HARDLY)),
    ]
    rng, lines = np.random.default_rng(0), []
    for kind, of_kind in found:
        rows = np.flatnonzero(of_kind & (of_known == 1))
        for row in np.sort(rng.permutation(rows)[:_MOST]):
            lines.append(f"{contig}\t{row * WINDOW}\t{(row + 1) * WINDOW}\t{kind}\n")
    windows, places = folder / "windows.bed", folder / "exon.bed"
    windows.write_text("".join(lines))
    start, end = max(intervals, key=lambda interval: interval[1] - interval[0])
    first = (start + end - PLACES) // 2
    places.write_text(f"{contig}\t{first}\t{first + PLACES}\n")
    return windows, places


def _shares(marked: np.ndarray) -> np.ndarray:
    """The share of marked bases in each whole window."""
    return marked[: len(marked) // WINDOW * WINDOW].reshape(-1, WINDOW).mean(1)


def principal_components(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first two principal components (n, 2) of standardised vectors (n, D), and their shares of the variance."""
    spread = vectors.std(0)
    centred = (vectors - vectors.mean(0)) / np.where(spread > 0, spread, 1)
    left, sizes, _ = np.linalg.svd(centred, full_matrices=False)
    return left[:, :2] * sizes[:2], sizes[:2] ** 2 / (sizes**2).sum()


def plot_use(embeddings: Path, scores: Path, path: Path) -> None:
    """Draw windows (`embeddings`: an .npz of `embed`) and substitutions (`scores`: a .tsv of `variants`) side
    by side.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5), layout="constrained", width_ratios=[2, 3])
    with np.load(embeddings) as found:
        names, vectors = found["names"], found["embeddings"]
    points, shares = principal_components(vectors)
    for kind, colour in KINDS.items():
        mine = names == kind
        left.scatter(*points[mine].T, s=12, color=colour, alpha=0.7, linewidths=0, label=f"{kind} ({mine.sum()})")
    left.set_xlabel(f"first principal component ({shares[0]:.0%} of the variance)")
    left.set_ylabel(f"second ({shares[1]:.0%})")
    left.set_title(f"Mean embeddings of windows of {WINDOW} bases\nof a species that the training never saw")
    left.legend(frameon=False)
    _draw_substitutions(right, scores)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_substitutions(axes: plt.Axes, scores: Path) -> None:
    with scores.open() as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    first = int(rows[0]["pos"])
    ratios = np.full((4, PLACES), np.nan)
    reference = {}
    for row in rows:
        place = int(row["pos"]) - first
        ratios["ACGT".index(row["alt"]), place] = float(row["llr"])
        reference[place] = row["ref"]
    most = np.nanmax(np.abs(ratios))
    image = axes.imshow(ratios, cmap="RdBu", vmin=-most, vmax=most, aspect="auto", interpolation="nearest")
    for place, base in reference.items():
        axes.text(place, "ACGT".index(base), base, ha="center", va="center", fontsize=7, color="grey")
    axes.set_yticks(range(4), list("ACGT"))
    axes.set_xlabel(f"place in the exon, from {rows[0]['chrom']}:{first:,}")
    axes.set_title("Every substitution in a stretch of an exon: log p(ALT) - log p(REF)\nred: less likely to the model")
    axes.figure.colorbar(image, ax=axes, shrink=0.8)
