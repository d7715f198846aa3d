"""Which values of a configuration no run can have. Types and names of keys are checked where they are read."""

import math
from typing import TYPE_CHECKING, Any

from caduceus.errors import UserError

if TYPE_CHECKING:
    from caduceus.config import Config

_CHOICES = {
    "ops.backend": ("auto", "naive", "cpu", "triton", "mamba_ssm"),
    "data.mode": ("shards", "stream"),
    "data.strands": ("auto", "both", "forward"),
    "data.objective": ("mlm", "next_base"),
    "train.precision": ("fp32", "bf16", "fp64"),
    "train.activation_checkpointing": ("none", "scan", "block", "auto"),
    "parallel.strategy": ("auto", "single", "ddp", "fsdp", "deepspeed"),
    "parallel.strands": (0, 1, 2),
    "parallel.zero_stage": (0, 1, 2, 3),
    "run.device": ("auto", "cpu", "cuda"),
    "wandb.mode": ("auto", "online", "offline", "disabled"),
}
_AT_LEAST = {
    "data.seq_len": 1,
    "data.workers": 0,
    "data.shuffle_block": 0,
    "data.cache_bytes": 0,
    "data.max_substituted": 0,
    "train.steps": 1,
    "train.global_batch": 1,
    "train.micro_batch": 1,
    "train.clip_norm": 0,
    "train.max_skipped_steps": 0,
    "train.spike_factor": 0,
    "train.stall_minutes": 0,
    "train.lr": 0,
    "train.min_lr": 0,
    "train.weight_decay": 0,
    "train.seed": 0,
    "parallel.shard": 0,
    "parallel.context": 0,
    "valid.every": 0,
    "valid.samples": 1,
    "checkpoint.every": 1,
    "checkpoint.keep": 0,
    "checkpoint.keep_every": 0,
    "run.time_budget_minutes": 0,
}
_SHARES = (
    "data.mask_prob",
    "data.mask_token_prob",
    "data.random_token_prob",
    "data.repeat_weight",
    "data.min_acgt",
)


def refuse_impossible_values(config: "Config", values: dict[str, Any]) -> None:
    """Raise `UserError` for the first value that no run can have, alone or beside the others.

    `values`: every key of the configuration, as `section.key`, with its value.
    """
    for key, choices in _CHOICES.items():
        if values[key] not in choices:
            raise UserError(f"{key}: choose one of {', '.join(map(str, choices))}; got '{values[key]}'")
    for key, content in values.items():
        if isinstance(content, float) and not math.isfinite(content):
            raise UserError(f"{key}: must be a finite number, got {content}")
    for key in config.run.allow_change:
        if key not in values:
            raise UserError(f"run.allow_change: there is no key '{key}'; give keys such as train.steps")
    for key, least in _AT_LEAST.items():
        if values[key] < least:
            raise UserError(f"{key}: must be at least {least}, got {values[key]}")
    for key in _SHARES:
        if not 0 <= values[key] <= 1:
            raise UserError(f"{key}: must lie between 0 and 1, got {values[key]}")
    data, train = config.data, config.train
    if data.mask_token_prob + data.random_token_prob > 1:
        raise UserError(
            "data.random_token_prob: together with data.mask_token_prob it must not exceed 1, "
            f"got {data.random_token_prob} + {data.mask_token_prob}"
        )
    if train.precision == "fp64" and config.ops.backend in ("triton", "mamba_ssm"):
        raise UserError(f"train.precision: ops.backend={config.ops.backend} does not compute in fp64; use naive or cpu")
    if data.objective == "next_base" and (config.model.bidirectional or config.model.rcps):
        raise UserError(
            "data.objective: next_base needs model.bidirectional=false and model.rcps=false; "
            "otherwise the model sees the base that it is to predict"
        )
    if config.parallel.strands > 1 and not config.model.rcps:
        raise UserError(
            "parallel.strands: 2 needs model.rcps=true, whose two strands are computed apart; use parallel.context"
        )
    if data.mode == "stream" and max(config.parallel.context, config.parallel.strands) > 1:
        raise UserError(
            "data.mode: stream goes with neither parallel.context nor parallel.strands: where one rank cannot read a "
            "tar, those that share its sequences would not know; use data.mode=shards"
        )
    if train.global_batch % train.micro_batch:
        raise UserError(
            f"train.global_batch: {train.global_batch} is not a multiple of train.micro_batch {train.micro_batch}"
        )
    if len(train.betas) != 2 or not all(0 <= beta < 1 for beta in train.betas):
        raise UserError(f"train.betas: expected two numbers in [0, 1), got {train.betas}")
    if train.spike_factor and train.spike_factor <= 1:
        raise UserError(f"train.spike_factor: must be 0 (off) or above 1, got {train.spike_factor}")
    if train.warmup_steps is not None and not 0 <= train.warmup_steps <= train.steps:
        raise UserError(
            f"train.warmup_steps: must lie between 0 and train.steps {train.steps}, got {train.warmup_steps}"
        )
    if train.min_lr > train.lr:
        raise UserError(f"train.min_lr: {train.min_lr} is above train.lr {train.lr}")
