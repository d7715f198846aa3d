"""The definition, against formulas that share no code with it."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from caduceus.ops import PAD_DT, bidirectional_conv1d, bidirectional_scan, head_cross_entropy, naive
from caduceus.ops.operands import ScanOperands
from tests.ops.cases import make_scan


@pytest.mark.parametrize("reverse", [False, True])
def test_scan_is_the_sum_over_earlier_positions(reverse):
    """y_t = Σ_s C_t · exp(A Σ_{s<r≤t} dt_r) dt_s u_s B_s, written as one sum with no recurrence."""
    case = make_scan(2, 7, 3, 4)
    y, final = naive.selective_scan(case.operands, True, reverse, case.initial_state)

    order = torch.arange(7).flip(0) if reverse else torch.arange(7)
    u, dt, B, C, z = (t[:, order] for t in (case.u, case.dt, case.B, case.C, case.z))
    dt = torch.log1p(torch.exp(dt + case.dt_bias))
    total = dt.cumsum(1)
    expected, state = torch.empty_like(u), None
    for t in range(7):
        state = torch.exp(total[:, t, :, None] * case.A) * case.initial_state
        for s in range(t + 1):
            decay = torch.exp((total[:, t] - total[:, s])[..., None] * case.A)
            state = state + decay * (dt[:, s] * u[:, s])[..., None] * B[:, s, None]
        expected[:, t] = (state * C[:, t, None]).sum(-1) + case.D * u[:, t]
    expected = expected * z / (1 + torch.exp(-z))
    torch.testing.assert_close(y[:, order], expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(final, state, rtol=1e-12, atol=1e-12)


def test_scan_gradients():
    case = make_scan(1, 4, 2, 3)
    inputs = [t.requires_grad_() for t in case.tensors()]
    assert torch.autograd.gradcheck(lambda *t: naive.selective_scan(ScanOperands(*t[:8]), True, True, t[8]), inputs)


def test_padding_keeps_the_state():
    case = make_scan(2, 6, 3, 4, initial=True)
    case.dt[:, 2:4] = PAD_DT
    _, final = naive.selective_scan(case.operands, True, False, case.initial_state)
    kept = [0, 1, 4, 5]
    u, dt, B, C, z = (t[:, kept] for t in (case.u, case.dt, case.B, case.C, case.z))
    shorter = case.operands._replace(u=u, dt=dt, B=B, C=C, z=z)
    _, expected = naive.selective_scan(shorter, True, False, case.initial_state)
    assert torch.equal(final, expected)


@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize("reverse", [False, True])
def test_convolution_is_that_of_torch(width, reverse):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 9, 5, generator=generator, dtype=torch.float64)
    weight = torch.randn(5, width, generator=generator, dtype=torch.float64)
    bias = torch.randn(5, generator=generator, dtype=torch.float64)
    columns = x.transpose(1, 2)
    columns = columns.flip(2) if reverse else columns
    expected = F.conv1d(F.pad(columns, (width - 1, 0)), weight[:, None], bias, groups=5)
    expected = (expected.flip(2) if reverse else expected).transpose(1, 2)
    plain = naive.causal_conv1d(x, weight, bias, None, reverse)
    torch.testing.assert_close(plain, expected, rtol=1e-12, atol=1e-12)
    silu = naive.causal_conv1d(x, weight, bias, "silu", reverse)
    torch.testing.assert_close(silu, expected * torch.sigmoid(expected), rtol=1e-12, atol=1e-12)


def test_convolution_gradients():
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((1, 5, 3), (3, 4), (3,))]
    inputs = [t.requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(lambda *t: naive.causal_conv1d(*t, "silu", True), inputs)


@pytest.mark.parametrize("backend", ["naive", "cpu"])
def test_odd_streams_run_with_the_directions_exchanged(backend):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, weight, bias = normal(3, 2, 7, 5), normal(2, 5, 4), normal(2, 5)
    dt, B, C, z = normal(2, 3, 2, 7, 5), normal(2, 3, 2, 7, 4), normal(2, 3, 2, 7, 4), normal(3, 2, 7, 5)
    A, D, dt_bias = -normal(2, 5, 4).abs() - 0.1, normal(2, 5), normal(2, 5)
    u = bidirectional_conv1d(x, weight, bias, backend=backend)
    y = bidirectional_scan(u, dt, A, B, C, D, z, dt_bias, backend=backend)
    for s, backwards in enumerate(((False, True), (True, False), (False, True))):
        for d in range(2):
            expected = naive.causal_conv1d(x[s], weight[d], bias[d], "silu", backwards[d])
            torch.testing.assert_close(u[d, s], expected, rtol=1e-12, atol=1e-12)
        given = [ScanOperands(u[d, s], dt[d, s], A[d], B[d, s], C[d, s], D[d], z[s], dt_bias[d]) for d in range(2)]
        runs = [naive.selective_scan(given[d], True, backwards[d], None)[0] for d in range(2)]
        torch.testing.assert_close(y[s], runs[0] + runs[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    case = make_scan(1, 5, 3, 2)
    halves = [t.to(dtype) for t in case.tensors()]
    y, final = naive.selective_scan(ScanOperands(*halves[:8]), True, False, halves[8])
    exact, state = naive.selective_scan(ScanOperands(*(t.float() for t in halves[:8])), True, False, halves[8].float())
    assert y.dtype == dtype
    assert final.dtype == torch.float32
    assert torch.equal(y, exact.to(dtype))
    assert torch.equal(final, state)


def test_a_label_outside_the_vocabulary_is_refused_unless_it_is_the_ignored_one():
    hidden, weight = torch.randn(1, 1, 3, 5), torch.randn(1, 16, 5)
    for label in (-100, 16):
        labels = torch.tensor([[7, label, 4]])
        for backend in ("naive", "cpu"):
            with pytest.raises(ValueError, match=rf"^labels: {label} is neither .* 16 nor ignored"):
                head_cross_entropy(hidden, weight, labels, ignore_label=4, backend=backend)
        loss, total = head_cross_entropy(hidden, weight, labels, ignore_label=label, backend="naive")
        assert loss.isfinite() and total == 2


class Waits(TorchDispatchMode):
    """Counts operators whose result has a size that a GPU must be asked for, which empties its queue."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        by_mask = any(isinstance(leaf, Tensor) and leaf.dtype == torch.bool for leaf in tree_leaves(args[1:2]))
        name = function.overloadpacket.__name__
        self.count += name in ("nonzero", "masked_select") or (name.startswith("index") and by_mask)
        return function(*args, **(kwargs or {}))


def test_labelled_tokens_are_looked_for_once_in_both_passes():
    """Ranks that share strands take the loss so on GPUs as well."""
    hidden, weight = torch.randn(1, 2, 9, 5, requires_grad=True), torch.randn(1, 16, 5, requires_grad=True)
    labels, weights = torch.randint(0, 16, (2, 9)), torch.rand(2, 9)
    labels[:, ::2] = -100
    with Waits() as waits:
        loss, _ = naive.head_cross_entropy(hidden, weight, labels, weights, -100)
        loss.sum().backward()
    assert waits.count == 1
