"""A sequence in slices has the outputs and gradients of the whole, through the Triton kernels."""

import pytest
import torch

from caduceus.ops import naive
from caduceus.ops.directions import scan_by_direction
from caduceus.ops.operands import ScanOperands
from caduceus.ops.triton import SlicedScan
from tests.ops.slices import scan_in_slices


@pytest.mark.parametrize(("directions", "streams", "reverse"), [(2, 2, False), (1, 1, True)])
def test_slices_equal_the_whole(directions, streams, reverse):
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    cuts, channels, states = [33, 9], 5, 2  # the first slice has two chunks
    runs = (directions, streams, 1)
    given = ScanOperands(
        normal(*runs, sum(cuts), channels),
        normal(*runs, sum(cuts), channels) - 1,
        -normal(directions, channels, states).abs() - 0.1,
        normal(*runs, sum(cuts), states),
        normal(*runs, sum(cuts), states),
        normal(directions, channels),
        normal(streams, 1, sum(cuts), channels),
        normal(directions, channels),
    )
    leaves = ScanOperands(*(t.clone().requires_grad_() for t in given))
    expected, _ = scan_by_direction(naive.selective_scan, leaves, True, reverse)
    dy = normal(*expected.shape)
    expected.backward(dy)
    y, gradients = scan_in_slices(
        SlicedScan, ScanOperands(*(t.float() for t in given)), cuts, True, reverse, dy.float()
    )
    # fp32 of values of order 1, in sums of at most some hundred terms.
    torch.testing.assert_close(y.double(), expected.detach(), rtol=0, atol=1e-5)
    for leaf, gradient in zip(leaves, gradients, strict=True):
        scale = 1 + leaf.grad.abs().max().item()
        torch.testing.assert_close(gradient.double(), leaf.grad, rtol=0, atol=1e-5 * scale)
