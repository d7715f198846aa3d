"""Shards are fetched ahead of need: no wish is forgotten, never more than fits, and reading does not wait."""

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

from caduceus.config import Config
from caduceus.data import build_loader, cache
from caduceus.data.cache import Prefetcher, Shard, ShardCache
from caduceus.files import locked
from tests.data.shard_fixture import Species, random_bases, tile, write_dataset
from tests.data.shard_server import serving


class Fetches:
    """The shards fetched, in order, and those that the reader had to fetch itself."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.by_reader: list[str] = []
        self.lock = threading.Lock()

    def settle(self, prefetcher: Prefetcher) -> list[str]:
        """The names, once all threads of a prefetcher have nothing to do."""
        while len(prefetcher._changed._waiters) < cache._PREFETCH_THREADS:
            time.sleep(0.0005)
        return self.names


@pytest.fixture
def fetches(monkeypatch: pytest.MonkeyPatch) -> Iterator[Fetches]:
    fetch, seen = ShardCache.fetch, Fetches()

    def counted(self: ShardCache, shard: Shard, *, wait: bool = True) -> None:
        with seen.lock:
            seen.names.append(shard.path.name)
            if threading.current_thread() is threading.main_thread():
                seen.by_reader.append(shard.path.name)
        fetch(self, shard, wait=wait)

    monkeypatch.setattr(ShardCache, "fetch", counted)
    yield seen


@pytest.fixture
def shards_of_100(tmp_path: Path) -> list[Shard]:
    """Ten shards of 100 bytes that a cache in `tmp_path` can fetch."""
    found = []
    for number in range(10):
        origin = tmp_path / f"{number}.origin"
        origin.write_bytes(bytes([number]) * 100)
        path = tmp_path / "cache" / "set" / "species" / f"{number}.tar"
        found.append(Shard(path, 100, sha256(origin.read_bytes()).hexdigest(), str(origin)))
    return found


def test_fetching_pauses_at_half_of_the_cache_and_goes_on_with_reading(
    fetches: Fetches, shards_of_100: list[Shard], tmp_path: Path
) -> None:
    prefetcher = Prefetcher(ShardCache(tmp_path / "cache", 600))
    needs = [shard for shard in shards_of_100 for _ in range(5)]
    prefetcher.want(needs[:30], 0)
    assert sorted(fetches.settle(prefetcher)) == ["0.tar", "1.tar", "2.tar"]
    prefetcher.want(needs[30:], 30)  # nothing of the first list is forgotten
    assert len(fetches.settle(prefetcher)) == 3
    for sample in range(1, 51):
        prefetcher.advance(sample)
        assert sorted(fetches.settle(prefetcher)) == [f"{n}.tar" for n in range(min(10, 3 + (sample + 4) // 5))]
    assert sum(path.stat().st_size for path in tmp_path.glob("cache/*/*/*.tar")) <= 600


def test_what_leaves_the_cache_before_it_is_needed_again_is_fetched_again(
    fetches: Fetches, shards_of_100: list[Shard], tmp_path: Path
) -> None:
    prefetcher = Prefetcher(ShardCache(tmp_path / "cache", 600))
    needs = [0, 0, 1, 0, 2, 3, 4, 5, 6, 7, 0]
    prefetcher.want([shards_of_100[number] for number in needs[:4]], 0)
    prefetcher.want([shards_of_100[number] for number in needs[4:]], 4)
    for sample in range(1, len(needs) + 1):
        prefetcher.advance(sample)
        fetches.settle(prefetcher)
    assert [fetches.names.count(f"{number}.tar") for number in range(8)] == [2, 1, 1, 1, 1, 1, 1, 1]


def test_one_shard_larger_than_half_is_fetched_and_no_more(
    fetches: Fetches, shards_of_100: list[Shard], tmp_path: Path
) -> None:
    prefetcher = Prefetcher(ShardCache(tmp_path / "cache", 150))
    prefetcher.want(shards_of_100, 0)
    assert fetches.settle(prefetcher) == ["0.tar"]
    prefetcher.advance(1)
    assert fetches.settle(prefetcher) == ["0.tar", "1.tar"]


def test_a_shard_that_another_process_fetches_does_not_hold_up_the_next(
    fetches: Fetches, shards_of_100: list[Shard], tmp_path: Path
) -> None:
    for shard in shards_of_100[:3]:
        shard.path.parent.mkdir(parents=True, exist_ok=True)
    with (
        locked(shards_of_100[0].path.with_name(".0.tar.lock")),
        locked(shards_of_100[1].path.with_name(".1.tar.lock")),
        locked(shards_of_100[2].path.with_name(".2.tar.lock")),
    ):
        prefetcher = Prefetcher(ShardCache(tmp_path / "cache"))
        prefetcher.want(shards_of_100[:4], 0)
        fetches.settle(prefetcher)
        assert [path.name for path in tmp_path.glob("cache/*/*/*.tar")] == ["3.tar"]


@pytest.mark.moderate
@pytest.mark.parametrize("shuffle_block", [1, 2])
def test_reading_never_waits_where_the_server_keeps_up(
    configure: Callable[..., Config], tmp_path: Path, fetches: Fetches, shuffle_block: int
) -> None:
    """Over several epochs, whose blocks come and go in a cache that holds four of them."""
    bases = random_bases(np.random.default_rng(0), 24 * 512)
    one = Species("one", {"c": bases}, {"train": tile("c", len(bases), 512)}, strands="forward")
    path = write_dataset(tmp_path / "shards", [one], windows_per_shard=2)
    largest = max(tar.stat().st_size for tar in path.glob("*/*.tar"))
    settings = {"shuffle_block": shuffle_block, "seq_len": 64}
    with serving(path) as server:
        cache_settings = {"cache_dir": str(tmp_path / "cache"), "cache_bytes": 4 * shuffle_block * largest}
        loader = build_loader(configure(path=server.url, **cache_settings, **settings))
        batches = iter(loader)
        first = next(batches)
        prefetcher = loader._samples._reader._prefetcher
        plain = iter(build_loader(configure(path=str(path), **settings)))
        assert first.input_ids.equal(next(plain).input_ids)
        fetches.settle(prefetcher)
        fetches.by_reader.clear()
        for batch, other in itertools.islice(zip(batches, plain, strict=False), 170):  # three epochs and a half
            assert batch.input_ids.equal(other.input_ids)
            fetches.settle(prefetcher)
            assert sum(tar.stat().st_size for tar in tmp_path.glob("cache/*/*/*.tar")) <= 4 * shuffle_block * largest
    assert len(fetches.names) > 12 * 2 and fetches.by_reader == []
