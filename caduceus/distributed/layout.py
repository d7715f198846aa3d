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
    if world % parallel.ranks_per_sample:
        raise UserError(
            f"parallel.strands: {parallel.strands} x parallel.context {parallel.context} ranks share a sequence, which "
            f"does not divide the number of ranks, {world}"
        )
    if not _cuts_sequences(config, parallel.context):
        raise UserError(
            f"parallel.context: {parallel.context} does not cut data.seq_len {config.data.seq_len} into equal slices "
            f"of at least model.d_conv - 1 = {config.model.d_conv - 1} bases"
        )
    if parallel.shard and world % parallel.shard:
        raise UserError(f"parallel.shard: {parallel.shard} does not divide the {world} ranks")
    if not _shares_batch(config, world, parallel.ranks_per_sample):
        raise UserError(
            f"train.global_batch: {train.global_batch} is not a multiple of train.micro_batch {train.micro_batch} x "
            f"{world // parallel.ranks_per_sample} data-parallel ranks (parallel.context x parallel.strands ranks "
            f"share a sequence and count as one); {_way_on(config, world)}"
        )
    if parallel.strategy == "single" and world > 1:
        raise UserError(f"parallel.strategy: single runs on one process, but {world} were started; use auto")
    if parallel.strategy == "deepspeed":
        user_options(config, world // parallel.ranks_per_sample)


def _cuts_sequences(config: Config, context: int) -> bool:
    width, rest = divmod(config.data.seq_len, context)
    return not rest and width >= config.model.d_conv - 1


def _shares_batch(config: Config, world: int, ranks_per_sample: int) -> bool:
    return config.train.global_batch % (config.train.micro_batch * (world // ranks_per_sample)) == 0


def _way_on(config: Config, world: int) -> str:
    """What to change so that the global batch can be shared out; rather strands than slices, which cost more."""
    for shared in range(1, world + 1):
        if world % shared or not _shares_batch(config, world, shared):
            continue
        for strands in (2, 1) if config.model.rcps else (1,):
            context, rest = divmod(shared, strands)
            if not rest and _cuts_sequences(config, context):
                keys = f"parallel.strands={strands} " if config.model.rcps else ""
                return f"{keys}parallel.context={context} fits"
    return "no parallel.context fits: change the number of ranks or train.micro_batch"


def blocks_to_recompute(least: int, added: int, free: int, layers: int) -> int:
    """The smallest number of blocks, of 0 … layers - 1, with which training fits `free` bytes less the reserve.

    `least`: bytes with layers - 1 recomputed; `added`: by each block that is kept instead.
    """
    spare = int((1 - RESERVE) * free) - least
    if added <= 0:
        return 0
    return layers - 1 - min(layers - 1, max(0, spare // added))
