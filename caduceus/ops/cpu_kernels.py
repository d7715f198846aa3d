"""Numba kernels of the CPU backend: the selective scan, the short convolution, and their gradients.

Each kernel works serially through the items [first, last) of its grid and holds no GIL, so `cpu.py` can run shares of
the grid in threads. An item's result does not depend on which thread has it, so the number of threads never changes a
bit of the output. All arithmetic is in one type, float32 or float64, chosen by the type of the arrays.

What makes them fast: memory is laid out (…, L, E) and the innermost loops run over channels with nothing but vector
instructions in them. That needs exp as inline arithmetic (a call to libm stops vectorisation), arrays that are known
not to overlap (`_leaf`), and states and decays of one chunk of tokens and one block of channels that fit in cache.
Floating-point sums over channels may be reordered ('reassoc') only outside `_exp2`, whose rounding trick that breaks.

Tensors come as a flat array over their memory with the strides of all axes but the last, whose stride is 1.
Shapes: P parameter directions, S streams, B batch, L length, E channels, N states, K convolution width.
"""

import math

import numba
import numpy as np
from numba import types
from numba.extending import intrinsic, overload

CHUNK = 16
"""Tokens between kept states. The backward pass recomputes the states of one chunk at a time."""
BLOCK = 128
"""Most channels per item of the scan."""
LANES = 32
"""Scratch rows are whole multiples of this, so that odd channel counts leave no scalar remainder in the hot loops."""
CONV_CHUNK = 256
"""Tokens per item of the convolution."""
_GROUP = 4
"""States per pass of the hot loops."""

_EXACT = {"contract", "nsz", "arcp"}
_REORDERED = _EXACT | {"reassoc"}


def _jit(fastmath, **options):
    """njit with the compiled code kept on disk, where the cache has anywhere to go."""

    def decorate(function):
        compiled = numba.njit(nogil=True, fastmath=fastmath, error_model="numpy", boundscheck=False, **options)
        try:
            return numba.njit(
                nogil=True, fastmath=fastmath, error_model="numpy", boundscheck=False, cache=True, **options
            )(function)
        except RuntimeError:  # neither this directory nor the user's cache directory is writable
            return compiled(function)

    return decorate


@intrinsic
def _leaf(typing_context):
    """Promise LLVM that no two array arguments of the calling function overlap, as `restrict` does in C."""

    def generate(context, builder, signature, arguments):
        for argument in builder.function.args:
            if argument.name.endswith(".data"):
                argument.add_attribute("noalias")
        builder.function.attributes.add("noinline")
        return context.get_dummy_value()

    return types.void(), generate


def _exp2(x):
    raise TypeError("compiled code only")


def _softplus(x):
    raise TypeError("compiled code only")


def _sigmoid(x):
    raise TypeError("compiled code only")


@overload(_exp2, jit_options={"fastmath": _EXACT})
def _overload_exp2(x):
    if x is not types.float32:
        return lambda x: math.exp(x * 0.6931471805599453)

    def exp2(x):
        """2^x for x <= 128 to 2e-7 relative; exactly 0 below -127, infinite at 128; NaN stays NaN."""
        x = np.float32(-127) if x < np.float32(-127) else x
        shifted = x + np.float32(12582912)  # 1.5 * 2^23 rounds to an integer, which is left in the lowest bits
        f = x - (shifted - np.float32(12582912))
        p = np.float32(0.0013264727)  # minimax on [-1/2, 1/2] with p(0) = 1, so that decays near 1 are exact
        p = p * f + np.float32(0.009671513)
        p = p * f + np.float32(0.055507336)
        p = p * f + np.float32(0.24022243)
        p = p * f + np.float32(0.693147)
        p = p * f + np.float32(1)
        exponent = np.float32(shifted).view(np.int32) << np.int32(23)
        return np.int32(np.float32(p).view(np.int32) + exponent).view(np.float32)

    return exp2


@overload(_softplus, jit_options={"fastmath": _EXACT})
def _overload_softplus(x):
    if x is not types.float32:
        return lambda x: max(x, 0.0) + math.log1p(math.exp(-abs(x)))

    def softplus(x):
        """log(1 + e^x); exactly 0 for x < -88."""
        e = _exp2(abs(x) * np.float32(-1.442695))
        s = e / (np.float32(2) + e)  # log(1 + e) = 2 artanh(s), s <= 1/3
        q = s * s
        p = np.float32(2 / 13)
        p = p * q + np.float32(2 / 11)
        p = p * q + np.float32(2 / 9)
        p = p * q + np.float32(2 / 7)
        p = p * q + np.float32(2 / 5)
        p = p * q + np.float32(2 / 3)
        p = p * q + np.float32(2)
        return (np.float32(0) if x < np.float32(0) else x) + s * p

    return softplus


@overload(_sigmoid, jit_options={"fastmath": _EXACT})
def _overload_sigmoid(x):
    if x is not types.float32:
        return lambda x: 1.0 / (1.0 + math.exp(-x))

    def sigmoid(x):
        """Exactly 0 for x < -89."""
        y = x * np.float32(-1.442695)
        return np.float32(1) / (np.float32(1) + _exp2(np.float32(128) if y > np.float32(128) else y))

    return sigmoid


@_jit(_EXACT)
def _start_chunk(dt, dt_at, dt_pitch, u, u_at, u_pitch, tokens, bias, D, softplus, step, inflow, y):
    """Step sizes, step times input and D times input of a chunk's tokens: step, inflow, y (CHUNK, W)."""
    _leaf()
    channels = bias.size
    for i in range(tokens):
        dt_row = dt[dt_at + i * dt_pitch :][:channels]
        u_row = u[u_at + i * u_pitch :][:channels]
        step_row, inflow_row, y_row = step[i], inflow[i], y[i]
        if softplus:
            for j in range(channels):
                step_row[j] = _softplus(dt_row[j] + bias[j])
        else:
            for j in range(channels):
                step_row[j] = dt_row[j] + bias[j]
        for j in range(channels):
            inflow_row[j] = step_row[j] * u_row[j]
            y_row[j] = D[j] * u_row[j]


@_jit(_EXACT)
def _advance(tokens, step, inflow, rates, h, Bs, Cs, y, n):
    """Take `tokens` steps with the states n … n + 3 and add what they give to y.

    step, inflow, y (CHUNK, W); rates, h (N, W); Bs, Cs (CHUNK, N).
    """
    _leaf()
    a0, a1, a2, a3 = rates[n], rates[n + 1], rates[n + 2], rates[n + 3]
    h0, h1, h2, h3 = h[n], h[n + 1], h[n + 2], h[n + 3]
    for i in range(tokens):
        step_i, inflow_i, y_i = step[i], inflow[i], y[i]
        b0, b1, b2, b3 = Bs[i, n], Bs[i, n + 1], Bs[i, n + 2], Bs[i, n + 3]
        c0, c1, c2, c3 = Cs[i, n], Cs[i, n + 1], Cs[i, n + 2], Cs[i, n + 3]
        for j in range(h.shape[1]):
            x = step_i[j]
            v = inflow_i[j]
            g0 = h0[j] * _exp2(x * a0[j]) + v * b0
            g1 = h1[j] * _exp2(x * a1[j]) + v * b1
            g2 = h2[j] * _exp2(x * a2[j]) + v * b2
            g3 = h3[j] * _exp2(x * a3[j]) + v * b3
            h0[j] = g0
            h1[j] = g1
            h2[j] = g2
            h3[j] = g3
            y_i[j] += (g0 * c0 + g1 * c1) + (g2 * c2 + g3 * c3)


@_jit(_EXACT)
def _end_chunk(y, z, z_at, z_pitch, tokens, gated, first, last, out, out_at, out_pitch, channels):
    """Write (first direction) or add a chunk's outputs; after the last direction, gate the sum."""
    _leaf()
    for i in range(tokens):
        y_row = y[i]
        out_row = out[out_at + i * out_pitch :][:channels]
        z_row = z[z_at + i * z_pitch :][:channels]
        if first:
            for j in range(channels):
                out_row[j] = y_row[j]
        else:
            for j in range(channels):
                out_row[j] += y_row[j]
        if gated and last:
            for j in range(channels):
                out_row[j] *= z_row[j] * _sigmoid(z_row[j])


@_jit(_EXACT)
def _load_rows(flat, at, pitch, tokens, states, rows):
    """Copy the B or C of a chunk's tokens into rows (CHUNK, N padded)."""
    _leaf()
    for i in range(tokens):
        for n in range(states):
            rows[i, n] = flat[at + i * pitch + n]


@_jit(_EXACT)
def _at(strides, d, s, b, t):
    return d * strides[0] + s * strides[1] + b * strides[2] + t * strides[3]


@_jit(_EXACT)
def _copy_row(source, target):
    for j in range(source.size):
        target[j] = source[j]


@_jit(_EXACT)
def _copy(source, target):
    for n in range(source.shape[0]):
        _copy_row(source[n], target[n])


@_jit(_EXACT)
def _tokens(length, backwards, chunk):
    """First position of a chunk, step from one position to the next, and how many."""
    taken = chunk * CHUNK
    return (length - 1 - taken, -1, min(CHUNK, length - taken)) if backwards else (taken, 1, min(CHUNK, length - taken))


@_jit(_EXACT)
def scan_forward(first, last, tensors, strides, flags, block, out, final, kept):
    """Items are (stream, batch, block of channels). See `cpu._scan` for the tensors."""
    u, dt, B, C, z, rates, D, bias, initial = tensors
    u_s, dt_s, B_s, C_s, z_s, out_s = strides
    softplus, gated, backward, keep, length = flags
    directions, _, batch, states, channels = final.shape
    blocks = (channels + block - 1) // block
    padded = (states + _GROUP - 1) // _GROUP * _GROUP
    rows, kind = (CHUNK, block), out.dtype
    step, inflow, y = np.zeros(rows, kind), np.zeros(rows, kind), np.zeros(rows, kind)
    a, h = np.zeros((padded, block), kind), np.zeros((padded, block), kind)
    Bs, Cs = np.zeros((CHUNK, padded), kind), np.zeros((CHUNK, padded), kind)
    for item in range(first, last):
        s, b, lo = item // (batch * blocks), item // blocks % batch, item % blocks * block
        hi = min(lo + block, channels)
        width = hi - lo
        for scratch in (step, inflow, a, h):
            scratch[:] = 0
        for d in range(directions):
            _copy(rates[d, :, lo:hi], a[:states, :width])
            _copy(initial[d, s, b, :, lo:hi], h[:states, :width])
            for chunk in range((length + CHUNK - 1) // CHUNK):
                t, sign, tokens = _tokens(length, (d != s) != backward, chunk)
                if keep:
                    _copy(h[:states, :width], kept[d, s, b, chunk, :, lo:hi])
                _load_rows(B, _at(B_s, d, s, b, t), sign * B_s[3], tokens, states, Bs)
                _load_rows(C, _at(C_s, d, s, b, t), sign * C_s[3], tokens, states, Cs)
                dt_at, u_at, z_at = _at(dt_s, d, s, b, t) + lo, _at(u_s, d, s, b, t) + lo, _at(z_s, 0, s, b, t) + lo
                dt_to, u_to, z_to = sign * dt_s[3], sign * u_s[3], sign * z_s[3]
                _start_chunk(
                    dt, dt_at, dt_to, u, u_at, u_to, tokens, bias[d, lo:hi], D[d, lo:hi], softplus, step, inflow, y
                )
                for n in range(0, states, _GROUP):
                    _advance(tokens, step, inflow, a, h, Bs, Cs, y, n)
                out_at, out_to = _at(out_s, 0, s, b, t) + lo, sign * out_s[3]
                _end_chunk(y, z, z_at, z_to, tokens, gated, d == 0, d == directions - 1, out, out_at, out_to, width)
            _copy(h[:states, :width], final[d, s, b, :, lo:hi])


@_jit(_EXACT)
def _gate_gradient(g, g_at, g_to, z, z_at, z_to, tokens, gated, width, gy):
    """Gradient of the chunk's outputs before the gate."""
    _leaf()
    for i in range(tokens):
        g_row, z_row, gy_row = g[g_at + i * g_to :][:width], z[z_at + i * z_to :][:width], gy[i]
        if gated:
            for j in range(width):
                gy_row[j] = g_row[j] * z_row[j] * _sigmoid(z_row[j])
        else:
            for j in range(width):
                gy_row[j] = g_row[j]


@_jit(_REORDERED)
def _retreat(
    tokens, step, inflow, gy, rates, h, adjoint, Bs, Cs, y, g_rates, g_input, g_step, gBs, gCs, past, decay, n
):
    """Recompute the states n, n + 1 over a chunk, then carry their adjoint back through it.

    step, inflow, gy, y (CHUNK, W) and g_input, g_step (their gradients, added to); rates, h (before the chunk),
    adjoint (of the state after the chunk; becomes that of h), g_rates (N, W); Bs, Cs, gBs, gCs (CHUNK, N);
    past (2, CHUNK + 1, W) and decay (2, CHUNK, W) are scratch.
    """
    _leaf()
    width = h.shape[1]
    a0, a1, h0, h1 = rates[n], rates[n + 1], past[0, 0], past[1, 0]
    first0, first1 = h[n], h[n + 1]
    for j in range(width):
        h0[j] = first0[j]
        h1[j] = first1[j]
    for i in range(tokens):
        step_i, inflow_i, y_i, gy_i = step[i], inflow[i], y[i], gy[i]
        p0, p1, q0, q1, e0, e1 = past[0, i], past[1, i], past[0, i + 1], past[1, i + 1], decay[0, i], decay[1, i]
        b0, b1, c0, c1 = Bs[i, n], Bs[i, n + 1], Cs[i, n], Cs[i, n + 1]
        sum0, sum1 = c0 - c0, c0 - c0
        for j in range(width):
            x, v, g = step_i[j], inflow_i[j], gy_i[j]
            f0, f1 = _exp2(x * a0[j]), _exp2(x * a1[j])
            e0[j] = f0
            e1[j] = f1
            s0, s1 = p0[j] * f0 + v * b0, p1[j] * f1 + v * b1
            q0[j] = s0
            q1[j] = s1
            y_i[j] += s0 * c0 + s1 * c1
            sum0 += g * s0
            sum1 += g * s1
        gCs[i, n], gCs[i, n + 1] = sum0, sum1
    adj0, adj1, ga0, ga1 = adjoint[n], adjoint[n + 1], g_rates[n], g_rates[n + 1]
    for i in range(tokens - 1, -1, -1):
        step_i, inflow_i, gy_i, g_input_i, g_step_i = step[i], inflow[i], gy[i], g_input[i], g_step[i]
        p0, p1, e0, e1 = past[0, i], past[1, i], decay[0, i], decay[1, i]
        b0, b1, c0, c1 = Bs[i, n], Bs[i, n + 1], Cs[i, n], Cs[i, n + 1]
        sum0, sum1 = c0 - c0, c0 - c0
        for j in range(width):
            x, v, g = step_i[j], inflow_i[j], gy_i[j]
            g0, g1 = adj0[j] + g * c0, adj1[j] + g * c1
            sum0 += g0 * v
            sum1 += g1 * v
            d0, d1 = g0 * e0[j], g1 * e1[j]
            adj0[j] = d0
            adj1[j] = d1
            k0, k1 = d0 * p0[j], d1 * p1[j]
            ga0[j] += k0 * x
            ga1[j] += k1 * x
            g_input_i[j] += g0 * b0 + g1 * b1
            g_step_i[j] += k0 * a0[j] + k1 * a1[j]
        gBs[i, n], gBs[i, n + 1] = sum0, sum1


@_jit(_EXACT)
def _input_gradients(
    dt,
    dt_at,
    dt_to,
    u,
    u_at,
    u_to,
    tokens,
    bias,
    D,
    softplus,
    step,
    gy,
    g_input,
    g_step,
    gu,
    gdt,
    g_at,
    g_to,
    gD,
    g_bias,
):
    """Gradients of a chunk's u and dt, and of D and the bias, from those of step · u and of the decay's exponent."""
    _leaf()
    width = bias.size
    ln2 = bias.dtype.type(0.6931471805599453)
    for i in range(tokens):
        dt_row, u_row = dt[dt_at + i * dt_to :][:width], u[u_at + i * u_to :][:width]
        gu_row, gdt_row = gu[g_at + i * g_to :][:width], gdt[g_at + i * g_to :][:width]
        step_i, gy_i, g_input_i, g_step_i = step[i], gy[i], g_input[i], g_step[i]
        for j in range(width):
            gu_row[j] = gy_i[j] * D[j] + g_input_i[j] * step_i[j]
            gD[j] += gy_i[j] * u_row[j]
        if softplus:
            for j in range(width):
                slope = _sigmoid(dt_row[j] + bias[j])
                gdt_row[j] = (g_input_i[j] * u_row[j] + g_step_i[j] * ln2) * slope
        else:
            for j in range(width):
                gdt_row[j] = g_input_i[j] * u_row[j] + g_step_i[j] * ln2
        for j in range(width):
            g_bias[j] += gdt_row[j]


@_jit(_EXACT)
def _gate_input_gradient(g, g_at, g_to, z, z_at, z_to, y, tokens, first, gz, gz_at, gz_to, width):
    """Gradient of a chunk's z: written for the first direction, added to for the others."""
    _leaf()
    one = y.dtype.type(1)
    for i in range(tokens):
        g_row, z_row, y_row = g[g_at + i * g_to :][:width], z[z_at + i * z_to :][:width], y[i]
        gz_row = gz[gz_at + i * gz_to :][:width]
        if first:
            for j in range(width):
                gz_row[j] = 0
        for j in range(width):
            gate = _sigmoid(z_row[j])
            gz_row[j] += g_row[j] * y_row[j] * gate * (one + z_row[j] * (one - gate))


@_jit(_EXACT)
def scan_backward(first, last, tensors, strides, flags, block, kept, grads, sums):
    """Items are (stream, batch, block of channels). See `cpu._scan_backward` for the tensors."""
    g, u, dt, B, C, z, rates, D, bias, g_final = tensors
    g_s, u_s, dt_s, B_s, C_s, z_s, gu_s, gz_s = strides
    softplus, gated, backward, length = flags
    gu, gdt, gz = grads
    gB, gC, gA, gD, g_bias, g_initial = sums
    directions, _, batch, states, channels = g_final.shape
    blocks = (channels + block - 1) // block
    padded = (states + _GROUP - 1) // _GROUP * _GROUP
    kind = kept.dtype
    step, inflow, y = np.zeros((CHUNK, block), kind), np.zeros((CHUNK, block), kind), np.zeros((CHUNK, block), kind)
    gy, g_input = np.zeros((CHUNK, block), kind), np.zeros((CHUNK, block), kind)
    g_step = np.zeros((CHUNK, block), kind)
    past, decay = np.zeros((2, CHUNK + 1, block), kind), np.zeros((2, CHUNK, block), kind)
    a, h = np.zeros((padded, block), kind), np.zeros((padded, block), kind)
    adjoint, g_rates = np.zeros((padded, block), kind), np.zeros((padded, block), kind)
    Bs, Cs = np.zeros((CHUNK, padded), kind), np.zeros((CHUNK, padded), kind)
    gBs, gCs = np.zeros((CHUNK, padded), kind), np.zeros((CHUNK, padded), kind)
    for item in range(first, last):
        s, b, lo = item // (batch * blocks), item // blocks % batch, item % blocks * block
        hi = min(lo + block, channels)
        width = hi - lo
        for scratch in (step, inflow, gy, a, h, adjoint):
            scratch[:] = 0
        for d in range(directions):
            _copy(rates[d, :, lo:hi], a[:states, :width])
            _copy(g_final[d, s, b, :, lo:hi], adjoint[:states, :width])
            g_rates[:] = 0
            gD[d, s, b, lo:hi] = 0
            g_bias[d, s, b, lo:hi] = 0
            for chunk in range((length + CHUNK - 1) // CHUNK - 1, -1, -1):
                t, sign, tokens = _tokens(length, (d != s) != backward, chunk)
                _copy(kept[d, s, b, chunk, :, lo:hi], h[:states, :width])
                _load_rows(B, _at(B_s, d, s, b, t), sign * B_s[3], tokens, states, Bs)
                _load_rows(C, _at(C_s, d, s, b, t), sign * C_s[3], tokens, states, Cs)
                dt_at, u_at, z_at = _at(dt_s, d, s, b, t) + lo, _at(u_s, d, s, b, t) + lo, _at(z_s, 0, s, b, t) + lo
                dt_to, u_to, z_to = sign * dt_s[3], sign * u_s[3], sign * z_s[3]
                g_at, g_to = _at(g_s, 0, s, b, t) + lo, sign * g_s[3]
                _start_chunk(
                    dt, dt_at, dt_to, u, u_at, u_to, tokens, bias[d, lo:hi], D[d, lo:hi], softplus, step, inflow, y
                )
                _gate_gradient(g, g_at, g_to, z, z_at, z_to, tokens, gated, width, gy)
                g_input[:] = 0
                g_step[:] = 0
                for n in range(0, states, 2):
                    _retreat(
                        tokens, step, inflow, gy, a, h, adjoint, Bs, Cs,
                        y, g_rates, g_input, g_step, gBs, gCs, past, decay, n,
                    )  # fmt: skip
                for i in range(tokens):
                    _copy_row(gBs[i, :states], gB[item % blocks, d, s, b, t + sign * i])
                    _copy_row(gCs[i, :states], gC[item % blocks, d, s, b, t + sign * i])
                gu_at, gu_to = _at(gu_s, d, s, b, t) + lo, sign * gu_s[3]
                _input_gradients(
                    dt, dt_at, dt_to, u, u_at, u_to, tokens, bias[d, lo:hi], D[d, lo:hi], softplus, step, gy,
                    g_input, g_step, gu, gdt, gu_at, gu_to, gD[d, s, b, lo:hi], g_bias[d, s, b, lo:hi],
                )  # fmt: skip
                if gated:
                    gz_at, gz_to = _at(gz_s, 0, s, b, t) + lo, sign * gz_s[3]
                    _gate_input_gradient(g, g_at, g_to, z, z_at, z_to, y, tokens, d == 0, gz, gz_at, gz_to, width)
            _copy(g_rates[:states, :width], gA[d, s, b, :, lo:hi])
            _copy(adjoint[:states, :width], g_initial[d, s, b, :, lo:hi])


@_jit(_EXACT)
def _convolve(x, strides, s, b, t, sign, taps, bias, length, pre):
    """Convolution at position t before the activation; sign is 1 left-to-right, -1 right-to-left."""
    for j in range(pre.size):
        pre[j] = bias[j]
    width = taps.shape[0]
    for k in range(width):
        source = t - sign * (width - 1 - k)
        if 0 <= source < length:
            row, tap = x[_at(strides, 0, s, b, source) :][: pre.size], taps[k]
            for j in range(pre.size):
                pre[j] += tap[j] * row[j]


@_jit(_EXACT)
def _activate(pre, out):
    _leaf()
    for j in range(out.size):
        out[j] = pre[j] * _sigmoid(pre[j])


@_jit(_EXACT)
def conv_forward(first, last, x, strides, taps, bias, silu, backward, out):
    """Items are (direction, stream, batch, chunk of positions). x flat; taps (P, K, E); bias (P, E)."""
    _, streams, batch, length, channels = out.shape
    chunks = (length + CONV_CHUNK - 1) // CONV_CHUNK
    pre = np.empty(channels, out.dtype)
    for item in range(first, last):
        rest, chunk = item // chunks, item % chunks
        d, s, b = rest // batch // streams, rest // batch % streams, rest % batch
        sign = -1 if (d != s) != backward else 1
        for t in range(chunk * CONV_CHUNK, min((chunk + 1) * CONV_CHUNK, length)):
            row = out[d, s, b, t]
            if silu:
                _convolve(x, strides, s, b, t, sign, taps[d], bias[d], length, pre)
                _activate(pre, row)
            else:
                _convolve(x, strides, s, b, t, sign, taps[d], bias[d], length, row)


@_jit(_EXACT)
def _activation_gradient(pre, g, silu, gpre):
    _leaf()
    one = gpre.dtype.type(1)
    if silu:
        for j in range(gpre.size):
            gate = _sigmoid(pre[j])
            gpre[j] = g[j] * gate * (one + pre[j] * (one - gate))
    else:
        for j in range(gpre.size):
            gpre[j] = g[j]


@_jit(_EXACT)
def _add_product(a, b, total):
    _leaf()
    for j in range(total.size):
        total[j] += a[j] * b[j]


@_jit(_EXACT)
def conv_backward(first, last, g, g_strides, x, strides, taps, bias, silu, backward, gx, g_taps):
    """Items are (stream, batch, chunk of positions); a chunk's gx needs g up to K - 1 positions beyond it.

    gx (S, B, L, E); g_taps (items, P, K + 1, E): every item's part of the gradients of the taps and, last, the bias.
    """
    _, batch, length, channels = gx.shape
    directions, width, _ = taps.shape
    chunks = (length + CONV_CHUNK - 1) // CONV_CHUNK
    pre, gpre = np.empty(channels, gx.dtype), np.empty(channels, gx.dtype)
    ones = np.ones(channels, gx.dtype)
    for item in range(first, last):
        rest, chunk = item // chunks, item % chunks
        s, b = rest // batch, rest % batch
        lo, hi = chunk * CONV_CHUNK, min((chunk + 1) * CONV_CHUNK, length)
        gx[s, b, lo:hi] = 0
        g_taps[item] = 0
        for d in range(directions):
            sign = -1 if (d != s) != backward else 1
            for t in range(max(lo - (width - 1) * (sign < 0), 0), min(hi + (width - 1) * (sign > 0), length)):
                g_at = _at(g_strides, d, s, b, t)
                _convolve(x, strides, s, b, t, sign, taps[d], bias[d], length, pre)
                _activation_gradient(pre, g[g_at : g_at + channels], silu, gpre)
                if lo <= t < hi:
                    _add_product(gpre, ones, g_taps[item, d, width])
                for k in range(width):
                    source = t - sign * (width - 1 - k)
                    if lo <= source < hi:
                        _add_product(gpre, taps[d, k], gx[s, b, source])
                    if lo <= t < hi and 0 <= source < length:
                        x_at = _at(strides, 0, s, b, source)
                        _add_product(gpre, x[x_at : x_at + channels], g_taps[item, d, k])
