import itertools

import pytest
import torch
from torch import Tensor

from caduceus import ops
from caduceus.ops import naive
from caduceus.ops.operands import ScanOperands
from caduceus.ops.triton import scan as triton_scan
from caduceus.ops.triton import scan_launches

# fp32 keeps 24 bits. Values here are of order 1 and sums have at most some hundred terms, so that rounding stays well
# below 1e-5 of the largest value; a wrong term is of order 1.
FP32 = 1e-5
# Outputs and gradients in 16 bits are rounded twice where the sum over directions waits in the output: fp16 to nearest,
# 2 · 2^-11; bf16, which the interpreter truncates (a GPU does not), 2 · 2^-7. Inputs are rounded for both sides alike.
HALF = {torch.float16: 1e-3, torch.bfloat16: 1.6e-2}

NAMES = ("u", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state")


def make_operands(P: int, S: int, batch: int, L: int, E: int, N: int) -> dict[str, Tensor]:
    generator = torch.Generator(torch.get_default_device()).manual_seed(L * E + N)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    return {
        "u": normal(P, S, batch, L, E),
        "dt": normal(P, S, batch, L, E) - 1,
        "A": -normal(P, E, N).abs() - 0.1,
        "B": normal(P, S, batch, L, N),
        "C": normal(P, S, batch, L, N),
        "D": normal(P, E),
        "z": normal(S, batch, L, E),
        "dt_bias": 0.1 * normal(P, E),
        "initial_state": normal(P, S, batch, E, N),
    }


def define(
    operands: dict[str, Tensor | None], softplus: bool = True, starts: Tensor | None = None, reverse: bool = False
) -> tuple[Tensor, Tensor]:
    """The definition, from `naive.selective_scan`: each run, each packed sequence by itself."""
    u, dt, A, B, C, D, z, dt_bias, state = (operands[name] for name in NAMES)
    P, S, batch, L, _ = u.shape
    streams, states = [], [[None] * S for _ in range(P)]
    for s in range(S):
        total = 0
        for d in range(P):
            backwards = ((d + s) % 2 == 1) != reverse
            rows, ends = [], []
            for b in range(batch):
                borders = [0, L] if starts is None else sorted({0, L, *starts[b].nonzero().flatten().tolist()})
                pieces = [slice(i, j) for i, j in itertools.pairwise(borders)]
                h = None if state is None else state[d, s, b, None]
                if starts is not None and not backwards and starts[b, 0]:
                    h = None
                outputs = {}
                for piece in pieces[::-1] if backwards else pieces:
                    run = (t[d, s, b, None, piece] for t in (u, dt))
                    Bb, Cb = (t[d, s, b, None, piece] for t in (B, C))
                    zb = None if z is None else z[s, b, None, piece]
                    Dd, bias = (None if t is None else t[d] for t in (D, dt_bias))
                    given = ScanOperands(*run, A[d], Bb, Cb, Dd, zb, bias)
                    y, end = naive.selective_scan(given, softplus, backwards, h)
                    outputs[piece.start], h = y, None
                rows.append(torch.cat([outputs[i] for i in sorted(outputs)], 1))
                ends.append(end)
            total = total + torch.cat(rows)
            states[d][s] = torch.cat(ends)
        streams.append(total)
    return torch.stack(streams), torch.stack([torch.stack(row) for row in states])


def check(operands: dict[str, Tensor | None], dtype=torch.float32, tolerance=FP32, chunk=16, **options) -> None:
    """Output, final state and all gradients of the kernels in `dtype` against the definition in fp64."""
    rounded = {
        name: None if t is None else (t.to(dtype) if name in ("u", "dt", "B", "C", "z") else t.float())
        for name, t in operands.items()
    }
    reference = {name: None if t is None else t.double().requires_grad_() for name, t in rounded.items()}
    y, final = define(reference, **options)
    generator = torch.Generator(torch.get_default_device()).manual_seed(1)
    dy = torch.randn(y.shape, generator=generator).to(dtype)
    dfinal = torch.randn(final.shape, generator=generator)
    given = [name for name in NAMES if operands[name] is not None]
    expected = torch.autograd.grad((y, final), [reference[name] for name in given], (dy.double(), dfinal.double()))

    actual = {name: None if t is None else t.requires_grad_() for name, t in rounded.items()}
    state = actual["initial_state"]
    y_, final_ = triton_scan.scan_with_states(
        ScanOperands(*(actual[name] for name in NAMES[:-1])), initial_state=state, chunk=chunk, **options
    )
    assert y_.dtype == dtype
    gradients = torch.autograd.grad((y_, final_), [actual[name] for name in given], (dy, dfinal))
    pairs = {"y": (y, y_), "final": (final, final_)}
    pairs |= {name: pair for name, *pair in zip(given, expected, gradients, strict=True)}
    for name, (right, found) in pairs.items():
        assert found.shape == right.shape, name
        error = (right - found.double()).abs().max() / right.abs().max()
        assert error < tolerance, f"{name}: {error:.1e}"


def replay_chunks_one_by_one(monkeypatch: pytest.MonkeyPatch, so: bool = True) -> None:
    """In the backward pass; by default there is room for all at once, and adjoints come from the same kernel."""
    if so:
        monkeypatch.setattr(scan_launches, "REPLAY_BYTES", 1)


def test_both_directions_and_streams():
    check(make_operands(2, 2, 1, 9, 3, 2), chunk=8)


def test_a_forced_backend_runs_in_the_interpreter():
    o = make_operands(1, 1, 1, 5, 3, 2)
    arguments = [o[name][0] if name in ("A", "D", "dt_bias", "z") else o[name][0, 0] for name in NAMES[:-1]]
    expected = ops.selective_scan(*arguments, reverse=True, backend="naive")
    found = ops.selective_scan(*(t.float() for t in arguments), reverse=True, backend="triton")
    torch.testing.assert_close(found.double(), expected, rtol=FP32, atol=FP32)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("P", "S", "batch", "L", "E", "N", "chunk"),
    [
        (1, 1, 1, 1, 1, 1, 8),  # a single everything
        (2, 1, 2, 9, 17, 3, 8),  # one token over a chunk, and channels that fill no block
        (2, 1, 1, 3, 130, 2, 8),  # two channels over a block, so in a program of two blocks
        (1, 2, 1, 3, 256, 1, 8),  # exactly such a program
        (2, 1, 1, 11, 16, 2, 8),  # exactly a block of one channel per thread
        (1, 1, 2, 8, 128, 17, 8),  # more states than two channels of a thread have room for
        (1, 2, 1, 73, 2, 1, 8),  # more chunks than are carried over at a time
        (1, 2, 1, 16, 4, 5, 16),  # exactly one chunk; stream 1 of a uni-directional model
        (2, 3, 1, 9, 2, 1, 8),  # more streams than strands
        (2, 1, 1, 23, 3, 16, 8),  # the states of the published models, and a short last piece
        (2, 1, 1, 9, 2, 32, 8),
        (2, 1, 1, 10, 2, 64, 8),  # as many states as there can be
    ],
)
def test_odd_sizes(P, S, batch, L, E, N, chunk):
    check(make_operands(P, S, batch, L, E, N), chunk=chunk)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("channels", [5, 16])  # of a whole block a turn of the replay takes two tokens
def test_half_precision(dtype, channels):
    check(make_operands(2, 1, 1, 12, channels, 2), dtype=dtype, tolerance=HALF[dtype])


@pytest.mark.slow
def test_sums_that_stay_in_a_warp():
    """Two warps with channels, in 16 bits: terms are rounded to bf16 before they are summed, and results again."""
    check(make_operands(2, 1, 1, 9, 33, 4), dtype=torch.bfloat16, tolerance=HALF[torch.bfloat16], chunk=8)


@pytest.mark.slow
@pytest.mark.parametrize("absent", [("D", "z"), ("dt_bias", "initial_state")])
@pytest.mark.parametrize("at_once", [True, False])
def test_optional_operands(monkeypatch, absent, at_once):
    replay_chunks_one_by_one(monkeypatch, not at_once)
    check(make_operands(2, 1, 1, 10, 3, 2) | dict.fromkeys(absent), chunk=8)


@pytest.mark.slow
def test_step_sizes_without_softplus():
    operands = make_operands(1, 1, 1, 10, 3, 2)
    check(operands | {"dt": operands["dt"].abs() * 0.3}, softplus=False, chunk=8)


@pytest.mark.slow
@pytest.mark.parametrize(("position", "at_once"), [(0, True), (0, False), (8, True), (8, False)])
def test_a_start_forgets_what_lies_on_its_other_side(monkeypatch, position, at_once):
    replay_chunks_one_by_one(monkeypatch, not at_once)
    starts = torch.zeros(2, 14, dtype=torch.bool)
    starts[0, position] = True
    starts[1, [3, 4, 11, 13]] = True
    check(make_operands(2, 1, 2, 14, 3, 2), starts=starts, chunk=8)


def test_pads_neither_decay_nor_feed_the_state():
    operands = make_operands(2, 1, 1, 11, 3, 2)
    padded = dict(operands)
    for name in ("u", "dt", "B", "C", "z"):
        tail = torch.full_like(operands[name][..., :6, :], ops.PAD_DT if name == "dt" else 3.0)
        padded[name] = torch.cat([operands[name], tail], dim=-2)
    y, final = run(operands)
    y_padded, final_padded = run(padded)
    # Left-to-right sees the pads last, right-to-left first. Chunks fall elsewhere, so sums are rounded differently.
    torch.testing.assert_close(y_padded[..., :11, :], y, rtol=0, atol=FP32)
    torch.testing.assert_close(final_padded, final, rtol=0, atol=FP32)


def run(operands: dict[str, Tensor], chunk: int = 8, **options) -> tuple[Tensor, Tensor]:
    *given, state = (operands[name].float() for name in NAMES)
    return triton_scan.scan_with_states(ScanOperands(*given), initial_state=state, chunk=chunk, **options)


@pytest.mark.slow
def test_reverse_is_the_flip_of_forward():
    operands = make_operands(1, 1, 2, 13, 5, 3)
    flipped = {n: t.flip(-2) if n in ("u", "dt", "B", "C", "z") else t for n, t in operands.items()}
    # A chunk of the whole length: then both take the same steps in the same order, and give the same bits.
    y, final = run(operands, chunk=16, reverse=True)
    y_flipped, final_flipped = run(flipped, chunk=16)
    assert torch.equal(y, y_flipped.flip(-2))
    assert torch.equal(final, final_flipped)


@pytest.mark.slow
def test_chunk_and_segment_lengths_change_nothing_but_rounding(monkeypatch):
    def gradients(chunk: int) -> list[Tensor]:
        operands = {n: t.float().requires_grad_() for n, t in make_operands(2, 1, 1, 20, 3, 2).items()}
        y, final = run(operands, chunk=chunk)
        return [y, final, *torch.autograd.grad(y.sin().sum() + final.sum(), list(operands.values()))]

    whole = gradients(24)
    small = gradients(8)
    replay_chunks_one_by_one(monkeypatch)
    segmented = gradients(8)
    for a, b, c in zip(whole, small, segmented, strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=FP32 * a.abs().max().item())
        torch.testing.assert_close(c, b, rtol=0, atol=FP32 * a.abs().max().item())


@pytest.mark.slow
def test_two_runs_give_the_same_bits():
    operands = {n: t.float().requires_grad_() for n, t in make_operands(2, 1, 1, 9, 3, 2).items()}
    runs = [run(operands) for _ in range(2)]
    grads = [torch.autograd.grad(y.sum(), list(operands.values())) for y, _ in runs]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "absent", "starts"),
    [
        (torch.float32, (), None),
        (torch.bfloat16, (), None),
        (torch.bfloat16, ("D", "z", "initial_state"), [0, 5]),
    ],
)
def test_states_that_are_kept_change_no_bit(dtype, absent, starts):
    """A stream that runs backwards first, and a token over a chunk."""
    operands = make_operands(2, 2, 1, 9, 3, 2) | dict.fromkeys(absent)
    given = {
        n: None if t is None else t.to(dtype if n in ("u", "dt", "B", "C", "z") else torch.float32)
        for n, t in operands.items()
    }
    if starts is not None:
        starts = torch.zeros(1, 9, dtype=torch.bool).index_fill_(1, torch.tensor(starts), True)
    results = []
    for keep in (False, True):
        leaves = {n: None if t is None else t.detach().requires_grad_() for n, t in given.items()}
        scanned = ScanOperands(*(leaves[name] for name in NAMES[:-1]))
        state = leaves["initial_state"]
        y, final = triton_scan.scan_with_states(scanned, initial_state=state, starts=starts, chunk=8, keep=keep)
        loss = y.float().sin().sum() + final.sum()
        present = [t for t in leaves.values() if t is not None]
        results.append([y, final, *torch.autograd.grad(loss, present)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.slow
def test_strided_operands():
    operands = make_operands(2, 1, 2, 9, 4, 2)
    for left, right in (("B", "C"), ("u", "dt")):
        joined = torch.cat([operands[left], operands[right]], -1)
        operands[left], operands[right] = joined.chunk(2, -1)
    operands["z"] = operands["z"].transpose(0, 1).contiguous().transpose(0, 1)
    check(operands)


def test_numbers_that_are_loaded_in_pairs_lie_at_even_places():
    """A single token of B and C split off a product is contiguous where it is, which may be at an odd place."""
    o = {n: t.float() for n, t in make_operands(1, 1, 1, 1, 3, 2).items()}
    _, B, C = torch.cat([torch.zeros(1, 1, 1, 1, 1), o["B"], o["C"]], -1).split([1, 2, 2], -1)
    assert B.is_contiguous() and B.storage_offset() % 2 == 1
    given = ScanOperands(o["u"], o["dt"], o["A"], B, C, o["D"], o["z"], o["dt_bias"])
    scan = scan_launches.ScanKernels(given, None, True, False, 8)
    for name, tensor in (("B", scan.B), ("C", scan.C)):
        assert tensor.data_ptr() % 8 == 0
        assert torch.equal(tensor.flatten(), o[name].flatten())


@pytest.mark.slow
def test_composes_with_torch():
    o = make_operands(2, 1, 1, 6, 3, 2)
    arguments = tuple(o[name].float().requires_grad_() for name in NAMES[:-1])
    for keep in (False, True):
        torch.library.opcheck(triton_scan.scan_forward, (*arguments, None, None, True, False, 8, keep))
    starts = torch.tensor([[False, False, True, False, False, False]])
    initial = o["initial_state"].float()
    # In 16 bits, so that a gradient of another type than the compiler was told of shows.
    for absent, state, begins in (((), None, None), (("D", "z", "dt_bias"), initial, starts)):
        given = [None if name in absent else o[name].bfloat16() for name in NAMES[:-1]]
        keep = state is None
        y, final, *found = triton_scan.scan_forward(*given, state, begins, True, False, 8, keep)
        dfinal = None if state is None else final
        torch.library.opcheck(triton_scan.scan_backward, (y, dfinal, *given, begins, *found, True, False, 8, keep))


def test_refuses_what_it_cannot_run():
    o = make_operands(1, 1, 1, 2, 2, 65)
    with pytest.raises(ValueError, match="64 states"):
        run(o)
    with pytest.raises(TypeError, match="float64"):
        triton_scan.scan_with_states(ScanOperands(*(o[name] for name in NAMES[:-1])))
