"""Numba kernels of the CPU backend: the selective scan, and what the kernels of its gradient share with it.

Each kernel works serially through the items [first, last) of its grid and holds no GIL, so that `run_kernel` can run
shares of the grid in threads. An item's result does not depend on which thread has it, so the number of threads never
changes a bit of the output. All arithmetic is in one type, float32 or float64, chosen by the type of the arrays.

What makes them fast: memory is laid out (…, L, E) and the innermost loops run over channels with nothing but vector
instructions in them. That needs exp as inline arithmetic (a call to libm stops vectorisation), arrays that are known
not to overlap (`leaf`), and states and decays of one chunk of tokens and one block of channels that fit in cache.
The next chunk's rows are prefetched: a block's rows lie apart, which the hardware does not foresee.
Floating-point sums over channels may be reordered ('reassoc') only outside `exp2`, whose rounding trick that breaks.

Tensors come as a flat array over their memory with the strides of all axes but the last, whose stride is 1.
Shapes: P parameter directions, S streams, B batch, L length, E channels, N states.
"""

import math

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel import default_manager
from numba.extending import intrinsic, overload

CHUNK = 16
"""Tokens between kept states. The backward pass recomputes the states of one chunk at a time."""
BLOCK = 256
"""Most channels per item of the backward pass: wide rows are fast, narrow ones share out the work."""
FORWARD_BLOCK = 512
"""Most channels per item of the forward pass."""
LANES = 32
"""Scratch rows are whole multiples of this, so that odd channel counts leave no scalar remainder in the hot loops."""
GROUP = 4
"""States per pass of the hot loops."""

_DATA_FIELD = str(default_manager[types.float32[::1]].get_field_position("data"))
EXACT = {"contract", "nsz", "arcp"}
REORDERED = EXACT | {"reassoc"}


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


@intrinsic
def prefetch(typing_context, array, index):
    """Ask for the cache line of an element of a flat array, which need not exist."""

    def generate(context, builder, signature, arguments):
        flat = context.make_array(signature.args[0])(context, builder, arguments[0])
        pointer = builder.bitcast(builder.gep(flat.data, [arguments[1]]), ir.IntType(8).as_pointer())
        i32 = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, i32, i32, i32])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
        builder.call(function, [pointer, i32(0), i32(2), i32(1)])
        return context.get_dummy_value()

    return types.void(array, types.intp), generate


def exp2(x):
    raise TypeError("compiled code only")


def _softplus(x):
    raise TypeError("compiled code only")


def sigmoid(x):
    raise TypeError("compiled code only")


@overload(exp2, jit_options={"fastmath": EXACT})
def _overload_exp2(x):
    if x is not types.float32:
        return lambda x: math.exp(x * 0.6931471805599453)

    def implementation(x):
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

    return implementation


@overload(_softplus, jit_options={"fastmath": EXACT})
def _overload_softplus(x):
    if x is not types.float32:
        return lambda x: max(x, 0.0) + math.log1p(math.exp(-abs(x)))

    def softplus(x):
        """log(1 + e^x); exactly 0 for x < -88."""
        e = exp2(abs(x) * np.float32(-1.442695))
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
        return np.float32(1) / (np.float32(1) + exp2(np.float32(128) if y > np.float32(128) else y))

    return implementation


@jit(EXACT)
def prefetch_row(flat, at, channels):
    for j in range(0, channels, 16):
        prefetch(flat, at + j)


@jit(EXACT)
def step_sizes(dt, dt_at, dt_pitch, tokens, ahead, bias, softplus, step):
    """Step sizes of a chunk's tokens, step (CHUNK, W)."""
    leaf()
    channels = bias.size
    for i in range(tokens):
        prefetch_row(dt, dt_at + (i + ahead) * dt_pitch, channels)
        dt_row, step_row = dt[dt_at + i * dt_pitch :][:channels], step[i]
        if softplus:
            for j in range(channels):
                step_row[j] = _softplus(dt_row[j] + bias[j])
        else:
            for j in range(channels):
                step_row[j] = dt_row[j] + bias[j]


@jit(EXACT)
def inflows(u, u_at, u_pitch, tokens, ahead, D, step, inflow, y):
    """Step times input, and D times input, of a chunk's tokens: inflow, y (CHUNK, W)."""
    leaf()
    channels = D.size
    for i in range(tokens):
        prefetch_row(u, u_at + (i + ahead) * u_pitch, channels)
        u_row = u[u_at + i * u_pitch :][:channels]
        step_row, inflow_row, y_row = step[i], inflow[i], y[i]
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
            g0 = h0[j] * exp2(x * a0[j]) + v * b0
            g1 = h1[j] * exp2(x * a1[j]) + v * b1
            g2 = h2[j] * exp2(x * a2[j]) + v * b2
            g3 = h3[j] * exp2(x * a3[j]) + v * b3
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
        prefetch_row(z, z_at + (i + CHUNK) * z_pitch, channels)
        prefetch_row(out, out_at + (i + CHUNK) * out_pitch, channels)
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
def load_rows(flat, at, pitch, tokens, states, rows):
    """Copy the B or C of a chunk's tokens into rows (CHUNK, N padded)."""
    leaf()
    for i in range(tokens):
        for n in range(states):
            rows[i, n] = flat[at + i * pitch + n]


@jit(EXACT)
def offset(strides, d, s, b, t):
    return d * strides[0] + s * strides[1] + b * strides[2] + t * strides[3]


@jit(EXACT)
def copy_row(source, target):
    for j in range(source.size):
        target[j] = source[j]


@jit(EXACT)
def copy_rows(source, target):
    for n in range(source.shape[0]):
        copy_row(source[n], target[n])


@jit(EXACT)
def chunk_tokens(length, backwards, chunk):
    """First position of a chunk, step from one position to the next, and how many."""
    taken = chunk * CHUNK
    return (length - 1 - taken, -1, min(CHUNK, length - taken)) if backwards else (taken, 1, min(CHUNK, length - taken))


@jit(EXACT)
def scan_forward(first, last, tensors, strides, flags, block, out, final, kept):
    """Items are (stream, batch, block of channels). See `scan._scan` for the tensors."""
    u, dt, B, C, z, rates, D, bias, initial = tensors
    u_s, dt_s, B_s, C_s, z_s, out_s = strides
    softplus, gated, backward, keep, length = flags
    directions, _, batch, states, channels = final.shape
    blocks = (channels + block - 1) // block
    padded = (states + GROUP - 1) // GROUP * GROUP
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
            copy_rows(rates[d, :, lo:hi], a[:states, :width])
            copy_rows(initial[d, s, b, :, lo:hi], h[:states, :width])
            for chunk in range((length + CHUNK - 1) // CHUNK):
                t, sign, tokens = chunk_tokens(length, (d != s) != backward, chunk)
                if keep:
                    copy_rows(h[:states, :width], kept[d, s, b, chunk, :, lo:hi])
                load_rows(B, offset(B_s, d, s, b, t), sign * B_s[3], tokens, states, Bs)
                load_rows(C, offset(C_s, d, s, b, t), sign * C_s[3], tokens, states, Cs)
                dt_at, u_at, z_at = (
                    offset(dt_s, d, s, b, t) + lo,
                    offset(u_s, d, s, b, t) + lo,
                    offset(z_s, 0, s, b, t) + lo,
                )
                dt_pitch, u_pitch, z_pitch = sign * dt_s[3], sign * u_s[3], sign * z_s[3]
                step_sizes(dt, dt_at, dt_pitch, tokens, CHUNK, bias[d, lo:hi], softplus, step)
                inflows(u, u_at, u_pitch, tokens, CHUNK, D[d, lo:hi], step, inflow, y)
                for n in range(0, states, GROUP):
                    _advance(tokens, step, inflow, a, h, Bs, Cs, y, n)
                out_at, out_pitch = offset(out_s, 0, s, b, t) + lo, sign * out_s[3]
                _end_chunk(
                    y, z, z_at, z_pitch, tokens, gated, d == 0, d == directions - 1, out, out_at, out_pitch, width
                )
            copy_rows(h[:states, :width], final[d, s, b, :, lo:hi])
