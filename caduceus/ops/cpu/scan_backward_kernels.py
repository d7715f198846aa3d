"""Numba kernels of the CPU backend: the gradient of the selective scan, in the manner and the terms of `scan_kernels`.

A scan's states are recomputed from those kept before every chunk; adjoints go through them backwards.
"""

import numpy as np

from caduceus.ops.cpu.scan_kernels import (
    CHUNK,
    EXACT,
    GROUP,
    REORDERED,
    chunk_tokens,
    copy_row,
    copy_rows,
    exp2,
    inflows,
    jit,
    leaf,
    load_rows,
    offset,
    prefetch_row,
    sigmoid,
    step_sizes,
)


@jit(EXACT)
def _gate_gradient(g, g_at, g_pitch, z, z_at, z_pitch, tokens, gated, width, gy):
    """Gradient of the chunk's outputs before the gate."""
    leaf()
    for i in range(tokens):
        g_row, z_row, gy_row = g[g_at + i * g_pitch :][:width], z[z_at + i * z_pitch :][:width], gy[i]
        prefetch_row(g, g_at + (i - CHUNK) * g_pitch, width)
        prefetch_row(z, z_at + (i - CHUNK) * z_pitch, width)
        if gated:
            for j in range(width):
                gy_row[j] = g_row[j] * z_row[j] * sigmoid(z_row[j])
        else:
            for j in range(width):
                gy_row[j] = g_row[j]


@jit(REORDERED)
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
            f0, f1 = exp2(x * a0[j]), exp2(x * a1[j])
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
        prefetch_row(gu, g_at + (i - CHUNK) * g_pitch, width)
        prefetch_row(gdt, g_at + (i - CHUNK) * g_pitch, width)
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
        prefetch_row(gz, gz_at + (i - CHUNK) * gz_pitch, width)
        if first:
            for j in range(width):
                gz_row[j] = 0
        for j in range(width):
            gate = sigmoid(z_row[j])
            gz_row[j] += g_row[j] * y_row[j] * gate * (one + z_row[j] * (one - gate))


@jit(EXACT)
def scan_backward(first, last, tensors, strides, flags, block, kept, grads, sums):
    """Items are (stream, batch, block of channels). See `scan._scan_backward` for the tensors."""
    g, u, dt, B, C, z, rates, D, bias, g_final = tensors
    g_s, u_s, dt_s, B_s, C_s, z_s, gu_s, gz_s = strides
    softplus, gated, backward, length = flags
    gu, gdt, gz = grads
    gB, gC, gA, gD, g_bias, g_initial = sums
    directions, _, batch, states, channels = g_final.shape
    blocks = (channels + block - 1) // block
    padded = (states + GROUP - 1) // GROUP * GROUP
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
            copy_rows(rates[d, :, lo:hi], a[:states, :width])
            copy_rows(g_final[d, s, b, :, lo:hi], adjoint[:states, :width])
            g_rates[:] = 0
            gD[d, s, b, lo:hi] = 0
            g_bias[d, s, b, lo:hi] = 0
            for chunk in range((length + CHUNK - 1) // CHUNK - 1, -1, -1):
                t, sign, tokens = chunk_tokens(length, (d != s) != backward, chunk)
                copy_rows(kept[d, s, b, chunk, :, lo:hi], h[:states, :width])
                load_rows(B, offset(B_s, d, s, b, t), sign * B_s[3], tokens, states, Bs)
                load_rows(C, offset(C_s, d, s, b, t), sign * C_s[3], tokens, states, Cs)
                dt_at, u_at, z_at = (
                    offset(dt_s, d, s, b, t) + lo,
                    offset(u_s, d, s, b, t) + lo,
                    offset(z_s, 0, s, b, t) + lo,
                )
                dt_pitch, u_pitch, z_pitch = sign * dt_s[3], sign * u_s[3], sign * z_s[3]
                g_at, g_pitch = offset(g_s, 0, s, b, t) + lo, sign * g_s[3]
                step_sizes(dt, dt_at, dt_pitch, tokens, -CHUNK, bias[d, lo:hi], softplus, step)
                inflows(u, u_at, u_pitch, tokens, -CHUNK, D[d, lo:hi], step, inflow, y)
                _gate_gradient(g, g_at, g_pitch, z, z_at, z_pitch, tokens, gated, width, gy)
                g_input[:] = 0
                g_step[:] = 0
                for n in range(0, states, 2):
                    _retreat(
                        tokens, step, inflow, gy, a, h, adjoint, Bs, Cs,
                        y, g_rates, g_input, g_step, gBs, gCs, past, decay, n,
                    )  # fmt: skip
                for i in range(tokens):
                    copy_row(gBs[i, :states], gB[item % blocks, d, s, b, t + sign * i])
                    copy_row(gCs[i, :states], gC[item % blocks, d, s, b, t + sign * i])
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
            copy_rows(g_rates[:states, :width], gA[d, s, b, :, lo:hi])
            copy_rows(adjoint[:states, :width], g_initial[d, s, b, :, lo:hi])


@jit(EXACT)
def _recede(tokens, step, gy, rates, adjoint, Cs, n):
    """Carry the adjoint of the states n … n + 3 back through a chunk. step, gy (CHUNK, W); rates, adjoint (N, W)."""
    leaf()
    a0, a1, a2, a3 = rates[n], rates[n + 1], rates[n + 2], rates[n + 3]
    adj0, adj1, adj2, adj3 = adjoint[n], adjoint[n + 1], adjoint[n + 2], adjoint[n + 3]
    for i in range(tokens - 1, -1, -1):
        step_i, gy_i = step[i], gy[i]
        c0, c1, c2, c3 = Cs[i, n], Cs[i, n + 1], Cs[i, n + 2], Cs[i, n + 3]
        for j in range(adjoint.shape[1]):
            x, g = step_i[j], gy_i[j]
            adj0[j] = exp2(x * a0[j]) * (adj0[j] + g * c0)
            adj1[j] = exp2(x * a1[j]) * (adj1[j] + g * c1)
            adj2[j] = exp2(x * a2[j]) * (adj2[j] + g * c2)
            adj3[j] = exp2(x * a3[j]) * (adj3[j] + g * c3)


@jit(EXACT)
def initial_state_gradient(first, last, tensors, strides, flags, block, g_initial):
    """Gradient of the initial states (P, S, B, N, E) alone. Items as of `scan_backward`."""
    g, dt, C, z, rates, bias = tensors
    g_s, dt_s, C_s, z_s = strides
    softplus, gated, backward, length = flags
    directions, _, batch, states, channels = g_initial.shape
    blocks = (channels + block - 1) // block
    padded = (states + GROUP - 1) // GROUP * GROUP
    kind = g_initial.dtype
    step, gy = np.zeros((CHUNK, block), kind), np.zeros((CHUNK, block), kind)
    a, adjoint, Cs = np.zeros((padded, block), kind), np.zeros((padded, block), kind), np.zeros((CHUNK, padded), kind)
    for item in range(first, last):
        s, b, lo = item // (batch * blocks), item // blocks % batch, item % blocks * block
        hi = min(lo + block, channels)
        width = hi - lo
        for scratch in (step, gy, a):
            scratch[:] = 0
        for d in range(directions):
            copy_rows(rates[d, :, lo:hi], a[:states, :width])
            adjoint[:] = 0
            for chunk in range((length + CHUNK - 1) // CHUNK - 1, -1, -1):
                t, sign, tokens = chunk_tokens(length, (d != s) != backward, chunk)
                load_rows(C, offset(C_s, d, s, b, t), sign * C_s[3], tokens, states, Cs)
                dt_at, dt_pitch = offset(dt_s, d, s, b, t) + lo, sign * dt_s[3]
                z_at, z_pitch = offset(z_s, 0, s, b, t) + lo, sign * z_s[3]
                g_at, g_pitch = offset(g_s, 0, s, b, t) + lo, sign * g_s[3]
                step_sizes(dt, dt_at, dt_pitch, tokens, -CHUNK, bias[d, lo:hi], softplus, step)
                _gate_gradient(g, g_at, g_pitch, z, z_at, z_pitch, tokens, gated, width, gy)
                for n in range(0, states, GROUP):
                    _recede(tokens, step, gy, a, adjoint, Cs, n)
            copy_rows(adjoint[:states, :width], g_initial[d, s, b, :, lo:hi])
