"""Which strategy runs, and the model it runs on."""

import logging

import torch

from caduceus import CaduceusForMaskedLM
from caduceus.config import Config
from caduceus.distributed.ddp import DDP
from caduceus.distributed.deepspeed import DeepSpeed
from caduceus.distributed.fsdp import FSDP
from caduceus.distributed.mesh import Ranks
from caduceus.distributed.strategy import Single

_STRATEGIES = {"single": Single, "ddp": DDP, "fsdp": FSDP, "deepspeed": DeepSpeed}
LARGEST_REPLICATED_MODEL = 500_000_000
"""Parameters up to which every rank keeps a whole model: 16 bytes each for weight, gradient and AdamW's two moments."""

_log = logging.getLogger(__name__)


def build_strategy(config: Config, ranks: Ranks) -> Single:
    """The strategy of `parallel.strategy` around a freshly initialised model."""
    model = build_model(config)
    model.share_sequences(ranks.context_group)
    name = config.parallel.strategy
    if name == "auto":
        name, reason = _choose(sum(parameter.numel() for parameter in model.parameters()), ranks.world)
        if ranks.is_main:
            _log.info("parallel.strategy: auto chose '%s' (%s)", name, reason)
    return _STRATEGIES[name](config, ranks, model)


def build_model(config: Config) -> CaduceusForMaskedLM:
    """The model of the run on the meta device: a strategy gives it weights, and places them."""
    checkpoint_blocks = config.train.activation_checkpointing == "block"
    with torch.device("meta"):
        model = CaduceusForMaskedLM(config.model, backend=config.ops.backend, checkpoint_blocks=checkpoint_blocks)
    if config.train.compile:
        for block in model.blocks:
            block.compile()
    return model.train()


def _choose(parameters: int, world: int) -> tuple[str, str]:
    if world == 1:
        return "single", "one process"
    if parameters <= LARGEST_REPLICATED_MODEL:
        return "ddp", f"{world} ranks; {parameters:,} parameters fit on each, and sharding them would only add latency"
    return "fsdp", f"{world} ranks; {parameters:,} parameters are better shared"
