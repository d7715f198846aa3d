"""Foreign tars as people have them: names with dots, links, duplicates, compression, and every kind of damage told."""

import bz2
import gzip
import io
import lzma
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from caduceus.data import tars
from caduceus.data.tars import TarFindings, read_members

BLOCK = tarfile.BLOCKSIZE
RNG = np.random.default_rng(0)
BASES = {f"s{number}": RNG.choice(list(b"ACGT"), 700).astype(np.uint8).tobytes() for number in range(1, 7)}
STORED = BLOCK + 2 * BLOCK + 2 * BLOCK
"""Bytes in the tar of a member of 700 bases and of the small one after it."""


def tar_of(members: dict[str, bytes], form: int = tarfile.USTAR_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


SOUND = tar_of(
    {name: content for key in BASES for name, content in ((f"{key}.seq", BASES[key]), (f"{key}.json", b"{}"))}
)


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., tuple[dict[str, bytes], str | None]]:
    """What is read of a tar of these bytes, and what is told about it without its address, damage before a remark."""

    def members(content: bytes, extension: str = "seq") -> tuple[dict[str, bytes], str | None]:
        path = tmp_path / "some.tar"
        path.write_bytes(content)
        report = TarFindings(str(path))
        found = list(read_members(report, extension))
        assert len(found) == len(dict(found))
        lines = [line for line in (report.line(), report.remark()) if line is not None]
        assert all(line.startswith(f"{path}: ") and "\n" not in line for line in lines)
        return dict(found), "; ".join(line.removeprefix(f"{path}: ") for line in lines) or None

    return members


def named(*keys: str) -> dict[str, bytes]:
    return {f"{key}.seq": BASES[key] for key in keys}


def with_bytes(content: bytes, at: int, new: bytes) -> bytes:
    return content[:at] + new + content[at + len(new) :]


@pytest.mark.parametrize("compress", [bytes, gzip.compress, bz2.compress, lzma.compress])
def test_a_sound_tar_is_read_whole_and_nothing_is_told(read: Callable, compress: Callable[[bytes], bytes]) -> None:
    assert read(compress(SOUND)) == (named(*BASES), None)


COMPRESS = [gzip.compress, bz2.compress, lzma.compress]


@pytest.mark.parametrize("compress", COMPRESS)
def test_joined_streams_are_one_file(read: Callable, compress: Callable[[bytes], bytes]) -> None:
    parts = [SOUND[:5000], b"", SOUND[5000:5001], SOUND[5001:]]
    assert read(b"".join(map(compress, parts))) == (named(*BASES), None)


PASSED_OVER = "{:,} bytes after the end of its compressed data are passed over"


@pytest.mark.parametrize("compress", COMPRESS)
@pytest.mark.parametrize(
    "junk",
    [b"\0", b"\n", bytes(10240), b"junk" * 100_000, b"\0\0\0\0sig", b"<html>moved</html>", b"\x1f", b"BZ", b"\xfd7"],
)
def test_bytes_behind_compressed_data_are_a_remark(
    read: Callable, compress: Callable[[bytes], bytes], junk: bytes
) -> None:
    assert read(compress(SOUND) + junk) == (named(*BASES), PASSED_OVER.format(len(junk)))


@pytest.mark.parametrize("compress", COMPRESS)
def test_bytes_behind_a_tar_that_is_cut_hide_no_damage(read: Callable, compress: Callable[[bytes], bytes]) -> None:
    assert read(compress(SOUND[: 3 * STORED]) + b"junk") == (
        named("s1", "s2", "s3"),
        f"{CUT}; {PASSED_OVER.format(4)}",
    )


@pytest.mark.parametrize("compress", [bz2.compress, lzma.compress])
def test_zeros_between_joined_streams_are_padding(read: Callable, compress: Callable[[bytes], bytes]) -> None:
    joined = compress(SOUND[:5000]) + bytes(1 << 16) + compress(SOUND[5000:])
    assert read(joined) == (named(*BASES), None)
    assert read(joined + bytes(4)) == (named(*BASES), PASSED_OVER.format(4))


@pytest.mark.parametrize("compress", COMPRESS)
@pytest.mark.parametrize("kept", [1, 5, 12, 30, -1])
def test_a_further_stream_that_is_cut_is_damage(read: Callable, compress: Callable[[bytes], bytes], kept: int) -> None:
    found, line = read(compress(SOUND[: 3 * STORED]) + compress(SOUND[3 * STORED :])[:kept])
    assert found.items() >= named("s1", "s2", "s3").items()
    told = CUT if kept == 1 else "cannot be decompressed any further"
    assert told in line or (kept == 5 and CUT in line)  # of xz, whose sign is longer


class Failing(io.BytesIO):
    """A connection that is lost in the midst of a file."""

    def read(self, size: int | None = -1) -> bytes:
        if not (piece := super().read(min(size, 1000))):
            raise ConnectionResetError(104, "Connection reset by peer")
        return piece


@pytest.mark.parametrize("compress", COMPRESS)
def test_a_lost_connection_is_no_damage_of_the_compression(
    compress: Callable[[bytes], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tars, "open_address", lambda _: Failing(compress(SOUND)[:3000]))
    report = TarFindings("http://host/some.tar.gz")
    assert set(dict(read_members(report, "seq"))) <= set(named(*BASES))
    assert "Connection reset by peer" in report.line() and "decompressed" not in report.line()


@pytest.mark.parametrize("name", ["zstd", "lz4"])
def test_another_compression_is_named_and_read_by_a_pipe(read: Callable, name: str, tmp_path: Path) -> None:
    if shutil.which(name) is None:
        pytest.skip(f"{name} is not installed")
    compressed = subprocess.run([name, "-c"], input=SOUND, capture_output=True, check=True).stdout
    found, line = read(compressed)
    assert (
        found == {}
        and line == f"is compressed with {name}, which is not supported; data.path='pipe:{name} -dc FILE' is"
    )
    (tmp_path / "FILE").write_bytes(compressed)
    report = TarFindings(f"pipe:cd {tmp_path} && {name} -dc FILE")
    assert dict(read_members(report, "seq")) == named(*BASES) and report.line() is None


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize(
    "name",
    ["NC_000001.11-0-64.seq", "a.b.c/x.1.seq", "UPPER.SEQ", "./chr1.seq", "é.seq", f"{'d' * 60}/{'n' * 70}.seq"],
)
def test_names_of_any_kind(read: Callable, name: str, form: int) -> None:
    assert read(tar_of({name: b"ACGT", "x.seq": b"TTTT", "NC_1.json": b"{}"}, form)) == (
        {name: b"ACGT", "x.seq": b"TTTT"},
        None,
    )


def test_an_extension_may_hold_dots_and_is_a_whole_one(read: Callable) -> None:
    members = {"a.fa.seq": b"ACGT", "b.seq": b"TTTT", "c.oseq": b"GGGG", "._b.seq": b"\0\5", "seq": b"x"}
    assert read(tar_of(members), "fa.seq") == ({"a.fa.seq": b"ACGT"}, None)
    assert read(tar_of(members), "SEQ") == ({"a.fa.seq": b"ACGT", "b.seq": b"TTTT"}, None)


@pytest.mark.moderate
def test_a_name_that_comes_again_is_left_out_and_told_once(read: Callable) -> None:
    copies = b"".join(tar_of(named("s1"))[: 3 * BLOCK] for _ in range(8113))
    assert read(copies + tar_of(named("s2"))) == (
        named("s1", "s2"),
        "members with the name of an earlier one are left out (s1.seq and 8,111 more)",
    )


def test_links_are_told(read: Callable) -> None:
    buffer = io.BytesIO(tar_of(named("s1")))
    with tarfile.open(fileobj=buffer, mode="a") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            member = tarfile.TarInfo(f"{kind.decode()}.seq")
            member.type, member.linkname = kind, "s1.seq"
            tar.addfile(member)
    assert read(buffer.getvalue()) == (
        named("s1"),
        "members that are links or not files are left out (2.seq and 1 more)",
    )


CUT = "has no end marker, so what follows may have been cut off"
HEADER = "damaged where a header is expected; reading goes on at the next header"


@pytest.mark.parametrize(
    ("content", "keys", "told"),
    [
        (SOUND[: 3 * STORED], ("s1", "s2", "s3"), CUT),
        (SOUND[: 6 * STORED], tuple(BASES), CUT),
        (SOUND[: 6 * STORED + BLOCK], tuple(BASES), CUT),  # half of the end marker
        (SOUND[: 3 * STORED + 100], ("s1", "s2", "s3"), f"ends inside a header, at byte {3 * STORED + 100:,}"),
        (SOUND[:100], (), "ends inside a header, at byte 100"),
        (SOUND[: 3 * STORED + BLOCK + 600], ("s1", "s2", "s3"), "ends inside s4.seq, which is left out"),
        (SOUND[: 3 * STORED + 4 * BLOCK + 1], ("s1", "s2", "s3", "s4"), "ends inside s4.json, which is left out"),
        (with_bytes(SOUND, 2 * STORED + 20, b"x"), ("s1", "s2", "s4", "s5", "s6"), f"{HEADER} (byte {2 * STORED:,})"),
        (with_bytes(SOUND, 2 * STORED + 3 * BLOCK, b"x"), tuple(BASES), HEADER),  # the header of a member not wanted
        (with_bytes(SOUND, 20, b"x"), ("s2", "s3", "s4", "s5", "s6"), "damaged where its first header is expected"),
        (with_bytes(SOUND, STORED, b"\xff" * 3 * STORED), ("s1", "s5", "s6"), HEADER),
        (
            with_bytes(SOUND, STORED, bytes(3 * STORED)),
            ("s1", "s5", "s6"),
            f"members; reading goes on (byte {4 * STORED:,})",
        ),
        (SOUND[: 6 * STORED] + b"\x07" * 4 * BLOCK, tuple(BASES), HEADER),
        (SOUND[:STORED] + SOUND[STORED + BLOCK :], ("s1", "s3", "s4", "s5", "s6"), HEADER),  # a block is missing
        (b"", (), "holds nothing"),
        (b"<html>not found</html>" * 100, (), "is no tar"),
        (b"short", (), "ends inside a header, at byte 5"),
    ],
)
def test_damage_is_told_once_and_the_rest_is_read(read: Callable, content: bytes, keys: tuple, told: str) -> None:
    found, line = read(content)
    assert found == named(*keys)
    assert told in line


def test_tars_joined_into_one_are_read_and_told(read: Callable) -> None:
    found, line = read(tar_of(named("s1", "s2")) + tar_of(named("s3")))
    assert found == named("s1", "s2", "s3") and "zeros between members" in line


@pytest.mark.parametrize("compress", COMPRESS)
@pytest.mark.parametrize("place", [0.3, 0.6, 0.9])
def test_a_changed_byte_of_a_compressed_tar_is_told(
    read: Callable, compress: Callable[[bytes], bytes], place: float
) -> None:
    content = bytearray(compress(SOUND))
    content[int(place * len(content))] ^= 0x10
    found, line = read(bytes(content))
    assert "cannot be decompressed any further" in line
    assert set(found) <= set(named(*BASES))


def test_a_changed_byte_that_decompresses_is_told_by_the_checksum(read: Callable) -> None:
    stored = bytearray(gzip.compress(SOUND, compresslevel=0))
    at = stored.index(BASES["s3"]) + 5
    stored[at] = ord("A") if stored[at] != ord("A") else ord("C")
    found, line = read(bytes(stored))
    assert "s1.seq" in found and "cannot be decompressed any further (damaged gzip (Error -6 Incorrect checksum" in line


@pytest.mark.parametrize("compress", COMPRESS)
def test_a_compressed_tar_that_was_cut_is_told(read: Callable, compress: Callable[[bytes], bytes]) -> None:
    content = compress(SOUND)
    for end in (len(content) // 2, len(content) - 1):
        found, line = read(content[:end])
        assert line and set(found) <= set(named(*BASES))


def test_a_tar_that_is_not_there_is_told(tmp_path: Path) -> None:
    report = TarFindings(str(tmp_path / "none.tar"))
    assert list(read_members(report, "seq")) == []
    assert report.line() == f"{tmp_path}/none.tar: No such file or directory"
    report = TarFindings("pipe:exit 3")
    assert list(read_members(report, "seq")) == []
    assert "the command ended with status 3" in report.line()
