"""Whether the kernels of this rank's device compute what their definition says."""

import time

import torch
from torch import Tensor

from caduceus.devices import is_gpu
from caduceus.doctor.findings import Finding, State
from caduceus.errors import one_line
from caduceus.ops import selective_scan
from caduceus.ops.backends import resolve_backend
from caduceus.ops.self_check import check_kernels

_TOLERANCE = 1e-3
"""Largest relative difference that is allowed: kernels add up sums in fp32 in another order."""


def kernels(device: torch.device) -> Finding:
    """Compare the scan of the backend that `auto` takes with its definition, forward and backward; on GPUs every op."""
    try:
        backend = resolve_backend("auto", device, torch.float32)
        started = time.perf_counter()
        if backend == "triton" and is_gpu(device):
            check_kernels(device)  # all ops, unless that was done before
        found, expected = (_scan(name, device) for name in (backend, "naive"))
    except Exception as error:  # whatever a broken compiler or driver raises
        remedy = "see the versions above; ops.backend=naive runs without kernels, slowly"
        return Finding("kernels", State.WRONG, f"{device.type}: {one_line(error)[:300]}", remedy)
    difference = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True))
    told = f"{backend}: as the definition" if difference <= _TOLERANCE else f"{backend}: differs by {difference:.1e}"
    if difference > _TOLERANCE:
        return Finding(
            "kernels",
            State.WRONG,
            f"{device}, {told}",
            "leave this node out: its device or its driver computes wrongly",
        )
    slow = time.perf_counter() - started
    return Finding("kernels", State.OK, told + (" (compiled just now)" if slow > 5 else ""))


def _scan(backend: str, device: torch.device) -> list[Tensor]:
    """Outputs and gradients of a small scan."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"u": (1, 256, 32), "dt": (1, 256, 32), "A": (32, 16), "B": (1, 256, 16), "C": (1, 256, 16)}
    given = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    given["A"] = -given["A"].abs() - 0.1
    leaves = [tensor.to(device).requires_grad_() for tensor in given.values()]
    y = selective_scan(*leaves, backend=backend)
    y.square().sum().backward()
    return [y.detach(), *(leaf.grad for leaf in leaves)]
