"""What launch/runs.py makes of run directories that something has gone wrong with."""

import json
import shutil
import subprocess
import sys

import pytest

from caduceus.config import Config, RunConfig
from caduceus.errors import UserError
from caduceus.run_directory import RunDirectory
from launch.runs import find_runs, summary
from tests.conftest import REPOSITORY


@pytest.fixture
def run(tmp_path) -> RunDirectory:
    run = RunDirectory.create_or_resume(Config(run=RunConfig(dir=str(tmp_path / "runs" / "good"), name="good")))
    run.release()
    return run


def test_a_cut_line_of_the_metrics_is_passed_over(run):
    rows = [json.dumps({"step": step, "loss": 1.0, "tokens_per_second": 1.0, "seconds": 1.0}) for step in (1, 2)]
    run.metrics_path.write_text(rows[0] + "\n" + rows[0][:9] + "\n" + rows[1] + "\n" + rows[0][:9])
    assert [row["step"] for row in run.metrics()] == [1, 2]


@pytest.mark.parametrize("text", ["[{", "{}}", '[{"jobs": []}]', "[1]"])
def test_a_run_that_cannot_be_read_does_not_hide_the_others(run, steer, text, capsys):
    broken = run.path.with_name("broken")
    shutil.copytree(run.path, broken)
    (broken / "submissions.json").write_text(text)
    _, first, second = summary(find_runs(run.path.parent)).splitlines()
    assert first.split()[:2] == [str(broken), "unreadable"] and second.split()[:2] == [str(run.path), "new"]
    assert "broken/submissions.json: cannot be read" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"submissions\.json: cannot be read"):
        steer("stop", str(broken))


def test_a_reader_that_has_seen_enough(run):
    (run.path / "submissions.json").write_text(
        json.dumps([{"jobs": ["7"], "executor": "local", "logs": str(run.logs_path), "request": {}}])
    )
    (run.logs_path / "7_0_log.out").write_text("a line\n" * 100_000)
    command = [sys.executable, str(REPOSITORY / "launch" / "runs.py"), "logs", str(run.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as logs:
        assert logs.stdout.readline() == "a line\n"
        logs.stdout.close()
        assert logs.stderr.read() == ""
