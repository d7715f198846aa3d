"""The layouts of ranks and memory that a run can have. Imports no torch, as the launcher asks before it submits."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace

from caduceus.config import Config
from caduceus.config.by_step import BatchRamp
from caduceus.distributed.deepspeed.settings import user_settings
from caduceus.distributed.footprint import RESERVE, Footprint, footprint
from caduceus.distributed.held import held
from caduceus.errors import UserError
from caduceus.model.costs import streams

SHORTEST_SLICE = 2**14
"""Bases of a slice, per block, for which computing takes many times as long as the exchanges within a node."""

_CHANGE = "change the number of ranks or train.micro_batch"


@dataclass(frozen=True)
class Sharing:
    """How ranks share a sample: each has one of its `strands` and one of its `context` slices."""

    strands: int
    context: int

    @property
    def ranks(self) -> int:
        """Number of ranks that share a sample and count as one data-parallel rank."""
        return self.strands * self.context

    def __str__(self) -> str:
        return f"parallel.strands={self.strands} parallel.context={self.context}"


@dataclass(frozen=True)
class Room:
    """The resources of a rank: bytes of its GPU's memory, and the number of ranks on its node."""

    gpu: int
    node: int


def check_layout(config: Config, world: int, room: Room | None = None) -> Sharing:
    """How `world` ranks share samples; where `parallel.strands` or `parallel.context` is 0, this is decided here.

    It takes as few ranks per sample as possible. With `room` it takes as many ranks of a node as are needed to fit a
    GPU, and, where `auto` decides about recomputation, to recompute less: there are then more micro-batches, of shorter
    slices, and the work is the same. Raises `UserError`, which names the key, for an impossible layout.
    """
    parallel, train = config.parallel, config.train
    asked = Sharing(parallel.strands, parallel.context)
    sharing = _chosen_sharing(config, world, asked, room) or Sharing(asked.strands or 1, asked.context or 1)
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
        fitting = next(_sharings(config, world, Sharing(0, 0)), None)
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
        user_settings(config, world // sharing.ranks)
    return sharing


def with_sharing(config: Config, sharing: Sharing) -> Config:
    """A copy of the configuration with this sharing; all sections but `parallel` are those of `config` itself."""
    parallel = replace(config.parallel, strands=sharing.strands, context=sharing.context)
    arranged = copy.copy(config)
    arranged.parallel = parallel
    return arranged


def footprint_of(config: Config, world: int, sharing: Sharing, room: Room | None) -> Footprint:
    """The memory of a rank with this sharing; without `room` it is that of a process on a CPU."""
    slices = config.train.micro_batch * config.data.seq_len // sharing.context
    bases = slices * (streams(config.model) // sharing.strands)
    states = held(config, world, room.node if room else 0)
    return footprint(with_sharing(config, sharing), bases, states, room and room.gpu)


def _chosen_sharing(config: Config, world: int, asked: Sharing, room: Room | None) -> Sharing | None:
    possible = _sharings(config, world, asked)
    smallest = next(possible, None)
    if smallest is None or room is None:
        return smallest
    others = (
        sharing
        for sharing in possible
        if room.node % sharing.ranks == 0
        and (sharing.context == 1 or config.data.seq_len // sharing.context >= SHORTEST_SLICE)
    )

    def cost(sharing: Sharing) -> tuple[bool, float]:
        takes = footprint_of(config, world, sharing, room)
        return takes.total > (1 - RESERVE) * room.gpu, takes.passes(config.model.n_layer)

    return min([smallest, *others], key=cost)


def _sharings(config: Config, world: int, asked: Sharing) -> Iterator[Sharing]:
    """Yield the sharings that give every rank a part, as asked (0: any), with the fewest ranks per sample first.

    Strands cost less than slices, and come first.
    """
    can_share = config.data.mode != "stream"
    for ranks in range(1, world + 1 if can_share else 2):
        if world % ranks or not _shares_batch(config, world, ranks):
            continue
        for strands in (asked.strands,) if asked.strands else (2, 1) if config.model.rcps else (1,):
            context, rest = divmod(ranks, strands)
            if not rest and asked.context in (0, context) and _cuts_sequences(config, context):
                yield Sharing(strands, context)


def _cuts_sequences(config: Config, context: int) -> bool:
    width, rest = divmod(config.data.seq_len, context)
    return not rest and width >= config.model.d_conv - 1 and not (config.data.pack and context > 1)


def _shares_batch(config: Config, world: int, ranks_per_sample: int) -> bool:
    sequences = config.train.micro_batch * (world // ranks_per_sample)
    return all(size % sequences == 0 for size in BatchRamp.of(config.train).sizes)
