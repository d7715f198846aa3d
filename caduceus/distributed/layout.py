"""Which arrangements of ranks and memory a run can take. Imports no torch: the launcher asks before it submits."""

from dataclasses import dataclass

from caduceus.config import Config
from caduceus.config.by_step import BatchRamp
from caduceus.distributed.deepspeed.options import user_options
from caduceus.errors import UserError

LARGEST_REPLICATED_MODEL = 500_000_000
"""Parameters up to which every rank keeps a whole model: 16 bytes each for weight, gradient and AdamW's two moments."""
RESERVE = 0.1
"""Share of the free memory that is left alone: for fragmentation, and for what libraries take besides torch."""
_CHANGE = "change the number of ranks or train.micro_batch"


@dataclass(frozen=True)
class Sharing:
    """How ranks share a sample: each has one of `strands` and one of `context` slices of it."""

    strands: int
    context: int

    @property
    def ranks(self) -> int:
        """Ranks that share a sample, and count as one data-parallel rank."""
        return self.strands * self.context

    def __str__(self) -> str:
        return f"parallel.strands={self.strands} parallel.context={self.context}"


def check_layout(config: Config, world: int) -> Sharing:
    """How `world` ranks share samples, where `parallel.strands` or `parallel.context` may be 0: as it takes.

    Raises `UserError` for an arrangement that they cannot take; the message names the key.
    """
    parallel, train = config.parallel, config.train
    asked = Sharing(parallel.strands, parallel.context)
    sharing = _smallest_sharing(config, world, asked) or Sharing(asked.strands or 1, asked.context or 1)
    if world % sharing.context:
        raise UserError(f"parallel.context: {sharing.context} does not divide the {world} ranks")
    if world % sharing.ranks:
        raise UserError(
            f"parallel.strands: {sharing.strands} x parallel.context {sharing.context} ranks share a sequence, which "
            f"does not divide the number of ranks, {world}"
        )
    if not _cuts_sequences(config, sharing.context):
        raise UserError(
            f"parallel.context: {sharing.context} does not cut data.seq_len {config.data.seq_len} into equal slices "
            f"of at least model.d_conv - 1 = {config.model.d_conv - 1} bases"
        )
    if parallel.shard and world % parallel.shard:
        raise UserError(f"parallel.shard: {parallel.shard} does not divide the {world} ranks")
    if not _shares_batch(config, world, sharing.ranks):
        fitting = _smallest_sharing(config, world, Sharing(0, 0))
        way_on = f"{fitting} fits" if fitting else f"no parallel.context fits: {_CHANGE}"
        raise UserError(
            f"train.{'batch_ramp' if train.batch_ramp else 'global_batch'}: "
            f"{train.batch_ramp or train.global_batch} is not a multiple of train.micro_batch {train.micro_batch} x "
            f"{world // sharing.ranks} data-parallel ranks (parallel.context x parallel.strands ranks share a sequence "
            f"and count as one); {way_on}"
        )
    if parallel.strategy == "single" and world > 1:
        raise UserError(f"parallel.strategy: single runs on one process, but {world} were started; use auto")
    if parallel.strategy == "deepspeed":
        user_options(config, world // sharing.ranks)
    return sharing


def _smallest_sharing(config: Config, world: int, asked: Sharing) -> Sharing | None:
    """The arrangement that gives every rank a part with the fewest ranks a sample, among those as asked (0: any).

    Strands cost less than slices, and come first.
    """
    can_share = config.data.mode != "stream"
    for ranks in range(1, world + 1 if can_share else 2):
        if world % ranks or not _shares_batch(config, world, ranks):
            continue
        for strands in (asked.strands,) if asked.strands else (2, 1) if config.model.rcps else (1,):
            context, rest = divmod(ranks, strands)
            if not rest and asked.context in (0, context) and _cuts_sequences(config, context):
                return Sharing(strands, context)
    return None


def _cuts_sequences(config: Config, context: int) -> bool:
    width, rest = divmod(config.data.seq_len, context)
    return not rest and width >= config.model.d_conv - 1 and not (config.data.pack and context > 1)


def _shares_batch(config: Config, world: int, ranks_per_sample: int) -> bool:
    sequences = config.train.micro_batch * (world // ranks_per_sample)
    return all(size % sequences == 0 for size in BatchRamp.of(config.train).sizes)


def blocks_to_recompute(least: int, lean: int, full: int, free: int, layers: int) -> tuple[int, int]:
    """(blocks recomputed whole, others of which the scan's inputs are) so that training fits `free` less the reserve.

    As few as can be, first of the whole ones, then of the others; together at most layers - 1. `least`: bytes with
    layers - 1 recomputed whole; `lean` and `full`: added by each block that only has the scan's inputs recomputed, or
    nothing. More ranks than one take the largest of their pairs, which is the one with the fewest bytes.
    """
    spare, others = int((1 - RESERVE) * free) - least, layers - 1
    added = min(lean, full)
    whole = others - min(others, max(0, spare // added)) if added > 0 else 0
    lacking = (others - whole) * full - spare
    if lacking <= 0 or lean >= full:
        return whole, 0
    return whole, min(others - whole, -(-lacking // (full - lean)))
