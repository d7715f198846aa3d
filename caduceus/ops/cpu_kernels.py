"""Numba kernels of the CPU backend: the selective scan and its gradient.

Each kernel works serially through the items [first, last) of its grid and holds no GIL, so `cpu.py` can run shares of
the grid in threads. An item's result does not depend on which thread has it, so the number of threads never changes a
bit of the output. All arithmetic is in one type, float32 or float64, chosen by the type of the arrays.

What makes them fast: memory is laid out (…, L, E) and the innermost loops run over channels with nothing but vector
instructions in them. That needs exp as inline arithmetic (a call to libm stops vectorisation), arrays that are known
not to overlap (`leaf`), and states and decays of one chunk of tokens and one block of channels that fit in cache.
Floating-point sums over channels may be reordered ('reassoc') only outside `_exp2`, whose rounding trick that breaks.

Tensors come as a flat array over their memory with the strides of all axes but the last, whose stride is 1.
Shapes: P parameter directions, S streams, B batch, L length, E channels, N states.
"""

import math

import numba
import numpy as np
from numba import types
from numba.core.datamodel import default_manager
from numba.extending import intrinsic, overload

CHUNK = 16
"""Tokens between kept states. The backward pass recomputes the states of one chunk at a time."""
BLOCK = 128
"""Most channels per item of the scan."""
LANES = 32
"""Scratch rows are whole multiples of this, so that odd channel counts leave no scalar remainder in the hot loops."""
_GROUP = 4
"""States per pass of the hot loops."""

_DATA_FIELD = str(default_manager[types.float32[::1]].get_field_position("data"))
EXACT = {"contract", "nsz", "arcp"}
_REORDERED = EXACT | {"reassoc"}


def jit(fastmath):
    """njit with the compiled code kept on disk, if the cache has anywhere to go."""

    def decorate(function):
        options = {"nogil": True, "fastmath": fastmath, "error_model": "numpy", "boundscheck": False}
        try:
            return numba.njit(function, cache=True, **options)
        except RuntimeError:  # neither this directory nor the user's cache directory can be written
            return numba.njit(function, **options)

    return decorate


@intrinsic
def leaf(typing_context):
    """Compile the calling function by itself, for the widest vectors, and promise that its array arguments do not
    overlap, as `restrict` does in C: without that LLVM gives up on loops over this many arrays."""

    def generate(context, builder, signature, arguments):
        for argument in builder.function.args:  # an array is passed as its fields: arg.NAME.0, arg.NAME.1, …
            if argument.name.startswith("arg.") and argument.name.split(".")[2:] == [_DATA_FIELD]:
                argument.add_attribute("noalias")
        attributes = builder.function.attributes
        attributes.add("noinline")
        set.add(attributes, '"prefer-vector-width"="512"')  # past llvmlite's list of attributes that it knows
        return context.get_dummy_value()

    return types.void(), generate


def _exp2(x):
    raise TypeError("compiled code only")


def _softplus(x):
    raise TypeError("compiled code only")


def sigmoid(x):
    raise TypeError("compiled code only")


@overload(_exp2, jit_options={"fastmath": EXACT})
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


@overload(_softplus, jit_options={"fastmath": EXACT})
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


@overload(sigmoid, jit_options={"fastmath": EXACT})
def _overload_sigmoid(x):
    if x is not types.float32:
        return lambda x: 1.0 / (1.0 + math.exp(-x))

    def implementation(x):
        """1 / (1 + e^-x); exactly 0 for x < -89."""
        y = x * np.float32(-1.442695)
        return np.float32(1) / (np.float32(1) + _exp2(np.float32(128) if y > np.float32(128) else y))

    return implementation


@jit(EXACT)
def _start_chunk(dt, dt_at, dt_pitch, u, u_at, u_pitch, tokens, bias, D, softplus, step, inflow, y):
    """Step sizes, step times input and D times input of a chunk's tokens: step, inflow, y (CHUNK, W)."""
    leaf()
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


@jit(EXACT)
def _advance(tokens, step, inflow, rates, h, Bs, Cs, y, n):
    """Take `tokens` steps with the states n … n + 3 and add what they give to y.

    step, inflow, y (CHUNK, W); rates, h (N, W); Bs, Cs (CHUNK, N).
    """
    leaf()
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


@jit(EXACT)
def _end_chunk(y, z, z_at, z_pitch, tokens, gated, first, last, out, out_at, out_pitch, channels):
    """Write (first direction) or add a chunk's outputs; after the last direction, gate the sum."""
    leaf()
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
                out_row[j] *= z_row[j] * sigmoid(z_row[j])


@jit(EXACT)
def _load_rows(flat, at, pitch, tokens, states, rows):
    """Copy the B or C of a chunk's tokens into rows (CHUNK, N padded)."""
    leaf()
    for i in range(tokens):
        for n in range(states):
            rows[i, n] = flat[at + i * pitch + n]


@jit(EXACT)
def offset(strides, d, s, b, t):
    return d * strides[0] + s * strides[1] + b * strides[2] + t * strides[3]


@jit(EXACT)
def _copy_row(source, target):
    for j in range(source.size):
        target[j] = source[j]


@jit(EXACT)
def _copy(source, target):
    for n in range(source.shape[0]):
        _copy_row(source[n], target[n])


@jit(EXACT)
def _tokens(length, backwards, chunk):
    """First position of a chunk, step from one position to the next, and how many."""
    taken = chunk * CHUNK
    return (length - 1 - taken, -1, min(CHUNK, length - taken)) if backwards else (taken, 1, min(CHUNK, length - taken))


@jit(EXACT)
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
                _load_rows(B, offset(B_s, d, s, b, t), sign * B_s[3], tokens, states, Bs)
                _load_rows(C, offset(C_s, d, s, b, t), sign * C_s[3], tokens, states, Cs)
                dt_at, u_at, z_at = (
                    offset(dt_s, d, s, b, t) + lo,
                    offset(u_s, d, s, b, t) + lo,
                    offset(z_s, 0, s, b, t) + lo,
                )
                dt_pitch, u_pitch, z_pitch = sign * dt_s[3], sign * u_s[3], sign * z_s[3]
                _start_chunk(
                    dt,
                    dt_at,
                    dt_pitch,
                    u,
                    u_at,
                    u_pitch,
                    tokens,
                    bias[d, lo:hi],
                    D[d, lo:hi],
                    softplus,
                    step,
                    inflow,
                    y,
                )
                for n in range(0, states, _GROUP):
                    _advance(tokens, step, inflow, a, h, Bs, Cs, y, n)
                out_at, out_pitch = offset(out_s, 0, s, b, t) + lo, sign * out_s[3]
                _end_chunk(
                    y, z, z_at, z_pitch, tokens, gated, d == 0, d == directions - 1, out, out_at, out_pitch, width
                )
            _copy(h[:states, :width], final[d, s, b, :, lo:hi])


@jit(EXACT)
def _gate_gradient(g, g_at, g_pitch, z, z_at, z_pitch, tokens, gated, width, gy):
    """Gradient of the chunk's outputs before the gate."""
    leaf()
    for i in range(tokens):
        g_row, z_row, gy_row = g[g_at + i * g_pitch :][:width], z[z_at + i * z_pitch :][:width], gy[i]
        if gated:
            for j in range(width):
                gy_row[j] = g_row[j] * z_row[j] * sigmoid(z_row[j])
        else:
            for j in range(width):
                gy_row[j] = g_row[j]


@jit(_REORDERED)
def _retreat(
    tokens, step, inflow, gy, rates, h, adjoint, Bs, Cs, y, g_rates, g_input, g_step, gBs, gCs, past, decay, n
):
    """Recompute the states n, n + 1 over a chunk, then carry their adjoint back through it.

    step, inflow, gy, y (CHUNK, W) and g_input, g_step (their gradients, added to); rates, h (before the chunk),
    adjoint (of the state after the chunk; becomes that of h), g_rates (N, W); Bs, Cs, gBs, gCs (CHUNK, N);
    past (2, CHUNK + 1, W) and decay (2, CHUNK, W) are scratch.
    """
    leaf()
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


@jit(EXACT)
def _input_gradients(
    dt,
    dt_at,
    dt_pitch,
    u,
    u_at,
    u_pitch,
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
    g_pitch,
    gD,
    g_bias,
):
    """Gradients of a chunk's u and dt, and of D and the bias, from those of step · u and of the decay's exponent."""
    leaf()
    width = bias.size
    ln2 = bias.dtype.type(0.6931471805599453)
    for i in range(tokens):
        dt_row, u_row = dt[dt_at + i * dt_pitch :][:width], u[u_at + i * u_pitch :][:width]
        gu_row, gdt_row = gu[g_at + i * g_pitch :][:width], gdt[g_at + i * g_pitch :][:width]
        step_i, gy_i, g_input_i, g_step_i = step[i], gy[i], g_input[i], g_step[i]
        for j in range(width):
            gu_row[j] = gy_i[j] * D[j] + g_input_i[j] * step_i[j]
            gD[j] += gy_i[j] * u_row[j]
        if softplus:
            for j in range(width):
                slope = sigmoid(dt_row[j] + bias[j])
                gdt_row[j] = (g_input_i[j] * u_row[j] + g_step_i[j] * ln2) * slope
        else:
            for j in range(width):
                gdt_row[j] = g_input_i[j] * u_row[j] + g_step_i[j] * ln2
        for j in range(width):
            g_bias[j] += gdt_row[j]


@jit(EXACT)
def _gate_input_gradient(g, g_at, g_pitch, z, z_at, z_pitch, y, tokens, first, gz, gz_at, gz_pitch, width):
    """Gradient of a chunk's z: written for the first direction, added to for the others."""
    leaf()
    one = y.dtype.type(1)
    for i in range(tokens):
        g_row, z_row, y_row = g[g_at + i * g_pitch :][:width], z[z_at + i * z_pitch :][:width], y[i]
        gz_row = gz[gz_at + i * gz_pitch :][:width]
        if first:
            for j in range(width):
                gz_row[j] = 0
        for j in range(width):
            gate = sigmoid(z_row[j])
            gz_row[j] += g_row[j] * y_row[j] * gate * (one + z_row[j] * (one - gate))


@jit(EXACT)
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
                _load_rows(B, offset(B_s, d, s, b, t), sign * B_s[3], tokens, states, Bs)
                _load_rows(C, offset(C_s, d, s, b, t), sign * C_s[3], tokens, states, Cs)
                dt_at, u_at, z_at = (
                    offset(dt_s, d, s, b, t) + lo,
                    offset(u_s, d, s, b, t) + lo,
                    offset(z_s, 0, s, b, t) + lo,
                )
                dt_pitch, u_pitch, z_pitch = sign * dt_s[3], sign * u_s[3], sign * z_s[3]
                g_at, g_pitch = offset(g_s, 0, s, b, t) + lo, sign * g_s[3]
                _start_chunk(
                    dt,
                    dt_at,
                    dt_pitch,
                    u,
                    u_at,
                    u_pitch,
                    tokens,
                    bias[d, lo:hi],
                    D[d, lo:hi],
                    softplus,
                    step,
                    inflow,
                    y,
                )
                _gate_gradient(g, g_at, g_pitch, z, z_at, z_pitch, tokens, gated, width, gy)
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
                gu_at, gu_pitch = offset(gu_s, d, s, b, t) + lo, sign * gu_s[3]
                _input_gradients(
                    dt, dt_at, dt_pitch, u, u_at, u_pitch, tokens, bias[d, lo:hi], D[d, lo:hi], softplus, step, gy,
                    g_input, g_step, gu, gdt, gu_at, gu_pitch, gD[d, s, b, lo:hi], g_bias[d, s, b, lo:hi],
                )  # fmt: skip
                if gated:
                    gz_at, gz_pitch = offset(gz_s, 0, s, b, t) + lo, sign * gz_s[3]
                    _gate_input_gradient(
                        g, g_at, g_pitch, z, z_at, z_pitch, y, tokens, d == 0, gz, gz_at, gz_pitch, width
                    )
            _copy(g_rates[:states, :width], gA[d, s, b, :, lo:hi])
            _copy(adjoint[:states, :width], g_initial[d, s, b, :, lo:hi])
