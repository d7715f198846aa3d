"""First weights of a model made on the meta device, part by part.

Every rank draws all weights from one generator on the CPU, in the order of `init_weights`, and keeps what it is to
hold of a part before it draws the next. So all strategies start from the same bits, and no rank ever needs memory for
more than its share of the model and one block.
"""

from collections.abc import Callable

import torch
from torch import nn

from caduceus import CaduceusForMaskedLM
from caduceus.config import TrainConfig


def initialise(
    model: CaduceusForMaskedLM,
    config: TrainConfig,
    device: torch.device,
    shard: Callable[[nn.Module], object] = lambda part: None,
) -> None:
    """Weights of `train.seed` for a model on the meta device, in the precision of the run, on `device`.

    `shard` is called with each block, and at last with the whole model, as soon as its weights are there; it may
    replace parameters by what this rank holds of them.
    """
    generator = torch.Generator().manual_seed(config.seed)
    dtype = torch.float64 if config.precision == "fp64" else torch.float32
    ends = (model, model.embedding, model.norm_f)
    for module in ends:
        module.to_empty(device="cpu", recurse=False)
    model.init_ends(generator)
    for block in model.blocks:
        block.to_empty(device="cpu")
        block.init_weights(generator)
        shard(block.to(device, dtype))
    for module in ends[1:]:
        module.to(device, dtype)
    model.complement = model.complement.to(device)
    shard(model)
