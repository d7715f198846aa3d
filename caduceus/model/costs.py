"""What a model costs: parameters, products, exponentials and bytes, counted from its configuration. Imports no torch.

Shapes: D d_model, E inner channels, N states, P directions, Q sets of projections (P where untied, else 1).
"""

from dataclasses import dataclass

from caduceus.config import CaduceusConfig, TrainConfig
from caduceus.config.model import CHUNK, MOST_IN_KERNELS

MOMENTS = 2
"""Number of tensors that AdamW keeps for each parameter, each of the parameter's size."""
_FP32 = 4


def parameter_count(model: CaduceusConfig) -> int:
    """Trainable parameters of the model."""
    return model.n_layer * block_parameters(model) + _norm(model) + model.padded_vocab_size * model.d_model


def block_parameters(model: CaduceusConfig) -> int:
    """Parameters of one block."""
    e, n, r, h = model.d_inner, model.d_state, model.dt_rank, model.heads
    if model.mixer == "mamba2":
        direction = (e + 2 * n) * (model.d_conv + 1) + 3 * h + e
    else:
        direction = e * (model.d_conv + 1) + (r + 1) * e + e * n + e
    return _block_matrices(model) + _directions(model) * direction + _norm(model)


def kept_numbers(model: CaduceusConfig, train: TrainConfig) -> int:
    """Numbers that the optimizer keeps: AdamW's moments, one momentum for parameters of Muon, and the average of the
    weights.
    """
    parameters = parameter_count(model)
    kept = MOMENTS * parameters
    if train.optimizer == "muon":
        kept -= (MOMENTS - 1) * model.n_layer * _block_matrices(model)
    return kept + (parameters if train.ema else 0)


def checkpoint_bytes(model: CaduceusConfig, train: TrainConfig) -> int:
    """Bytes of a checkpoint in fp32: the parameters, and the numbers of the optimizer."""
    return _FP32 * (parameter_count(model) + kept_numbers(model, train))


def flops_per_base(model: CaduceusConfig) -> int:
    """Floating-point operations per base in matrix products, forward and backward (twice the forward)."""
    d, e, n, r = model.d_model, model.d_inner, model.d_state, model.dt_rank
    if model.mixer == "mamba2":
        scan = n * CHUNK + e * CHUNK + 2 * e * n  # B with C, weights with x, and states in and out
        mixer = _projections(model) * d * (3 * e + 2 * n + model.heads) + _directions(model) * scan
    else:
        mixer = _projections(model) * 3 * d * e + _directions(model) * (e * (r + 2 * n) + r * e)
    return 3 * 2 * (model.n_layer * mixer + d * model.padded_vocab_size) * streams(model)


def exponentials_per_base(model: CaduceusConfig) -> int:
    """Exponentials per base in the scans of each direction.

    Mamba computes the decay of E x N states in each of four passes: two forward, for the states of chunks and for the
    outputs, and two backward, for the adjoints of chunks and for the gradients. A fifth, which replays states that were
    not kept, is recomputation and does not count. Mamba-2 computes, for each head, the decay from a base to every other
    base of its chunk: once forward, and backward once by torch or twice in kernels.
    """
    of_mamba = 4 * model.d_inner * model.d_state
    passes = 3 if _scans_in_kernels(model) else 2
    of_direction = passes * model.heads * CHUNK if model.mixer == "mamba2" else of_mamba
    return model.n_layer * _directions(model) * of_direction * streams(model)


@dataclass(frozen=True)
class BlockBytes:
    """Bytes per base of one stream in one block of the model, in training."""

    full: float
    """Kept for the backward pass when nothing is recomputed."""
    lean: float
    """The same when the backward pass recomputes the inputs of the scan."""
    residual: float
    """The same when it recomputes the whole block: only the residual stream."""
    gradients: float
    """Gradients of the block that the backward pass is working on."""
    states: float
    """Every state of the scan, in fp32: n times what a backward pass needs that keeps every n-th replayed state."""


def block_bytes(model: CaduceusConfig, element: int, chunk: int, fused_norm: bool) -> BlockBytes:
    """The bytes of a block.

    `element`: bytes of an activation. `chunk`: tokens per fp32 state that the scan keeps. `fused_norm`: one kernel
    computes the norm; otherwise the values before its weight are kept too.
    """
    d, e, directions, projections = model.d_model, model.d_inner, _directions(model), _projections(model)
    residual = d * (max(element, _FP32) if model.residual_in_fp32 else element)
    if model.mixer == "mamba2":
        return _block_bytes_of_mamba2(model, element, residual, fused_norm)
    scan_inputs = directions * (2 * e + model.dt_rank + 2 * model.d_state) * element  # u, dt, its low rank, B and C
    states = directions * e * model.d_state * max(element, _FP32)
    rest = (d + (0 if fused_norm else d) + projections * 3 * e) * element  # with x, z, and the output
    lean = residual + rest + states / chunk
    gradients = (2 * directions * e + projections * 2 * e) * element  # of u and dt, and of x and z
    return BlockBytes(lean + scan_inputs, lean, residual, gradients, states)


def kept_state_bytes(model: CaduceusConfig, every: int) -> int:
    """Bytes per base of one stream in a block whose scan keeps every `every`-th state, and its outputs in fp32."""
    directions = _directions(model)
    scans = 1 if model.bidirectional_weight_tie and model.bidirectional_strategy == "add" else directions
    return (directions * model.d_state // every + scans) * model.d_inner * _FP32


def _block_bytes_of_mamba2(model: CaduceusConfig, element: int, residual: int, fused_norm: bool) -> BlockBytes:
    """The scan keeps its operands and its output, and recomputes everything else."""
    d, e, n, h = model.d_model, model.d_inner, model.d_state, model.heads
    directions, projections = _directions(model), _projections(model)
    convolved = directions * (e + 2 * n) * element
    rest = (d + (0 if fused_norm else d) + projections * (3 * e + 2 * n + h) + directions * e) * element
    within = directions * h * CHUNK * (3 * _FP32 + 2 * 2 * _FP32)  # T x T matrices in fp32, and two in fp64
    if fused_norm and element < _FP32 and _scans_in_kernels(model):  # states of chunks and their adjoints instead
        within = directions * e * n * 2 * (_FP32 + element) / CHUNK
    gradients = (2 * directions * (e + 2 * n) + projections * 2 * e) * element + within
    states = directions * e * n * _FP32
    return BlockBytes(residual + rest + convolved, residual + rest, residual, gradients, states)


def launches(
    model: CaduceusConfig, streams: int, chunks: int, shared: bool, recomputed: tuple[int, int] = (0, 0)
) -> int:
    """Kernels and operators that a micro-batch launches on a GPU, forward and backward, without torch.compile.

    `streams`: the number on this rank. `chunks`: of `CHUNK` bases, in one of its sequences. `shared`: whether other
    ranks have slices of the sequences. `recomputed`: how many blocks the backward pass recomputes whole, and of how
    many others the inputs of the scan.
    """
    whole, inputs = recomputed
    block = 80 + 16 * (streams - 1) + (37 if shared else 0)
    if _scans_in_kernels(model):
        block -= 12
    elif model.mixer == "mamba2":  # passes states from chunk to chunk by separate operators
        block += 188 + 8 * chunks * streams * _directions(model)
    again = whole * (block / 4) + 6 * inputs
    return round(model.n_layer * block + again + 43 + 17 * (streams - 1))


def streams(model: CaduceusConfig) -> int:
    """Number of strands that the model follows."""
    return 2 if model.rcps else 1


def _scans_in_kernels(model: CaduceusConfig) -> bool:
    """Whether it is a Mamba-2 whose scan has kernels in half precision on a GPU such as the H100."""
    return model.mixer == "mamba2" and max(model.headdim, model.d_state) <= MOST_IN_KERNELS


def _block_matrices(model: CaduceusConfig) -> int:
    """Number of a block's parameters in in_proj, x_proj and out_proj."""
    d, e, n, r = model.d_model, model.d_inner, model.d_state, model.dt_rank
    if model.mixer == "mamba2":
        return _projections(model) * d * (3 * e + 2 * n + model.heads)
    return _projections(model) * 3 * d * e + _directions(model) * e * (r + 2 * n)


def _norm(model: CaduceusConfig) -> int:
    return model.d_model if model.rms_norm else 2 * model.d_model


def _directions(model: CaduceusConfig) -> int:
    return 2 if model.bidirectional else 1


def _projections(model: CaduceusConfig) -> int:
    return 1 if model.bidirectional_weight_tie else _directions(model)
