"""Folders that hold a model: runs and their checkpoints, imports, and published checkpoints.

A published checkpoint is a directory with `config.json` and `model.safetensors` (or `pytorch_model.bin`), in the key
layout of the repository kuleshov-group/caduceus, which `transformers` loads through that repository's remote code. An
import holds `config.yaml` (the `model:` section) and `model.safetensors` (our own names).
"""

import json
import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from omegaconf import OmegaConf
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from caduceus.config import load_config
from caduceus.errors import UserError
from caduceus.files import dump_json, replacing_directory
from caduceus.hub.published import PublishedLayout, config_from_published, from_published, to_published
from caduceus.model.heads import CaduceusForMaskedLM
from caduceus.run.checkpoints import MARKER
from caduceus.run.directory import RunDirectory

PUBLISHED_CONFIG = "config.json"
OWN_CONFIG = "config.yaml"
WEIGHTS = "model.safetensors"
PICKLED_WEIGHTS = "pytorch_model.bin"

_REMOTE_CODE = "kuleshov-group/caduceus-ps_seqlen-131k_d_model-256_n_layer-16"
_TRANSFORMERS_KEYS = {
    "model_type": "caduceus",
    "architectures": ["CaduceusForMaskedLM"],
    "auto_map": {
        "AutoConfig": f"{_REMOTE_CODE}--configuration_caduceus.CaduceusConfig",
        "AutoModel": f"{_REMOTE_CODE}--modeling_caduceus.Caduceus",
        "AutoModelForMaskedLM": f"{_REMOTE_CODE}--modeling_caduceus.CaduceusForMaskedLM",
        "AutoModelForSequenceClassification": f"{_REMOTE_CODE}--modeling_caduceus.CaduceusForSequenceClassification",
    },
    "torch_dtype": "float32",
}
"""What `transformers` needs beside the model's configuration: its name for the model, and where the code is."""


def load(path: str | Path) -> CaduceusForMaskedLM:
    """The model of a run directory (its newest valid checkpoint), of one of its checkpoints, of an export or another
    published checkpoint, or of an import. Raises `UserError` naming file or key for whatever does not fit."""
    return load_published(path) if (Path(path) / PUBLISHED_CONFIG).is_file() else _load_own(Path(path))


def load_published(directory: str | Path) -> CaduceusForMaskedLM:
    """Our model from a published checkpoint's directory; `UserError` naming file or key for whatever does not fit."""
    directory = Path(directory)
    if not (directory / PUBLISHED_CONFIG).is_file():
        raise UserError(f"{directory}: not a published checkpoint ({PUBLISHED_CONFIG} is missing)")
    config = _read_json(directory / PUBLISHED_CONFIG)
    if (directory / WEIGHTS).is_file():
        weights = directory / WEIGHTS
        state_dict = _read_safetensors(weights)
    elif (directory / PICKLED_WEIGHTS).is_file():
        weights = directory / PICKLED_WEIGHTS
        state_dict = _read_pickled(weights)
    else:
        raise UserError(f"{directory}: not a published checkpoint (neither {WEIGHTS} nor {PICKLED_WEIGHTS} is there)")
    try:
        layout = PublishedLayout(config_from_published(config))
    except UserError as error:
        raise UserError(f"{directory / PUBLISHED_CONFIG}: {error}") from None
    try:
        # transformers writes a tied weight under one of its names only.
        return from_published(config, layout.with_tied_names(state_dict))
    except UserError as error:
        raise UserError(f"{weights}: {error}") from None


def save_published(model: CaduceusForMaskedLM, directory: str | Path) -> None:
    """Write `config.json` and `model.safetensors` as a published checkpoint; `directory` appears when complete.

    An earlier one in `directory` is replaced; a directory that holds other files is refused.
    """
    config, state_dict = to_published(model)
    with _new_directory(directory, {PUBLISHED_CONFIG, WEIGHTS}) as writing:
        save_file(state_dict, writing / WEIGHTS, metadata={"format": "pt"})
        (writing / PUBLISHED_CONFIG).write_bytes(dump_json({**_TRANSFORMERS_KEYS, **config}))


def run_of(path: str | Path) -> RunDirectory:
    """The run that `path` is, or that the checkpoint `path` belongs to."""
    path = Path(path)
    return RunDirectory.open(path.resolve().parents[1] if (path / MARKER).is_file() else path)


def _load_own(path: Path) -> CaduceusForMaskedLM:
    if (path / MARKER).is_file():
        weights, config_path = path, run_of(path).config_path
    elif (path / WEIGHTS).is_file():
        weights, config_path = path, path / OWN_CONFIG
    else:
        run = run_of(path)
        checkpoint = run.newest_valid_checkpoint()
        if checkpoint is None:
            raise UserError(f"{path}: this run has no complete checkpoint yet")
        weights, config_path = checkpoint.path, run.config_path
    model = CaduceusForMaskedLM(load_config(config_path).model)
    try:
        if (weights / WEIGHTS).is_file():
            state = _read_safetensors(weights / WEIGHTS)
        else:
            state = model.state_dict()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that this is a single process
                dcp.load({"model": state}, checkpoint_id=weights, no_dist=True)
        model.load_state_dict(state)
    except (RuntimeError, ValueError, dcp.CheckpointException) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{weights}: not a checkpoint of the model in {config_path} ({reason})") from None
    return model


def save_imported(model: CaduceusForMaskedLM, directory: str | Path) -> None:
    """Write a model in our own layout: `config.yaml` (its `model:` section) and `model.safetensors`."""
    with _new_directory(directory, {OWN_CONFIG, WEIGHTS}) as writing:
        save_file(model.state_dict(), writing / WEIGHTS)
        OmegaConf.save(OmegaConf.create({"model": asdict(model.config)}), writing / OWN_CONFIG)


@contextmanager
def _new_directory(directory: str | Path, files: set[str]) -> Iterator[Path]:
    """A temporary directory that becomes `directory` at the end, in place of one that holds nothing but `files`."""
    directory = Path(directory)
    if directory.is_file():
        raise UserError(f"{directory}: is a file; choose a directory")
    if directory.is_dir():
        others = sorted(path.name for path in directory.iterdir() if path.name not in files)
        if others:
            raise UserError(f"{directory}: holds other files, such as {others[0]}; choose a new directory")
    try:
        with replacing_directory(directory) as writing:
            yield writing
    except (OSError, SafetensorError) as error:
        raise UserError(f"{directory}: could not be written ({error})") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a JSON object")
    return values


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: not readable as safetensors ({error})") from None


def _read_pickled(path: Path) -> dict[str, Tensor]:
    try:
        state_dict = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: not readable as a PyTorch state dict ({reason})") from None
    if not isinstance(state_dict, dict) or not all(isinstance(value, Tensor) for value in state_dict.values()):
        raise UserError(f"{path}: expected a dict of tensors")
    return state_dict
