"""Inputs of the ops, and comparisons with the definition."""

from dataclasses import dataclass

import torch
from torch import Tensor

from caduceus import ops
from caduceus.ops.operands import ScanOperands


@dataclass
class Scan:
    """Unit-scale inputs of `selective_scan` in float64; None where the op does without."""

    u: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    dt_bias: Tensor | None
    initial_state: Tensor | None

    @property
    def operands(self) -> ScanOperands:
        return ScanOperands(*self.tensors()[:8])

    def tensors(self) -> list[Tensor | None]:
        return [getattr(self, name) for name in self.__dataclass_fields__]


def make_scan(batch, length, channels, states, *, skip=True, gate=True, bias=True, initial=True, seed=0) -> Scan:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return Scan(
        u=normal(batch, length, channels),
        dt=normal(batch, length, channels) - 1,
        A=-torch.rand(channels, states, generator=generator, dtype=torch.float64) * 4 - 0.01,
        B=normal(batch, length, states),
        C=normal(batch, length, states),
        D=normal(channels) if skip else None,
        z=normal(batch, length, channels) if gate else None,
        dt_bias=normal(channels) if bias else None,
        initial_state=normal(batch, channels, states) if initial else None,
    )


def with_gradients(function, tensors, dtype=torch.float64):
    """`function(*tensors)` in a type: its outputs, and the gradients of every tensor given fixed output gradients."""
    leaves = [None if t is None else t.detach().to(dtype).requires_grad_() for t in tensors]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(1)
    arriving = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype) for o in outputs]
    present = [leaf for leaf in leaves if leaf is not None]
    gradients = torch.autograd.grad(outputs, present, arriving, allow_unused=True)
    gradients = [torch.zeros_like(p) if g is None else g for p, g in zip(present, gradients, strict=True)]
    return [o.detach() for o in outputs], gradients


def assert_close(actual, expected, tolerance):
    """Every pair differs by at most `tolerance` times (1 + the largest expected magnitude).

    The inputs have unit scale, so an output is a sum of terms of order one and its rounding error is absolute.
    """
    for position, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert a.shape == e.shape
        assert torch.isfinite(a).all(), f"output {position} is not finite"
        error = (a.double() - e.double()).abs().max().item() if a.numel() else 0.0
        scale = 1 + (e.abs().max().item() if e.numel() else 0.0)
        assert error <= tolerance * scale, f"output {position}: error {error:.2e} at scale {scale:.2e}"


def scan(module, softplus=True, reverse=False):
    return lambda *t: module.selective_scan(ScanOperands(*t[:8]), softplus, reverse, t[8])


def bidirectional_inputs(directions, streams, batch=2, length=21, channels=40, states=5):
    generator = torch.Generator().manual_seed(directions + 2 * streams)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    runs = (directions, streams, batch, length)
    x = normal(streams, batch, length, channels)
    taps = normal(directions, channels, 4), normal(directions, channels)
    A = -torch.rand(directions, channels, states, generator=generator, dtype=torch.float64) - 0.1
    rest = normal(*runs, channels), A, normal(*runs, states), normal(*runs, states), normal(directions, channels)
    return [x, *taps, *rest, normal(streams, batch, length, channels), normal(directions, channels)]


def block(backend):
    """Convolution and scan as the model has them."""

    def run(x, weight, bias, *rest):
        u = ops.bidirectional_conv1d(x, weight, bias, backend=backend)
        return ops.bidirectional_scan(u, *rest, backend=backend)

    return run
