"""Saving behind the training: what is saved, when it counts, and what a failure does."""

import contextlib
import os
import resource
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from caduceus.config import Config, config_from_dict
from caduceus.distributed.build import build_strategy
from caduceus.distributed.ranks import Ranks
from caduceus.distributed.strategy import Strategy
from caduceus.errors import UserError
from caduceus.run.directory import RunDirectory
from caduceus.train.checkpointing import Checkpoints, load_checkpoint
from caduceus.train.optimizer import build_optimizer
from caduceus.train.progress import Progress
from caduceus.train.stopping import EXIT_REQUEUE
from caduceus.train.trainer import train
from tests.train.conftest import SmallRun, numbers


@pytest.fixture
def config(tmp_path: Path) -> Config:
    model = {"d_model": 8, "n_layer": 1, "d_state": 2}
    return config_from_dict({"model": model, "run": {"dir": str(tmp_path / "run"), "device": "cpu"}})


@pytest.fixture
def run(config: Config) -> RunDirectory:
    run = RunDirectory.create_or_resume(config)
    yield run
    run.release()


@pytest.fixture
def strategy(config: Config) -> Strategy:
    return build_strategy(config, Ranks(0, 1, 1, torch.device("cpu")), build_optimizer)


@pytest.fixture
def disk(strategy: Strategy, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Checkpoints are written once it is set."""
    stage, event = strategy.stage, threading.Event()

    def waiting(group):
        write = stage(group)
        return lambda directory: (event.wait(), write(directory))

    monkeypatch.setattr(strategy, "stage", waiting)
    return event


def progress(step: int) -> Progress:
    return Progress(step=step, tokens=10 * step, loader={"samples_consumed": step})


def fill(strategy: Strategy, value: float) -> None:
    with torch.no_grad():
        for parameter in strategy.model.parameters():
            parameter.fill_(value)
            parameter.grad = torch.full_like(parameter, value)
    strategy.step(lr=0.0)


@pytest.mark.moderate
def test_what_is_saved_is_the_state_of_its_moment(config, run, strategy, disk) -> None:
    checkpoints, saved = Checkpoints(config, run, strategy), progress(1)
    fill(strategy, 1.0)
    moments = [state["exp_avg"].clone() for state in strategy.optimizer.state.values()]
    checkpoints.save(saved)
    fill(strategy, 2.0)
    saved.step, saved.health.skipped_steps = 5, 5
    assert run.checkpoints() == []
    disk.set()
    checkpoints.wait()
    loaded = load_checkpoint(run.newest_valid_checkpoint(), strategy)
    assert (loaded.step, loaded.tokens, loaded.health.skipped_steps) == (1, 10, 0)
    assert all((parameter == 1).all() for parameter in strategy.model.parameters())
    after = [state["exp_avg"] for state in strategy.optimizer.state.values()]
    assert all(torch.equal(*pair) for pair in zip(moments, after, strict=True))


@pytest.mark.moderate
def test_one_checkpoint_is_under_way_at_a_time(config, run, strategy, disk) -> None:
    checkpoints = Checkpoints(config, run, strategy)
    checkpoints.save(progress(1))
    second = threading.Thread(target=lambda: checkpoints.save(progress(2)))
    second.start()
    second.join(0.2)
    [writing] = run.checkpoints_path.iterdir()
    assert second.is_alive() and writing.name.startswith(".writing-00000001-")
    disk.set()
    second.join()
    checkpoints.wait()
    assert [checkpoint.step for checkpoint in run.checkpoints()] == [1, 2]


@pytest.mark.moderate
def test_a_failed_save_is_told_when_asked_and_leaves_the_older_one(config, run, strategy, monkeypatch) -> None:
    checkpoints = Checkpoints(config, run, strategy)
    checkpoints.save(progress(1))
    checkpoints.wait()

    def fails(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("caduceus.train.checkpointing.write_atomically", fails)
    checkpoints.save(progress(2))
    checkpoints._thread.join()
    assert checkpoints.failed
    with pytest.raises(UserError, match=r"step 2 could not be written \(.*No space left on device\)"):
        checkpoints.wait()
    assert not checkpoints.failed
    assert sorted(path.name for path in run.checkpoints_path.iterdir()) == ["latest", "step-00000001"]


@pytest.mark.moderate
def test_saving_behind_the_training_or_not_makes_the_same_run(small_run: SmallRun) -> None:
    runs = [small_run.config(str(behind), checkpoint={"every": 3, "async": behind}) for behind in (True, False)]
    for config in runs:
        assert train(config) == 0
    first, second = (RunDirectory(config.run.dir) for config in runs)
    assert numbers(first.path) == numbers(second.path)
    for one, other in zip(first.checkpoints(), second.checkpoints(), strict=True):
        assert (one.path / "__0_0.distcp").read_bytes() == (other.path / "__0_0.distcp").read_bytes()


@pytest.mark.moderate
def test_the_run_stops_with_a_checkpoint_when_its_time_is_up(small_run: SmallRun) -> None:
    config = small_run.config("timed", run={"dir": str(small_run.directory / "timed"), "time_budget_minutes": 1e-6})
    assert train(config) == EXIT_REQUEUE
    assert [checkpoint.step for checkpoint in RunDirectory(config.run.dir).checkpoints()] == [1]
    config.run.time_budget_minutes = 60
    assert train(config) == 0
    undisturbed = small_run.config("undisturbed")
    train(undisturbed)
    assert numbers(config.run.dir) == numbers(undisturbed.run.dir)


@pytest.mark.moderate
def test_old_checkpoints_that_cannot_be_removed_cost_no_new_one(small_run: SmallRun, monkeypatch, caplog) -> None:
    def refuse(*_: object) -> None:
        raise OSError(39, "Directory not empty")

    monkeypatch.setattr(RunDirectory, "remove_old_checkpoints", refuse)
    config = small_run.config("run", checkpoint={"every": 2, "keep": 1})
    assert train(config) == 0
    assert len(RunDirectory(config.run.dir).checkpoints()) > 1
    assert "old checkpoints could not be removed ([Errno 39] Directory not empty)" in caplog.text


@pytest.mark.moderate
def test_a_checkpoint_whose_directory_cannot_be_made_is_one_line(small_run: SmallRun, monkeypatch) -> None:
    mkdir = Path.mkdir

    def fail(path: Path, *args: object, **options: object) -> None:
        if path.name.startswith(".writing-"):
            raise OSError(28, "No space left on device")
        mkdir(path, *args, **options)

    monkeypatch.setattr(Path, "mkdir", fail)
    with pytest.raises(UserError, match=r"the checkpoint of step \d+ could not be written \(.*No space left on device"):
        train(small_run.config("run", checkpoint={"every": 2}))


def test_a_run_directory_that_cannot_be_locked_is_one_line(small_run: SmallRun, monkeypatch) -> None:
    config = small_run.config("run")
    (Path(config.run.dir) / ".lock").mkdir(parents=True)  # not even root can open it to write
    with pytest.raises(UserError, match=r"^run\.dir: .* cannot be read or written \(.*Is a directory"):
        train(config)


@contextlib.contextmanager
def small_disk(directory: Path) -> Iterator[Path]:
    """A file system of its own, of two megabytes."""
    directory.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(directory)], capture_output=True)
    if mounted.returncode:
        pytest.skip("only root can mount the small file system of this test")
    try:
        yield directory
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)


def leave_free(disk: Path, room: int) -> None:
    """Fill a disk but for `room` bytes."""
    ballast = disk / "ballast"
    ballast.unlink(missing_ok=True)
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(disk).free - room)


@pytest.mark.moderate
@pytest.mark.parametrize("background", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_disk_that_fills_at_any_moment_of_a_save_is_told_truly(config: Config, tmp_path: Path, background) -> None:
    config.checkpoint.async_ = background
    with small_disk(tmp_path / "disk") as disk:
        config.run.dir = str(disk / "run")
        run = RunDirectory.create_or_resume(config)
        strategy = build_strategy(config, Ranks(0, 1, 1, torch.device("cpu")), build_optimizer)
        checkpoints = Checkpoints(config, run, strategy)
        checkpoints.save(progress(1))
        checkpoints.wait()
        taken = sum(path.stat().st_blocks * 512 for path in run.checkpoint_path(1).iterdir())
        outcomes = set()
        for room in range(0, taken + (64 << 10), 4096):
            leave_free(disk, room)
            try:
                checkpoints.save(progress(2))
                checkpoints.wait()
                outcomes.add("saved")
                shutil.rmtree(run.checkpoint_path(2))
            except UserError as error:
                outcomes.add("told")
                assert "the checkpoint of step 2 could not be written ([Errno 28] No space left" in str(error), room
            assert not list(run.checkpoints_path.glob(".writing-*"))
            assert run.newest_valid_checkpoint().step == 1
        assert outcomes == {"saved", "told"}
        run.release()


def test_a_file_that_may_not_grow_is_told_truly(config, run, strategy) -> None:
    checkpoints = Checkpoints(config, run, strategy)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2048, before[1]))
        with pytest.raises(UserError, match=r"step 1 could not be written \(\[Errno 27\] File too large\)"):
            checkpoints.save(progress(1))
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    checkpoints.save(progress(1))
    checkpoints.wait()
    assert run.newest_valid_checkpoint().step == 1


@pytest.mark.moderate
def test_a_restart_on_a_full_disk_tells_sizes_that_mean_something(config: Config, small_run, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk:
        config = small_run.config("full", run={"dir": str(disk / "run"), "device": "cpu"})
        (disk / "run").mkdir()
        RunDirectory.create_or_resume(config).release()
        leave_free(disk, 8192)
        with pytest.raises(UserError, match=r"8\.0 KiB free, but a checkpoint takes [1-9][\d.]* KiB; make room"):
            train(config)
