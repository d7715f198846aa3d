"""The selective scan on the GPU: launches of the kernels as torch custom ops with gradients.

Shapes: P parameter directions, S streams, B batch, L length, E inner channels, N states.
"""

import math

import torch
import triton
from torch import Tensor

from caduceus.ops.triton import scan_backward_kernels as backward_kernels
from caduceus.ops.triton import scan_kernels as kernels
from caduceus.ops.triton import scan_pieces_kernels as pieces_kernels
from caduceus.ops.triton.device import LAUNCH, as_rows, channel_block, device_of, require_float, tokens_per_program

MAX_STATES = 64
"""A thread holds all states of its channel: up to 64 they fit in its registers, and no kernel spills."""
PIECE = 8
"""Tokens whose states the backward pass holds in registers at once."""
GROUP = 2
"""States of which the backward pass sums the gradients of B and C over channels in one product."""
REPLAY_BYTES = 2**28
"""Bound on the replayed states of the backward pass: a longer scan is taken in segments."""


def scan_with_states(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    softplus: bool = True,
    initial_state: Tensor | None = None,
    starts: Tensor | None = None,
    reverse: bool = False,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(y (S, B, L, E), states after the last steps taken (P, S, B, E, N)), both differentiable.

    Operands as of `caduceus.ops.bidirectional_scan`, initial_state (P, S, B, E, N), starts as in `ops.packed`. With
    `reverse` all directions are exchanged; `chunk` is the number of tokens that one program takes.
    """
    require_float(u, "u")
    if A.shape[-1] > MAX_STATES:
        raise ValueError(f"A: the triton backend has up to {MAX_STATES} states, got {A.shape[-1]}")
    if chunk is None:
        chunk = chunk_length(u)
    if chunk % PIECE:
        raise ValueError(f"chunk: must be a multiple of {PIECE}, got {chunk}")
    y, final_state, _, _ = scan_forward(u, dt, A, B, C, D, z, dt_bias, initial_state, starts, softplus, reverse, chunk)
    return y, final_state


def bidirectional_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    starts: Tensor | None = None,
) -> Tensor:
    """`caduceus.ops.bidirectional_scan`."""
    return scan_with_states(u, dt, A, B, C, D, z, dt_bias, starts=starts)[0]


def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    softplus: bool,
    reverse: bool,
    initial_state: Tensor | None,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(y (B, L, E), final state (B, E, N)) of `caduceus.ops.selective_scan`."""
    y, final_state = scan_with_states(
        u[None, None],
        dt[None, None],
        A[None],
        B[None, None],
        C[None, None],
        None if D is None else D[None],
        None if z is None else z[None],
        None if dt_bias is None else dt_bias[None],
        softplus,
        None if initial_state is None else initial_state[None, None],
        starts,
        reverse,
    )
    return y.squeeze(0), final_state.squeeze((0, 1))


@torch.library.custom_op("caduceus::triton_scan_forward", mutates_args=())
def scan_forward(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    starts: Tensor | None,
    softplus: bool,
    reverse: bool,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, final states, state before each chunk (rows, chunks, N, E), sum of dt over each (rows, chunks, E))."""
    scan = ScanKernels(u, dt, A, B, C, D, z, dt_bias, starts, softplus, reverse, chunk)
    states, sum_dt = scan.chunk_states()
    final_state = scan.carry(states, sum_dt, initial_state, descending=False)
    return scan.outputs(states), final_state, states, sum_dt


@scan_forward.register_fake
def _(u, dt, A, B, C, D, z, dt_bias, initial_state, starts, softplus, reverse, chunk):
    P, S, batch, length, E = u.shape
    rows, chunks, N = P * S * batch, -(-length // chunk), A.shape[-1]
    return (
        u.new_empty(S, batch, length, E),
        A.new_empty(P, S, batch, N, E, dtype=torch.float32).transpose(-1, -2),
        A.new_empty(rows, chunks, N, E, dtype=torch.float32),
        A.new_empty(rows, chunks, E, dtype=torch.float32),
    )


@torch.library.custom_op("caduceus::triton_scan_backward", mutates_args=())
def scan_backward(
    dy: Tensor,
    dfinal_state: Tensor | None,
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    starts: Tensor | None,
    states: Tensor,
    sum_dt: Tensor,
    softplus: bool,
    reverse: bool,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, dt, A, B, C, D, z, dt_bias, initial_state; empty for what is not given."""
    scan = ScanKernels(u, dt, A, B, C, D, z, dt_bias, starts, softplus, reverse, chunk)
    adjoints = scan.chunk_adjoints(dy)
    dinitial_state = scan.carry(adjoints, sum_dt, dfinal_state, descending=True)
    return (*scan.gradients(dy, states, adjoints), dinitial_state)


@scan_backward.register_fake
def _(dy, dfinal_state, u, dt, A, B, C, D, z, dt_bias, starts, states, sum_dt, softplus, reverse, chunk):
    def like(tensor: Tensor | None) -> Tensor:
        return u.new_empty(0) if tensor is None else tensor.new_empty(tensor.shape)

    P, S, batch, _, E = u.shape
    dinitial_state = A.new_empty(P, S, batch, A.shape[-1], E, dtype=torch.float32).transpose(-1, -2)
    return (*(like(t) for t in (u, dt, A, B, C, D, z, dt_bias)), dinitial_state)


def _save_for_backward(ctx, inputs, output):
    *tensors, initial_state, starts, ctx.softplus, ctx.reverse, ctx.chunk = inputs
    ctx.initial_dtype = None if initial_state is None else initial_state.dtype
    ctx.save_for_backward(*tensors, starts, *output[2:])
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, dfinal_state, _dstates, _dsum_dt):
    *tensors, starts, states, sum_dt = ctx.saved_tensors
    if dy is None:
        u, z = tensors[0], tensors[6]
        dy = torch.zeros_like(u[0] if z is None else z, dtype=u.dtype)
    *gradients, dinitial_state = scan_backward(
        dy, dfinal_state, *tensors, starts, states, sum_dt, ctx.softplus, ctx.reverse, ctx.chunk
    )
    gradients = [None if t is None else g for t, g in zip(tensors, gradients, strict=True)]
    dinitial_state = None if ctx.initial_dtype is None else dinitial_state.to(ctx.initial_dtype)
    return *gradients, dinitial_state, None, None, None, None


scan_forward.register_autograd(_backward, setup_context=_save_for_backward)


def chunk_length(u: Tensor) -> int:
    _, streams, batch, length, channels = u.shape
    return tokens_per_program(streams * batch, length, channels, u.device)


class ScanKernels:
    """The operands of a scan as the kernels want them, and a method for each kernel."""

    def __init__(self, u, dt, A, B, C, D, z, dt_bias, starts, softplus, reverse, chunk):
        self.P, self.S, self.batch, self.length, self.E = u.shape
        self.N = A.shape[-1]
        self.rows = self.P * self.S * self.batch
        self.chunk, self.n_chunks = chunk, triton.cdiv(self.length, chunk)
        self.reverse = int(reverse)
        self.given = (u, dt, A, B, C, D, z, dt_bias)
        self.u, self.dt = as_rows(u), as_rows(dt)
        # Every thread reads all of B and C: converted once, and contiguous, so that a load can take two numbers.
        self.B, self.C = (t.flatten(0, -3).float().contiguous() for t in (B, C))
        # States in front of channels: neighbouring threads read neighbouring addresses. exp2 wants the factor log2(e).
        self.A = (A.float() * kernels.LOG2E.value).transpose(-1, -2).contiguous()
        # What is absent is never read; the kernels still want a pointer.
        self.z = self.u if z is None else as_rows(z)
        self.D, self.bias = (self.u if t is None else t.contiguous() for t in (D, dt_bias))
        self.starts = self.u if starts is None else starts.contiguous().view(torch.uint8)
        self.block = channel_block(u)
        self.blocks = triton.cdiv(self.E, self.block)
        self.options = {"N": self.N, "BLOCK": self.block, "SOFTPLUS": softplus, **LAUNCH}
        self.options |= {"HAS_BIAS": dt_bias is not None, "HAS_STARTS": starts is not None}
        self.tile = {"N": self.N, "BLOCK": triton.next_power_of_2(self.N), "T": PIECE, **LAUNCH}
        self.has_D, self.has_z = D is not None, z is not None

    def chunk_states(self) -> tuple[Tensor, Tensor]:
        """The state in which each chunk ends if it begins with zero, and the sum of dt over it."""
        states, sum_dt = self._per_chunk(self.N), self._per_chunk()
        with device_of(self.u):
            kernels.chunk_state_kernel[(self.rows * self.n_chunks, self.blocks)](
                self.u,
                self.dt,
                self.A,
                self.B,
                self.bias,
                self.starts,
                states,
                sum_dt,
                *self._sizes(),
                *_strides(self.u, self.dt, self.B),
                **self.options,
            )
        return states, sum_dt

    def outputs(self, states: Tensor) -> Tensor:
        """y (S, B, L, E) from the states before every chunk."""
        out = self.u.new_empty(self.S, self.batch, self.length, self.E)
        with device_of(self.u):
            kernels.scan_forward_kernel[(self.S * self.batch * self.n_chunks, self.blocks)](
                *self._operands(),
                states,
                out,
                self.P,
                *self._sizes(),
                *_strides(self.u, self.dt, self.B, self.C, self.z),
                HAS_D=self.has_D,
                HAS_Z=self.has_z,
                **self.options,
            )
        return out

    def chunk_adjoints(self, dy: Tensor) -> Tensor:
        """Adjoint of each chunk's initial state by the chunk's own outputs."""
        adjoints = self._per_chunk(self.N)
        with device_of(self.u):
            backward_kernels.chunk_adjoint_kernel[(self.rows * self.n_chunks, self.blocks)](
                self.dt,
                self.A,
                self.C,
                self.z,
                self.bias,
                self.starts,
                dy.contiguous(),
                adjoints,
                *self._sizes(),
                *_strides(self.dt, self.C, self.z),
                HAS_Z=self.has_z,
                **self.options,
            )
        return adjoints

    def gradients(self, dy: Tensor, states: Tensor, adjoints: Tensor) -> tuple[Tensor, ...]:
        """Gradients of u, dt, A, B, C, D, z and dt_bias, from what comes into every chunk; uses `adjoints` up."""
        dy = dy.contiguous()
        du, ddt = (t.new_empty(self.rows, self.length, self.E) for t in (self.u, self.dt))
        dz = self.z.new_empty(self.S * self.batch, self.length, self.E) if self.has_z else self.u
        dA = self._fp32(self.P, self.N, self.E).zero_()
        dD, dbias = (self._fp32(self.P, self.E).zero_() for _ in range(2))
        dB, dC = (t.new_empty(self.rows, self.length, self.N) for t in (self.given[3], self.given[4]))
        items = self.S * self.batch * self.n_chunks
        bytes_per_item = 4 * self.P * (self.chunk // PIECE) * self.N * self.E
        segment = max(1, REPLAY_BYTES // bytes_per_item)
        for item in range(0, items, segment):
            count = min(segment, items - item)
            kept = self._replay(item, count, dy, states, dz)
            pieces = self._fp32(self.P, count, self.chunk // PIECE, self.N, 2 * PIECE)
            dpieces = self._fp32(self.blocks, *pieces.shape)
            sum_A, sum_D, sum_bias = (self._fp32(self.P, count, *shape, self.E) for shape in ((self.N,), (), ()))
            self._gather(item, count, pieces)
            self._reverse(item, count, dy, adjoints, kept, pieces, (du, ddt, sum_A.zero_(), dpieces, sum_D, sum_bias))
            self._scatter(item, count, dpieces, dB, dC)
            dA += sum_A.sum(1)
            dD += sum_D.sum(1)
            dbias += sum_bias.sum(1)
        found = (du, ddt, dA.transpose(-1, -2), dB, dC, dD, dz, dbias)
        return tuple(_in_the_form_of(t, g) for t, g in zip(self.given, found, strict=True))

    def _replay(self, item: int, count: int, dy: Tensor, states: Tensor, dz: Tensor) -> Tensor:
        """Writes dz; the states before every PIECE-th token of chunks item … item + count - 1."""
        kept = self._fp32(self.P, count, self.chunk // PIECE, self.N, self.E)
        with device_of(self.u):
            backward_kernels.scan_replay_kernel[(count, self.blocks)](
                *self._operands(),
                dy,
                states,
                kept,
                dz,
                item,
                self.P,
                *self._sizes(),
                *_strides(self.u, self.dt, self.B, self.C, self.z),
                T=PIECE,
                HAS_D=self.has_D,
                HAS_Z=self.has_z,
                **self.options,
            )
        return kept

    def _gather(self, item: int, count: int, pieces: Tensor) -> None:
        with device_of(self.u):
            pieces_kernels.gather_pieces_kernel[(self.P * count, self.chunk // PIECE)](
                self.B, self.C, pieces, item, self.P, *self._sizes_of_pieces(), *_strides(self.B, self.C), **self.tile
            )

    def _scatter(self, item: int, count: int, dpieces: Tensor, dB: Tensor, dC: Tensor) -> None:
        with device_of(self.u):
            pieces_kernels.scatter_pieces_kernel[(self.P * count, self.chunk // PIECE)](
                dpieces, dB, dC, self.blocks, item, self.P, *self._sizes_of_pieces(), **self.tile
            )

    def _reverse(
        self, item: int, count: int, dy: Tensor, adjoints: Tensor, kept: Tensor, pieces: Tensor, sums: tuple
    ) -> None:
        group = math.gcd(self.N, GROUP)
        with device_of(self.u):
            backward_kernels.scan_backward_kernel[(self.P * count, self.blocks)](
                self.u,
                self.dt,
                self.A,
                self.D,
                self.z,
                self.bias,
                self.starts,
                dy,
                adjoints,
                kept,
                pieces,
                *sums,
                item,
                self.P,
                *self._sizes(),
                *_strides(self.u, self.dt, self.z),
                T=PIECE,
                GROUP=group,
                LOG_COLUMNS=(2 * PIECE * group).bit_length() - 1,
                IN_FP32=self.u.dtype == torch.float32,
                HAS_D=self.has_D,
                HAS_Z=self.has_z,
                **self.options,
            )

    def carry(self, states: Tensor, sum_dt: Tensor, first: Tensor | None, descending: bool) -> Tensor:
        """Replace, in place, what each chunk adds by what comes into it; returns what leaves the last (P, S, B, E, N).

        `first` (P, S, B, E, N) comes into the first chunk, by default zero. Adjoints are carried `descending`.
        """
        last = self._fp32(self.P, self.S, self.batch, self.N, self.E)
        has_first = first is not None
        if has_first:
            first = first.float().transpose(-1, -2).contiguous()
        block = 128
        with device_of(self.u):
            kernels.chunk_carry_kernel[(self.rows, triton.cdiv(self.N * self.E, block))](
                states,
                sum_dt,
                self.A,
                first if has_first else self.A,
                last,
                self.S,
                self.batch,
                self.E,
                self.n_chunks,
                self.reverse ^ int(descending),
                N=self.N,
                BLOCK=block,
                AHEAD=8,
                HAS_FIRST=has_first,
                **LAUNCH,
            )
        return last.transpose(-1, -2)

    def _operands(self) -> tuple[Tensor, ...]:
        return self.u, self.dt, self.A, self.B, self.C, self.D, self.z, self.bias, self.starts

    def _sizes(self) -> tuple[int, ...]:
        return self.S, self.batch, self.length, self.E, self.n_chunks, self.chunk, self.reverse

    def _sizes_of_pieces(self) -> tuple[int, ...]:
        return self.S, self.batch, self.length, self.n_chunks, self.chunk, self.reverse

    def _per_chunk(self, *middle: int) -> Tensor:
        return self._fp32(self.rows, self.n_chunks, *middle, self.E)

    def _fp32(self, *shape: int) -> Tensor:
        return self.u.new_empty(*shape, dtype=torch.float32)


def _strides(*tensors: Tensor) -> list[int]:
    """Row and token stride of each."""
    return [stride for t in tensors for stride in t.stride()[:2]]


def _in_the_form_of(tensor: Tensor | None, gradient: Tensor) -> Tensor:
    if tensor is None:
        return gradient.new_empty(0)
    return gradient.reshape(tensor.shape).to(tensor.dtype).contiguous()
