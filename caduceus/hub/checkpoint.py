"""A published checkpoint: its configuration, its weights, and the model that they make."""

import logging
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from caduceus.errors import UserError
from caduceus.hub.published import PublishedLayout, from_published, mixer_of
from caduceus.hub.published_config import config_from_published, keys_without_effect
from caduceus.hub.weights import WEIGHTS, Weights, find_weights, read_json, read_weights
from caduceus.model.heads import CaduceusForMaskedLM
from caduceus.patience import exists, is_file

PUBLISHED_CONFIG = "config.json"
_CONFIGS = (PUBLISHED_CONFIG, "model_config.json")
"""File names of the configuration: in transformers' folders, and of the published training."""

_log = logging.getLogger(__name__)


@dataclass
class PublishedCheckpoint:
    """The content of a folder, or of one file of weights with its configuration beside it or inside."""

    config_path: Path
    config: dict[str, Any]
    weights: Weights

    @classmethod
    def open(cls, path: str | Path) -> "PublishedCheckpoint":
        """Read the files of `path`. Raises `UserError`, which names the file that is missing or cannot be read."""
        path = Path(path)
        if is_file(path):
            folders, file = (path.parent, path.parent.parent), path
        else:
            folders, file = (path,), find_weights(path) or find_weights(path / "checkpoints")
        found = (folder / name for folder in folders for name in _CONFIGS if is_file(folder / name))
        config_path = next(found, None)
        if config_path is None and (file is None or file.suffix == ".safetensors" or file.name.endswith(".json")):
            missing = f"{PUBLISHED_CONFIG} is missing" if exists(path) else "there is no such folder or file"
            raise UserError(f"{path}: neither a run nor a published checkpoint ({missing})")
        config = None if config_path is None else _without_wrapping(read_json(config_path))
        if file is None:
            raise UserError(f"{path}: not a published checkpoint (it has no weights, such as {WEIGHTS})")
        weights = read_weights(file)
        if config is None:
            config = _config_within(weights.hyper_parameters)
            if config is None:
                raise UserError(
                    f"{path}: has no configuration inside and no {PUBLISHED_CONFIG} beside it; the published training "
                    "writes model_config.json"
                )
        return cls(config_path or file, {"mixer": mixer_of(weights.tensors), **config}, weights)

    def model(self) -> CaduceusForMaskedLM:
        """The model, with every tensor accounted for. The log names keys and tensors that it does not use."""
        try:
            layout = PublishedLayout(config_from_published(self.config))
        except UserError as error:
            raise UserError(f"{self.config_path}: {error}") from None
        left_out = sorted(self.weights.left_out)
        for path, names in ((self.config_path, keys_without_effect(self.config)), (self.path, left_out)):
            if names:
                _tell_left_out(path, tuple(names))
        try:
            # transformers writes a tied weight under one of its names only.
            return from_published(self.config, layout.completed(self.weights.tensors))
        except UserError as error:
            raise UserError(f"{self.path}: {error}") from None

    @property
    def path(self) -> Path:
        """The file or folder of the weights."""
        return self.weights.path


@cache
def _tell_left_out(path: Path, names: tuple[str, ...]) -> None:
    """Name what is left out, once however often it is loaded: a start of training first checks the weights."""
    _log.info("%s: not part of the model, and left out: %s", path, ", ".join(names))


def load_published(path: str | Path) -> CaduceusForMaskedLM:
    """This package's model from a published checkpoint: a folder, or one file of weights.

    It reads folders of transformers (also sharded or pickled), folders of the published training with model_config.json
    and Lightning's .ckpt, and such a .ckpt alone. Raises `UserError`, which names the file or key, for anything that
    does not fit.
    """
    return PublishedCheckpoint.open(path).model()


def _without_wrapping(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration itself; hydra's has it under `config`, beside the name of its class."""
    inner = config.get("config")
    config = inner if isinstance(inner, dict) else config
    return {key: value for key, value in config.items() if key != "_target_"}


def _config_within(values: Any) -> dict[str, Any] | None:
    """The model's configuration, wherever it is in the values that Lightning keeps."""
    values = OmegaConf.to_container(values) if OmegaConf.is_config(values) else values
    if not isinstance(values, dict):
        return None
    if {"d_model", "n_layer"} <= values.keys():
        return _without_wrapping(values)
    inner = (_config_within(value) for value in values.values())
    return next((found for found in inner if found is not None), None)
