"""Kernels of the causal convolution with silu; a program takes all directions.

Tap j of direction d meets the position j steps back in its direction. Positions outside the sequence are read from the
halo, the K - 1 inputs that precede the sequence in that direction, or are zero.
"""

import triton
import triton.language as tl

from caduceus.ops.triton.device import SIZES


@triton.jit
def _tap(x_ptr, halo_ptr, positions, L, E, x_token, e, mask, K: tl.constexpr, HAS_HALO: tl.constexpr):
    """x at int64 positions [TOKENS] × channels e; `halo_ptr` is at the halo of this direction, forward coordinates."""
    inside = (positions >= 0) & (positions < L)
    at = x_ptr + positions[:, None] * x_token + e[None, :]
    x = tl.load(at, mask=inside[:, None] & mask[None, :], other=0.0).to(tl.float32)
    if HAS_HALO:
        before = positions + (K - 1)
        index = tl.where(positions < 0, before, positions - L)
        near = ((positions < 0) & (before >= 0)) | ((positions >= L) & (positions - L < K - 1))
        at = halo_ptr + index[:, None] * E + e[None, :]
        x += tl.load(at, mask=near[:, None] & mask[None, :], other=0.0).to(tl.float32)
    return x


@triton.jit
def _joined(starts_ptr, joined, edge, L, HAS_STARTS: tl.constexpr):
    """Still true where no packed sequence starts at `edge`, the border between a position and the next tap."""
    if HAS_STARTS:
        start = tl.load(starts_ptr + edge, mask=(edge >= 0) & (edge < L), other=0) != 0
        joined = joined & (start == 0)
    return joined


@triton.jit
def _preactivation(
    x_ptr,
    halo_ptr,
    w_ptr,
    bias,
    starts_ptr,
    positions,
    rev,
    L,
    E,
    x_token,
    e,
    mask,
    K: tl.constexpr,
    HAS_HALO: tl.constexpr,
    HAS_STARTS: tl.constexpr,
):
    """The convolution before silu at int64 positions [TOKENS]; w_ptr at (E, K) of this direction."""
    step = 1 - 2 * rev
    y = tl.zeros([positions.shape[0], e.shape[0]], tl.float32) + bias[None, :]
    joined = positions == positions
    for j in tl.static_range(K):
        w = tl.load(w_ptr + e * K + (K - 1 - j), mask=mask, other=0.0).to(tl.float32)
        x = _tap(x_ptr, halo_ptr, positions - j * step, L, E, x_token, e, mask, K, HAS_HALO)
        y += tl.where(joined[:, None], x * w[None, :], 0.0)
        joined = _joined(starts_ptr, joined, positions - j * step + rev, L, HAS_STARTS)
    return y


@triton.jit(do_not_specialize=("P", *SIZES))
def conv_forward_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    halo_ptr,
    starts_ptr,
    out_ptr,
    P,
    S,
    batch,
    L,
    E,
    reverse,
    x_row,
    x_token,
    K: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    SILU: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_HALO: tl.constexpr,
    HAS_STARTS: tl.constexpr,
):
    """out (P, S, batch, L, E)."""
    tiles = tl.cdiv(L, TOKENS)
    item = tl.program_id(0).to(tl.int64)
    tile, sb = item % tiles, item // tiles
    b, s = sb % batch, sb // batch
    t = tile * TOKENS + tl.arange(0, TOKENS)
    e = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = e < E
    x_ptr += sb * x_row
    starts_ptr += b * L
    for d in range(P):
        rev = (d + s + reverse) % 2
        row = d * S * batch + sb
        bias = tl.zeros([BLOCK], tl.float32)
        if HAS_BIAS:
            bias += tl.load(bias_ptr + d * E + e, mask=mask, other=0.0).to(tl.float32)
        halo_at = halo_ptr + row * (K - 1) * E
        w_at = w_ptr + d * E * K
        y = _preactivation(
            x_ptr, halo_at, w_at, bias, starts_ptr, t, rev, L, E, x_token, e, mask, K, HAS_HALO, HAS_STARTS
        )
        if SILU:
            y *= tl.sigmoid(y)
        at = out_ptr + (row * L + t)[:, None] * E + e[None, :]
        tl.store(at, y.to(out_ptr.dtype.element_ty), mask=(t < L)[:, None] & mask[None, :])


@triton.jit
def _preactivation_gradient(dy, taps, w, bias, K: tl.constexpr, SILU: tl.constexpr):
    if SILU:
        y = bias
        for j in tl.static_range(K):
            y += taps[j] * w[j]
        gate = tl.sigmoid(y)
        dy *= gate * (1.0 + y * (1.0 - gate))
    return dy


@triton.jit
def _weights(w_ptr, bias_ptr, d, E, e, mask, K: tl.constexpr, BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Weights of taps 0 … K - 1, and the bias, of a direction."""
    bias = tl.zeros([BLOCK], tl.float32)
    if HAS_BIAS:
        bias += tl.load(bias_ptr + d * E + e, mask=mask, other=0.0).to(tl.float32)
    w = ()
    for j in tl.static_range(K):
        w = w + (tl.load(w_ptr + (d * E + e) * K + (K - 1 - j), mask=mask, other=0.0).to(tl.float32),)
    return w, bias


@triton.jit
def _zeros(COUNT: tl.constexpr, BLOCK: tl.constexpr):
    vectors = ()
    for _ in tl.static_range(COUNT):
        vectors = vectors + (tl.zeros([BLOCK], tl.float32),)
    return vectors


@triton.jit
def _input(x_at, halo_ptr, position, L, E, row0, row1, e, E0, E1, K: tl.constexpr, HAS_HALO: tl.constexpr):
    """x at a position, or what the halos of the two orders hold there."""
    x = tl.load(x_at, mask=e < tl.where((position >= 0) & (position < L), E, 0), other=0.0).to(tl.float32)
    if HAS_HALO:
        before, after = position + (K - 1), position - L
        at = halo_ptr + tl.where(position < 0, row0 * (K - 1) + before, row1 * (K - 1) + after) * E + e
        channels = tl.where((position < 0) & (before >= 0), E0, tl.where((after >= 0) & (after < K - 1), E1, 0))
        x += tl.load(at, mask=e < channels, other=0.0).to(tl.float32)
    return x


@triton.jit(do_not_specialize=SIZES)
def conv_backward_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    halo_ptr,
    starts_ptr,
    dout_ptr,
    dx_ptr,
    dw_ptr,
    dbias_ptr,
    S,
    batch,
    L,
    n_chunks,
    chunk_size,
    reverse,
    x_row,
    P: tl.constexpr,
    E: tl.constexpr,
    x_token: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
    SILU: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_HALO: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    OF_HALO: tl.constexpr,
):
    """dx (S, batch, L, E), and per chunk the sums dw (items, P, K, E; by distance j) and dbias (items, P, E).

    A thread takes a channel along a chunk, left to right, for both orders: 0, in which position t uses x at t, t - 1 …,
    and 1, in which it uses t, t + 1 … While x at t … t + K - 1 is in registers, it gives the gradient before silu of
    order 0 at t + K - 1 and of order 1 at t, the last that dx at t lacks.
    With OF_HALO the chunks are the two halos and dx is their gradient (P, S, batch, K - 1, E), with no sums beside it.
    """
    item = tl.program_id(0).to(tl.int64)
    chunk, sb = item % n_chunks, item // n_chunks
    b, s = sb % batch, sb // batch
    e = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if OF_HALO:
        begin = tl.where(chunk == 0, 1 - K, L).to(tl.int64)
        end = begin + (K - 1)
    else:
        begin = chunk * chunk_size
        end = tl.minimum(L, begin + chunk_size)
    # Which direction's parameters an order has; with a single direction one order is without, and has no channels.
    d0 = (s + reverse) % 2
    d1 = 1 - d0
    E0 = E if P == 2 else tl.where(d0 < P, E, 0)
    E1 = E if P == 2 else tl.where(d1 < P, E, 0)
    row0 = d0 * S * batch + sb
    row1 = d1 * S * batch + sb
    w0, bias0 = _weights(w_ptr, bias_ptr, d0, E, e, e < E0, K, BLOCK, HAS_BIAS)
    w1, bias1 = _weights(w_ptr, bias_ptr, d1, E, e, e < E1, K, BLOCK, HAS_BIAS)
    starts_ptr += b * L

    t = begin - (K - 1)
    x_at = x_ptr + sb * x_row + t * x_token + e
    window = ()
    for i in tl.static_range(K - 1):
        window = window + (_input(x_at, halo_ptr, t + i, L, E, row0, row1, e, E0, E1, K, HAS_HALO),)
        x_at += x_token
    joints = ()  # whether no packed sequence starts at t - K + 2 … t + K - 1
    if HAS_STARTS:
        for i in tl.static_range(2 * K - 3):
            joints = joints + (_joined(starts_ptr, True, t - (K - 2) + i, L, True),)
    dout0_at = dout_ptr + (row0 * L + t + (K - 1)) * E + e
    dout1_at = dout_ptr + (row1 * L + t) * E + e
    if OF_HALO:
        dx_at = dx_ptr + (tl.where(chunk == 0, row0, row1) * (K - 1) + (1 - K)) * E + e
        E_out = tl.where(chunk == 0, E0, E1)
    else:
        dx_at = dx_ptr + (sb * L + t) * E + e
        E_out = E
    gradients0 = _zeros(K - 1, BLOCK)  # before silu, of order 0 at t … t + K - 2
    gradients1 = _zeros(K - 1, BLOCK)  # and of order 1 at t - K + 1 … t - 1
    dw0 = _zeros(K, BLOCK)
    dw1 = _zeros(K, BLOCK)
    dbias0 = tl.zeros([BLOCK], tl.float32)
    dbias1 = tl.zeros([BLOCK], tl.float32)
    for _ in range(0, (end - t).to(tl.int32), STEPS):
        # What a turn loads stands before its stores, which would hold it up.
        xs = ()
        douts0 = ()
        douts1 = ()
        for i in tl.static_range(STEPS):
            last = t + i + (K - 1)
            xs = xs + (_input(x_at + i * x_token, halo_ptr, last, L, E, row0, row1, e, E0, E1, K, HAS_HALO),)
            E_last = tl.where((last >= 0) & (last < L), E0, 0)
            E_first = tl.where((t + i >= 0) & (t + i < L), E1, 0)
            douts0 = douts0 + (tl.load(dout0_at + i * E, mask=e < E_last, other=0.0),)
            douts1 = douts1 + (tl.load(dout1_at + i * E, mask=e < E_first, other=0.0),)
        for i in tl.static_range(STEPS):
            last = t + (K - 1)
            window = window + (xs[i],)
            taps0 = ()
            taps1 = ()
            users0 = ()
            users1 = ()
            if HAS_STARTS:
                if K > 1:
                    joints = joints + (_joined(starts_ptr, True, last, L, True),)
                joined_last, joined_right, joined_left = last == last, last == last, last == last
                for j in tl.static_range(K):
                    taps0 = taps0 + (tl.where(joined_last, window[K - 1 - j], 0.0),)
                    taps1 = taps1 + (tl.where(joined_right, window[j], 0.0),)
                    users0 = users0 + (tl.where(joined_right, w0[j], 0.0),)
                    users1 = users1 + (tl.where(joined_left, w1[j], 0.0),)
                    if j < K - 1:
                        joined_last = joined_last & joints[2 * K - 3 - j]
                        joined_right = joined_right & joints[K - 1 + j]
                        joined_left = joined_left & joints[K - 2 - j]
            else:
                for j in tl.static_range(K):
                    taps0 = taps0 + (window[K - 1 - j],)
                    taps1 = taps1 + (window[j],)
                users0 = w0
                users1 = w1
            dy0 = douts0[i].to(tl.float32)
            dy1 = douts1[i].to(tl.float32)
            dy0 = _preactivation_gradient(dy0, taps0, w0, bias0, K, SILU)
            dy1 = _preactivation_gradient(dy1, taps1, w1, bias1, K, SILU)
            gradients0 = gradients0 + (dy0,)
            gradients1 = gradients1 + (dy1,)
            # Both in the order of the taps, so that a flipped sequence has the flipped gradient to the last bit.
            dx0 = gradients0[0] * users0[0]
            dx1 = gradients1[K - 1] * users1[0]
            for j in tl.static_range(1, K):
                dx0 += gradients0[j] * users0[j]
                dx1 += gradients1[K - 1 - j] * users1[j]
            if not OF_HALO:
                # What lies outside the chunk is another's to add up.
                dy0 = tl.where((last >= begin) & (last < end), dy0, 0.0)
                dy1 = tl.where((t >= begin) & (t < end), dy1, 0.0)
                more_dw0 = ()
                more_dw1 = ()
                for j in tl.static_range(K):
                    more_dw0 = more_dw0 + (dw0[j] + dy0 * taps0[j],)
                    more_dw1 = more_dw1 + (dw1[j] + dy1 * taps1[j],)
                dw0 = more_dw0
                dw1 = more_dw1
                dbias0 += dy0
                dbias1 += dy1
            use = e < tl.where((t >= begin) & (t < end), E_out, 0)
            tl.store(dx_at, (dx0 + dx1).to(dx_ptr.dtype.element_ty), mask=use)
            window = window[1:]
            gradients0 = gradients0[1:]
            gradients1 = gradients1[1:]
            if HAS_STARTS:
                joints = joints[1:]
            t += 1
            dx_at += E
        x_at += STEPS * x_token
        dout0_at += STEPS * E
        dout1_at += STEPS * E
    if not OF_HALO:
        slot0 = item * P + d0
        slot1 = item * P + d1
        tl.store(dbias_ptr + slot0 * E + e, dbias0, mask=e < E0)
        tl.store(dbias_ptr + slot1 * E + e, dbias1, mask=e < E1)
        for j in tl.static_range(K):
            tl.store(dw_ptr + (slot0 * K + j) * E + e, dw0[j], mask=e < E0)
            tl.store(dw_ptr + (slot1 * K + j) * E + e, dw1[j], mask=e < E1)
