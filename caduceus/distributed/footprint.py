"""The memory that training takes on a rank, by use. Imports no torch."""

from dataclasses import dataclass

from caduceus.config import Config
from caduceus.distributed.held import Held
from caduceus.model.costs import block_bytes, kept_state_bytes

RESERVE = 0.1
"""Share of the free memory that is kept in reserve for fragmentation and for libraries other than torch."""
SCAN_INPUTS = 0.2
"""Time to recompute the inputs of the scan, as a share of a block's forward pass, by the bytes that it moves."""
GPU_CHUNK, CPU_CHUNK = 256, 16
"""Tokens per state that a scan keeps."""
REPLAYED, MOST_REPLAYED = 8, 2**31
"""On a GPU the backward pass keeps one replayed state of this many tokens, and at most this many bytes of them."""
GPU_SCRATCH, CPU_SCRATCH = 2**28, 2**29
"""Further bytes: of libraries, and on a CPU of the whole process."""
CPU_HEAP = 1.1
"""Bytes that a process on a CPU holds for each byte of its tensors."""


@dataclass(frozen=True)
class Footprint:
    """The estimated memory of a rank."""

    recomputed: tuple[int, int]
    """How many blocks the backward pass recomputes whole, and of how many others it recomputes the inputs of the scan.
    """
    memory: dict[str, int]
    """Use -> bytes."""

    @property
    def total(self) -> int:
        return sum(self.memory.values())

    def passes(self, layers: int) -> float:
        """The time of a micro-batch in forward passes of a block; a backward pass counts as two."""
        whole, inputs = self.recomputed
        return 3 * layers + whole + SCAN_INPUTS * inputs


def footprint(config: Config, bases: int, states: Held, gpu: int | None) -> Footprint:
    """The memory for a micro-batch of `bases` bases of all streams on this rank; `states`: bytes that the model takes.

    `gpu`: bytes of the GPU's memory, or None on a CPU, where `auto` is assumed to recompute nothing.
    """
    model, train, layers, on_gpu = config.model, config.train, config.model.n_layer, gpu is not None
    element = {"fp64": 8, "fp32": 4, "bf16": 2 if on_gpu else 4}[train.precision]  # a CPU's scan computes in fp32
    block = block_bytes(model, element, GPU_CHUNK if on_gpu else CPU_CHUNK, fused_norm=on_gpu)
    full, lean, residual = (int(n * bases) for n in (block.full, block.lean, block.residual))
    if train.precision == "bf16" and not on_gpu:  # the scan keeps copies of its inputs in fp32
        lean = full
    memory = {"parameters": states.parameters, "gradients": states.gradients, "optimizer": states.states}
    memory["backward pass of a block"] = int(block.gradients * bases)
    if on_gpu:
        memory["backward pass of a block"] += min(int(block.states * bases) // REPLAYED, MOST_REPLAYED)
        memory["libraries"] = GPU_SCRATCH
    counts = {"none": (0, 0), "scan": (0, layers), "block": (layers, 0)}.get(train.activation_checkpointing)
    if counts is None and gpu is None:
        counts = (0, 0)
    elif counts is None:
        least = sum(memory.values()) + (layers - 1) * residual + full
        counts = blocks_to_recompute(least, lean - residual, full - residual, gpu, layers)
    whole, inputs = counts
    memory["activations"] = whole * residual + inputs * lean + (layers - whole - inputs) * full
    if layers in counts:  # the backward pass first recomputes the last block, while the others' activations are kept
        memory["activations"] += full if whole else full - lean
    if on_gpu and train.keep_states == "all" and model.mixer == "mamba" and config.parallel.context <= 1:
        memory["activations"] += (layers - whole) * kept_state_bytes(model, REPLAYED) * bases
    if not on_gpu:
        memory = {name: int(CPU_HEAP * count) for name, count in memory.items()} | {"libraries": CPU_SCRATCH}
    return Footprint(counts, memory)


def blocks_to_recompute(least: int, lean: int, full: int, free: int, layers: int) -> tuple[int, int]:
    """(blocks that are recomputed whole, others of which only the scan's inputs are), so that training fits `free`
    minus the reserve.

    It chooses as few as possible, first of the whole ones, then of the others; together at most layers - 1. `least`:
    bytes with layers - 1 recomputed whole. `lean` and `full`: bytes that each block adds if only its scan's inputs, or
    nothing, is recomputed. Several ranks take the largest of their pairs, which is the one with the fewest bytes.
    """
    spare, others = int((1 - RESERVE) * free) - least, layers - 1
    added = min(lean, full)
    whole = others - min(others, max(0, spare // added)) if added > 0 else 0
    lacking = (others - whole) * full - spare
    if lacking <= 0 or lean >= full:
        return whole, 0
    return whole, min(others - whole, -(-lacking // (full - lean)))
