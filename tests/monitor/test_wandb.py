"""The real W&B client against a stand-in of its server: W&B has what metrics.jsonl has, whatever happens on the way."""

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from caduceus.errors import UserError
from caduceus.monitor.wandb.identity import identity
from caduceus.monitor.wandb.process import sync
from caduceus.run.events import record_event
from launch import runs
from tests.conftest import REPOSITORY
from tests.monitor.conftest import STEPS, Watched, children_of, make_step, sent_rows, status, wait_for, write_rows
from tests.monitor.wandb_server import WandbServer

pytestmark = pytest.mark.slow


def clients_of(parent: int) -> list[int]:
    """The processes of W&B's client below a process."""
    return children_of(parent, b"wandb-core")


def test_a_stopped_and_resumed_run_is_one_wandb_run_with_the_rows_of_metrics(
    server: WandbServer, watched: Watched, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    watched.go_on(1, 25, stopped=True)
    run = server.only_run()
    assert f"wandb: {identity(watched.path).url}" in caplog.messages
    assert sent_rows(run) == watched.rows()
    assert run.preempting and run.exit_code == 75
    assert status(watched.path)["state"] == "complete" and status(watched.path)["step"] == 25
    watched.go_on(21, STEPS)  # from the checkpoint of step 20
    assert server.only_run() is run
    assert sent_rows(run) == watched.rows()
    assert run.written_twice == 0 and run.exit_code == 0
    assert run.name == identity(watched.path).id and server.url in identity(watched.path).url
    assert not server.unknown


def test_a_failed_run_ends_as_failed_with_its_reason(server: WandbServer, watched: Watched) -> None:
    with pytest.raises(UserError), watched.monitor() as monitor:
        make_step(monitor, 1)
        raise UserError("data.path: gone")
    run = server.only_run()
    assert run.exit_code == 1 and "data.path: gone" in run.summary
    assert [row["step"] for row in sent_rows(run)] in ([], [1])


def test_steps_made_again_with_other_samples_replace_the_former_ones(watched: Watched, monkeypatch) -> None:
    with WandbServer(can_rewind=True) as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
        watched.go_on(1, 25, stopped=True)
        watched.go_on(21, STEPS, shift=64)
        run = server.only_run()
        assert run.rewinds == 1
        assert sent_rows(run) == watched.rows()


def test_where_the_server_cannot_rewind_a_new_run_has_every_step_once(
    server: WandbServer, watched: Watched, caplog: pytest.LogCaptureFixture
) -> None:
    watched.go_on(1, 25, stopped=True)
    (former,) = server.runs
    watched.go_on(21, STEPS, shift=64)
    assert len(server.runs) == 2
    now = identity(watched.path)
    assert now.former == [former] and sent_rows(server.runs[now.id]) == watched.rows()
    assert sum("goes on as" in message for message in caplog.messages) == 1


def test_a_rewind_in_one_start_leaves_no_stale_step(monkeypatch: pytest.MonkeyPatch, watched: Watched) -> None:
    with WandbServer(can_rewind=True) as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
        with watched.monitor() as monitor:
            for step in range(1, 26):
                make_step(monitor, step)
            wait_for(lambda: server.runs and len(server.only_run().history) >= 22)
            monitor.rewind(20)
            for step in range(21, STEPS + 1):
                make_step(monitor, step, shift=64)
        assert sent_rows(server.only_run()) == watched.rows()


def test_a_killed_client_loses_no_step(server: WandbServer, watched: Watched) -> None:
    kills = 0
    with watched.monitor() as monitor:
        for step in range(1, STEPS + 1):
            make_step(monitor, step)
            if step in (10, 30):
                wait_for(lambda step=step: server.runs and len(server.only_run().history) >= step - 1)
                (client,) = clients_of(monitor.wandb.pid)
                os.kill(client, signal.SIGKILL)
                kills += 1
    assert kills == 2
    assert sent_rows(server.only_run()) == watched.rows() and server.only_run().written_twice == 0


def test_signals_to_everyone_end_neither_the_sender_nor_the_run(server: WandbServer, watched: Watched) -> None:
    with watched.monitor() as monitor:
        make_step(monitor, 1)
        wait_for(lambda: server.runs)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
            for process in [monitor.wandb.pid, *clients_of(monitor.wandb.pid)]:
                os.kill(process, number)
        for step in range(2, STEPS + 1):
            make_step(monitor, step)
    assert sent_rows(server.only_run()) == watched.rows()


def test_system_metrics_of_several_starts_stand_one_after_the_other(
    server: WandbServer, watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB__STATS_SAMPLING_INTERVAL", "0.3")
    told = [0]
    for first in (1, 11, 21):
        with watched.monitor() as monitor:
            for step in range(first, first + 10):
                make_step(monitor, step)
            wait_for(lambda: server.runs and server.only_run().count("wandb-events.jsonl") > told[-1], 60)
            monitor.stopped = True
        told.append(server.only_run().count("wandb-events.jsonl"))
    assert server.only_run().written_twice == 0
    assert not server.only_run().count("output.log")  # what the sender says is the log's, and the trainer's stays there


def test_an_outage_in_mid_run_is_made_up_for(
    server: WandbServer, watched: Watched, caplog: pytest.LogCaptureFixture
) -> None:
    with watched.monitor() as monitor:
        for step in range(1, 11):
            make_step(monitor, step)
        wait_for(lambda: server.runs and len(server.only_run().history) >= 9)
        server.fail("refuse")
        for step in range(11, 31):
            make_step(monitor, step)
        wait_for(lambda: status(watched.path)["state"] == "waiting", 60)
        server.fail(None)
        wait_for(lambda: status(watched.path)["state"] == "online", 60)
        for step in range(31, STEPS + 1):
            make_step(monitor, step)
    assert sent_rows(server.only_run()) == watched.rows()
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1 and "Connection refused" in warnings[0]


def test_sync_sends_what_an_offline_run_has(
    server: WandbServer, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = Watched(tmp_path / "offline", mode="offline")
    watched.go_on(1, 15, stopped=True)
    watched.go_on(11, STEPS)
    assert not server.runs and status(watched.path)["state"] == "offline"
    monkeypatch.setattr("sys.argv", ["runs.py", "sync", str(watched.path)])
    assert runs.main() == 0
    assert sent_rows(server.only_run()) == watched.rows()
    assert sync(watched.run) == 0  # has everything already
    assert sent_rows(server.only_run()) == watched.rows() and server.only_run().written_twice == 0
    assert f"every step up to {STEPS}" in capsys.readouterr().out
    server.fail(401)
    assert sync(watched.run) == 1
    told = capsys.readouterr().out
    assert "refuses the API key" in told and "training goes on" not in told


def test_a_server_that_never_answers_holds_up_no_start(server: WandbServer, watched: Watched) -> None:
    server.fail("hang")
    began = time.monotonic()
    monitor = watched.monitor()
    make_step(monitor, 1)
    waited = time.monotonic() - began
    monitor.stopped = True
    monitor.__exit__(None, None, None)
    assert waited < 5 and watched.run.metrics()[0]["step"] == 1


def test_environment_variables_hold_where_the_configuration_is_silent(
    server: WandbServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setenv("WANDB_PROJECT", "of-the-environment")
    monkeypatch.setenv("WANDB_TAGS", "a,b")
    monkeypatch.setenv("WANDB_RUN_GROUP", "not-this")
    others = {"ENTITY": "entity", "NOTES": "notes", "NAME": "displayName", "JOB_TYPE": "jobType"}
    for variable, name in others.items():
        monkeypatch.setenv(f"WANDB_{variable}", f"of-{name}")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    watched = Watched(tmp_path / "run", group="of-the-configuration")
    watched.go_on(1, 5)
    properties = server.only_run().properties
    assert properties["project"] == "of-the-environment" and properties["tags"] == ["a", "b"]
    assert properties["groupName"] == "of-the-configuration"
    assert {name: properties.get(name) for name in others.values()} == {name: f"of-{name}" for name in others.values()}
    assert list((tmp_path / "scratch" / "wandb").glob("run-*")) and not list((watched.path / "wandb").glob("run-*"))
    for variable in ("PROJECT", "TAGS", "ENTITY", "NOTES", "JOB_TYPE"):
        assert f"wandb: WANDB_{variable} is used, as the configuration does not set this" in caplog.messages
    assert "wandb: WANDB_NAME is used instead of run.name" in caplog.messages
    assert "wandb: WANDB_RUN_GROUP is not used, as the configuration sets wandb.group" in caplog.messages
    monkeypatch.setenv("WANDB_MODE", "disabled")
    Watched(tmp_path / "disabled").go_on(1, 2)
    assert len(server.runs) == 1


@pytest.mark.parametrize(("fault", "says"), [(500, "answers with status 500"), ("hang", "does not answer within 5 s")])
def test_required_refuses_a_start_without_wandb(
    server: WandbServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: int | str, says: str
) -> None:
    server.fail(fault)
    watched = Watched(tmp_path / "run", required=True)
    began = time.monotonic()
    with pytest.raises(UserError, match=rf"wandb.required: .*({says}|W&B did not start within 10 s)"):
        watched.go_on(1, 2)
    assert time.monotonic() - began < 15
    server.fail(None)
    monkeypatch.setattr("caduceus.monitor.wandb.process.START_SECONDS", 120.0)  # a busy machine imports for long
    watched.go_on(1, 2)
    assert sent_rows(server.only_run()) == watched.rows()


def test_nothing_stays_in_the_temporary_directory_after_kills(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    system = tmp_path / "system"
    system.mkdir()
    monkeypatch.setenv("TMPDIR", str(system))
    monkeypatch.setattr(tempfile, "tempdir", None)
    for kill_sender in (False, True):
        process = write_rows(tmp_path / "run", 1)
        wait_for(lambda: any(system.glob("*/*wandb*")), 60)
        assert not list(system.glob("*wandb-media*")) and not list(system.glob("*wandb-artifacts*"))
        senders = children_of(process.pid)
        process.kill()
        process.wait()
        if kill_sender:
            for sender in senders:
                os.kill(sender, signal.SIGKILL)
        else:
            wait_for(lambda: not list(system.glob("*wandb*")), 90)
    assert any(system.glob("*wandb*"))
    disabled = Watched(tmp_path / "run", mode="disabled")
    disabled.go_on(1, 1)  # a start without W&B tidies up as well
    assert not list(system.glob("*wandb*"))


def test_sync_leaves_nothing_in_the_temporary_directory_when_it_is_killed(
    server: WandbServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = Watched(tmp_path / "offline", mode="offline")
    watched.go_on(1, STEPS)
    system = tmp_path / "system"
    system.mkdir()
    monkeypatch.setenv("TMPDIR", str(system))
    monkeypatch.setattr(tempfile, "tempdir", None)
    command = [sys.executable, str(REPOSITORY / "launch" / "runs.py"), "sync", str(watched.path)]
    for kill_sender in (False, True):
        process = subprocess.Popen(command)
        wait_for(lambda: any(system.glob("*/*wandb*")), 60)
        assert not list(system.glob("*wandb-media*")) and not list(system.glob("*wandb-artifacts*"))
        senders = children_of(process.pid)
        assert len(senders) == 1
        process.kill()
        process.wait()
        if kill_sender:
            os.kill(senders[0], signal.SIGKILL)
        else:  # the sender ends by itself, and tidies up
            wait_for(lambda: not list(system.iterdir()), 90)
    assert list(system.iterdir())
    assert sync(watched.run) == 0 and not list(system.iterdir())
    assert sent_rows(server.only_run()) == watched.rows()


def test_what_happens_is_marked_in_the_history_and_alerted(server: WandbServer, watched: Watched) -> None:
    with watched.monitor() as monitor:
        for step in range(1, 26):
            make_step(monitor, step)
            if step == 10:
                record_event(watched.path, "checkpoint", 10, seconds=2.5)
        monitor.log_training({**watched.run.metrics()[-1], "step": 26, "skipped_steps": 1, "loss": math.nan})
        monitor.stopped = True
    with pytest.raises(UserError), watched.monitor() as monitor:
        for step in range(27, STEPS + 1):
            make_step(monitor, step)
        raise UserError("data.path: gone")
    history = {
        row["step"]: {k: v for k, v in row.items() if k.startswith("events/")} for row in server.only_run().history
    }
    marks = {step: told for step, told in history.items() if told}
    assert marks[1] == {"events/start": 0} and marks[27] == {"events/start": 0}
    assert {"events/checkpoint_seconds": 2.5} in (marks.get(10), marks.get(11)) and len(marks) == 3
    titles = [(title, level) for title, _, level in server.alerts]
    assert titles == [("A step was skipped", "WARN"), ("The run has failed", "ERROR")]
    assert server.alerts[0][1] == "step 26: loss nan, grad norm 1.0"
    assert server.alerts[1][1] == "step 40: UserError: data.path: gone"


def test_the_windows_of_a_validation_are_a_table_with_pictures(server: WandbServer, watched: Watched) -> None:
    window = {
        "species": "hg38",
        "contig": "chr8",
        "start": 4096,
        "end": 4100,
        "strand": "+",
        "place": 1,
        "accuracy": 0.5,
    }
    bins = {"loss": [1.0, 1.5], "repeat": [0.0, 1.0]}
    stretch = {
        "start": 4096,
        "bases": "ACGT",
        "labelled": [1, 0, 1, 0],
        "repeat": [0] * 4,
        "likelihood": [[0.25] * 4] * 4,
    }
    window |= {"loss": 1.25, "bases": 4, "bins": bins, "stretch": stretch}
    with watched.monitor() as monitor:
        for step in range(1, 6):
            make_step(monitor, step)
        monitor.log_validation({"step": 5, "valid_loss": 1.2}, [{**window, "kind": kind} for kind in ("worst", "best")])
        make_step(monitor, 6)
    run = server.only_run()
    rows = sent_rows(run)
    assert rows[4].pop("valid/windows")["_type"] == "table-file" and rows == watched.rows()
    (table,) = [json.loads(content) for name, content in run.files.items() if name.endswith(".table.json")]
    assert table["columns"][:5] == ["species", "kind", "place", "contig", "start"]
    assert [row[:5] for row in table["data"]] == [["hg38", kind, 1, "chr8", 4096] for kind in ("worst", "best")]
    assert [row[-1] for row in table["data"]] == ["Image"] * 2  # which lie in the table's artifact
    assert len(server.artifacts) == 1 and not server.unknown
