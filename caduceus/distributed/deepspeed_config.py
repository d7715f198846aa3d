"""The DeepSpeed options of a run: the user's JSON where there is one, and what the run's own configuration decides."""

import json
import logging
from pathlib import Path
from typing import Any

from caduceus.config import Config
from caduceus.distributed.deepspeed_rules import leave_to_the_run, lookup
from caduceus.distributed.deepspeed_schema import REMARKS, refuse_what_deepspeed_would
from caduceus.errors import UserError

LARGEST_BUCKET = 500_000_000
"""Elements of gradients reduced at once; DeepSpeed's own default."""
_UNDECIDED = "auto"
"""Value by which DeepSpeed files written for other trainers leave a key to the trainer."""
_REPLACED = ("optimizer", "scheduler")
"""Sections of the user's that the run's own take the place of."""
_OFFLOADED = {"cpu_offload": "offload_optimizer", "cpu_offload_param": "offload_param"}
"""DeepSpeed's older key -> the section that replaced it."""
_SECTIONS = (
    "zero_optimization",
    *(f"zero_optimization.{part}" for part in _OFFLOADED.values()),
    *_REPLACED,
    "bf16",
    "bfloat16",
    "fp16",
)
"""Keys whose values are objects, and are looked into."""

_log = logging.getLogger(__name__)


def engine_options(config: Config, data_world: int, parameters: int) -> dict[str, Any]:
    """Options for `deepspeed.initialize` with so many parameters on `data_world` data-parallel ranks.

    Raises `UserError` as `user_options` does.
    """
    train, parallel = config.train, config.parallel
    options = user_options(config, data_world)
    if replaced := [section for section in _REPLACED if section in options]:
        _log.warning(
            "parallel.deepspeed_config: '%s' of %s left out; train.* decides the optimizer and the learning rate",
            "' and '".join(replaced),
            parallel.deepspeed_config,
        )
    decided = _decided(config, data_world)
    # The batch follows from its parts; DeepSpeed would count the ranks that share a sequence as well.
    for key in (*_REPLACED, "train_batch_size", "data_parallel_size", "bf16", "bfloat16", "fp16"):
        options.pop(key, None)
    zero = options.setdefault("zero_optimization", {})
    zero["stage"] = parallel.zero_stage
    # Stage 3 allocates a bucket whole, however small the model.
    zero.setdefault("reduce_bucket_size", min(parameters, LARGEST_BUCKET))
    if parallel.cpu_offload:
        for old, part in _OFFLOADED.items() if parallel.zero_stage == 3 else [("cpu_offload", "offload_optimizer")]:
            zero.pop(old, None)
            zero.setdefault(part, {}).setdefault("device", "cpu")
    return {
        **options,
        "train_micro_batch_size_per_gpu": train.micro_batch,
        "gradient_accumulation_steps": decided["gradient_accumulation_steps"][0],
        # The strategy clips: the loop wants the norm before it decides on the step.
        "gradient_clipping": 0.0,
        # DeepSpeed switches autocast off unless it is its own. Gradients of no module travel in bf16.
        "torch_autocast": {
            "enabled": train.precision == "bf16",
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],
        },
        "zero_force_ds_cpu_optimizer": False,
    }


def user_options(config: Config, data_world: int) -> dict[str, Any]:
    """The options of the user's file, none without one.

    Raises `UserError` for what DeepSpeed cannot do, for a key that contradicts the run's configuration, and for one
    that the installed DeepSpeed does not know or whose value it does not take.
    """
    if config.train.precision == "fp64":
        raise UserError("train.precision: DeepSpeed computes in fp32 or bf16, not in fp64; use ddp or fsdp")
    path = config.parallel.deepspeed_config
    if path is None:
        return {}
    options = _read(path)
    _check(options, path, _decided(config, data_world))
    leave_to_the_run(options, path, config.train.precision == "bf16")
    zero = {**options.get("zero_optimization", {}), "stage": config.parallel.zero_stage}
    refuse_what_deepspeed_would({**options, "zero_optimization": zero}, path, config.run.device)
    return options


def _decided(config: Config, data_world: int) -> dict[str, tuple[Any, str]]:
    """DeepSpeed's keys that the configuration decides -> (value, the deciding key)."""
    train = config.train
    bf16 = train.precision == "bf16"
    accumulation = train.global_batch // (train.micro_batch * data_world)
    offloading = {
        "zero_optimization.cpu_offload": (True, "parallel.cpu_offload"),
        "zero_optimization.offload_optimizer.device": ("cpu", "parallel.cpu_offload"),
    }
    return {
        "train_batch_size": (train.global_batch, "train.global_batch"),
        "train_micro_batch_size_per_gpu": (train.micro_batch, "train.micro_batch"),
        "gradient_accumulation_steps": (accumulation, "train.global_batch, train.micro_batch and the number of ranks"),
        "gradient_clipping": (train.clip_norm, "train.clip_norm"),
        "zero_optimization.stage": (config.parallel.zero_stage, "parallel.zero_stage"),
        "bf16.enabled": (bf16, "train.precision"),
        "bfloat16.enabled": (bf16, "train.precision"),
        "fp16.enabled": (False, "train.precision"),
        "torch_autocast.enabled": (bf16, "train.precision"),
        "data_parallel_size": (data_world, "the number of ranks"),
        **(offloading if config.parallel.cpu_offload else {}),
    }


def _read(path: str) -> dict[str, Any]:
    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # some editors begin a file with a byte order mark
        options = json.loads(text, object_pairs_hook=_without_repetition)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"parallel.deepspeed_config: {path} is not readable as JSON ({error})") from None
    if not isinstance(options, dict):
        raise UserError(f"parallel.deepspeed_config: {path} is not a JSON object")
    return _without_undecided({key: value for key, value in options.items() if not key.startswith(REMARKS)})


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    options = dict(pairs)
    if len(options) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} stands twice in an object")
    return options


def _without_undecided(options: dict[str, Any]) -> dict[str, Any]:
    decided = {key: value for key, value in options.items() if value != _UNDECIDED}
    return {key: _without_undecided(value) if isinstance(value, dict) else value for key, value in decided.items()}


def _check(options: dict[str, Any], path: str, decided: dict[str, tuple[Any, str]]) -> None:
    for section in _SECTIONS:
        parent, _, name = section.rpartition(".")
        holder = lookup(options, parent) or {} if parent else options
        if holder.get(name, {}) is None and name != "zero_optimization":
            del holder[name]  # as good as left out
        if name in holder and not isinstance(holder[name], dict):
            raise UserError(
                f"parallel.deepspeed_config: {path} sets {section} to {json.dumps(holder[name])}; it takes an object"
            )
    for key, (value, deciding) in decided.items():
        given = lookup(options, key)
        if given is not None and given != value:
            raise UserError(
                f"parallel.deepspeed_config: {path} sets {key} to {json.dumps(given)}, but {deciding} makes it "
                f"{json.dumps(value)}; leave {key} out, or change {deciding}"
            )
    for part in _OFFLOADED.values():
        if lookup(options, f"zero_optimization.{part}.device") == "nvme":
            raise UserError(
                f"parallel.deepspeed_config: {path} sets zero_optimization.{part}.device to nvme; clipping needs the "
                "gradients in memory: use cpu"
            )
