"""Cases of the ops for gpu_correctness.py: operands, the Triton op, and the definition of the same function.

Shapes: P parameter directions, S streams, B batch, L length, E inner channels, N states, K taps.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from caduceus.alphabet import IGNORE_LABEL
from caduceus.ops import PAD_DT, add_norm, bidirectional_conv1d, bidirectional_scan, head_cross_entropy, naive
from caduceus.ops.directions import runs_backwards, scan_by_direction
from caduceus.ops.operands import ScanOperands
from caduceus.ops.self_check import ACTIVATIONS, Function, Operands
from caduceus.ops.triton import scan_launches
from tests.ops.slices import scan_in_slices


@dataclass
class Case:
    name: str
    operands: Operands
    """In fp64."""
    run: Function
    define: Function
    """Both take the operands by name and give the same outputs."""
    replay_bytes: int = scan_launches.REPLAY_BYTES
    """See there: with 1 the scan's backward pass takes the kernels for what is too long to be replayed at once."""


def every_case(small: bool) -> Iterator[Case]:
    """`small`: as the interpreter can do them."""
    yield from scan_cases(small)
    yield from convolution_cases(small)
    yield from norm_cases(small)
    yield from loss_cases(small)


def scan_cases(small: bool) -> Iterator[Case]:
    from caduceus.ops.triton import SlicedScan, scan_with_states

    def run(softplus=True, reverse=False, starts=None, **o):
        return scan_with_states(scan_operands(o), softplus, o.get("state"), starts, reverse)

    def define(softplus=True, reverse=False, **o):
        return scan_by_direction(naive.selective_scan, scan_operands(o), softplus, reverse, o.get("state"))

    length, channels, batch = (11, 3, 1) if small else (333, 200, 2)
    half = length // 2
    everything = scan_inputs(2, 2, batch, length, channels, 2 if small else 16)
    yield Case(f"scan, {length} x {channels}", everything, run, define)
    yield Case("scan, reversed", everything, bind(run, reverse=True), bind(define, reverse=True))
    # Nothing is masked or left over: sizes as of published models, for which other loops are compiled.
    even = (16, 16, 2) if small else (1024, 512, 16)
    whole = scan_inputs(2, 2, 1, *even)
    yield Case(f"scan, {even[0]} x {even[1]}", whole, run, define)
    yield Case(f"scan, {even[0]} x {even[1]}, in segments", whole, run, define, replay_bytes=1)
    yield Case(f"scan, {length} x {channels}, in segments", everything, run, define, replay_bytes=1)
    few = ("u", "dt", "A", "B", "C")
    steps = {**{n: everything[n] for n in few}, "dt": everything["dt"].abs() * 0.1}
    yield Case("scan, no D, z, bias and softplus", steps, bind(run, softplus=False), bind(define, softplus=False))
    for states in (1, 2, 3, 64):
        sizes = (2, 1, 1, 10, 2) if small else (2, 1, 1, 150, 129)
        yield Case(f"scan, {states} state{'s' * (states > 1)}", scan_inputs(*sizes, states), run, define)
    yield Case("scan, one token and channel", scan_inputs(1, 1, 1, 1, 1, 1), run, define)

    starts = starts_at(batch, length, [0, 3, half, half + 1], everything["u"].device)
    yield Case(
        "scan, packed",
        {n: t for n, t in everything.items() if n != "state"},
        lambda **o: run(starts=starts, **o)[:1],
        lambda **o: (bidirectional_scan(*scan_operands(o), starts=starts, backend="naive"),),
    )
    plain = {n: t for n, t in everything.items() if n != "state"}
    padded = {n: t.clone() for n, t in plain.items()}
    for name in ("u", "B", "C", "z"):
        padded[name][..., half:, :] = 3.0
    padded["dt"][..., half:, :] = PAD_DT

    def define_alone(**o):
        """Nothing of the pads: cut off, so that their gradients are zero."""
        cut = {n: t[..., :half, :] if n in ACTIVATIONS else t for n, t in o.items()}
        return tuple(define(**cut))

    def run_padded(**o):
        y, final = run(**o)
        return y[..., :half, :], final

    yield Case("scan, padded", padded, run_padded, define_alone)
    yield Case(
        "scan, in slices as ranks take it",
        plain,
        sliced_scan(SlicedScan, [length - half, half]),
        lambda **o: define(**o)[:1],
    )


def convolution_cases(small: bool) -> Iterator[Case]:
    from caduceus.ops.triton import bidirectional_conv1d as convolve

    def run(starts=None, halo=None, activation="silu", **o):
        return (convolve(o["x"], o["weight"], o.get("bias"), starts, halo, activation),)

    def define(halo=None, activation="silu", **o):
        x, weight, bias = o["x"], o["weight"], o.get("bias")
        P, K, S = weight.shape[0], weight.shape[2], x.shape[0]
        runs = []
        for d in range(P):
            for s in range(S):
                back = runs_backwards(d, s)
                near = x.new_zeros(x.shape[1], K - 1, x.shape[3]) if halo is None else halo[d, s]
                longer = torch.cat([x[s], near] if back else [near, x[s]], 1)
                y = naive.causal_conv1d(longer, weight[d], None if bias is None else bias[d], activation, back)
                runs.append(y[:, : x.shape[2]] if back else y[:, K - 1 :])
        return (torch.stack(runs).unflatten(0, (P, S)),)

    length, channels, batch = (19, 5, 1) if small else (333, 200, 2)
    operands = convolution_inputs(2, 2, batch, length, channels, 4)
    halo = {**operands, "halo": normal(2, 2, batch, 3, channels)}
    yield Case(f"convolution, {length} x {channels}", operands, run, define)
    yield Case("convolution, with a halo", halo, run, define)
    bare = {n: operands[n] for n in ("x", "weight")}
    yield Case("convolution, no bias and silu", bare, bind(run, activation=None), bind(define, activation=None))
    yield Case("convolution, shorter than its filter", convolution_inputs(2, 2, 1, 2, channels, 4), run, define)
    for taps in (1, 16):
        yield Case(f"convolution, {taps} tap{'s' * (taps > 1)}", convolution_inputs(2, 1, 1, 40, 3, taps), run, define)
    starts = starts_at(batch, length, [0, 1, 7, length - 1], operands["x"].device)
    yield Case(
        "convolution, packed",
        operands,
        bind(run, starts=starts),
        lambda x, weight, bias: (bidirectional_conv1d(x, weight, bias, starts=starts, backend="naive"),),
    )


def norm_cases(small: bool) -> Iterator[Case]:
    for width in (20,) if small else (118, 256):
        operands = {"x": normal(2, 2, 33, width), "weight": normal(2, width)}
        fused = {**operands, "residual": normal(2, 2, 33, width)}
        with_bias = {**fused, "weight": normal(width), "bias": normal(width)}
        for name, given in (("RMSNorm", operands), ("add + RMSNorm", fused), ("add + LayerNorm", with_bias)):
            yield Case(f"{name}, {width} channels", given, norm("triton"), norm("naive"))


def loss_cases(small: bool) -> Iterator[Case]:
    length, width = (37, 20) if small else (333, 200)
    for streams, weighted in ((1, False), (2, True)):
        operands = {"x": normal(streams, 2, length, width), "weight": normal(streams, 16, width)}
        labels = torch.randint(7, 11, (2, length), device=operands["x"].device)
        labels[:, ::2] = IGNORE_LABEL
        loss_weights = torch.rand(labels.shape, device=labels.device) if weighted else None
        name = f"head + loss, {streams} stream{'s' * (streams > 1)}{', weighted' * weighted}"
        yield Case(name, operands, loss("triton", labels, loss_weights), loss("naive", labels, loss_weights))
        if weighted:
            nothing = torch.full_like(labels, IGNORE_LABEL)
            yield Case("head + loss, no label", operands, loss("triton", nothing, None), loss("naive", nothing, None))


def norm(backend: str) -> Function:
    def run(x, weight, residual=None, bias=None):
        normed, total = add_norm(x, residual, weight, bias, eps=1e-5, backend=backend)
        return (normed,) if residual is None else (normed, total)

    return run


def loss(backend: str, labels: Tensor, loss_weights: Tensor | None) -> Function:
    def run(x, weight):
        return head_cross_entropy(x, weight, labels, loss_weights, ignore_label=IGNORE_LABEL, backend=backend)[:1]

    return run


def sliced_scan(sliced: type, cuts: list[int]) -> Function:
    """The scan as ranks that share a sequence take it, with gradients of its own."""

    class InSlices(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *operands):
            ctx.save_for_backward(*operands)
            given = ScanOperands(*operands)
            return scan_in_slices(sliced, given, cuts, True, False, torch.zeros_like(given.z))[0]

        @staticmethod
        def backward(ctx, dy):
            given = ScanOperands(*ctx.saved_tensors)
            return tuple(scan_in_slices(sliced, given, cuts, True, False, dy.contiguous())[1])

    return lambda **o: (InSlices.apply(*scan_operands(o)),)


def scan_operands(operands: Operands) -> ScanOperands:
    return ScanOperands(*(operands.get(name) for name in ("u", "dt", "A", "B", "C", "D", "z", "bias")))


def scan_inputs(P: int, S: int, batch: int, length: int, E: int, N: int) -> Operands:
    runs = (P, S, batch)
    return {
        "u": normal(*runs, length, E),
        "dt": normal(*runs, length, E) - 1,
        "A": -normal(P, E, N).abs() - 0.1,
        "B": normal(*runs, length, N),
        "C": normal(*runs, length, N),
        "D": normal(P, E),
        "z": normal(S, batch, length, E),
        "bias": 0.1 * normal(P, E),
        "state": normal(*runs, E, N),
    }


def convolution_inputs(P: int, S: int, batch: int, length: int, E: int, K: int) -> Operands:
    return {"x": normal(S, batch, length, E), "weight": normal(P, E, K), "bias": normal(P, E)}


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def starts_at(batch: int, length: int, positions: list[int], device: torch.device) -> Tensor:
    """(B, L) bool, other starts in every row."""
    starts = torch.zeros(batch, length, dtype=torch.bool, device=device)
    for row in range(batch):
        starts[row, [max(0, position - row) for position in positions]] = True
    return starts


def bind(function: Function, **options) -> Function:
    return lambda **operands: function(**operands, **options)
