"""How long a step takes and how much memory it needs, before anything runs: an estimate for one H100 per rank.

Throughput of the flip-free model scales with width and depth from 0.65 microseconds per base for 256 channels and 16
layers, twice that for both strands. Memory is what autograd keeps of each block and what the backward pass of one
needs besides, plus weights, gradients and Adam.
"""

from dataclasses import dataclass

from caduceus.config import CaduceusConfig, Config
from caduceus.distributed.layout import LARGEST_REPLICATED_MODEL, Sharing, blocks_to_recompute, check_layout

SECONDS_PER_BASE = 0.65e-6 / (256 * 16)
BYTES_PER_CHANNEL = 36
"""Kept per base, layer and model channel for the backward pass, in bf16, as benchmarks/memory.py counts."""
LEAN_BYTES_PER_CHANNEL = 19
"""The same where what feeds the scan is recomputed."""
SCAN_INPUTS = 0.2
"""Time that recomputing what feeds the scan takes, in forward passes of a block: by the bytes it moves."""
BYTES_PER_RESIDUAL = 4
"""The residual stream in fp32: all that block checkpointing keeps of a layer."""
SCRATCH_PER_CHANNEL, SCRATCH = 24, 2**28
"""Gradients and scratch memory of the block that the backward pass is in: by base and model channel, and besides."""
REPLAYED_PER_CHANNEL, MOST_REPLAYED = 32, 2**31
"""Bytes of the states that the backward pass of a scan replays, and their bound."""
BYTES_PER_PARAMETER = 16
"""Weight, gradient and Adam's two moments in fp32."""
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

    def describe(self, gpus: bool) -> str:
        """One line; `gpus`: with the estimate, which is for GPUs."""
        ranks = f"{self.world} rank{'s' * (self.world > 1)}"
        if self.shared_by.ranks > 1:
            ranks += f", {self.shared_by.ranks} to a sequence ({self.shared_by}),"
        share = f"{self.sequences} sequence{'s' * (self.sequences > 1)} a step, {self.bases:,} bases at a time"
        estimate = f"; unmeasured estimate for H100: {self.step_seconds:.2g} s a step, {self.memory_bytes / 1e9:.1f} GB"
        return f"{ranks} with {share} each; {self.parameters / 1e6:.2f}M parameters{estimate if gpus else ''}"


def estimate(config: Config, world: int) -> Estimate:
    """Estimate a run on `world` ranks; raises `UserError` for a layout that these cannot take."""
    model, parallel, train = config.model, config.parallel, config.train
    sharing = check_layout(config, world)
    streams = (2 if model.rcps else 1) // sharing.strands
    sequences = train.global_batch // (world // sharing.ranks)
    bases_per_sequence = config.data.seq_len // sharing.context
    bases = bases_per_sequence * train.micro_batch
    parameters = parameter_count(model)
    shares = parallel.strategy in ("fsdp", "deepspeed") or (
        parallel.strategy == "auto" and parameters > LARGEST_REPLICATED_MODEL
    )
    holders = (parallel.shard or world) if shares else 1
    channels = bases * streams * model.d_model
    full, lean, residual = (n * channels for n in (BYTES_PER_CHANNEL, LEAN_BYTES_PER_CHANNEL, BYTES_PER_RESIDUAL))
    layers = model.n_layer
    fixed = BYTES_PER_PARAMETER * parameters // holders + SCRATCH_PER_CHANNEL * channels + SCRATCH
    fixed += min(REPLAYED_PER_CHANNEL * channels, MOST_REPLAYED)
    counts = {"none": (0, 0), "scan": (0, layers), "block": (layers, 0)}.get(train.activation_checkpointing)
    if counts is None:
        least = fixed + (layers - 1) * residual + full
        counts = blocks_to_recompute(least, lean - residual, full - residual, GPU_BYTES, layers)
    whole, inputs = counts
    memory = fixed + whole * residual + inputs * lean + (layers - whole - inputs) * full
    if layers in counts:  # the backward pass first recomputes the last block, beside what is kept of all
        memory += full if whole else full - lean
    passes = 3 * layers + whole + SCAN_INPUTS * inputs  # a backward pass counts as two forward ones
    step = SECONDS_PER_BASE * model.d_model * streams * sequences * bases_per_sequence * passes / 3
    return Estimate(world, sharing, sequences, bases, parameters, step, memory)


def parameter_count(model: CaduceusConfig) -> int:
    """Trainable parameters of the model."""
    d, e, n, r = model.d_model, model.d_inner, model.d_state, model.dt_rank
    directions = 2 if model.bidirectional else 1
    projections = d * 2 * e + e * d
    if model.bidirectional and not model.bidirectional_weight_tie:
        projections *= 2
    direction = e * (model.d_conv + 1) + e * (r + 2 * n) + (r + 1) * e + e * n + e
    norm = d if model.rms_norm else 2 * d
    return model.n_layer * (projections + directions * direction + norm) + norm + model.padded_vocab_size * d
