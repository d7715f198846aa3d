"""Whatever form published weights come in, they load: files, shards, pickles, Lightning; and `show` tells."""

import json
import logging
import pickle
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from caduceus import hub
from caduceus.alphabet import CADUCEUS
from caduceus.errors import UserError
from tests.hub.test_folders import call, equal_models, make_run, small_model
from tests.model.golden import Golden, load_golden

ADDED_BY_TRANSFORMERS = {
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
    "label2id": {"LABEL_0": 0, "LABEL_1": 1},
    "_attn_implementation_autoset": True,
    "tie_word_embeddings": True,
    "use_cache": False,
    "problem_type": None,
    "dtype": "float32",
}

_POINTER_FILE = b"version https://git-lfs.github.com/spec/v1\noid sha256:0a1b\nsize 123\n"


@pytest.fixture
def golden() -> Golden:
    return load_golden("plantcad1_ps_fused")


def shards(state: dict, folder: Path) -> None:
    names = sorted(state)
    placed = {name: f"model-0000{1 + number % 2}-of-00002.safetensors" for number, name in enumerate(names)}
    for file in set(placed.values()):
        save_file({name: state[name] for name in names if placed[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))


def lightning(state: dict, config: dict) -> dict:
    """As the published training writes it, with what its callbacks and hydra leave behind."""
    hydra = {"model": {"_name_": "caduceus_lm", "config": {"_target_": "caduceus.CaduceusConfig", **config}}}
    return {
        "epoch": 1,
        "global_step": 10,
        "state_dict": OrderedDict(
            {**{f"model.{name}": tensor for name, tensor in state.items()}, "metrics.total": torch.ones(())}
        ),
        "callbacks": {"ModelCheckpoint": {"best_model_score": np.float64(1.5), "seen": np.int64(3)}},
        "optimizer_states": [{"state": {0: {"step": torch.ones(())}}}],
        "hyper_parameters": OmegaConf.create(hydra),
        "hparams_type": type(OmegaConf.create({})),
    }


def write(form: str, golden: Golden, folder: Path) -> Path:
    """The golden model in one of the forms that are about; returns what to load."""
    state, config = golden.part("state"), golden.config
    if not form.startswith("lightning alone"):
        name = "model_config.json" if form == "published training" else "config.json"
        inner = {"config": {"_target_": "x", **config}} if form == "published training" else config
        (folder / name).write_text(json.dumps(inner))
    if form == "shards":
        shards(state, folder)
    elif form == "pickle":
        torch.save(state, folder / "pytorch_model.bin")
    elif form == "nested pickle":
        nested = {
            "model": {f"module._orig_mod.{name}": tensor for name, tensor in state.items()},
            "step": np.float32(1),
        }
        torch.save(nested, folder / "pytorch_model.bin")
    elif form == "backbone alone":
        backbone = {k.removeprefix("caduceus."): v for k, v in state.items() if k.startswith("caduceus.")}
        save_file({**backbone, "lm_head.complement_map": state["lm_head.complement_map"]}, folder / "some.safetensors")
    elif form == "published training":
        (folder / "checkpoints").mkdir()
        torch.save(lightning(state, config), folder / "checkpoints" / "last.ckpt")
    elif form == "lightning alone":
        torch.save(lightning(state, config), folder / "any.ckpt")
        return folder / "any.ckpt"
    return folder


@pytest.mark.parametrize(
    "form", ["shards", "pickle", "nested pickle", "backbone alone", "published training", "lightning alone"]
)
def test_every_form_gives_the_same_model(golden, tmp_path, form):
    expected = hub.from_published(golden.config, golden.part("state"))
    assert equal_models(hub.load(write(form, golden, tmp_path)), expected)
    if form == "published training":
        assert equal_models(hub.load(tmp_path / "checkpoints" / "last.ckpt"), expected)


def test_keys_that_transformers_adds_are_named_once(golden, tmp_path, caplog):
    (tmp_path / "config.json").write_text(json.dumps({**golden.config, **ADDED_BY_TRANSFORMERS}))
    save_file({**golden.part("state"), "score.weight": torch.zeros(2, 24)}, tmp_path / "model.safetensors")
    with caplog.at_level(logging.INFO):
        assert hub.load(tmp_path).config.vocab_size == hub.load(tmp_path).config.vocab_size == 8
    configuration, tensors = caplog.messages
    assert all(key in configuration for key in ADDED_BY_TRANSFORMERS) and "ssm_cfg.dt_scale" in configuration
    assert tensors.endswith("not part of the model, and left out: score.weight")


def test_what_is_no_caduceus_is_refused_in_a_line(golden, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(golden.config))
    cases = {
        "other.safetensors": ({"bert.embeddings.weight": torch.zeros(1)}, "expected the tensors of one Caduceus"),
        "code.bin": ({"state_dict": {"x": Path("x")}}, "a PyTorch state dict .it needs pathlib.*which could run code"),
        "values.bin": ({"a": 1, "b": "c"}, "expected a dict of tensors; it holds values of type int, str"),
        "list.bin": ([1], "expected a dict of tensors"),
    }
    for name, (values, message) in cases.items():
        save_file(values, tmp_path / name) if name.endswith("safetensors") else torch.save(values, tmp_path / name)
        with pytest.raises(UserError, match=message) as refused:
            hub.load(tmp_path / name)
        assert "\n" not in str(refused.value) and name in str(refused.value)
        assert "weights_only" not in str(refused.value)  # torch advises to read such a file with its code
    files = {
        "empty.bin": (b"", "not readable as a PyTorch state dict .it is empty"),
        "text.bin": (b"root:x:0:0:root:/root\n", "not readable as a PyTorch state dict"),
        "plain.bin": (pickle.dumps({"a": 1}), "not readable as a PyTorch state dict .Unsupported"),
        "pointer.bin": (_POINTER_FILE, "a pointer of Git LFS in place of the weights; fetch them with `git lfs pull`"),
        "pointer.safetensors": (_POINTER_FILE, "a pointer of Git LFS"),
    }
    for name, (content, message) in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name}: .*{message}") as refused:
            hub.load(tmp_path / name)
        assert "\n" not in str(refused.value) and "weights_only" not in str(refused.value)
    torch.save(golden.part("state"), tmp_path / "alone.pt")
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match=r"has no configuration inside and no config.json beside it"):
        hub.load(tmp_path / "alone.pt")


def test_a_shard_that_is_missing_is_named(golden, tmp_path):
    write("shards", golden, tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    index["weight_map"]["more"] = "model-00001-of-00002.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"index.json: none of its files has more"):
        hub.load(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"model-00002-of-00002.safetensors: not readable"):
        hub.load(tmp_path)


@pytest.mark.moderate
def test_show_says_what_a_folder_holds(golden, tmp_path, capsys):
    write("shards", golden, tmp_path)
    status, out, _ = call(capsys, "show", str(tmp_path))
    told = dict(line.split("  ", 1) for line in out.splitlines())
    told = {name: value.strip() for name, value in told.items()}
    assert status == 0 and told["holds"] == "a published checkpoint" and told["parameters"] == "27,648"
    assert told["kind"] == "Caduceus-PS, equivariant to the reverse complement" and told["mixer"] == "Mamba"
    assert told["vocabulary"] == "plantcad: A 3, C 4, G 5, T 6; [MASK] 1, [PAD] 0"
    assert told["tied weights"] == "are stored under both names, and are equal"

    run = make_run(tmp_path / "run", small_model())
    for path, holds in ((run.path, "a run"), (run.checkpoint_path(1), "a checkpoint of a run")):
        out = call(capsys, "show", str(path))[1]
        assert f"holds                   {holds}\n" in out and "1, 2" in out
    hub.save_imported(small_model(), tmp_path / "own")
    assert "an import" in call(capsys, "show", str(tmp_path / "own"))[1]
    hub.save_published(small_model(d_model=16, mixer="mamba2", headdim=8), tmp_path / "mamba2")
    assert "mixer                   Mamba-2, heads of 8 channels\n" in call(capsys, "show", str(tmp_path / "mamba2"))[1]
    status, out, err = call(capsys, "show", str(tmp_path / "absent"))
    assert (status, out, err.count("\n")) == (2, "", 1) and "no such folder or file" in err


@pytest.mark.moderate
def test_an_export_keeps_the_order_of_the_complement_and_tells_of_its_run(tmp_path, capsys):
    run = make_run(tmp_path / "run", small_model())
    rows = [
        {"step": step, "samples": 8 * step, "tokens": 80 * step, "loss": 1.25 + step, "valid_loss": 1.5}
        for step in (1, 2)
    ]
    run.metrics_path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run.write_provenance({"data_fingerprint": "0123abcd"})
    assert call(capsys, "export", "--run", str(run.checkpoint_path(1)), "--out", str(tmp_path / "export"))[0] == 0
    complement = json.loads((tmp_path / "export" / "config.json").read_text())["complement_map"]
    assert list(complement.values()) == CADUCEUS.complement(16).tolist()
    card = (tmp_path / "export" / "README.md").read_text()
    assert "0123abcd" in card and "2.2500 nats" in card and "3.2500" not in card and "# test: Caduceus-PS" in card
    assert card.startswith("---\nlibrary_name: transformers\n")
    tensors = load_file(tmp_path / "export" / "model.safetensors")
    assert torch.equal(
        tensors["lm_head.lm_head.weight"], tensors[next(n for n in tensors if "word_emb" in n and "weight" in n)]
    )
