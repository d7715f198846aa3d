"""Combinations of values that no run can have. The values that a single key can have are defined with the key."""

import math
import re

from caduceus.config.by_step import BatchRamp, factors_by_step, points_of, share
from caduceus.config.data import DataConfig
from caduceus.config.evaluations import SPACE, evaluations_of
from caduceus.config.keys import check_section
from caduceus.config.run import ARTIFACTS, KEYS, SECTIONS, Config, profiled_steps
from caduceus.config.stages import stages_of, within
from caduceus.config.train import TrainConfig
from caduceus.errors import UserError


def refuse_impossible_values(config: Config) -> None:
    """Raise `UserError` for the first value that no run can have, by itself or together with other values."""
    if config.train.stages and config.train.decay_from is not None:
        raise UserError("train.decay_from: does not go with train.stages; leave one of them out")
    for stage in stages_of(config):
        with within(stage):
            _refuse_impossible(stage.config)
            refuse_cuda_graphs(stage.config)


def _refuse_impossible(config: Config) -> None:
    for section in SECTIONS:
        check_section(section, getattr(config, section))
    for name in config.run.allow_change:
        if name not in KEYS:
            raise UserError(f"run.allow_change: there is no key '{name}'; give keys such as train.steps")
    if config.wandb.id is not None and not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", config.wandb.id):
        raise UserError(f"wandb.id: give at most 64 letters, digits, - and _; got '{config.wandb.id}'")
    for name in config.wandb.artifacts:
        if name not in ARTIFACTS:
            raise UserError(f"wandb.artifacts: choose from {', '.join(ARTIFACTS)}; got '{name}'")
    if config.monitor.profile is not None:
        profiled_steps(config.monitor.profile)
    data, train = config.data, config.train
    if data.mask_token_prob + data.random_token_prob > 1:
        raise UserError(
            "data.random_token_prob: together with data.mask_token_prob it must not exceed 1, "
            f"got {data.random_token_prob} + {data.mask_token_prob}"
        )
    if data.objective == "mlm" and round(data.mask_prob * 2**32) == 0:
        raise UserError(f"data.mask_prob: {data.mask_prob} labels no base, so there is nothing to learn; give a share")
    if data.objective == "mlm" and data.mask_token_prob + data.random_token_prob == 0:
        raise UserError(
            "data.mask_token_prob: it and data.random_token_prob are both 0, so the input shows every base that is to "
            "be predicted, and there is nothing to learn"
        )
    if data.objective == "next_base" and data.seq_len < 2:
        raise UserError("data.seq_len: next_base needs at least 2 bases, as the last of a sequence has no next one")
    if train.precision == "fp64" and config.ops.backend in ("triton", "mamba_ssm"):
        raise UserError(f"train.precision: ops.backend={config.ops.backend} does not compute in fp64; use naive or cpu")
    if data.objective == "next_base" and (config.model.bidirectional or config.model.rcps):
        raise UserError(
            "data.objective: next_base needs model.bidirectional=false and model.rcps=false; "
            "otherwise the model sees the base that it is to predict"
        )
    if config.parallel.strands > 1 and not config.model.rcps:
        raise UserError(
            "parallel.strands: 2 needs model.rcps=true, which computes the two strands separately; use parallel.context"
        )
    _refuse_impossible_sharing(config)
    _refuse_impossible_best(config)
    if train.global_batch % train.micro_batch:
        raise UserError(
            f"train.global_batch: {train.global_batch} is not a multiple of train.micro_batch {train.micro_batch}"
        )
    _refuse_impossible_ramp(train)
    _refuse_impossible_schedules(data)
    if len(train.betas) != 2:
        raise UserError(f"train.betas: expected two numbers, got {train.betas}")
    if train.spike_factor and train.spike_factor <= 1:
        raise UserError(f"train.spike_factor: must be 0 (off) or above 1, got {train.spike_factor}")
    if train.warmup_steps is not None and train.warmup_tokens is not None:
        raise UserError("train.warmup_tokens: says the same as train.warmup_steps; leave one of them out")
    if train.warmup_steps is not None and train.warmup_steps > train.steps:
        raise UserError(f"train.warmup_steps: must be at most train.steps {train.steps}, got {train.warmup_steps}")
    _refuse_impossible_decay(train)
    _refuse_impossible_scales(train)
    refuse_strategy(train, config.parallel.strategy)
    if train.min_lr > train.lr:
        raise UserError(f"train.min_lr: {train.min_lr} is above train.lr {train.lr}")


def _refuse_impossible_sharing(config: Config) -> None:
    data = config.data
    if data.pack and data.mode == "stream":
        raise UserError("data.pack: data.mode=stream takes sequences from whole windows only; use data.mode=shards")
    if data.crop_offset != "none" and data.mode == "stream":
        raise UserError("data.crop_offset: data.mode=stream cuts windows as they come; use data.mode=shards")
    if data.pack and config.parallel.context > 1:
        raise UserError(
            "data.pack: the ranks of parallel.context cannot share packed sequences; use "
            "parallel.strands, or data.pack=false"
        )
    if data.mode == "stream" and max(config.parallel.context, config.parallel.strands) > 1:
        raise UserError(
            "data.mode: stream goes with neither parallel.context nor parallel.strands: if one rank cannot read a "
            "tar, the ranks that share its sequences would not know; use data.mode=shards"
        )


def _refuse_impossible_ramp(train: TrainConfig) -> None:
    sizes = BatchRamp.of(train).sizes
    if sizes[-1] != train.global_batch:
        raise UserError(
            f"train.batch_ramp: ends at {sizes[-1]}, but train.global_batch is {train.global_batch}; let it end at that"
        )
    for size in sizes:
        if size % train.micro_batch:
            raise UserError(f"train.batch_ramp: {size} is not a multiple of train.micro_batch {train.micro_batch}")


def _refuse_impossible_schedules(data: DataConfig) -> None:
    if data.mask_schedule is not None:
        points_of("data.mask_schedule", data.mask_schedule, share)
    if data.species_weights is not None:
        factors_by_step(data)
    if data.mask_span > data.seq_len:
        raise UserError(
            f"data.mask_span: {data.mask_span} bases are more than a sequence has (data.seq_len {data.seq_len}), so "
            "that nothing would be left to predict them from; choose fewer"
        )
    for name, default in (("mask_span", 1), ("mask_schedule", None)):
        if data.objective == "next_base" and getattr(data, name) != default:
            raise UserError(f"data.{name}: next_base masks nothing; leave it out, or use data.objective=mlm")
    for name in ("species_weights", "weights_bed"):
        if data.mode == "stream" and getattr(data, name) is not None:
            raise UserError(f"data.{name}: a stream does not know where its bases come from; use data.mode=shards")
    if data.weights_bed is None and data.weights_elsewhere != 1:
        raise UserError("data.weights_elsewhere: has no effect without data.weights_bed; leave it out")


def _refuse_impossible_best(config: Config) -> None:
    names = [evaluation.name for evaluation in evaluations_of(config.evaluations)]
    best, best_is = config.checkpoint.best, config.checkpoint.best_is
    if best is None and best_is is None:
        return
    if best is None:
        raise UserError(
            "checkpoint.best_is: has no effect without checkpoint.best; name there the number that is compared"
        )
    if best_is is None:
        raise UserError(
            f"checkpoint.best: say with checkpoint.best_is=max or min whether a large or a small {best} is good"
        )
    if best.startswith("valid_"):
        if not config.valid.every:
            raise UserError(f"checkpoint.best: {best} comes from validations, and valid.every=0 makes none")
    elif not best.startswith(SPACE):
        raise UserError(
            f"checkpoint.best: name a number of validations (valid_…) or of evaluations (eval/NAME/…), got '{best}'"
        )
    elif best.count("/") < 2 or best.split("/")[1] not in names:
        known = ", ".join(names) or "none"
        raise UserError(f"checkpoint.best: '{best}' belongs to no evaluation; evaluations has {known}")


def refuse_strategy(train: TrainConfig, strategy: str) -> None:
    """Raise `UserError` where the optimizer would compute something else under a strategy than in one process."""
    if train.optimizer == "muon" and strategy in ("fsdp", "deepspeed"):
        raise UserError(
            f"train.optimizer: muon needs whole matrices, but parallel.strategy={strategy} gives each rank a part of "
            "them; use parallel.strategy=ddp"
        )
    if train.batch_ramp is not None and strategy == "deepspeed":
        raise UserError(
            "train.batch_ramp: parallel.strategy=deepspeed has the same batch size in all steps; use ddp or fsdp"
        )
    if train.ema and strategy == "deepspeed":
        raise UserError(
            "train.ema: parallel.strategy=deepspeed divides weights without regard to the borders of parameters; use "
            "ddp or fsdp"
        )


def refuse_cuda_graphs(config: Config) -> None:
    """Raise `UserError` for what a CUDA graph of a micro-batch's passes cannot record. Values that are still to be
    decided, such as `auto`, pass.
    """
    if config.train.cuda_graphs != "passes":
        return
    parallel, backend = config.parallel, config.ops.backend
    exchange = "ranks exchange within the passes, which is not recorded"
    obstacles = [
        (config.run.device == "cpu", "run.device=cpu", "a graph is a GPU's"),
        (backend not in ("auto", "triton"), f"ops.backend={backend}", "its loss waits for the GPU; use triton"),
        (config.train.precision == "fp64", "train.precision=fp64", "only ops.backend=triton is recorded"),
        (config.train.compile, "train.compile=true", "a compiled block within a graph was never tried"),
        (parallel.strategy in ("fsdp", "deepspeed"), f"parallel.strategy={parallel.strategy}", f"{exchange}; use ddp"),
        (parallel.context > 1, f"parallel.context={parallel.context}", exchange),
        (parallel.strands > 1, f"parallel.strands={parallel.strands}", exchange),
    ]
    for met, what, why in obstacles:
        if met:
            raise UserError(f"train.cuda_graphs: passes does not go with {what}: {why}")


def _refuse_impossible_scales(train: TrainConfig) -> None:
    scales = {} if train.lr_scale is None else train.lr_scale
    if not isinstance(scales, dict):
        raise UserError(f"train.lr_scale: expected factors by kind of parameter, such as {{A_log: 0.1}}; got {scales}")
    for kind, scale in scales.items():
        if not isinstance(scale, int | float) or isinstance(scale, bool) or not 0 <= scale < math.inf:
            raise UserError(f"train.lr_scale: the factor of {kind} must be a number of at least 0, got {scale}")


def _refuse_impossible_decay(train: TrainConfig) -> None:
    if train.init_from is not None and train.decay_from is not None:
        raise UserError(
            "train.init_from: train.decay_from gives the run its first weights already; leave one of them out"
        )
    for name in ("decay_steps", "decay_from"):
        if getattr(train, name) is not None and train.schedule != "wsd":
            raise UserError(
                f"train.{name}: has no effect under train.schedule={train.schedule}; use train.schedule=wsd"
            )
    before = train.warmup_steps or 0
    if train.decay_steps is not None and before + train.decay_steps > train.steps:
        raise UserError(
            f"train.decay_steps: {train.decay_steps} and a warm-up of {before} steps together are more than "
            f"train.steps {train.steps}"
        )
