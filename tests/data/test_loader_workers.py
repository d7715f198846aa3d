"""The loader's worker processes: how they start, and how they end with a training."""

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from caduceus.config import Config, save_config
from caduceus.data import build_loader
from tests.data.batches import assert_same, take


def test_the_loader_travels_to_spawned_workers(configure: Callable[..., Config]) -> None:
    loader = build_loader(configure())
    first = take(loader, 2)
    again = pickle.loads(pickle.dumps(loader))
    again.seek(0)
    assert_same(take(again, 2), first)


@pytest.mark.slow
def test_signals_to_the_job_leave_workers_alone(configure: Callable[..., Config]) -> None:
    """Ctrl-C and the cluster's warnings reach workers too; the trainer alone decides when to stop."""
    others = multiprocessing.active_children()
    batches = iter(build_loader(configure(workers=2)))
    take(batches, 2)  # one of each worker, so that both have started
    workers = [process for process in multiprocessing.active_children() if process not in others]
    assert len(workers) == 2
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
        for worker in workers:
            os.kill(worker.pid, number)
    time.sleep(0.1)
    assert [next(batches).g[0].item() for _ in range(10)] == list(range(8, 48, 4))
    batches.close()


FAILING_TRAINING = """
import sys
from caduceus.config import load_config
from caduceus.data.loader import build_loader

batches = iter(build_loader(load_config(sys.argv[1])))
next(batches)
raise RuntimeError("the training went wrong")
"""


@pytest.mark.moderate
def test_a_training_that_fails_ends_with_its_workers(configure: Callable[..., Config], tmp_path: Path) -> None:
    save_config(configure(workers=2), tmp_path / "config.yaml")
    command = [sys.executable, "-c", FAILING_TRAINING, str(tmp_path / "config.yaml")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 1 and "the training went wrong" in result.stderr
