"""Mamba-2's scan on the GPU: launches of its kernels, whole passes of these, and torch custom ops for the passes.

Shapes: P parameter directions, S streams, B batch, L length, H heads, W channels of a head, N states.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

from caduceus.config.model import CHUNK, MOST_IN_KERNELS
from caduceus.ops.operands import ScanOperands
from caduceus.ops.triton import ssd_backward_kernels as backward_kernels
from caduceus.ops.triton import ssd_kernels as kernels
from caduceus.ops.triton.device import LAUNCH, as_rows, device_of, multiprocessors, require_float

WIDE = {"num_warps": 8}
"""Number of warps of kernels with several tiles at once."""
_TURN, _BLOCK = 8, 256
"""Number of chunks whose final states are loaded at once, and of elements of a state that a program carries."""


def takes_ssd(x: Tensor, states: int) -> bool:
    """Whether the kernels compute a scan of x (…, H, W). On a GPU they do where they are known to compile without
    spills: in half precision, with the matrix instructions of compute capability 9.
    """
    fits = max(x.shape[-1], states) <= MOST_IN_KERNELS
    if not x.is_cuda:
        return fits
    return fits and x.dtype != torch.float32 and torch.cuda.get_device_capability(x.device)[0] == 9


def ssd_scan(
    operands: tuple[Tensor, ...], initial_state: Tensor | None, starts: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor]:
    """(y (P, S, B, L, H, W), final states (P, S, B, H, W, N)), both differentiable.

    The operands are those of `caduceus.ops.mamba2.bidirectional_ssd_scan`; initial_state (P, S, B, H, W, N). With
    `reverse` all directions are exchanged.
    """
    require_float(operands[0], "x")
    return ssd_forward(*operands, initial_state, starts, reverse)


def launch_forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    initial_state: Tensor | None,
    starts: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """(y, final states)."""
    scan = SSDKernels((x, dt, A, B, C, D, dt_bias), starts, reverse)
    entering, final = scan.carry(*scan.chunk_states(), initial_state, descending=False)
    return scan.outputs(entering), final


def launch_backward(
    dy: Tensor,
    dfinal_state: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    initial_state: Tensor | None,
    starts: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, dt, A, B, C, D, dt_bias and the initial state."""
    scan = SSDKernels((x, dt, A, B, C, D, dt_bias), starts, reverse)
    entering, _ = scan.carry(*scan.chunk_states(), initial_state, descending=False)
    leaving, dinitial_state = scan.carry(*scan.adjoints(dy), dfinal_state, descending=True)
    return (*scan.gradients(dy, entering, leaving), dinitial_state)


class SSDKernels:
    """The operands of a scan in the form that the kernels need, and a method for each kernel."""

    def __init__(self, operands: tuple[Tensor, ...], starts: Tensor | None, reverse: bool) -> None:
        x, dt, A, B, C, D, dt_bias = self.given = operands
        self.P, self.S, self.batch, self.length, self.H, self.W = x.shape
        self.N = B.shape[-1]
        self.rows = self.P * self.S * self.batch
        self.n_chunks = triton.cdiv(self.length, CHUNK)
        self.x, self.B, self.C = (as_rows(t) for t in (x.flatten(-2), B, C))
        if self.B.stride() != self.C.stride():
            self.B, self.C = self.B.contiguous(), self.C.contiguous()
        self.dt = dt.contiguous()
        self.A, self.D, self.bias = (t.float().contiguous() for t in (A, D, dt_bias))
        # Absent operands are never read, but the kernels need a pointer.
        self.starts = self.x if starts is None else starts.contiguous().view(torch.uint8)
        self.sizes = (self.S, self.batch, self.length, self.n_chunks, int(reverse), self.H)
        enough = 4 * multiprocessors(x.device)
        groups = min(self.H, triton.cdiv(enough, max(1, self.rows * self.n_chunks)))
        self.heads = triton.cdiv(self.H, groups)
        self.groups = triton.cdiv(self.H, self.heads)
        self.blocks = {"W": self.W, "N": self.N, "BLOCK_W": _block(self.W), "BLOCK_N": _block(self.N)}
        self.options = {"HAS_STARTS": starts is not None, "T": CHUNK, **self.blocks, **LAUNCH}

    def chunk_states(self) -> tuple[Tensor, Tensor]:
        """(final states (rows, chunks, H, W, N) of chunks that begin with zero, their decays (rows, chunks, H))."""
        return self._chunk_states(self.x, self.B, adjoint=False)

    def adjoints(self, dy: Tensor) -> tuple[Tensor, Tensor]:
        """(the gradient of the state that enters each chunk, from the chunk's own outputs; the decays of chunks)."""
        return self._chunk_states(as_rows(dy.flatten(-2)), self.C, adjoint=True)

    def _chunk_states(self, v: Tensor, k: Tensor, adjoint: bool) -> tuple[Tensor, Tensor]:
        states = self._empty(self.rows, self.n_chunks, self.H, self.W, self.N)
        decays = self._empty(self.rows, self.n_chunks, self.H)
        operands = v, k, self.dt, self.A, self.bias, self.starts, states, decays, *_strides(v), *_strides(k)
        self._launch(kernels.ssd_chunk_state_kernel, operands, ADJOINT=adjoint)
        return states, decays

    def carry(self, ends: Tensor, decays: Tensor, initial: Tensor | None, descending: bool) -> tuple[Tensor, Tensor]:
        """(the state that enters each chunk, in x's type; the final state (P, S, B, H, W, N)), from the chunks' own
        final states.
        """
        final = self._empty(self.P, self.S, self.batch, self.H, self.W, self.N)
        entering = ends if self.x.dtype == ends.dtype else torch.empty_like(ends, dtype=self.x.dtype)
        size = self.W * self.N
        if self.rows:
            with device_of(self.x):
                kernels.ssd_carry_kernel[(self.rows, triton.cdiv(self.H * size, _BLOCK))](
                    *(ends, decays, ends if initial is None else initial.contiguous(), entering, final),
                    *(self.n_chunks, int(descending), self.H, size),
                    HAS_INITIAL=initial is not None,
                    TURN=_TURN,
                    BLOCK=_BLOCK,
                    **LAUNCH,
                )
        return entering, final

    def outputs(self, entering: Tensor) -> Tensor:
        """y (P, S, B, L, H, W)."""
        y = torch.empty(self.given[0].shape, dtype=self.x.dtype, device=self.x.device)
        operands = self.x, self.B, self.C, self.dt, self.A, self.D, self.bias, self.starts, entering, y
        self._launch(kernels.ssd_output_kernel, (*operands, *_strides(self.x), *_strides(self.B)), **WIDE)
        return y

    def gradients(self, dy: Tensor, entering: Tensor, leaving: Tensor) -> tuple[Tensor, ...]:
        """Gradients of the seven operands."""
        x, dt, A, B, C, D, dt_bias = self.given
        dx, ddt = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, dt))
        dB, dC = (self._empty(self.groups, *B.shape) for _ in range(2))
        of_chunks = [self._empty(self.rows, self.n_chunks, self.H) for _ in range(3)]
        dy, strides, states = dy.contiguous(), (*_strides(self.x), *_strides(self.B)), (entering, leaving)
        steps = self.dt, self.A
        operands = dy, self.x, self.B, self.C, *steps, self.D, self.bias, self.starts, *states
        self._launch(backward_kernels.ssd_input_gradient_kernel, (*operands, dx, ddt, *of_chunks, *strides), **WIDE)
        operands = dy, self.x, self.B, self.C, *steps, self.bias, self.starts, *states
        self._launch(
            backward_kernels.ssd_state_gradient_kernel, (*operands, dB, dC, *strides), heads=self.heads, **WIDE
        )
        dA, dD, dbias = (t.view(self.P, self.S * self.batch * self.n_chunks, self.H).sum(1) for t in of_chunks)
        dB, dC = dB.sum(0).to(B.dtype), dC.sum(0).to(C.dtype)
        return dx, ddt, dA.to(A.dtype), dB, dC, dD.to(D.dtype), dbias.to(dt_bias.dtype)

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.x.device)

    def _launch(self, kernel: Callable[..., Any], operands: tuple, **options: Any) -> None:
        """Launch a program for each chunk of each row and each head, or group of `heads`."""
        if items := self.rows * self.n_chunks:
            with device_of(self.x):
                kernel[(items, triton.cdiv(self.H, options.get("heads", 1)))](
                    *operands, *self.sizes, **self.options | options
                )


class SlicedSSD:
    """`across_ranks.SlicedScan` of Mamba-2: a state is (P, S, B, H, W N), and A (P, H, 1)."""

    def __init__(self, operands: ScanOperands, softplus: bool, reverse: bool) -> None:
        x, dt, A, B, C, D, _, dt_bias = operands
        require_float(x, "x")
        self._scan = SSDKernels((x, dt, A[..., 0], B, C, D, dt_bias), None, reverse)

    def end_state(self) -> tuple[Tensor, Tensor]:
        states, decays = self._scan.chunk_states()
        _, end = self._scan.carry(states, decays, None, descending=False)
        _, dt, *_, dt_bias = self._scan.given
        steps = torch.nn.functional.softplus(dt.float() + dt_bias[:, None, None, None])
        return end.flatten(-2), steps.sum(3)

    def outputs(self, initial_state: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        entering, _ = self._scan.carry(*self._scan.chunk_states(), initial_state, descending=False)
        return self._scan.outputs(entering), (initial_state,)

    def initial_gradient(self, dy: Tensor, kept: tuple[Tensor, ...]) -> Tensor:
        return self._scan.carry(*self._scan.adjoints(dy), None, descending=True)[1].flatten(-2)

    def gradients(self, dy: Tensor, final_gradient: Tensor, kept: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
        entering, _ = self._scan.carry(*self._scan.chunk_states(), *kept, descending=False)
        leaving, _ = self._scan.carry(*self._scan.adjoints(dy), final_gradient, descending=True)
        dx, ddt, dA, dB, dC, dD, dbias = self._scan.gradients(dy, entering, leaving)
        return dx, ddt, dA[..., None], dB, dC, dD, None, dbias


ssd_forward = torch.library.custom_op("caduceus::triton_ssd_forward", launch_forward, mutates_args=())


@ssd_forward.register_fake
def _(x, dt, A, B, C, D, dt_bias, initial_state, starts, reverse):
    return x.new_empty(x.shape), _state_like(x, B)


ssd_backward = torch.library.custom_op("caduceus::triton_ssd_backward", launch_backward, mutates_args=())


@ssd_backward.register_fake
def _(dy, dfinal_state, x, dt, A, B, C, D, dt_bias, initial_state, starts, reverse):
    return *(t.new_empty(t.shape) for t in (x, dt, A, B, C, D, dt_bias)), _state_like(x, B)


def _save_for_backward(ctx, inputs, output):
    *tensors, ctx.reverse = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, dfinal_state):
    *operands, initial_state, starts = ctx.saved_tensors
    dy = torch.zeros_like(operands[0]) if dy is None else dy
    *gradients, dinitial = ssd_backward(dy, dfinal_state, *operands, initial_state, starts, ctx.reverse)
    return *gradients, None if initial_state is None else dinitial.to(initial_state.dtype), None, None


ssd_forward.register_autograd(_backward, setup_context=_save_for_backward)


def _state_like(x: Tensor, B: Tensor) -> Tensor:
    P, S, batch, _, H, W = x.shape
    return x.new_empty(P, S, batch, H, W, B.shape[-1], dtype=torch.float32)


def _strides(rows: Tensor) -> tuple[int, int]:
    return rows.stride(0), rows.stride(1)


def _block(width: int) -> int:
    """The width of a tile for matrix products."""
    return max(16, triton.next_power_of_2(width))
