"""The CPU backend against the definition, and what a user's process does to it: threads, forks, compilers."""

import multiprocessing
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from caduceus import ops
from caduceus.ops import PAD_DT, cpu, naive
from caduceus.ops.cpu import compiled, vectors
from caduceus.ops.cpu import conv as conv_ops
from caduceus.ops.cpu import scan as scan_ops
from caduceus.ops.cpu import scan_kernels as kernels
from tests.ops.cases import assert_close, make_scan, with_gradients

FLOAT32 = 3e-6
"""Some tens of roundings of 2^-24, and 2e-7 of exp2, on the way of a term of order one."""
FLOAT64 = 1e-12

sizes = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 3),
        "length": st.one_of(st.integers(1, 3), st.integers(1, 3 * kernels.CHUNK + 1)),
        "channels": st.sampled_from([1, 2, 7, 31, 32, 33, 96, 127, 128, 129, 236, 300]),
        "states": st.integers(1, 17),
        "skip": st.booleans(),
        "gate": st.booleans(),
        "bias": st.booleans(),
        "initial": st.booleans(),
        "seed": st.integers(0, 99),
    }
)


def scan(module, softplus=True, reverse=False):
    return lambda *t: module.selective_scan(*t[:8], softplus, reverse, t[8])


@settings(max_examples=20, deadline=None)
@given(sizes, st.booleans(), st.booleans())
def test_scan_is_the_definition(size, reverse, softplus):
    case = make_scan(**size)
    if not softplus:
        case.dt, case.dt_bias = case.dt.abs(), None if case.dt_bias is None else case.dt_bias.abs()
    expected = with_gradients(scan(naive, softplus, reverse), case.tensors())
    for dtype, tolerance in ((torch.float32, FLOAT32), (torch.float64, FLOAT64)):
        actual = with_gradients(scan(cpu, softplus, reverse), case.tensors(), dtype)
        assert all(t.dtype == dtype for t in actual[0] + actual[1])
        assert_close(actual[0] + actual[1], expected[0] + expected[1], tolerance)


@settings(max_examples=20, deadline=None)
@given(
    st.integers(1, 3),
    st.one_of(st.integers(1, 6), st.integers(250, 515)),
    st.sampled_from([1, 5, 32, 118, 200]),
    st.integers(1, 5),
    st.sampled_from([None, "silu"]),
    st.booleans(),
    st.booleans(),
)
def test_convolution_is_the_definition(batch, length, channels, width, activation, has_bias, reverse):
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randn(*s, generator=generator, dtype=torch.float64)
        for s in ((batch, length, channels), (channels, width), (channels,))
    )
    inputs = [x, weight, bias if has_bias else None]
    expected = with_gradients(lambda *t: naive.causal_conv1d(*t, activation, reverse), inputs)
    for dtype, tolerance in ((torch.float32, FLOAT32), (torch.float64, FLOAT64)):
        actual = with_gradients(lambda *t: cpu.causal_conv1d(*t, activation, reverse), inputs, dtype)
        assert_close(actual[0] + actual[1], expected[0] + expected[1], tolerance)


def bidirectional_inputs(directions, streams, batch=2, length=21, channels=40, states=5):
    generator = torch.Generator().manual_seed(directions + 2 * streams)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    runs = (directions, streams, batch, length)
    x = normal(streams, batch, length, channels)
    taps = normal(directions, channels, 4), normal(directions, channels)
    A = -torch.rand(directions, channels, states, generator=generator, dtype=torch.float64) - 0.1
    rest = normal(*runs, channels), A, normal(*runs, states), normal(*runs, states), normal(directions, channels)
    return [x, *taps, *rest, normal(streams, batch, length, channels), normal(directions, channels)]


def block(backend):
    """Convolution and scan as the model has them."""

    def run(x, weight, bias, *rest):
        u = ops.bidirectional_conv1d(x, weight, bias, backend=backend)
        return ops.bidirectional_scan(u, *rest, backend=backend)

    return run


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("streams", [1, 2, 3])
def test_all_directions_and_streams_at_once_are_the_loop_over_them(directions, streams):
    inputs = bidirectional_inputs(directions, streams)
    expected = with_gradients(block("naive"), inputs)
    for dtype, tolerance in ((torch.float32, FLOAT32), (torch.float64, FLOAT64)):
        actual = with_gradients(block("cpu"), inputs, dtype)
        assert_close(actual[0] + actual[1], expected[0] + expected[1], tolerance)


@pytest.mark.parametrize("shift", [-100.0, -20.0, 5.0, 60.0])
def test_extreme_steps(shift):
    """Decays from exactly 1 to underflow, and softplus and sigmoid far into both tails.

    The gate and the states are of order `shift`, and float32 resolves an exponent dt · A only relative to its size.
    """
    case = make_scan(1, 40, 32, 4)
    case.dt = case.dt + shift
    expected = with_gradients(scan(naive), case.tensors())
    actual = with_gradients(scan(cpu), case.tensors(), torch.float32)
    assert_close(actual[0] + actual[1], expected[0] + expected[1], FLOAT32)


@pytest.mark.parametrize("output", [0, 1])
def test_one_output_alone_has_its_gradients(output):
    """A loss of the outputs alone, or of the last state alone."""
    case = make_scan(1, 40, 33, 4)
    expected = with_gradients(lambda *t: scan(naive)(*t)[output], case.tensors())
    actual = with_gradients(lambda *t: scan(cpu)(*t)[output], case.tensors(), torch.float32)
    assert_close(actual[1], expected[1], FLOAT32)


def test_long_sequence():
    """Rounding does not build up over ten thousand tokens of slowly decaying states."""
    case = make_scan(1, 10_000, 8, 4, initial=False)
    case.A, case.dt = case.A / 100, case.dt - 2
    expected = with_gradients(scan(cpu), case.tensors())
    actual = with_gradients(scan(cpu), case.tensors(), torch.float32)
    assert_close(actual[0], expected[0], FLOAT32)
    assert_close(actual[1], expected[1], 1e-5)  # parameters' gradients are sums over all tokens, in float32


@pytest.mark.parametrize("reverse", [False, True])
def test_padding_is_as_if_it_were_not_there(reverse):
    case = make_scan(2, 50, 40, 5)
    padding = torch.zeros(50, dtype=torch.bool)
    padding[[0, 7, 8, 9, 30, 48, 49]] = True
    case.dt[:, padding] = PAD_DT
    full, gradients = with_gradients(scan(cpu, reverse=reverse), case.tensors(), torch.float32)
    for name in ("u", "dt", "B", "C", "z"):
        setattr(case, name, getattr(case, name)[:, ~padding])
    y, final = (t.detach() for t in scan(cpu, reverse=reverse)(*[t.float() for t in case.tensors()]))
    assert torch.equal(full[0][:, ~padding], y)
    assert torch.equal(full[1], final)
    g_dt, g_B = gradients[1], gradients[3]
    assert torch.all(g_dt[:, padding] == 0)
    assert torch.all(g_B[:, padding] == 0)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("cut", [1, kernels.CHUNK, 37])
def test_two_parts_joined_by_their_state_are_the_whole(cut, reverse):
    case = make_scan(2, 50, 33, 5)

    def in_two_parts(u, dt, A, B, C, D, z, bias, state):
        ranges = [slice(0, cut), slice(cut, None)]
        parts = {}
        for part in reversed(ranges) if reverse else ranges:
            sequences = [t[:, part] for t in (u, dt, B, C, z)]
            parts[part.start], state = cpu.selective_scan(
                *sequences[:2], A, *sequences[2:4], D, sequences[4], bias, True, reverse, state
            )
        return torch.cat([parts[0], parts[cut]], dim=1), state

    whole = with_gradients(scan(cpu, reverse=reverse), case.tensors(), torch.float32)
    parts = with_gradients(in_two_parts, case.tensors(), torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(parts[0], whole[0], strict=True))
    assert_close(parts[1], [t.double() for t in whole[1]], FLOAT32)


def test_reverse_is_the_flip_of_forward():
    case = make_scan(2, 45, 40, 5)
    flipped = [
        t.flip(1) if name in ("u", "dt", "B", "C", "z") else t
        for name, t in zip(case.__dataclass_fields__, case.tensors(), strict=True)
    ]
    y, final = scan(cpu, reverse=True)(*[t.float() for t in case.tensors()])
    expected, state = scan(cpu)(*[t.float() for t in flipped])
    assert torch.equal(y, expected.flip(1))
    assert torch.equal(final, state)
    x, weight = case.u.float(), torch.randn(40, 4)
    y = cpu.causal_conv1d(x, weight, None, "silu", True)
    assert torch.equal(y, cpu.causal_conv1d(x.flip(1), weight, None, "silu", False).flip(1))


@pytest.mark.parametrize("name", ["u", "dt", "B"])
def test_nan_is_not_swallowed(name):
    case = make_scan(1, 20, 33, 3)
    getattr(case, name)[0, 11] = float("nan")
    y, final = scan(cpu)(*[t.float() for t in case.tensors()])
    assert torch.isfinite(y[:, :11]).all()
    assert y[:, 11:].isnan().all()
    assert final.isnan().all()


@pytest.fixture
def poisoned_memory(monkeypatch):
    """New memory is full of NaN, so that whatever a kernel leaves unwritten shows."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    monkeypatch.setattr(np, "empty", lambda shape, dtype: np.full(shape, np.nan, dtype))
    assert torch.ones(1).new_empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("gate", [False, True])
def test_every_output_is_written(poisoned_memory, gate):
    case = make_scan(2, 21, 236, 5, gate=gate)
    outputs, gradients = with_gradients(scan(cpu), case.tensors(), torch.float32)
    assert all(torch.isfinite(t).all() for t in outputs + gradients)
    outputs, gradients = with_gradients(block("cpu"), bidirectional_inputs(2, 2), torch.float32)
    assert all(torch.isfinite(t).all() for t in outputs + gradients)


def test_views_give_the_bits_of_copies():
    """Slices of a projection's output are read in place; any other layout is copied first."""
    generator = torch.Generator().manual_seed(0)
    projected = torch.randn(2, 30, 3 * 40 + 10, generator=generator)
    u, dt, z, B, C = projected.split([40, 40, 40, 5, 5], dim=-1)
    u = u.transpose(1, 2).contiguous().transpose(1, 2)
    A = -torch.rand(5, 40, generator=generator).T
    args = (torch.ones(40), z, torch.zeros(40), True, True, None)
    expected = cpu.selective_scan(*(t.contiguous() for t in (u, dt, A, B, C)), *args)
    actual = cpu.selective_scan(u, dt, A, B, C, *args)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
    weight = torch.randn(4, 40, generator=generator).T
    y = cpu.causal_conv1d(z, weight, None, "silu", False)
    assert torch.equal(y, cpu.causal_conv1d(z.contiguous(), weight.contiguous(), None, "silu", False))


def test_number_of_threads_changes_no_bit():
    inputs = bidirectional_inputs(2, 2, batch=3, length=600, channels=260)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(with_gradients(block("cpu"), inputs, torch.float32))
    finally:
        torch.set_num_threads(before)
    for outputs, gradients in results[1:]:
        pairs = zip(outputs + gradients, results[0][0] + results[0][1], strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_callers_in_several_threads():
    inputs = bidirectional_inputs(2, 1, channels=200)
    expected = with_gradients(block("cpu"), inputs, torch.float32)
    results = [None] * 4

    def work(i):
        results[i] = with_gradients(block("cpu"), inputs, torch.float32)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for outputs, gradients in results:
        pairs = zip(outputs + gradients, expected[0] + expected[1], strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_forked_child_runs_the_kernels_too():
    """The parent's threads do not exist in the child; waiting for them would hang it."""
    inputs = [t.float() for t in bidirectional_inputs(2, 2, channels=200)]

    def run():
        with torch.no_grad():
            return block("cpu")(*inputs).sum().item()

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        expected = run()
        context = multiprocessing.get_context("fork")
        queue = context.Queue()
        child = context.Process(target=lambda: queue.put(run()), daemon=True)
        child.start()
        assert queue.get(timeout=300) == expected
        child.join(timeout=300)
        assert child.exitcode == 0
    finally:
        torch.set_num_threads(before)


def _operator_inputs(gate=True):
    tensors = [t.float() for t in bidirectional_inputs(2, 2, length=5, channels=3, states=2)]
    x, weight, bias, dt, A, B, C, D, z, dt_bias = (t.requires_grad_() for t in tensors)
    u = torch.randn(dt.shape, requires_grad=True)
    initial = torch.randn(2, 2, 2, 3, 2, requires_grad=True)
    optional = (D, z, dt_bias, initial) if gate else (None, None, None, None)
    return (x, weight, bias), (u, dt, A, B, C, *optional)


@pytest.mark.slow
@pytest.mark.parametrize("gate", [False, True])
def test_operators_keep_the_rules_of_torch(gate):
    conv, scan_inputs = _operator_inputs(gate)
    torch.library.opcheck(conv_ops._conv, (*conv, gate, False))
    torch.library.opcheck(conv_ops._conv, (conv[0], conv[1], None, gate, True))
    torch.library.opcheck(scan_ops._scan, (*scan_inputs, gate, True, True))
    detached = [None if t is None else t.detach() for t in scan_inputs]
    y, final, kept = scan_ops._scan(*detached, True, False, True)
    torch.library.opcheck(scan_ops._scan_backward, (y, final, kept, *detached[:8], True, False))
    torch.library.opcheck(
        conv_ops._conv_backward, (conv_ops._conv(*conv, True, False).detach(), *(t.detach() for t in conv), True, True)
    )


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_in_one_graph(compiler):
    inputs = bidirectional_inputs(2, 2)
    expected = with_gradients(block("cpu"), inputs, torch.float32)
    compiled = torch.compile(block("cpu"), fullgraph=True, backend=compiler)
    actual = with_gradients(compiled, inputs, torch.float32)
    pairs = zip(actual[0] + actual[1], expected[0] + expected[1], strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    case = make_scan(1, 20, 33, 3)
    halves = [t.to(dtype) for t in case.tensors()]
    y, final = scan(cpu)(*halves)
    exact, state = scan(cpu)(*[t.float() for t in halves])
    assert y.dtype == dtype
    assert torch.equal(y, exact.to(dtype))
    assert final.dtype == torch.float32
    assert torch.equal(final, state)
    gradients = with_gradients(scan(cpu), case.tensors(), dtype)[1]
    assert all(g.dtype == dtype for g in gradients)


def test_under_autocast_the_scan_stays_in_float32():
    case = make_scan(1, 20, 32, 3, gate=False, initial=False)
    u, dt, A, B, C, D, _, bias, _ = (None if t is None else t.float() for t in case.tensors())
    projection = torch.randn(32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        projected = u @ projection
        y = ops.selective_scan(projected, dt, A, B, C, D, None, bias, backend="cpu")
    assert projected.dtype == y.dtype == torch.bfloat16
    exact = ops.selective_scan(projected.float(), dt, A, B, C, D, None, bias, backend="cpu")
    assert torch.equal(y, exact.bfloat16())


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    inputs = bidirectional_inputs(2, 1)
    expected = with_gradients(block("cpu"), inputs, torch.float32)
    actual = with_gradients(lambda *t: checkpoint(block("cpu"), *t, use_reentrant=False), inputs, torch.float32)
    if reentrant:
        leaves = [t.float().requires_grad_() for t in inputs]
        y = checkpoint(block("cpu"), *leaves, use_reentrant=True)
        generator = torch.Generator().manual_seed(1)
        y.backward(torch.randn(y.shape, generator=generator, dtype=torch.float64).float())
        actual = [y.detach()], [t.grad for t in leaves]
    pairs = zip(actual[0] + actual[1], expected[0] + expected[1], strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_without_gradients_no_states_are_kept():
    _, scan_inputs = _operator_inputs()
    with torch.no_grad():
        assert scan_ops._scan(*scan_inputs, True, False, False)[2].numel() == 0


def test_a_cache_that_cannot_be_written_is_done_without(monkeypatch):
    def unwritable(self, function):
        raise RuntimeError("cannot cache function: no locator available")

    monkeypatch.setattr(compiled._Cache, "__init__", unwritable)

    @compiled.jit(vectors.EXACT)
    def double(x):
        return x * 2

    assert double(3.0) == 6.0


def test_auto_on_the_cpu():
    assert ops.resolve_backend("auto", "cpu") == "cpu"
