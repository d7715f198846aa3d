import pytest
import torch
from torch import Tensor

from caduceus.ops.mamba2 import gated_norm

# fp32 sums of at most 70 terms of order 1; in bf16 the output and each gradient are rounded once, by at most 2^-7 (the
# interpreter truncates).
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def results(shape: tuple[int, ...], dtype: torch.dtype, backend: str) -> list[Tensor]:
    """The norm and its gradients; of the naive backend in fp64, of operands as rounded for the other."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(shape[-1])
    y, z, weight = (torch.randn(*s, generator=generator) for s in (shape, shape[1:], (shape[0], shape[-1])))
    operands = [y.to(dtype), 3 * z.to(dtype), weight]
    leaves = [(t.double() if backend == "naive" else t).detach().requires_grad_() for t in operands]
    out = gated_norm(*leaves, backend=backend)
    arriving = torch.randn(shape[1:], generator=generator).bfloat16().to(out.dtype)  # the same in every type
    return [out, *torch.autograd.grad(out, leaves, arriving)]


def compare(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for right, found in zip(results(shape, dtype, "naive"), results(shape, dtype, "triton"), strict=True):
        assert found.shape == right.shape
        assert (right - found.double()).abs().max() <= TOLERANCE[dtype] * right.abs().max()


@pytest.mark.parametrize("shape", [(2, 2, 1, 3, 6), (1, 1, 1, 1, 3), (2, 1, 2, 33, 70)])
def test_values_and_gradients_are_the_definitions(shape: tuple[int, ...]) -> None:
    compare(shape, torch.float32)


def test_half_precision() -> None:
    compare((2, 2, 1, 5, 20), torch.bfloat16)


@pytest.mark.slow
def test_it_composes_with_torch() -> None:
    from caduceus.ops.triton.gated import gated_norm_backward, gated_norm_forward

    y, z, weight = (torch.randn(shape) for shape in ((2, 1, 1, 3, 5), (1, 1, 3, 5), (2, 5)))
    torch.library.opcheck(gated_norm_backward, (torch.randn_like(z), y, z, weight, 1e-5))
    leaves = [tensor.requires_grad_() for tensor in (y, z, weight)]
    torch.library.opcheck(gated_norm_forward, (*leaves, 1e-5))
