"""Kernels of the selective scan: a thread holds the N states of one channel, or of two; time is cut into chunks.

A *row* is one (direction, stream, batch element). It is cut into chunks of chunk_size tokens, which run in parallel:

    forward   chunk_state    each chunk from a zero state: its end state and the sum of its dt
              chunk_carry    across chunks: decay over a chunk is exp(A · sum dt), so this is one step per chunk
              scan_forward   each chunk from its true initial state: the outputs

The way back is in scan_adjoint_kernels.py. Tensors are contiguous and E is compiled in, as is the direction where loops
are unrolled, so that the next token is at a constant offset. Offsets of rows and tokens are products in int64, so no
tensor is too large. Sums over channels and chunks go to per-block buffers that are added up afterwards: no atomics, the
same bits every run.
"""

import triton
import triton.language as tl

from caduceus.ops.triton.device import SIZES
from caduceus.ops.triton.scan_arithmetic import (
    advance,
    load,
    load_parameter,
    load_vectors,
    project,
    silu,
    step_size,
    store_vectors,
    time_of_decay,
    zeros,
)


@triton.jit
def _add_up_chunk(
    u_ptr,
    dt_ptr,
    B_ptr,
    starts_ptr,
    state_ptr,
    sum_dt_ptr,
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
    HAS_STARTS: tl.constexpr,
    mask,
):
    step = 1 - 2 * rev
    h = zeros(N, BLOCK)
    sum_dt = tl.zeros([BLOCK], tl.float32)
    for _ in range(0, length, UNROLL):
        for i in tl.static_range(UNROLL):
            u = load(u_ptr + i * step * E, mask)
            dt = step_size(load(dt_ptr + i * step * E, mask), bias, SOFTPLUS)
            decay_time = time_of_decay(dt, starts_ptr, t + i * step + rev, L, HAS_STARTS)
            h = advance(h, A, decay_time, dt * u, B_ptr + i * step * N, N)
            sum_dt += decay_time
        t += UNROLL * step
        u_ptr += UNROLL * step * E
        dt_ptr += UNROLL * step * E
        B_ptr += UNROLL * step * N
    store_vectors(state_ptr, E, h, mask, N)
    tl.store(sum_dt_ptr, sum_dt, mask=mask)


@triton.jit(do_not_specialize=SIZES)
def chunk_state_kernel(
    u_ptr,
    dt_ptr,
    A_ptr,
    B_ptr,
    bias_ptr,
    starts_ptr,
    state_ptr,
    sum_dt_ptr,
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
    HAS_BIAS: tl.constexpr,
    HAS_STARTS: tl.constexpr,
):
    """State (rows, chunks, N, E) at the end of each chunk begun from zero, and sum dt (rows, chunks, E)."""
    item = tl.program_id(0).to(tl.int64)
    chunk, row = item % n_chunks, item // n_chunks
    b, s, d = row % batch, row // batch % S, row // batch // S
    rev = ((d + s + reverse) % 2).to(tl.int32)
    e = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = None if E % BLOCK == 0 else e < E
    begin = chunk * chunk_size
    length = tl.minimum(L - begin, chunk_size).to(tl.int32)
    t = tl.where(rev == 1, begin + length - 1, begin)

    A = load_vectors(A_ptr + d * N * E + e, E, mask, N)
    bias = load_parameter(bias_ptr, d, e, mask, E, HAS_BIAS)
    u_at = u_ptr + (row * L + t) * E + e
    dt_at = dt_ptr + (row * L + t) * E + e
    B_at = B_ptr + (row * L + t) * N
    starts_at = starts_ptr + b * L
    state_at = state_ptr + item * N * E + e
    sum_dt_at = sum_dt_ptr + item * E + e
    # Where a turn of the loop takes several tokens, each direction has its own, in which their offsets are constants.
    operands = (u_at, dt_at, B_at, starts_at, state_at, sum_dt_at, A, bias, t, length, L)
    if UNROLL == 1:
        _add_up_chunk(*operands, rev, E, N, BLOCK, UNROLL, SOFTPLUS, HAS_STARTS, mask=mask)
    elif rev == 1:
        _add_up_chunk(*operands, 1, E, N, BLOCK, UNROLL, SOFTPLUS, HAS_STARTS, mask=mask)
    else:
        _add_up_chunk(*operands, 0, E, N, BLOCK, UNROLL, SOFTPLUS, HAS_STARTS, mask=mask)


@triton.jit(do_not_specialize=SIZES)
def chunk_carry_kernel(
    state_ptr,
    sum_dt_ptr,
    A_ptr,
    first_ptr,
    last_ptr,
    S,
    batch,
    n_chunks,
    descending,
    E: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    AHEAD: tl.constexpr,
    HAS_FIRST: tl.constexpr,
):
    """In `state` (rows, chunks, N, E), replace what each chunk adds by what it receives; the last carry goes to `last`.

    carry_0 = first (rows, N, E), or zero; carry_{c+1} = exp(A sum_dt_c) carry_c + state_c. Chunks are taken in the
    row's scan direction, or against it where `descending`.
    """
    row = tl.program_id(0).to(tl.int64)
    s, d = row // batch % S, row // batch // S
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = j < E * N
    A = tl.load(A_ptr + d * N * E + j, mask=mask, other=0.0)
    carry = tl.zeros([BLOCK], tl.float32)
    if HAS_FIRST:
        carry += tl.load(first_ptr + row * N * E + j, mask=mask, other=0.0)
    rev = (d + s + descending) % 2
    item = row * n_chunks + tl.where(rev == 1, n_chunks - 1, 0)
    step = 1 - 2 * rev
    # The loads of AHEAD chunks are issued together: this loop waits for memory, not for arithmetic.
    for done in range(0, n_chunks, AHEAD):
        states = ()
        decays = ()
        for k in tl.static_range(AHEAD):
            valid = j < tl.where(n_chunks > done + k, E * N, 0)
            states = states + (tl.load(state_ptr + (item + k * step) * N * E + j, mask=valid, other=0.0),)
            decays = decays + (tl.load(sum_dt_ptr + (item + k * step) * E + j % E, mask=valid, other=0.0),)
        for k in tl.static_range(AHEAD):
            valid = j < tl.where(n_chunks > done + k, E * N, 0)
            tl.store(state_ptr + (item + k * step) * N * E + j, carry, mask=valid)
            carry = tl.exp2(A * decays[k]) * carry + states[k]
        item += AHEAD * step
    tl.store(last_ptr + row * N * E + j, carry, mask=mask)


@triton.jit
def _scan_chunk(
    u_ptr,
    dt_ptr,
    B_ptr,
    C_ptr,
    z_ptr,
    starts_ptr,
    out_ptr,
    h,
    A,
    D,
    bias,
    e,
    t,
    length,
    L,
    adds,
    gates,
    rev,
    E: tl.constexpr,
    N: tl.constexpr,
    UNROLL: tl.constexpr,
    HAS_Z: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    mask,
):
    """Where it `adds`, to what is in out; where it `gates`, the sum is final."""
    step = 1 - 2 * rev
    for _ in range(0, length, UNROLL):
        for i in tl.static_range(UNROLL):
            at = i * step * E + e
            u = load(u_ptr + at, mask)
            dt = step_size(load(dt_ptr + at, mask), bias, SOFTPLUS)
            decay_time = time_of_decay(dt, starts_ptr, t + i * step + rev, L, HAS_STARTS)
            h = advance(h, A, decay_time, dt * u, B_ptr + i * step * N, N)
            y = project(h, C_ptr + i * step * N, D * u, N)
            if adds:
                y += load(out_ptr + at, mask)
            if HAS_Z and gates:
                y *= silu(load(z_ptr + at, mask))
            tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=mask)
        t += UNROLL * step
        u_ptr += UNROLL * step * E
        dt_ptr += UNROLL * step * E
        B_ptr += UNROLL * step * N
        C_ptr += UNROLL * step * N
        z_ptr += UNROLL * step * E
        out_ptr += UNROLL * step * E


@triton.jit(do_not_specialize=SIZES)
def scan_forward_kernel(
    u_ptr,
    dt_ptr,
    A_ptr,
    B_ptr,
    C_ptr,
    D_ptr,
    z_ptr,
    bias_ptr,
    starts_ptr,
    state_ptr,
    out_ptr,
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
    HAS_D: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_STARTS: tl.constexpr,
):
    """out (S·batch, L, E): the sum over directions of the scan of each chunk from its true state, gated by silu(z).

    A program takes one chunk of one stream in both directions, so that the first direction's partial sum waits in
    `out` while it is still in cache.
    """
    item = tl.program_id(0).to(tl.int64)
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
        u_at = u_ptr + (row * L + t) * E
        dt_at = dt_ptr + (row * L + t) * E
        B_at = B_ptr + (row * L + t) * N
        C_at = C_ptr + (row * L + t) * N
        z_at = z_ptr + (sb * L + t) * E
        out_at = out_ptr + (sb * L + t) * E
        operands = (u_at, dt_at, B_at, C_at, z_at, starts_at, out_at, h, A, D, bias, e, t, length, L, d > 0, d == P - 1)
        if UNROLL == 1:
            _scan_chunk(*operands, rev, E, N, UNROLL, HAS_Z, SOFTPLUS, HAS_STARTS, mask=mask)
        elif rev == 1:
            _scan_chunk(*operands, 1, E, N, UNROLL, HAS_Z, SOFTPLUS, HAS_STARTS, mask=mask)
        else:
            _scan_chunk(*operands, 0, E, N, UNROLL, HAS_Z, SOFTPLUS, HAS_STARTS, mask=mask)
        # Threads may have other channels where they load than where they store.
        tl.debug_barrier()
