"""Linear maps with backward passes that suit a GPU: sums of gradients are computed inside products, and the gradient of
a weight, which is small compared with the number of rows, is divided into several products.

Shapes: G weights, each for its own rows, or 1 for all; x (G, …, in), weight (G, out, in).
"""

from typing import Any

import torch
from torch import Tensor

PARTS = 16
"""Number of parts into which the rows are divided (where possible) for the gradient of a weight: a single product of
512 x 48 or 256 would occupy few multiprocessors, however many rows it sums over.
"""


def project_beside(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """x for another use, and its projection (G, …, out); one product computes the gradient of x for both uses."""
    return _Beside.apply(x, weight)


def project_twice(x: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Two projections of x; two products compute the sum of both gradients of x."""
    return _Twice.apply(x, first, second)


def project_alone(x: Tensor, weight: Tensor) -> Tensor:
    """The projection of x."""
    return _Alone.apply(x, weight)


class _Beside(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        rows, cast = _rows(x, weight), _cast(weight, x)
        ctx.save_for_backward(rows, cast)
        ctx.dtype = weight.dtype
        return x.view_as(x), torch.bmm(rows, cast.mT).reshape(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        rows, weight = ctx.saved_tensors
        dx, d = gradients
        summed = torch.baddbmm(_rows(dx, weight), _rows(d, weight), weight)
        return summed.view(dx.shape), _weight_gradient(_rows(d, weight), rows).to(ctx.dtype)


class _Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        rows, casts = _rows(x, first), [_cast(weight, x) for weight in (first, second)]
        ctx.save_for_backward(rows, *casts)
        ctx.dtype = first.dtype
        one, other = (torch.bmm(rows, cast.mT).reshape(*x.shape[:-1], -1) for cast in casts)
        return one, other

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows, first, second = ctx.saved_tensors
        one, other = (_rows(gradient, first) for gradient in gradients)
        dx = torch.baddbmm(torch.bmm(one, first), other, second).view(*gradients[0].shape[:-1], -1)
        return dx, *(_weight_gradient(d, rows).to(ctx.dtype) for d in (one, other))


class _Alone(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        rows, cast = _rows(x, weight), _cast(weight, x)
        ctx.save_for_backward(rows, cast)
        ctx.dtype = weight.dtype
        return torch.bmm(rows, cast.mT).reshape(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        rows, weight = ctx.saved_tensors
        d = _rows(gradients[0], weight)
        return torch.bmm(d, weight).view(*gradients[0].shape[:-1], -1), _weight_gradient(d, rows).to(ctx.dtype)


def _rows(x: Tensor, weight: Tensor) -> Tensor:
    """x as (G, rows, channels)."""
    return x.reshape(len(weight), -1, x.shape[-1])


def _cast(weight: Tensor, x: Tensor) -> Tensor:
    """The weight in the type of x, which is autocast's type where that is on."""
    return weight.to(x.dtype)


def _weight_gradient(d: Tensor, rows: Tensor) -> Tensor:
    """d^T · rows, (G, out, in); its parts are added up in at least fp32."""
    parts = 1 if rows.shape[1] % PARTS else PARTS
    d, rows = (tensor.unflatten(1, (parts, -1)).flatten(0, 1) for tensor in (d, rows))
    products = torch.bmm(d.mT, rows).unflatten(0, (-1, parts))
    return products.sum(1, dtype=torch.promote_types(products.dtype, torch.float32))
