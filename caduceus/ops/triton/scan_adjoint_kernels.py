"""Kernels of the selective scan's backward pass, in the terms of scan_kernels.py:

chunk_adjoint   each chunk with a zero end adjoint: the adjoint of its initial state; chunk_adjoint_dz gives dz too,
                where the forward pass kept outputs and every T-th state, so that no chunk is replayed
chunk_carry     the same recurrence over chunks, in the opposite order
scan_replay     each chunk forward again: dz, and every T-th state
gather_pieces   B and C as scan_backward takes them
scan_backward   each chunk with its true states and adjoint: the other gradients
scatter_pieces  dB and dC to where they belong
"""

import triton
import triton.language as tl

from caduceus.ops.triton.device import SIZES
from caduceus.ops.triton.scan_arithmetic import (
    gate_gradient,
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
    y_ptr,
    adjoint_ptr,
    dz_ptr,
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
    GIVES_DZ: tl.constexpr,
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
        if GIVES_DZ:
            ys = load_turn(y_ptr, step * E, 0, mask, UNROLL)
        for i in tl.static_range(UNROLL):
            dt = step_size(xs[i], bias, SOFTPLUS)
            decay_time = time_of_decay(dt, starts_ptr, t + i * step + rev, L, HAS_STARTS)
            dy = douts[i].to(tl.float32)
            if HAS_Z:
                z = zs[i].to(tl.float32)
                if GIVES_DZ:
                    dz = gate_gradient(ys[i], dy, z)
                    tl.store(dz_ptr + i * step * E, dz.to(dz_ptr.dtype.element_ty), mask=mask)
                dy *= silu(z)
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
        if GIVES_DZ:
            y_ptr += UNROLL * step * E
            dz_ptr += UNROLL * step * E
    store_vectors(adjoint_ptr, E, adjoint, mask, N)


@triton.jit
def _adjoint_of_chunk(
    dt_ptr,
    A_ptr,
    C_ptr,
    z_ptr,
    bias_ptr,
    starts_ptr,
    dout_ptr,
    y_ptr,
    adjoint_ptr,
    dz_ptr,
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
    UNROLL: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_Y: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    STAGES: tl.constexpr,
):
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
    y_at = y_ptr + (sb * L + t) * E + e
    dz_at = dz_ptr + (sb * L + t) * E + e
    operands = (dt_at, C_at, z_at, starts_at, dout_at, y_at, adjoint_at, dz_at, A, bias, t, length, L)
    # Of the programs that meet an output those give dz that take it from left to right, or all where it is but one.
    ALL: tl.constexpr = HAS_Y and P == 1
    if UNROLL > 1:
        if rev == 1:
            _trace_chunk_back(*operands, 1, E, N, BLOCK, UNROLL, SOFTPLUS, HAS_Z, ALL, HAS_STARTS, STAGES, mask=mask)
        else:
            _trace_chunk_back(*operands, 0, E, N, BLOCK, UNROLL, SOFTPLUS, HAS_Z, HAS_Y, HAS_STARTS, STAGES, mask=mask)
    elif HAS_Y == ALL:
        _trace_chunk_back(*operands, rev, E, N, BLOCK, UNROLL, SOFTPLUS, HAS_Z, ALL, HAS_STARTS, STAGES, mask=mask)
    elif rev == 1:
        _trace_chunk_back(*operands, rev, E, N, BLOCK, UNROLL, SOFTPLUS, HAS_Z, False, HAS_STARTS, STAGES, mask=mask)
    else:
        _trace_chunk_back(*operands, rev, E, N, BLOCK, UNROLL, SOFTPLUS, HAS_Z, True, HAS_STARTS, STAGES, mask=mask)


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
    _adjoint_of_chunk(
        *(dt_ptr, A_ptr, C_ptr, z_ptr, bias_ptr, starts_ptr, dout_ptr, dout_ptr, adjoint_ptr, dout_ptr),
        *(S, batch, L, n_chunks, chunk_size, reverse, 2, E, N, BLOCK, UNROLL),
        *(SOFTPLUS, HAS_Z, False, HAS_BIAS, HAS_STARTS, STAGES),
    )


@triton.jit(do_not_specialize=SIZES)
def chunk_adjoint_dz_kernel(
    dt_ptr,
    A_ptr,
    C_ptr,
    z_ptr,
    bias_ptr,
    starts_ptr,
    dout_ptr,
    y_ptr,
    adjoint_ptr,
    dz_ptr,
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
    UNROLL: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """As chunk_adjoint, and dz from y before its gate, both (S·batch, L, E)."""
    _adjoint_of_chunk(
        *(dt_ptr, A_ptr, C_ptr, z_ptr, bias_ptr, starts_ptr, dout_ptr, y_ptr, adjoint_ptr, dz_ptr),
        *(S, batch, L, n_chunks, chunk_size, reverse, P, E, N, BLOCK, UNROLL),
        *(SOFTPLUS, True, True, HAS_BIAS, HAS_STARTS, STAGES),
    )


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
