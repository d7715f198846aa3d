"""Kernels of the selective scan's gradient, in the terms of scan_kernels.py.

backward  chunk_adjoint  each chunk with a zero end adjoint: the adjoint of its initial state
          chunk_carry    the same recurrence over chunks, in the opposite order
          scan_replay    each chunk forward again: dz, and every T-th state
          gather_pieces  B and C as scan_backward takes them
          scan_backward  each chunk with its true states and adjoint: the other gradients
          scatter_pieces dB and dC to where they belong
"""

import triton
import triton.language as tl

from caduceus.ops.triton.device import SIZES_AND_STRIDES
from caduceus.ops.triton.scan_kernels import (
    LOG2E,
    advance,
    load_floats,
    load_vectors,
    project,
    silu,
    stack,
    step_size,
    store_vectors,
    time_of_decay,
    zeros,
)


@triton.jit(do_not_specialize=SIZES_AND_STRIDES)
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
    E,
    n_chunks,
    chunk_size,
    reverse,
    dt_row,
    dt_token,
    C_row,
    C_token,
    z_row,
    z_token,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
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
    rev = (d + s + reverse) % 2
    e = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = e < E
    begin = chunk * chunk_size
    length = tl.minimum(L - begin, chunk_size).to(tl.int32)
    # Against the scan's direction: from the last step taken to the first.
    t = tl.where(rev == 1, begin, begin + length - 1)
    step = (2 * rev - 1).to(tl.int32)

    A = load_vectors(A_ptr + d * N * E + e, E, mask, N)
    bias = tl.load(bias_ptr + d * E + e, mask=mask, other=0.0).to(tl.float32) if HAS_BIAS else 0.0
    dt_ptr += row * dt_row + t * dt_token + e
    C_ptr += row * C_row + t * C_token
    z_ptr += sb * z_row + t * z_token + e
    dout_ptr += (sb * L + t) * E + e
    starts_ptr += b * L
    adjoint = zeros(N, BLOCK)
    for _ in range(length):
        dt = step_size(tl.load(dt_ptr, mask=mask, other=0.0), bias, SOFTPLUS)
        decay_time = time_of_decay(dt, starts_ptr, t + rev, L, HAS_STARTS)
        dy = tl.load(dout_ptr, mask=mask, other=0.0).to(tl.float32)
        if HAS_Z:
            dy *= silu(tl.load(z_ptr, mask=mask, other=0.0).to(tl.float32))
        C = load_floats(C_ptr, N)
        earlier = ()
        for n in tl.static_range(N):
            earlier = earlier + (tl.exp2(decay_time * A[n]) * (adjoint[n] + dy * C[n]),)
        adjoint = earlier
        t += step
        dt_ptr += step * dt_token
        C_ptr += step * C_token
        z_ptr += step * z_token
        dout_ptr += step * E
    store_vectors(adjoint_ptr + item * N * E + e, E, adjoint, mask, N)


@triton.jit(do_not_specialize=SIZES_AND_STRIDES)
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
    item0,
    P,
    S,
    batch,
    L,
    E,
    n_chunks,
    chunk_size,
    reverse,
    u_row,
    u_token,
    dt_row,
    dt_token,
    B_row,
    B_token,
    C_row,
    C_token,
    z_row,
    z_token,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    T: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_STARTS: tl.constexpr,
):
    """Forward again, from item0 on: dz, and kept (P, items, chunk_size / T, N, E), the states before T-th tokens."""
    local = tl.program_id(0).to(tl.int64)
    n_items = tl.num_programs(0)
    item = item0 + local
    chunk, sb = item % n_chunks, item // n_chunks
    b, s = sb % batch, sb // batch
    e = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = e < E
    begin = chunk * chunk_size
    length = tl.minimum(L - begin, chunk_size).to(tl.int32)
    starts_ptr += b * L
    for d in range(P):
        row = d * S * batch + sb
        rev = (d + s + reverse) % 2
        t = tl.where(rev == 1, begin + length - 1, begin)
        step = (1 - 2 * rev).to(tl.int32)
        A = load_vectors(A_ptr + d * N * E + e, E, mask, N)
        bias = tl.load(bias_ptr + d * E + e, mask=mask, other=0.0).to(tl.float32) if HAS_BIAS else 0.0
        D = tl.load(D_ptr + d * E + e, mask=mask, other=0.0).to(tl.float32) if HAS_D else 0.0
        h = load_vectors(state_ptr + (row * n_chunks + chunk) * N * E + e, E, mask, N)
        kept_at = kept_ptr + (d * n_items + local) * (chunk_size // T) * N * E + e
        u_at = u_ptr + row * u_row + t * u_token + e
        dt_at = dt_ptr + row * dt_row + t * dt_token + e
        B_at = B_ptr + row * B_row + t * B_token
        C_at = C_ptr + row * C_row + t * C_token
        z_at = z_ptr + sb * z_row + t * z_token + e
        dout_at = dout_ptr + (sb * L + t) * E + e
        dz_at = dz_ptr + (sb * L + t) * E + e
        for k in range(length):
            if k % T == 0:
                store_vectors(kept_at, E, h, mask, N)
                kept_at += N * E
            u = tl.load(u_at, mask=mask, other=0.0).to(tl.float32)
            dt = step_size(tl.load(dt_at, mask=mask, other=0.0), bias, SOFTPLUS)
            decay_time = time_of_decay(dt, starts_ptr, t + rev, L, HAS_STARTS)
            h = advance(h, A, decay_time, dt * u, B_at, N)
            if HAS_Z:
                y = project(h, C_at, D * u, N)
                z = tl.load(z_at, mask=mask, other=0.0).to(tl.float32)
                gate = 1.0 / (1.0 + tl.exp2(z * -LOG2E))
                dz = tl.load(dout_at, mask=mask, other=0.0).to(tl.float32) * y * gate * (1.0 + z * (1.0 - gate))
                if d > 0:
                    dz += tl.load(dz_at, mask=mask, other=0.0).to(tl.float32)
                tl.store(dz_at, dz.to(dz_ptr.dtype.element_ty), mask=mask)
            t += step
            u_at += step * u_token
            dt_at += step * dt_token
            B_at += step * B_token
            C_at += step * C_token
            z_at += step * z_token
            dout_at += step * E
            dz_at += step * E
        tl.debug_barrier()


@triton.jit(do_not_specialize=SIZES_AND_STRIDES)
def scan_backward_kernel(
    u_ptr,
    dt_ptr,
    A_ptr,
    D_ptr,
    z_ptr,
    bias_ptr,
    starts_ptr,
    dout_ptr,
    adjoint_ptr,
    kept_ptr,
    pieces_ptr,
    du_ptr,
    ddt_ptr,
    dA_ptr,
    dpieces_ptr,
    dD_ptr,
    dbias_ptr,
    item0,
    P,
    S,
    batch,
    L,
    E,
    n_chunks,
    chunk_size,
    reverse,
    u_row,
    u_token,
    dt_row,
    dt_token,
    z_row,
    z_token,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    T: tl.constexpr,
    GROUP: tl.constexpr,
    LOG_COLUMNS: tl.constexpr,
    IN_FP32: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_STARTS: tl.constexpr,
):
    """All gradients but dz, of the items from item0 on; a program takes one chunk of one row.

    The chunk is taken in pieces of T tokens from the end, one state after the other: the T states that follow from a
    kept one fit in registers. `adjoint` holds the running adjoint, and the sums go to dA (P, items, N, E), dD and
    dbias (P, items, E), and dpieces (channel blocks, P, items, chunk_size / T, N, 2 T), those of GROUP states at once.
    """
    local = tl.program_id(0).to(tl.int64)
    n_items = tl.num_programs(0) // P
    d = local // n_items
    item = item0 + local % n_items
    chunk, sb = item % n_chunks, item // n_chunks
    b, s = sb % batch, sb // batch
    row = d * S * batch + sb
    rev = (d + s + reverse) % 2
    e = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = e < E
    begin = chunk * chunk_size
    length = tl.minimum(L - begin, chunk_size).to(tl.int32)
    first = tl.where(rev == 1, begin + length - 1, begin)
    # Bases in int64; steps within a chunk fit in int32, which saves registers.
    step = (1 - 2 * rev).to(tl.int32)
    bias = tl.load(bias_ptr + d * E + e, mask=mask, other=0.0).to(tl.float32) if HAS_BIAS else 0.0
    D = tl.load(D_ptr + d * E + e, mask=mask, other=0.0).to(tl.float32) if HAS_D else 0.0
    A_at = A_ptr + d * N * E
    u_at = u_ptr + row * u_row + first * u_token
    dt_at = dt_ptr + row * dt_row + first * dt_token
    z_at = z_ptr + sb * z_row + first * z_token
    dout_at = dout_ptr + (sb * L + first) * E
    starts_at = starts_ptr + b * L
    kept_at = kept_ptr + local * (chunk_size // T) * N * E
    adjoint_at = adjoint_ptr + (row * n_chunks + chunk) * N * E
    du_at = du_ptr + (row * L + first) * E
    ddt_at = ddt_ptr + (row * L + first) * E
    dA_at = dA_ptr + local * N * E
    pieces = chunk_size // T
    pieces_at = pieces_ptr + local * pieces * N * 2 * T
    dpieces_at = dpieces_ptr + (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + local) * pieces * N * 2 * T

    sum_dD = tl.zeros([BLOCK], tl.float32)
    sum_dbias = tl.zeros([BLOCK], tl.float32)
    n_pieces = (length + T - 1) // T
    for piece in range(n_pieces):
        k0 = (n_pieces - 1 - piece) * T
        # Tokens past the end have u = dt = dy = 0, and so change nothing.
        decay_times = ()
        dtus = ()
        dys = ()
        u_k = u_at + k0 * step * u_token + e
        dt_k = dt_at + k0 * step * dt_token + e
        z_k = z_at + k0 * step * z_token + e
        dout_k = dout_at + k0 * step * E + e
        for i in tl.static_range(T):
            valid = e < tl.where(k0 + i < length, E, 0)
            u = tl.load(u_k, mask=valid, other=0.0).to(tl.float32)
            dt = step_size(tl.load(dt_k, mask=valid, other=0.0), bias, SOFTPLUS)
            dy = tl.load(dout_k, mask=valid, other=0.0).to(tl.float32)
            if HAS_Z:
                dy *= silu(tl.load(z_k, mask=valid, other=0.0).to(tl.float32))
            position = first + tl.minimum(k0 + i, length - 1) * step + rev
            decay_time = time_of_decay(dt, starts_at, position, L, HAS_STARTS)
            decay_times = decay_times + (tl.where(k0 + i < length, decay_time, 0.0),)
            dtus = dtus + (dt * u,)
            dys = dys + (dy,)
            u_k += step * u_token
            dt_k += step * dt_token
            z_k += step * z_token
            dout_k += step * E
        ddtus = zeros(T, BLOCK)  # gradient of dt u: sum over states of adjoint · B
        dlogs = zeros(T, BLOCK)  # gradient of dt through the decay: sum of adjoint · exp(dt A) h · A
        A_n = A_at + e
        kept_n = kept_at + k0 // T * N * E + e
        adjoint_n = adjoint_at + e
        dA_n = dA_at + e
        pieces_n = pieces_at + k0 // T * N * 2 * T
        sums_n = dpieces_at + k0 // T * N * 2 * T + tl.arange(0, GROUP * 2 * T)
        for _ in range(N // GROUP):
            columns = ()
            for _ in tl.static_range(GROUP):
                A = tl.load(A_n, mask=mask, other=0.0)
                h = tl.load(kept_n, mask=mask, other=0.0)
                adjoint = tl.load(adjoint_n, mask=mask, other=0.0)
                dA = tl.load(dA_n, mask=mask, other=0.0)
                BC = load_floats(pieces_n, 2 * T)
                decays = ()
                decayed = ()
                states = ()
                for i in tl.static_range(T):
                    decay = tl.exp2(decay_times[i] * A)
                    before = decay * h
                    h = before + dtus[i] * BC[i]
                    decays = decays + (decay,)
                    decayed = decayed + (before,)
                    states = states + (h,)
                dBs = ()
                dCs = ()
                more_ddtus = ()
                more_dlogs = ()
                for i in tl.static_range(T - 1, -1, -1):
                    adjoint += dys[i] * BC[T + i]
                    dlog = adjoint * decayed[i]
                    dA += dlog * decay_times[i]
                    dBs = (adjoint * dtus[i],) + dBs
                    dCs = (dys[i] * states[i],) + dCs
                    more_ddtus = (ddtus[i] + adjoint * BC[i],) + more_ddtus
                    more_dlogs = (dlogs[i] + dlog * A,) + more_dlogs
                    adjoint *= decays[i]
                ddtus = more_ddtus
                dlogs = more_dlogs
                tl.store(adjoint_n, adjoint, mask=mask)
                tl.store(dA_n, dA, mask=mask)
                columns = columns + dBs + dCs
                A_n += E
                kept_n += E
                adjoint_n += E
                dA_n += E
                pieces_n += 2 * T
            # The sum over channels as ones · tile on the tensor cores: far fewer instructions than shuffles.
            tile = stack(columns, LOG_COLUMNS, BLOCK)
            ones = tl.full([16, BLOCK], 1.0, tl.float32)
            if IN_FP32:
                # The 11 leading bits of TF32, then the rest: as exact as the three passes of tf32x3, one of which is
                # for the other operand's rest, and ones have none. With three the kernel would spill.
                leading = (tile.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
                sums = tl.dot(ones, leading, input_precision="tf32")
                sums = tl.dot(ones, tile - leading, sums, input_precision="tf32")
            else:
                # One TF32 pass rounds less than the 16-bit gradient that follows it.
                sums = tl.dot(ones, tile, input_precision="tf32")
            at = tl.broadcast_to(sums_n[None, :], sums.shape)
            tl.store(at, sums, mask=tl.broadcast_to((tl.arange(0, 16) == 0)[:, None], sums.shape))
            sums_n += GROUP * 2 * T
        u_k = u_at + k0 * step * u_token + e
        dt_k = dt_at + k0 * step * dt_token + e
        out_k = k0 * step * E + e
        for i in tl.static_range(T):
            valid = e < tl.where(k0 + i < length, E, 0)
            u = tl.load(u_k, mask=valid, other=0.0).to(tl.float32)
            x = tl.load(dt_k, mask=valid, other=0.0).to(tl.float32) + bias
            ddt = ddtus[i] * u + dlogs[i] * (1 / LOG2E)
            dt = decay_times[i]
            if HAS_STARTS:
                dt = step_size(x, 0.0, SOFTPLUS)
            if SOFTPLUS:
                ddt *= 1.0 / (1.0 + tl.exp2(x * -LOG2E))
            sum_dbias += tl.where(valid, ddt, 0.0)
            sum_dD += dys[i] * u
            tl.store(du_at + out_k, (ddtus[i] * dt + D * dys[i]).to(du_ptr.dtype.element_ty), mask=valid)
            tl.store(ddt_at + out_k, ddt.to(ddt_ptr.dtype.element_ty), mask=valid)
            u_k += step * u_token
            dt_k += step * dt_token
            out_k += step * E
    tl.store(dD_ptr + local * E + e, sum_dD, mask=mask)
    tl.store(dbias_ptr + local * E + e, sum_dbias, mask=mask)
