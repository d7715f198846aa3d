import pytest
import torch

from caduceus import ops

IGNORE = 4
# fp32 throughout; sums of up to 100 terms of order 1.
FP32 = 1e-5
# The gradient of hidden is rounded once: fp16 to nearest, 2^-11; bf16, which the interpreter truncates (a GPU does
# not), 2^-7.
HALF = {torch.float16: 5e-4, torch.bfloat16: 8e-3}


def compare(streams: int, tokens: int, D: int, weighted: bool, labelled: float, dtype=torch.float32, tolerance=FP32):
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(streams, 1, tokens, D, generator=generator).to(dtype)
    weight = torch.randn(streams, 16, D, generator=generator) / D**0.5
    labels = torch.randint(7, 11, (1, tokens), generator=generator)
    labels[torch.rand(1, tokens, generator=generator) >= labelled] = IGNORE
    loss_weights = torch.rand(1, tokens, generator=generator) if weighted else None
    results = {}
    for backend in ("naive", "triton"):
        h, w = ((t.double() if backend == "naive" else t).detach().requires_grad_() for t in (hidden, weight))
        loss, total = ops.head_cross_entropy(h, w, labels, loss_weights, ignore_label=IGNORE, backend=backend)
        results[backend] = [loss, total, *torch.autograd.grad(3 * loss, [h, w])]
    for right, found in zip(results["naive"], results["triton"], strict=True):
        assert found.shape == right.shape
        assert (right - found.double()).abs().max() <= tolerance * right.abs().max()


def test_two_streams_are_summed_before_the_softmax():
    compare(2, 40, 20, weighted=True, labelled=0.3)


@pytest.mark.slow
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("streams", "tokens", "D", "labelled"), [(1, 1, 1, 1.0), (2, 33, 65, 0.2), (1, 70, 64, 1.0)])
def test_sizes(streams, tokens, D, labelled, weighted):
    compare(streams, tokens, D, weighted, labelled)


def test_nothing_labelled_is_zero_with_zero_gradient():
    compare(2, 35, 8, weighted=False, labelled=0.0)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", HALF)
def test_half_precision(dtype):
    compare(2, 40, 20, True, 0.5, dtype, HALF[dtype])


@pytest.mark.slow
def test_composes_with_torch():
    from caduceus.ops.triton.cross_entropy import cross_entropy_forward

    hidden, weight = torch.randn(1, 5, 8, requires_grad=True), torch.randn(1, 16, 8, requires_grad=True)
    torch.library.opcheck(cross_entropy_forward, (hidden, weight, torch.full((5,), 7), None, IGNORE))
