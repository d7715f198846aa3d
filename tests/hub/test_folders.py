"""Published checkpoint directories and the command line."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

from caduceus import CaduceusConfig, CaduceusForMaskedLM, hub
from caduceus.config import Config, RunConfig
from caduceus.errors import UserError, run_command
from caduceus.hub.__main__ import main
from caduceus.run.directory import RunDirectory


def equal_models(first: CaduceusForMaskedLM, second: CaduceusForMaskedLM) -> bool:
    ours, theirs = first.state_dict(), second.state_dict()
    same_names = first.config == second.config and ours.keys() == theirs.keys()
    return same_names and all(torch.equal(ours[name], theirs[name]) for name in ours)


def small_model(**keys) -> CaduceusForMaskedLM:
    torch.manual_seed(3)
    return CaduceusForMaskedLM(CaduceusConfig(**{"d_model": 12, "n_layer": 2, "rcps": True, **keys}))


def call(capsys, *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as exit_:
        run_command(lambda: main(list(arguments)))
    captured = capsys.readouterr()
    return exit_.value.code, captured.out, captured.err


def make_run(path: Path, model: CaduceusForMaskedLM) -> RunDirectory:
    """A run directory with two checkpoints of one model: zeroed at step 1, as it is at step 2."""
    run = RunDirectory.create_or_resume(Config(model=model.config, run=RunConfig(dir=str(path), name="test")))
    zeros = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
    for step, state in ((1, zeros), (2, model.state_dict())):
        writing = run.checkpoints_path / f".writing-{step}"
        writing.mkdir()
        dcp.save({"model": state}, checkpoint_id=writing, no_dist=True)
        run.complete_checkpoint(writing, step, {})
    run.release()
    return run


@pytest.mark.moderate
def test_a_published_directory_is_what_transformers_expects(tmp_path):
    model = small_model()
    hub.save_published(model, tmp_path / "export")
    files = {path.name for path in (tmp_path / "export").iterdir()}
    assert files >= {"README.md", "config.json", "model.safetensors", "modeling_caduceus.py", "tokenizer_config.json"}
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    assert config["model_type"] == "caduceus" and config["rcps"] is True and config["ssm_cfg"]["d_state"] == 16
    assert config["auto_map"]["AutoModelForMaskedLM"] == "modeling_caduceus.CaduceusForMaskedLM"
    _, expected = hub.to_published(model)
    state_dict = load_file(tmp_path / "export" / "model.safetensors")
    assert state_dict.keys() == expected.keys()
    assert equal_models(hub.load_published(tmp_path / "export"), model)


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_tied_weights_may_stand_under_one_name_only(tmp_path, golden_ps, file):
    state = golden_ps.part("state")
    del state["lm_head.lm_head.weight"]
    for layer in range(3):
        del state[f"caduceus.backbone.layers.{layer}.mixer.submodule.mamba_fwd.in_proj.weight"]
        del state[f"caduceus.backbone.layers.{layer}.mixer.submodule.mamba_rev.out_proj.weight"]
    (tmp_path / "config.json").write_text(json.dumps(golden_ps.config))
    if file == "model.safetensors":
        save_file(state, tmp_path / file)
    else:
        torch.save(state, tmp_path / file)
    expected = hub.from_published(golden_ps.config, golden_ps.part("state"))
    assert equal_models(hub.load_published(tmp_path), expected)


@pytest.mark.moderate
def test_saving_replaces_an_earlier_export_and_nothing_else(tmp_path):
    hub.save_published(small_model(), tmp_path / "export")
    other = small_model(d_model=10)
    hub.save_published(other, tmp_path / "export")
    assert equal_models(hub.load_published(tmp_path / "export"), other)
    (tmp_path / "export" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"export: holds other files, such as notes.txt"):
        hub.save_published(other, tmp_path / "export")
    assert (tmp_path / "export" / "notes.txt").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


@pytest.mark.moderate
def test_a_failed_save_leaves_the_earlier_export(tmp_path, monkeypatch):
    model = small_model()
    hub.save_published(model, tmp_path / "export")

    def full_disk(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hub.folders, "save_file", full_disk)
    with pytest.raises(UserError, match=r"could not be written .*No space left"):
        hub.save_published(small_model(d_model=10), tmp_path / "export")
    assert equal_models(hub.load_published(tmp_path / "export"), model)
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


@pytest.mark.moderate
def test_export_takes_a_run_a_checkpoint_or_an_import(tmp_path, capsys):
    model = small_model(fused_add_norm=False)
    make_run(tmp_path / "run", model)
    status, out, _ = call(capsys, "export", "--run", str(tmp_path / "run"), "--out", str(tmp_path / "newest"))
    assert status == 0 and "exported" in out
    assert equal_models(hub.load_published(tmp_path / "newest"), model)
    assert equal_models(hub.load(tmp_path / "newest"), model) and equal_models(hub.load(tmp_path / "run"), model)

    first = tmp_path / "run" / "checkpoints" / "step-00000001"
    assert call(capsys, "export", "--run", str(first), "--out", str(tmp_path / "first"))[0] == 0
    assert not hub.load_published(tmp_path / "first").embedding.weight.any()

    assert call(capsys, "import", "--from", str(tmp_path / "newest"), "--out", str(tmp_path / "own"))[0] == 0
    assert equal_models(hub.load(tmp_path / "own"), model)
    assert call(capsys, "export", "--run", str(tmp_path / "own"), "--out", str(tmp_path / "again"))[0] == 0
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "newest" / file).read_bytes()


@pytest.mark.moderate
def test_wrong_directories_are_refused_in_one_line(tmp_path, capsys):
    model = small_model()
    good = tmp_path / "good"
    hub.save_published(model, good)
    whole, config = (good / "model.safetensors").read_bytes(), json.loads((good / "config.json").read_text())
    empty, unfinished = tmp_path / "empty", tmp_path / "unfinished"
    empty.mkdir()
    RunDirectory.create_or_resume(Config(model=model.config, run=RunConfig(dir=str(unfinished)))).release()

    def directory(name: str, weights: bytes | None, config_text: str | None) -> str:
        path = tmp_path / name
        path.mkdir()
        if weights is not None:
            (path / "model.safetensors").write_bytes(weights)
        if config_text is not None:
            (path / "config.json").write_text(config_text)
        return str(path)

    wider = json.dumps({**config, "d_model": 14})
    cases = {
        ("import", "--from", str(tmp_path / "absent")): "nor a published checkpoint (there is no such folder or file)",
        ("import", "--from", str(empty)): "nor a published checkpoint (config.json is missing)",
        (
            "import",
            "--from",
            directory("a", None, json.dumps(config)),
        ): "it has no weights",
        ("import", "--from", directory("b", whole[:-100], json.dumps(config))): "not readable as safetensors",
        ("import", "--from", directory("c", whole, "{")): "config.json: not readable as JSON",
        ("import", "--from", directory("d", whole, "[]")): "config.json: expected a JSON object",
        ("import", "--from", directory("e", whole, wider)): "expected shape [16, 14], got [16, 12]",
        ("import", "--from", directory("f", whole, '{"d_model": 3}')): "config.json: n_layer: missing",
        ("export", "--run", str(empty)): "neither a run nor a published checkpoint",
        ("export", "--run", str(tmp_path / "absent")): "neither a run nor a published checkpoint",
        ("export", "--run", str(unfinished)): "no complete checkpoint yet",
        ("export", "--run", directory("g", whole, None)): "config.json is missing",
    }
    for arguments, message in cases.items():
        status, out, err = call(capsys, *arguments, "--out", str(tmp_path / "out"))
        assert (status, out, err.count("\n")) == (2, "", 1), (arguments, err)
        assert message in err and err.startswith("error: ")
        assert not (tmp_path / "out").exists()


def test_an_own_checkpoint_of_another_model_is_refused(tmp_path):
    hub.save_imported(small_model(), tmp_path / "own")
    config = (tmp_path / "own" / "config.yaml").read_text()
    (tmp_path / "own" / "config.yaml").write_text(config.replace("n_layer: 2", "n_layer: 3"))
    with pytest.raises(UserError, match=r"not a checkpoint of the model in .*config.yaml") as refused:
        hub.load(tmp_path / "own")
    assert "\n" not in str(refused.value)

    make_run(tmp_path / "run", small_model())
    config = (tmp_path / "run" / "config.yaml").read_text()
    (tmp_path / "run" / "config.yaml").write_text(config.replace("n_layer: 2", "n_layer: 3"))
    with pytest.raises(UserError, match=r"not a checkpoint of the model in .*config.yaml") as refused:
        hub.load(tmp_path / "run")
    assert "\n" not in str(refused.value)
