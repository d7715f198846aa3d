"""Numba kernels of the CPU backend: the short causal convolution and its gradient. See `scan_kernels` for the manner.

Shapes: P parameter directions, S streams, B batch, L length, E channels, K convolution width.
"""

import numpy as np

from caduceus.ops.cpu.compiled import jit, leaf
from caduceus.ops.cpu.llvm_values import EXACT
from caduceus.ops.cpu.scan_kernels import offset
from caduceus.ops.cpu.vectors import sigmoid

CHUNK = 256
"""Tokens per item."""


@jit(EXACT)
def _convolve(x, strides, s, b, t, sign, taps, bias, length, pre):
    """Convolution at position t before the activation; sign is 1 left-to-right, -1 right-to-left."""
    for j in range(pre.size):
        pre[j] = bias[j]
    width = taps.shape[0]
    for k in range(width):
        source = t - sign * (width - 1 - k)
        if 0 <= source < length:
            row, tap = x[offset(strides, 0, s, b, source) :][: pre.size], taps[k]
            for j in range(pre.size):
                pre[j] += tap[j] * row[j]


@jit(EXACT)
def _activate(pre, out):
    leaf()
    for j in range(out.size):
        out[j] = pre[j] * sigmoid(pre[j])


@jit(EXACT)
def conv_forward(first, last, x, strides, taps, bias, silu, backward, out):
    """Items are (direction, stream, batch, chunk of positions). x flat; taps (P, K, E); bias (P, E)."""
    _, streams, batch, length, channels = out.shape
    chunks = (length + CHUNK - 1) // CHUNK
    pre = np.empty(channels, out.dtype)
    for item in range(first, last):
        rest, chunk = item // chunks, item % chunks
        d, s, b = rest // batch // streams, rest // batch % streams, rest % batch
        sign = -1 if (d != s % 2) != backward else 1
        for t in range(chunk * CHUNK, min((chunk + 1) * CHUNK, length)):
            row = out[d, s, b, t]
            if silu:
                _convolve(x, strides, s, b, t, sign, taps[d], bias[d], length, pre)
                _activate(pre, row)
            else:
                _convolve(x, strides, s, b, t, sign, taps[d], bias[d], length, row)


@jit(EXACT)
def _activation_gradient(pre, g, silu, gpre):
    leaf()
    one = gpre.dtype.type(1)
    if silu:
        for j in range(gpre.size):
            gate = sigmoid(pre[j])
            gpre[j] = g[j] * gate * (one + pre[j] * (one - gate))
    else:
        for j in range(gpre.size):
            gpre[j] = g[j]


@jit(EXACT)
def _add_product(a, b, total):
    leaf()
    for j in range(total.size):
        total[j] += a[j] * b[j]


@jit(EXACT)
def conv_backward(first, last, g, g_strides, x, strides, taps, bias, silu, backward, gx, g_taps):
    """Items are (stream, batch, chunk of positions); a chunk's gx needs g up to K - 1 positions beyond it.

    gx (S, B, L, E); g_taps (items, P, K + 1, E): every item's part of the gradients of the taps and, last, the bias.
    """
    _, batch, length, channels = gx.shape
    directions, width, _ = taps.shape
    chunks = (length + CHUNK - 1) // CHUNK
    pre, gpre = np.empty(channels, gx.dtype), np.empty(channels, gx.dtype)
    ones = np.ones(channels, gx.dtype)
    for item in range(first, last):
        rest, chunk = item // chunks, item % chunks
        s, b = rest // batch, rest % batch
        lo, hi = chunk * CHUNK, min((chunk + 1) * CHUNK, length)
        gx[s, b, lo:hi] = 0
        g_taps[item] = 0
        for d in range(directions):
            sign = -1 if (d != s % 2) != backward else 1
            for t in range(max(lo - (width - 1) * (sign < 0), 0), min(hi + (width - 1) * (sign > 0), length)):
                g_at = offset(g_strides, d, s, b, t)
                _convolve(x, strides, s, b, t, sign, taps[d], bias[d], length, pre)
                _activation_gradient(pre, g[g_at : g_at + channels], silu, gpre)
                if lo <= t < hi:
                    _add_product(gpre, ones, g_taps[item, d, width])
                for k in range(width):
                    source = t - sign * (width - 1 - k)
                    if lo <= source < hi:
                        _add_product(gpre, taps[d, k], gx[s, b, source])
                    if lo <= t < hi and 0 <= source < length:
                        x_at = offset(strides, 0, s, b, source)
                        _add_product(gpre, x[x_at : x_at + channels], g_taps[item, d, k])
