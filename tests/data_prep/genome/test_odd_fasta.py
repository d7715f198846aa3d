"""FASTA as some tools write it: read, and what was passed over is told."""

import gzip

import pytest

from caduceus import gunzip
from caduceus.errors import UserError
from data_prep.genome import fasta
from data_prep.genome.genome import open_genome
from tests.data_prep.genome_files import FASTA, bgzip, cache_of, settled
from tests.data_prep.genomes import dataset_of, shard, tar_samples

ODD = {
    "bytes behind gzip": (gzip.compress(FASTA) + b"junk" * 9, "36 bytes stand behind the end of the gzip stream"),
    "zeros behind gzip": (gzip.compress(FASTA) + bytes(512), "512 bytes stand behind the end of the gzip stream"),
    "an index behind gzip": (gzip.compress(FASTA) + bytes(range(256)) * 40, "10,240 bytes stand behind"),
    "bytes behind bgzip": (bgzip(FASTA) + b"RAZF and more", "13 bytes stand behind the end of the gzip stream"),
    "one byte behind gzip": (gzip.compress(FASTA) + b"\n", "1 bytes stand behind"),
    "blank line first": (b"\n" + FASTA, "blank lines stand before the first record"),
    "several blank lines first": (b"\r\n \t\r\n\n" + FASTA, "blank lines stand before the first record"),
    "byte order mark": (b"\xef\xbb\xbf" + FASTA, "a byte order mark (UTF-8) stands before the first record"),
    "byte order mark in gzip": (gzip.compress(b"\xef\xbb\xbf\n" + FASTA), "a byte order mark (UTF-8)"),
    "Ctrl-A": (FASTA.replace(b"a one", b"a one\x01c two\x01d"), "1 headers hold several titles"),
    "Ctrl-A at once": (FASTA.replace(b"a one", b"a\x01c two"), "1 headers hold several titles"),
    "RNA": (FASTA.replace(b"T", b"U"), "holds RNA (U): every U is read as T"),
    "RNA in lower case, of lines that differ": (b">a\nAC\nGuACGT\nACGT\n>b\nGGCC\n", "holds RNA"),
}


@pytest.mark.parametrize("case", ODD)
@pytest.mark.parametrize("chunk", [1 << 22, 1])
def test_oddities_of_tools_are_read_and_told(folder, case, chunk, monkeypatch):
    content, note = ODD[case]
    for module in (fasta, gunzip):
        monkeypatch.setattr(module, "CHUNK", chunk)
    path = settled(folder(content))
    for _ in range(2):  # from the file, then by the tables of the first opening
        genome = open_genome(path, cache_of(path))
        assert genome.contigs == {"a": 12, "b": 4}
        bases = genome.read("a", 0, 12) + genome.read("b", 0, 4)
        assert bases.upper() == b"ACGTACGTACGTGGCC"
        assert any(note in said for said in genome.notes) and len(genome.notes) <= 2
        if "Ctrl-A" in case:
            assert genome.descriptions["a"] in ("a one", "a")


@pytest.mark.parametrize("compress", [gzip.compress, bgzip])
def test_records_that_are_appended_to_a_gzip_file_as_text_are_refused(folder, compress):
    path = settled(folder(compress(FASTA) + b">c\nACGT\n"))
    with pytest.raises(UserError, match="plain text follows the gzip data; compress that as well"):
        open_genome(path, cache_of(path))
    path.write_bytes(compress(FASTA) + compress(b">c\nACGT\n"))
    assert open_genome(settled(path), cache_of(path)).contigs == {"a": 12, "b": 4, "c": 4}


@pytest.mark.moderate
def test_what_was_passed_over_is_told_once_by_the_command(tmp_path):
    path = tmp_path / "rna.fa"
    path.write_bytes(b"\n>a\n" + b"ACGU" * 600 + b"\n>b\n" + b"ACGU" * 600 + b"\n")
    printed = shard("--fasta", path, "--species", "s", "--out", tmp_path / "out", "--window", 1200, "--workers", 2)
    assert printed.count("every U is read as T") == printed.count("blank lines") == 1
    stored = tar_samples(tmp_path / "out").values()
    assert {bytes(sorted(set(files["seq"]))) for files in stored} == {b"ACGT"}
    assert "every U is read as T" in str(dataset_of(tmp_path / "out")["report"]["notes"])
