"""Which arrangements of ranks and memory a run can take. Imports no torch: the launcher asks before it submits."""

from caduceus.config import Config
from caduceus.distributed.deepspeed_config import user_options
from caduceus.errors import UserError

LARGEST_REPLICATED_MODEL = 500_000_000
"""Parameters up to which every rank keeps a whole model: 16 bytes each for weight, gradient and AdamW's two moments."""
RESERVE = 0.1
"""Share of the free memory that is left alone: for fragmentation, and for what libraries take besides torch."""


def check_layout(config: Config, world: int) -> None:
    """Refuse an arrangement that `world` ranks cannot take; the message names the key."""
    parallel, train = config.parallel, config.train
    if world % parallel.context:
        raise UserError(f"parallel.context: {parallel.context} does not divide the {world} ranks")
    width, rest = divmod(config.data.seq_len, parallel.context)
    if rest or width < config.model.d_conv - 1:
        raise UserError(
            f"parallel.context: {parallel.context} does not cut data.seq_len {config.data.seq_len} into equal slices "
            f"of at least model.d_conv - 1 = {config.model.d_conv - 1} bases"
        )
    if parallel.shard and world % parallel.shard:
        raise UserError(f"parallel.shard: {parallel.shard} does not divide the {world} ranks")
    data_world = world // parallel.context
    if train.global_batch % (train.micro_batch * data_world):
        raise UserError(
            f"train.global_batch: {train.global_batch} is not a multiple of train.micro_batch {train.micro_batch} x "
            f"{data_world} data-parallel ranks (parallel.context ranks share a sequence and count as one)"
        )
    if parallel.strategy == "single" and world > 1:
        raise UserError(f"parallel.strategy: single runs on one process, but {world} were started; use auto")
    if parallel.strategy == "deepspeed":
        user_options(config, data_world)


def blocks_to_recompute(least: int, added: int, free: int, layers: int) -> int:
    """The smallest number of blocks, of 0 … layers - 1, with which training fits `free` bytes less the reserve.

    `least`: bytes with layers - 1 recomputed; `added`: by each block that is kept instead.
    """
    spare = int((1 - RESERVE) * free) - least
    if added <= 0:
        return 0
    return layers - 1 - min(layers - 1, max(0, spare // added))
