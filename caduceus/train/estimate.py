"""How long a step takes and how much memory it needs, estimated before anything runs.

The estimate is for each rank: an H100, or a process on a CPU. The time on an H100 grows with width and depth in
proportion, doubles for both strands, and is the same for Mamba-2 as for Mamba; nothing of it is measured. Memory is the
sum of what autograd keeps of each block, what the backward pass of a block needs in addition, weights, gradients and
Adam's moments.
"""

from dataclasses import dataclass

from caduceus.config import Config
from caduceus.distributed.costs import sent
from caduceus.distributed.footprint import Footprint
from caduceus.distributed.layout import Room, Sharing, check_layout, footprint_of, with_sharing
from caduceus.model import costs
from caduceus.model.costs import parameter_count

BLOCK_SECONDS, REST_SECONDS = 57e-9 / 256, 4e-9 / 256
"""For a base and channel of the model, forward and backward in bf16: a block; and embedding, head and loss together.

They are what `benchmarks/sass.py` computes from the machine code of the kernels, for a block of 256 channels, in its
newest record there. No measurement has confirmed it.
"""
GPU_BYTES = 80_000_000_000
"""Memory of an H100, in bytes."""


@dataclass(frozen=True)
class Estimate:
    """An estimate for each rank of a run."""

    world: int
    shared_by: Sharing
    sequences: int
    """Sequences of a global batch that a rank computes, alone or with the ranks that share them, in micro-batches."""
    bases: int
    """Bases of a micro-batch on a rank, which are in memory at a time."""
    parameters: int
    footprint: Footprint
    step_seconds: float
    sent_bytes: int
    """Bytes that a rank sends in the collectives of a step."""

    @property
    def memory_bytes(self) -> int:
        return self.footprint.total

    def describe(self, gpus: bool) -> str:
        """The estimate in one line; without `gpus` it leaves out the time, which is only known for GPUs."""
        ranks = f"{self.world} rank{'s' * (self.world > 1)}"
        if self.shared_by.ranks > 1:
            ranks += f", {self.shared_by.ranks} to a sequence ({self.shared_by}),"
        share = f"{self.sequences} sequence{'s' * (self.sequences > 1)} a step, {self.bases:,} bases at a time"
        found = f"H100: {self.step_seconds:.2g} s a step, " if gpus else "a CPU: "
        found += f"{self.memory_bytes / 1e9:.1f} GB"
        size = f"{self.parameters / 1e6:.2f}M parameters"
        if self.world > 1:
            size += f", {self.sent_bytes / 1e6:,.0f} MB sent a step"
        return f"{ranks} with {share} each; {size}; unmeasured estimate for {found}"


def seconds_per_base(channels: int, blocks: float) -> float:
    """Seconds that an H100 takes for a base of one strand."""
    return (BLOCK_SECONDS * blocks + REST_SECONDS) * channels


def estimate(config: Config, world: int, gpus: bool = True, node: int = 0) -> Estimate:
    """Estimate a run on `world` ranks, with a GPU each or on CPUs; `auto` counts as recomputing nothing.

    `node`: ranks of a node (0: all ranks). Raises `UserError` for a layout that is impossible on so many ranks.
    """
    model, train = config.model, config.train
    room = Room(GPU_BYTES, node or world) if gpus else None
    sharing = check_layout(config, world, room)
    config = with_sharing(config, sharing)
    streams = costs.streams(model) // sharing.strands
    sequences = train.global_batch // (world // sharing.ranks)
    bases_per_sequence = config.data.seq_len // sharing.context
    takes = footprint_of(config, world, sharing, room)
    of_a_base = seconds_per_base(model.d_model, takes.passes(model.n_layer) / 3)
    return Estimate(
        world=world,
        shared_by=sharing,
        sequences=sequences,
        bases=bases_per_sequence * train.micro_batch,
        parameters=parameter_count(model),
        footprint=takes,
        step_seconds=of_a_base * streams * sequences * bases_per_sequence,
        sent_bytes=sent(config, world, node).total,
    )
