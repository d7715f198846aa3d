"""Under which id W&B has a run: the same for as long as it can be, and with every step where it becomes another."""

import json
import os
from pathlib import Path

import pytest

from caduceus.errors import UserError
from caduceus.monitor.wandb.identity import identity
from tests.monitor.conftest import STEPS, Watched, sent_rows
from tests.monitor.wandb_server import KEY, WandbServer

pytestmark = pytest.mark.slow


def test_a_deleted_run_goes_on_under_a_new_id(
    server: WandbServer, watched: Watched, caplog: pytest.LogCaptureFixture
) -> None:
    watched.go_on(1, 10, stopped=True)
    (former,) = server.runs
    server.deleted.add(former)
    del server.runs[former]
    watched.go_on(11, STEPS)
    assert server.only_run().name != former
    assert sent_rows(server.only_run()) == watched.rows()
    assert sum(record.levelname == "WARNING" for record in caplog.records) == 1


def test_another_entity_and_a_changed_configuration_are_taken(server: WandbServer, watched: Watched) -> None:
    watched.go_on(1, 10, stopped=True)
    watched.config.train.lr = 0.5
    watched.run.keep_config(watched.config)
    watched.go_on(11, 20, stopped=True)
    assert server.only_run().config["train"]["value"]["lr"] == 0.5
    watched.config.wandb.entity = "other"
    watched.run.keep_config(watched.config)
    watched.go_on(21, STEPS)
    name = identity(watched.path).id
    assert set(server.runs) == {name, f"other:{name}"}
    assert len(server.runs[name].history) == 20
    assert sent_rows(server.runs[f"other:{name}"]) == watched.rows()  # with the steps before the change


def test_an_id_that_another_run_has_costs_one_warning_and_no_step(
    server: WandbServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = (Watched(tmp_path / name, id="taken") for name in ("first", "second"))
    first.go_on(1, STEPS)
    second.go_on(1, 15, stopped=True)
    second.go_on(16, 20)
    now = identity(second.path)
    assert set(server.runs) == {"taken", now.id} and now.former == ["taken"]
    assert sent_rows(server.runs["taken"]) == first.rows() and sent_rows(server.runs[now.id]) == second.rows()
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert warnings == [
        f"wandb: run taken has the steps of another run; the run goes on as {now.id}, from its first step"
    ]


def test_a_start_without_a_key_is_kept_offline_under_the_same_id(
    server: WandbServer, watched: Watched, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setenv("NETRC", os.devnull)
    watched.go_on(1, 10, stopped=True)
    monkeypatch.setenv("WANDB_API_KEY", "")
    watched.go_on(11, 20, stopped=True)
    name, sync = identity(watched.path).id, f"`python launch/runs.py sync {watched.path}` sends it"
    kept = f"wandb: not logged in to W&B, so run {name} is kept offline in {watched.path}/wandb; {sync}"
    assert [message for message in caplog.messages if "kept offline" in message] == [kept]
    assert len(server.only_run().history) == 10
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    watched.go_on(21, STEPS)
    run = server.only_run()
    assert run.name == name and sent_rows(run) == watched.rows() and run.written_twice == 0


def test_the_id_is_kept_from_the_first_second(server: WandbServer, watched: Watched) -> None:
    server.fail("refuse")
    for _ in range(3):
        watched.go_on(1, 1, stopped=True)
    server.fail(None)
    watched.go_on(1, STEPS)
    assert server.only_run().name == identity(watched.path).id
    assert json.loads((watched.path / "wandb" / "run.json").read_text())["former"] == []


def test_the_id_and_how_often_rows_come_are_the_users_to_choose(server: WandbServer, tmp_path: Path) -> None:
    watched = Watched(tmp_path / "run", id="my-own", log_every=4, alerts=False)
    watched.go_on(1, 15, stopped=True)
    watched.go_on(16, 27)
    run = server.only_run()
    assert run.name == "my-own"
    steps = [row["step"] for row in run.history]
    assert steps == [4, 8, 10, 12, 15, 16, 20, 24, 27]  # validations and the last of a start besides
    assert sent_rows(run) == [row for row in watched.rows() if row["step"] in steps]
    with pytest.raises(UserError, match=r"wandb.id: give at most 64 letters"):
        Watched(tmp_path / "other", id="a/b")
