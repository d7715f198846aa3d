"""Files are whole or absent whatever is killed, and a lock ends with the process that took it."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

import pytest

from caduceus.files import (
    append_json_line,
    is_locked,
    keep_first,
    locked,
    read_json_lines,
    replacing,
    replacing_directory,
    take_lock,
    write_atomically,
)

HOLDER = """
import os, sys, time
from caduceus.files import take_lock
lock = take_lock(sys.argv[1])
if not os.fork():
    print(os.getpid(), flush=True)  # by the child, which has then let go of the lock
time.sleep(60)
"""


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@contextmanager
def holder_with_child(lock: Path) -> Iterator[tuple[int, int]]:
    """A process that holds `lock`, and one that it has forked since: their ids."""
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(lock)], stdout=subprocess.PIPE) as holder:
        child = int(holder.stdout.readline())
        try:
            yield holder.pid, child
        finally:
            for pid in (holder.pid, child):
                os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()], ids=["full", "Ctrl-C"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch, failure) -> None:
    path = tmp_path / "manifest.json"
    write_atomically(path, b"old")
    synced: list[int] = []

    def fails(descriptor: int) -> None:
        synced.append(descriptor)
        raise failure

    with monkeypatch.context() as patched, pytest.raises(type(failure)):
        patched.setattr(os, "fsync", fails)
        write_atomically(path, b"new")
    assert len(synced) == 1 and path.read_bytes() == b"old" and names(tmp_path) == ["manifest.json"]


def test_content_and_name_are_on_the_disk_before_a_write_returns(tmp_path: Path, monkeypatch) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def recording(descriptor: int) -> None:
        synced.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", recording)
    with replacing(tmp_path / "a.tar", buffering=0) as file:
        file.write(b"bases")
        assert not (tmp_path / "a.tar").exists()
    content, folder = map(Path, synced)
    assert fnmatch(content.name, ".a.tar.*.tmp") and content.parent == folder == tmp_path
    assert (tmp_path / "a.tar").read_bytes() == b"bases"


def test_two_writers_of_one_file_spoil_nothing_though_their_process_ids_are_equal(tmp_path: Path) -> None:
    path = tmp_path / "a.fai"  # two blocks of one process stand for processes of two nodes
    with replacing(path) as first:
        first.write(b"first")
        with replacing(path) as second:
            second.write(b"second, longer")
        assert path.read_bytes() == b"second, longer"
    assert path.read_bytes() == b"first" and names(tmp_path) == ["a.fai"]


@pytest.mark.parametrize("has_links", [True, False])
@pytest.mark.parametrize("there", [None, b"ACGT", b"ACG", b"ACGA"], ids=["nothing", "equal", "cut", "spoilt"])
def test_of_equal_files_the_first_stays(tmp_path: Path, monkeypatch, there: bytes | None, has_links: bool) -> None:
    if not has_links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(errno.EPERM, "no hard links")))
    path, new = tmp_path / "x.bases", tmp_path / ".x.tmp"
    if there is not None:
        path.write_bytes(there)
    before = path.stat() if there is not None else None
    new.write_bytes(b"ACGT")
    keep_first(new, path)
    assert path.read_bytes() == b"ACGT" and names(tmp_path) == ["x.bases"]
    assert (before is not None and os.path.samestat(before, path.stat())) == (there == b"ACGT")


def test_a_directory_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "export"
    for content in ("first", "second"):
        with replacing_directory(target) as new:
            (new / "deep").mkdir()
            (new / "deep" / f"{content}.txt").write_text(content)
        assert names(target / "deep") == [f"{content}.txt"] and names(tmp_path) == ["export"]
    with pytest.raises(ZeroDivisionError), replacing_directory(target) as new:
        (new / "third.txt").write_text("third")
        raise ZeroDivisionError
    assert names(target / "deep") == ["second.txt"] and names(tmp_path) == ["export"]


def test_a_directory_that_cannot_be_put_in_place_gives_the_old_one_back(tmp_path: Path, monkeypatch) -> None:
    target, rename = tmp_path / "code", Path.rename
    with replacing_directory(target) as new:
        (new / "old.py").touch()

    def fails_for_new(path: Path, to: Path) -> Path:
        if Path(to) == target and (path / "new.py").exists():
            raise OSError(errno.EIO, "input/output error")
        return rename(path, to)

    with monkeypatch.context() as patched, pytest.raises(OSError, match="input/output"):
        patched.setattr(Path, "rename", fails_for_new)
        with replacing_directory(target) as new:
            (new / "new.py").touch()
    assert names(target) == ["old.py"] and names(tmp_path) == ["code"]


def test_rows_survive_a_line_that_a_kill_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    assert read_json_lines(path) == []
    append_json_line(path, {"step": 1})
    with path.open("a") as file:
        file.write('{"step": 2, "lo')
    assert read_json_lines(path) == [{"step": 1}]
    append_json_line(path, {"step": 3})
    append_json_line(path, {"step": 4})
    assert read_json_lines(path) == [{"step": 1}, {"step": 3}, {"step": 4}]
    with path.open("ab") as file:
        file.write(b"17\n" + json.dumps({"step": 5}).encode())  # no row, and a row that may go on
    assert [row["step"] for row in read_json_lines(path)] == [1, 3, 4]


@pytest.mark.moderate
def test_a_lock_ends_with_its_holder_though_a_child_lives_on(tmp_path: Path) -> None:
    lock = tmp_path / ".lock"
    assert not is_locked(lock)
    with holder_with_child(lock) as (holder, child):
        assert is_locked(lock)
        with pytest.raises(BlockingIOError):
            take_lock(lock, wait=False)
        os.kill(holder, signal.SIGKILL)
        os.waitid(os.P_PID, holder, os.WEXITED | os.WNOWAIT)
        os.kill(child, 0)  # is alive
        with locked(lock, wait=False):
            assert is_locked(lock)
        assert not is_locked(lock)


def test_a_child_forked_while_a_lock_is_waited_for_does_not_hold_it(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    holder = take_lock(path)
    waiting = threading.Thread(target=lambda: take_lock(path).close(), daemon=True)
    waiting.start()
    opened = str(path)
    while sum(os.path.realpath(file) == opened for file in Path("/proc/self/fd").iterdir()) < 2:
        time.sleep(0.01)
    ready, tell = os.pipe()
    child = os.fork()
    if not child:
        os.write(tell, b"!")
        signal.pause()
    try:
        os.read(ready, 1)
        holder.close()
        waiting.join(10)
        assert not waiting.is_alive() and not is_locked(path)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(ready)
        os.close(tell)


def test_the_end_of_a_child_does_not_end_the_lock(tmp_path: Path) -> None:
    with locked(tmp_path / ".lock") as file:
        file.write(b"holder")
        file.flush()
        child = os.fork()
        if not child:
            file.write(b"child")
            file.close()
            os._exit(0)
        os.waitpid(child, 0)
        assert is_locked(tmp_path / ".lock") and (tmp_path / ".lock").read_bytes() == b"holder"


@pytest.mark.moderate
def test_waiting_for_a_lock_ends_when_the_holder_does(tmp_path: Path) -> None:
    with holder_with_child(tmp_path / ".lock") as (holder, _):
        began = time.monotonic()
        os.kill(holder, signal.SIGKILL)
        with locked(tmp_path / ".lock"):
            assert time.monotonic() - began < 10


def test_a_lock_whose_file_was_replaced_is_the_new_files(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    with locked(path):
        (tmp_path / "fresh").touch()
        (tmp_path / "fresh").rename(path)
        assert not is_locked(path)
        with locked(path, wait=False):
            assert is_locked(path)
