"""The operators of the CPU backend keep the rules of torch: fake tensors, compilation, autocast, checkpointing."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from caduceus import ops
from caduceus.ops import cpu
from caduceus.ops.cpu import conv as conv_ops
from caduceus.ops.cpu import scan as scan_ops
from tests.ops.cases import bidirectional_inputs, block, make_scan, scan, with_gradients
from tests.ops.fakes import AsTold, registered


def _operator_inputs(gate=True):
    tensors = [t.float() for t in bidirectional_inputs(2, 2, length=5, channels=3, states=2)]
    x, weight, bias, dt, A, B, C, D, z, dt_bias = (t.requires_grad_() for t in tensors)
    u = torch.randn(dt.shape, requires_grad=True)
    initial = torch.randn(2, 2, 2, 3, 2, requires_grad=True)
    optional = (D, z, dt_bias, initial) if gate else (None, None, None, None)
    return (x, weight, bias), (u, dt, A, B, C, *optional)


@pytest.mark.slow
@pytest.mark.parametrize("gate", [False, True])
def test_operators_keep_the_rules_of_torch(gate):
    conv, scan_inputs = _operator_inputs(gate)
    torch.library.opcheck(conv_ops._conv, (*conv, gate, False))
    torch.library.opcheck(conv_ops._conv, (conv[0], conv[1], None, gate, True))
    torch.library.opcheck(scan_ops._scan, (*scan_inputs, gate, True, True))
    detached = [None if t is None else t.detach() for t in scan_inputs]
    y, final, kept = scan_ops._scan(*detached, True, False, True)
    torch.library.opcheck(scan_ops._scan_backward, (y, final, kept, *detached[:8], True, False))
    torch.library.opcheck(
        conv_ops._conv_backward, (conv_ops._conv(*conv, True, False).detach(), *(t.detach() for t in conv), True, True)
    )


@pytest.mark.moderate
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_in_one_graph(compiler):
    inputs = bidirectional_inputs(2, 2)
    expected = with_gradients(block("cpu"), inputs, torch.float32)
    compiled = torch.compile(block("cpu"), fullgraph=True, backend=compiler)
    actual = with_gradients(compiled, inputs, torch.float32)
    pairs = zip(actual[0] + actual[1], expected[0] + expected[1], strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    case = make_scan(1, 20, 33, 3)
    halves = [t.to(dtype) for t in case.tensors()]
    y, final = scan(cpu)(*halves)
    exact, state = scan(cpu)(*[t.float() for t in halves])
    assert y.dtype == dtype
    assert torch.equal(y, exact.to(dtype))
    assert final.dtype == torch.float32
    assert torch.equal(final, state)
    gradients = with_gradients(scan(cpu), case.tensors(), dtype)[1]
    assert all(g.dtype == dtype for g in gradients)


def test_under_autocast_the_scan_stays_in_float32():
    case = make_scan(1, 20, 32, 3, gate=False, initial=False)
    u, dt, A, B, C, D, _, bias, _ = (None if t is None else t.float() for t in case.tensors())
    projection = torch.randn(32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        projected = u @ projection
        y = ops.selective_scan(projected, dt, A, B, C, D, None, bias, backend="cpu")
    assert projected.dtype == y.dtype == torch.bfloat16
    exact = ops.selective_scan(projected.float(), dt, A, B, C, D, None, bias, backend="cpu")
    assert torch.equal(y, exact.bfloat16())


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    inputs = bidirectional_inputs(2, 1)
    expected = with_gradients(block("cpu"), inputs, torch.float32)
    actual = with_gradients(lambda *t: checkpoint(block("cpu"), *t, use_reentrant=False), inputs, torch.float32)
    if reentrant:
        leaves = [t.float().requires_grad_() for t in inputs]
        y = checkpoint(block("cpu"), *leaves, use_reentrant=True)
        generator = torch.Generator().manual_seed(1)
        y.backward(torch.randn(y.shape, generator=generator, dtype=torch.float64).float())
        actual = [y.detach()], [t.grad for t in leaves]
    pairs = zip(actual[0] + actual[1], expected[0] + expected[1], strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_without_gradients_no_states_are_kept():
    _, scan_inputs = _operator_inputs()
    with torch.no_grad():
        assert scan_ops._scan(*scan_inputs, True, False, False)[2].numel() == 0


@pytest.mark.parametrize("gate", [False, True])
def test_outputs_are_as_the_compiler_was_told(gate):
    conv, scan_inputs = _operator_inputs(gate)
    with AsTold() as told:
        y = conv_ops._conv(*conv, gate, True)
        y.backward(torch.randn(y.shape).transpose(0, 1).contiguous().transpose(0, 1))
        y, final, _ = scan_ops._scan(*scan_inputs, True, gate, True)
        (y.sum() + final.square().sum()).backward()
    assert told.called == registered("cpu_")
