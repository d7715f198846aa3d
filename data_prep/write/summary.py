"""Prints the content of a dataset as a table for the terminal."""

from pathlib import Path
from typing import Any

from caduceus.data.format import SPLITS
from data_prep.plan.contigs import left_out_table
from data_prep.progress import format_amount


def print_summary(manifest: dict[str, Any], directory: Path) -> None:
    """Print a row per species with the windows of each split, the table of left-out contigs, and a line for each reason
    why other bases are left out.
    """
    rows: list[tuple[str, ...]] = [("species", "genome", "N", "lower", "GC", "kept", *SPLITS, "shards", "size")]
    rows += [_row(part) for part in manifest["species"]]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    print(directory)
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        print("  ".join([row[0].ljust(widths[0]), *cells[1:]]))
    for part in manifest["species"]:
        if part["report"] and part["report"]["left_out"]:
            print(f"{part['name']}:")
            print("\n".join(left_out_table(part["report"]["left_out"], part["report"]["bases"])))
        for line in left_out_lines(part["report"]):
            print(f"{part['name']}: {line}")


def left_out_lines(report: dict[str, Any] | None) -> list[str]:
    """Notes on the input, then for each reason a line with the bases of used contigs that are not in a window."""
    if report is None:
        return ["rebuilt from its tars; what was left out of the genome is not known"]
    lines = []
    words = {
        "excluded": "in regions of --exclude-bed, or near copies of held-out sequence",
        "gap": "in runs of N that cut segments",
        "outside_intervals": "outside --intervals or --around",
        "leakage": "of train that valid or test hold too",
        "low_acgt": f"in {report['low_acgt_windows']} windows below --min-acgt",
        "between_windows": "between windows, as the stride is longer",
        "tail": "at the ends of segments, by --tail drop",
        "short": "at the ends of segments, shorter than --min-window",
    }
    for reason, text in words.items():
        if report["dropped"][reason]:
            lines.append(f"left out {report['dropped'][reason]:,} bp {text}")
    leaked = report["leakage"]["either"]
    if leaked:
        share = leaked / report["splits"]["train"]["bases"]
        lines.append(f"LEAKAGE: {leaked:,} bp of train ({share:.1%}) also lie in valid or test; see --forbid-leakage")
    return report["notes"] + lines


def _row(part: dict[str, Any]) -> tuple[str, ...]:
    report = part["report"]
    shards = [shard for split in part["splits"].values() for shard in split["shards"]]
    size = format_amount(sum(shard["bytes"] for shard in shards), "B")
    if report is None:
        return (part["name"], *["-"] * (5 + len(SPLITS)), str(len(shards)), size)
    return (
        part["name"],
        format_amount(report["bases"], "bp"),
        percent(report["n"], report["bases"]),
        percent(report["lower"], report["bases"]),
        percent(report["gc"], report["acgt"]),
        percent(report["kept"], report["bases"]),
        *(f"{report['splits'][split]['windows']:,}" for split in SPLITS),
        str(len(shards)),
        size,
    )


def percent(part: int, whole: int) -> str:
    """A share in per cent as text; '-' where `whole` is 0."""
    return f"{100 * part / whole:.1f} %" if whole else "-"
