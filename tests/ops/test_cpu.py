"""The CPU backend against the definition, and what a user's process does to it: threads, forks, compilers."""

import multiprocessing
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from caduceus.ops import PAD_DT, cpu, naive
from caduceus.ops.backends import resolve_backend
from caduceus.ops.cpu import compiled, llvm_values
from caduceus.ops.cpu import scan_kernels as kernels
from caduceus.ops.operands import ScanOperands
from tests.ops.cases import assert_close, bidirectional_inputs, block, make_scan, scan, with_gradients

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


@pytest.mark.moderate
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
            operands = ScanOperands(*sequences[:2], A, *sequences[2:4], D, sequences[4], bias)
            parts[part.start], state = cpu.selective_scan(operands, True, reverse, state)
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
    given = ScanOperands(u, dt, A, B, C, torch.ones(40), z, torch.zeros(40))
    expected = cpu.selective_scan(ScanOperands(*(t.contiguous() for t in given[:5]), *given[5:]), True, True, None)
    actual = cpu.selective_scan(given, True, True, None)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
    weight = torch.randn(4, 40, generator=generator).T
    y = cpu.causal_conv1d(z, weight, None, "silu", False)
    assert torch.equal(y, cpu.causal_conv1d(z.contiguous(), weight.contiguous(), None, "silu", False))


@pytest.mark.moderate
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


def test_a_cache_that_cannot_be_written_is_done_without(monkeypatch):
    def unwritable(self, function):
        raise RuntimeError("cannot cache function: no locator available")

    monkeypatch.setattr(compiled._Cache, "__init__", unwritable)

    @compiled.jit(llvm_values.EXACT)
    def double(x):
        return x * 2

    assert double(3.0) == 6.0


def test_auto_on_the_cpu():
    assert resolve_backend("auto", "cpu") == "cpu"
