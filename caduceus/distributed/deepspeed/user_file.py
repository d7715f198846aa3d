"""Reads a user's DeepSpeed JSON: it takes keys that do not change the numbers of a run, and refuses every other by
name.

Settings that are off, that repeat what the run decides, or that are "auto", are passed over. Imports no torch.
"""

import difflib
import json
from pathlib import Path
from typing import Any, NoReturn

from caduceus.errors import UserError

_FLAG, _NUMBER, _DEVICE, _OBJECT = "true or false", "a number", '"cpu" or "none"', "an object"
_TAKES = {
    _FLAG: lambda value: isinstance(value, bool),
    _NUMBER: lambda value: isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0,
    _DEVICE: lambda value: value in ("cpu", "none"),
    _OBJECT: lambda value: isinstance(value, dict),
}
_OFFLOAD = {"device": _DEVICE, "pin_memory": _FLAG, "buffer_count": _NUMBER}
_FLAGS = ("allgather_partitions", "overlap_comm", "reduce_scatter", "use_multi_rank_bucket_allreduce")
_FLAGS += ("stage3_gather_16bit_weights_on_model_save", "stage3_use_all_reduce_for_fetch_params")
_NUMBERS = ("allgather_bucket_size", "reduce_bucket_size", "sub_group_size", "stage3_max_live_parameters")
_NUMBERS += ("stage3_max_reuse_distance", "stage3_model_persistence_threshold", "stage3_module_granularity_threshold")
_NUMBERS += ("stage3_param_persistence_threshold", "stage3_prefetch_bucket_size")
_REPORTS = ("activation_checkpointing", "aio", "comms_logger", "flops_profiler")
_REPORTS += ("comet", "csv_monitor", "tensorboard", "timers", "wandb")
REPLACED = ("optimizer", "scheduler")
_PRECISIONS = ("bf16", "bfloat16", "fp16", "torch_autocast")
ALLOWED: dict[str, Any] = {
    "zero_optimization": {
        **dict.fromkeys(_FLAGS, _FLAG),
        **dict.fromkeys(_NUMBERS, _NUMBER),
        "offload_optimizer": _OFFLOAD,
        "offload_param": {**_OFFLOAD, "buffer_size": _NUMBER, "max_in_cpu": _NUMBER},
    },
    **dict.fromkeys(("dump_state", "memory_breakdown", "wall_clock_breakdown", "zero_allow_untested_optimizer"), _FLAG),
    "steps_per_print": _NUMBER,
    **dict.fromkeys((*_REPORTS, *REPLACED), _OBJECT),
    **{precision: {} for precision in _PRECISIONS},
}
"""Keys that a file may set -> the kind of their values, or the keys of their objects."""
_REMARKS = ("_", "//", "#", "comment")
"""Beginnings of keys that are remarks for people."""


def read_settings(path: str, decided: dict[str, tuple[Any, str]]) -> dict[str, Any]:
    """The settings of a file.

    decided: {DeepSpeed's dotted key: (value in this run, the key that decides it)}; such keys are checked and left out.
    Raises `UserError` for a file that is not a JSON object, a key that contradicts the run, and a key that is not in
    `ALLOWED` or whose value is of another kind.
    """
    settings = _read(path)
    for section in _PRECISIONS:
        values = settings.get(section)
        enabled = values.get("enabled") if isinstance(values, dict) else None
        _take_out(settings, f"{section}.enabled", decided, path)
        if enabled in (False, "auto"):  # the rest of the section then has no effect
            del settings[section]
    settings = _stated(settings)
    for key in decided:
        _take_out(settings, key, decided, path)
    return {key: value for key, value in _allowed(settings, ALLOWED, "", path).items() if value != {}}


def _read(path: str) -> dict[str, Any]:
    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # some editors begin a file with a byte order mark
        settings = json.loads(text, object_pairs_hook=_without_repetition)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"parallel.deepspeed_config: {path} is not readable as JSON ({error})") from None
    if not isinstance(settings, dict):
        raise UserError(f"parallel.deepspeed_config: {path} is not a JSON object")
    return settings


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"{twice} stands twice in an object")
    return dict(pairs)


def _stated(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings without remarks, and without those that are null or "auto"."""
    stated = {key: _stated(value) if isinstance(value, dict) else value for key, value in settings.items()}
    return {key: value for key, value in stated.items() if value not in (None, "auto") and not key.startswith(_REMARKS)}


def _take_out(settings: dict[str, Any], key: str, decided: dict[str, tuple[Any, str]], path: str) -> None:
    """Remove a dotted key that the run decides. Raises `UserError` where its value differs from the run's."""
    *place, name = key.split(".")
    for part in place:
        settings = settings.get(part) if isinstance(settings, dict) else None
    given = settings.pop(name, None) if isinstance(settings, dict) else None
    value, deciding = decided[key]
    if given not in (None, "auto") and (given.lower() if isinstance(given, str) else given) != value:
        _refuse(
            path,
            f"{key} to {json.dumps(given)}, but {deciding} sets it to {json.dumps(value)}; leave {key} out, or change "
            f"{deciding}",
        )


def _allowed(settings: dict[str, Any], allowed: dict[str, Any], place: str, path: str) -> dict[str, Any]:
    """The allowed settings, without those that are off. Raises `UserError` for others."""
    kept = {}
    for key, value in settings.items():
        name, kind = f"{place}{key}", allowed.get(key)
        if kind is None:
            if _is_off(value):
                continue
            close = difflib.get_close_matches(key, allowed, n=1)
            meant = f" (is {place}{close[0]} meant?)" if close else ""
            _refuse(
                path, f"{name}, which is not among the keys that leave a run's numbers as they are{meant}; leave it out"
            )
        if isinstance(kind, dict) and not isinstance(value, dict):
            _refuse(path, f"{name} to {json.dumps(value)}; it takes an object")
        if not isinstance(kind, dict) and not _TAKES[kind](value):
            _refuse(path, f"{name} to {json.dumps(value)}; it takes {kind}")
        kept[key] = _allowed(value, kind, f"{name}.", path) if isinstance(kind, dict) else value
    return kept


def _is_off(value: Any) -> bool:
    if not isinstance(value, dict):
        return not value
    return not value["enabled"] if "enabled" in value else all(map(_is_off, value.values()))


def _refuse(path: str, what: str) -> NoReturn:
    raise UserError(f"parallel.deepspeed_config: {path} sets {what}")
