"""Kernels of the selective scan's backward pass, in the terms of scan_kernels.py:

chunk_adjoint   each chunk with a zero end adjoint: the adjoint of its initial state
chunk_carry     the same recurrence over chunks, in the opposite order
scan_replay     each chunk forward again: dz, and every T-th state
gather_pieces   B and C as scan_backward takes them
scan_backward   each chunk with its true states and adjoint: the other gradients
scatter_pieces  dB and dC to where they belong

Where scan_replay takes all chunks at once it comes first, and does with the same exponentials what chunk_adjoint would.
"""

import triton
import triton.language as tl

from caduceus.ops.triton.device import SIZES
from caduceus.ops.triton.scan_arithmetic import (
    LOG2E,
    advance,
    advance_and_trace,
    load,
    load_floats,
    load_parameter,
    load_vectors,
    ones,
    project,
    silu,
    step_size,
    store_vectors,
    time_of_decay,
    zeros,
)


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
    mask,
):
    """Against the scan's direction: from the last step taken, at t, to the first."""
    step = 2 * rev - 1
    adjoint = zeros(N, BLOCK)
    for _ in range(0, length, UNROLL):
        for i in tl.static_range(UNROLL):
            dt = step_size(load(dt_ptr + i * step * E, mask), bias, SOFTPLUS)
            decay_time = time_of_decay(dt, starts_ptr, t + i * step + rev, L, HAS_STARTS)
            dy = load(dout_ptr + i * step * E, mask)
            if HAS_Z:
                dy *= silu(load(z_ptr + i * step * E, mask))
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
        _trace_chunk_back(*operands, rev, E, N, BLOCK, UNROLL, SOFTPLUS, HAS_Z, HAS_STARTS, mask=mask)
    elif rev == 1:
        _trace_chunk_back(*operands, 1, E, N, BLOCK, UNROLL, SOFTPLUS, HAS_Z, HAS_STARTS, mask=mask)
    else:
        _trace_chunk_back(*operands, 0, E, N, BLOCK, UNROLL, SOFTPLUS, HAS_Z, HAS_STARTS, mask=mask)


@triton.jit
def _replay_chunk(
    u_ptr,
    dt_ptr,
    B_ptr,
    C_ptr,
    z_ptr,
    starts_ptr,
    dout_ptr,
    kept_ptr,
    dz_ptr,
    adjoint_ptr,
    at,
    out_at,
    h,
    A,
    D,
    bias,
    e,
    t,
    length,
    L,
    adds,
    rev,
    E: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    T: tl.constexpr,
    UNROLL: tl.constexpr,
    TRACE: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    mask,
):
    """Where it `adds`, to what is in dz."""
    step = 1 - 2 * rev
    if TRACE:
        product = ones(N, BLOCK)
        adjoint = zeros(N, BLOCK)
    for k0 in range(0, length, T):
        store_vectors(kept_ptr + e, E, h, mask, N)
        kept_ptr += N * E
        for _ in range(0, tl.minimum(length - k0, T), UNROLL):
            for i in tl.static_range(UNROLL):
                u = load(u_ptr + (at + i * step * E) + e, mask)
                dt = step_size(load(dt_ptr + (at + i * step * E) + e, mask), bias, SOFTPLUS)
                decay_time = time_of_decay(dt, starts_ptr, t + i * step + rev, L, HAS_STARTS)
                if HAS_Z:
                    z = load(z_ptr + (out_at + i * step * E) + e, mask)
                    gate = 1.0 / (1.0 + tl.exp2(z * -LOG2E))
                if HAS_Z or TRACE:
                    dout = load(dout_ptr + (out_at + i * step * E) + e, mask)
                if TRACE:
                    dy = dout * (z * gate) if HAS_Z else dout
                    h, product, adjoint, y = advance_and_trace(
                        *(h, product, adjoint, A, decay_time, dt * u, dy, B_ptr + i * step * N, C_ptr + i * step * N),
                        *(D * u, N),
                    )
                else:
                    h = advance(h, A, decay_time, dt * u, B_ptr + i * step * N, N)
                    if HAS_Z:
                        y = project(h, C_ptr + i * step * N, D * u, N)
                if HAS_Z:
                    dz = dout * y * gate * (1.0 + z * (1.0 - gate))
                    dz_at = dz_ptr + (out_at + i * step * E) + e
                    if adds:
                        dz += load(dz_at, mask)
                    tl.store(dz_at, dz.to(dz_ptr.dtype.element_ty), mask=mask)
            t += UNROLL * step
            at += UNROLL * step * E
            out_at += UNROLL * step * E
            B_ptr += UNROLL * step * N
            C_ptr += UNROLL * step * N
    if TRACE:
        store_vectors(adjoint_ptr + e, E, adjoint, mask, N)


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
    kept_ptr,
    dz_ptr,
    adjoint_ptr,
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
    TRACE: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_STARTS: tl.constexpr,
):
    """Forward again, from item0 on: dz, and kept (P, items, chunk_size / T, N, E), the states before T-th tokens.

    With TRACE also the adjoint (rows, chunks, N, E) of each chunk's initial state, from the chunk's own outputs alone.
    """
    local = tl.program_id(0).to(tl.int64)
    n_items = tl.num_programs(0)
    item = item0 + local
    chunk, sb = item % n_chunks, item // n_chunks
    b, s = sb % batch, sb // batch
    e = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = None if E % BLOCK == 0 else e < E
    begin = chunk * chunk_size
    length = tl.minimum(L - begin, chunk_size).to(tl.int32)
    starts_at = starts_ptr + b * L
    for d in range(P):
        row = d * S * batch + sb
        rev = ((d + s + reverse) % 2).to(tl.int32)
        t = tl.where(rev == 1, begin + length - 1, begin)
        A = load_vectors(A_ptr + d * N * E + e, E, mask, N)
        bias = load_parameter(bias_ptr, d, e, mask, E, HAS_BIAS)
        D = load_parameter(D_ptr, d, e, mask, E, HAS_D)
        h = load_vectors(state_ptr + (row * n_chunks + chunk) * N * E + e, E, mask, N)
        kept_at = kept_ptr + (d * n_items + local) * (chunk_size // T) * N * E
        adjoint_at = adjoint_ptr + (row * n_chunks + chunk) * N * E
        at = (row * L + t) * E
        out_at = (sb * L + t) * E
        B_at = B_ptr + (row * L + t) * N
        C_at = C_ptr + (row * L + t) * N
        operands = (u_ptr, dt_ptr, B_at, C_at, z_ptr, starts_at, dout_ptr, kept_at, dz_ptr, adjoint_at)
        operands += (at, out_at, h, A, D, bias, e, t, length, L, d > 0)
        if UNROLL == 1 and not TRACE:
            _replay_chunk(*operands, rev, E, N, BLOCK, T, UNROLL, TRACE, SOFTPLUS, HAS_Z, HAS_STARTS, mask=mask)
        elif rev == 1:
            _replay_chunk(*operands, 1, E, N, BLOCK, T, UNROLL, TRACE, SOFTPLUS, HAS_Z, HAS_STARTS, mask=mask)
        else:
            _replay_chunk(*operands, 0, E, N, BLOCK, T, UNROLL, TRACE, SOFTPLUS, HAS_Z, HAS_STARTS, mask=mask)
        # Threads may have other channels where they load than where they store.
        tl.debug_barrier()
