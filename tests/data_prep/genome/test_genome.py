"""Genomes in every input format against independent plain readers, and against damaged and hostile files."""

import gzip
import hashlib
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from caduceus.errors import UserError
from data_prep.genome import fasta
from data_prep.genome.genome import open_genome
from tests.data_prep.genome_files import FASTA, Contigs, bgzip, cache_of, check, settled, twobit

SHARED = Path(__file__).resolve().parents[4] / "shared" / "data"
BASES = "ACGTacgtNnRYKMSWBDHVrykmswbdhvUu"

contig_tables = st.dictionaries(
    st.text("abcXYZ019._|-", min_size=1, max_size=8), st.text(BASES, max_size=300), min_size=1, max_size=5
).filter(lambda contigs: any(contigs.values()))


@st.composite
def fasta_files(draw) -> tuple[Contigs, bytes]:
    """Contigs, and a FASTA of them in one of the many ways that people write one."""
    contigs = draw(contig_tables)
    end = draw(st.sampled_from(["\n", "\r\n"]))
    text = ""
    for name, bases in contigs.items():
        text += f">{name}{draw(st.sampled_from(['', ' a description', chr(9) + 'tab']))}{end}"
        if draw(st.booleans()):
            width = draw(st.integers(1, 80))
            lines = [bases[at : at + width] for at in range(0, len(bases), width)]
        else:  # lines of any length, blank ones among them
            cuts = sorted(draw(st.lists(st.integers(0, len(bases)), max_size=6)))
            lines = [bases[a:b] for a, b in zip([0, *cuts], [*cuts, len(bases)], strict=True)]
        text += "".join(line + end for line in lines) + end * draw(st.integers(0, 2))
    if draw(st.booleans()):
        text = text.rstrip("\r\n") if text.rstrip("\r\n")[-1:] in BASES else text
    return contigs, text.encode()


DNA = str.maketrans("Uu", "Tt")


def sequence_of(text: bytes) -> bytes:
    """The bases of all contigs."""
    lines = text.replace(b"\r\n", b"\n").removesuffix(b"\r").split(b"\n")
    return b"".join(line for line in lines if not line.startswith(b">"))


def plain_read(text: bytes) -> Contigs:
    """An independent reader: line by line, in memory."""
    contigs: dict[str, list[str]] = {}
    for line in text.decode().splitlines():
        if line.startswith(">"):
            current = contigs.setdefault(line[1:].split()[0], [])
        else:
            current.append(line.strip())
    return {name: "".join(lines) for name, lines in contigs.items()}


@pytest.mark.moderate
@settings(max_examples=60, deadline=None)
@given(fasta_files(), st.sampled_from(["plain", "gzip", "bgzip"]), st.integers(1, 400), st.data())
def test_any_fasta(folder, file, compression, block, data):
    contigs, text = file
    assert plain_read(text) == contigs
    content = {"plain": text, "gzip": gzip.compress(text), "bgzip": bgzip(text, block)}[compression]
    path = settled(folder(content))
    contigs = {name: bases.translate(DNA) for name, bases in contigs.items()}
    genome = open_genome(path, cache_of(path))
    check(genome, contigs, data)
    assert any("RNA" in note for note in genome.notes) == (b"U" in sequence_of(text) or b"u" in sequence_of(text))
    assert genome.sha256 == hashlib.sha256(content).hexdigest()
    check(open_genome(path, cache_of(path)), contigs, data)  # by the tables of the first opening


@pytest.mark.moderate
@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(
        st.text("abcXYZ019._|-", min_size=1, max_size=8), st.text("ACGTacgtNn", max_size=300), min_size=1, max_size=5
    ).filter(lambda contigs: any(contigs.values())),
    st.sampled_from("<>"),
    st.integers(0, 1),
    st.data(),
)
def test_any_twobit(folder, contigs, order, version, data):
    path = folder(twobit(contigs, order, version), "genome.2bit")
    check(open_genome(path), contigs, data)


def test_twobit_against_a_maintained_reader(tmp_path):
    twobitreader = pytest.importorskip("twobitreader")
    rng = np.random.default_rng(0)
    contigs = {f"c{n}": "".join(rng.choice(list("ACGTacgtNNnn"), 3001 + n)) for n in range(3)}
    path = tmp_path / "x.2bit"
    path.write_bytes(twobit(contigs, "<"))
    genome, other = open_genome(path), twobitreader.TwoBitFile(str(path))
    for name in contigs:
        assert genome.read(name, 5, 3000) == other[name][5:3000].encode()


@pytest.mark.moderate
def test_large_chunks_and_long_lines(tmp_path, monkeypatch):
    """Headers, line ends and CR LF pairs that straddle the pieces of a scan."""
    rng = np.random.default_rng(1)
    contigs = {f"c{n}": "".join(rng.choice(list("ACGT"), int(rng.integers(1, 200)))) for n in range(50)}
    for end in ("\n", "\r\n"):
        text = "".join(
            f">{name} words{end}" + "".join(bases[at : at + 60] + end for at in range(0, len(bases), 60))
            for name, bases in contigs.items()
        ).encode()
        for chunk in (1, 2, 3, 7, 61, 1000):
            monkeypatch.setattr(fasta, "CHUNK", chunk)
            path = tmp_path / f"{len(end)}-{chunk}.fa"
            path.write_bytes(text)
            check(open_genome(path, tmp_path / "cache"), contigs)
            assert (tmp_path / f"{path.name}.fai").exists()
            assert not list((tmp_path / "cache").glob("*.bases"))  # regular lines are read in place


@pytest.mark.parametrize("block", [65536, 65280, 4096])
def test_bgzip_blocks_of_any_size_are_read_from_any_place(tmp_path, block, rng):
    """Blocks of 65,536 bytes, the most that the format allows, are what some tools write."""
    bases = rng.choice(np.frombuffer(b"ACGT", np.uint8), 300_000).tobytes()
    for width in (60, 300_000):
        lines = [bases[at : at + width] for at in range(0, len(bases), width)]
        path = tmp_path / f"{width}.fa"
        path.write_bytes(bgzip(b">a\n" + b"\n".join(lines) + b"\n", block))
        genome = open_genome(path, tmp_path / "cache")
        borders = [block * number for number in range(1, 300_000 // block)][:70]
        for start in [0, 59, 60, 61, *borders, *(border - 3 for border in borders)]:
            for place in range(max(start - 2, 0), start + 3):
                assert genome.read("a", place, place + 200) == bases[place : place + 200]
        assert genome.read("a", 0, 300_000) == bases


def test_descriptions_and_names(folder):
    path = folder(b">NC_1.1 Some fly, chromosome 4\nACGT\n>  two\twords \nAC\n")
    genome = open_genome(path, cache_of(path))
    assert genome.contigs == {"NC_1.1": 4, "two": 2}
    assert genome.descriptions == {"NC_1.1": "NC_1.1 Some fly, chromosome 4", "two": "two\twords"}


def test_ranges(folder):
    path = folder(b">a\nACGTA\n>empty\n")
    genome = open_genome(path, cache_of(path))
    assert genome.read("a", 5, 5) == b""
    assert genome.read("empty", 0, 0) == b""
    for contig, start, end in [("a", -1, 2), ("a", 3, 2), ("a", 0, 6), ("empty", 0, 1), ("b", 0, 0)]:
        with pytest.raises(ValueError):
            genome.read(contig, start, end)


REFUSED = {
    "empty": (b"", "is empty"),
    "header only": (b">a\n", "holds no bases"),
    "FASTQ": (b"@r\nACGT\n+\nIIII\n", "it looks like FASTQ"),
    "web page": (b"\n<!DOCTYPE html><html>404</html>\n", "it looks like a web page"),
    "GenBank": (b"LOCUS       NC_1\n", "it looks like GenBank"),
    "binary": (bytes(range(256)), "it looks like binary"),
    "zstd": (b"\x28\xb5\x2f\xfd\x00\x00", "neither gzip nor bgzip"),
    "bare sequence": (b"ACGT\nACGT\n", "line 1 does not begin with '>'"),
    "no name": (b">a\nAC\n>\nGT\n", "line 3: a header without a name"),
    "blank name": (b">a\nAC\n>  \nGT\n", "line 3: a header without a name"),
    "duplicate": (b">a x\nAC\n>b\nAC\n>a y\nGT\n", "line 5: a second contig named 'a'"),
    "gap character": (b">a\nACGT\nAC-T\n", "line 3: contig 'a' holds '-'"),
    "stop character": (b">a\nACGT\n>b\nACGT*\n", "line 4: contig 'b' holds '*'"),
    "protein": (b">a\nMKLE\n", "line 2: contig 'a' holds 'L'"),
    "space": (b">a\nAC GT\n", "line 2: contig 'a' holds ' '"),
    "old Mac": (b">a\rACGT\rACGT\r", "lines end in CR alone"),
    "lone CR": (b">a\nAC\rGT\n", r"line 2: contig 'a' holds '\x0d'"),
    "non-ASCII": (">a\nACGT\nACé\n".encode(), r"line 3: contig 'a' holds '\xc3'"),
    "binary header": (b">\x01\x02\nACGT\n", "line 1: the contig name is not text"),
    "truncated gzip": (gzip.compress(FASTA)[:-9], "truncated gzip"),
    "gzip crc": (gzip.compress(FASTA)[:-8] + bytes(8), "damaged gzip"),
    "damage in a later member": (gzip.compress(FASTA) + b"\x1f\x8c\x08\x00" + b"junk" * 9, "damaged gzip"),
    "damage before a later member": (gzip.compress(FASTA) + b"junk" + gzip.compress(FASTA), "damaged gzip"),
    "UTF-16": (b"\xff\xfe" + FASTA.decode().encode("utf-16-le"), "it looks like UTF-16 text"),
    "blanks before the mark": (b"\n  " + FASTA, "line 2 does not begin with '>'"),
    "a byte order mark alone": (b"\xef\xbb\xbf\n", "is empty"),
    "half a byte order mark": (b"\xef\xbb", "line 1 does not begin with '>'"),
    "bgzip, then a damaged block": (bgzip(FASTA) + b"\x1f\x8b\x09" + bgzip(FASTA)[3:], "damaged or not bgzip"),
    "gzip of nothing": (gzip.compress(b""), "is empty"),
    "gzip of FASTQ": (gzip.compress(b"@r\nACGT\n"), "it looks like FASTQ"),
    "bgzip without end": (bgzip(FASTA, eof=False), "the end marker of bgzip is missing"),
    "bgzip cut in a block": (bgzip(FASTA, 10)[:-40], "truncated in the bgzip block at byte"),
    "bgzip crc": (bgzip(FASTA)[:-36] + bytes(8) + bgzip(b""), "damaged bgzip block at byte 0"),
    "bgzip, then gzip": (bgzip(FASTA, eof=False) + gzip.compress(FASTA), "damaged or not bgzip at byte"),
    "2bit version": (struct.pack("<4I", 0x1A412743, 7, 0, 0), "version 7 is not supported"),
    "2bit of nothing": (struct.pack("<4I", 0x1A412743, 0, 0, 0), "holds no bases"),
    "2bit header": (struct.pack("<2I", 0x1A412743, 0), "truncated in the header"),
    "2bit index": (twobit({"abc": "ACGT"}, "<")[:19], "truncated in the index, at contig 1 of 1"),
    "2bit record": (twobit({"abc": "ACGTACGTA"}, ">")[:-1], "truncated in contig 'abc'"),
    "2bit duplicate": (twobit({"a": "AC", "b": "GT"}, "<").replace(b"\x01b", b"\x01a"), "two contigs are named 'a'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line(folder, case):
    content, message = REFUSED[case]
    path = folder(content)
    with pytest.raises(UserError) as caught:
        open_genome(path, cache_of(path))
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert message in text
    assert "\n" not in text
    left = [file for file in path.parent.rglob("*") if file.is_file()]
    assert left == [path]


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        open_genome(tmp_path / "none.fa")
    with pytest.raises(UserError, match="not a regular file"):
        open_genome(tmp_path)


def fuzzed(content: bytes, data) -> bytes:
    kind = data.draw(st.sampled_from(["flip", "cut", "junk", "insert"]))
    at = data.draw(st.integers(0, max(len(content) - 1, 0)))
    if kind == "flip":
        return content[:at] + bytes([content[at] ^ data.draw(st.integers(1, 255))]) + content[at + 1 :]
    if kind == "cut":
        return content[:at]
    junk = data.draw(st.binary(min_size=1, max_size=40))
    return content[:at] + junk + content[at + (len(junk) if kind == "junk" else 0) :]


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(fasta_files(), st.sampled_from(["gzip", "bgzip"]), st.data())
def test_fuzzed_compressed_files_give_the_right_bases_or_none(folder, file, compression, data):
    contigs, text = file
    content = {"gzip": gzip.compress(text), "bgzip": bgzip(text, 50)}[compression]
    path = folder(fuzzed(content, data))
    try:
        genome = open_genome(path, cache_of(path))
    except UserError as error:
        assert "\n" not in str(error)
        return
    contigs = {name: bases.translate(DNA) for name, bases in contigs.items()}
    check(genome, contigs)  # by crc, whatever opens is whole: header fields may have changed, data not


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(fasta_files(), st.data())
def test_fuzzed_text_reads_as_it_stands_or_is_refused(folder, file, data):
    text = fuzzed(file[1], data)
    path = folder(text)
    try:
        genome = open_genome(path, cache_of(path))
    except UserError as error:
        assert "\n" not in str(error)
        return
    text = text.removeprefix(b"\xef\xbb\xbf").lstrip(b"\r\n\t ")
    lines = text.replace(b"\r\n", b"\n").removesuffix(b"\r").split(b"\n")
    records = [line for line in lines if line.startswith(b">")]
    assert len(records) == len(genome.contigs)
    joined = b"".join(genome.read(name, 0, length) for name, length in genome.contigs.items())
    assert joined.decode() == sequence_of(text).decode().translate(DNA)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(st.text("ACGTacgtNn", min_size=1, max_size=100), st.sampled_from("<>"), st.data())
@example("ACGT", "<", None)
def test_fuzzed_twobit_never_crashes(folder, bases, order, data):
    content = twobit({"chr1": bases, "chr2": bases[::-1]}, order)
    path = folder(fuzzed(content, data) if data else content[:-1])
    try:
        genome = open_genome(path, cache_of(path))
        for name, length in genome.contigs.items():
            assert len(genome.read(name, 0, min(length, 10**6))) == min(length, 10**6)
    except UserError as error:
        assert "\n" not in str(error)


@pytest.fixture(scope="module")
def shared():
    if not SHARED.is_dir():
        pytest.skip("needs the real genomes of ../shared/data")
    return SHARED


def test_real_big_endian_twobit(shared, tmp_path):
    genome = open_genome(shared / "twobit" / "aglobin.2bit", tmp_path)
    assert genome.contigs == {"human": 70_000, "cow": 66_001}
    bases = genome.read("human", 0, 70_000)
    assert set(b"acgt") < set(bases) <= set(b"ACGTNacgtn")


def test_real_yeast_is_the_same_as_fasta_and_as_twobit(shared, tmp_path):
    packed = open_genome(shared / "yeast" / "sacCer3.fa.gz", tmp_path)
    binary = open_genome(shared / "twobit" / "sacCer3.2bit", tmp_path)
    assert packed.contigs == binary.contigs
    assert sum(packed.contigs.values()) == 12_157_105
    for name, length in packed.contigs.items():
        assert packed.read(name, 0, length) == binary.read(name, 0, length)


def test_real_bgzip_and_its_own_indexes(shared, tmp_path, capfd):
    path = shared / "drosophila" / "DmelanDM6_4_GCF_000001215.4_Release_6_plus_ISO1_MT_genomic.fna.gz"
    contigs = plain_read(gzip.decompress(path.read_bytes()))
    check(open_genome(path, tmp_path), contigs)
    assert "not used" not in capfd.readouterr().err
