"""The kernel that computes all gradients of the selective scan but dz, of chunks whose states and adjoints are known.

scan_adjoint_kernels.py has the passes before it, scan_pieces_kernels.py what lays out its operands,
scan_sums_kernels.py the sums over channels.
"""

import triton
import triton.language as tl

from caduceus.ops.triton.device import SIZES
from caduceus.ops.triton.scan_arithmetic import (
    LOG2E,
    load,
    load_floats,
    load_parameter,
    silu,
    step_size,
    time_of_decay,
    zeros,
)
from caduceus.ops.triton.scan_sums_kernels import selects_of_warp, sum_over_channels, sum_over_warp

STATES = tl.constexpr(2)
"""States whose loads stand together where sums stay in a warp: with 1 the kernel takes 120 registers, with 2 128."""


@triton.jit
def _load_tokens(ptr, stride: tl.constexpr, count, e, mask, E: tl.constexpr, T: tl.constexpr, WHOLE: tl.constexpr):
    """T tokens of channels e, of which there are `count`, all where pieces are WHOLE; zero for the others."""
    tokens = ()
    for i in tl.static_range(T):
        if WHOLE:
            tokens = tokens + (load(ptr + i * stride + e, mask),)
        else:
            tokens = tokens + (load(ptr + i * stride + e, e < tl.where(i < count, E, 0)),)
    return tokens


@triton.jit
def _gated(values, gates, T: tl.constexpr):
    gated = ()
    for i in tl.static_range(T):
        gated = gated + (values[i] * silu(gates[i]),)
    return gated


@triton.jit
def _store_tokens(
    ptr, stride: tl.constexpr, tokens, count, e, mask, E: tl.constexpr, T: tl.constexpr, WHOLE: tl.constexpr
):
    for i in tl.static_range(T):
        if WHOLE:
            tl.store(ptr + i * stride + e, tokens[i].to(ptr.dtype.element_ty), mask=mask)
        else:
            use = e < tl.where(i < count, E, 0)
            tl.store(ptr + i * stride + e, tokens[i].to(ptr.dtype.element_ty), mask=use)


@triton.jit
def _state_gradients(h, A, adjoint, dA, BC_ptr, decay_times, dtus, dys, ddtus, dlogs, T: tl.constexpr):
    """One state over a piece: forward from h, then back. Returns (adjoint, dA, ddtus, dlogs, terms of dB, then dC)."""
    BC = load_floats(BC_ptr, 2 * T)
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
    return adjoint, dA, more_ddtus, more_dlogs, dBs + dCs


@triton.jit
def _load_states(ptr, e, mask, E: tl.constexpr, COUNT: tl.constexpr):
    """Adjacent states. As sums of this form addresses take the fewest registers."""
    states = ()
    for g in tl.static_range(COUNT):
        states = states + (load(ptr + g * E + e, mask),)
    return states


@triton.jit
def _chunk_gradients(
    u_ptr,
    dt_ptr,
    A_ptr,
    z_ptr,
    starts_ptr,
    dout_ptr,
    adjoint_ptr,
    kept_ptr,
    pieces_ptr,
    du_ptr,
    ddt_ptr,
    dA_ptr,
    dpieces_ptr,
    row_offset,
    out_offset,
    D,
    bias,
    e,
    first,
    length,
    L,
    E: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    T: tl.constexpr,
    GROUP: tl.constexpr,
    LOG_COLUMNS: tl.constexpr,
    REV: tl.constexpr,
    WHOLE: tl.constexpr,
    IN_FP32: tl.constexpr,
    IN_WARPS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    mask,
):
    """Gradients of D and dt's bias, (BLOCK,) each; the others go to their places. Pointers are at the first step."""
    step: tl.constexpr = 1 - 2 * REV
    AT_ONCE: tl.constexpr = STATES if IN_WARPS else GROUP
    AHEAD: tl.constexpr = not (IN_FP32 and HAS_STARTS)  # with both there are no registers left for it
    if IN_WARPS:
        selects = selects_of_warp(BLOCK)
        lane = tl.arange(0, BLOCK) % 32
    sum_dD = tl.zeros([BLOCK], tl.float32)
    sum_dbias = tl.zeros([BLOCK], tl.float32)
    n_pieces = (length + T - 1) // T
    # Offsets instead of pointers, of which tensors share them; and they change, or each sum would wait in registers.
    row_offset += (n_pieces - 1) * (T * step * E)
    out_offset += (n_pieces - 1) * (T * step * E)
    for piece in range(n_pieces):
        k0 = (n_pieces - 1 - piece) * T
        # Tokens past the end have u = dt = dy = 0, and so change nothing.
        count = length - k0
        dys = _load_tokens(dout_ptr + out_offset, step * E, count, e, mask, E, T, WHOLE)
        if HAS_Z:
            dys = _gated(dys, _load_tokens(z_ptr + out_offset, step * E, count, e, mask, E, T, WHOLE), T)
        decay_times = ()
        dtus = ()
        us = _load_tokens(u_ptr + row_offset, step * E, count, e, mask, E, T, WHOLE)
        xs = _load_tokens(dt_ptr + row_offset, step * E, count, e, mask, E, T, WHOLE)
        for i in tl.static_range(T):
            dt = step_size(xs[i], bias, SOFTPLUS)
            position = first + tl.minimum(k0 + i, length - 1) * step + REV
            decay_time = time_of_decay(dt, starts_ptr, position, L, HAS_STARTS)
            decay_times = decay_times + (decay_time if WHOLE else tl.where(i < count, decay_time, 0.0),)
            dtus = dtus + (dt * us[i],)
        ddtus = zeros(T, BLOCK)  # gradient of dt u: sum over states of adjoint · B
        dlogs = zeros(T, BLOCK)  # gradient of dt through the decay: sum of adjoint · exp(dt A) h · A
        kept_k = kept_ptr + k0 // T * N * E
        pieces_n = pieces_ptr + k0 // T * N * 2 * T
        sums_n = dpieces_ptr + k0 // T * N * 2 * T
        offset = 0
        # What is loaded stands before the stores of a turn, behind which no compiler can move it; what waits for
        # memory longest, a turn before.
        if AHEAD:
            next_hs = _load_states(kept_k, e, mask, E, AT_ONCE)
        for _ in range(N // GROUP):
            dB = tl.zeros([BLOCK], tl.float32)
            dC = tl.zeros([BLOCK], tl.float32)
            for part in range(GROUP // AT_ONCE):
                if AHEAD:
                    hs = next_hs
                    ahead = tl.minimum(offset + AT_ONCE * E, (N - AT_ONCE) * E)
                    next_hs = _load_states(kept_k + ahead, e, mask, E, AT_ONCE)
                else:
                    hs = _load_states(kept_k + offset, e, mask, E, AT_ONCE)
                As = _load_states(A_ptr + offset, e, mask, E, AT_ONCE)
                adjoints = _load_states(adjoint_ptr + offset, e, mask, E, AT_ONCE)
                dAs = _load_states(dA_ptr + offset, e, mask, E, AT_ONCE)
                columns = ()
                for g in tl.static_range(AT_ONCE):
                    adjoint, dA, ddtus, dlogs, terms = _state_gradients(
                        *(hs[g], As[g], adjoints[g], dAs[g], pieces_n + g * 2 * T),
                        *(decay_times, dtus, dys, ddtus, dlogs, T),
                    )
                    tl.store(adjoint_ptr + offset + g * E + e, adjoint, mask=mask)
                    tl.store(dA_ptr + offset + g * E + e, dA, mask=mask)
                    if IN_WARPS:
                        more_dB, more_dC = sum_over_warp(selects, terms, BLOCK)
                        mine = lane % 4 == part * AT_ONCE + g
                        dB, dC = tl.where(mine, more_dB, dB), tl.where(mine, more_dC, dC)
                    else:
                        columns = columns + terms
                if not IN_WARPS:
                    sums = sum_over_channels(columns, LOG_COLUMNS, BLOCK, IN_FP32)
                    at = tl.broadcast_to((sums_n + tl.arange(0, GROUP * 2 * T))[None, :], sums.shape)
                    tl.store(at, sums, mask=tl.broadcast_to((tl.arange(0, 16) == 0)[:, None], sums.shape))
                offset += AT_ONCE * E
                pieces_n += AT_ONCE * 2 * T
            if IN_WARPS:
                sums = tl.sum(tl.reshape(tl.join(dB, dC), [BLOCK // 32, 64]), 0)
                k = tl.arange(0, 64)
                tl.store(sums_n + k // 2 % 4 * (2 * T) + k % 2 * T + k // 8, sums)
            sums_n += GROUP * 2 * T
        dus = ()
        ddts = ()
        us = _load_tokens(u_ptr + row_offset, step * E, count, e, mask, E, T, WHOLE)
        if HAS_STARTS or IN_FP32:
            xs = _load_tokens(dt_ptr + row_offset, step * E, count, e, mask, E, T, WHOLE)
        for i in tl.static_range(T):
            ddt = ddtus[i] * us[i] + dlogs[i] * (1 / LOG2E)
            dt = decay_times[i]
            if HAS_STARTS:
                dt = step_size(xs[i], bias, SOFTPLUS)
            if SOFTPLUS:
                if HAS_STARTS or IN_FP32:
                    ddt *= 1.0 / (1.0 + tl.exp2((xs[i] + bias) * -LOG2E))
                else:  # sigmoid(x) = 1 - exp(-softplus(x)), to an absolute 2^-24
                    ddt *= 1.0 - tl.exp2(dt * -LOG2E)
            sum_dbias += ddt if WHOLE else tl.where(i < count, ddt, 0.0)
            sum_dD += dys[i] * us[i]
            dus = dus + (ddtus[i] * dt + D * dys[i],)
            ddts = ddts + (ddt,)
        _store_tokens(du_ptr + row_offset, step * E, dus, count, e, mask, E, T, WHOLE)
        _store_tokens(ddt_ptr + row_offset, step * E, ddts, count, e, mask, E, T, WHOLE)
        row_offset -= T * step * E
        out_offset -= T * step * E
    return sum_dD, sum_dbias


@triton.jit(do_not_specialize=SIZES)
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
    GROUP: tl.constexpr,
    LOG_COLUMNS: tl.constexpr,
    WHOLE: tl.constexpr,
    IN_FP32: tl.constexpr,
    IN_WARPS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_STARTS: tl.constexpr,
):
    """All gradients but dz, of the items from item0 on; a program takes one chunk of one row.

    The chunk is taken in pieces of T tokens from the end, one state after the other: the T states that follow from a
    kept one fit in registers. All pieces are WHOLE where T divides the length. `adjoint` holds the running adjoint, and
    the sums go to dA (P, items, N, E), dD and dbias (P, items, E), and dpieces (channel blocks, P, items,
    chunk_size / T, N, 2 T), those of GROUP states at once: IN_WARPS by `sum_over_warp`, which wants GROUP 4, T 8 and
    one channel for each thread, else by `sum_over_channels`.
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
    mask = None if E % BLOCK == 0 else e < E
    begin = chunk * chunk_size
    length = tl.minimum(L - begin, chunk_size).to(tl.int32)
    first = tl.where(rev == 1, begin + length - 1, begin)
    bias = load_parameter(bias_ptr, d, e, mask, E, HAS_BIAS)
    D = load_parameter(D_ptr, d, e, mask, E, HAS_D)
    row_offset = (row * L + first) * E
    out_offset = (sb * L + first) * E
    starts_at = starts_ptr + b * L
    A_at = A_ptr + d * N * E
    kept_at = kept_ptr + local * (chunk_size // T) * N * E
    adjoint_at = adjoint_ptr + (row * n_chunks + chunk) * N * E
    dA_at = dA_ptr + local * N * E
    pieces = chunk_size // T
    pieces_at = pieces_ptr + local * pieces * N * 2 * T
    dpieces_at = dpieces_ptr + (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + local) * pieces * N * 2 * T
    operands = (u_ptr, dt_ptr, A_at, z_ptr, starts_at, dout_ptr, adjoint_at, kept_at, pieces_at)
    operands += (du_ptr, ddt_ptr, dA_at, dpieces_at, row_offset, out_offset, D, bias, e, first, length, L)
    # The direction is compiled in: offsets within a piece are then constants.
    if rev == 1:
        dD, dbias = _chunk_gradients(
            *operands,
            *(E, N, BLOCK, T, GROUP, LOG_COLUMNS, 1, WHOLE, IN_FP32, IN_WARPS, SOFTPLUS, HAS_Z, HAS_STARTS),
            mask=mask,
        )
    else:
        dD, dbias = _chunk_gradients(
            *operands,
            *(E, N, BLOCK, T, GROUP, LOG_COLUMNS, 0, WHOLE, IN_FP32, IN_WARPS, SOFTPLUS, HAS_Z, HAS_STARTS),
            mask=mask,
        )
    tl.store(dD_ptr + local * E + e, dD, mask=mask)
    tl.store(dbias_ptr + local * E + e, dbias, mask=mask)
