"""Genomes in every input format against independent plain readers, and against damaged and hostile files."""

import gzip
import hashlib
import multiprocessing
import os
import pickle
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from caduceus.errors import UserError
from data_prep import fasta
from data_prep.genome import default_cache_dir, open_genome

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
BASES = "ACGTacgtNnRYKMSWBDHVrykmswbdhvUu"
Contigs = dict[str, str]

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


def bgzip(text: bytes, block: int = 65280, eof: bool = True) -> bytes:
    """The text as bgzip writes it."""
    pieces = [text[at : at + block] for at in range(0, len(text), block)] + ([b""] if eof else [])
    return b"".join(map(bgzf_block, pieces))


def bgzf_block(data: bytes) -> bytes:
    deflate = zlib.compressobj(wbits=-15)
    body = deflate.compress(data) + deflate.flush()
    header = struct.pack("<4BI2BH2BHH", 31, 139, 8, 4, 0, 0, 255, 6, 66, 67, 2, len(body) + 25)
    return header + body + struct.pack("<II", zlib.crc32(data), len(data))


def twobit(contigs: Contigs, order: str, version: int = 0) -> bytes:
    """A .2bit file of contigs of A, C, G, T and N; order is < or >."""

    def blocks(flags: list[bool]) -> bytes:
        edges = np.flatnonzero(np.diff([0, *flags, 0]))
        starts, ends = edges[::2], edges[1::2]
        table = np.concatenate([[len(starts)], starts, ends - starts])
        return table.astype(f"{order}u4").tobytes()

    records = []
    for bases in contigs.values():
        codes = ["TCAG".find(base) if base in "TCAG" else 0 for base in bases.upper()] + [0] * (-len(bases) % 4)
        packed = bytes(64 * a + 16 * b + 4 * c + d for a, b, c, d in zip(*[iter(codes)] * 4, strict=True))
        record = struct.pack(f"{order}I", len(bases)) + blocks([base in "Nn" for base in bases])
        records.append(record + blocks([base.islower() for base in bases]) + bytes(4) + packed)
    width = 4 + 4 * version
    offset = 16 + sum(1 + len(name) + width for name in contigs)
    index = b""
    for name, record in zip(contigs, records, strict=True):
        index += bytes([len(name)]) + name.encode() + struct.pack(f"{order}{'IQ'[version]}", offset)
        offset += len(record)
    return struct.pack(f"{order}4I", 0x1A412743, version, len(contigs), 0) + index + b"".join(records)


def plain_read(text: bytes) -> Contigs:
    """An independent reader: line by line, in memory."""
    contigs: dict[str, list[str]] = {}
    for line in text.decode().splitlines():
        if line.startswith(">"):
            current = contigs.setdefault(line[1:].split()[0], [])
        else:
            current.append(line.strip())
    return {name: "".join(lines) for name, lines in contigs.items()}


def check(genome, contigs: Contigs, data=None) -> None:
    assert genome.contigs == {name: len(bases) for name, bases in contigs.items()}
    assert list(genome.contigs) == list(contigs)
    for name, bases in contigs.items():
        assert genome.read(name, 0, len(bases)).decode() == bases
        for _ in range(4 if data else 0):
            start = data.draw(st.integers(0, len(bases)))
            end = data.draw(st.integers(start, len(bases)))
            assert genome.read(name, start, end).decode() == bases[start:end]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A new file's path for each hypothesis example."""
    base, numbers = tmp_path_factory.mktemp("genomes"), iter(range(10**9))

    def make(content: bytes, name: str = "genome.fa") -> Path:
        path = base / str(next(numbers)) / name
        path.parent.mkdir()
        path.write_bytes(content)
        return path

    return make


def cache_of(path: Path) -> Path:
    return path.parent / "cache"


def settled(path: Path) -> Path:
    """The file with an older time stamp, so that a scan of it can be trusted later."""
    old = path.stat().st_mtime - 100
    os.utime(path, (old, old))
    return path


@settings(max_examples=60, deadline=None)
@given(fasta_files(), st.sampled_from(["plain", "gzip", "bgzip"]), st.integers(1, 400), st.data())
def test_any_fasta(folder, file, compression, block, data):
    contigs, text = file
    assert plain_read(text) == contigs
    content = {"plain": text, "gzip": gzip.compress(text), "bgzip": bgzip(text, block)}[compression]
    path = settled(folder(content))
    genome = open_genome(path, cache_of(path))
    check(genome, contigs, data)
    assert genome.sha256 == hashlib.sha256(content).hexdigest()
    check(open_genome(path, cache_of(path)), contigs, data)  # by the tables of the first opening


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


FASTA = b">a one\nACGTACGT\nACGT\n>b\nGGCC\n"
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
    "junk after gzip": (gzip.compress(FASTA) + b"junk" * 9, "damaged gzip"),
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
    lines = text.replace(b"\r\n", b"\n").removesuffix(b"\r").split(b"\n")
    records = [line for line in lines if line.startswith(b">")]
    assert len(records) == len(genome.contigs)
    joined = b"".join(genome.read(name, 0, length) for name, length in genome.contigs.items())
    assert joined == b"".join(line for line in lines if not line.startswith(b">"))


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


def test_fai_as_samtools_writes_it(folder):
    path = settled(folder(FASTA))
    open_genome(path, cache_of(path))
    fai = path.with_name("genome.fa.fai")
    assert fai.read_text() == "a\t12\t7\t8\t9\nb\t4\t24\t4\t5\n"


def test_bgzip_indexes_as_bgzip_writes_them(folder):
    path = settled(folder(bgzip(FASTA, 10), "genome.fa.gz"))
    open_genome(path, cache_of(path))
    assert path.with_name("genome.fa.gz.fai").read_text() == "a\t12\t7\t8\t9\nb\t4\t24\t4\t5\n"
    sizes = [len(bgzf_block(FASTA[at : at + 10])) for at in range(0, len(FASTA), 10)]
    entries = [(sum(sizes[:n]), min(10 * n, len(FASTA))) for n in range(1, len(sizes) + 1)]
    expected = struct.pack("<Q", len(entries)) + b"".join(struct.pack("<QQ", *entry) for entry in entries)
    assert path.with_name("genome.fa.gz.gzi").read_bytes() == expected


@pytest.mark.parametrize("stale", ["a\t12\t6\t8\t9\nb\t4\t23\t4\t5\n", "junk", ""])
def test_stale_fai_is_never_used(folder, stale, capfd):
    path = settled(folder(FASTA))
    fai = path.with_name("genome.fa.fai")
    fai.write_text(stale)
    for _ in range(2):
        check(open_genome(path, cache_of(path)), {"a": "ACGTACGTACGT", "b": "GGCC"})
    assert "genome.fa.fai does not match genome.fa and is not used" in capfd.readouterr().err
    assert fai.read_text() == stale  # the user's file is the user's
    assert list(cache_of(path).glob("*.fai"))


def test_fai_that_goes_wrong_later_is_never_used(folder):
    path = settled(folder(FASTA))
    open_genome(path, cache_of(path))
    path.with_name("genome.fa.fai").write_text("a\t12\t6\t8\t9\nb\t4\t23\t4\t5\n")
    check(open_genome(path, cache_of(path)), {"a": "ACGTACGTACGT", "b": "GGCC"})


@pytest.mark.parametrize("compress", [bytes, gzip.compress, bgzip])
def test_changed_file_is_scanned_again(folder, compress):
    path = folder(compress(FASTA))
    check(open_genome(path, cache_of(path)), {"a": "ACGTACGTACGT", "b": "GGCC"})
    path.write_bytes(compress(FASTA.replace(b"GGCC", b"TTAA")))  # same size, within the time stamp's grain
    check(open_genome(path, cache_of(path)), {"a": "ACGTACGTACGT", "b": "TTAA"})


def test_change_under_way_is_noticed(folder):
    path = settled(folder(FASTA))
    genome = open_genome(path, cache_of(path))
    copy = pickle.loads(pickle.dumps(genome))
    path.write_bytes(FASTA + b"ACGT\n")
    with pytest.raises(UserError, match="was changed while in use"):
        copy.read("a", 0, 12)


@pytest.mark.parametrize(
    "text", [gzip.compress(FASTA), FASTA.replace(b"ACGTACGT\n", b"ACG\nTACGT\n\n")], ids=["gzip", "uneven lines"]
)
def test_unpacked_bases_are_reused(folder, text, monkeypatch):
    path = settled(folder(text))
    genome = open_genome(path, cache_of(path))
    check(genome, {"a": "ACGTACGTACGT", "b": "GGCC"})
    (bases,) = cache_of(path).glob("*.bases")
    assert bases.read_bytes() == b"ACGTACGTACGTGGCC"
    assert bases.stem == genome.sha256
    monkeypatch.setattr(fasta, "_scan", lambda *_, **__: pytest.fail("scanned again"))
    check(open_genome(path, cache_of(path)), {"a": "ACGTACGTACGT", "b": "GGCC"})


def test_unpacked_bases_that_are_damaged_are_made_anew(folder):
    path = settled(folder(gzip.compress(FASTA)))
    open_genome(path, cache_of(path))
    (bases,) = cache_of(path).glob("*.bases")
    bases.write_bytes(b"ACGT")
    check(open_genome(path, cache_of(path)), {"a": "ACGTACGTACGT", "b": "GGCC"})
    for record in cache_of(path).glob("*.json"):
        record.write_text('{"size": 1')
    check(open_genome(path, cache_of(path)), {"a": "ACGTACGTACGT", "b": "GGCC"})


@pytest.mark.parametrize("compress", [bytes, bgzip])
def test_read_only_folder(folder, compress):
    path = settled(folder(compress(FASTA), "genome.fa"))
    cache = path.parent.parent / f"cache-{path.parent.name}"
    path.parent.chmod(0o555)
    try:
        for _ in range(2):
            check(open_genome(path, cache), {"a": "ACGTACGTACGT", "b": "GGCC"})
        assert [file.name for file in path.parent.iterdir()] == ["genome.fa"]
        assert list(cache.glob("*.fai"))
    finally:
        path.parent.chmod(0o755)


def test_unusable_cache_folder(folder):
    path = folder(FASTA)
    blocked = path.with_name("file")
    blocked.write_bytes(b"")
    check(open_genome(path, blocked / "cache"), {"a": "ACGTACGTACGT", "b": "GGCC"})  # needs no cache
    packed = folder(gzip.compress(FASTA))
    with pytest.raises(UserError, match=r"cannot keep the bases .* --cache-dir"):
        open_genome(packed, blocked / "cache")


def test_default_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = tmp_path / "genome.fa.gz"
    path.write_bytes(gzip.compress(FASTA))
    open_genome(path)
    assert default_cache_dir() == tmp_path / "caduceus" / "genomes"
    assert list(default_cache_dir().glob("*.bases"))


def _digest_all(path: Path, cache: Path) -> bytes:
    genome = open_genome(path, cache)
    return b"".join(genome.read(name, 0, length) for name, length in genome.contigs.items())


def _read_one(genome) -> bytes:
    return genome.read("a", 0, 200_000)


def test_two_processes_build_the_cache_at_once(tmp_path):
    bases = np.frombuffer(b"ACGT", np.uint8)[np.random.default_rng(2).integers(0, 4, 400_000)].tobytes()
    path = tmp_path / "genome.fa.gz"
    path.write_bytes(gzip.compress(b">a\n" + bases + b"\n"))
    with multiprocessing.get_context("fork").Pool(4) as pool:
        found = pool.starmap(_digest_all, [(path, tmp_path / "cache")] * 8)
    assert found == [bases] * 8
    left = sorted(file.suffix for file in (tmp_path / "cache").iterdir())
    assert left == [".bases", ".fai", ".json"]


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_one_genome_in_several_processes(tmp_path, method):
    bases = np.frombuffer(b"ACGT", np.uint8)[np.random.default_rng(3).integers(0, 4, 200_000)].tobytes()
    text = b">a\n" + b"\n".join(bases[at : at + 60] for at in range(0, len(bases), 60)) + b"\n"
    files = {"x.fa": text, "x.fa.gz": bgzip(text), "x.2bit": twobit({"a": bases.decode()}, "<")}
    genomes = []
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        genomes.append(open_genome(tmp_path / name, tmp_path / "cache"))
        assert _read_one(genomes[-1]) == bases
    with multiprocessing.get_context(method).Pool(2) as pool:
        assert pool.map(_read_one, genomes * 2) == [bases] * 6


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
