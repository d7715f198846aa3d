"""Numba kernels of the CPU backend: the selective scan, and what the kernels of its gradient share with it.

Each kernel works serially through the items [first, last) of its grid and holds no GIL, so that `run_kernel` can run
shares of the grid in threads. An item's result does not depend on which thread has it, so the number of threads never
changes a bit of the output. All arithmetic is in one type, float32 or float64, chosen by the type of the arrays.

What makes them fast: the innermost loop takes the tokens of a chunk with the states of one vector of channels in
registers; whatever else a chunk needs fits in the first cache, vector by vector. Memory is laid out (…, L, E), so that
neighbouring channels are one load. The next chunk's rows are prefetched: they lie apart, which the hardware does not
foresee.

Tensors come as a flat array over their memory with the strides of all axes but the last, whose stride is 1.
Shapes: P parameter directions, S streams, B batch, L length, E channels, N states. W is LANES.
"""

import numpy as np

from caduceus.ops.cpu.compiled import jit, leaf
from caduceus.ops.cpu.llvm_values import EXACT
from caduceus.ops.cpu.vectors import LANES, exp2, load, prefetch, read, sigmoid, softplus, store, write

CHUNK = 16
"""Tokens between kept states. The backward pass recomputes the states of one chunk at a time."""
BLOCK = 256
"""Most channels per item of the backward pass, which adds up gradients of B and C item by item."""
FORWARD_BLOCK = 512
"""Most channels per item of the forward pass."""
GROUP = 4
"""States are padded to whole multiples of this, the most that a hot loop takes at once."""


@jit(EXACT)
def aligned_zeros(shape, kind):
    """Scratch that begins with a cache line: loads and stores across two lines cost twice as much."""
    size = 1
    for extent in shape:
        size *= extent
    flat = np.zeros(size + 16, kind)
    first = -np.int64(flat.ctypes.data) % 64 // flat.itemsize
    return flat[first : first + size].reshape(shape)


@jit(EXACT)
def prefetch_row(flat, at):
    for j in range(0, LANES, 16):
        prefetch(flat, at + j)


@jit(EXACT)
def prefetch_states(kept, chunk, states, channels, lo):
    """Ask for a vector of channels from lo on of a chunk's states. kept is flat, of (chunks, N, E)."""
    for n in range(states):
        prefetch_row(kept, (chunk * states + n) * channels + lo)


@jit(EXACT)
def offset(strides, d, s, b, t):
    return d * strides[0] + s * strides[1] + b * strides[2] + t * strides[3]


@jit(EXACT)
def chunk_tokens(length, backwards, chunk):
    """First position of a chunk, step from one position to the next, and how many."""
    taken = chunk * CHUNK
    return (length - 1 - taken, -1, min(CHUNK, length - taken)) if backwards else (taken, 1, min(CHUNK, length - taken))


@jit(EXACT)
def load_rows(flat, at, pitch, tokens, states, rows):
    """Copy the B or C of a chunk's tokens into rows (CHUNK, N padded)."""
    for i in range(tokens):
        for n in range(states):
            rows[i, n] = flat[at + i * pitch + n]


@jit(EXACT)
def vectors_of_rows(rows, first, last, vectors):
    """Copy channels [first, last) of rows (N, E) into vectors (groups, N padded, W)."""
    leaf()
    states, channels = rows.shape
    for lo in range(first, last, LANES):
        group = vectors[(lo - first) // LANES]
        for n in range(states):
            store(group, n * LANES, read(rows.reshape(-1), n * channels + lo, last - lo))


@jit(EXACT)
def rows_of_vectors(vectors, rows, first, last):
    """The inverse of `vectors_of_rows`."""
    leaf()
    states, channels = rows.shape
    for lo in range(first, last, LANES):
        group = vectors[(lo - first) // LANES]
        for n in range(states):
            write(rows.reshape(-1), n * channels + lo, last - lo, load(group, n * LANES))


@jit(EXACT)
def _begin(tokens, tensors, at, pitch, count, bias, D, lo, has_softplus, step, inflow, y):
    """Step sizes, step times input, and D times input: step, inflow, y (CHUNK, W)."""
    leaf()
    u, dt = tensors
    bias_lanes, D_lanes = read(bias, lo, count), read(D, lo, count)
    for i in range(tokens):
        u_at, dt_at = at[0] + i * pitch[0], at[1] + i * pitch[1]
        prefetch_row(u, u_at + CHUNK * pitch[0])
        prefetch_row(dt, dt_at + CHUNK * pitch[1])
        inputs, x = read(u, u_at, count), read(dt, dt_at, count) + bias_lanes
        if has_softplus:
            x = softplus(x)
        store(step, i * LANES, x)
        store(inflow, i * LANES, x * inputs)
        store(y, i * LANES, D_lanes * inputs)


@jit(EXACT)
def _advance(tokens, states, step, inflow, rates, h, Bs, Cs, y):
    """Take `tokens` steps with all states and add what they give to y.

    step, inflow, y (CHUNK, W); rates, h (N padded, W); Bs, Cs (CHUNK, N padded).
    """
    leaf()
    for n in range(0, states, 4):
        at0, at1, at2, at3 = n * LANES, (n + 1) * LANES, (n + 2) * LANES, (n + 3) * LANES
        a0, a1, a2, a3 = load(rates, at0), load(rates, at1), load(rates, at2), load(rates, at3)
        h0, h1, h2, h3 = load(h, at0), load(h, at1), load(h, at2), load(h, at3)
        for i in range(tokens):
            x, v = load(step, i * LANES), load(inflow, i * LANES)
            h0 = h0 * exp2(x * a0) + v * Bs[i, n]
            h1 = h1 * exp2(x * a1) + v * Bs[i, n + 1]
            h2 = h2 * exp2(x * a2) + v * Bs[i, n + 2]
            h3 = h3 * exp2(x * a3) + v * Bs[i, n + 3]
            given = (h0 * Cs[i, n] + h1 * Cs[i, n + 1]) + (h2 * Cs[i, n + 2] + h3 * Cs[i, n + 3])
            store(y, i * LANES, load(y, i * LANES) + given)
        store(h, at0, h0)
        store(h, at1, h1)
        store(h, at2, h2)
        store(h, at3, h3)


@jit(EXACT)
def _end(tokens, y, tensors, at, pitch, count, gated, first, last):
    """Write (first direction) or add a chunk's outputs; after the last direction, gate the sum."""
    leaf()
    z, out = tensors
    for i in range(tokens):
        z_at, out_at = at[0] + i * pitch[0], at[1] + i * pitch[1]
        prefetch_row(z, z_at + CHUNK * pitch[0])
        prefetch_row(out, out_at + CHUNK * pitch[1])
        total = load(y, i * LANES)
        if not first:
            total = read(out, out_at, count) + total
        if gated and last:
            gate = read(z, z_at, count)
            total = total * (gate * sigmoid(gate))
        write(out, out_at, count, total)


@jit(EXACT)
def scan_forward(first, last, tensors, strides, flags, block, out, final, kept):
    """Items are (stream, batch, block of channels). See `scan._scan` for the tensors."""
    u, dt, B, C, z, rates, D, bias, initial = tensors
    u_s, dt_s, B_s, C_s, z_s, out_s = strides
    has_softplus, gated, backward, keep, length = flags
    directions, _, batch, states, channels = final.shape
    blocks = (channels + block - 1) // block
    padded = (states + GROUP - 1) // GROUP * GROUP
    kind = out.dtype
    rows = aligned_zeros((3, CHUNK, LANES), kind)
    step, inflow, y = rows[0], rows[1], rows[2]
    per_state = (block // LANES, padded, LANES)
    a, h = aligned_zeros(per_state, kind), aligned_zeros(per_state, kind)
    Bs, Cs = np.zeros((CHUNK, padded), kind), np.zeros((CHUNK, padded), kind)
    for item in range(first, last):
        s, b, lo = item // (batch * blocks), item // blocks % batch, item % blocks * block
        hi = min(lo + block, channels)
        a[:] = 0
        h[:] = 0
        for d in range(directions):
            vectors_of_rows(rates[d], lo, hi, a)
            vectors_of_rows(initial[d, s, b], lo, hi, h)
            kept_states = kept[d, s, b].reshape(-1)
            for chunk in range((length + CHUNK - 1) // CHUNK):
                t, sign, tokens = chunk_tokens(length, (d != s % 2) != backward, chunk)
                if keep:
                    rows_of_vectors(h, kept[d, s, b, chunk], lo, hi)
                load_rows(B, offset(B_s, d, s, b, t), sign * B_s[3], tokens, states, Bs)
                load_rows(C, offset(C_s, d, s, b, t), sign * C_s[3], tokens, states, Cs)
                u_at, dt_at = offset(u_s, d, s, b, t), offset(dt_s, d, s, b, t)
                z_at, out_at = offset(z_s, 0, s, b, t), offset(out_s, 0, s, b, t)
                in_pitch, out_pitch = (sign * u_s[3], sign * dt_s[3]), (sign * z_s[3], sign * out_s[3])
                for e in range(lo, hi, LANES):
                    if keep:
                        prefetch_states(kept_states, chunk + 1, states, channels, e)
                    k, count = (e - lo) // LANES, hi - e
                    in_at, ends_at = (u_at + e, dt_at + e), (z_at + e, out_at + e)
                    _begin(
                        tokens, (u, dt), in_at, in_pitch, count, bias[d], D[d], e, has_softplus, step, inflow, y
                    )  # fmt: skip
                    _advance(tokens, states, step, inflow, a[k], h[k], Bs, Cs, y)
                    _end(tokens, y, (z, out), ends_at, out_pitch, count, gated, d == 0, d == directions - 1)
            rows_of_vectors(h, final[d, s, b], lo, hi)
