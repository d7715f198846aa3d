"""What hangs is found, whatever it is; and everything that a run may hang in is watched."""

import logging
import multiprocessing
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from caduceus.distributed.ranks import PATIENCE
from caduceus.train import trainer, watchdog
from caduceus.train.watchdog import Watchdog
from tests.train.conftest import SmallRun, numbers

SECONDS = 1.2


def items_of_which_the_third_hangs() -> Iterator[int]:
    yield from (1, 2)
    time.sleep(60)


def use(logs: Path, how: str) -> None:
    watchdog._GRACE_SECONDS = 0.5
    watchdog.write_flight_records = lambda logs, rank: (logs / f"records of {rank}").touch()
    logging.basicConfig(filename=logs / "log", force=True)
    watching = Watchdog(logs, 3, SECONDS / 60)
    if how == "a failing disk":
        watching = Watchdog(logs / "nowhere", 3, SECONDS / 60)
    if how == "an item":
        for _ in watching.over_each("a batch", items_of_which_the_third_hangs()):
            time.sleep(0.6 * SECONDS)  # two together take longer than one may
    elif how in ("its use", "a failing disk"):
        for _ in watching.over_each("a batch", [1]):
            time.sleep(60)
    elif how == "what may take longer":
        with watching.over("a save", at_least=4 * SECONDS):
            time.sleep(2 * SECONDS)
    else:
        time.sleep(2 * SECONDS)


@pytest.mark.parametrize(
    ("how", "status"),
    [("an item", 1), ("its use", 1), ("a failing disk", 1), ("what may take longer", 0), ("nothing watched", 0)],
)
def test_a_hang_ends_the_process_and_leaves_its_stacks(tmp_path: Path, how: str, status: int) -> None:
    process = multiprocessing.get_context("fork").Process(target=use, args=(tmp_path, how))
    process.start()
    process.join(30)
    assert process.exitcode == status
    stacks = tmp_path / "stacks-rank3.txt"
    assert stacks.exists() == (bool(status) and how != "a failing disk")
    assert (tmp_path / "records of 3").exists() == stacks.exists()
    if stacks.exists():
        assert stacks.read_text().startswith("rank 3, a batch, ")
        assert ("in items_of_which_the_third_hangs" in stacks.read_text()) == (how == "an item")
        assert "rank 3: a batch has taken more than train.stall_minutes=0.02; " in (tmp_path / "log").read_text()


@pytest.mark.slow
def test_stacks_are_shown_when_asked_and_the_run_goes_on(small_run: SmallRun) -> None:
    config = small_run.config("asked", train={"steps": 60})
    process = small_run.start(config)
    metrics = Path(config.run.dir) / "metrics.jsonl"
    while not metrics.exists() or not metrics.stat().st_size:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    told = process.communicate(timeout=120)[1]
    assert process.returncode == 0
    assert "Current thread 0x" in told and "in run_to_the_end" in told and "Thread 0x" in told  # the watchdog's own
    assert [row["step"] for row in numbers(config.run.dir) if "loss" in row] == list(range(1, 61))


@pytest.mark.moderate
def test_all_that_a_run_may_hang_in_is_watched(small_run: SmallRun, monkeypatch) -> None:
    watched = []
    over = Watchdog.over

    def noted(self: Watchdog, what: str, at_least: float = 0.0):
        watched.append((what, at_least))
        return over(self, what, at_least)

    monkeypatch.setattr(Watchdog, "over", noted)
    train, valid = {"steps": 2, "micro_batch": 8}, {"every": 2, "samples": 8}
    assert trainer.train(small_run.config("run", train=train, valid=valid)) == 0
    long = PATIENCE.total_seconds()
    batch = ("a batch of the validation after step 2", 0.0)
    assert watched == [
        ("the look for checkpoints", long),
        ("the opening of the data", long),
        ("the start", long),
        ("step 1", 0.0),
        ("step 2", 0.0),
        ("the agreement after step 2", 0.0),
        batch,
        batch,  # which finds that there are no more
        ("the agreement after step 2", 0.0),
        ("the checkpoint after step 2", long),
    ]


def test_what_nccl_knows_is_left_beside_the_stacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog.dist, "is_initialized", lambda: True)
    monkeypatch.setattr("torch._C._distributed_c10d._dump_nccl_trace", lambda: b"records", raising=False)
    for backend, written in (("gloo", False), ("cpu:gloo,cuda:nccl", True)):
        monkeypatch.setattr(watchdog.dist, "get_backend_config", lambda backend=backend: backend)
        watchdog.write_flight_records(tmp_path, 5)
        assert (tmp_path / "nccl-rank5").exists() == written
    assert (tmp_path / "nccl-rank5").read_bytes() == b"records"
