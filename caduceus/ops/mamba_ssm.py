"""The published CUDA kernels (mamba-ssm's Mamba-1 scan and causal-conv1d) behind the same functions, for comparison.

They run left-to-right over (B, E, L), so this backend transposes, and flips for right-to-left. The scan has neither an
initial state nor a gradient of the final one, and its offsets overflow silently at 2^31 chunk states: all three are
refused.
"""

from importlib import import_module

import torch
from torch import Tensor

from caduceus.errors import UserError
from caduceus.ops.operands import ScanOperands

INSTALL = (
    "pip install einops transformers ninja packaging setuptools wheel && "
    "MAMBA_KEEP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE CAUSAL_CONV1D_FORCE_BUILD=TRUE "
    "pip install --no-build-isolation --no-deps 'mamba-ssm>=2.2' 'causal-conv1d>=1.4'"
)
"""Builds the packages here, with Mamba-1, against the installed torch, which their own requirements might replace."""
SUPPORTED = {"d_state": range(1, 257), "d_conv": range(2, 5)}
"""The sizes of models that the kernels accept."""
_CHUNK = 2048
"""Tokens per state that mamba-ssm's kernel keeps."""


def missing() -> str | None:
    """The reason why the kernels cannot run, or None. The default build of mamba-ssm lacks the Mamba-1 extension."""
    if not torch.cuda.is_available():
        return "needs an NVIDIA GPU"
    for name in ("selective_scan_cuda", "mamba_ssm.ops.selective_scan_interface", "causal_conv1d"):
        try:
            import_module(name)
        except Exception as error:  # a library built for another torch or driver may raise anything
            return f"needs {name} ({type(error).__name__}: {' '.join(str(error).split())})"
    return None


def selective_scan(
    operands: ScanOperands, softplus: bool, reverse: bool, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Like `naive.selective_scan`, but a gradient of the final state raises an error."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    if initial_state is not None:
        raise UserError("ops.backend: mamba_ssm takes no initial state; choose triton")
    u, dt, A, B, C, D, z, dt_bias = operands
    chunk_states = u.shape[0] * A.numel() * -(-u.shape[1] // _CHUNK)
    if chunk_states >= 2**31:
        raise UserError(f"ops.backend: mamba_ssm's offsets overflow at {chunk_states} chunk states; choose triton")
    u, dt, B, C, z = (_channels_first(t, reverse) for t in (u, dt, B, C, z))
    D, dt_bias = (None if t is None else t.float() for t in (D, dt_bias))
    y, state = selective_scan_fn(u, dt.to(u.dtype), A.float(), B, C, D, z, dt_bias, softplus, return_last_state=True)
    y = y.mT
    return y.flip(1) if reverse else y, _WithoutGradient.apply(state, u)


class _WithoutGradient(torch.autograd.Function):
    """mamba-ssm's final state is not part of the graph. This ties it to `source`, and raises an error where its
    gradient is needed.
    """

    @staticmethod
    def forward(ctx, state: Tensor, source: Tensor) -> Tensor:
        return state.view_as(state)

    @staticmethod
    def backward(ctx, grad: Tensor):
        raise UserError("ops.backend: mamba_ssm has no gradient of the final state; choose triton")


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, reverse: bool) -> Tensor:
    """Like `naive.causal_conv1d`."""
    from causal_conv1d import causal_conv1d_fn

    if x.numel() >= 2**32:
        raise UserError(f"ops.backend: causal-conv1d's offsets overflow at {x.numel()} elements; choose triton")
    bias = None if bias is None else bias.to(x.dtype)
    y = causal_conv1d_fn(_channels_first(x, reverse), weight.to(x.dtype), bias, activation=activation).mT
    return y.flip(1) if reverse else y


def _channels_first(tensor: Tensor | None, reverse: bool) -> Tensor | None:
    """(B, L, E) -> (B, E, L), contiguous, right-to-left if `reverse`."""
    if tensor is None:
        return None
    return (tensor.flip(1) if reverse else tensor).mT.contiguous()
