"""Kernels of the selective scan: a thread holds the N states of one channel, or of two; time is cut into chunks.

A *row* is one (direction, stream, batch element). It is cut into chunks of chunk_size tokens, which run in parallel:

    forward   chunk_state    each chunk from a zero state: its end state and the sum of its dt
              chunk_carry    across chunks: decay over a chunk is exp(A · sum dt), so this is one step per chunk
              scan_forward   each chunk from its true initial state: the outputs, or what the way back needs of them

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
    gate_gradient,
    load_parameter,
    load_turn,
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
    STAGES: tl.constexpr,
    mask,
):
    step = 1 - 2 * rev
    h = zeros(N, BLOCK)
    sum_dt = tl.zeros([BLOCK], tl.float32)
    for _ in tl.range(0, length, UNROLL, num_stages=STAGES):
        us = load_turn(u_ptr, step * E, 0, mask, UNROLL)
        xs = load_turn(dt_ptr, step * E, 0, mask, UNROLL)
        for i in tl.static_range(UNROLL):
            dt = step_size(xs[i], bias, SOFTPLUS)
            decay_time = time_of_decay(dt, starts_ptr, t + i * step + rev, L, HAS_STARTS)
            h = advance(h, A, decay_time, dt * us[i].to(tl.float32), B_ptr + i * step * N, N)
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
    STAGES: tl.constexpr,
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
        _add_up_chunk(*operands, rev, E, N, BLOCK, UNROLL, SOFTPLUS, HAS_STARTS, STAGES, mask=mask)
    elif rev == 1:
        _add_up_chunk(*operands, 1, E, N, BLOCK, UNROLL, SOFTPLUS, HAS_STARTS, STAGES, mask=mask)
    else:
        _add_up_chunk(*operands, 0, E, N, BLOCK, UNROLL, SOFTPLUS, HAS_STARTS, STAGES, mask=mask)


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
def _scan_turn(
    u_ptr,
    dt_ptr,
    B_ptr,
    C_ptr,
    z_ptr,
    side_ptr,
    starts_ptr,
    out_ptr,
    h,
    A,
    D,
    bias,
    e,
    t,
    L,
    rev,
    E: tl.constexpr,
    N: tl.constexpr,
    UNROLL: tl.constexpr,
    ADDS: tl.constexpr,
    GATES: tl.constexpr,
    KEEPS: tl.constexpr,
    REPLAYS: tl.constexpr,
    HAS_Z: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    mask,
):
    """The state after UNROLL tokens, whose outputs are stored; dz instead where the scan REPLAYS.

    `side` is then dout, and where a scan KEEPS states and does not replay, it gets the outputs before their gate.
    """
    step = 1 - 2 * rev
    us = load_turn(u_ptr, step * E, e, mask, UNROLL)
    xs = load_turn(dt_ptr, step * E, e, mask, UNROLL)
    if ADDS and (HAS_Z or not REPLAYS):
        ys = load_turn(out_ptr, step * E, e, mask, UNROLL)
    if GATES and HAS_Z:
        zs = load_turn(z_ptr, step * E, e, mask, UNROLL)
        if REPLAYS:
            douts = load_turn(side_ptr, step * E, e, mask, UNROLL)
    for i in tl.static_range(UNROLL):
        u = us[i].to(tl.float32)
        dt = step_size(xs[i], bias, SOFTPLUS)
        decay_time = time_of_decay(dt, starts_ptr, t + i * step + rev, L, HAS_STARTS)
        h = advance(h, A, decay_time, dt * u, B_ptr + i * step * N, N)
        if HAS_Z or not REPLAYS:
            y = project(h, C_ptr + i * step * N, D * u, N)
            if ADDS:
                y += ys[i].to(tl.float32)
            if GATES and HAS_Z:
                z = zs[i].to(tl.float32)
                if REPLAYS:
                    y = gate_gradient(y, douts[i].to(tl.float32), z)
                else:
                    if KEEPS:
                        tl.store(side_ptr + i * step * E + e, y, mask=mask)
                    y *= silu(z)
            tl.store(out_ptr + i * step * E + e, y.to(out_ptr.dtype.element_ty), mask=mask)
    return h


@triton.jit
def _scan_chunk(
    u_ptr,
    dt_ptr,
    B_ptr,
    C_ptr,
    z_ptr,
    side_ptr,
    starts_ptr,
    out_ptr,
    kept_ptr,
    h,
    A,
    D,
    bias,
    e,
    t,
    length,
    L,
    rev,
    E: tl.constexpr,
    N: tl.constexpr,
    T: tl.constexpr,
    UNROLL: tl.constexpr,
    ADDS: tl.constexpr,
    GATES: tl.constexpr,
    KEEPS: tl.constexpr,
    REPLAYS: tl.constexpr,
    HAS_Z: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    mask,
):
    """Where it ADDS, to what is in out; where it GATES, the sum is final."""
    step = 1 - 2 * rev
    for k0 in range(0, length, T):
        if KEEPS:
            store_vectors(kept_ptr + e, E, h, mask, N)
            kept_ptr += N * E
        for _ in range(0, tl.minimum(length - k0, T), UNROLL):
            h = _scan_turn(
                *(u_ptr, dt_ptr, B_ptr, C_ptr, z_ptr, side_ptr, starts_ptr, out_ptr, h, A, D, bias, e, t, L, rev),
                *(E, N, UNROLL, ADDS, GATES, KEEPS, REPLAYS, HAS_Z, SOFTPLUS, HAS_STARTS),
                mask=mask,
            )
            t += UNROLL * step
            u_ptr += UNROLL * step * E
            dt_ptr += UNROLL * step * E
            B_ptr += UNROLL * step * N
            C_ptr += UNROLL * step * N
            z_ptr += UNROLL * step * E
            side_ptr += UNROLL * step * E
            out_ptr += UNROLL * step * E


@triton.jit
def scan_item(
    u_ptr,
    dt_ptr,
    A_ptr,
    B_ptr,
    C_ptr,
    D_ptr,
    z_ptr,
    bias_ptr,
    starts_ptr,
    side_ptr,
    state_ptr,
    out_ptr,
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
    KEEPS: tl.constexpr,
    REPLAYS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_STARTS: tl.constexpr,
):
    """One chunk of one stream in both directions: the first one's partial sum waits in `out` while it is in cache.

    Parameter direction 0 comes first on every strand, so that a strand and its reverse complement give the same bits.
    What adds, what gates and the way of each loop are known to the compiler, and no load waits behind a branch.
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
    for d in tl.static_range(P):
        rev = ((d + s + reverse) % 2).to(tl.int32)
        row = d * S * batch + sb
        t = begin + rev * (length - 1)
        A = load_vectors(A_ptr + d * N * E + e, E, mask, N)
        bias = load_parameter(bias_ptr, d, e, mask, E, HAS_BIAS)
        D = load_parameter(D_ptr, d, e, mask, E, HAS_D)
        h = load_vectors(state_ptr + (row * n_chunks + chunk) * N * E + e, E, mask, N)
        at = (row * L + t) * E
        out_at = (sb * L + t) * E
        BC_at = (row * L + t) * N
        kept_at = kept_ptr + (d * n_items + local) * (chunk_size // T) * N * E
        inputs = (u_ptr + at, dt_ptr + at, B_ptr + BC_at, C_ptr + BC_at, z_ptr + out_at, side_ptr + out_at, starts_at)
        operands = (out_ptr + out_at, kept_at, h, A, D, bias, e, t, length, L)
        if rev == 1:
            _scan_chunk(
                *inputs,
                *operands,
                1,
                E,
                N,
                T,
                UNROLL,
                d == 1,
                d == P - 1,
                KEEPS,
                REPLAYS,
                HAS_Z,
                SOFTPLUS,
                HAS_STARTS,
                mask=mask,
            )
        else:
            _scan_chunk(
                *inputs,
                *operands,
                0,
                E,
                N,
                T,
                UNROLL,
                d == 1,
                d == P - 1,
                KEEPS,
                REPLAYS,
                HAS_Z,
                SOFTPLUS,
                HAS_STARTS,
                mask=mask,
            )
        if d == 0:  # threads may have other channels where they load than where they store
            tl.debug_barrier()


ALL = tl.constexpr(2**30)
"""More tokens than a chunk has."""


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
    """out (S·batch, L, E): the sum over directions of the scan of each chunk from its true state, gated by silu(z)."""
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
            out_ptr,
            state_ptr,
            out_ptr,
            state_ptr,
        ),
        *(0, S, batch, L, n_chunks, chunk_size, reverse, P, E, N, BLOCK, ALL, UNROLL),
        *(False, False, SOFTPLUS, HAS_D, HAS_Z, HAS_BIAS, HAS_STARTS),
    )


@triton.jit(do_not_specialize=SIZES)
def scan_keep_kernel(
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
    y_ptr,
    kept_ptr,
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
    """As scan_forward, and what scan_replay finds but for dz: y before its gate (S·batch, L, E), and kept (P, items,
    chunk_size / T, N, E), the states before T-th tokens."""
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
            y_ptr,
            state_ptr,
            out_ptr,
            kept_ptr,
        ),
        *(0, S, batch, L, n_chunks, chunk_size, reverse, P, E, N, BLOCK, T, UNROLL),
        *(True, False, SOFTPLUS, HAS_D, HAS_Z, HAS_BIAS, HAS_STARTS),
    )
