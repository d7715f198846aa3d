"""Mamba-2's scan in Triton against its definition, step by step, in fp64."""

import pytest
import torch
from torch import Tensor

from caduceus.config.model import CHUNK, MOST_IN_KERNELS
from caduceus.ops import mamba2
from caduceus.ops.mamba2 import bidirectional_ssd_scan, by_steps, ssd_scan
from caduceus.ops.operands import ScanOperands
from caduceus.ops.triton import ssd

NAMES = ("y", "final state", "dx", "ddt", "dA", "dB", "dC", "dD", "ddt_bias", "dinitial_state")
ACTIVATIONS = (0, 1, 3, 4)
# fp32: sums of some hundred terms of order 1, of products of 22 bits. bf16: operands of products and results are
# rounded once each, by at most 2^-7 (the interpreter truncates).
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1.6e-2}


def operands(length: int, directions: int, streams: int, heads: int, width: int, states: int) -> list[Tensor]:
    generator = torch.Generator(torch.get_default_device()).manual_seed(length)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    runs = directions, streams, 2, length
    return [
        *(normal(*runs, heads, width), normal(*runs, heads) - 1, -4 * normal(directions, heads).abs() - 0.05),
        *(normal(*runs, states), normal(*runs, states), normal(directions, heads), normal(directions, heads)),
        normal(*runs[:3], heads, width, states),
    ]


def differentiated(run, given: list[Tensor]) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in given]
    found = run(leaves)
    generator = torch.Generator(torch.get_default_device()).manual_seed(1)
    arriving = [torch.randn(t.shape, generator=generator).bfloat16().to(t.dtype) for t in found]
    return [*found, *torch.autograd.grad(found, leaves, arriving)]


def compare(sizes: tuple[int, ...], dtype: torch.dtype, reverse: bool, packed: bool) -> None:
    given = operands(*sizes)
    given = [tensor.to(dtype if number in ACTIVATIONS else torch.float32) for number, tensor in enumerate(given)]
    length, directions, streams, *_ = sizes
    generator = torch.Generator(torch.get_default_device()).manual_seed(3)
    starts = torch.rand(2, length, generator=generator) < 0.05 if packed else None

    def define(leaves: list[Tensor]) -> list[Tensor]:
        runs, backwards = mamba2._as_runs(tuple(leaves[:7]), reverse)
        found = by_steps((*runs, leaves[7].flatten(0, 1)), backwards, starts)
        return [tensor.unflatten(0, (directions, streams)) for tensor in found]

    right = differentiated(define, [tensor.double() for tensor in given])
    found = differentiated(lambda leaves: list(ssd.ssd_scan(tuple(leaves[:7]), leaves[7], starts, reverse)), given)
    for name, expected, actual in zip(NAMES, right, found, strict=True):
        assert actual.shape == expected.shape, name
        error = (actual.double() - expected).abs().max() / expected.abs().max()
        assert error <= TOLERANCE[dtype], f"{name}: {error:.1e}"


@pytest.mark.parametrize(
    ("sizes", "reverse", "packed"),
    [
        ((1, 1, 1, 1, 1, 1), False, False),
        ((CHUNK, 1, 2, 2, 3, 5), True, False),
        pytest.param((2 * CHUNK + 1, 2, 1, 2, 5, 3), False, True, marks=pytest.mark.slow),
        pytest.param((CHUNK + 9, 2, 2, 1, 17, 20), True, True, marks=pytest.mark.slow),
    ],
)
def test_outputs_states_and_gradients_are_the_definitions(sizes, reverse, packed) -> None:
    compare(sizes, torch.float32, reverse, packed)


def test_half_precision() -> None:
    compare((CHUNK + 9, 2, 1, 2, 5, 3), torch.bfloat16, False, True)


def test_more_chunks_than_are_carried_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssd, "_TURN", 2)
    compare((4 * CHUNK + 3, 1, 1, 1, 2, 2), torch.float32, True, False)


def test_heads_in_groups_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU is one that a program for each chunk would leave partly empty."""
    monkeypatch.setattr(ssd, "multiprocessors", lambda device: 2)
    compare((9, 1, 1, 5, 2, 3), torch.float32, False, False)


def test_the_ops_take_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    given, launched = [t.float() for t in operands(9, 2, 2, 2, 3, 4)], []
    launch = ssd.SSDKernels.outputs
    monkeypatch.setattr(ssd.SSDKernels, "outputs", lambda *a: launched.append(1) or launch(*a))
    y = bidirectional_ssd_scan(*given[:7], backend="triton")
    one = [t[1, 0] if t.ndim > 2 else t[1] for t in given]
    options = {"reverse": True, "initial_state": one[7], "return_final_state": True}
    found, expected = (ssd_scan(*one[:7], **options, backend=backend) for backend in ("triton", "naive"))
    assert len(launched) == 2
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    torch.testing.assert_close(y, bidirectional_ssd_scan(*given[:7], backend="naive"), rtol=0, atol=1e-5)
    wide = operands(1, 1, 1, 1, MOST_IN_KERNELS + 1, 1)
    bidirectional_ssd_scan(*(t.float() for t in wide[:7]), backend="triton")  # by torch
    assert len(launched) == 2


def test_an_empty_sequence_hands_its_state_on() -> None:
    given = [t.float() for t in operands(0, 2, 1, 2, 3, 4)]
    y, final, *gradients = differentiated(lambda t: list(ssd.ssd_scan(tuple(t[:7]), t[7], None, False)), given)
    assert y.shape == given[0].shape and torch.equal(final, given[7])
    assert [g.shape for g in gradients] == [t.shape for t in given] and not gradients[2].any()


@pytest.mark.slow
def test_it_composes_with_torch() -> None:
    given = [t.float() for t in operands(5, 1, 2, 2, 3, 4)]
    leaves = [t.requires_grad_() for t in given]
    torch.library.opcheck(ssd.ssd_forward, (*leaves, None, False))


def test_a_slice_gives_and_takes_what_the_form_of_matrix_products_does() -> None:
    x, dt, A, B, C, D, bias, state = (t.float() for t in operands(CHUNK + 9, 2, 2, 1, 3, 4))
    given = ScanOperands(x, dt, A[..., None], B, C, D, None, bias)
    state, final, dy = state.flatten(-2), torch.ones_like(state).flatten(-2), torch.randn_like(x)
    results = []
    for sliced in (mamba2.SlicedSSD, ssd.SlicedSSD):
        there, back = (sliced(given, True, True) for _ in range(2))
        end = there.end_state()
        y, kept = there.outputs(state)
        gradients = back.initial_gradient(dy, kept), *back.gradients(dy, final, kept)
        results.append([*end, y, *(g for g in gradients if g is not None)])
    assert len(results[0]) == 11
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(other, one, rtol=0, atol=2e-5 * (1 + one.abs().max().item()))
