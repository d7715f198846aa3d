"""Ranks that share a sequence take the same crops where some cannot be read: those that one rank alone would take."""

import itertools
import json
import multiprocessing
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from caduceus.config import Config
from caduceus.data import ShardedGenome, build_loader, reading
from caduceus.data.shard_files import ShardFiles
from caduceus.distributed.ranks import Ranks
from caduceus.errors import ONE_LINE, one_line
from tests.distributed.layouts import Layout, config_of, train_all
from tests.distributed.ranks import on_ranks

pytestmark = pytest.mark.slow

SINGLE = Layout("single", 1, {"strategy": "single"})
CONTEXT = Layout("context 2", 2, {"strategy": "ddp", "context": 2})
STRANDS = Layout("context 2 x strands 2", 4, {"strategy": "ddp", "context": 2, "strands": 2})
BOTH = Layout("DDP 2 x context 2", 4, {"strategy": "ddp", "context": 2})
TAKEN = 40
"""Micro-batches that the loaders are compared over."""


@pytest.fixture(scope="module")
def damaged(small_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of which one base in a hundred is none, so that half of all crops of 64 bases cannot be used."""
    copy = Path(shutil.copytree(small_shards, tmp_path_factory.mktemp("damaged") / "shards"))
    table = ShardedGenome(copy).table("small", "train")
    (shard,) = table.shards
    content = bytearray(shard.path.read_bytes())
    generator = np.random.default_rng(0)
    for window in table.windows:
        length = int(window["length"])
        for place in generator.choice(length, length // 100, replace=False):
            content[int(window["offset"]) + int(place)] = 7
    shard.path.write_bytes(content)
    return copy


@pytest.fixture(scope="module")
def changed(small_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of which every third window has one base changed into another, as only its crc32 tells."""
    copy = Path(shutil.copytree(small_shards, tmp_path_factory.mktemp("changed") / "shards"))
    table = ShardedGenome(copy).table("small", "train")
    content = bytearray(table.shards[0].path.read_bytes())
    for window in table.windows[::3]:
        place = int(window["offset"]) + 5
        content[place] = ord("A") if content[place] in b"Cc" else ord("C")
    table.shards[0].path.write_bytes(content)
    return copy


@pytest.mark.parametrize(("damage", "layouts"), [("damaged", [BOTH, STRANDS]), ("changed", [CONTEXT])])
def test_training_on_damaged_shards_is_that_of_one_rank(
    damage: str, layouts: list[Layout], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    shards = request.getfixturevalue(damage)
    runs = {}
    for layout in (SINGLE, *layouts):
        config = config_of(layout, shards, tmp_path / layout.name, precision="fp64", steps=6)
        config.data.check_crc = damage == "changed"
        ((observed, *_),) = train_all(layout.world, [config])
        assert observed.refusal is None
        rows = [json.loads(line) for line in (Path(config.run.dir) / "metrics.jsonl").read_text().splitlines()]
        runs[layout.name] = [row["loss"] for row in rows], [row["substituted_samples"] for row in rows]
    losses, substituted = runs.pop("single")
    assert substituted[-1] > 10 and substituted == sorted(substituted)
    for name, (others, counted) in runs.items():
        assert others == pytest.approx(losses, rel=1e-9), name  # fp64 sums in another order
        assert counted == substituted, name


Taken = list[tuple[list[int], torch.Tensor, torch.Tensor, list[str]]]


def take_with_a_failing_disk(rank: int, config: Config, share: int, failing: bool) -> tuple[Taken, str | None]:
    """What a rank reads of its slice (of the whole if `share` is 1) where one byte in 150 cannot be read.

    `failing`: no byte can be read on rank 1.
    """
    read_into = ShardFiles.read_into

    def fail_on_bad_bytes(self: ShardFiles, file: int, offset: int, buffer: np.ndarray) -> None:
        if (failing and rank == 1) or -offset % 150 < len(buffer):
            raise OSError(5, "Input/output error")
        read_into(self, file, offset, buffer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ShardFiles, "read_into", fail_on_bad_bytes)
        patch.setattr(reading, "READ_WAITS", (0.0, 0.0))
        width = config.data.seq_len // share
        peers = Ranks(rank, share, share, torch.device("cpu")).largest_of_peers if share > 1 else None
        loader = build_loader(config, positions=(rank * width, (rank + 1) * width), largest_of_peers=peers)
        try:
            batches = list(itertools.islice(loader, TAKEN))
        except ONE_LINE as error:
            return [], one_line(error)
    return [
        (batch.g.tolist(), batch.input_ids, batch.labels, [line.split(":")[0] for line in batch.substituted])
        for batch in batches
    ], None


def take_all(rank: int, cases: list[tuple[Config, bool]]) -> list[tuple[Taken, str | None]]:
    multiprocessing.set_start_method("fork", force=True)  # a rank is spawned; its workers have to fail as it does
    return [take_with_a_failing_disk(rank, config, 2, failing) for config, failing in cases]


def test_what_one_peer_cannot_read_all_replace_or_all_end(small_shards: Path, tmp_path: Path) -> None:
    configs = [config_of(SINGLE, small_shards, tmp_path / "run", accumulation=4) for _ in range(2)]
    for config, workers in zip(configs, (0, 2), strict=True):
        config.data.check_crc, config.data.workers = False, workers
    whole, refusal = take_with_a_failing_disk(0, configs[0], 1, failing=False)
    assert refusal is None
    replaced = sum(len(lines) for *_, lines in whole)
    assert TAKEN * 0.7 < replaced < TAKEN * 1  # 64 of 150 places of 80 samples
    cases = [*((config, False) for config in configs), (configs[0], True)]
    *pairs, (bystander, failed) = zip(*on_ranks(2, take_all, cases), strict=True)
    for (left, _), (right, _) in pairs:
        for (g, ids, labels, lines), one, other in zip(whole, left, right, strict=True):
            assert one[0] == other[0] == g
            assert torch.equal(torch.cat([one[1], other[1]], 1), ids)
            assert torch.equal(torch.cat([one[2], other[2]], 1), labels)
            assert one[3] == other[3] == lines
    assert "Input/output error; 10 other crops could not be read either" in failed[1]
    assert bystander[1] == "another rank that shares the sequence failed; it says why"
