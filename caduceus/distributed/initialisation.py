"""Makes the first weights of a model on the meta device, part by part.

Every rank draws all weights from the same generator on the CPU, in the order of `init_weights`, and keeps its share of
a part before it draws the next. So all strategies start from the same bits, and no rank needs memory for more than its
share of the model and one block. Given weights are an exception: every rank reads them whole.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from caduceus import CaduceusForMaskedLM
from caduceus.config import CaduceusConfig, TrainConfig
from caduceus.errors import UserError
from caduceus.hub.folders import load

_WITHOUT_EFFECT_ON_WEIGHTS = ("residual_in_fp32",)
"""Keys of the model in which a run may differ from its first weights, as they only change rounding."""


def initialise(
    model: CaduceusForMaskedLM,
    config: TrainConfig,
    device: torch.device,
    shard: Callable[[nn.Module], object] = lambda part: None,
) -> None:
    """Make the weights of `train.seed` for a model on the meta device, in the precision of the run, on `device`.

    `shard` is called with each block, and finally with the whole model, as soon as its weights exist; it may replace
    parameters by this rank's part of them. A model that is already in memory keeps its weights.
    """
    if not any(parameter.is_meta for parameter in model.parameters()):
        shard(model.to(device))
        return
    generator = torch.Generator().manual_seed(config.seed)
    given = {} if config.init_from is None else starting_weights(config.init_from, model.config)
    dtype = torch.float64 if config.precision == "fp64" else torch.float32
    ends = (model, model.embedding, model.norm_f)
    for module in ends:
        module.to_empty(device="cpu", recurse=False)
    model.init_ends(generator)
    _take(given, model.embedding, "embedding.")
    _take(given, model.norm_f, "norm_f.")
    for number, block in enumerate(model.blocks):
        block.to_empty(device="cpu")
        block.init_weights(generator)
        _take(given, block, f"blocks.{number}.")
        shard(block.to(device, dtype))
    for module in ends[1:]:
        module.to(device, dtype)
    model.complement = model.complement.to(device)
    shard(model)


def starting_weights(init_from: str, config: CaduceusConfig) -> dict[str, Tensor]:
    """The weights of `train.init_from` by their names, for a model of `config`.

    Raises `UserError` where it holds no model, or a model that differs in a key; the message names the first such key.
    """
    try:
        model = load(init_from)
    except UserError as error:
        raise UserError(f"train.init_from: {error}") from None
    for key in vars(config):
        theirs, ours = getattr(model.config, key), getattr(config, key)
        if theirs != ours and key not in _WITHOUT_EFFECT_ON_WEIGHTS and not _is_unused(key, config, model.config):
            raise UserError(
                f"train.init_from: {init_from} holds a model with model.{key}={theirs}, not {ours}; give model.{key}="
                f"{theirs}, or other weights"
            )
    return model.state_dict()


def _is_unused(key: str, *configs: CaduceusConfig) -> bool:
    """Whether a key has no effect on either model."""
    needs = {"fused_add_norm": lambda config: config.rcps, "headdim": lambda config: config.mixer == "mamba2"}
    return key in needs and not any(needs[key](config) for config in configs)


def _take(given: dict[str, Tensor], module: nn.Module, prefix: str) -> None:
    """Overwrite a module's weights with the given ones, if there are any."""
    if given:
        own = {name.removeprefix(prefix): value for name, value in given.items() if name.startswith(prefix)}
        module.load_state_dict(own)
