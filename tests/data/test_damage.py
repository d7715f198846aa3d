"""Damage at run time: found, retried, replaced by the same sample everywhere, counted, and fatal past a limit."""

import itertools
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from caduceus.config import Config
from caduceus.data import Batch, ShardedGenome, build_loader, build_validation, reading
from caduceus.data.shard_files import ShardFiles
from caduceus.errors import UserError
from tests.data.shard_fixture import Species


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "READ_WAITS", (0.0, 0.0))


@pytest.fixture
def damaged(shards: Path, tmp_path: Path) -> Path:
    """A copy of the dataset where one base of the first window of worm was changed into another base."""
    copy = Path(shutil.copytree(shards, tmp_path / "copy"))
    write_byte(copy, position=100, change=lambda base: b"A" if base in b"Cc" else b"C")
    return copy


def write_byte(directory: Path, position: int, change: Callable[[bytes], bytes]) -> None:
    table = ShardedGenome(directory).table("worm", "train")
    with table.shards[0].path.open("r+b") as file:
        file.seek(int(table.windows["offset"][0]) + position)
        base = file.read(1)
        file.seek(-1, 1)
        file.write(change(base))


def take(loader: object, count: int) -> list[Batch]:
    return list(itertools.islice(loader, count))


def tokens(batches: list[Batch]) -> list:
    return [(batch.g.tolist(), batch.input_ids.tolist(), batch.labels.tolist(), batch.substituted) for batch in batches]


@pytest.mark.moderate
def test_a_changed_base_is_found_and_its_window_replaced(
    configure: Callable[..., Config], damaged: Path, species: list[Species], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    sound, loader = (
        build_loader(configure(strands="forward")),
        build_loader(configure(path=str(damaged), strands="forward")),
    )
    before, after = take(sound, 100), take(loader, 100)
    replaced = 0
    for one, other in zip(before, after, strict=True):
        for row, g in enumerate(one.g.tolist()):
            where = sound.describe(g)
            bad = where["species"] == "worm" and where["start"] < 2048
            replaced += bad
            assert torch.equal(one.input_ids[row], other.input_ids[row]) != bad
    assert loader.substituted == replaced > 10
    assert sum(len(batch.substituted) for batch in after) == replaced
    assert caplog.text.count("crc32 differs from the index's; took") == replaced


@pytest.mark.slow
def test_all_workers_and_ranks_replace_alike(configure: Callable[..., Config], damaged: Path) -> None:
    alone = tokens(take(build_loader(configure(path=str(damaged))), 60))
    assert tokens(take(build_loader(configure(path=str(damaged), workers=4)), 60)) == alone
    rows = {g: (ids, labels) for numbers, *both, _ in alone for g, ids, labels in zip(numbers, *both, strict=True)}
    for rank in range(3):
        for numbers, ids, labels, _ in tokens(take(build_loader(configure(path=str(damaged)), rank=rank, world=3), 20)):
            assert [rows[g] for g in numbers] == list(zip(ids, labels, strict=True))


@pytest.mark.moderate
def test_peers_that_share_a_sequence_replace_alike(configure: Callable[..., Config], damaged: Path) -> None:
    whole = take(build_loader(configure(path=str(damaged))), 30)
    assert any(batch.substituted for batch in whole)
    for first, end in ((0, 100), (100, 256)):
        part = take(build_loader(configure(path=str(damaged)), positions=(first, end)), 30)
        for one, other in zip(whole, part, strict=True):
            assert torch.equal(one.input_ids[:, first:end], other.input_ids)
            assert torch.equal(one.labels[:, first:end], other.labels)


def test_too_much_damage_ends_the_run(configure: Callable[..., Config], damaged: Path) -> None:
    with pytest.raises(
        UserError, match=r"data\.max_substituted: 4 samples .* crc32 differs from the index's"
    ) as refusal:
        take(build_loader(configure(path=str(damaged), max_substituted=3)), 200)
    assert "\n" not in str(refusal.value)


@pytest.mark.moderate
def test_without_crc_bytes_that_are_no_bases_are_found(configure: Callable[..., Config], damaged: Path) -> None:
    settings = {"path": str(damaged), "check_crc": False, "strands": "forward"}
    assert not any(batch.substituted for batch in take(build_loader(configure(**settings)), 60))
    write_byte(damaged, position=300, change=lambda base: b"\x07")
    loader = build_loader(configure(**settings))
    for batch in take(loader, 60):
        named = {int(line.split()[1].rstrip(":")) for line in batch.substituted}
        holding = {
            g
            for g in batch.g.tolist()
            if loader.describe(g)["species"] == "worm" and loader.describe(g)["start"] == 256
        }
        assert named == holding  # the crop alone, so that workers agree which samples are replaced
    assert loader.substituted


@pytest.fixture
def failing_reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict]:
    """Reads of a shard fail as often as `state["failures"]` says."""
    state = {"failures": 0, "shard": "worm"}
    read_into = ShardFiles.read_into

    def fail_first(self: ShardFiles, file: int, offset: int, buffer: np.ndarray) -> None:
        if state["failures"] and state["shard"] in str(self.shards[file].path):
            state["failures"] -= 1
            raise OSError(5, "Input/output error")
        read_into(self, file, offset, buffer)

    monkeypatch.setattr(ShardFiles, "read_into", fail_first)
    yield state


@pytest.mark.moderate
def test_a_passing_read_error_changes_nothing(configure: Callable[..., Config], failing_reads: dict) -> None:
    expected = tokens(take(build_loader(configure()), 20))
    failing_reads["failures"] = 2
    assert tokens(take(build_loader(configure()), 20)) == expected
    loader = build_loader(configure())
    first = take(loader, 10)
    failing_reads["failures"] = 1  # now on windows that were checked before
    assert tokens(first + take(loader, 8)) == expected[:18]
    assert loader.substituted == 0


def test_a_lasting_read_error_is_replaced_and_then_fatal(configure: Callable[..., Config], failing_reads: dict) -> None:
    failing_reads["failures"] = 3
    loader = build_loader(configure(), positions=(0, 256))  # the whole, as of a rank without peers
    batches = take(loader, 20)
    assert loader.substituted == 1
    assert sum("Input/output error" in line for batch in batches for line in batch.substituted) == 1
    failing_reads["failures"] = 10**9
    with pytest.raises(UserError, match="10 other crops could not be read either"):
        take(build_loader(configure()), 20)


def test_validation_refuses_damage(configure: Callable[..., Config], shards: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(shards, tmp_path / "copy"))
    table = ShardedGenome(copy).table("yeast", "valid")
    with table.shards[0].path.open("r+b") as file:
        file.seek(int(table.windows["offset"][1]) + 5)
        file.write(b"ACGTTGCA")
    with pytest.raises(UserError, match=r"valid-000000\.tar: yeast I:\d+-\d+: its crc32 differs from the index's"):
        list(build_validation(configure(path=str(copy))))


@pytest.fixture
def sound_batches(configure: Callable[..., Config]) -> list[Batch]:
    return take(build_loader(configure()), 20)


@pytest.mark.slow
@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_fuzzed_files_are_refused_or_read_right(
    configure: Callable[..., Config],
    sound_batches: list[Batch],
    shards: Path,
    tmp_path_factory: pytest.TempPathFactory,
    data: st.DataObject,
) -> None:
    copy = Path(shutil.copytree(shards, tmp_path_factory.mktemp("fuzz") / "copy"))
    names = sorted(str(path.relative_to(copy)) for path in copy.rglob("*") if path.is_file())
    target = copy / data.draw(st.sampled_from(names))
    content = bytearray(target.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        match data.draw(st.sampled_from(["flip", "cut", "insert", "zero"])):
            case "flip":
                content[at] ^= data.draw(st.integers(1, 255))
            case "cut":
                del content[at : at + data.draw(st.integers(1, 600))]
                content = content or bytearray(b"x")
            case "insert":
                content[at:at] = data.draw(st.binary(min_size=1, max_size=20))
            case "zero":
                content[at : at + 512] = bytes(len(content[at : at + 512]))
    target.write_bytes(content)
    try:
        loader = build_loader(configure(path=str(copy), max_substituted=1000))
        batches = take(loader, 20)
    except UserError as refusal:
        assert "\n" not in str(refusal)
        return
    for one, other in zip(sound_batches, batches, strict=True):
        replaced = {int(line.split()[1].rstrip(":")) for line in other.substituted}
        kept = torch.tensor([g not in replaced for g in one.g.tolist()])
        assert torch.equal(one.input_ids[kept], other.input_ids[kept])
        assert torch.equal(one.labels[kept], other.labels[kept])
