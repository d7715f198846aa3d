"""Kernels of the selective scan's backward pass, in the terms of scan_kernels.py:

chunk_adjoint   each chunk with a zero end adjoint: the adjoint of its initial state
chunk_carry     the same recurrence over chunks, in the opposite order
scan_replay     each chunk forward again: dz, and every T-th state
gate_gradient   dz, where the forward pass kept outputs and every T-th state, so that no chunk is replayed
gather_pieces   B and C as scan_backward takes them
scan_backward   each chunk with its true states and adjoint: the other gradients
scatter_pieces  dB and dC to where they belong
"""

import triton
import triton.language as tl

from caduceus.ops.triton.device import SIZES
from caduceus.ops.triton.scan_arithmetic import (
    gate_gradient,
    load,
    load_floats,
    load_parameter,
    load_turn,
    load_vectors,
    silu,
    step_size,
    store_vectors,
    time_of_decay,
    zeros,
)
from caduceus.ops.triton.scan_kernels import scan_item


@triton.jit
def _trace_chunk_back(
    dt_ptr,
    C_ptr,
    z_ptr,
    starts_ptr,
    dout_ptr,
    adjoint_ptr,
    A,
    bias,
    t,
    length,
    L,
    rev,
    E: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    STAGES: tl.constexpr,
    mask,
):
    """Against the scan's direction: from the last step taken, at t, to the first."""
    step = 2 * rev - 1
    adjoint = zeros(N, BLOCK)
    for _ in tl.range(0, length, UNROLL, num_stages=STAGES):
        xs = load_turn(dt_ptr, step * E, 0, mask, UNROLL)
        douts = load_turn(dout_ptr, step * E, 0, mask, UNROLL)
        if HAS_Z:
            zs = load_turn(z_ptr, step * E, 0, mask, UNROLL)
        for i in tl.static_range(UNROLL):
            dt = step_size(xs[i], bias, SOFTPLUS)
            decay_time = time_of_decay(dt, starts_ptr, t + i * step + rev, L, HAS_STARTS)
            dy = douts[i].to(tl.float32)
            if HAS_Z:
                dy *= silu(zs[i].to(tl.float32))
            C = load_floats(C_ptr + i * step * N, N)
            earlier = ()
            for n in tl.static_range(N):
                earlier = earlier + (tl.exp2(decay_time * A[n]) * (adjoint[n] + dy * C[n]),)
            adjoint = earlier
        t += UNROLL * step
        dt_ptr += UNROLL * step * E
        C_ptr += UNROLL * step * N
        z_ptr += UNROLL * step * E
        dout_ptr += UNROLL * step * E
    store_vectors(adjoint_ptr, E, adjoint, mask, N)


@triton.jit(do_not_specialize=SIZES)
def chunk_adjoint_kernel(
    dt_ptr,
    A_ptr,
    C_ptr,
    z_ptr,
    bias_ptr,
    starts_ptr,
    dout_ptr,
    adjoint_ptr,
    S,
    batch,
    L,
    n_chunks,
    chunk_size,
    reverse,
    E: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Adjoint (rows, chunks, N, E) of each chunk's initial state, from the chunk's own outputs alone."""
    item = tl.program_id(0).to(tl.int64)
    chunk, row = item % n_chunks, item // n_chunks
    b, s, d = row % batch, row // batch % S, row // batch // S
    sb = s * batch + b
    rev = ((d + s + reverse) % 2).to(tl.int32)
    e = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = None if E % BLOCK == 0 else e < E
    begin = chunk * chunk_size
    length = tl.minimum(L - begin, chunk_size).to(tl.int32)
    t = tl.where(rev == 1, begin, begin + length - 1)

    A = load_vectors(A_ptr + d * N * E + e, E, mask, N)
    bias = load_parameter(bias_ptr, d, e, mask, E, HAS_BIAS)
    dt_at = dt_ptr + (row * L + t) * E + e
    C_at = C_ptr + (row * L + t) * N
    z_at = z_ptr + (sb * L + t) * E + e
    dout_at = dout_ptr + (sb * L + t) * E + e
    starts_at = starts_ptr + b * L
    adjoint_at = adjoint_ptr + item * N * E + e
    operands = (dt_at, C_at, z_at, starts_at, dout_at, adjoint_at, A, bias, t, length, L)
    if UNROLL == 1:
        _trace_chunk_back(*operands, rev, E, N, BLOCK, UNROLL, SOFTPLUS, HAS_Z, HAS_STARTS, STAGES, mask=mask)
    elif rev == 1:
        _trace_chunk_back(*operands, 1, E, N, BLOCK, UNROLL, SOFTPLUS, HAS_Z, HAS_STARTS, STAGES, mask=mask)
    else:
        _trace_chunk_back(*operands, 0, E, N, BLOCK, UNROLL, SOFTPLUS, HAS_Z, HAS_STARTS, STAGES, mask=mask)


@triton.jit(do_not_specialize=SIZES)
def scan_replay_kernel(
    u_ptr,
    dt_ptr,
    A_ptr,
    B_ptr,
    C_ptr,
    D_ptr,
    z_ptr,
    bias_ptr,
    starts_ptr,
    dout_ptr,
    state_ptr,
    dz_ptr,
    kept_ptr,
    item0,
    S,
    batch,
    L,
    n_chunks,
    chunk_size,
    reverse,
    P: tl.constexpr,
    E: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    T: tl.constexpr,
    UNROLL: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_STARTS: tl.constexpr,
):
    """Forward again, from item0 on: dz, and kept (P, items, chunk_size / T, N, E), the states before T-th tokens."""
    scan_item(
        *(
            u_ptr,
            dt_ptr,
            A_ptr,
            B_ptr,
            C_ptr,
            D_ptr,
            z_ptr,
            bias_ptr,
            starts_ptr,
            dout_ptr,
            state_ptr,
            dz_ptr,
            kept_ptr,
        ),
        *(item0, S, batch, L, n_chunks, chunk_size, reverse, P, E, N, BLOCK, T, UNROLL),
        *(True, True, SOFTPLUS, HAS_D, HAS_Z, HAS_BIAS, HAS_STARTS),
    )


@triton.jit
def gate_gradient_kernel(y_ptr, z_ptr, dout_ptr, dz_ptr, count, BLOCK: tl.constexpr):
    """dz from y before its gate; all have `count` elements."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    dz = gate_gradient(load(y_ptr + at, mask), load(dout_ptr + at, mask), load(z_ptr + at, mask))
    tl.store(dz_ptr + at, dz.to(dz_ptr.dtype.element_ty), mask=mask)
