"""Foreign tars without an index: usable crops only, every tar read, damage told, and the weaker guarantees stated."""

import gzip
import io
import itertools
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from caduceus.alphabet import CADUCEUS, IGNORE_LABEL
from caduceus.config import Config
from caduceus.data import Batch, build_loader, build_validation
from caduceus.errors import UserError
from tests.data.shard_fixture import complement_string, random_bases


def write_tar(path: Path, members: dict[str, str]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content.encode()))
    return path


@pytest.fixture
def sequences() -> list[str]:
    rng = np.random.default_rng(0)
    return [random_bases(rng, int(length)) for length in rng.integers(200, 700, 30)]


@pytest.fixture
def tars(sequences: list[str], tmp_path: Path) -> str:
    """Five tars of six sequences each, of which every third begins with N; a member of another kind beside each."""
    for number in range(5):
        members = {}
        for row in range(6 * number, 6 * number + 6):
            members[f"s{row}.dna"] = ("N" * 64 if row % 3 == 0 else "") + sequences[row] + "\n"
            members[f"s{row}.json"] = "{}"
        write_tar(tmp_path / f"{number}.tar", members)
    return f"{tmp_path}/{{0..4}}.tar"


@pytest.fixture
def stream(configure: Callable[..., Config], tars: str) -> Callable[..., Config]:
    def make(**data) -> Config:
        return configure(**{"mode": "stream", "path": tars, "stream_key": "dna", "seq_len": 64, **data})

    return make


def take(loader: object, count: int) -> list[Batch]:
    return list(itertools.islice(loader, count))


def texts(batches: list[Batch]) -> list[bytes]:
    """The true tokens of each sample, with its masks undone."""
    rows = []
    for batch in batches:
        rows.extend(torch.where(batch.labels == IGNORE_LABEL, batch.input_ids, batch.labels).numpy().astype(np.uint8))
    return [row.tobytes() for row in rows]


def usable_crops(sequences: list[str]) -> list[bytes]:
    crops = [text[begin : begin + 64] for text in sequences for begin in range(0, len(text) - 63, 64)]
    return [CADUCEUS.encode(np.frombuffer(crop.encode(), np.uint8)).tobytes() for crop in crops]


@pytest.mark.moderate
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_samples_are_the_usable_crops(stream: Callable[..., Config], sequences: list[str], workers: int) -> None:
    loader = build_loader(stream(strands="forward", workers=workers))
    batches = take(loader, 500)
    assert [batch.g.tolist() for batch in batches] == [list(range(4 * n, 4 * n + 4)) for n in range(500)]
    counts = Counter(texts(batches))
    assert set(counts) == set(usable_crops(sequences))  # all of them, and none of the N
    assert sum(batch.labels.ne(IGNORE_LABEL).sum() for batch in batches) > 0.1 * 2000 * 64


def test_both_strands_are_shown(stream: Callable[..., Config], sequences: list[str]) -> None:
    forward = set(usable_crops(sequences))
    backward = {
        CADUCEUS.encode(np.frombuffer(complement_string(text[begin : begin + 64]).encode(), np.uint8)).tobytes()
        for text in sequences
        for begin in range(0, len(text) - 63, 64)
    }
    seen = texts(take(build_loader(stream()), 50))
    assert set(seen) <= forward | backward
    assert 60 < sum(text in forward for text in seen) < 140


@pytest.mark.moderate
def test_the_same_layout_gives_the_same_batches(stream: Callable[..., Config]) -> None:
    one, other = (take(build_loader(stream(), rank=1, world=3), 20) for _ in range(2))
    assert texts(one) == texts(other)
    later = build_loader(stream(), rank=1, world=3)
    state = build_loader(stream()).state() | {"samples_consumed": 48}
    later.load_state(state)
    assert later.state() == state
    resumed = take(later, 20)
    assert resumed[0].g[0] == 48 + 1 and texts(resumed) != texts(one)


@pytest.mark.moderate
def test_slices_are_those_of_the_whole(stream: Callable[..., Config]) -> None:
    for settings in ({}, {"objective": "next_base", "model": {"bidirectional": False}}):
        whole = take(build_loader(stream(**settings)), 10)
        for first, end in ((0, 10), (10, 64)):
            for one, other in zip(
                take(build_loader(stream(**settings), positions=(first, end)), 10), whole, strict=True
            ):
                assert torch.equal(one.input_ids, other.input_ids[:, first:end])
                assert torch.equal(one.labels, other.labels[:, first:end])


def test_the_weaker_guarantees_are_logged(stream: Callable[..., Config], caplog: pytest.LogCaptureFixture) -> None:
    loader = build_loader(stream())
    for words in (
        "5 tars without an index",
        "ranks and workers",
        "may repeat or be missed",
        "goes unseen",
        "no coordinates",
    ):
        assert words in caplog.text
    assert loader.describe(7) == {"species": "stream", "sample": 7}


@pytest.fixture
def damaged(tars: str, tmp_path: Path) -> str:
    """The five tars with one cut in a header, one with a member that is no bases, one with a name 30 times."""
    (tmp_path / "2.tar").write_bytes((tmp_path / "2.tar").read_bytes()[:1800])
    write_tar(tmp_path / "3.tar", {"a.dna": "ACGT!" * 40, "b.dna": "ACGT" * 40})
    copies = b"".join((tmp_path / "4.tar").read_bytes()[:2048] for _ in range(30))
    (tmp_path / "4.tar").write_bytes(copies + (tmp_path / "4.tar").read_bytes())
    return tars


@pytest.mark.moderate
@pytest.mark.parametrize("workers", [0, pytest.param(3, marks=pytest.mark.slow)])
def test_each_damaged_tar_is_told_and_counted_once(
    stream: Callable[..., Config], damaged: str, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    loader = build_loader(stream(max_substituted=3, workers=workers))
    batches = take(loader, 600)
    met = [line for batch in batches for line in batch.substituted]
    assert len(met) > 20  # passes over damaged tars
    assert loader.substituted == len(set(met)) == 3
    told = [record.getMessage() for record in caplog.records if "dna" in record.message or "header" in record.message]
    assert sorted(line.rpartition("/")[2] for line in told) == [
        "2.tar: ends inside a header, at byte 1,800",
        "3.tar: members with bytes that are not bases are left out (a.dna)",
        "4.tar: members with the name of an earlier one are left out (s24.dna and 29 more)",
    ]
    with pytest.raises(UserError, match=r"data\.max_substituted: 3 tars are damaged; the last: .*tar: "):
        take(build_loader(stream(max_substituted=2, workers=workers)), 600)


@pytest.mark.moderate
@pytest.mark.parametrize("bad", [b"no tar", None, b"\0" * 10240])
def test_a_tar_without_a_crop_ends_no_run(stream: Callable[..., Config], tmp_path: Path, bad: bytes | None) -> None:
    """However often one rank meets it in a row."""
    urls = [str(write_tar(tmp_path / f"good{n}.tar", {"a.dna": "ACGT" * 16})) for n in range(2)]
    if bad is not None:
        (tmp_path / "bad.tar").write_bytes(bad)
    for rank in range(3):
        loader = build_loader(stream(path=[*urls, str(tmp_path / "bad.tar")]), rank=rank, world=3)
        assert set(texts(take(loader, 400))) <= set(usable_crops(["ACGT" * 16]))
        assert loader.substituted == (bad != b"\0" * 10240)


@pytest.mark.moderate
@pytest.mark.parametrize("workers", [0, 2])
def test_a_whole_tar_without_a_crop_is_told_once(
    stream: Callable[..., Config], tmp_path: Path, caplog: pytest.LogCaptureFixture, workers: int
) -> None:
    good = str(write_tar(tmp_path / "good.tar", {"a.dna": "ACGT" * 16}))
    other = str(write_tar(tmp_path / "other.tar", {"a.fa": "ACGT" * 16}))
    short = str(write_tar(tmp_path / "short.tar", {"a.dna": "ACGT"}))
    loader = build_loader(stream(path=[good, other, short], workers=workers, max_substituted=0))
    take(loader, 300)
    told = sorted(record.getMessage() for record in caplog.records if "crop" in record.getMessage())
    line = "has no usable crop of 64 bases in members named *.dna (data.stream_key)"
    assert [text.rpartition("/")[2] for text in told] == [
        f"other.tar: {line}; the files in this one end in .fa",
        f"short.tar: {line}",
    ]
    assert loader.substituted == 0


@pytest.mark.moderate
def test_names_with_dots_hold_crops(stream: Callable[..., Config], tmp_path: Path, sequences: list[str]) -> None:
    write_tar(tmp_path / "dots.tar", {f"NC_000001.11-{n}-64.dna": text for n, text in enumerate(sequences)})
    loader = build_loader(stream(path=str(tmp_path / "dots.tar"), strands="forward"))
    assert set(texts(take(loader, 300))) == set(usable_crops(sequences))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"stream_key": "seq"}, r"usable crop of 64 bases in members named \*\.seq .*this one end in \.dna, \.json"),
        ({"seq_len": 1000}, "usable crop of 1000 bases"),
        ({"path": "/nonexistent/{0..2}.tar"}, r"usable crop .* No such file"),
        ({"path": [3]}, r"data\.path: in stream mode"),
        ({"path": [{"path": "x", "weight": 1}]}, r"data\.path: in stream mode"),
        ({"path": None}, r"data\.path: in stream mode"),
        ({"path": "dir/{{0..2}.tar"}, r"data\.path: .*[Uu]nbalanced"),
    ],
)
def test_what_cannot_be_streamed_is_one_clear_line(stream: Callable[..., Config], changed: dict, message: str) -> None:
    with pytest.raises(UserError, match=message) as refusal:
        take(build_loader(stream(**changed)), 5)
    assert "\n" not in str(refusal.value)


@pytest.mark.moderate
def test_validation_takes_the_first_crops_of_its_own_tars(
    stream: Callable[..., Config], sequences: list[str], tmp_path: Path
) -> None:
    def rows(world: int, **settings) -> dict[int, bytes]:
        found = {}
        for rank in range(world):
            for name, batch in build_validation(stream(**settings), rank=rank, world=world):
                assert name == "stream"
                for row, g in enumerate(batch.g.tolist()):
                    if g >= 0:
                        found[g] = batch.input_ids[row].numpy().tobytes()
        return found

    config = {"valid_path": f"{tmp_path}/{{3..4}}.tar", "valid": {"samples": 9}}
    alone = rows(1, **config)
    assert sorted(alone) == list(range(9))
    assert rows(2, **config) == alone == rows(1, train={"seed": 3}, **config)
    batches = [batch for _, batch in build_validation(stream(**config))]
    assert texts(batches) == usable_crops(sequences[18:])[:9]
    with pytest.raises(UserError, match=r"data\.valid_path: needed"):
        build_validation(stream())


def test_validation_refuses_damage(stream: Callable[..., Config], damaged: str, tmp_path: Path) -> None:
    for name, problem in (
        (2, "ends inside a header"),
        (3, "bytes that are not bases"),
        (4, "the name of an earlier one"),
    ):
        with pytest.raises(UserError, match=rf"data\.valid_path: .*/{name}\.tar: .*{problem}"):
            build_validation(stream(valid_path=f"{tmp_path}/{name}.tar", valid={"samples": 9}))


@pytest.mark.moderate
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_bytes_behind_a_compressed_tar_are_told_once_and_are_no_damage(
    stream: Callable[..., Config], tmp_path: Path, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    tar = write_tar(tmp_path / "a.tar", {"a.dna": "ACGT" * 16})
    url = str(tmp_path / "a.tar.gz")
    Path(url).write_bytes(gzip.compress(tar.read_bytes()) + b"an index\n" * 100)
    line = f"{url}: 900 bytes after the end of its compressed data are passed over"
    loader = build_loader(stream(path=url, workers=workers, max_substituted=0))
    take(loader, 200)
    assert [record.getMessage() for record in caplog.records if "behind" in record.getMessage()] == [f"data: {line}"]
    assert loader.substituted == 0
    build_validation(stream(valid_path=url, valid={"samples": 9}))
    assert caplog.records[-1].getMessage() == f"data.valid_path: {line}"


@pytest.mark.moderate
def test_rna_is_read_as_dna_and_told_once(
    stream: Callable[..., Config], tmp_path: Path, sequences: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    whole = [text for text in sequences if "T" in text]
    write_tar(tmp_path / "dna.tar", {f"{n}.dna": text for n, text in enumerate(whole)})
    rna = {f"{n}.dna": text.replace("T", "U").replace("t", "u") for n, text in enumerate(whole)}
    url = str(write_tar(tmp_path / "rna.tar", rna))
    of_dna = take(build_loader(stream(path=str(tmp_path / "dna.tar"))), 200)
    loader = build_loader(stream(path=url, max_substituted=0))
    assert texts(take(loader, 200)) == texts(of_dna)
    told = [record.getMessage() for record in caplog.records if "RNA" in record.getMessage()]
    assert told == [f"data: {url}: holds RNA (U): every U is read as T"] and loader.substituted == 0
