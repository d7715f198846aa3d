"""Sequences of no base, which all backends take alike."""

import torch

from caduceus import ops


def check_empty_sequences(backend: str) -> None:
    """Results are empty, states pass through, gradients of what is not empty are zero."""
    u, dt, z = (torch.randn(2, 0, 4, requires_grad=True) for _ in range(3))
    B, C = (torch.randn(2, 0, 3, requires_grad=True) for _ in range(2))
    A, D, state = -torch.rand(4, 3), torch.randn(4, requires_grad=True), torch.randn(2, 4, 3, requires_grad=True)
    y, final = ops.selective_scan(u, dt, A, B, C, D, z, initial_state=state, return_final_state=True, backend=backend)
    assert y.shape == (2, 0, 4)
    assert torch.equal(final, state)
    to_u, to_D, to_state = torch.autograd.grad(y.sum() + final.square().sum(), [u, D, state])
    assert to_u.shape == u.shape
    assert torch.equal(to_D, torch.zeros_like(D))
    torch.testing.assert_close(to_state, 2 * state, rtol=1e-6, atol=0)
    weight = torch.randn(4, 3, requires_grad=True)
    y = ops.causal_conv1d(u, weight, backend=backend)
    assert y.shape == (2, 0, 4)
    (to_weight,) = torch.autograd.grad(y.sum(), weight)
    assert torch.equal(to_weight, torch.zeros_like(weight))
    x, residual, weight, bias = (torch.randn(s, requires_grad=True) for s in ((2, 1, 0, 4),) * 2 + ((2, 4), (2, 4)))
    normed, total = ops.add_norm(x, residual, weight, bias, eps=1e-5, backend=backend)
    assert normed.shape == total.shape == x.shape
    gradients = torch.autograd.grad(normed.sum() + total.sum(), [x, residual, weight, bias])
    assert [g.shape for g in gradients] == [t.shape for t in (x, residual, weight, bias)]
    assert not gradients[2].any() and not gradients[3].any()
    head = torch.randn(2, 16, 4, requires_grad=True)
    labels = torch.zeros(1, 0, dtype=torch.int64)
    loss, count = ops.head_cross_entropy(x, head, labels, ignore_label=4, backend=backend)
    assert loss == count == 0
    to_x, to_head = torch.autograd.grad(loss, [x, head])
    assert to_x.shape == x.shape and not to_head.any()
