"""torchrun is killed, alone or with its ranks, and the same command is given again at once."""

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from caduceus.config import save_config
from caduceus.run.directory import RunDirectory
from tests.train.conftest import SmallRun, children_of, command_of

pytestmark = pytest.mark.slow

PATIENCE = 120
BATCH = 8


class Torchrun:
    """Two ranks with two loader workers each, started as from a shell: `torchrun … 2>&1 | tee LOG`."""

    def __init__(self, config: Path, run: RunDirectory, number: int) -> None:
        self.log = config.with_name(f"start-{number}.log")
        self._run, self._first = run, last_step(run)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command += ["-m", "caduceus.train", "--config", str(config)]
        self.shell = subprocess.Popen(
            ["bash", "-c", f"{shlex.join(command)} 2>&1 | tee {self.log} > {os.devnull}"],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )

    def reach_a_step(self) -> None:
        """Wait until this start has made steps of its own, and its processes are all there."""
        end = time.monotonic() + PATIENCE
        while last_step(self._run) < self._first + 5 or "ready to train" not in self.log.read_text():
            assert self.shell.poll() is None and time.monotonic() < end, self.log.read_text()
            time.sleep(0.1)
        (self.agent,) = (pid for pid in children_of(self.shell.pid) if b"torch.distributed.run" in command_of(pid))
        self.ranks = children_of(self.agent)
        self.workers = [pid for rank in self.ranks for pid in children_of(rank) if b"caduceus.train" in command_of(pid)]
        assert len(self.ranks) == 2 and len(self.workers) == 4

    def is_alive(self) -> bool:
        return any(command_of(pid) for pid in (self.agent, *self.ranks))

    def end(self) -> None:
        """Wait for processes that have left the run to others, which may still be at their very end."""
        end = time.monotonic() + PATIENCE
        while self.is_alive():
            assert time.monotonic() < end, self.log.read_text()
            time.sleep(0.1)

    def clean_up(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.shell.pid, signal.SIGKILL)
        self.shell.wait()


def last_step(run: RunDirectory) -> int:
    rows = run.metrics()
    return rows[-1]["step"] if rows else 0


@pytest.fixture
def start(small_run: SmallRun) -> Iterator:
    config = small_run.config(
        "torchrun",
        train={"steps": 100_000, "global_batch": BATCH},
        data={"workers": 2},
        valid={"every": 0},
        checkpoint={"every": 100_000},
    )
    path, run, starts = small_run.directory / "torchrun.yaml", RunDirectory(config.run.dir), []
    save_config(config, path)

    def again() -> Torchrun:
        starts.append(Torchrun(path, run, len(starts)))
        return starts[-1]

    yield again, run
    run.stop_path.touch()  # for what lives on where the test failed
    for started in starts:
        started.clean_up()


def test_whatever_of_torchrun_is_killed_the_same_command_goes_on_at_once(start) -> None:
    again, run = start
    first = again()
    first.reach_a_step()
    os.killpg(first.shell.pid, signal.SIGKILL)  # kill -9 -- -PGID: the shell, torchrun and tee; ranks have their own
    assert all(command_of(rank) for rank in first.ranks)

    second = again()
    second.reach_a_step()
    first.end()
    saved = run.checkpoints()[-1].step
    assert saved >= 5, "the ranks without a torchrun stopped with a checkpoint"
    assert f"after step {saved} (" in second.log.read_text() and "is training in" not in second.log.read_text()

    for pid in (second.agent, *second.ranks):
        os.kill(pid, signal.SIGKILL)
    assert all(command_of(worker) for worker in second.workers), "they have not yet seen that their rank is gone"
    third = again()
    third.reach_a_step()
    assert "is training in" not in third.log.read_text()
    run.stop_path.touch()
    third.shell.wait(PATIENCE)

    rows = run.metrics()
    assert rows[-1]["step"] == run.checkpoints()[-1].step > saved
    assert [(row["step"], row["samples"]) for row in rows] == [(n, BATCH * n) for n in range(1, len(rows) + 1)]
