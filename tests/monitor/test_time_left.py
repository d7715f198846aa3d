"""The time left of a real run whose steps, validations and starts take as long as the test says."""

import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from caduceus.config import Config
from caduceus.monitor import __main__ as watching
from caduceus.monitor import rows
from caduceus.monitor.rows import Monitor
from caduceus.monitor.view import clock
from caduceus.run.directory import RunDirectory
from caduceus.train import loop, trainer
from caduceus.train.stopping import EXIT_REQUEUE
from launch.status import overview
from tests.train.conftest import SmallRun

STEPS, EVERY, STOP = 40, 2, 20
"""Every other step is validated, so that a median would not hide validations that count as steps."""
START, COMPILATION, STEP, VALIDATION = 400.0, 300.0, 0.5, 45.0
"""Seconds; each of the first two steps of a start compiles."""


class Clock:
    """The monitor's clock, which only what the trainer does moves on."""

    def __init__(self) -> None:
        self.now = 0.0
        self.rows: dict[int, float] = {}
        """When each step's row was made."""

    def after(self, seconds: Callable[[Any], float], real: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, which takes `seconds` of its result."""

        def timed(*arguments: Any) -> Any:
            result = real(*arguments)
            self.now += seconds(result)
            return result

        return timed


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made, seconds = Clock(), {}

    def begin(_: object) -> float:
        seconds.clear()
        return START

    def step(config: Config, strategy: Any, loader: Any, batches: Any, progress: Any, **named: Any) -> None:
        training_step(config, strategy, loader, batches, progress, **named)
        seconds[progress.step] = COMPILATION if len(seconds) < 2 else STEP
        made.now += seconds[progress.step]
        made.rows[progress.step] = made.now
        if progress.step == STOP:
            signal.raise_signal(signal.SIGTERM)

    def noted(monitor: Monitor, row: dict[str, Any]) -> None:
        log_training(monitor, {**row, "seconds": seconds[row["step"]]})

    training_step, log_training = loop.training_step, Monitor.log_training
    monkeypatch.setattr(rows, "time", SimpleNamespace(monotonic=lambda: made.now))
    monkeypatch.setattr(trainer, "_loop_of", made.after(begin, trainer._loop_of))
    monkeypatch.setattr(loop, "training_step", step)
    monkeypatch.setattr(trainer, "_validate", made.after(lambda _: VALIDATION, trainer._validate))
    monkeypatch.setattr(Monitor, "log_training", noted)
    return made


def small(small_run: SmallRun) -> Config:
    tiny = {"d_model": 8, "n_layer": 1, "d_state": 2}
    return small_run.config(
        "run",
        model=tiny,
        data={"seq_len": 64},
        train={"steps": STEPS, "global_batch": 2, "micro_batch": 2},
        valid={"every": EVERY, "samples": 2},
        checkpoint={"every": 100},
    )


def told(path: Path) -> dict[int, float | None]:
    return {row["step"]: row.get("seconds_left") for row in RunDirectory(path).metrics() if "loss" in row}


@pytest.mark.moderate
def test_it_is_right_whatever_compiled_and_validated_and_the_same_wherever_it_is_shown(
    small_run: SmallRun, timed: Clock, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small(small_run)
    run = RunDirectory(config.run.dir)
    assert trainer.train(config) == EXIT_REQUEUE
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a process that was told to stop ignores further signals
    stopped = told(run.path)
    assert stopped[1] is stopped[2] is None  # they compile
    for step in range(3, STOP + 1):
        validations = STEPS // EVERY - (step - 1) // EVERY  # that of this step is to come
        assert stopped[step] == pytest.approx(STEP * (STEPS - step) + VALIDATION * validations, abs=0.5), step
    left = stopped[STOP]
    assert overview(run).seconds_left == left
    assert watching.Followed(run.path).view.seconds_left is None  # nothing is read yet
    monkeypatch.setattr("sys.argv", ["monitor", str(run.path)])
    assert watching.main() == 0 and f"{clock(left)} left" in capsys.readouterr().out

    assert trainer.train(config) == 0
    resumed = {step: left for step, left in told(run.path).items() if step > STOP}
    assert resumed[STOP + 1] is resumed[STOP + 2] is None
    for step in range(STOP + 3, STEPS + 1):
        assert resumed[step] == pytest.approx(timed.now - timed.rows[step], abs=0.5), step
    assert overview(run).seconds_left == VALIDATION  # of the last step, which came after its row
