"""What a run leaves in W&B besides rows, by the real client: references or files, and what came of what."""

import json
from pathlib import Path
from typing import Any

import pytest

from caduceus.errors import UserError
from caduceus.monitor.wandb.ends import END_SECONDS, UPLOAD_SECONDS, end_seconds, finish_seconds
from caduceus.monitor.wandb.process import sync
from caduceus.run.checkpoints import write_marker
from tests.monitor.conftest import Watched, sent_rows
from tests.monitor.wandb_server import WandbServer

ALL = ["dataset", "checkpoints", "exports", "report"]


def run_with_everything(path: Path, **wandb: Any) -> Watched:
    """A run that has a dataset, a checkpoint, two exports and a report."""
    watched = Watched(path / "run", artifacts=ALL, **wandb)
    (path / "shards").mkdir()
    (path / "shards" / "manifest.json").write_text(json.dumps({"fingerprint": "f1", "species": [{"name": "hg38"}]}))
    watched.config.data.path = [{"path": str(path / "shards"), "weight": 1.0}]
    watched.run.keep_config(watched.config)
    checkpoint = watched.run.checkpoint_path(5)
    checkpoint.mkdir(parents=True)
    (checkpoint / "weights").write_text("some weights")
    write_marker(checkpoint, 5, {"samples": 40})
    for step in (2, 4):
        export = watched.path / "export" / f"step-{step:08d}"
        export.mkdir(parents=True)
        (export / "model.safetensors").write_text(f"a model of step {step}")
    (watched.path / "report").mkdir()
    (watched.path / "report" / "report.html").write_text("a page")
    return watched


@pytest.mark.slow
@pytest.mark.parametrize("files", [False, True])
def test_they_are_left_as_asked_with_what_they_came_of(
    server: WandbServer, tmp_path: Path, caplog: pytest.LogCaptureFixture, files: bool
) -> None:
    watched = run_with_everything(tmp_path, artifact_files=files, save_code=not files)
    watched.go_on(1, 3, stopped=True)
    # A start that stopped early has little time: what it leaves of models are references in any case.
    assert all("ref" in entry for entry in server.manifest(f"checkpoint-{server.only_run().name}").values())
    watched.go_on(4, 5)
    assert not [record.message for record in caplog.records if record.levelname == "WARNING"]
    run_id = server.only_run().name
    names = {"dataset-shards": "dataset", f"checkpoint-{run_id}": "model", f"export-{run_id}": "model"}
    names |= {f"report-{run_id}": "report"}
    given = {one["artifactCollectionName"]: one for one in server.artifacts}
    assert {name: given[name]["artifactTypeName"] for name in names} == names
    assert any(one["artifactTypeName"] == "code" for one in server.artifacts) == (not files)

    facts = {name: json.loads(one["metadata"]) for name, one in given.items() if name in names and one.get("metadata")}
    assert facts["dataset-shards"] == {"fingerprint": "f1", "species": ["hg38"]}
    checkpoint, export = facts[f"checkpoint-{run_id}"], facts[f"export-{run_id}"]
    assert checkpoint["step"] == 5 and checkpoint["datasets"] == ["dataset-shards"]
    assert export["step"] == 4 and export["checkpoint"] == f"checkpoint-{run_id}:step-4"
    aliases = {alias["alias"] for alias in given[f"export-{run_id}"]["aliases"]}
    assert aliases == {"latest", "step-4"}
    assert {use["artifactID"] for use in server.used} == {server.id_of("dataset-shards")}

    contents = server.contents(f"checkpoint-{run_id}"), server.contents(f"export-{run_id}")
    weights = server.manifest(f"checkpoint-{run_id}")["step-00000005/weights"]
    model = server.manifest(f"export-{run_id}")["step-00000004/model.safetensors"]
    assert weights["size"] == len("some weights")
    if files:
        assert contents[0]["step-00000005/weights"] == b"some weights" and "ref" not in weights
        assert contents[1] == {"step-00000004/model.safetensors": b"a model of step 4"} and "ref" not in model
    else:
        assert contents == ({}, {})
        assert weights["ref"] == (watched.run.checkpoint_path(5) / "weights").as_uri()
        assert model["ref"] == (watched.path / "export" / "step-00000004" / "model.safetensors").as_uri()
    assert server.contents("dataset-shards")["manifest.json"] == (tmp_path / "shards" / "manifest.json").read_bytes()
    assert server.manifest("dataset-shards")["shards/manifest.json"]["ref"].startswith((tmp_path / "shards").as_uri())
    assert server.contents(f"report-{run_id}") == {"report.html": b"a page"}
    assert not server.unknown
    assert sent_rows(server.only_run()) == watched.rows() and server.only_run().exit_code == 0


@pytest.mark.slow
def test_sync_leaves_those_of_an_offline_run(
    server: WandbServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    watched = run_with_everything(tmp_path, artifact_files=True, mode="offline")
    watched.go_on(1, 5)
    assert not [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert not server.artifacts
    assert sync(watched.run) == 0
    run_id = server.only_run().name
    assert server.contents(f"export-{run_id}") == {"step-00000004/model.safetensors": b"a model of step 4"}
    assert {use["artifactID"] for use in server.used} == {server.id_of("dataset-shards")} and not server.unknown


def test_only_complete_runs_wait_for_files(tmp_path: Path) -> None:
    with_files = Watched(tmp_path / "files", mode="disabled", artifacts=["exports"], artifact_files=True).config
    without = Watched(tmp_path / "none", mode="disabled", artifacts=["report"], artifact_files=True).config
    assert end_seconds(with_files, early=False) == finish_seconds(with_files, early=False) == UPLOAD_SECONDS
    assert end_seconds(with_files, early=True) == end_seconds(without, early=False) == END_SECONDS


def test_what_is_no_artifact_is_refused(tmp_path: Path) -> None:
    known = "dataset, checkpoints, exports, report"
    with pytest.raises(UserError, match=f"wandb.artifacts: choose from {known}; got 'weights'"):
        Watched(tmp_path / "other", artifacts=["weights"])
