"""No program of a launch meets what another one stores: all kernels, forward and backward."""

import pytest
import torch
import triton
import triton.language as tl

from caduceus import ops
from caduceus.config.model import CHUNK
from caduceus.ops import mamba2
from caduceus.ops.operands import ScanOperands
from caduceus.ops.triton import conv, scan, scan_launches, ssd
from tests.interpreter import INTERPRETING

pytestmark = pytest.mark.skipif(not INTERPRETING, reason="a GPU tells nothing of its programs' addresses")


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).requires_grad_()


def run(operation) -> None:
    """Forward and backward: every launch has programs of its own, and several in all."""
    from tests.ops.interpreted.programs import recorded_programs

    with recorded_programs() as recorded:
        sum(output.sum() for output in operation()).backward()
    assert recorded.launches >= 2 and recorded.programs > recorded.launches
    assert not recorded.shared


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Two blocks of channels where there are 18."""
    for module in (scan_launches, conv):
        monkeypatch.setattr(module, "channel_block", lambda x: 16)
    monkeypatch.setattr(scan_launches, "wide_channel_block", lambda x: 16)


@pytest.mark.slow
@pytest.mark.parametrize("keep", [False, True])
def test_scan(keep):
    P, S, batch, L, E, N = 2, 1, 1, 9, 18, 1
    A, runs = -normal(P, E, N).detach().abs() - 0.1, (P, S, batch, L)
    given = (normal(*runs, E), normal(*runs, E), A.requires_grad_(), normal(*runs, N), normal(*runs, N), normal(P, E))
    run(lambda: scan.scan_with_states(ScanOperands(*given, normal(S, batch, L, E), normal(P, E)), chunk=8, keep=keep))


@pytest.mark.slow
def test_scan_of_mamba2():
    P, S, batch, L, H, W, N = 2, 1, 1, CHUNK + 1, 2, 3, 2
    runs, A = (P, S, batch, L), -normal(P, H).detach().abs() - 0.1
    given = (normal(*runs, H, W), normal(*runs, H), A.requires_grad_(), normal(*runs, N), normal(*runs, N))
    run(lambda: ssd.ssd_scan((*given, normal(P, H), normal(P, H)), None, None, False))


def test_gated_norm():
    run(lambda: [mamba2.gated_norm(normal(2, 1, 1, 300, 8), normal(1, 1, 300, 8), normal(2, 8), backend="triton")])


def test_convolution():
    run(lambda: [ops.bidirectional_conv1d(normal(2, 1, 37, 18), normal(2, 18, 3), normal(2, 18), backend="triton")])


def test_norm():
    x, residual = normal(2, 1, 300, 8), normal(2, 1, 300, 8)
    run(lambda: ops.add_norm(x, residual, normal(8), normal(8), eps=1e-5, out_dtype=x.dtype, backend="triton"))


def test_loss():
    labels = torch.arange(40)[None] % 5
    run(
        lambda: ops.head_cross_entropy(
            normal(2, 1, 40, 8), normal(2, 5, 8), labels, ignore_label=-100, backend="triton"
        )[:1]
    )


@triton.jit
def meeting_kernel(x_ptr, APART: tl.constexpr):
    i = tl.program_id(0)
    tl.store(x_ptr + i * APART + tl.arange(0, 2), tl.load(x_ptr + i * APART + tl.arange(0, 2)) + 1)


def test_programs_that_meet_are_found():
    from tests.ops.interpreted.programs import recorded_programs

    for apart in (1, 2):
        with recorded_programs() as recorded:
            meeting_kernel[(3,)](torch.zeros(6), apart)
        assert bool(recorded.shared) == (apart == 1)


def test_programs_run_in_another_order_every_time():
    from tests.ops.interpreted.programs import recorded_programs

    orders = []
    for _ in range(2):
        with recorded_programs() as recorded:
            recorded.end_launch = lambda recorded=recorded: orders.append(list(recorded._stored))
            meeting_kernel[(20,)](torch.zeros(40), 2)
    found = [order for order in orders if order]
    assert found[0] != found[1] and sorted(found[0]) == sorted(found[1]) == list(range(20))


@triton.jit
def dot_kernel(x_ptr, y_ptr, out_ptr):
    at = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    tl.store(out_ptr + at, tl.dot(tl.load(x_ptr + at), tl.load(y_ptr + at)))


def test_the_interpreter_multiplies_bf16():
    x, y = (torch.randn(16, 16).bfloat16() for _ in range(2))
    out = torch.zeros(16, 16)
    dot_kernel[(1,)](x, y, out)
    torch.testing.assert_close(out, x.float() @ y.float())
