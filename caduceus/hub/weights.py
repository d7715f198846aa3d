"""Reads files of weights in every usual form: safetensors or pickled, whole or in shards, published or of Lightning."""

import json
import re
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from caduceus.errors import UserError
from caduceus.patience import is_file, listed

WEIGHTS = "model.safetensors"
PICKLED_WEIGHTS = "pytorch_model.bin"
_NAMES = (WEIGHTS, f"{WEIGHTS}.index.json", PICKLED_WEIGHTS, f"{PICKLED_WEIGHTS}.index.json", "last.ckpt")
_STATE_KEYS = ("state_dict", "model_state_dict", "model", "module")
"""Keys under which trainers keep the state dict in a checkpoint: Lightning, most loops, and DeepSpeed."""
_ANCHOR = "backbone.embeddings.word_embeddings"
"""A part of the embedding's name, whatever module contains the model."""
_POINTER = b"version https://git-lfs"
"""What a file of Git LFS begins with where only its pointer was cloned."""


@dataclass
class Weights:
    """Tensors under the published names, and other content of the file."""

    path: Path
    tensors: dict[str, Tensor]
    left_out: dict[str, Tensor] = field(default_factory=dict)
    """Tensors that do not belong to the language model, such as those of a trainer's metrics or of another head."""
    hyper_parameters: Any = None
    """The configuration that Lightning keeps; None in other files."""


def find_weights(folder: Path) -> Path | None:
    """The file of weights in a published folder, or the index of its shards; None where there is none."""
    named = [folder / name for name in _NAMES if is_file(folder / name)]
    others = sorted(path for pattern in ("*.safetensors", "*.ckpt") for path in listed(folder, pattern))
    if named:
        return named[0]
    if len(others) > 1:
        names = ", ".join(path.name for path in others[:3])
        raise UserError(f"{folder}: holds several files of weights ({names}); name one of them")
    return others[0] if others else None


def read_weights(path: Path) -> Weights:
    """The tensors of a file, or of the shards that an index names. Raises `UserError` where they cannot be
    read safely.
    """
    if path.name.endswith(".index.json"):
        checkpoint = _read_shards(path)
    elif path.suffix == ".safetensors":
        checkpoint = read_safetensors(path)
    else:
        checkpoint = _read_pickled(path)
    state = _state_dict_in(checkpoint, path)
    tensors, left_out = _with_published_prefix(state, path)
    hyper_parameters = None if state is checkpoint else checkpoint.get("hyper_parameters")
    return Weights(path, tensors, left_out, hyper_parameters)


def read_json(path: Path) -> dict[str, Any]:
    """The content of a file with one JSON object. Raises `UserError` for another file."""
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a JSON object")
    return values


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of one file of safetensors."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, "safetensors", error) from None


def _read_shards(index: Path) -> dict[str, Tensor]:
    placed = read_json(index).get("weight_map")
    if not isinstance(placed, dict) or not all(isinstance(name, str) for name in placed.values()):
        raise UserError(f"{index}: expected a 'weight_map' of tensors to files")
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(placed.values())):
        path = index.parent / Path(name).name
        tensors |= read_safetensors(path) if path.suffix == ".safetensors" else _read_pickled(path)
    if missing := sorted(placed.keys() - tensors.keys()):
        raise UserError(f"{index}: none of its files has {missing[0]}")
    return tensors


def _read_pickled(path: Path) -> dict[str, Any]:
    """The content of a file of torch.save, without running code from it; values of numpy and omegaconf are read too."""
    numbers = [np.dtype, np.float64(0).__reduce__()[0], *(type(np.dtype(code)) for code in "?bBhHiIlLqQefdSU")]
    safe = [*numbers, *_types_of_configurations(), Any, defaultdict, dict, list, int, float, str, bool]
    try:
        with torch.serialization.safe_globals(safe):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises whatever the bytes of a file lead it to
        raise _unreadable(path, "a PyTorch state dict", error) from None
    if not isinstance(checkpoint, dict):
        raise UserError(f"{path}: expected a dict of tensors")
    return checkpoint


def _unreadable(path: Path, form: str, error: Exception) -> UserError:
    """The error for a file that cannot be read. It leaves out torch's advice, which is to run the file's code."""
    with suppress(OSError), path.open("rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            return UserError(
                f"{path}: holds a pointer of Git LFS in place of the weights; fetch them with `git lfs pull`"
            )
    text = " ".join(str(error).split())
    if code := re.search(r"GLOBAL (\S+) (?:was not an allowed|whose module)", text):
        return UserError(
            f"{path}: not readable as {form} (it needs {code[1]}, which could run code; save the state dict alone)"
        )
    reason = text.partition("WeightsUnpickler error: ")[2] or text or "it is empty"
    return UserError(f"{path}: not readable as {form} ({reason.partition(' Check the documentation')[0][:200]})")


def _types_of_configurations() -> list[type]:
    """The types of omegaconf, in which hydra and Lightning keep configurations."""
    try:
        from omegaconf import base, dictconfig, listconfig, nodes
    except ImportError:  # absent where an export's own code reads weights
        return []
    values = [value for module in (nodes, base, dictconfig, listconfig) for value in vars(module).values()]
    return [value for value in values if isinstance(value, type) and value.__module__.startswith("omegaconf.")]


def _state_dict_in(checkpoint: dict[str, Any], path: Path) -> dict[str, Tensor]:
    """The dict of tensors itself, or the one that a trainer's checkpoint holds."""
    while checkpoint and not all(isinstance(value, Tensor) for value in checkpoint.values()):
        inner = [checkpoint[key] for key in _STATE_KEYS if isinstance(checkpoint.get(key), dict)]
        if not inner:
            kinds = sorted({type(value).__name__ for value in checkpoint.values()} - {"Tensor", "Parameter"})
            raise UserError(f"{path}: expected a dict of tensors; it holds values of type {', '.join(kinds)}")
        checkpoint = inner[0]
    return checkpoint


def _with_published_prefix(state: dict[str, Tensor], path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The language model's tensors under the names of the published code, and the others.

    Trainers and wrappers add prefixes such as `model.`, `module.` or `_orig_mod.`; a backbone that was saved alone
    lacks `caduceus.`.
    """
    prefixes = {name.partition(_ANCHOR)[0] for name in state if _ANCHOR in name}
    if len(prefixes) != 1:
        found = "none" if not prefixes else f"several, below {', '.join(map(repr, sorted(prefixes)))}"
        raise UserError(f"{path}: expected the tensors of one Caduceus ({_ANCHOR}.…), found {found}")
    inside = prefixes.pop()
    outside = inside.removesuffix("caduceus.")
    tensors, left_out = {}, {}
    for name, tensor in state.items():
        if name.startswith(f"{inside}backbone."):
            tensors["caduceus." + name.removeprefix(inside)] = tensor
        elif name.startswith((f"{outside}lm_head.", f"{inside}caduceus.")):
            tensors[name.removeprefix(outside)] = tensor
        else:
            left_out[name] = tensor
    return tensors, left_out
