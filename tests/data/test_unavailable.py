"""Remote shards that cannot be had: replaced without waiting, remembered, counted; without a server the run ends."""

import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from caduceus.config import Config, save_config
from caduceus.data import ShardedGenome, build_loader, cache
from caduceus.data.cache import Shard, ShardCache, UnavailableError
from caduceus.data.remote import RemoteError
from caduceus.errors import UserError
from tests import preloaded
from tests.data.shard_server import Server
from tests.object_store import s3_bucket

ABSENT = "fly/train-000001.tar"


def take(loader: object, count: int) -> list[tuple]:
    batches = itertools.islice(loader, count)
    return [(batch.g.tolist(), batch.input_ids.tolist(), batch.labels.tolist(), batch.substituted) for batch in batches]


def replaced(batches: list[tuple]) -> set[int]:
    """Numbers of the samples that others stand for."""
    return {int(line.split()[1].rstrip(":")) for *_, lines in batches for line in lines}


def samples_of(shards: Path, name: str, loader: object, count: int) -> set[int]:
    """Which of the first `count` samples lie in a shard."""
    table = ShardedGenome(shards).table("fly", "train")
    rows = [row for row in table.windows if table.shards[row["shard"]].path.name == Path(name).name]
    held = [(table.contigs[row["contig"]], int(row["start"]), int(row["start"] + row["length"])) for row in rows]
    described = ((g, loader.describe(g)) for g in range(count))
    return {
        g
        for g, where in described
        if where["species"] == "fly"
        and any(where["contig"] == contig and start <= where["start"] < end for contig, start, end in held)
    }


@pytest.mark.moderate
@pytest.mark.parametrize("status", [404, 403])
def test_an_absent_shard_is_asked_for_once_and_its_samples_replaced_at_once(
    configure: Callable[..., Config],
    shards: Path,
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    status: int,
) -> None:
    monkeypatch.setattr(cache.time, "sleep", lambda seconds: pytest.fail(f"waits {seconds} s"))
    server.statuses[ABSENT] = status
    loader = build_loader(configure(path=server.url, cache_dir=str(tmp_path / "cache")))
    batches = take(loader, 20)
    assert replaced(batches) == samples_of(shards, ABSENT, loader, 80)
    assert loader.substituted == len(replaced(batches)) > 10
    assert sum(path.endswith(ABSENT) for path in server.asked) == 1
    for (numbers, tokens, labels, _), (_, same, same_labels, _) in zip(
        batches, take(build_loader(configure()), 20), strict=True
    ):
        kept = torch.tensor([g not in replaced(batches) for g in numbers])
        assert torch.equal(torch.tensor(tokens)[kept], torch.tensor(same)[kept])
        assert torch.equal(torch.tensor(labels)[kept], torch.tensor(same_labels)[kept])
    with pytest.raises(UserError, match=rf"data\.max_substituted: 4 samples .*{ABSENT}: .*{status}") as error:
        take(build_loader(configure(path=server.url, cache_dir=str(tmp_path / "other"), max_substituted=3)), 20)
    assert "\n" not in str(error.value)


@pytest.mark.moderate
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_substitutes_depend_on_what_can_be_read_alone(
    configure: Callable[..., Config],
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    workers: int,
) -> None:
    """Not on why a shard cannot be had, nor on the ranks."""
    monkeypatch.setattr(cache, "FETCH_WAITS", (0, 0))
    tokens = {}
    for status in (404, 500):
        server.statuses[ABSENT] = status
        config = configure(path=server.url, cache_dir=str(tmp_path / str(status)), workers=workers)
        tokens[status] = take(build_loader(config), 20)
    assert [batch[:3] for batch in tokens[404]] == [batch[:3] for batch in tokens[500]]
    rows = {g: row for numbers, ids, *_ in tokens[404] for g, row in zip(numbers, ids, strict=True)}
    for rank in range(2):
        for numbers, ids, *_ in take(build_loader(config, rank=rank, world=2), 10):
            assert [rows[g] for g in numbers] == ids


def test_a_shard_that_is_there_again_is_found(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    node, other_rank = ShardCache(tmp_path), ShardCache(tmp_path)
    shards = ShardedGenome(server.url, node).table("fly", "train").shards
    shard = next(shard for shard in shards if shard.origin.endswith(ABSENT))
    server.statuses[ABSENT] = 404
    for process in (node, node, other_rank):
        with pytest.raises(UnavailableError, match=rf"{ABSENT}: not found on the server \(404\)"):
            process.fetch(shard)
    assert sum(path.endswith(ABSENT) for path in server.asked) == 1
    server.statuses.clear()
    with pytest.raises(UnavailableError):
        node.fetch(shard)
    monkeypatch.setattr(cache, "FAILURE_REMEMBERED", 0)  # as if that time had passed
    node.fetch(shard)
    assert shard.path.exists()
    shard.path.unlink()
    monkeypatch.undo()
    server.statuses[ABSENT] = 404
    with pytest.raises(UnavailableError):
        node.fetch(shard)
    server.statuses.clear()
    ShardCache(tmp_path).fetch(shard)  # another start
    assert shard.path.exists()


@pytest.mark.parametrize("seconds_to_fail", [0, 6, 30])
def test_without_a_server_the_run_ends_within_two_minutes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds_to_fail: int
) -> None:
    clock = SimpleNamespace(now=1e6)

    def wait(seconds: float) -> None:
        clock.now += seconds

    def no_answer(address: str) -> None:
        wait(seconds_to_fail)
        raise RemoteError(f"{address}: no answer")

    monkeypatch.setattr(
        cache, "time", SimpleNamespace(sleep=wait, monotonic=lambda: clock.now, time=lambda: 0.0, time_ns=lambda: 0)
    )
    monkeypatch.setattr(cache, "read_chunks", no_answer)
    node = ShardCache(tmp_path)
    one, other = (Shard(tmp_path / "d" / "s" / f"{name}.tar", 5, "", f"http://host/{name}") for name in "ab")
    with pytest.raises(UnavailableError, match="http://host/a: no answer"):
        node.fetch(one)
    assert clock.now - 1e6 >= 30  # an outage so short is outlived
    with pytest.raises(UserError, match=r"http://host/b: no answer; a\.tar could not be fetched either; start again"):
        node.fetch(other)
    assert clock.now - 1e6 <= 125
    with pytest.raises(UserError, match="http://host/b: no answer"):
        node.fetch(one)
    assert clock.now - 1e6 <= 125


def test_a_server_that_stops_in_mid_run_ends_it(
    configure: Callable[..., Config], shards: Path, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "FETCH_WAITS", (0, 0))
    limit = 2 * max(path.stat().st_size for path in shards.glob("*/*.tar"))
    loader = build_loader(configure(path=server.url, cache_dir=str(tmp_path), cache_bytes=limit))
    batches = iter(loader)
    next(batches)
    server.statuses[".tar"] = 503
    with pytest.raises(UserError, match=r"cannot be downloaded \(HTTP Error 503.*could not be fetched either") as error:
        for _ in range(200):
            next(batches)
    assert "\n" not in str(error.value)
    assert loader.substituted <= 100


@pytest.mark.moderate
def test_a_bucket_without_a_shard_and_then_without_a_server(
    configure: Callable[..., Config], shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "FETCH_WAITS", (0,))
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    files = {f"data/{file.relative_to(shards)}": file for file in shards.rglob("*") if file.is_file()}
    with s3_bucket(monkeypatch, {key: file for key, file in files.items() if not key.endswith(ABSENT)}) as bucket:
        loader = build_loader(configure(path=f"{bucket}/data", cache_dir=str(tmp_path / "one")))
        batches = take(loader, 10)
        assert replaced(batches) == samples_of(shards, ABSENT, loader, 40)
        assert any(f"{ABSENT}: not found on the server" in line for *_, lines in batches for line in lines)
        loader = build_loader(configure(path=f"{bucket}/data", cache_dir=str(tmp_path / "two")))
    with pytest.raises(
        UserError, match=r"s3://genomes/data/.*\.tar: cannot be downloaded \(Could not connect"
    ) as error:
        take(loader, 10)
    assert "\n" not in str(error.value)


@pytest.mark.moderate
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_training_ends_with_one_line_and_status_2(
    configure: Callable[..., Config], server: Server, tmp_path: Path, workers: int
) -> None:
    server.statuses[".tar"] = 403
    config = configure(path=server.url, cache_dir=str(tmp_path / "cache"), workers=workers)
    ended = train(config, tmp_path)
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    (line,) = (line for line in ended.stderr.splitlines() if line.startswith("error: "))
    assert ".tar: the server refuses access (403); check the address and your credentials" in line


@pytest.mark.moderate
def test_the_metrics_count_what_was_replaced(configure: Callable[..., Config], server: Server, tmp_path: Path) -> None:
    server.statuses[ABSENT] = 404
    config = configure(path=server.url, cache_dir=str(tmp_path / "cache"), train={"steps": 3, "global_batch": 8})
    ended = train(config, tmp_path)
    assert ended.returncode == 0, ended.stderr
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    counts = [row["substituted_samples"] for row in rows if "substituted_samples" in row]
    assert counts[-1] == len(replaced(take(build_loader(config), 6))) > 0


def train(config: Config, directory: Path) -> subprocess.CompletedProcess:
    config.model.d_model, config.model.n_layer = 16, 1
    config.run.dir, config.run.device, config.wandb.mode = str(directory / "run"), "cpu", "disabled"
    config.valid.every, config.monitor.report = 0, False
    save_config(config, directory / "config.yaml")
    command = [sys.executable, "-m", "caduceus.train", "--config", str(directory / "config.yaml")]
    return preloaded.run(command, capture_output=True, text=True, timeout=300)
