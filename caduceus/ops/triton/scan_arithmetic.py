"""What the kernels of the selective scan have in common: loads, and the arithmetic of a step."""

import triton
import triton.language as tl

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
def gate_gradient(y, dout, z):
    """The gradient of z where y silu(z) has the gradient dout."""
    gate = 1.0 / (1.0 + tl.exp2(z * -LOG2E))
    return y * (dout * gate * (1.0 + z * (1.0 - gate)))


@triton.jit
def time_of_decay(dt, starts_ptr, position, L, HAS_STARTS: tl.constexpr):
    """The time that the state decays over in a step; `position` is where a start forgets the state."""
    if HAS_STARTS:
        dt = tl.where(tl.load(starts_ptr + position, mask=position < L, other=0) != 0, RESET_DT, dt)
    return dt


@triton.jit
def load(ptr, mask):
    """Load values as fp32, 0 where masked; all channels where the mask is None."""
    values = tl.load(ptr) if mask is None else tl.load(ptr, mask=mask, other=0.0)
    return values.to(tl.float32)


@triton.jit
def load_turn(ptr, stride: tl.constexpr, e, mask, COUNT: tl.constexpr):
    """COUNT tokens of channels e, in their own type. What a turn loads stands before its stores, which would hold it
    up."""
    tokens = ()
    for i in tl.static_range(COUNT):
        at = ptr + i * stride + e
        tokens = tokens + (tl.load(at) if mask is None else tl.load(at, mask=mask, other=0.0),)
    return tokens


@triton.jit
def load_parameter(ptr, d, e, mask, E: tl.constexpr, GIVEN: tl.constexpr):
    """That of direction d, (P, E), for each channel; 0 where there is none."""
    return load(ptr + d * E + e, mask) if GIVEN else tl.zeros([e.shape[0]], tl.float32)


@triton.jit
def load_vectors(ptr, stride: tl.constexpr, mask, N: tl.constexpr):
    vectors = ()
    for n in tl.static_range(N):
        vectors = vectors + (load(ptr + n * stride, mask),)
    return vectors


@triton.jit
def store_vectors(ptr, stride: tl.constexpr, vectors, mask, N: tl.constexpr):
    for n in tl.static_range(N):
        tl.store(ptr + n * stride, vectors[n], mask=mask)


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
