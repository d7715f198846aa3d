"""A window is read whole once on a node, however many ranks and workers read from it; freshly fetched ones never."""

import itertools
import multiprocessing
import pickle
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from caduceus.config import Config
from caduceus.data import ShardedGenome, build_loader
from caduceus.data.shard_files import ShardFiles
from caduceus.data.verdicts import Verdicts
from tests.data.shard_server import Server

FORK = multiprocessing.get_context("fork")


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list]:
    """(bytes) of every read, by this process and those that it forks."""
    sizes = FORK.Array("q", 4096)
    count = FORK.Value("q", 0)
    read_into = ShardFiles.read_into

    def counted(self: ShardFiles, file: int, offset: int, buffer: np.ndarray) -> None:
        read_into(self, file, offset, buffer)
        with count.get_lock():
            sizes[count.value] = len(buffer)
            count.value += 1

    monkeypatch.setattr(ShardFiles, "read_into", counted)
    yield lambda: sizes[: count.value]


def take(loader: object, count: int) -> list:
    return [(batch.g.tolist(), batch.input_ids.tolist()) for batch in itertools.islice(loader, count)]


def window_bytes(shards: Path) -> int:
    """Bases of all windows to train on, each once."""
    genome = ShardedGenome(shards)
    return sum(genome.table(name, "train").bases for name in genome.species)


@pytest.mark.moderate
def test_ranks_that_share_sequences_read_whole_windows_once(
    configure: Callable[..., Config], shards: Path, reads: Callable[[], list]
) -> None:
    slices = [(0, 64), (64, 128), (128, 256)]
    loaders = [build_loader(configure(), positions=positions) for positions in slices]
    for loader in loaders:
        take(loader, 60)
    crops = [size for size in reads() if size in (64, 128)]
    whole = [size for size in reads() if size > 256]
    assert len(crops) == 3 * 240 and sum(crops) == 240 * 256
    assert sum(whole) == window_bytes(shards)  # 240 samples see every window; three ranks would read three times this
    del loaders, loader
    take(build_loader(configure()), 60)  # the next start trusts none of it
    assert sum(size for size in reads() if size > 256) == 2 * window_bytes(shards)


def _take(config: Config, positions: tuple[int, int], barrier: object) -> None:
    loader = build_loader(config, positions=positions)
    barrier.wait()
    take(loader, 60)


@pytest.mark.moderate
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_processes_that_meet_at_a_window_check_it_once(
    configure: Callable[..., Config],
    shards: Path,
    reads: Callable[[], list],
    monkeypatch: pytest.MonkeyPatch,
    workers: int,
) -> None:
    barrier = FORK.Barrier(4)
    deciding = Verdicts.deciding

    def slow(self: Verdicts, window: int):
        time.sleep(0.01)  # all have looked before the first decides
        return deciding(self, window)

    monkeypatch.setattr(Verdicts, "deciding", slow)
    config = configure(workers=workers)
    slices = [(first, first + 64) for first in range(0, 256, 64)]
    ranks = [FORK.Process(target=_take, args=(config, positions, barrier)) for positions in slices]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert [rank.exitcode for rank in ranks] == [0] * 4
    assert sum(size for size in reads() if size > 256) == window_bytes(shards)


@pytest.mark.moderate
def test_shards_fetched_since_the_start_are_not_read_whole(
    configure: Callable[..., Config], server: Server, shards: Path, tmp_path: Path, reads: Callable[[], list]
) -> None:
    config = configure(path=server.url, cache_dir=str(tmp_path))
    first = take(build_loader(config), 60)
    assert max(reads()) == 256
    assert take(build_loader(config), 60) == first  # another start finds old copies, which may have rotted
    assert sum(size for size in reads() if size > 256) == window_bytes(shards)


def test_verdicts_are_shared_by_subject_and_end_with_their_processes() -> None:
    one, same, other = Verdicts(["a"], 5), Verdicts(["a"], 5), Verdicts(["b"], 5)
    one.sound[3] = True
    assert same.sound.tolist() == pickle.loads(pickle.dumps(one)).sound.tolist() == [False, False, False, True, False]
    assert not other.sound.any()
    del one, same
    assert not Verdicts(["a"], 5).sound.any()


def test_nothing_is_left_behind_and_no_place_is_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("caduceus.data.verdicts._MEMORY", tmp_path)
    verdicts = Verdicts(["a"], 5)
    (file,) = tmp_path.iterdir()
    assert file.stat().st_mode & 0o777 == 0o600
    del verdicts
    assert not list(tmp_path.iterdir())
    file.symlink_to(tmp_path / "elsewhere")
    alone, again = Verdicts(["a"], 5), Verdicts(["a"], 5)
    alone.sound[1] = True
    with alone.deciding(1):
        assert not again.sound.any()
    assert not (tmp_path / "elsewhere").exists()
