"""Mistakes in files and options: one clear line that says what to do, and nothing written."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from caduceus.bed import read_bed
from caduceus.errors import UserError
from tests.conftest import REPOSITORY
from tests.data_prep.genomes import random_bases, shard, write_fasta


@pytest.fixture(scope="module")
def fasta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(8)
    contigs = {f"chr{number}": random_bases(rng, length) for number, length in enumerate((60_000, 20_000), 1)}
    return write_fasta(tmp_path_factory.mktemp("fasta") / "g.fa", contigs)


@given(st.binary(max_size=200) | st.text("chr1\t 0123456789-#\n.x", max_size=120).map(str.encode))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bed_is_read_or_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "any.bed"
    path.write_bytes(content)
    try:
        rows = read_bed(path).rows
    except UserError as error:
        assert "\n" not in str(error)
        return
    assert all(0 <= row.start < row.end for row in rows)


BAD = {
    "empty": ("", ()),
    "not FASTA": ("@read\nACGT\n", ()),
    "duplicate contigs": (">a\nACGT\n>a\nACGT\n", ()),
    "no segment long enough": (">a\n" + "ACGT" * 100 + "\n", ("--min-window", "1024")),
    "all N": (">a\n" + "N" * 3000 + "\n", ()),
    "unknown contig": (None, ("--valid-contigs", "chr7")),
    "left out contig": (">chr1\n" + "ACGT" * 900 + "\n>chrM\nACGT\n", ("--valid-contigs", "chrM")),
    "contig in two splits": (None, ("--valid-contigs", "chr1", "--test-contigs", "1")),
    "nothing left": (None, ("--include", "zzz")),
    "bad pattern": (None, ("--include", "chr[")),
    "bad number": (None, ("--window", "many")),
    "zero window": (None, ("--window", "0")),
    "shortest above longest": (None, ("--window", "100", "--min-window", "200")),
    "bad share": (None, ("--min-acgt", "1.5")),
    "bad size": (None, ("--shard-bytes", "lots")),
    "unknown option": (None, ("--frobnicate",)),
    "bad tail": (None, ("--tail", "long")),
    "no workers": (None, ("--workers", "0")),
    "mode without intervals": (None, ("--interval-mode", "exact")),
    "missing BED": (None, ("--intervals", "no.bed")),
    "fractions without blocks": (None, ("--valid-fraction", "0.1")),
    "blocks without fractions": (None, ("--split-block", "5000")),
    "blocks and contigs": (None, ("--split-block", "5000", "--valid-fraction", "0.1", "--valid-contigs", "chr1")),
    "missing aliases": (None, ("--aliases", "no.tsv")),
    "bad species name": (None, ("--species", "a/b")),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(case: str, fasta: Path, tmp_path: Path, monkeypatch) -> None:
    text, options = BAD[case]
    if text is not None:
        fasta = tmp_path / "bad.fa"
        fasta.write_text(text)
    monkeypatch.chdir(tmp_path)
    before = {path.name for path in tmp_path.iterdir()}
    defaults = ("--species", "s") if "--species" not in options else ()
    with pytest.raises(UserError) as raised:
        shard("--fasta", fasta, *defaults, "--out", tmp_path / "deep" / "out", "--workers", "1", *options)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 400
    left = {path.name for path in tmp_path.iterdir()} - before
    assert left <= {"bad.fa.fai"}, "the table of a sound FASTA may stay"


BED_ROWS = {
    "chr1\t6\t5\n": r"rows\.bed:1: start 6 is beyond end 5",
    "chr1\t5\t5\n": r"rows\.bed holds no interval, so there is nothing to use",
    "# nothing but this\n": r"rows\.bed holds no interval, so there is nothing to use",
    "chr1\t1\t20\nchr1\tx\t9\n": r"rows\.bed:2: start must be a whole number in plain digits, got 'x'",
    "chr1\t0\t6_4\n": r"rows\.bed:1: end must be a whole number in plain digits, got '6_4'",
    "chr1\t+0\t64\n": r"rows\.bed:1: start must be a whole number in plain digits, got '\+0'",
    "chr1\t0\t٦٤\n": r"rows\.bed:1: end must be a whole number in plain digits",
    "chr1\t0\t1e3\n": r"rows\.bed:1: end must be a whole number in plain digits",
    "chr1\t0\t64.0\n": r"rows\.bed:1: end must be a whole number in plain digits",
    "chr1\t-5\t64\n": r"rows\.bed:1: start must be a whole number in plain digits",
    "chrom start end\nchr1 end start\n": r"rows\.bed:2: start must be a whole number",
    "chr1\t1\n": r"rows\.bed:1: not a BED line",
    "\n": "holds no interval",
    "chr1\t1\t9\0\n": r"rows\.bed:1: holds binary data",
    "chr1\t1\t99999999\n": r"rows\.bed:1: ends at 99,999,999, beyond chr1 with 60,000 bases",
    "chr1\t1\t2000\ttrain\nchr1\t1\t2000\tholdout\n": r"rows\.bed:2: column 4 must be train, valid or test",
    "chr1\t1\t2000\ttrain\nchr1\t1\t2000\n": r"rows\.bed:2: has no split",
    "chr8\t1\t2000\n": r"rows\.bed:1: the genome has no contig 'chr8'",
    "chr2\t20000\t20100\n": r"rows\.bed:1: starts at 20,000, beyond the end of chr2 with 20,000 bases",
}


@pytest.mark.parametrize("rows", BED_ROWS)
def test_bad_intervals(rows: str, fasta: Path, tmp_path: Path) -> None:
    bed = tmp_path / "rows.bed"
    bed.write_text(rows)
    with pytest.raises(UserError, match=BED_ROWS[rows]):
        shard("--fasta", fasta, "--species", "s", "--out", tmp_path / "out", "--intervals", bed, "--workers", 1)
    assert not (tmp_path / "out").exists()


BAD_YAML = {
    "": "must be a list of entries",
    "- a": "must hold a list 'species'",
    "species: []": "must be a list of entries",
    "species: 3": "must be a list of entries",
    "specis: []": "unknown key 'specis'",
    "species: [{name: a}]": "needs the keys 'name' and 'fasta'",
    "species: [{name: a, fasta: a.fa, windw: 3}]": "'windw' is not an option",
    "species: [{name: a, fasta: a.fa, window: big}]": "--window: must be a whole number",
    "species: [{name: a, fasta: a.fa, weight: 0}]": "'weight' must be a number above 0",
    "species: [{name: a, fasta: a.fa}, {name: a, fasta: b.fa}]": "two species are named 'a'",
    "species: [{name: a, fasta: a.fa}]": "no such file",
    "weights: heavy\nspecies: [{name: a, fasta: a.fa}]": "'weights' must be",
    "species: [{genome: hg99}]": "not a genome of the registry",
    "a: [": "cannot be read",
}


@pytest.mark.parametrize("text", BAD_YAML)
def test_bad_species_files(text: str, tmp_path: Path) -> None:
    path = tmp_path / "species.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=re.escape(BAD_YAML[text])) as raised:
        shard("--genomes", path, "--out", tmp_path / "out", "--workers", 1)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


ADVICE = {
    ("--workers", "x"): "--workers: must be a whole number of at least 1, got x",
    ("--shard-bytes", "hello"): "--shard-bytes: 'hello' is not a size; write it like",
}


@pytest.mark.parametrize("option", ADVICE)
def test_mistakes_name_their_option(fasta: Path, tmp_path: Path, option: tuple[str, str]) -> None:
    with pytest.raises(UserError, match=ADVICE[option]):
        shard("--fasta", fasta, "--species", "s", "--out", tmp_path / "out", *option)


@pytest.mark.moderate
def test_exit_status_and_stderr_of_a_mistake(tmp_path: Path) -> None:
    script = REPOSITORY / "data_prep" / "shard_genome.py"
    arguments = ("--fasta", tmp_path / "no.fa", "--species", "s", "--out", tmp_path / "out")
    result = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
