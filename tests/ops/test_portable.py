"""The ops that exports bring along, against the definition."""

import inspect

import pytest
import torch

from caduceus import ops
from caduceus.ops import portable


def operands(length: int, requires_grad: bool = True) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(length)
    shapes = ((2, 3, 1, length, 5), (2, 3, 1, length, 5), (2, 5, 4), (2, 3, 1, length, 4), (2, 3, 1, length, 4))
    shapes = (*shapes, (2, 5), (3, 1, length, 5), (2, 5))
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    tensors[2] = -tensors[2].exp()
    return tuple(tensor.requires_grad_(requires_grad) for tensor in tensors)


@pytest.mark.parametrize("length", [1, 2, 9, 50])
def test_the_scan_is_the_definition(length):
    given = operands(length)
    results = []
    for run in (portable.bidirectional_scan, lambda *t: ops.bidirectional_scan(*t, backend="naive")):
        y = run(*given)
        results.append([y, *torch.autograd.grad((y * y.detach().sin()).sum(), given)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("reverse", [False, True])
def test_a_scan_in_either_direction_is_the_definition_without_a_graph_too(reverse):
    u, dt, A, B, C, D, z, bias = operands(31, requires_grad=False)
    one = (u[0, 0], dt[0, 0], A[0], B[0, 0], C[0, 0], D[0], z[0], bias[0])
    expected = ops.selective_scan(*one, reverse=reverse, backend="naive")
    torch.testing.assert_close(portable.selective_scan(*one, reverse=reverse), expected, rtol=1e-12, atol=1e-13)
    assert portable.selective_scan(*(t[:, :0] if t.ndim == 3 else t for t in one)).shape == (1, 0, 5)


def test_packed_rows_are_refused():
    x, weight = torch.ones(1, 4, 2), torch.ones(2, 3)
    with pytest.raises(ValueError, match="packed or shared sequences need the package"):
        portable.causal_conv1d(x, weight, starts=torch.ones(1, 4, dtype=torch.bool))


def test_models_may_call_every_op_as_they_call_those_of_the_package() -> None:
    """What no export has, such as a state to begin from, no model asks for."""
    own = {name: op for name, op in vars(portable).items() if getattr(op, "__module__", "") == portable.__name__}
    theirs = {name: op for name, op in own.items() if hasattr(ops, name)}
    for name, op in theirs.items():
        ours, missing = inspect.signature(getattr(ops, name)).parameters, {"initial_state", "return_final_state"}
        assert list(inspect.signature(op).parameters) == [key for key in ours if key not in missing], name
    assert {"selective_scan", "bidirectional_scan", "causal_conv1d", "head_cross_entropy"} <= theirs.keys()
