"""How the processes of a node share one check of the Triton kernels."""

import errno
import multiprocessing
import os
import select
import signal
import time
from contextlib import contextmanager
from itertools import islice

import pytest
import torch

from caduceus import files
from caduceus.errors import UserError
from caduceus.ops import self_check
from caduceus.ops.triton import scan_launches

RANKS = 4


class Node:
    """Processes that check the kernels of this machine. Who compares, or waits for one that does, says so in a file;
    who compares goes on when the gate is open.
    """

    def __init__(self, folder):
        self._said, self._cache = folder / "said", folder / "caduceus"
        self._said.touch()
        self._gate, self._closed = os.pipe()  # the gate is closed as long as this process has its other end open

    def compare(self, case, dtype, machine):
        self._say("compares")
        assert select.select([self._gate], [], [], 60)[0]

    @contextmanager
    def locked(self, path, *, wait):
        try:
            file = files.take_lock(path, wait=wait)
        except BlockingIOError:
            self._say("waits")
            raise
        with file:
            yield

    def open_gate(self):
        os.close(self._closed)

    def start(self, count=1):
        found = [multiprocessing.get_context("fork").Process(target=self._check) for _ in range(count)]
        for process in found:
            process.start()
        return found

    def who(self, what, at_least=1):
        """The ids of the processes that compare or have compared ("compares"), or that have waited ("waits"), as soon
        as there are so many.
        """
        began = time.monotonic()
        while True:
            said = {tuple(line.split()) for line in self._said.read_text().splitlines()}
            found = {int(process) for word, process in said if word == what}
            if len(found) >= at_least:
                return found
            assert time.monotonic() - began < 60
            time.sleep(0.02)

    def remembered(self):
        return list(self._cache.glob("*.json"))

    def _say(self, what):
        with self._said.open("a") as file:
            file.write(f"{what} {os.getpid()}\n")

    def _check(self):
        """Ends with status 0 after a check, with 3 where that leaves the sums in tiles, and with 2 after a fault."""
        os.close(self._closed)
        try:
            self_check.check_kernels(torch.device("cpu"))
        except UserError:
            os._exit(2)
        os._exit(0 if scan_launches.warp_sums else 3)


def ends(processes):
    """The exit statuses of processes, which all end."""
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes]


@pytest.fixture
def node(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(self_check, "_PAUSE", 0.02)
    cases = self_check._cases
    monkeypatch.setattr(self_check, "_cases", lambda device: islice(cases(device), 1))
    node = Node(tmp_path)
    monkeypatch.setattr(self_check, "_require_right", node.compare)
    monkeypatch.setattr(self_check, "locked", node.locked)
    return node


def test_one_process_compares_and_the_others_take_what_it_found(node, monkeypatch):
    def wrong_within_warps(case, dtype, machine):
        node.compare(case, dtype, machine)
        if scan_launches.warp_sums and dtype == torch.bfloat16:
            raise UserError("ops.backend: the Triton kernels are wrong")

    monkeypatch.setattr(self_check, "_require_right", wrong_within_warps)
    ranks = node.start(RANKS)
    node.who("waits", RANKS - 1)
    node.open_gate()
    assert ends(ranks) == [3] * RANKS
    assert len(node.who("compares")) == len(node.remembered()) == 1


def test_if_the_one_that_compares_is_killed_one_of_the_others_compares(node):
    first = node.start()
    node.who("compares")
    ranks = node.start(RANKS)
    node.who("waits", RANKS)
    os.kill(first[0].pid, signal.SIGKILL)
    node.who("compares", 2)
    node.open_gate()
    assert ends(first) == [-signal.SIGKILL] and ends(ranks) == [0] * RANKS
    assert len(node.who("compares")) == 2


def test_a_fault_is_found_by_every_process(node, monkeypatch):
    def wrong(case, dtype, machine):
        node.compare(case, dtype, machine)
        raise UserError("ops.backend: the Triton kernels are wrong")

    monkeypatch.setattr(self_check, "_require_right", wrong)
    ranks = node.start(RANKS)
    node.who("waits", RANKS - 1)
    node.open_gate()
    assert ends(ranks) == [2] * RANKS
    assert node.who("compares") == {rank.pid for rank in ranks} and not node.remembered()


@pytest.mark.parametrize("trouble", [errno.ENOLCK, errno.EROFS])
def test_where_files_cannot_be_locked_every_process_compares_at_once(trouble, node, monkeypatch):
    def refuse(*given, **named):
        raise OSError(trouble, os.strerror(trouble))

    monkeypatch.setattr(self_check, "locked", refuse)
    ranks = node.start(RANKS)
    assert node.who("compares", RANKS) == {rank.pid for rank in ranks}
    node.open_gate()
    assert ends(ranks) == [0] * RANKS


def test_a_process_that_hangs_keeps_the_others_for_a_limited_time(node, monkeypatch):
    monkeypatch.setattr(self_check, "WAIT", 1.0)
    ranks = node.start()
    node.who("compares")
    ranks += node.start()
    assert node.who("waits") == {ranks[1].pid}
    assert node.who("compares", 2) == {rank.pid for rank in ranks}
    node.open_gate()
    assert ends(ranks) == [0, 0]
