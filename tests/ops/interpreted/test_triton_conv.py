import itertools

import pytest
import torch
from torch import Tensor

from caduceus.ops import naive
from caduceus.ops.triton import bidirectional_conv1d
from caduceus.ops.triton import conv as triton_conv
from tests.ops.sparse import far_apart

# fp32 keeps 24 bits; sums have K terms in the output and L in the weight's gradient, all of order 1.
FP32 = 1e-5
NAMES = ("x", "weight", "bias", "halo")


def make_operands(P: int, S: int, batch: int, L: int, E: int, K: int, halo: bool) -> dict[str, Tensor | None]:
    generator = torch.Generator(torch.get_default_device()).manual_seed(L * E + K)
    shapes = {"x": (S, batch, L, E), "weight": (P, E, K), "bias": (P, E), "halo": (P, S, batch, K - 1, E)}
    operands = {n: torch.randn(s, dtype=torch.float64, generator=generator) for n, s in shapes.items()}
    return operands if halo else operands | {"halo": None}


def define(operands: dict[str, Tensor | None], starts: Tensor | None, activation: str | None) -> Tensor:
    """The definition, from `naive.causal_conv1d`: each run with its halo beside it, each sequence by itself."""
    x, weight, bias, halo = (operands[name] for name in NAMES)
    P, E, K = weight.shape
    S, batch, L, _ = x.shape
    runs = []
    for d in range(P):
        for s in range(S):
            backwards, rows = (d + s) % 2 == 1, []
            for b in range(batch):
                borders = [0, L] if starts is None else sorted({0, L, *starts[b].nonzero().flatten().tolist()})
                pieces = []
                for i, j in itertools.pairwise(borders):
                    at_entry = j == L if backwards else i == 0 and (starts is None or not starts[b, 0])
                    near = halo[d, s, b] if halo is not None and at_entry else x.new_zeros(K - 1, E)
                    piece = x[s, b, i:j]
                    extended = torch.cat([piece, near] if backwards else [near, piece])[None]
                    y = naive.causal_conv1d(
                        extended, weight[d], None if bias is None else bias[d], activation, backwards
                    )[0]
                    pieces.append(y[: j - i] if backwards else y[K - 1 :])
                rows.append(torch.cat(pieces))
            runs.append(torch.stack(rows))
    return torch.stack(runs).unflatten(0, (P, S))


def check(operands, dtype=torch.float32, tolerance=FP32, starts=None, activation="silu") -> None:
    rounded = {
        n: None if t is None else t.to(dtype if n in ("x", "halo") else torch.float32) for n, t in operands.items()
    }
    reference = {n: None if t is None else t.double().requires_grad_() for n, t in rounded.items()}
    y = define(reference, starts, activation)
    dy = torch.randn(y.shape, generator=torch.Generator(torch.get_default_device()).manual_seed(1)).to(dtype)
    given = [n for n in NAMES if operands[n] is not None]
    expected = torch.autograd.grad(y, [reference[n] for n in given], dy.double())
    actual = {n: None if t is None else t.requires_grad_() for n, t in rounded.items()}
    y_ = bidirectional_conv1d(**actual, starts=starts, activation=activation)
    assert y_.dtype == dtype
    found = torch.autograd.grad(y_, [actual[n] for n in given], dy)
    for name, right, value in zip(["y", *given], [y, *expected], [y_, *found], strict=True):
        assert value.shape == right.shape, name
        error = (right - value.double()).abs().max() / right.abs().max()
        assert error < tolerance, f"{name}: {error:.1e}"


def test_both_directions_and_streams_with_a_halo():
    check(make_operands(2, 2, 1, 5, 3, 4, halo=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("P", "S", "batch", "L", "E", "K", "halo"),
    [
        (1, 1, 1, 1, 1, 1, False),  # a single everything
        (2, 1, 2, 33, 5, 4, True),  # one token over two tiles and over a chunk
        (2, 2, 1, 2, 129, 4, True),  # shorter than the filter, one channel over a block
        (2, 3, 1, 5, 3, 4, True),  # more streams than strands
        (1, 2, 1, 32, 3, 3, False),  # exactly two tiles and a chunk; stream 1 of a uni-directional model
    ],
)
def test_odd_sizes(P, S, batch, L, E, K, halo):
    check(make_operands(P, S, batch, L, E, K, halo))


@pytest.mark.slow
# One rounding to 16 bits: fp16 to nearest, 2^-11; bf16, which the interpreter truncates (a GPU does not), 2^-7.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 5e-4), (torch.bfloat16, 8e-3)])
def test_half_precision(dtype, tolerance):
    check(make_operands(2, 1, 1, 7, 3, 4, halo=True), dtype, tolerance)


@pytest.mark.slow
def test_without_activation_and_bias():
    check(make_operands(2, 1, 1, 7, 3, 4, halo=False) | {"bias": None}, activation=None)


@pytest.mark.slow
@pytest.mark.parametrize("halo", [False, True])
def test_taps_do_not_cross_a_start(halo):
    starts = torch.zeros(2, 35, dtype=torch.bool)
    starts[0, [2, 4, 16, 30, 33]] = True  # about the borders of tiles and, at 32, of chunks
    starts[1, [0, 32, 34]] = True
    check(make_operands(2, 1, 2, 35, 3, 4, halo), starts=starts)


def results(operands: dict[str, Tensor | None], reverse: bool = False) -> list[Tensor]:
    """Output and gradients in fp32."""
    leaves = {n: None if t is None else t.float().requires_grad_() for n, t in operands.items()}
    y = bidirectional_conv1d(**leaves, reverse=reverse)
    return [y, *torch.autograd.grad(y.sin().sum(), [t for t in leaves.values() if t is not None])]


@pytest.mark.slow
def test_offsets_past_2_to_the_31(tmp_path, device):
    if device.type != "cpu":
        pytest.skip("a GPU has no sparse memory; benchmarks/gpu_correctness.py has the tensors for it")
    operands = {n: t.bfloat16() for n, t in make_operands(2, 1, 2, 7, 3, 4, halo=True).items()}
    found = []
    for x in (operands["x"], far_apart(operands["x"], tmp_path / "x")):
        leaves = {n: t.requires_grad_() for n, t in (operands | {"x": x}).items()}
        y = bidirectional_conv1d(**leaves)
        found.append([y, *torch.autograd.grad(y.float().sin().sum(), list(leaves.values()))])
    for near, far in zip(*found, strict=True):
        assert torch.equal(near, far)


@pytest.mark.slow
@pytest.mark.parametrize("halo", [False, True])
def test_reverse_is_the_flip_of_forward(halo):
    # One tile, so that the sums over its tokens are the only ones that run in another order.
    operands = make_operands(1, 1, 2, 13, 5, 4, halo)
    flipped = {n: t if t is None or n in ("weight", "bias") else t.flip(-2) for n, t in operands.items()}
    y, dx, *summed = results(operands, reverse=True)
    y_, dx_, *summed_ = results(flipped)
    # At every position both add up the same taps in the same order.
    assert torch.equal(y, y_.flip(-2))
    assert torch.equal(dx, dx_.flip(-2))
    if halo:
        assert torch.equal(summed.pop(), summed_.pop().flip(-2))
    for a, b in zip(summed, summed_, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=FP32 * a.abs().max().item())


@pytest.mark.slow
def test_the_tile_changes_nothing_but_rounding(monkeypatch):
    operands = make_operands(2, 1, 1, 12, 20, 4, halo=True)
    expected = results(operands)
    monkeypatch.setattr(triton_conv, "TOKENS", 8)
    monkeypatch.setattr(triton_conv, "CHANNELS", 16)
    for a, b in zip(expected, results(operands), strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=FP32 * a.abs().max().item())


@pytest.mark.slow
def test_two_runs_give_the_same_bits():
    operands = make_operands(2, 1, 1, 18, 3, 4, halo=True)
    assert all(torch.equal(a, b) for a, b in zip(results(operands), results(operands), strict=True))


@pytest.mark.slow
def test_composes_with_torch():
    starts = torch.tensor([[False, False, True, False, False]])
    halo = [o.float() for o in make_operands(2, 1, 1, 5, 3, 4, halo=True).values()]
    for given in ((*halo, None), (*halo[:2], None, None, starts)):
        dy = torch.randn(2, 1, 1, 5, 3)
        torch.library.opcheck(triton_conv.conv_backward, (dy, *given, True, False))
        for leaf in given[:4]:
            if leaf is not None:
                leaf.requires_grad_()
        torch.library.opcheck(triton_conv.conv_forward, (*given, True, False))
        for leaf in given[:4]:
            if leaf is not None:
                leaf.requires_grad_(False)
