"""What the Triton ops tell a compiler of their outputs."""

from functools import partial

import pytest
import torch

from caduceus.ops import self_check
from caduceus.ops.operands import ScanOperands
from caduceus.ops.triton import conv, cross_entropy, norm, scan, ssd
from tests.ops.fakes import AsTold, registered


@pytest.fixture
def cases(device, monkeypatch):
    """Those of the self-check, by name, in sizes that differ from each other."""
    monkeypatch.setattr(self_check, "SIZES", (5, 6, 3))
    monkeypatch.setattr(self_check, "WHOLE", (8, 2))
    return {case.name: case for case in self_check._cases(device)}


def without(operands, *names):
    return {name: tensor for name, tensor in operands.items() if name not in names}


def scan_goes_on(initial_state, **operands):
    """From a state, without what may be absent."""
    optional = dict.fromkeys(("D", "z", "dt_bias"))
    return scan.scan_with_states(ScanOperands(**operands, **optional), initial_state=initial_state, reverse=True)


def chunked_goes_on(initial_state, **operands):
    return ssd.ssd_scan(tuple(operands.values()), initial_state, None, True)


def convolve_from_halo(x, weight, halo):
    return (conv.bidirectional_conv1d(x, weight, None, halo=halo),)


def norm_of_streams(x, weight):
    """Without a residual, in another type."""
    return norm.add_norm(x, None, weight, None, 1e-5, torch.float16)[:1]


def weighted_loss(x, weight):
    labels = torch.arange(x.shape[1] * x.shape[2]).view(x.shape[1:3]) % 16
    return cross_entropy.head_cross_entropy(x, weight, labels, torch.rand(labels.shape), -100)[:1]


@pytest.mark.slow
def test_outputs_are_as_the_compiler_was_told(cases):
    """All in 16 bits, so that an output of another type shows."""
    by_op = {name.split(" (")[0]: case.operands for name, case in reversed(cases.items())}  # the first of each name
    scanned, chunked = without(by_op["scan"], "D", "z", "dt_bias"), by_op["Mamba-2's scan"]
    (P, S, batch, length, E), N = scanned["u"].shape, scanned["A"].shape[-1]
    heads, width = chunked["x"].shape[-2:]
    normal = partial(torch.randn, dtype=torch.float64)
    halo, stream_weights = normal(P, S, batch, 3, E), normal(S, E)
    runs = [(case.run("triton"), case.operands) for case in cases.values()]
    runs += [
        (scan_goes_on, {"initial_state": normal(P, S, batch, E, N), **scanned}),
        (chunked_goes_on, {"initial_state": normal(P, S, batch, heads, width, N), **chunked}),
        (convolve_from_halo, without(by_op["convolution"], "bias") | {"halo": halo}),
        (norm_of_streams, {"x": normal(S, batch, length, E), "weight": stream_weights}),
        (weighted_loss, by_op["head + loss"]),
    ]
    with AsTold() as told:
        for run, operands in runs:
            self_check.differentiate(run, {name: tensor.bfloat16() for name, tensor in operands.items()})
    assert told.called == registered("triton_")
