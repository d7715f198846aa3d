"""How long a step takes and how much memory it needs, before anything runs.

An estimate for each rank: of one H100, or of one process on a CPU. Throughput of the flip-free model on an H100 scales
with width and depth from 0.65 microseconds per base for 256 channels and 16 layers, twice that for both strands. Memory
is what autograd keeps of each block and what the backward pass of one needs besides, plus weights, gradients and Adam.
"""

from dataclasses import dataclass

from caduceus.config import Config
from caduceus.distributed.costs import held, sent
from caduceus.distributed.layout import Sharing, blocks_to_recompute, check_layout
from caduceus.model import costs
from caduceus.model.costs import block_bytes, parameter_count

SECONDS_PER_BASE = 0.65e-6 / (256 * 16)
SCAN_INPUTS = 0.2
"""Time that recomputing what feeds the scan takes, in forward passes of a block: by the bytes it moves."""
GPU_CHUNK, CPU_CHUNK = 256, 16
"""Tokens for which a scan keeps one state."""
REPLAYED, MOST_REPLAYED = 8, 2**31
"""A GPU's backward pass replays one state of so many, and keeps at most so many bytes of them."""
GPU_SCRATCH, CPU_SCRATCH = 2**28, 2**29
"""Bytes besides: of libraries, and on a CPU of the whole process."""
CPU_HEAP = 1.1
"""Bytes that a process on a CPU holds for each byte of its tensors."""
GPU_BYTES = 80_000_000_000
"""Memory of an H100."""


@dataclass(frozen=True)
class Estimate:
    """An estimate for each rank of a run."""

    world: int
    shared_by: Sharing
    sequences: int
    """Sequences of a global batch that a rank (with those that share them) computes, in micro-batches."""
    bases: int
    """Bases in memory at a time."""
    parameters: int
    step_seconds: float
    memory_bytes: int
    sent_bytes: int
    """That a rank gives to collectives in a step."""

    def describe(self, gpus: bool) -> str:
        """One line; without `gpus` it leaves out the time, which is for GPUs."""
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


def estimate(config: Config, world: int, gpus: bool = True) -> Estimate:
    """Estimate a run on `world` ranks, each with a GPU or else on CPUs, where `auto` is taken to recompute nothing.

    Raises `UserError` for a layout that the ranks cannot take.
    """
    model, train = config.model, config.train
    sharing = check_layout(config, world)
    streams = costs.streams(model) // sharing.strands
    sequences = train.global_batch // (world // sharing.ranks)
    bases_per_sequence = config.data.seq_len // sharing.context
    bases = bases_per_sequence * train.micro_batch
    parameters = parameter_count(model)
    layers, bases_in_streams = model.n_layer, bases * streams
    element = {"fp64": 8, "fp32": 4, "bf16": 2 if gpus else 4}[train.precision]  # a CPU's scan computes in fp32
    block = block_bytes(model, element, GPU_CHUNK if gpus else CPU_CHUNK, fused_norm=gpus)
    full, lean, residual = (int(n * bases_in_streams) for n in (block.full, block.lean, block.residual))
    if train.precision == "bf16" and not gpus:  # its scan keeps copies of its inputs in fp32
        lean = full
    fixed = held(config, world).total + int(block.gradients * bases_in_streams)
    if gpus:
        fixed += GPU_SCRATCH + min(int(block.states * bases_in_streams) // REPLAYED, MOST_REPLAYED)
    counts = {"none": (0, 0), "scan": (0, layers), "block": (layers, 0)}.get(train.activation_checkpointing)
    if counts is None and not gpus:
        counts = (0, 0)
    if counts is None:
        least = fixed + (layers - 1) * residual + full
        counts = blocks_to_recompute(least, lean - residual, full - residual, GPU_BYTES, layers)
    whole, inputs = counts
    memory = fixed + whole * residual + inputs * lean + (layers - whole - inputs) * full
    if layers in counts:  # the backward pass first recomputes the last block, beside what is kept of all
        memory += full if whole else full - lean
    if not gpus:
        memory = int(CPU_HEAP * memory) + CPU_SCRATCH
    passes = 3 * layers + whole + SCAN_INPUTS * inputs  # a backward pass counts as two forward ones
    step = SECONDS_PER_BASE * model.d_model * streams * sequences * bases_per_sequence * passes / 3
    return Estimate(world, sharing, sequences, bases, parameters, step, memory, sent(config, world).total)
