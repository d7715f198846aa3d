"""Handles the usual arguments of `from_pretrained`: where to load a model from, in which type, and onto
which device.
"""

from pathlib import Path
from typing import Any

import torch

from caduceus.errors import UserError

_OF_THE_HUB = ("cache_dir", "force_download", "local_files_only", "revision", "token")
_WITHOUT_EFFECT = (
    *("adapter_kwargs", "attn_implementation", "code_revision", "from_tf", "from_flax", "ignore_mismatched_sizes"),
    *("low_cpu_mem_usage", "trust_remote_code", "use_safetensors", "variant", "weights_only", "_from_auto"),
    *("_commit_hash", "max_memory", "offload_folder", "proxies", "resume_download"),
)


def folder_of(name: str | Path, options: dict[str, Any]) -> Path:
    """The folder `name`, or the folder into which a model of the Hugging Face hub is downloaded. It removes the options
    that it uses, and those without effect here, from `options`.
    """
    of_the_hub = {key: options.pop(key) for key in _OF_THE_HUB if key in options}
    subfolder = options.pop("subfolder", "") or ""
    for key in _WITHOUT_EFFECT:
        options.pop(key, None)
    if not Path(name).is_dir():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError

        try:
            patterns = ["*.json", "*.safetensors", "*.bin"]
            name = snapshot_download(str(name), allow_patterns=patterns, **of_the_hub)
        except HFValidationError:
            raise UserError(
                f"{name}: there is no such folder, and this cannot be the name of a model of the hub"
            ) from None
    return Path(name) / subfolder


def dtype_of(asked: torch.dtype | str | None, stored: torch.dtype) -> torch.dtype:
    """The type that `dtype` asks for; `auto` and None mean that of the file."""
    if isinstance(asked, torch.dtype):
        return asked
    return stored if asked in (None, "auto") else getattr(torch, asked)


def place_of(device_map: Any) -> torch.device | None:
    """The single device that a `device_map` names; None leaves the model where it is."""
    if isinstance(device_map, dict):
        places = list(dict.fromkeys(device_map.values()))
        if len(places) != 1:
            raise UserError(f"device_map: a Caduceus lies on one device, got {device_map}")
        device_map = places[0]
    if device_map is None:
        return None
    if isinstance(device_map, str) and device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device_map)
