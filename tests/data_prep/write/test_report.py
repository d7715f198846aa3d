"""The report of a dataset."""

from pathlib import Path

from data_prep.write.report import split_coverage


def test_report_is_self_contained(shards) -> None:
    out, part = shards("--valid-contigs", "chr2")
    html = (out / "report.html").read_text()
    assert "http" not in html and "<script" not in html and "<link" not in html
    for text in ("fly", "chr1", "chr2", f"{part['report']['bases']:,}", "mitochondrion"):
        assert text in html


def test_report_gives_shares_of_the_genome_where_splits_overlap(shards, tmp_path: Path) -> None:
    bed = tmp_path / "rows.bed"
    bed.write_text("chr1\t0\t100\ttrain\nchr1\t100\t200\tvalid\n")
    out, part = shards("--intervals", bed, "--interval-mode", "extend")
    assert part["report"]["splits"]["valid"]["bases"] == 500
    html = (out / "report.html").read_text()
    assert f"<title>valid: 500 bp, {500 / part['report']['bases']:.1%} of the genome</title>".replace("%", " %") in html


def test_report_draws_no_padding(shards) -> None:
    """worm's chr2 has 700 bases, of which its windows of 500 hold 1,000."""
    out, part = shards("--tail", "pad", "--cut-gaps", 0, species="worm")
    for number, length in enumerate((3000, 700)):
        (drawn,) = split_coverage(out / "worm", part, "train", [number])[number]
        assert length - 16 < drawn[1] <= length, "runs below 16 are not listed, and not to be seen"
