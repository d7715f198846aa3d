"""The settings for DeepSpeed: those that the run's configuration decides, and those of a user's JSON. Imports
no torch.
"""

import logging
from typing import Any

from caduceus.config import Config
from caduceus.distributed.deepspeed.user_file import REPLACED, read_settings
from caduceus.errors import UserError

_log = logging.getLogger(__name__)


def engine_settings(config: Config, data_world: int, parameters: int, block: int) -> dict[str, Any]:
    """Settings for `deepspeed.initialize`; `parameters`: of the model, `block`: of its largest block.

    Sizes that the file does not set follow the model: DeepSpeed's defaults suit models of many billions of parameters,
    and with them every rank would keep all gradients of a smaller model in a bucket, and under stage 3 all parameters
    as well. Raises `UserError` as `user_settings` does.
    """
    parallel, bf16 = config.parallel, config.train.precision == "bf16"
    settings = user_settings(config, data_world)
    if replaced := [section for section in REPLACED if settings.pop(section, None)]:
        _log.warning(
            "parallel.deepspeed_config: '%s' of %s left out; train.* decides the optimizer and the learning rate",
            "' and '".join(replaced),
            parallel.deepspeed_config,
        )
    zero = {"stage": parallel.zero_stage, "reduce_bucket_size": min(block, 500_000_000)}
    if parallel.zero_stage == 3:
        zero["stage3_param_persistence_threshold"] = min(parameters // 1000, 100_000)
        zero["stage3_prefetch_bucket_size"] = min(block, 50_000_000)
        zero["stage3_max_live_parameters"] = min(2 * block, 1_000_000_000)
        zero["stage3_max_reuse_distance"] = min(block, 1_000_000_000)
    zero |= settings.pop("zero_optimization", {})
    if parallel.cpu_offload:
        for part in ("offload_optimizer", "offload_param") if parallel.zero_stage == 3 else ("offload_optimizer",):
            zero[part] = {"device": "cpu", **zero.get(part, {})}
    return {
        **settings,
        "zero_optimization": zero,
        "train_micro_batch_size_per_gpu": config.train.micro_batch,
        "gradient_accumulation_steps": _decided(config, data_world)["gradient_accumulation_steps"][0],
        # The strategy clips, as the loop needs the norm before it decides about the step.
        "gradient_clipping": 0.0,
        # DeepSpeed switches off autocast unless it is its own. No module's gradients are exchanged in bf16.
        "torch_autocast": {"enabled": bf16, "dtype": "bfloat16", "lower_precision_safe_modules": []},
        "zero_force_ds_cpu_optimizer": False,
    }


def user_settings(config: Config, data_world: int) -> dict[str, Any]:
    """The settings of the user's file beyond the run's configuration; empty without a file.

    Raises `UserError` for what DeepSpeed cannot do, and as `read_settings` does.
    """
    if config.train.precision == "fp64":
        raise UserError("train.precision: DeepSpeed computes in fp32 or bf16, not in fp64; use ddp or fsdp")
    path = config.parallel.deepspeed_config
    return read_settings(path, _decided(config, data_world)) if path is not None else {}


def _decided(config: Config, data_world: int) -> dict[str, tuple[Any, str]]:
    """DeepSpeed's keys that the run decides -> (value, the deciding key)."""
    train, zero = config.train, "zero_optimization."
    bf16 = train.precision == "bf16"
    accumulation = train.global_batch // (train.micro_batch * data_world)
    offloading = {f"{zero}offload_optimizer.device": ("cpu", "parallel.cpu_offload")}
    return {
        "train_batch_size": (train.global_batch, "train.global_batch"),
        "train_micro_batch_size_per_gpu": (train.micro_batch, "train.micro_batch"),
        "gradient_accumulation_steps": (accumulation, "train.global_batch, train.micro_batch and the number of ranks"),
        "gradient_clipping": (train.clip_norm, "train.clip_norm"),
        f"{zero}stage": (config.parallel.zero_stage, "parallel.zero_stage"),
        f"{zero}contiguous_gradients": (True, "parallel.strategy"),
        f"{zero}compute_grad_norm": (True, "parallel.strategy"),
        "managed_gradient_accumulation": (True, "parallel.strategy"),
        "bf16.enabled": (bf16, "train.precision"),
        "bfloat16.enabled": (bf16, "train.precision"),
        "fp16.enabled": (False, "train.precision"),
        "torch_autocast.enabled": (bf16, "train.precision"),
        "torch_autocast.dtype": ("bfloat16", "train.precision"),
        "communication_data_type": ("fp32", "train.precision"),
        "gradient_predivide_factor": (1.0, "parallel.strategy"),
        **(offloading if config.parallel.cpu_offload else {}),
    }
