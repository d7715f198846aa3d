"""Kernels of the selective scan: one thread per channel, its N states in registers, time cut into chunks.

A *row* is one (direction, stream, batch element). It is cut into chunks of chunk_size tokens, which run in parallel:

    forward   chunk_state    each chunk from a zero state: its end state and the sum of its dt
              chunk_carry    across chunks: decay over a chunk is exp(A · sum dt), so this is one step per chunk
              scan_forward   each chunk from its true initial state: the outputs

The way back is in scan_backward_kernels.py. Pointers advance by one token's stride, and every base offset is a product
in int64, so no tensor is too large. Sums over channels and chunks go to per-block buffers that are added up afterwards:
no atomics, the same bits every run.
"""

import triton
import triton.language as tl

from caduceus.ops.triton.device import SIZES_AND_STRIDES

LOG2E = tl.constexpr(1.4426950408889634)
RESET_DT = tl.constexpr(1e30)
"""Decay time of a step that begins a packed sequence: every negative A decays to exactly zero over it."""


@triton.jit
def sigmoid_and_softplus(x):
    """Both from one exp. log1p(e) = 2 atanh(e / (2 + e)) keeps full relative precision where step sizes are small."""
    e = tl.exp2(tl.abs(x) * -LOG2E)
    s = e / (2.0 + e)
    q = s * s
    series = 2 + q * (2 / 3 + q * (2 / 5 + q * (2 / 7 + q * (2 / 9 + q * (2 / 11 + q * (2 / 13))))))
    return tl.where(x >= 0, 1.0, e) / (1.0 + e), tl.maximum(x, 0.0) + s * series


@triton.jit
def step_size(dt, bias, SOFTPLUS: tl.constexpr):
    x = dt.to(tl.float32) + bias
    if SOFTPLUS:
        _, x = sigmoid_and_softplus(x)
    return x


@triton.jit
def silu(z):
    return z / (1.0 + tl.exp2(z * -LOG2E))


@triton.jit
def time_of_decay(dt, starts_ptr, position, L, HAS_STARTS: tl.constexpr):
    """The time that the state decays over in a step; `position` is where a start forgets the state."""
    if HAS_STARTS:
        dt = tl.where(tl.load(starts_ptr + position, mask=position < L, other=0) != 0, RESET_DT, dt)
    return dt


# The pointer advances by the stride: offsets n · stride would be computed once and wait in registers, one for each n.
@triton.jit
def load_vectors(ptr, stride, mask, N: tl.constexpr):
    vectors = ()
    for _ in tl.static_range(N):
        vectors = vectors + (tl.load(ptr, mask=mask, other=0.0),)
        ptr += stride
    return vectors


@triton.jit
def store_vectors(ptr, stride, vectors, mask, N: tl.constexpr):
    for n in tl.static_range(N):
        tl.store(ptr, vectors[n], mask=mask)
        ptr += stride


@triton.jit
def zeros(N: tl.constexpr, BLOCK: tl.constexpr):
    vectors = ()
    for _ in tl.static_range(N):
        vectors = vectors + (tl.zeros([BLOCK], tl.float32),)
    return vectors


@triton.jit
def stack(vectors, LOG_COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """2^LOG_COUNT vectors [BLOCK] as the columns, in their order, of one tile [BLOCK, 2^LOG_COUNT]."""
    for level in tl.static_range(LOG_COUNT):
        joined = ()
        for i in tl.static_range(2 ** (LOG_COUNT - 1 - level)):
            pair = tl.join(vectors[i], vectors[i + 2 ** (LOG_COUNT - 1 - level)])
            joined = joined + (tl.reshape(pair, [BLOCK, 2 ** (level + 1)]),)
        vectors = joined
    return vectors[0]


@triton.jit
def load_floats(ptr, COUNT: tl.constexpr):
    """COUNT adjacent fp32 numbers, the same for all threads; two to a load where COUNT is even."""
    numbers = ()
    if COUNT % 2 == 0:
        pairs = ptr.to(tl.pointer_type(tl.int64), bitcast=True)
        for i in tl.static_range(COUNT // 2):
            pair = tl.load(pairs + i)
            numbers = numbers + (pair.to(tl.int32).to(tl.float32, bitcast=True),)
            numbers = numbers + ((pair >> 32).to(tl.int32).to(tl.float32, bitcast=True),)
    else:
        for i in tl.static_range(COUNT):
            numbers = numbers + (tl.load(ptr + i),)
    return numbers


@triton.jit
def advance(h, A, decay_time, dtu, B_ptr, N: tl.constexpr):
    """h <- exp(dt A) h + dt u B, for all N states; A carries the factor log2(e)."""
    B = load_floats(B_ptr, N)
    advanced = ()
    for n in tl.static_range(N):
        advanced = advanced + (tl.exp2(decay_time * A[n]) * h[n] + dtu * B[n],)
    return advanced


@triton.jit
def project(h, C_ptr, y, N: tl.constexpr):
    C = load_floats(C_ptr, N)
    for n in tl.static_range(N):
        y += h[n] * C[n]
    return y


@triton.jit(do_not_specialize=SIZES_AND_STRIDES)
def chunk_state_kernel(
    u_ptr,
    dt_ptr,
    A_ptr,
    B_ptr,
    bias_ptr,
    starts_ptr,
    state_ptr,
    sum_dt_ptr,
    S,
    batch,
    L,
    E,
    n_chunks,
    chunk_size,
    reverse,
    u_row,
    u_token,
    dt_row,
    dt_token,
    B_row,
    B_token,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_STARTS: tl.constexpr,
):
    """State (rows, chunks, N, E) at the end of each chunk begun from zero, and sum dt (rows, chunks, E)."""
    item = tl.program_id(0).to(tl.int64)
    chunk, row = item % n_chunks, item // n_chunks
    b, s, d = row % batch, row // batch % S, row // batch // S
    rev = (d + s + reverse) % 2
    e = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = e < E
    begin = chunk * chunk_size
    length = tl.minimum(L - begin, chunk_size).to(tl.int32)
    t = tl.where(rev == 1, begin + length - 1, begin)
    # A step times a token's stride fits in int32, which saves registers; so in the other kernels.
    step = (1 - 2 * rev).to(tl.int32)

    A = load_vectors(A_ptr + d * N * E + e, E, mask, N)
    bias = tl.load(bias_ptr + d * E + e, mask=mask, other=0.0).to(tl.float32) if HAS_BIAS else 0.0
    u_ptr += row * u_row + t * u_token + e
    dt_ptr += row * dt_row + t * dt_token + e
    B_ptr += row * B_row + t * B_token
    starts_ptr += b * L
    h = zeros(N, BLOCK)
    sum_dt = tl.zeros([BLOCK], tl.float32)
    for _ in range(length):
        u = tl.load(u_ptr, mask=mask, other=0.0).to(tl.float32)
        dt = step_size(tl.load(dt_ptr, mask=mask, other=0.0), bias, SOFTPLUS)
        decay_time = time_of_decay(dt, starts_ptr, t + rev, L, HAS_STARTS)
        h = advance(h, A, decay_time, dt * u, B_ptr, N)
        sum_dt += decay_time
        t += step
        u_ptr += step * u_token
        dt_ptr += step * dt_token
        B_ptr += step * B_token
    store_vectors(state_ptr + item * N * E + e, E, h, mask, N)
    tl.store(sum_dt_ptr + item * E + e, sum_dt, mask=mask)


@triton.jit(do_not_specialize=SIZES_AND_STRIDES)
def chunk_carry_kernel(
    state_ptr,
    sum_dt_ptr,
    A_ptr,
    first_ptr,
    last_ptr,
    S,
    batch,
    E,
    n_chunks,
    descending,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    AHEAD: tl.constexpr,
    HAS_FIRST: tl.constexpr,
):
    """In `state` (rows, chunks, N, E), replace what each chunk adds by what it receives; the last carry goes to `last`.

    carry_0 = first (rows, N, E), or zero; carry_{c+1} = exp(A sum_dt_c) carry_c + state_c. Chunks are taken in the
    row's scan direction, or against it where `descending`.
    """
    row = tl.program_id(0).to(tl.int64)
    s, d = row // batch % S, row // batch // S
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = j < E * N
    A = tl.load(A_ptr + d * N * E + j, mask=mask, other=0.0)
    carry = tl.zeros([BLOCK], tl.float32)
    if HAS_FIRST:
        carry += tl.load(first_ptr + row * N * E + j, mask=mask, other=0.0)
    rev = (d + s + descending) % 2
    item = row * n_chunks + tl.where(rev == 1, n_chunks - 1, 0)
    step = 1 - 2 * rev
    # The loads of AHEAD chunks are issued together: this loop waits for memory, not for arithmetic.
    for done in range(0, n_chunks, AHEAD):
        states = ()
        decays = ()
        for k in tl.static_range(AHEAD):
            valid = j < tl.where(n_chunks > done + k, E * N, 0)
            states = states + (tl.load(state_ptr + (item + k * step) * N * E + j, mask=valid, other=0.0),)
            decays = decays + (tl.load(sum_dt_ptr + (item + k * step) * E + j % E, mask=valid, other=0.0),)
        for k in tl.static_range(AHEAD):
            valid = j < tl.where(n_chunks > done + k, E * N, 0)
            tl.store(state_ptr + (item + k * step) * N * E + j, carry, mask=valid)
            carry = tl.exp2(A * decays[k]) * carry + states[k]
        item += AHEAD * step
    tl.store(last_ptr + row * N * E + j, carry, mask=mask)


@triton.jit(do_not_specialize=SIZES_AND_STRIDES)
def scan_forward_kernel(
    u_ptr,
    dt_ptr,
    A_ptr,
    B_ptr,
    C_ptr,
    D_ptr,
    z_ptr,
    bias_ptr,
    starts_ptr,
    state_ptr,
    out_ptr,
    P,
    S,
    batch,
    L,
    E,
    n_chunks,
    chunk_size,
    reverse,
    u_row,
    u_token,
    dt_row,
    dt_token,
    B_row,
    B_token,
    C_row,
    C_token,
    z_row,
    z_token,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_STARTS: tl.constexpr,
):
    """out (S·batch, L, E): the sum over directions of the scan of each chunk from its true state, gated by silu(z).

    A program takes one chunk of one stream in both directions, so that the first direction's partial sum waits in
    `out` while it is still in cache.
    """
    item = tl.program_id(0).to(tl.int64)
    chunk, sb = item % n_chunks, item // n_chunks
    b, s = sb % batch, sb // batch
    e = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = e < E
    begin = chunk * chunk_size
    length = tl.minimum(L - begin, chunk_size).to(tl.int32)
    starts_ptr += b * L
    for d in range(P):
        row = d * S * batch + sb
        rev = (d + s + reverse) % 2
        t = tl.where(rev == 1, begin + length - 1, begin)
        step = (1 - 2 * rev).to(tl.int32)
        A = load_vectors(A_ptr + d * N * E + e, E, mask, N)
        bias = tl.load(bias_ptr + d * E + e, mask=mask, other=0.0).to(tl.float32) if HAS_BIAS else 0.0
        D = tl.load(D_ptr + d * E + e, mask=mask, other=0.0).to(tl.float32) if HAS_D else 0.0
        h = load_vectors(state_ptr + (row * n_chunks + chunk) * N * E + e, E, mask, N)
        u_at = u_ptr + row * u_row + t * u_token + e
        dt_at = dt_ptr + row * dt_row + t * dt_token + e
        B_at = B_ptr + row * B_row + t * B_token
        C_at = C_ptr + row * C_row + t * C_token
        z_at = z_ptr + sb * z_row + t * z_token + e
        out_at = out_ptr + (sb * L + t) * E + e
        for _ in range(length):
            u = tl.load(u_at, mask=mask, other=0.0).to(tl.float32)
            dt = step_size(tl.load(dt_at, mask=mask, other=0.0), bias, SOFTPLUS)
            decay_time = time_of_decay(dt, starts_ptr, t + rev, L, HAS_STARTS)
            h = advance(h, A, decay_time, dt * u, B_at, N)
            y = project(h, C_at, D * u, N)
            if d > 0:
                y += tl.load(out_at, mask=mask, other=0.0).to(tl.float32)
            if HAS_Z and d == P - 1:
                y *= silu(tl.load(z_at, mask=mask, other=0.0).to(tl.float32))
            tl.store(out_at, y.to(out_ptr.dtype.element_ty), mask=mask)
            t += step
            u_at += step * u_token
            dt_at += step * dt_token
            B_at += step * B_token
            C_at += step * C_token
            z_at += step * z_token
            out_at += step * E
        tl.debug_barrier()
