"""Packed sequences on the backends that run each by itself."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from caduceus.ops import bidirectional_conv1d, bidirectional_scan, causal_conv1d, selective_scan


@pytest.mark.parametrize("backend", ["naive", "cpu"])
def test_packed_sequences_give_what_each_gives_alone(backend):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    P, S, L, E, N, K = 2, 2, 11, 4, 3, 4
    x, weight, bias = normal(S, 2, L, E), normal(P, E, K), normal(P, E)
    dt, A, B, C = normal(P, S, 2, L, E), -normal(P, E, N).abs(), normal(P, S, 2, L, N), normal(P, S, 2, L, N)
    starts = torch.zeros(2, L, dtype=torch.bool)
    starts[0, [0, 3, 4]] = True
    starts[1, 9] = True

    def mix(x, dt, B, C, starts=None):
        u = bidirectional_conv1d(x, weight, bias, starts=starts, backend=backend)
        return bidirectional_scan(u, dt, A, B, C, z=x, starts=starts, backend=backend)

    packed = mix(x, dt, B, C, starts)
    for b, i, j in [(0, 0, 3), (0, 3, 4), (0, 4, L), (1, 0, 9), (1, 9, L)]:
        alone = mix(*(t[..., b, None, i:j, :] for t in (x, dt, B, C)))
        torch.testing.assert_close(packed[:, b, None, i:j], alone, rtol=1e-12, atol=1e-12)


class WholeTensors(TorchDispatchMode):
    """Counts the tensors of `size` elements or more that operators make."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.number = size, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = function(*args, **(kwargs or {}))
        sizes = storages(result)
        for address in storages((args, kwargs)):
            sizes.pop(address, None)  # a view
        self.number += sum(size >= self.size for size in sizes.values())
        return result


def storages(values: Any) -> dict[int, int]:
    """Elements of float32 by the address of the storage."""
    found = (leaf.untyped_storage() for leaf in tree_leaves(values) if isinstance(leaf, Tensor))
    return {storage._cdata: storage.nbytes() // 4 for storage in found}


L, E, N = 128, 4, 2


def one_direction(backend: str, starts: Tensor | None) -> list[Tensor]:
    """Operands and result of a convolution and a scan of one direction of a row."""
    x, dt, B, C, z = (torch.randn(1, L, n, requires_grad=True) for n in (E, E, N, N, E))
    u = causal_conv1d(x, torch.ones(E, 3), starts=starts, backend=backend)
    A = -torch.rand(E, N)
    return [x, dt, B, C, z, selective_scan(u, dt, A, B, C, z=z, starts=starts, backend=backend)]


def both_directions(backend: str, starts: Tensor | None) -> list[Tensor]:
    """Those of both directions of two streams."""
    x, z = (torch.randn(2, 1, L, E, requires_grad=True) for _ in range(2))
    dt, B, C = (torch.randn(2, 2, 1, L, n, requires_grad=True) for n in (E, N, N))
    u = bidirectional_conv1d(x, torch.ones(2, E, 3), None, starts=starts, backend=backend)
    A = -torch.rand(2, E, N)
    return [x, dt, B, C, z, bidirectional_scan(u, dt, A, B, C, z=z, starts=starts, backend=backend)]


def whole_tensors(mix: Callable, backend: str, starts: Tensor | None) -> int:
    """Tensors as long as the row that a forward and a backward pass make."""
    with WholeTensors(L * N) as made:
        *operands, y = mix(backend, starts)
        torch.autograd.grad(y, operands, torch.ones_like(y))
    return made.number


@pytest.mark.moderate
@pytest.mark.parametrize(
    ("mix", "backend"), [(one_direction, "naive"), (one_direction, "cpu"), (both_directions, "cpu")]
)
def test_sequences_cost_no_tensor_of_the_rows_length_each(mix: Callable, backend: str) -> None:
    """Else the time of a backward pass grows with the square of their number."""
    few, many = (torch.arange(L)[None] % length == 0 for length in (L // 16, 2))
    assert whole_tensors(mix, backend, many) == whole_tensors(mix, backend, few)


@pytest.mark.moderate
def test_positions_cost_the_definition_no_tensor_of_the_rows_length_each() -> None:
    assert whole_tensors(one_direction, "naive", None) < L // 2


@pytest.mark.parametrize("backend", ["naive", "cpu"])
def test_an_empty_row_has_empty_results(backend: str) -> None:
    x, starts = torch.zeros(1, 2, 0, 3), torch.zeros(2, 0, dtype=torch.bool)
    assert bidirectional_conv1d(x, torch.ones(2, 3, 4), None, starts=starts, backend=backend).shape == (2, 1, 2, 0, 3)
