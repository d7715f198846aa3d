"""Numba kernels of the CPU backend: the gradient of the selective scan, in the manner and the terms of `scan_kernels`.

A scan's states are recomputed from those kept before every chunk; adjoints go through them backwards.
"""

import numpy as np

from caduceus.ops.cpu.compiled import jit, leaf
from caduceus.ops.cpu.llvm_values import EXACT
from caduceus.ops.cpu.scan_kernels import (
    CHUNK,
    GROUP,
    aligned_zeros,
    chunk_tokens,
    load_rows,
    offset,
    prefetch_row,
    prefetch_states,
    rows_of_vectors,
    vectors_of_rows,
)
from caduceus.ops.cpu.vectors import (
    LANES,
    exp2,
    load,
    load_half,
    read,
    sigmoid,
    softplus_and_slope,
    store,
    sum_of_halves,
    total,
    write,
    zeros,
)

HALF = LANES // 2


@jit(EXACT)
def _step_sizes(tokens, dt, dt_at, dt_pitch, count, bias, lo, has_softplus, step, slope):
    """A chunk's step sizes and their slopes over dt: step, slope (CHUNK, W)."""
    leaf()
    bias_lanes = read(bias, lo, count)
    for i in range(tokens):
        at = dt_at + i * dt_pitch
        prefetch_row(dt, at - CHUNK * dt_pitch)
        x = read(dt, at, count) + bias_lanes
        if has_softplus:
            size, rise = softplus_and_slope(x)
        else:
            size, rise = x, zeros(step) + 1
        store(step, i * LANES, size)
        store(slope, i * LANES, rise)


@jit(EXACT)
def _output_gradients(tokens, tensors, at, pitch, count, gated, gy, gate_slope):
    """Gradient of a chunk's outputs before the gate, and the gradient of z per unit of output: (CHUNK, W)."""
    leaf()
    g, z = tensors
    for i in range(tokens):
        g_at, z_at = at[0] + i * pitch[0], at[1] + i * pitch[1]
        prefetch_row(g, g_at - CHUNK * pitch[0])
        gradient = read(g, g_at, count)
        if gated:
            prefetch_row(z, z_at - CHUNK * pitch[1])
            x = read(z, z_at, count)
            gate = sigmoid(x)
            store(gate_slope, i * LANES, gradient * gate * (x * (1 - gate) + 1))
            gradient = gradient * (x * gate)
        store(gy, i * LANES, gradient)


@jit(EXACT)
def _inflows(tokens, u, u_at, u_pitch, count, D, lo, step, inflow, y, g_input, g_step):
    """Step times input, and D times input, of a chunk; and zeros for what `_retreat` adds to: (CHUNK, W)."""
    leaf()
    D_lanes, nothing = read(D, lo, count), zeros(step)
    for i in range(tokens):
        at, row = u_at + i * u_pitch, i * LANES
        prefetch_row(u, at - CHUNK * u_pitch)
        inputs = read(u, at, count)
        store(inflow, row, load(step, row) * inputs)
        store(y, row, D_lanes * inputs)
        store(g_input, row, nothing)
        store(g_step, row, nothing)


@jit(EXACT)
def _add_halves(sums, at, vector):
    store(sums, at, load_half(sums, at) + sum_of_halves(vector))


@jit(EXACT)
def _retreat(tokens, states, step, inflow, gy, rates, h, adjoint, Bs, Cs, tape, y, g_rates, g_input, g_step, gBs, gCs):
    """Recompute the states over a chunk, two at a time, then carry their adjoint back through it.

    step, inflow, gy, y and g_input, g_step (their gradients) (CHUNK, W); rates, h (before the chunk), adjoint (of the
    state after the chunk; becomes that of h), g_rates (N padded, W); Bs, Cs (CHUNK, N padded); gBs, gCs
    (N padded, CHUNK, W / 2). tape (CHUNK, 4, W) is scratch. y and all gradients are added to.
    """
    leaf()
    for n in range(0, states, 2):
        at0, at1 = n * LANES, (n + 1) * LANES
        a0, a1, h0, h1 = load(rates, at0), load(rates, at1), load(h, at0), load(h, at1)
        for i in range(tokens):
            row, taped = i * LANES, 4 * i * LANES
            x, v, g = load(step, row), load(inflow, row), load(gy, row)
            e0, e1 = exp2(x * a0), exp2(x * a1)
            store(tape, taped, h0)
            store(tape, taped + LANES, h1)
            store(tape, taped + 2 * LANES, e0)
            store(tape, taped + 3 * LANES, e1)
            h0, h1 = h0 * e0 + v * Bs[i, n], h1 * e1 + v * Bs[i, n + 1]
            store(y, row, load(y, row) + (h0 * Cs[i, n] + h1 * Cs[i, n + 1]))
            _add_halves(gCs, (n * CHUNK + i) * HALF, g * h0)
            _add_halves(gCs, ((n + 1) * CHUNK + i) * HALF, g * h1)
        d0, d1, ga0, ga1 = load(adjoint, at0), load(adjoint, at1), load(g_rates, at0), load(g_rates, at1)
        for i in range(tokens - 1, -1, -1):
            row, taped = i * LANES, 4 * i * LANES
            x, v, g = load(step, row), load(inflow, row), load(gy, row)
            g0, g1 = d0 + g * Cs[i, n], d1 + g * Cs[i, n + 1]
            _add_halves(gBs, (n * CHUNK + i) * HALF, g0 * v)
            _add_halves(gBs, ((n + 1) * CHUNK + i) * HALF, g1 * v)
            d0, d1 = g0 * load(tape, taped + 2 * LANES), g1 * load(tape, taped + 3 * LANES)
            k0, k1 = d0 * load(tape, taped), d1 * load(tape, taped + LANES)
            ga0, ga1 = ga0 + k0 * x, ga1 + k1 * x
            store(g_input, row, load(g_input, row) + (g0 * Bs[i, n] + g1 * Bs[i, n + 1]))
            store(g_step, row, load(g_step, row) + (k0 * a0 + k1 * a1))
        store(adjoint, at0, d0)
        store(adjoint, at1, d1)
        store(g_rates, at0, ga0)
        store(g_rates, at1, ga1)


@jit(EXACT)
def _input_gradients(
    tokens, tensors, at, pitch, count, D, lo, step, slope, gy, g_input, g_step, gD, g_bias
):  # fmt: skip
    """Gradients of a chunk's u and dt, and of D and the bias (W), from those of step · u and of the exponent."""
    leaf()
    u, gu, gdt = tensors
    D_lanes, D_sum, bias_sum = read(D, lo, count), load(gD, 0), load(g_bias, 0)
    for i in range(tokens):
        row, g_at = i * LANES, at[1] + i * pitch[1]
        prefetch_row(gu, g_at - CHUNK * pitch[1])
        prefetch_row(gdt, g_at - CHUNK * pitch[1])
        inputs, gradient, entering = read(u, at[0] + i * pitch[0], count), load(gy, row), load(g_input, row)
        write(gu, g_at, count, gradient * D_lanes + entering * load(step, row))
        D_sum += gradient * inputs
        steps = (entering * inputs + load(g_step, row) * 0.6931471805599453) * load(slope, row)
        write(gdt, g_at, count, steps)
        bias_sum += steps
    store(gD, 0, D_sum)
    store(g_bias, 0, bias_sum)


@jit(EXACT)
def _gate_input_gradient(tokens, gate_slope, y, gz, gz_at, gz_pitch, count, first):
    """Gradient of a chunk's z: written for the first direction, added to for the others."""
    leaf()
    for i in range(tokens):
        at = gz_at + i * gz_pitch
        prefetch_row(gz, at - CHUNK * gz_pitch)
        gradient = load(gate_slope, i * LANES) * load(y, i * LANES)
        if not first:
            gradient = read(gz, at, count) + gradient
        write(gz, at, count, gradient)


@jit(EXACT)
def _totals(sums, states, i, row):
    """Sum over channels for a chunk's token i: sums (N padded, CHUNK, W / 2) into row (N)."""
    leaf()
    for n in range(states):
        row[n] = total(load_half(sums, (n * CHUNK + i) * HALF))


@jit(EXACT)
def scan_backward(first, last, tensors, strides, flags, block, kept, grads, sums):
    """Items are (stream, batch, block of channels). See `scan._scan_backward` for the tensors."""
    g, u, dt, B, C, z, rates, D, bias, g_final = tensors
    g_s, u_s, dt_s, B_s, C_s, z_s, gu_s, gz_s = strides
    has_softplus, gated, backward, length = flags
    gu, gdt, gz = grads
    gB, gC, gA, gD, g_bias, g_initial = sums
    directions, _, batch, states, channels = g_final.shape
    blocks, groups = (channels + block - 1) // block, block // LANES
    padded = (states + GROUP - 1) // GROUP * GROUP
    kind = kept.dtype
    rows, tape = aligned_zeros((8, CHUNK, LANES), kind), aligned_zeros((CHUNK, 4, LANES), kind)
    step, slope, inflow, y, gy, gate_slope = rows[0], rows[1], rows[2], rows[3], rows[4], rows[5]
    g_input, g_step = rows[6], rows[7]
    h, per_state = aligned_zeros((1, padded, LANES), kind), (groups, padded, LANES)
    a, adjoint, g_rates = (
        aligned_zeros(per_state, kind),
        aligned_zeros(per_state, kind),
        aligned_zeros(per_state, kind),
    )
    D_sums, bias_sums = aligned_zeros((groups, 1, LANES), kind), aligned_zeros((groups, 1, LANES), kind)
    Bs, Cs = np.zeros((CHUNK, padded), kind), np.zeros((CHUNK, padded), kind)
    gBs, gCs = aligned_zeros((padded, CHUNK, HALF), kind), aligned_zeros((padded, CHUNK, HALF), kind)
    for item in range(first, last):
        s, b, lo = item // (batch * blocks), item // blocks % batch, item % blocks * block
        hi = min(lo + block, channels)
        a[:] = 0
        adjoint[:] = 0
        for d in range(directions):
            vectors_of_rows(rates[d], lo, hi, a)
            vectors_of_rows(g_final[d, s, b], lo, hi, adjoint)
            kept_states = kept[d, s, b].reshape(-1)
            for scratch in (g_rates, D_sums, bias_sums):
                scratch[:] = 0
            for chunk in range((length + CHUNK - 1) // CHUNK - 1, -1, -1):
                t, sign, tokens = chunk_tokens(length, (d != s % 2) != backward, chunk)
                load_rows(B, offset(B_s, d, s, b, t), sign * B_s[3], tokens, states, Bs)
                load_rows(C, offset(C_s, d, s, b, t), sign * C_s[3], tokens, states, Cs)
                u_at, dt_at, g_at = offset(u_s, d, s, b, t), offset(dt_s, d, s, b, t), offset(g_s, 0, s, b, t)
                z_at, gu_at, gz_at = offset(z_s, 0, s, b, t), offset(gu_s, d, s, b, t), offset(gz_s, 0, s, b, t)
                u_pitch, gu_pitch, out_pitch = sign * u_s[3], sign * gu_s[3], (sign * g_s[3], sign * z_s[3])
                gBs[:] = 0
                gCs[:] = 0
                for e in range(lo, hi, LANES):
                    k, count = (e - lo) // LANES, hi - e
                    prefetch_states(kept_states, chunk - 1, states, channels, e)
                    vectors_of_rows(kept[d, s, b, chunk], e, min(e + LANES, hi), h)
                    _step_sizes(
                        tokens, dt, dt_at + e, sign * dt_s[3], count, bias[d], e, has_softplus, step, slope
                    )  # fmt: skip
                    _output_gradients(
                        tokens, (g, z), (g_at + e, z_at + e), out_pitch, count, gated, gy, gate_slope
                    )  # fmt: skip
                    _inflows(tokens, u, u_at + e, u_pitch, count, D[d], e, step, inflow, y, g_input, g_step)
                    _retreat(
                        tokens, states, step, inflow, gy, a[k], h[0], adjoint[k], Bs, Cs, tape, y, g_rates[k],
                        g_input, g_step, gBs, gCs,
                    )  # fmt: skip
                    _input_gradients(
                        tokens, (u, gu, gdt), (u_at + e, gu_at + e), (u_pitch, gu_pitch), count, D[d], e, step, slope,
                        gy, g_input, g_step, D_sums[k], bias_sums[k],
                    )  # fmt: skip
                    if gated:
                        _gate_input_gradient(
                            tokens, gate_slope, y, gz, gz_at + e, sign * gz_s[3], count, d == 0
                        )  # fmt: skip
                for i in range(tokens):
                    _totals(gBs, states, i, gB[item % blocks, d, s, b, t + sign * i])
                    _totals(gCs, states, i, gC[item % blocks, d, s, b, t + sign * i])
            rows_of_vectors(g_rates, gA[d, s, b], lo, hi)
            rows_of_vectors(D_sums, gD[d, s, b : b + 1], lo, hi)
            rows_of_vectors(bias_sums, g_bias[d, s, b : b + 1], lo, hi)
            rows_of_vectors(adjoint, g_initial[d, s, b], lo, hi)


@jit(EXACT)
def _recede(tokens, states, step, gy, rates, adjoint, Cs):
    """Carry the adjoint of the states back through a chunk. step, gy (CHUNK, W); rates, adjoint (N padded, W)."""
    leaf()
    for n in range(0, states, 4):
        at0, at1, at2, at3 = n * LANES, (n + 1) * LANES, (n + 2) * LANES, (n + 3) * LANES
        a0, a1, a2, a3 = load(rates, at0), load(rates, at1), load(rates, at2), load(rates, at3)
        d0, d1, d2, d3 = load(adjoint, at0), load(adjoint, at1), load(adjoint, at2), load(adjoint, at3)
        for i in range(tokens - 1, -1, -1):
            x, g = load(step, i * LANES), load(gy, i * LANES)
            d0 = exp2(x * a0) * (d0 + g * Cs[i, n])
            d1 = exp2(x * a1) * (d1 + g * Cs[i, n + 1])
            d2 = exp2(x * a2) * (d2 + g * Cs[i, n + 2])
            d3 = exp2(x * a3) * (d3 + g * Cs[i, n + 3])
        store(adjoint, at0, d0)
        store(adjoint, at1, d1)
        store(adjoint, at2, d2)
        store(adjoint, at3, d3)


@jit(EXACT)
def initial_state_gradient(first, last, tensors, strides, flags, block, g_initial):
    """Gradient of the initial states (P, S, B, N, E) alone. Items are those of `scan_backward`."""
    g, dt, C, z, rates, bias = tensors
    g_s, dt_s, C_s, z_s = strides
    has_softplus, gated, backward, length = flags
    directions, _, batch, states, channels = g_initial.shape
    blocks, groups = (channels + block - 1) // block, block // LANES
    padded = (states + GROUP - 1) // GROUP * GROUP
    kind, per_state = g_initial.dtype, (groups, padded, LANES)
    rows = aligned_zeros((4, CHUNK, LANES), kind)
    step, slope, gy, gate_slope = rows[0], rows[1], rows[2], rows[3]
    a, adjoint, Cs = aligned_zeros(per_state, kind), aligned_zeros(per_state, kind), np.zeros((CHUNK, padded), kind)
    for item in range(first, last):
        s, b, lo = item // (batch * blocks), item // blocks % batch, item % blocks * block
        hi = min(lo + block, channels)
        a[:] = 0
        for d in range(directions):
            vectors_of_rows(rates[d], lo, hi, a)
            adjoint[:] = 0
            for chunk in range((length + CHUNK - 1) // CHUNK - 1, -1, -1):
                t, sign, tokens = chunk_tokens(length, (d != s % 2) != backward, chunk)
                load_rows(C, offset(C_s, d, s, b, t), sign * C_s[3], tokens, states, Cs)
                dt_at, g_at, z_at = offset(dt_s, d, s, b, t), offset(g_s, 0, s, b, t), offset(z_s, 0, s, b, t)
                out_pitch = sign * g_s[3], sign * z_s[3]
                for e in range(lo, hi, LANES):
                    k, count = (e - lo) // LANES, hi - e
                    _step_sizes(
                        tokens, dt, dt_at + e, sign * dt_s[3], count, bias[d], e, has_softplus, step, slope
                    )  # fmt: skip
                    _output_gradients(
                        tokens, (g, z), (g_at + e, z_at + e), out_pitch, count, gated, gy, gate_slope
                    )  # fmt: skip
                    _recede(tokens, states, step, gy, a[k], adjoint[k], Cs)
            rows_of_vectors(adjoint, g_initial[d, s, b], lo, hi)
