"""Kernels of Mamba-2's scan: time is cut into chunks of T positions, and a program takes several heads of one.

A *row* is one (direction, stream, batch element). Within a chunk all is products of tiles that stay in registers: the
decays from each position to each other one are made there, and no T x T matrix reaches memory.

    forward   ssd_chunk_state   each chunk from a zero state: its end state and its decay
              ssd_carry         across chunks: the state that enters each
              ssd_output        each chunk from its true initial state

The way back is in ssd_backward_kernels.py. Positions are counted along the direction of a run, so every triangle is a
lower one. Logarithms of decays are summed in fp64: they are subtracted from each other, and short decays far into a
chunk would lose digits in fp32. Products are in the type of x, everything else in fp32.
"""

import triton
import triton.language as tl

from caduceus.ops.triton.device import SIZES
from caduceus.ops.triton.scan_arithmetic import LOG2E, sigmoid_and_softplus


@triton.jit
def ssd_place(item, starts_ptr, S, batch, L, n_chunks, reverse, T: tl.constexpr, HAS_STARTS: tl.constexpr):
    """(row, its direction, positions [T] of the chunk in the order of the run, which of them exist, and how many
    borders of packed sequences the run has passed in this chunk up to each)."""
    chunk, row = item % n_chunks, item // n_chunks
    b, s, d = row % batch, row // batch % S, row // batch // S
    backwards = (d + s + reverse) % 2
    taken = chunk * T + tl.arange(0, T)
    position, inside = tl.where(backwards == 1, L - 1 - taken, taken), taken < L
    passed = tl.zeros([T], tl.int32)
    if HAS_STARTS:
        border = position + backwards  # a run from right to left comes to a sequence at its last position
        found = tl.load(starts_ptr + b * L + border, mask=inside & (border < L), other=0)
        passed = tl.cumsum((found != 0).to(tl.int32), 0)
    return row, d, position, inside, passed


@triton.jit
def ssd_steps(dt_ptr, rate, bias, at, inside):
    """(steps after bias and softplus, 0 past the end, their slope, fp64 sums of their decays' logarithms to base 2)."""
    slope, step = sigmoid_and_softplus(tl.load(dt_ptr + at, mask=inside, other=0.0).to(tl.float32) + bias)
    step = tl.where(inside, step, 0.0)
    return step, slope, tl.cumsum((step * (rate * LOG2E)).to(tl.float64), 0)


@triton.jit
def ssd_last(values, T: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, T) == T - 1, values, tl.zeros_like(values)), 0)


@triton.jit
def ssd_decays(alike, logs, passed, T: tl.constexpr, HAS_STARTS: tl.constexpr, EXACT: tl.constexpr):
    """From the second position to the first [T, T]: 0 against the direction and across borders. `alike` [T, T] gives
    its layout alone: in one of another the compiler would hold long vectors in each thread."""
    here = tl.arange(0, T)
    high = logs.to(tl.float32)
    between = (high[:, None] + alike * 0) - high[None, :]
    if EXACT:  # the rest of fp64 sums; in bf16 all of it is below the rounding of the result
        low = (logs - high.to(tl.float64)).to(tl.float32)
        between += low[:, None] - low[None, :]
    decays = tl.exp2(tl.where(here[:, None] >= here[None, :], between, -float("inf")))
    if HAS_STARTS:
        decays = tl.where(passed[:, None] == passed[None, :], decays, 0.0)
    return decays


@triton.jit
def ssd_edges(logs, passed, T: tl.constexpr):
    """(decays from before the chunk to each position, from each to its end, over the whole of it); 0 across borders."""
    total, most = ssd_last(logs, T), ssd_last(passed, T)
    from_before = tl.where(passed == 0, tl.exp2(logs.to(tl.float32)), 0.0)
    to_end = tl.where(passed == most, tl.exp2((total - logs).to(tl.float32)), 0.0)
    return from_before, to_end, tl.where(most == 0, tl.exp2(total.to(tl.float32)), 0.0)


@triton.jit
def ssd_tile(ptr, row, position, inside, row_stride, stride, width: tl.constexpr, BLOCK: tl.constexpr):
    """[T, BLOCK] of a tensor (rows, L, width), zeros outside of it."""
    column = tl.arange(0, BLOCK)
    at = ptr + row * row_stride + position[:, None] * stride + column[None, :]
    return tl.load(at, mask=inside[:, None] & (column < width)[None, :], other=0.0)


@triton.jit
def ssd_store(ptr, tile, row, position, inside, row_stride, stride, width: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    at = ptr + row * row_stride + position[:, None] * stride + column[None, :]
    tl.store(at, tile.to(ptr.dtype.element_ty), mask=inside[:, None] & (column < width)[None, :])


@triton.jit
def ssd_state(ptr, place, W: tl.constexpr, N: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_N: tl.constexpr):
    """Pointers to the state (W, N) of a place, and which of them exist."""
    w, n = tl.arange(0, BLOCK_W), tl.arange(0, BLOCK_N)
    return ptr + place * (W * N) + w[:, None] * N + n[None, :], (w < W)[:, None] & (n < N)[None, :]


@triton.jit
def ssd_load_state(ptr, place, W: tl.constexpr, N: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_N: tl.constexpr):
    at, exists = ssd_state(ptr, place, W, N, BLOCK_W, BLOCK_N)
    return tl.load(at, mask=exists, other=0.0)


@triton.jit(do_not_specialize=SIZES)
def ssd_chunk_state_kernel(
    v_ptr,
    k_ptr,
    dt_ptr,
    A_ptr,
    bias_ptr,
    starts_ptr,
    state_ptr,
    decay_ptr,
    v_row,
    v_stride,
    k_row,
    k_stride,
    S,
    batch,
    L,
    n_chunks,
    reverse,
    H,
    W: tl.constexpr,
    N: tl.constexpr,
    ADJOINT: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    T: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """End states (rows, chunks, H, W, N) of v = x with k = B, and decays (rows, chunks, H). ADJOINT: what the outputs
    of a chunk give to the gradient of the state that enters it, of v = dy with k = C."""
    item = tl.program_id(0).to(tl.int64)
    row, d, position, inside, passed = ssd_place(item, starts_ptr, S, batch, L, n_chunks, reverse, T, HAS_STARTS)
    k = ssd_tile(k_ptr, row, position, inside, k_row, k_stride, N, BLOCK_N)
    h = tl.program_id(1)
    rate, bias = tl.load(A_ptr + d * H + h), tl.load(bias_ptr + d * H + h)
    step, _, logs = ssd_steps(dt_ptr, rate, bias, (row * L + position) * H + h, inside)
    from_before, to_end, decay = ssd_edges(logs, passed, T)
    v = ssd_tile(v_ptr + h * W, row, position, inside, v_row, v_stride, W, BLOCK_W)
    weight = from_before if ADJOINT else to_end * step
    weighted = (v.to(tl.float32) * weight[:, None]).to(v.dtype)
    state = tl.dot(tl.trans(weighted), k.to(v.dtype), input_precision="tf32x3")
    at, exists = ssd_state(state_ptr, item * H + h, W, N, BLOCK_W, BLOCK_N)
    tl.store(at, state, mask=exists)
    tl.store(decay_ptr + item * H + h, decay)


@triton.jit
def ssd_nth(number, n_chunks, descending):
    """The chunk that is taken after `number` others; less than 0 where there is none."""
    left = n_chunks - 1 - tl.cast(number, tl.int64)
    return tl.where((descending == 1) | (left < 0), left, number)


@triton.jit(do_not_specialize=SIZES)
def ssd_carry_kernel(
    end_ptr,
    decay_ptr,
    initial_ptr,
    entering_ptr,
    final_ptr,
    n_chunks,
    descending,
    H,
    SIZE,
    HAS_INITIAL: tl.constexpr,
    TURN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The state that enters each chunk (rows, chunks, H, SIZE) and the last one (rows, H, SIZE), of what chunks reach
    from zero. `descending`: from the last chunk to the first, as adjoints go."""
    row = tl.program_id(0).to(tl.int64)
    e = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    exists = e < H * SIZE
    state, none = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.int64)
    if HAS_INITIAL:
        state = tl.load(initial_ptr + row * (H * SIZE) + e, mask=exists, other=0.0).to(tl.float32)
    for first in range(0, n_chunks, TURN):
        ends, decays = (), ()
        for i in tl.static_range(TURN):  # loads stand before stores, which would hold them up
            chunk = ssd_nth(first + i, n_chunks, descending)
            here = exists & (none <= chunk)
            place = row * n_chunks + chunk
            ends = ends + (tl.load(end_ptr + place * (H * SIZE) + e, mask=here, other=0.0),)
            decays = decays + (tl.load(decay_ptr + place * H + e // SIZE, mask=here, other=1.0),)
        for i in tl.static_range(TURN):
            chunk = ssd_nth(first + i, n_chunks, descending)
            at = entering_ptr + (row * n_chunks + chunk) * (H * SIZE) + e
            tl.store(at, state.to(entering_ptr.dtype.element_ty), mask=exists & (none <= chunk))
            state = decays[i] * state + ends[i]
    tl.store(final_ptr + row * (H * SIZE) + e, state, mask=exists)


@triton.jit(do_not_specialize=SIZES)
def ssd_output_kernel(
    x_ptr,
    B_ptr,
    C_ptr,
    dt_ptr,
    A_ptr,
    D_ptr,
    bias_ptr,
    starts_ptr,
    entering_ptr,
    y_ptr,
    x_row,
    x_stride,
    k_row,
    k_stride,
    S,
    batch,
    L,
    n_chunks,
    reverse,
    H,
    W: tl.constexpr,
    N: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    T: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """y (rows, L, H, W): what positions get from others of their chunk, from the state that enters it, and D x."""
    item = tl.program_id(0).to(tl.int64)
    row, d, position, inside, passed = ssd_place(item, starts_ptr, S, batch, L, n_chunks, reverse, T, HAS_STARTS)
    h = tl.program_id(1)
    rate, bias = tl.load(A_ptr + d * H + h), tl.load(bias_ptr + d * H + h)
    step, _, logs = ssd_steps(dt_ptr, rate, bias, (row * L + position) * H + h, inside)
    from_before, _, _ = ssd_edges(logs, passed, T)
    B = ssd_tile(B_ptr, row, position, inside, k_row, k_stride, N, BLOCK_N)
    C = ssd_tile(C_ptr, row, position, inside, k_row, k_stride, N, BLOCK_N)
    entering = ssd_load_state(entering_ptr, item * H + h, W, N, BLOCK_W, BLOCK_N)
    y = tl.dot(C, tl.trans(entering), input_precision="tf32x3") * from_before[:, None]
    x = ssd_tile(x_ptr + h * W, row, position, inside, x_row, x_stride, W, BLOCK_W)
    y += tl.load(D_ptr + d * H + h) * x.to(tl.float32)
    weights = tl.dot(C, tl.trans(B), input_precision="tf32x3")
    weights *= ssd_decays(weights, logs, passed, T, HAS_STARTS, x.dtype == tl.float32) * step[None, :]
    y = tl.dot(weights.to(x.dtype), x, y, input_precision="tf32x3")
    ssd_store(y_ptr + h * W, y, row, position, inside, tl.cast(L, tl.int64) * (H * W), H * W, W, BLOCK_W)
