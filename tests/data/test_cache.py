"""Shards behind URLs: the same batches, whole and checked copies only, a bounded size, several processes, kills."""

import itertools
import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path

import fsspec
import numpy as np
import pytest

from caduceus.config import Config
from caduceus.data import ShardedGenome, build_loader, build_validation, cache
from caduceus.data.cache import Prefetcher, Shard, ShardCache
from caduceus.data.remote import RemoteError, join, read_chunks
from caduceus.data.shard_files import ShardFiles
from caduceus.errors import UserError
from tests.data.shard_fixture import Species
from tests.data.shard_server import Server
from tests.object_store import s3_bucket


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "FETCH_WAITS", (0, 0))


def tokens(loader: object, count: int) -> list:
    batches = itertools.islice(loader, count)
    return [(batch.g.tolist(), batch.input_ids.tolist(), batch.labels.tolist(), batch.substituted) for batch in batches]


def tars(directory: Path) -> list[Path]:
    return list(directory.glob("*/*/*.tar"))


def leftovers(directory: Path) -> list[Path]:
    return list(directory.glob("*/*/.*.partial"))


@pytest.mark.parametrize("scheme", ["http", "pipe", "file", "local"])
@pytest.mark.parametrize("workers", [0, pytest.param(3, marks=pytest.mark.slow)])
def test_batches_are_those_of_the_local_shards(
    configure: Callable[..., Config], shards: Path, server: Server, tmp_path: Path, scheme: str, workers: int
) -> None:
    path = {"http": server.url, "pipe": f"pipe:cat {shards}/{{}}", "file": f"file://{shards}", "local": str(shards)}[
        scheme
    ]
    cached = configure(path=path, cache_dir=str(tmp_path / "cache"), workers=workers, allow_commands=scheme == "pipe")
    assert tokens(build_loader(cached), 20) == tokens(build_loader(configure()), 20)
    fixed = [(name, batch.input_ids.tolist()) for name, batch in build_validation(cached)]
    assert fixed == [(name, batch.input_ids.tolist()) for name, batch in build_validation(configure())]
    originals = {path.read_bytes() for path in shards.glob("*/*.tar")}
    assert {path.read_bytes() for path in tars(tmp_path / "cache")} == originals
    assert not leftovers(tmp_path / "cache")


@pytest.mark.moderate
def test_batches_from_a_bucket(
    configure: Callable[..., Config], shards: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    files = {f"data/{file.relative_to(shards)}": file for file in shards.rglob("*") if file.is_file()}
    with s3_bucket(monkeypatch, files) as bucket:
        bucket_config = configure(path=f"{bucket}/data", cache_dir=str(tmp_path))
        assert tokens(build_loader(bucket_config), 20) == tokens(build_loader(configure()), 20)
        with pytest.raises(UserError, match=r"s3://genomes/other/manifest\.json") as error:
            build_loader(configure(path=f"{bucket}/other", cache_dir=str(tmp_path)))
        assert "\n" not in str(error.value)


@pytest.mark.moderate
@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"ENDPOINT_URL": "http://127.0.0.1:9"}, r"cannot be downloaded \(Could not connect.*check the address"),
        ({"ACCESS_KEY_ID": None, "SECRET_ACCESS_KEY": None}, r"locate credentials\); check your credentials"),
    ],
)
def test_a_bucket_that_cannot_be_reached_is_one_clear_line(
    configure: Callable[..., Config],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    environment: dict[str, str | None],
    reason: str,
) -> None:
    pytest.importorskip("s3fs")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    settings = {"ACCESS_KEY_ID": "key", "SECRET_ACCESS_KEY": "secret", "MAX_ATTEMPTS": "1"} | environment
    for name, value in (settings | {"EC2_METADATA_DISABLED": "true", "CONFIG_FILE": str(tmp_path / "none")}).items():
        monkeypatch.setenv(f"AWS_{name}", value) if value else monkeypatch.delenv(f"AWS_{name}", raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    with pytest.raises(UserError, match=rf"data\.path: s3://genomes/data/manifest\.json: .*{reason}") as error:
        build_loader(configure(path="s3://genomes/data", cache_dir=str(tmp_path)))
    assert "\n" not in str(error.value)


def test_a_second_start_and_other_ranks_fetch_nothing_again(
    configure: Callable[..., Config], server: Server, tmp_path: Path
) -> None:
    config = configure(path=server.url, cache_dir=str(tmp_path))
    for rank in range(3):
        tokens(build_loader(config, rank=rank, world=3), 20)
    asked = [path for path in server.asked if not path.endswith("manifest.json")]
    assert len(asked) == len(set(asked)) and any(path.endswith(".tar") for path in asked)


def test_random_access_through_the_cache(server: Server, species: list[Species], tmp_path: Path) -> None:
    genome = ShardedGenome(server.url, ShardCache(tmp_path))
    assert genome.read("fly", "chr1", 5000, 5100).tobytes().decode() == species[0].contigs["chr1"][5000:5100]
    assert len(tars(tmp_path)) == 1


def test_the_limit_holds_and_the_longest_unused_goes_first(server: Server, shards: Path, tmp_path: Path) -> None:
    genome = ShardedGenome(server.url, ShardCache(tmp_path))
    shards_of = [shard for name in genome.species for shard in genome.table(name, "train").shards]
    limit = 3 * max(shard.bytes for shard in shards_of)
    bounded = ShardCache(tmp_path, limit)
    order = []
    for shard in [*shards_of, *shards_of[::-1], shards_of[0]]:
        os.close(bounded.open(shard))
        order = [one for one in order if one != shard] + [shard]
        held = tars(tmp_path)
        assert sum(path.stat().st_size for path in held) <= limit
        assert set(held) == {one.path for one in order[-len(held) :]}
    assert len(held) >= 3
    with pytest.raises(UserError, match=r"data\.cache_bytes: 5 is less than"):
        ShardCache(tmp_path / "other", 5).fetch(Shard(tmp_path / "other" / "a" / "b" / "c.tar", 6, "", "x"))


@pytest.mark.slow
def test_batches_are_right_while_shards_come_and_go(
    configure: Callable[..., Config], shards: Path, server: Server, tmp_path: Path
) -> None:
    limit = 2 * max(path.stat().st_size for path in shards.glob("*/*.tar"))
    for workers in (0, 3):
        config = configure(path=server.url, cache_dir=str(tmp_path), cache_bytes=limit, workers=workers)
        assert tokens(build_loader(config), 60) == tokens(build_loader(configure()), 60)
        assert sum(path.stat().st_size for path in tars(tmp_path)) <= limit


@pytest.mark.moderate
def test_broken_connections_are_tried_again(
    configure: Callable[..., Config], server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server.failures = 2
    config = configure(path=server.url, cache_dir=str(tmp_path))
    assert tokens(build_loader(config), 10) == tokens(build_loader(configure()), 10)
    assert not leftovers(tmp_path)


def test_an_index_is_tried_again(
    configure: Callable[..., Config], server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "FETCH_WAITS", (3,))
    monkeypatch.setattr(cache.time, "sleep", lambda seconds: server.statuses.clear())
    server.statuses["index.npz"] = 503
    assert tokens(build_loader(configure(path=server.url, cache_dir=str(tmp_path))), 1)
    assert not server.statuses


def test_what_never_matches_the_manifest_never_appears(server: Server, shards: Path, tmp_path: Path) -> None:
    genome = ShardedGenome(server.url, ShardCache(tmp_path))
    (shard, *_) = genome.table("fly", "train").shards
    source = shards / "fly" / "train-000000.tar"
    size = source.stat().st_size
    wrong = {"other": "0" * 64, "long": shard.sha256, "short": shard.sha256}
    for name, sha256 in wrong.items():
        claimed = {"other": size, "long": size - 1, "short": size + 1}[name]
        bad = Shard(shard.path.with_name(f"{name}.tar"), claimed, sha256, shard.origin)
        with pytest.raises(OSError, match="are not the shard of the manifest"):
            ShardCache(tmp_path).open(bad)
        assert not bad.path.exists() and not leftovers(tmp_path)


def test_a_cached_copy_that_rots_is_fetched_again(
    configure: Callable[..., Config], server: Server, tmp_path: Path
) -> None:
    config = configure(path=server.url, cache_dir=str(tmp_path))
    expected = tokens(build_loader(config), 20)
    for path in [*tars(tmp_path), *tmp_path.glob("*/*/*.npz")]:
        content = bytearray(path.read_bytes())
        content[600:] = bytes(len(content) - 600)
        path.write_bytes(content)
    assert tokens(build_loader(config), 20) == expected


def test_a_copy_that_rots_as_soon_as_it_appears_does_not_count_as_checked(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (shard, *_) = ShardedGenome(server.url, ShardCache(tmp_path)).table("fly", "train").shards
    rename, later = Path.rename, []

    def rename_and_rot(path: Path, target: Path) -> None:
        rename(path, target)
        target.write_bytes(bytes(shard.bytes))
        later.append(ShardCache(tmp_path))  # of a start that begins now

    monkeypatch.setattr(Path, "rename", rename_and_rot)
    ShardCache(tmp_path).fetch(shard)
    assert not later[0].has_checked(shard)


def whole(files: ShardFiles) -> bytes:
    buffer = np.empty(files.shards[0].bytes, np.uint8)
    files.read_into(0, 0, buffer)
    return buffer.tobytes()


def test_who_has_a_rotten_copy_open_reads_the_one_that_another_process_fetched(
    shards: Path, server: Server, tmp_path: Path
) -> None:
    (shard, *_) = ShardedGenome(server.url, ShardCache(tmp_path)).table("fly", "train").shards
    ShardCache(tmp_path).fetch(shard)
    shard.path.write_bytes(bytes(shard.bytes))
    slow, idle, quick = (ShardFiles([shard], ShardCache(tmp_path)) for _ in range(3))
    assert not slow.is_checked(0) and not any(whole(slow)) and not any(whole(idle))
    quick.forget(0)
    assert quick.is_checked(0)
    fresh = shard.path.stat()
    idle.forget(0)  # it found the rot as well, later
    assert os.path.samestat(shard.path.stat(), fresh)
    assert slow.is_checked(0)
    original = (shards / "fly" / shard.path.name).read_bytes()
    assert whole(slow) == whole(idle) == whole(quick) == original
    shard.path.unlink()  # evicted
    assert whole(slow) == original and not shard.path.exists(), "what is open and whole is not fetched again"


@pytest.mark.moderate
def test_addresses_that_fail_are_one_clear_line(
    configure: Callable[..., Config], server: Server, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"data\.cache_dir: http.* is remote"):
        build_loader(configure(path=server.url))
    for path, message in (
        (f"{server.url}/nothing", r"nothing/manifest\.json: not found on the server \(404\); check the address"),
        ("http://127.0.0.1:9", r"127\.0\.0\.1:9/manifest\.json: .*refused"),
        ("pipe:false {}", "the command ended with status 1"),
        ("pipe:cat x", "needs {} where"),
        ("nonsense://x", "nonsense"),
        (str(tmp_path / "nothing"), r"nothing/manifest\.json: .*No such file"),
    ):
        with pytest.raises(UserError, match=message) as refusal:
            build_loader(configure(path=path, cache_dir=str(tmp_path / "cache"), allow_commands=True))
        assert "\n" not in str(refusal.value)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"data\.cache_dir"):
        build_loader(configure(path=server.url, cache_dir=str(tmp_path / "file")))


def test_names_are_quoted() -> None:
    assert join("https://host/a/", "my species/x.tar") == "https://host/a/my%20species/x.tar"
    assert join("pipe:cat /d/{}", "my species/x.tar") == "pipe:cat /d/'my species/x.tar'"
    assert join("/d", "my species/x.tar") == "/d/my species/x.tar"


def test_a_pipe_that_fails_late_is_an_error() -> None:
    with pytest.raises(RemoteError, match="status 3"):
        list(read_chunks("pipe:echo much; exit 3"))


def test_prefetching_has_shards_ready_before_they_are_opened(server: Server, tmp_path: Path) -> None:
    genome = ShardedGenome(server.url, ShardCache(tmp_path))
    wanted = genome.table("fly", "train").shards
    Prefetcher(ShardCache(tmp_path)).want(wanted, 0)
    deadline = time.monotonic() + 300
    while len(tars(tmp_path)) < len(wanted) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert {path.name for path in tars(tmp_path)} == {shard.path.name for shard in wanted}


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _open_all(directory: str, limit: int, shards: list[Shard], failed: object) -> None:
    bounded = ShardCache(directory, limit)
    for _ in range(5):
        for shard in shards:
            descriptor = bounded.open(shard)
            if os.pread(descriptor, shard.bytes + 1, 0) != Path(shard.origin).read_bytes():
                failed.set()
            os.close(descriptor)


@pytest.mark.slow
def test_processes_share_a_bounded_cache(shards: Path, tmp_path: Path) -> None:
    genome = ShardedGenome(shards, ShardCache(tmp_path))
    every = [
        shard for name in genome.species for split in ("train", "valid") for shard in genome.table(name, split).shards
    ]
    limit = 2 * max(shard.bytes for shard in every)
    fork = multiprocessing.get_context("fork")
    failed = fork.Event()
    processes = [
        fork.Process(target=_open_all, args=(str(tmp_path), limit, every[turn:] + every[:turn], failed))
        for turn in range(4)
    ]
    for process in processes:
        process.start()
    while any(process.is_alive() for process in processes):
        # What two looks in a row find was there at one time.
        held, again = ({path: _size(path) for path in (*tars(tmp_path), *leftovers(tmp_path))} for _ in range(2))
        assert held != again or sum(held.values()) <= limit
        time.sleep(0.005)
    assert [process.exitcode for process in processes] == [0] * 4 and not failed.is_set()
    assert not leftovers(tmp_path)


def _read_for_ever(config: Config) -> None:
    for _ in build_loader(config):
        pass


@pytest.mark.slow
def test_readers_killed_at_any_moment_leave_nothing_half_written(
    configure: Callable[..., Config], shards: Path, tmp_path: Path
) -> None:
    limit = 2 * max(path.stat().st_size for path in shards.glob("*/*.tar"))
    slow = f"pipe:head -c 9000 {shards}/{{}}; sleep 0.01; tail -c +9001 {shards}/{{}}"
    config = configure(path=slow, cache_dir=str(tmp_path), cache_bytes=limit, allow_commands=True)
    originals = {path.read_bytes() for path in shards.glob("*/*.tar")}
    fork = multiprocessing.get_context("fork")
    readers = [fork.Process(target=_read_for_ever, args=(config,)) for _ in range(22)]
    readers[0].start()
    for kill, (reader, following) in enumerate(itertools.pairwise(readers)):
        following.start()  # two read at once; one of them is killed
        time.sleep(0.1 + 0.013 * kill)
        assert reader.is_alive()
        reader.kill()
        reader.join()
        assert all(_content(path) in {*originals, None} for path in tars(tmp_path))
    following.kill()
    following.join()
    assert tokens(build_loader(config), 40) == tokens(build_loader(configure()), 40)
    assert sum(path.stat().st_size for path in (*tars(tmp_path), *leftovers(tmp_path))) <= limit


def _content(path: Path) -> bytes | None:
    """The bytes of a file, None if it was evicted meanwhile."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
