"""Writes report.html: the content of a dataset as tables and pictures, in one file that needs no other."""

from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from caduceus.data.format import SPLITS, ShardIndex, index_path
from caduceus.files import write_atomically
from caduceus.page import page, table
from data_prep.plan.intervals import union
from data_prep.progress import format_amount
from data_prep.write.summary import left_out_lines, percent

_SHOWN_CONTIGS = 30
_WIDTH = 760
_LABEL = 130
_ROW = 14
_REASONS = {
    "left_out_contigs": "contigs left out",
    "excluded": "excluded regions",
    "gap": "runs of N",
    "outside_intervals": "outside intervals",
    "leakage": "kept out of train",
    "low_acgt": "too little ACGT",
    "between_windows": "between windows",
    "tail": "tails",
    "short": "too short",
}


def write_report(directory: Path, manifest: dict[str, Any]) -> None:
    """Write `report.html` beside the manifest that is about to be written."""
    species = manifest["species"]
    names = ", ".join(part["name"] for part in species[:4]) + (", …" if len(species) > 4 else "")
    title = f"Shards of {names}"
    parts = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{len(species)} species, fingerprint {manifest['fingerprint'][:16]}</p>",
        "<h2>Species</h2>",
        _species_table(species),
        "<h2>Where every base went</h2>",
        _legend(),
        *(_fate_bar(part) for part in species if part["report"]),
        _fate_table([part for part in species if part["report"]]),
        "<h2>Contigs left out</h2>",
        _left_out_table([part for part in species if part["report"]]),
        "<h2>Leakage</h2>",
        _leakage_table([part for part in species if part["report"]]),
        *_near_copies_table([part for part in species if (part["report"] or {}).get("near_copies")]),
        "<h2>Splits along the contigs</h2>",
        _legend(),
        *(_ideogram(directory / part["name"], part, opened=len(species) <= 8) for part in species),
    ]
    write_atomically(directory / "report.html", page(title, parts))


def _species_table(species: list[dict[str, Any]]) -> str:
    headings = ["species", "assembly", "bases", "N", "lower case", "GC", "kept", "weight"]
    headings += [f"{split} windows" for split in SPLITS] + ["shards", "size"]
    rows = []
    for part in species:
        report = part["report"]
        shards = [shard for split in part["splits"].values() for shard in split["shards"]]
        known = ["-"] * 5
        windows = ["-"] * len(SPLITS)
        if report:
            known = [
                f"{report['bases']:,}",
                percent(report["n"], report["bases"]),
                percent(report["lower"], report["bases"]),
                percent(report["gc"], report["acgt"]),
                percent(report["kept"], report["bases"]),
            ]
            windows = [f"{report['splits'][split]['windows']:,}" for split in SPLITS]
        size = format_amount(sum(shard["bytes"] for shard in shards), "B")
        rows.append([part["name"], part["assembly"], *known, f"{part['weight']:.4g}", *windows, len(shards), size])
    return table(headings, rows)


def _fate_table(species: list[dict[str, Any]]) -> str:
    used = [reason for reason in _REASONS if any(part["report"]["dropped"][reason] for part in species)]
    headings = ["bases", "genome", *SPLITS, "kept", *(_REASONS[reason] for reason in used)]
    rows = []
    for part in species:
        report = part["report"]
        of_split = [f"{report['splits'][split]['bases']:,}" for split in SPLITS]
        dropped = [f"{report['dropped'][reason]:,}" for reason in used]
        rows.append([part["name"], f"{report['bases']:,}", *of_split, f"{report['kept']:,}", *dropped])
    notes = [
        f"<li>{escape(part['name'])}: {escape(line)}</li>"
        for part in species
        for line in left_out_lines(part["report"])
    ]
    return table(headings, rows) + f"<ul>{''.join(notes)}</ul>"


def _left_out_table(species: list[dict[str, Any]]) -> str:
    rows = [
        [part["name"], kind, f"{group['contigs']:,}", f"{group['bases']:,}"]
        + [percent(group["bases"], part["report"]["bases"]), group.get("why", ""), ", ".join(group["names"][:6])]
        for part in species
        for kind, group in part["report"]["left_out"].items()
    ]
    if not rows:
        return "<p>none</p>"
    return table(["species", "kind", "contigs", "bases", "share", "why", "names"], rows)


def _leakage_table(species: list[dict[str, Any]]) -> str:
    rows = []
    for part in species:
        leaked, train = part["report"]["leakage"], part["report"]["splits"]["train"]["bases"]
        rows.append([part["name"], f"{train:,}", *(f"{leaked[key]:,}" for key in ("valid", "test", "either"))])
        rows[-1].append(percent(leaked["either"], train))
    headings = ["bases", "train", "also in valid", "also in test", "in either", "share of train"]
    return table(headings, rows)


def _near_copies_table(species: list[dict[str, Any]]) -> list[str]:
    """The table of `--homology`: bases of train, before any were left out, by the share of their k-mers in held-out
    sequence.
    """
    if not species:
        return []
    headings = [
        "bases near to valid or test",
        *(f"{float(level):.0%} alike" for level in species[0]["report"]["near_copies"]),
    ]
    rows = [[part["name"], *(f"{bases:,}" for bases in part["report"]["near_copies"].values())] for part in species]
    words = (
        "Bases of train, before near copies were left out, in stretches with at least this share of k-mers in common."
    )
    return [f"<h2>Near copies</h2><p>{words}</p>", table(headings, rows)]


def _fate_bar(part: dict[str, Any]) -> str:
    report = part["report"]
    kept = [(split, report["splits"][split]["bases"]) for split in SPLITS]
    shares = [(name, bases) for name, bases in (*kept, ("dropped", sum(report["dropped"].values()))) if bases]
    total = report["bases"]
    one_row = sum(bases for _, bases in shares) == total  # splits that overlap are drawn one below the other
    left, top, boxes = 0.0, 2, []
    for name, bases in shares:
        width = (_WIDTH - _LABEL) * bases / total
        title = f"<title>{name}: {bases:,} bp, {percent(bases, total)} of the genome</title>"
        boxes.append(_box(_LABEL + left, top, width, _ROW, name, title))
        left, top = (left + width, top) if one_row else (left, top + _ROW)
    label = _text(part["name"], 0, 13)
    height = _ROW * (1 if one_row else len(shares)) + 4
    return _picture(f"Where the bases of {part['name']} went; the table below has the numbers", height, [label, *boxes])


def _ideogram(folder: Path, part: dict[str, Any], *, opened: bool) -> str:
    contigs = sorted(enumerate(part["contigs"]), key=lambda item: -item[1]["length"])
    shown = sorted(contigs[:_SHOWN_CONTIGS])
    longest = contigs[0][1]["length"]
    covered = {split: split_coverage(folder, part, split, [number for number, _ in shown]) for split in SPLITS}
    rows = []
    for line, (number, contig) in enumerate(shown):
        top = line * (_ROW + 4) + 2
        scale = (_WIDTH - _LABEL) / longest
        title = f"<title>{escape(contig['name'])}: {contig['length']:,} bp</title>"
        rows.append(_text(contig["name"], 0, top + 11))
        rows.append(_box(_LABEL, top, contig["length"] * scale, _ROW, "bare", title))
        for split in SPLITS:
            rows += _pieces(covered[split].get(number), scale, top, split)
    more = f"<p>and {len(contigs) - len(shown)} shorter contigs</p>" if len(contigs) > len(shown) else ""
    height = len(shown) * (_ROW + 4) + 4
    svg = _picture(f"Places of the splits along the contigs of {part['name']}", height, rows)
    return f"<details{' open' if opened else ''}><summary>{escape(part['name'])}</summary>{svg}{more}</details>"


def split_coverage(folder: Path, part: dict[str, Any], split: str, contigs: list[int]) -> dict[int, np.ndarray]:
    """Contig number -> the set of bases in the split's windows, for the given contigs."""
    shards = part["splits"].get(split, {}).get("shards", [])
    tables = []
    for shard in shards:
        index = ShardIndex.load(index_path(folder / shard["name"]))
        start, length = (index.samples[key].astype(np.int64) for key in ("start", "length"))
        if part["plan"].get("tail") == "pad":
            length -= _padding(index)
        table = np.stack([index.samples["contig"], start, start + length], axis=1)
        tables.append(table[np.isin(table[:, 0], contigs)])
    table = np.concatenate([np.empty((0, 3), dtype=np.int64), *tables])
    return {int(contig): union(table[table[:, 0] == contig, 1:]) for contig in np.unique(table[:, 0])}


def _padding(index: ShardIndex) -> np.ndarray:
    """Length (n,) of the run of non-ACGT bases at the end of each window: its padding, where long enough for
    the index.
    """
    samples, runs = index.samples, index.runs
    owner = samples[runs["sample"]]
    ends = np.where(owner["strand"] == 0, runs["start"] + runs["length"] == owner["length"], runs["start"] == 0)
    padding = np.zeros(len(samples), dtype=np.int64)
    padding[runs["sample"][ends]] = runs["length"][ends]
    return padding


def _pieces(intervals: np.ndarray | None, scale: float, top: int, split: str) -> Iterator[str]:
    """Boxes of a split on a contig; intervals less than half a pixel apart are drawn as one."""
    if intervals is None:
        return
    pixels = union(np.rint(intervals * scale * 2).astype(np.int64) + [0, 1])
    for start, end in pixels:
        yield _box(_LABEL + start / 2, top, (end - start) / 2, _ROW, split)


def _legend() -> str:
    names = (*SPLITS, "dropped")
    keys = (f'<span style="background: var(--{name})"></span>{name}' for name in names)
    return f'<p class="key">{"".join(keys)}</p>'


def _picture(words: str, height: int, shapes: list[str]) -> str:
    """An SVG in a box with a scroll bar, for pages that are too narrow for its text."""
    head = f'viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(words)}"'
    return f'<div class="scroll" tabindex="0"><svg class="wide" {head}>{"".join(shapes)}</svg></div>'


def _box(left: float, top: float, width: float, height: float, name: str, title: str = "") -> str:
    place = f'x="{left:.1f}" y="{top}" width="{max(width, 0.5):.1f}" height="{height}"'
    return f'<rect {place} rx="1.5" style="fill: var(--{name})">{title}</rect>'


def _text(text: str, left: float, baseline: float) -> str:
    shortened = text if len(text) <= 22 else text[:21] + "…"
    return f'<text x="{left}" y="{baseline}">{escape(shortened)}</text>'
