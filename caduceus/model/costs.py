"""What a model costs: parameters, products, exponentials and bytes, counted from its configuration. Imports no torch.

Shapes: D d_model, E inner channels, N states, P directions, Q sets of projections (P where untied, else 1).
"""

from dataclasses import dataclass

from caduceus.config import CaduceusConfig

MOMENTS = 2
"""Tensors that AdamW keeps of each parameter, each of the parameter's size."""
_FP32 = 4
CHECKPOINT_BYTES = (1 + MOMENTS) * _FP32
"""Bytes that a checkpoint holds for a parameter: its value and its moments."""


def parameter_count(model: CaduceusConfig) -> int:
    """Trainable parameters of the model."""
    return model.n_layer * block_parameters(model) + _norm(model) + model.padded_vocab_size * model.d_model


def block_parameters(model: CaduceusConfig) -> int:
    """Those of one block."""
    d, e, n, r = model.d_model, model.d_inner, model.d_state, model.dt_rank
    direction = e * (model.d_conv + 1) + e * (r + 2 * n) + (r + 1) * e + e * n + e
    return _projections(model) * 3 * d * e + _directions(model) * direction + _norm(model)


def flops_per_base(model: CaduceusConfig) -> int:
    """Floating-point operations in matrix products, forward and backward (twice the forward), for a base."""
    d, e, n, r = model.d_model, model.d_inner, model.d_state, model.dt_rank
    mixer = _projections(model) * 3 * d * e + _directions(model) * (e * (r + 2 * n) + r * e)
    return 3 * 2 * (model.n_layer * mixer + d * model.padded_vocab_size) * streams(model)


def exponentials_per_base(model: CaduceusConfig) -> int:
    """Exponentials of the scans, which decay E x N states in each direction in four passes.

    Two go forward, for the states of chunks and for the outputs; two backward, for the replayed states and for the
    gradients.
    """
    return 4 * model.n_layer * _directions(model) * model.d_inner * model.d_state * streams(model)


@dataclass(frozen=True)
class BlockBytes:
    """Bytes for a base of one stream in one block of the model, in training."""

    full: float
    """Kept for the backward pass when nothing is recomputed."""
    lean: float
    """The same when the backward pass recomputes what feeds the scan."""
    residual: float
    """The same when it recomputes the whole block: the residual stream alone."""
    gradients: float
    """Gradients of the block that the backward pass is in."""
    states: float
    """Every state of the scan, in fp32: what a backward pass that replays every n-th one needs, times n."""


def block_bytes(model: CaduceusConfig, element: int, chunk: int, fused_norm: bool) -> BlockBytes:
    """`element`: bytes of an activation. `chunk`: tokens for which the scan keeps one state in fp32. `fused_norm`: one
    kernel computes the norm; otherwise what comes before its weight is kept too."""
    d, e, directions, projections = model.d_model, model.d_inner, _directions(model), _projections(model)
    residual = d * (max(element, _FP32) if model.residual_in_fp32 else element)
    scan_inputs = directions * (2 * e + model.dt_rank + 2 * model.d_state) * element  # u, dt, its low rank, B and C
    states = directions * e * model.d_state * max(element, _FP32)
    rest = (d + (0 if fused_norm else d) + projections * 3 * e) * element  # with x, z, and the output
    lean = residual + rest + states / chunk
    gradients = (2 * directions * e + projections * 2 * e) * element  # of u and dt, and of x and z
    return BlockBytes(lean + scan_inputs, lean, residual, gradients, states)


def streams(model: CaduceusConfig) -> int:
    """Strands that the model follows."""
    return 2 if model.rcps else 1


def _norm(model: CaduceusConfig) -> int:
    return model.d_model if model.rms_norm else 2 * model.d_model


def _directions(model: CaduceusConfig) -> int:
    return 2 if model.bidirectional else 1


def _projections(model: CaduceusConfig) -> int:
    return 1 if model.bidirectional_weight_tie else _directions(model)
