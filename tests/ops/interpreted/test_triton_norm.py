import pytest
import torch

from caduceus import ops

# Sums of at most 70 terms of order 1 in fp32. In 16 bits the sum is rounded once and the output once, each by at most
# 2^-7 of the value in bf16 (the interpreter truncates; a GPU rounds to nearest) and 2^-11 in fp16, to nearest; both
# sides round the sum alike or one bit apart.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 3e-2}


def compare(
    streams: int, rows: int, D: int, layer_norm: bool, per_stream: bool, has_residual: bool, dtype, residual_dtype
):
    generator = torch.Generator(torch.get_default_device()).manual_seed(D)
    x, residual = (torch.randn(streams, 1, rows, D, generator=generator) for _ in range(2))
    weight, bias = (torch.randn(*([streams] if per_stream else []), D, generator=generator) for _ in range(2))
    operands = {"x": x.to(dtype), "residual": residual.to(residual_dtype), "weight": weight, "bias": bias}
    for name, absent in (("residual", not has_residual), ("bias", not layer_norm)):
        if absent:
            operands[name] = None
    results = {}
    for backend in ("naive", "triton"):
        own = {
            n: None if t is None else (t.double() if backend == "naive" else t).detach().requires_grad_()
            for n, t in operands.items()
        }
        out, total = ops.add_norm(
            **own, eps=1e-5, out_dtype=torch.double if backend == "naive" else dtype, backend=backend
        )
        given = [t for t in own.values() if t is not None]
        loss = (out.double().sin() * 2).sum() + (total.double().cos()).sum()
        results[backend] = [out, total, *torch.autograd.grad(loss, given)]
    tolerance = max(TOLERANCE[dtype], TOLERANCE[residual_dtype])
    for right, found in zip(results["naive"], results["triton"], strict=True):
        assert found.shape == right.shape
        assert (right - found.double()).abs().max() <= tolerance * right.abs().max()


def test_rms_norm_with_a_residual_over_two_streams():
    compare(2, 3, 6, False, True, True, torch.float32, torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize(
    ("streams", "rows", "D", "per_stream"), [(1, 1, 1, False), (2, 37, 70, False), (3, 33, 65, True)]
)
def test_sizes(streams, rows, D, per_stream, layer_norm, has_residual):
    compare(streams, rows, D, layer_norm, per_stream, has_residual, torch.float32, torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("residual_in_fp32", [True, False])
def test_half_precision(dtype, residual_in_fp32):
    compare(2, 5, 20, False, True, True, dtype, torch.float32 if residual_in_fp32 else dtype)


@pytest.mark.slow
def test_two_runs_give_the_same_bits():
    torch.manual_seed(0)
    leaves = [torch.randn(s, requires_grad=True) for s in ((2, 1, 37, 70), (2, 1, 37, 70), (2, 70), (2, 70))]
    results = []
    for _ in range(2):
        out, total = ops.add_norm(*leaves, eps=1e-5, backend="triton")
        results.append([out, total, *torch.autograd.grad(out.sin().sum() + total.cos().sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("has_residual", [False, True])
def test_composes_with_torch(has_residual, layer_norm):
    from caduceus.ops.triton.norm import add_norm_backward, add_norm_forward

    x, residual, weight, bias = (torch.randn(shape) for shape in ((2, 1, 3, 5), (2, 1, 3, 5), (2, 5), (2, 5)))
    dtotal = torch.randn_like(x) if has_residual else None
    torch.library.opcheck(add_norm_backward, (torch.randn_like(x), dtotal, x, weight, layer_norm, 1e-5))
    given = x, residual if has_residual else None, weight, bias if layer_norm else None
    for leaf in given:
        if leaf is not None:
            leaf.requires_grad_()
    torch.library.opcheck(add_norm_forward, (*given, 1e-5, torch.float32))
