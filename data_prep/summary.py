"""What a dataset holds, as a table for the terminal."""

from pathlib import Path
from typing import Any

from caduceus.data.shards import SPLITS
from data_prep.progress import format_amount


def print_summary(manifest: dict[str, Any], directory: Path) -> None:
    """Print one row per species, with the windows of each split, and a line for each reason that bases are left out."""
    rows = [("species", "genome", "N", "lower", "GC", "kept", *SPLITS, "shards", "size")]
    rows += [_row(part) for part in manifest["species"]]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    print(directory)
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        print("  ".join([row[0].ljust(widths[0]), *cells[1:]]))
    for part in manifest["species"]:
        for line in left_out_lines(part["report"]):
            print(f"{part['name']}: {line}")


def left_out_lines(report: dict[str, Any]) -> list[str]:
    """What is in no window and why, one line per reason."""
    lines = []
    for kind, group in report["left_out"].items():
        names = ", ".join(group["names"][:6]) + (", …" if group["contigs"] > 6 else "")
        lines.append(f"left out {group['contigs']} contigs ({kind}), {group['bases']:,} bp: {names}")
    words = {
        "gap": "in runs of N that cut segments",
        "low_acgt": f"in {report['low_acgt_windows']} windows below --min-acgt",
        "between_windows": "between windows, as the stride is longer",
        "tail": "in segments' ends, by --tail drop",
        "short": "in segments' ends shorter than --min-window",
    }
    return lines + [
        f"left out {report['dropped'][reason]:,} bp {text}"
        for reason, text in words.items()
        if report["dropped"][reason]
    ]


def _row(part: dict[str, Any]) -> tuple[str, ...]:
    report = part["report"]
    shards = [shard for split in part["splits"].values() for shard in split["shards"]]
    return (
        part["name"],
        format_amount(report["bases"], "bp"),
        _percent(report["n"], report["bases"]),
        _percent(report["lower"], report["bases"]),
        _percent(report["gc"], report["acgt"]),
        _percent(report["kept"], report["bases"]),
        *(f"{report['splits'][split]['windows']:,}" for split in SPLITS),
        str(len(shards)),
        format_amount(sum(shard["bytes"] for shard in shards), "B"),
    )


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"
