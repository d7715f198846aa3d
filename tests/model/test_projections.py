"""Projections for a GPU against plain ones, whose gradients autograd adds up."""

import pytest
import torch
from torch import Tensor

from caduceus.model import projections
from caduceus.model.mixer import project

SHAPES = [
    ((2, 1, 2, 24, 6), (2, 5, 6)),
    ((2, 1, 1, 7, 6), (2, 5, 6)),
    ((1, 1, 3, 16, 4), (1, 9, 4)),
    ((2, 3, 8, 4), (1, 9, 4)),
]
"""Shapes of x (G, …, in) and weight. The parts of a weight's gradient divide some numbers of rows, but not all."""


def leaves(shape: tuple[int, ...], weight: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return tuple(torch.randn(s, dtype=dtype).requires_grad_() for s in (shape, weight, weight))


def gradients(outputs: tuple[Tensor, ...], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    torch.manual_seed(1)
    return torch.autograd.grad(
        outputs, inputs, [torch.randn(o.shape, dtype=torch.float64).to(o.dtype) for o in outputs]
    )


@pytest.mark.parametrize(("shape", "weight"), SHAPES)
def test_results_and_gradients_are_those_of_plain_projections(shape: tuple[int, ...], weight: tuple[int, ...]) -> None:
    x, first, second = leaves(shape, weight, torch.float64)
    for ours, plain, inputs in (
        (projections.project_beside(x, first), (x.clone(), project(x, first)), (x, first)),
        (projections.project_twice(x, first, second), (project(x, first), project(x, second)), (x, first, second)),
        ((projections.project_alone(x, first),), (project(x, first),), (x, first)),
    ):
        for one, other in zip(ours, plain, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-14)
        for one, other in zip(gradients(ours, inputs), gradients(plain, inputs), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-13)


def test_in_bf16_gradients_are_no_further_from_fp64_than_those_of_plain_projections() -> None:
    x, weight, _ = leaves((2, 1, 4, 512, 32), (2, 24, 32), torch.float32)
    exact = [tensor.detach().bfloat16().double().requires_grad_() for tensor in (x, weight)]
    wanted = gradients((exact[0].clone(), project(*exact)), tuple(exact))
    errors = {}
    for name, function in (("plain", lambda x, w: (x.clone(), project(x, w))), ("ours", projections.project_beside)):
        with torch.autocast("cpu", torch.bfloat16):
            outputs = function(x.bfloat16(), weight)
        found = gradients(outputs, (x, weight))
        assert found[1].dtype == torch.float32
        errors[name] = [(f.double() - w).norm() / w.norm() for f, w in zip(found, wanted, strict=True)]
    assert all(ours <= 1.01 * plain for ours, plain in zip(errors["ours"], errors["plain"], strict=True)), errors
