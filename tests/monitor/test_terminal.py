"""What people see of a run in a terminal."""

import errno
import io
import logging
import subprocess
import sys
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console

from caduceus.config import save_config
from caduceus.monitor.__main__ import Followed, main
from caduceus.monitor.terminal import panel, plain_line
from caduceus.monitor.view import View
from caduceus.run.directory import RunDirectory
from tests.conftest import REPOSITORY
from tests.monitor.conftest import STEPS, Watched, make_step
from tests.train.conftest import SmallRun


def view_of(watched: Watched, steps: int = 1000, valid_every: int = 100) -> View:
    return View(watched.run, "a-run-whose-name-is-longer-than-anyone-would-want", steps, valid_every)


def row(step: int, seconds: float = 0.5) -> dict[str, float]:
    clock = {"tokens_per_second": 1e6, "seconds": seconds, "peak_memory_bytes": 80 << 30, "grad_norm": 12.5}
    return {"step": step, "samples": step, "tokens": step, "loss": 1.2345, "lr": 8e-3, **clock}


@pytest.fixture
def disabled(tmp_path: Path) -> Watched:
    return Watched(tmp_path / "run", mode="disabled")


def test_time_left_leaves_out_compilation_and_knows_validations(disabled: Watched) -> None:
    view, now = view_of(disabled), 0.0
    for step in range(1, 21):
        now += 300.0 if step <= 2 else 0.5  # the first steps compile
        view.take(row(step), now)
        assert step > 2 or view.seconds_left is None
    assert view.seconds_left == pytest.approx(0.5 * 980, rel=0.2)
    for step in range(21, 101):
        now += 0.5
        view.take(row(step), now)
    view.take({"step": 100, "valid_loss": 1.2}, now + 60.0)
    view.take(row(101), now + 60.5)
    assert view.seconds_left == pytest.approx(0.5 * 899 + 9 * 60.0, rel=0.01)


@pytest.mark.parametrize("width", [20, 40, 80, 200])
@pytest.mark.parametrize("steps", [0, 1, 2, 3, 999])
def test_the_panel_never_wraps(disabled: Watched, width: int, steps: int) -> None:
    view = view_of(disabled)
    for step in range(1, steps + 1):
        view.take(row(step))
    if steps >= 3:
        view.take({"step": steps, "valid_loss": 1.1})
        view.take({"step": steps, "valid_loss": 1.3})
        view.checkpoint, view.starts = 123_456, 17
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    console.print(panel([view], width))
    lines = console.file.getvalue().rstrip("\n").split("\n")
    assert len(lines) == 4 and max(map(cell_len, lines)) <= width


@pytest.fixture
def in_a_terminal(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes what it writes to for a terminal
    monkeypatch.setattr("caduceus.monitor.terminal._TERMINAL_SECONDS", 0.0)
    caplog.set_level(logging.INFO)


@pytest.mark.usefixtures("in_a_terminal")
def test_the_panel_is_shown_from_before_the_first_step_to_the_last(
    disabled: Watched, capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
) -> None:
    shown: list[str] = []
    disabled.go_on(1, STEPS, between=lambda step: shown.append(capsys.readouterr().err))
    shown.append(capsys.readouterr().err)
    assert [f"{step}/{STEPS}" in text for step, text in enumerate(shown)] == [True] * (STEPS + 1)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


@pytest.mark.usefixtures("in_a_terminal")
def test_a_terminal_that_goes_away_does_not_end_the_run(
    disabled: Watched, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.EIO, "Input/output error")

    def hang_up(step: int) -> None:
        if step == 10:
            monkeypatch.setattr(sys, "stderr", Gone())

    disabled.go_on(1, STEPS, between=hang_up)
    assert disabled.run.metrics()[-2]["step"] == STEPS
    assert sum("the panel cannot be shown any more" in message for message in caplog.messages) == 1


def test_progress_elsewhere_is_plain_lines_and_quiet_is_quiet(
    disabled: Watched,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level(logging.INFO)
    disabled.config.monitor.report = True
    monkeypatch.setattr("caduceus.monitor.rows.report_of_finished", lambda run: run / "report" / "report.html")
    disabled.go_on(1, STEPS)
    assert f"step {STEPS}/{STEPS}" in caplog.text and "valid loss" in caplog.text
    assert f"  rows         {disabled.run.metrics_path}" in caplog.messages  # the summary
    assert f"  report       {disabled.path}/report/report.html" in caplog.messages
    assert "\x1b" not in caplog.text
    caplog.clear()
    caplog.set_level(logging.WARNING)
    disabled.go_on(1, STEPS)
    assert caplog.text == "" and capfd.readouterr().err == ""


@pytest.mark.slow
def test_a_start_ends_with_where_everything_is_and_a_quiet_one_says_what_is_wrong_alone(small_run: SmallRun) -> None:
    config = small_run.config("run", train={"steps": 2}, wandb={"mode": "offline"})
    path, given = Path(config.run.dir), small_run.directory / "given.yaml"
    save_config(config, given)

    def start(*options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "caduceus.train", "--config", str(given), *options]
        return subprocess.run(command, check=True, capture_output=True, text=True, cwd=REPOSITORY)

    loud = start()
    summary = loud.stderr[loud.stderr.index("finished at step 2 of 2 after 0:") :].splitlines()
    told = {line[2:14].strip(): line[15:] for line in summary[1:]}
    assert list(told) == ["valid loss", "rows", "checkpoint", "W&B"] and loud.stdout == ""
    (validation,) = RunDirectory(path).newest_metrics("valid_loss")
    assert told["valid loss"] == "{0:.4f} (best {0:.4f} at step 2)".format(validation["valid_loss"])
    assert told["rows"] == str(path / "metrics.jsonl")
    assert told["checkpoint"] == str(path / "checkpoints" / "step-00000002")
    assert all(Path(told[what]).exists() for what in ("rows", "checkpoint"))
    assert told["W&B"] == f"offline; `python launch/runs.py sync {path}` sends it"

    quiet = start("--quiet", "train.steps=3", "run.allow_change=[train.steps]", "monitor.profile=1:1")
    (warning,) = quiet.stderr.splitlines()  # the profile's steps are over
    assert warning.startswith("monitor.profile: ") and quiet.stdout == ""
    assert RunDirectory(path).newest_metrics("loss")[-1]["step"] == 3


def test_a_run_is_followed_from_its_directory_through_a_rewind(disabled: Watched) -> None:
    followed = Followed(disabled.path)
    with disabled.monitor() as monitor:
        for step in range(1, 21):
            make_step(monitor, step)
        followed.poll()
        assert followed.view.step == 20 and followed.view.valid == (20, pytest.approx(1.3))
        monitor.rewind(10)
        make_step(monitor, 11, shift=64)
        followed.poll()
        assert followed.view.step == 11 and followed.view.valid[0] == 10
        assert followed.view.row["samples"] == 8 * 11 + 64


@pytest.mark.moderate
def test_a_line_per_run_where_there_is_no_terminal(
    disabled: Watched, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    disabled.go_on(1, 20)
    monkeypatch.setattr("sys.argv", ["monitor", str(disabled.path), str(disabled.path)])
    assert main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all(f"step 20/{STEPS}" in line for line in lines)
    assert plain_line(Followed(disabled.path).view).startswith("step 0/")


@pytest.mark.moderate
def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "caduceus.monitor", str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 2 and "not a run directory" in done.stderr and "Traceback" not in done.stderr
