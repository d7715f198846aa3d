"""One process trains in a run directory; one that is dead is none, and one that is ending is waited for."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from caduceus.errors import UserError
from caduceus.run import lock
from caduceus.run.lock import Holder, RunLock

TAKE = (
    "import sys, time; from pathlib import Path; from caduceus.run.lock import RunLock; "
    "lock = RunLock(Path(sys.argv[1])); lock.take(); "
)
LEAVES_A_CHILD = TAKE + (
    "import subprocess; child = subprocess.Popen(['sleep', '60'], pass_fds=[lock._file.fileno()]); "
    "print(child.pid, flush=True); time.sleep(60)"
)
FORKS = TAKE + "import os; child = os.fork() or time.sleep(60); print(child, flush=True); time.sleep(60)"

RANK = TAKE + (
    "import os; print(os.getpid(), flush=True)\n"
    "while os.getppid() == lock.holder().agent: time.sleep(0.01)\n"
    "time.sleep(1.5)  # its step"
)


@pytest.fixture
def start():
    """Starts Python code on a directory; what it leaves behind is killed."""
    started = []

    def run(code: str, directory: Path) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(directory)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.moderate
@pytest.mark.parametrize("code", [FORKS, LEAVES_A_CHILD], ids=["forked", "that inherits every file"])
@pytest.mark.parametrize("reaped", [True, False])
def test_a_child_of_a_killed_holder_holds_nothing(start: Callable, tmp_path: Path, code: str, reaped: bool) -> None:
    holder = start(code, tmp_path)
    child = int(holder.stdout.readline())
    assert RunLock(tmp_path).is_held_elsewhere()
    holder.kill()
    if reaped:
        holder.wait()
    else:
        while lock._start_of(holder.pid) is not None:
            time.sleep(0.01)
    try:
        assert not RunLock(tmp_path).is_held_elsewhere()
        began, taken = time.monotonic(), RunLock(tmp_path)
        taken.take()
        assert time.monotonic() - began < 2 and Path(f"/proc/{child}").exists()
        assert RunLock(tmp_path).is_held_elsewhere() is True
        taken.release()
    finally:
        os.kill(child, signal.SIGKILL)


@pytest.mark.moderate
def test_a_holder_that_ends_in_a_moment_is_waited_for(start: Callable, tmp_path: Path, caplog, monkeypatch) -> None:
    monkeypatch.setattr(lock, "_QUIET_SECONDS", 0.2)
    holder = start(TAKE + "print(flush=True); time.sleep(1)", tmp_path)
    holder.stdout.readline()
    with caplog.at_level("INFO"):
        RunLock(tmp_path).take()
    assert caplog.text.count(f"in use by another process (process {holder.pid} on ") == 1


@pytest.mark.moderate
def test_a_holder_that_does_not_end_is_named(start: Callable, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(lock, "ENDING_SECONDS", 0.3)
    holder = start(TAKE + "print(flush=True); time.sleep(60)", tmp_path)
    holder.stdout.readline()
    with pytest.raises(UserError, match=rf"another process is training in .* \(process {holder.pid} on "):
        RunLock(tmp_path).take()


@pytest.mark.moderate
def test_a_rank_whose_torchrun_is_gone_is_waited_for_until_it_ends(
    start: Callable, tmp_path, caplog, monkeypatch
) -> None:
    monkeypatch.setattr(lock, "ENDING_SECONDS", 0.3)
    monkeypatch.setattr(lock, "_QUIET_SECONDS", 0.1)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    agent = start(f"import subprocess, sys; subprocess.run([sys.executable, '-c', {RANK!r}, sys.argv[1]])", tmp_path)
    rank = int(agent.stdout.readline())
    with pytest.raises(UserError, match=rf"\(process {rank} on "):
        RunLock(tmp_path).take()
    agent.kill()
    began = time.monotonic()
    with caplog.at_level("INFO"):
        RunLock(tmp_path).take()
    assert time.monotonic() - began > 3 * lock.ENDING_SECONDS
    assert f"in use by another process (process {rank} on " in caplog.text
    assert "which is stopping as its torchrun is gone" in caplog.text


@pytest.mark.moderate
def test_of_several_starts_after_a_killed_one_a_single_one_trains(start: Callable, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(lock, "ENDING_SECONDS", 0.5)
    holder = start(LEAVES_A_CHILD, tmp_path)
    child = int(holder.stdout.readline())
    holder.kill()
    holder.wait()
    starts = [RunLock(tmp_path) for _ in range(8)]
    try:
        with ThreadPoolExecutor(len(starts)) as threads:
            failures = [future.exception() for future in [threads.submit(taken.take) for taken in starts]]
    finally:
        os.kill(child, signal.SIGKILL)
    (winner,) = [taken for taken, failure in zip(starts, failures, strict=True) if failure is None]
    assert not winner.is_lost()
    winner.release()


def test_a_later_process_of_the_same_number_is_another(tmp_path: Path) -> None:
    me = Holder.of_this_process()
    assert not me.is_dead()
    assert replace(me, started="1").is_dead()


def test_a_process_of_another_machine_may_live(tmp_path: Path) -> None:
    gone = replace(Holder.of_this_process(), pid=2**22 + 1)
    assert gone.is_dead()
    assert not replace(gone, machine="another boot pid:[1]").is_dead()
    assert not replace(gone, machine=None).is_dead()


def test_a_claim_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    claim = {name: asdict(Holder.of_this_process())[name] for name in ("host", "pid", "slurm_job", "since")}
    RunLock(tmp_path).path.write_text(json.dumps(claim))
    holder = RunLock(tmp_path).holder()
    assert holder.pid == os.getpid() and not holder.is_dead()
