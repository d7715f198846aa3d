"""What is kept of a genome beside it and in the cache: used where it is true, made anew where it is not."""

import gzip
import multiprocessing
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest

from caduceus.errors import UserError
from data_prep.genome import fasta
from data_prep.genome.genome import default_cache_dir, open_genome
from tests.data_prep.genome_files import FASTA, bgzf_block, bgzip, cache_of, check, settled, twobit


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


@pytest.mark.moderate
def test_two_processes_build_the_cache_at_once(tmp_path):
    bases = np.frombuffer(b"ACGT", np.uint8)[np.random.default_rng(2).integers(0, 4, 400_000)].tobytes()
    path = tmp_path / "genome.fa.gz"
    path.write_bytes(gzip.compress(b">a\n" + bases + b"\n"))
    with multiprocessing.get_context("fork").Pool(4) as pool:
        found = pool.starmap(_digest_all, [(path, tmp_path / "cache")] * 8)
    assert found == [bases] * 8
    left = sorted(file.suffix for file in (tmp_path / "cache").iterdir())
    assert left == [".bases", ".fai", ".json"]


@pytest.mark.parametrize(
    "text", [gzip.compress(FASTA), FASTA.replace(b"ACGTACGT\n", b"ACG\nTACGT\n\n")], ids=["gzip", "uneven lines"]
)
def test_bases_that_another_process_makes_as_well_stay_the_same_file(folder, text, monkeypatch):
    path, scan, faster = settled(folder(text)), fasta._scan, []

    def overtaken(*args, **kwargs):
        tables = scan(*args, **kwargs)
        if not faster:  # between this one's scan and its end, another one begins, ends and is in use
            faster.append(None)
            faster[0] = open_genome(path, cache_of(path))
        return tables

    monkeypatch.setattr(fasta, "_scan", overtaken)
    slower = open_genome(path, cache_of(path))
    for genome in (*faster, slower):
        check(genome, {"a": "ACGTACGTACGT", "b": "GGCC"})
    assert sorted(file.suffix for file in cache_of(path).iterdir()) == [".bases", ".fai", ".json"]


def test_spoilt_bases_of_the_right_length_are_made_anew(folder):
    path = settled(folder(gzip.compress(FASTA)))
    open_genome(path, cache_of(path))
    for file in cache_of(path).iterdir():
        file.write_bytes(b"TTTTACGTACGTGGCC") if file.suffix == ".bases" else file.unlink()
    check(open_genome(path, cache_of(path)), {"a": "ACGTACGTACGT", "b": "GGCC"})


def test_table_that_cannot_be_read_is_not_used(folder, capfd, monkeypatch):
    path = settled(folder(FASTA))
    fai, read = path.with_name("genome.fa.fai"), Path.read_bytes
    fai.write_bytes(b"a\t12\t6\t8\t9\n")

    def guarded(file):  # as the superuser, whom permissions do not stop, runs this too
        if file == fai:
            raise PermissionError(13, "Permission denied")
        return read(file)

    monkeypatch.setattr(Path, "read_bytes", guarded)
    check(open_genome(path, cache_of(path)), {"a": "ACGTACGTACGT", "b": "GGCC"})
    assert "genome.fa.fai does not match genome.fa and is not used" in capfd.readouterr().err


@pytest.mark.moderate
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
        pool.close()
        pool.join()  # the processes end by themselves, whatever they do about signals
