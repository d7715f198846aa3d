"""What a DeepSpeed file may not decide: the run's numbers, its optimizer and its checkpoints are the project's.

A key that says what holds anyway is passed over, also one that the installed DeepSpeed no longer knows.
"""

import json
from collections.abc import Callable
from typing import Any

from caduceus.errors import UserError

_RUN = "would change the run's model, data or loss"
_GRADIENTS = "would change how gradients add up"
_ROUNDING = "would round what the run keeps in fp32"
_OPTIMIZER = "would replace the run's optimizer"
_CHECKPOINTS = "would change how the run's checkpoints are written or read"

_OFF = {
    "amp": _RUN,
    "compression_training": _RUN,
    "curriculum_learning": _RUN,
    "data_efficiency": _RUN,
    "eigenvalue": _RUN,
    "elasticity": _RUN,
    "expert_parallel": _RUN,
    "hybrid_engine": _RUN,
    "progressive_layer_drop": _RUN,
    "quantize_training": _RUN,
    "sparse_attention": _RUN,
    "tensor_parallel": _RUN,
    "weight_quantization": _RUN,
    "zero_optimization.mics_hierarchical_params_gather": _RUN,
    "zero_optimization.zenflow": _RUN,
    "prescale_gradients": _GRADIENTS,
    "sparse_gradients": _GRADIENTS,
    "bf16.bf16_master_weights_and_grads": _ROUNDING,
    "bf16.bf16_optimizer_states": _ROUNDING,
    "bfloat16.bf16_master_weights_and_grads": _ROUNDING,
    "bfloat16.bf16_optimizer_states": _ROUNDING,
    "zero_optimization.zero_quantized_gradients": _ROUNDING,
    "zero_optimization.zero_quantized_nontrainable_weights": _ROUNDING,
    "zero_optimization.zero_quantized_weights": _ROUNDING,
    "zero_optimization.zeropp_loco_param": _ROUNDING,
    "zero_force_ds_cpu_optimizer": _OPTIMIZER,
    "zero_optimization.offload_optimizer.super_offload": _OPTIMIZER,
    "checkpoint.load_universal": _CHECKPOINTS,
    "checkpoint.use_node_local_storage": _CHECKPOINTS,
    "checkpoint.writer": _CHECKPOINTS,
    "datastates_ckpt": _CHECKPOINTS,
    "nebula": _CHECKPOINTS,
    "zero_optimization.elastic_checkpoint": _CHECKPOINTS,
    "zero_optimization.parameter_alignment": _CHECKPOINTS,
    "zero_optimization.pipeline_loading_checkpoint": _CHECKPOINTS,
    # DeepSpeed's universal checkpoints, for other numbers of ranks, take parameters to lie in the model's order.
    "zero_optimization.round_robin_gradients": _CHECKPOINTS,
    "autotuning": "would end the run after a few steps",
    "graph_harvesting": "would replay steps that the run decides on one by one",
}
"""Keys that have to be off, or left out -> what they would do."""

_FP32 = ("fp32", "float32", "float", "torch.float32")
_BF16 = ("bfloat16", "bf16", "torch.bfloat16")
_FIXED = {
    "communication_data_type": (_FP32, _ROUNDING),
    "data_types.buffer_dtype": (_FP32, _ROUNDING),
    "data_types.grad_accum_dtype": (_FP32, _ROUNDING),
    "data_types.param_dtype": (_FP32, _ROUNDING),
    "gradient_allreduce_op": (("mean",), _GRADIENTS),
    "gradient_predivide_factor": ((1.0,), _GRADIENTS),
    "managed_gradient_accumulation": ((True,), _GRADIENTS),
    "sequence_parallel_size": ((1,), _RUN),
    # Only by the norm does ZeRO see that the loop discards a step.
    "zero_optimization.compute_grad_norm": ((True,), "would take steps whose gradients are not finite"),
    # Without, DeepSpeed reduces gradients in place, also those whose elements share memory.
    "zero_optimization.contiguous_gradients": ((True,), _GRADIENTS),
    "zero_optimization.mics_shard_size": ((-1,), _RUN),
    "zero_optimization.offload_optimizer.ratio": ((1.0,), _OPTIMIZER),
    "zero_optimization.zero_hpz_partition_size": ((1, 0), "DeepSpeed takes where it divides the model as a whole only"),
}
"""Keys -> the values that the run has anyway, and what others would do, or why they cannot be."""
_FIXED_IN_BF16 = {
    "torch_autocast.dtype": (_BF16, "would change the run's precision"),
    "torch_autocast.lower_precision_safe_modules": (([],), _ROUNDING),
}

_PRECISIONS = ("bf16", "bfloat16", "fp16", "torch_autocast")
_SWITCHES = ("enabled", "shared_parameters")
"""Keys of a section that say whether the rest of it counts."""


def leave_to_the_run(options: dict[str, Any], path: str, bf16: bool) -> None:
    """Take out of a file's options what the run has anyway; `bf16`: whether it computes in bf16.

    Raises `UserError` for the first key of the file at `path` that would change the run.
    """
    for section in _PRECISIONS:
        if isinstance(options.get(section), dict) and options[section].get("enabled") is False:
            del options[section]
    for key, effect in _OFF.items():
        if _take_out(options, key, _is_off):
            raise UserError(f"parallel.deepspeed_config: {path} sets {key}, which {effect}; leave it out")
    for key, (held, effect) in (_FIXED | (_FIXED_IN_BF16 if bf16 else {})).items():
        if _take_out(options, key, lambda value, held=held: value is None or _lower(value) in held):
            raise UserError(
                f"parallel.deepspeed_config: {path} sets {key} to {json.dumps(lookup(options, key))}, which {effect}; "
                f"leave it out, as {json.dumps(held[0])} holds"
            )


def lookup(options: Any, key: str) -> Any:
    """What nested options have at a dotted key, None for nothing."""
    for part in key.split("."):
        if not isinstance(options, dict) or part not in options:
            return None
        options = options[part]
    return options


def _take_out(options: dict[str, Any], key: str, holds_anyway: Callable[[Any], bool]) -> bool:
    """Delete a dotted key whose value holds anyway; whether it is there with another."""
    parent, _, name = key.rpartition(".")
    holder = lookup(options, parent) if parent else options
    if not isinstance(holder, dict) or name not in holder:
        return False
    if not holds_anyway(holder[name]):
        return True
    del holder[name]
    return False


def _is_off(section: Any) -> bool:
    if not isinstance(section, dict):
        return not section
    if "autotp_size" in section:
        return section["autotp_size"] in (0, 1)
    for switch in _SWITCHES:
        if switch in section:
            return _is_off(section[switch])
    return all(_is_off(part) for part in section.values())


def _lower(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value
