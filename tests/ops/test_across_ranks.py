"""A sequence in slices has the outputs and gradients of the whole, on every backend that runs here."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from caduceus.ops import cpu, naive
from caduceus.ops.across_ranks import carried
from caduceus.ops.directions import scan_by_direction
from caduceus.ops.operands import ScanOperands
from tests.ops.slices import scan_in_slices


def operands(directions: int, streams: int, length: int, absent: tuple[str, ...] = ()) -> ScanOperands:
    """In double precision, some of them None."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    runs, channels, states = (directions, streams, 2), 5, 3
    given = ScanOperands(
        u=normal(*runs, length, channels),
        dt=normal(*runs, length, channels) - 1,
        A=-torch.rand(directions, channels, states, generator=generator, dtype=torch.float64) * 4 - 0.01,
        B=normal(*runs, length, states),
        C=normal(*runs, length, states),
        D=normal(directions, channels),
        z=normal(streams, 2, length, channels),
        dt_bias=normal(directions, channels),
    )
    return given._replace(**dict.fromkeys(absent))


@pytest.mark.parametrize("backend", [naive, cpu])
@pytest.mark.parametrize("cuts", [[40], [20, 20], [17, 1, 22], [10, 10, 10, 10]])
@pytest.mark.parametrize(
    ("directions", "streams", "reverse", "softplus", "absent"),
    [
        (2, 3, False, True, ()),
        (2, 1, True, True, ("D", "dt_bias")),
        (1, 1, True, True, ("z",)),
        (1, 1, False, True, ("D", "z", "dt_bias")),
    ],
)
def test_slices_equal_the_whole(backend, cuts, directions, streams, reverse, softplus, absent):
    given = operands(directions, streams, 40, absent)
    leaves = ScanOperands(*(None if t is None else t.clone().requires_grad_() for t in given))
    expected, _ = scan_by_direction(naive.selective_scan, leaves, softplus, reverse)
    dy = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected.backward(dy)
    y, gradients = scan_in_slices(backend.SlicedScan, given, cuts, softplus, reverse, dy)
    # Sums of terms of order one in another order.
    torch.testing.assert_close(y, expected.detach(), rtol=0, atol=1e-12)
    for leaf, gradient in zip(leaves, gradients, strict=True):
        assert (gradient is None) == (leaf is None)
        if leaf is not None:
            torch.testing.assert_close(gradient, leaf.grad, rtol=1e-11, atol=1e-11)


def test_half_precision_comes_back_in_its_own_type():
    wide = operands(2, 2, 40)
    given = ScanOperands(*(t.bfloat16() for t in wide))._replace(A=wide.A.float())
    dy = torch.ones_like(given.z)
    whole = cpu.bidirectional_scan(ScanOperands(*(t.requires_grad_() for t in given)))
    whole.backward(dy)
    y, gradients = scan_in_slices(cpu.SlicedScan, ScanOperands(*(t.detach() for t in given)), [20, 20], True, False, dy)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, whole.detach(), rtol=2**-7, atol=2**-7)  # one rounding to bfloat16
    for tensor, gradient in zip(given, gradients, strict=True):
        assert gradient.dtype == tensor.dtype
        scale = tensor.grad.float().abs().max()
        torch.testing.assert_close(gradient, tensor.grad, rtol=2**-6, atol=float(scale) * 2**-7)


class Launches(TorchDispatchMode):
    """Counts operators that compute, as each is a launch on a GPU; views are none."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += not function.is_view
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("streams", [1, 2])
@pytest.mark.parametrize("rank", [0, 4, 7])
def test_what_enters_a_slice_takes_as_many_launches_whatever_the_ranks(streams, rank):
    """It was a few for each run and rank: 71 at 8 ranks of 2 streams."""
    ends, steps, A = torch.rand(8, 2, streams, 1, 5, 3), torch.rand(8, 2, streams, 1, 5), -torch.rand(2, 5, 3)
    context = SimpleNamespace(rank=rank, size=8)
    carried(ends, steps, A, context, False)  # makes what all calls share
    with Launches() as launches:
        entering = carried(ends, steps, A, context, False)
    assert launches.count <= 7
    for d, s in itertools.product(range(2), range(streams)):
        before = range(7, rank, -1) if (d + s) % 2 else range(rank)
        state = torch.zeros(1, 5, 3)
        for slice_ in before:
            state = torch.exp(steps[slice_, d, s, ..., None] * A[d]) * state + ends[slice_, d, s]
        torch.testing.assert_close(entering[d, s], state)
