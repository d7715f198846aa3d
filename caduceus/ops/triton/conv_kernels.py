"""Kernels of the causal convolution with silu. Tiles of tokens × channels; all directions of a tile in one program.

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


@triton.jit(do_not_specialize=SIZES)
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
    OF_HALO: tl.constexpr,
):
    """dx (S, batch, L, E), and per tile the sums dw (items, P, K, E; by distance j) and dbias (items, P, E).

    With OF_HALO instead dx is the gradient (P, S, batch, K - 1, E) of the halos, and nothing else is written.
    """
    tiles = 1 if OF_HALO else tl.cdiv(L, TOKENS)
    item = tl.program_id(0).to(tl.int64)
    tile, sb = item % tiles, item // tiles
    b, s = sb % batch, sb // batch
    e = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = e < E
    lane = tl.arange(0, TOKENS)
    x_ptr += sb * x_row
    starts_ptr += b * L
    total = tl.zeros([TOKENS, BLOCK], tl.float32)
    for d in range(P):
        rev = (d + s + reverse) % 2
        step = 1 - 2 * rev
        row = d * S * batch + sb
        # The halo lies before the first position that its direction takes.
        t = lane + (rev * (L + K - 1) - (K - 1) if OF_HALO else tile * TOKENS)
        valid = lane < K - 1 if OF_HALO else t < L
        bias = tl.zeros([BLOCK], tl.float32)
        if HAS_BIAS:
            bias += tl.load(bias_ptr + d * E + e, mask=mask, other=0.0).to(tl.float32)
        halo_at = halo_ptr + row * (K - 1) * E
        w_at = w_ptr + d * E * K
        dx = tl.zeros([TOKENS, BLOCK], tl.float32)
        joined = valid
        for j in tl.static_range(K):
            # Position t is tap j of position `user`.
            user = t + j * step
            use = (user >= 0) & (user < L)
            at = dout_ptr + (row * L + user)[:, None] * E + e[None, :]
            dy = tl.load(at, mask=use[:, None] & mask[None, :], other=0.0).to(tl.float32)
            if SILU:
                y = _preactivation(
                    x_ptr, halo_at, w_at, bias, starts_ptr, user, rev, L, E, x_token, e, mask, K, HAS_HALO, HAS_STARTS
                )
                gate = tl.sigmoid(y)
                dy *= gate * (1.0 + y * (1.0 - gate))
            if j == 0:
                own = dy
            w = tl.load(w_at + e * K + (K - 1 - j), mask=mask, other=0.0).to(tl.float32)
            dx += tl.where(joined[:, None], dy * w[None, :], 0.0)
            joined = _joined(starts_ptr, joined, user + (1 - rev), L, HAS_STARTS)
        if OF_HALO:
            at = dx_ptr + (row * (K - 1) + lane)[:, None] * E + e[None, :]
            tl.store(at, dx.to(dx_ptr.dtype.element_ty), mask=valid[:, None] & mask[None, :])
        else:
            total += dx
            slot = item * P + d
            own = tl.where(valid[:, None], own, 0.0)
            tl.store(dbias_ptr + slot * E + e, tl.sum(own, axis=0), mask=mask)
            joined = valid
            for j in tl.static_range(K):
                x = _tap(x_ptr, halo_at, t - j * step, L, E, x_token, e, mask, K, HAS_HALO)
                dw = tl.sum(tl.where(joined[:, None], own * x, 0.0), axis=0)
                tl.store(dw_ptr + (slot * K + j) * E + e, dw, mask=mask)
                joined = _joined(starts_ptr, joined, t - j * step + rev, L, HAS_STARTS)
    if not OF_HALO:
        t = tile * TOKENS + lane
        at = dx_ptr + (sb * L + t)[:, None] * E + e[None, :]
        tl.store(at, total.to(dx_ptr.dtype.element_ty), mask=(t < L)[:, None] & mask[None, :])
