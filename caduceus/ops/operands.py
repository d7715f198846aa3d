"""Checks an op's operands before a backend gets them, as a kernel reads past the end of a tensor that is too small.

It checks only shapes, types and devices: no value is read, so that nothing waits for a GPU, and torch.compile can trace
it.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

MOST_DIRECTIONS = 2
"""One from left to right and one from right to left."""

Operand = tuple[str, Tensor | None, str]
"""Name, tensor, and its expected axes, one letter each."""


class ScanOperands(NamedTuple):
    """The operands of a selective scan, in the order of its arguments.

    The axes are those of `caduceus.ops.selective_scan` for one direction of one stream, and those of
    `caduceus.ops.bidirectional_scan` for all of them.
    """

    u: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None = None
    z: Tensor | None = None
    dt_bias: Tensor | None = None

    def unsqueezed(self) -> "ScanOperands":
        """The operands of one direction of one stream, with leading axes of directions and streams, of size 1."""
        u, dt, A, B, C, D, z, dt_bias = self
        u, dt, B, C = (tensor[None, None] for tensor in (u, dt, B, C))
        D, z, dt_bias = (None if tensor is None else tensor[None] for tensor in (D, z, dt_bias))
        return ScanOperands(u, dt, A[None], B, C, D, z, dt_bias)


def check_scan(
    operands: ScanOperands,
    initial_state: Tensor | None,
    starts: Tensor | None,
    *,
    parameters: str = "",
    streams: str = "",
) -> None:
    """Check the operands of a scan of runs with the leading axes `parameters` + `streams` + "B"."""
    runs = parameters + streams + "B"
    u, A = operands.u, operands.A
    sizes = _sizes("u", u, runs + "LE")
    sizes["N"] = A.shape[-1] if A.ndim else 0
    inner, states, vectors = runs + "LE", runs + "LN", parameters + "E"
    axes = (inner, inner, parameters + "EN", states, states, vectors, streams + "BLE", vectors)
    given = (*zip(ScanOperands._fields, operands, axes, strict=True), ("initial_state", initial_state, runs + "EN"))
    _check_floats(u, sizes, given)
    _check_starts(starts, u, sizes)


def check_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    starts: Tensor | None,
    *,
    parameters: str = "",
    streams: str = "",
) -> None:
    """Check the operands of a convolution of streams with the leading axes `streams` + "B"."""
    sizes = _sizes("x", x, streams + "BLE") | _sizes("weight", weight, parameters + "EK") | {"E": x.shape[-1]}
    operands = (("x", x, streams + "BLE"), ("weight", weight, parameters + "EK"), ("bias", bias, parameters + "E"))
    _check_floats(x, sizes, operands)
    _check_starts(starts, x, sizes)


def check_norm(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None) -> None:
    sizes = _sizes("x", x, "SBLD")
    vectors = "SD" if weight.ndim == 2 else "D"
    operands = (("x", x, "SBLD"), ("residual", residual, "SBLD"), ("weight", weight, vectors), ("bias", bias, vectors))
    _check_floats(x, sizes, operands)


def check_head(hidden: Tensor, weight: Tensor, labels: Tensor, loss_weights: Tensor | None) -> None:
    sizes = _sizes("hidden", hidden, "SBLD") | {"V": weight.shape[-2] if weight.ndim > 1 else 0}
    operands = (("hidden", hidden, "SBLD"), ("weight", weight, "SVD"), ("loss_weights", loss_weights, "BL"))
    _check_floats(hidden, sizes, operands)
    _check_place("labels", labels, "BL", hidden, sizes)
    if labels.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"labels: expected int64 or int32, got {labels.dtype}")


def _sizes(name: str, tensor: Tensor, axes: str) -> dict[str, int]:
    """{letter: size} of a tensor's axes."""
    if tensor.ndim != len(axes):
        raise ValueError(f"{name}: expected axes ({', '.join(axes)}), got shape {tuple(tensor.shape)}")
    sizes = dict(zip(axes, tensor.shape, strict=True))
    if sizes.get("P", 1) > MOST_DIRECTIONS:
        raise ValueError(f"{name}: axis P has at most {MOST_DIRECTIONS} entries, got {sizes['P']}")
    return sizes


def _check_floats(first: Tensor, sizes: dict[str, int], operands: Iterable[Operand]) -> None:
    for name, tensor, axes in operands:
        if tensor is None:
            continue
        _check_place(name, tensor, axes, first, sizes)
        if not tensor.dtype.is_floating_point:
            raise TypeError(f"{name}: expected floating point, got {tensor.dtype}")


def _check_starts(starts: Tensor | None, first: Tensor, sizes: dict[str, int]) -> None:
    if starts is None:
        return
    _check_place("starts", starts, "BL", first, sizes)
    if starts.dtype != torch.bool:
        raise TypeError(f"starts: expected bool, got {starts.dtype}")


def _check_place(name: str, tensor: Tensor, axes: str, first: Tensor, sizes: dict[str, int]) -> None:
    expected = tuple([sizes[axis] for axis in axes])
    if tensor.shape != expected:
        raise ValueError(f"{name}: expected shape ({', '.join(axes)}) = {expected}, got {tuple(tensor.shape)}")
    if tensor.device != first.device:
        raise ValueError(f"{name}: expected on {first.device} like the other operands, got on {tensor.device}")
