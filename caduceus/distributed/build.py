"""Chooses the strategy, and builds it and its model."""

import copy
import logging
import os

import torch
from torch import nn

from caduceus import CaduceusForMaskedLM
from caduceus.config import Config, ParallelConfig, refuse_cuda_graphs, refuse_strategy
from caduceus.distributed.captured import Captured
from caduceus.distributed.ddp import DDP
from caduceus.distributed.deepspeed.strategy import DeepSpeed
from caduceus.distributed.fsdp import FSDP
from caduceus.distributed.held import chosen_strategy
from caduceus.distributed.ranks import Ranks
from caduceus.distributed.strands import StrandGroup
from caduceus.distributed.strategy import BuildOptimizer, Single, Strategy

_STRATEGIES = {"single": Single, "ddp": DDP, "fsdp": FSDP, "deepspeed": DeepSpeed}

_KEYS = {"fsdp": ("shard", "cpu_offload"), "deepspeed": ("zero_stage", "deepspeed_config", "cpu_offload")}
"""Keys of `parallel.` that have an effect only under some strategies."""

_GRAPHS_OF_A_BLOCK = 32
"""Largest number of versions that torch.compile makes before it leaves a block uncompiled. Blocks differ in the
mirrored strand, in what is recomputed, and in whether they get a residual, a padding mask, and gradients.
"""

_log = logging.getLogger(__name__)


def build_strategy(config: Config, ranks: Ranks, build_optimizer: BuildOptimizer) -> Strategy:
    """The strategy of `parallel.strategy` around a freshly initialised model and its optimizer."""
    model = build_model(config, ranks.strand_group)
    model.share_sequences(ranks.context_group)
    if config.parallel.strategy == "auto":
        config = copy.deepcopy(config)
        reason = choose_strategy(config.parallel, model, ranks.world)
        if ranks.is_main:
            _log.info("parallel.strategy: auto chose '%s' (%s)", config.parallel.strategy, reason)
    refuse_strategy(config.train, config.parallel.strategy)
    refuse_cuda_graphs(config)
    if ranks.is_main and (unused := _unused_keys(config.parallel)):
        _log.warning("%s: has no effect under parallel.strategy=%s", ", ".join(unused), config.parallel.strategy)
    kind = Captured if config.train.cuda_graphs == "passes" else _STRATEGIES[config.parallel.strategy]
    return kind(config, ranks, model, build_optimizer)


def build_model(config: Config, strands: StrandGroup | None = None) -> CaduceusForMaskedLM:
    """The model of the run on the meta device; a strategy then makes its weights and places them."""
    with torch.device("meta"):
        model = CaduceusForMaskedLM(config.model, config.ops.backend, strands=strands)
    if config.train.activation_checkpointing == "block":
        model.recomputed_blocks = config.model.n_layer
    elif config.train.activation_checkpointing == "scan":
        model.recomputed_scan_inputs = config.model.n_layer
    if config.train.compile:
        torch._dynamo.config.recompile_limit = _GRAPHS_OF_A_BLOCK
        for block in model.blocks:
            block.compile()
    return model.train()


def _unused_keys(parallel: ParallelConfig) -> list[str]:
    """Keys that were set, but have no effect under the strategy."""
    used, default = _KEYS.get(parallel.strategy, ()), ParallelConfig()
    names = dict.fromkeys(name for keys in _KEYS.values() for name in keys if name not in used)
    return [f"parallel.{name}" for name in names if getattr(parallel, name) != getattr(default, name)]


def choose_strategy(parallel: ParallelConfig, model: nn.Module, world: int) -> str:
    """Set the strategy that `auto` takes for a model on `world` ranks, and its `shard`. Returns the reason."""
    return _choose(parallel, sum(parameter.numel() for parameter in model.parameters()), world)


def _choose(parallel: ParallelConfig, parameters: int, world: int) -> str:
    node = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    parallel.strategy, parallel.shard, reason = chosen_strategy(parallel, parameters, world, node)
    return reason
