"""Mamba-2's form of matrix products against its definition, step by step."""

import itertools

import pytest
import torch
from torch import Tensor

from caduceus.ops.mamba2 import bidirectional_ssd_scan, by_chunks, by_steps, gated_norm, ssd_scan

RUNS = [False, True, True, False]
"""Directions of the runs."""


def operands(length: int, heads: int = 3, width: int = 2, states: int = 4, dtype=torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(length)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    runs = len(RUNS), 2
    A = -torch.rand(len(RUNS), heads, generator=generator, dtype=torch.float64).to(dtype) * 8 - 0.05
    return [
        *(normal(*runs, length, heads, width), normal(*runs, length, heads), A),
        *(normal(*runs, length, states), normal(*runs, length, states)),
        *(normal(len(RUNS), heads), normal(len(RUNS), heads), normal(*runs, heads, width, states)),
    ]


def packed(length: int) -> Tensor:
    return torch.rand(2, length, generator=torch.Generator().manual_seed(3)) < 0.2


@pytest.mark.parametrize("length", [1, 2, 7, 31, 64])
@pytest.mark.parametrize("chunk", [1, 3, 16, 100])
@pytest.mark.parametrize("with_starts", [False, True])
def test_outputs_states_and_gradients_are_the_definitions(length, chunk, with_starts):
    starts, results = packed(length) if with_starts else None, []
    generator = torch.Generator().manual_seed(1)
    shapes = (len(RUNS), 2, length, 3, 2), (len(RUNS), 2, 3, 2, 4)
    seeds = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    for run in (by_steps, lambda *given: by_chunks(*given, chunk)):
        leaves = [tensor.requires_grad_() for tensor in operands(length)]
        found = run(tuple(leaves), RUNS, starts)
        results.append([*found, *torch.autograd.grad(found, leaves, seeds, allow_unused=True)])
    for one, other in zip(*results, strict=True):
        one = torch.zeros_like(other) if one is None else one
        torch.testing.assert_close(other, one, rtol=1e-12, atol=1e-12 * max(1, one.abs().max().item()))


def test_no_decay_overflows_and_none_is_nan():
    """Steps of some hundred take a state to 0, and what lies on the wrong side of the diagonal to infinity."""
    given = operands(40, dtype=torch.float32)
    given[1] = given[1] * 300
    leaves = [tensor.requires_grad_() for tensor in given]
    y, state = by_chunks(tuple(leaves), RUNS, None)
    expected, _ = by_steps(tuple(leaves), RUNS, None)
    assert (y - expected).abs().max() < 1e-6 * expected.abs().max()
    assert all(g.isfinite().all() for g in torch.autograd.grad(y.sum() + state.sum(), leaves))


def test_half_precision_keeps_its_type_and_its_states_are_wide():
    wide = operands(50, dtype=torch.float32)
    half = [tensor.bfloat16() if number in (0, 1, 3, 4) else tensor for number, tensor in enumerate(wide)]
    y, state = by_chunks(tuple(half), RUNS, None)
    assert y.dtype == torch.bfloat16 and state.dtype == torch.float32
    expected, _ = by_steps(tuple(tensor.float() for tensor in half), RUNS, None)
    assert (y.float() - expected).abs().max() < 0.02 * expected.abs().max()


@pytest.mark.parametrize("backend", ["naive", "auto"])
@pytest.mark.parametrize("reverse", [False, True])
def test_a_sequence_goes_on_from_its_state(backend, reverse):
    x, dt, A, B, C, D, bias, first = (tensor[0] for tensor in operands(20))

    def scan(part: slice, state: Tensor):
        cut = (tensor[:, part] for tensor in (x, dt, B, C))
        one, steps, b, c = cut
        options = {"initial_state": state, "return_final_state": True, "reverse": reverse, "backend": backend}
        return ssd_scan(one, steps, A, b, c, D, bias, **options)

    whole, final = scan(slice(None), first)
    pieces = [slice(0, 7), slice(7, 8), slice(8, 20)]
    state, outputs = first, {}
    for piece in reversed(pieces) if reverse else pieces:
        outputs[piece.start], state = scan(piece, state)
    joined = torch.cat([outputs[piece.start] for piece in pieces], 1)
    torch.testing.assert_close(joined, whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, final, rtol=1e-12, atol=1e-12)


def test_every_stream_runs_in_both_directions():
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 3, 2, 11, 3, 2), (2, 3, 2, 11, 3), (2, 3), (2, 3, 2, 11, 4), (2, 3, 2, 11, 4), (2, 3), (2, 3))
    given = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    given[2] = -given[2].exp()
    y = bidirectional_ssd_scan(*given)
    for d, s in itertools.product(range(2), range(3)):
        one = [tensor[d, s] if number in (0, 1, 3, 4) else tensor[d] for number, tensor in enumerate(given)]
        expected = ssd_scan(*one, reverse=(d + s) % 2 == 1, backend="naive")
        torch.testing.assert_close(y[d, s], expected, rtol=1e-12, atol=1e-12)
    assert bidirectional_ssd_scan(*(t[:, :, :, :0] if t.ndim > 2 else t for t in given)).shape == (2, 3, 2, 0, 3, 2)


def test_the_gated_norm_is_its_formula():
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 2, 3, 5, 6), (2, 3, 5, 6), (2, 6))
    y, z, weight = (torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes)
    gated = y * torch.nn.functional.silu(z)
    norms = [torch.nn.functional.rms_norm(g, (6,), w, 1e-5) for g, w in zip(gated, weight, strict=True)]
    found = gated_norm(y, z, weight)
    torch.testing.assert_close(found, sum(norms), rtol=1e-12, atol=1e-12)
    seed = torch.randn(found.shape, generator=generator, dtype=torch.float64)
    for one, other in zip(
        torch.autograd.grad(found, (y, z, weight), seed),
        torch.autograd.grad(sum(norms), (y, z, weight), seed),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("options", [{"starts": torch.ones(2, 5, dtype=torch.bool)}, {"return_final_state": True}])
def test_a_context_takes_neither_borders_nor_states(options):
    one = [tensor[0] for tensor in operands(5)[:-1]]
    with pytest.raises(ValueError, match="a context goes with neither starts"):
        ssd_scan(*one, context=object(), **options)
