"""Vectors in compiled code against numpy, lane by lane."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numba
import numpy as np
import pytest

from caduceus.ops.cpu import vectors
from caduceus.ops.cpu.vectors import LANES, load, load_half, read, store, sum_of_halves, total, write, zeros

DTYPES = [np.float32, np.float64]
ROUNDINGS = {np.float32: 3e-7, np.float64: 1e-15}
"""Relative: some 2^-24, or 2^-53, of exp2's polynomial and of what leads to it."""
SPECIAL = [np.nan, np.inf, -np.inf, 0.0, -0.0]


def _compiled(function):
    @numba.njit
    def run(x, out):
        for at in range(0, x.size, LANES):
            store(out, at, function(load(x, at)))

    return run


def lanewise(function, x):
    """function of every element, by vectors, after padding to whole vectors."""
    padded = np.zeros(-(-x.size // LANES) * LANES, x.dtype)
    padded[: x.size] = x
    out = np.empty_like(padded)
    _compiled(function)(padded, out)
    return out[: x.size]


def elementwise(function, x):
    """function of every element as a scalar."""

    @numba.njit
    def run(x, out):
        for i in range(x.size):
            out[i] = function(x[i])

    out = np.empty_like(x)
    run(x, out)
    return out


def values(dtype):
    generator = np.random.default_rng(0)
    return np.concatenate([generator.normal(size=200) * 10, SPECIAL, [1e-30, 3e30]]).astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_operators(dtype):
    x, scalar = values(dtype), dtype(3)

    @numba.njit
    def run(x, y, scalar, out):
        for at in range(0, LANES * (x.size // LANES), LANES):
            a, b = load(x, at), load(y, at)
            store(out[0], at, a + b)
            store(out[1], at, a - b)
            store(out[2], at, a * b)
            store(out[3], at, a / b)
            store(out[4], at, 2 - a)
            store(out[5], at, a * scalar)
            c = a
            c += b
            store(out[6], at, c)

    whole = x.size // LANES * LANES
    y = np.roll(x, 7)
    out = np.zeros((7, x.size), dtype)
    run(x, y, scalar, out)
    with np.errstate(all="ignore"):
        expected = [x + y, x - y, x * y, x / y, 2 - x, x * scalar, x + y]
    for a, e in zip(out, expected, strict=True):
        assert a.dtype == e.dtype
        np.testing.assert_allclose(a[:whole], e[:whole], rtol=np.finfo(dtype).eps, atol=0)


@pytest.mark.moderate
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("apply", [lanewise, elementwise])
def test_exp2(dtype, apply):
    last = np.finfo(dtype).maxexp
    x = np.concatenate([np.linspace(2 - last, last - 1e-3, 999), np.linspace(-1, 1, 999)]).astype(dtype)
    np.testing.assert_allclose(apply(vectors.exp2, x), np.exp2(x), rtol=ROUNDINGS[dtype], atol=0)
    x = np.array([0, -0.0, -1, 5, 1 - last, -last, -1e9, -np.inf, last], dtype)
    expected = np.array([1, 1, 0.5, 32, 0, 0, 0, 0, np.inf])
    assert np.array_equal(apply(vectors.exp2, x), expected)
    assert np.isnan(apply(vectors.exp2, np.array([np.nan], dtype))).all()


@pytest.mark.moderate
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("apply", [lanewise, elementwise])
def test_softplus_and_sigmoid(dtype, apply):
    x = np.concatenate([np.linspace(-80, 80, 999), np.linspace(-1, 1, 99)]).astype(dtype)
    exact = x.astype(np.longdouble)
    softplus, sigmoid = np.logaddexp(exact, 0), 1 / (1 + np.exp(-exact))
    # the argument of e^-x is rounded relative to its size, up to 80 · log2(e)
    tolerance = {"rtol": 80 * np.finfo(dtype).eps, "atol": 0}
    np.testing.assert_allclose(apply(vectors.softplus, x), softplus.astype(dtype), **tolerance)
    np.testing.assert_allclose(apply(vectors.sigmoid, x), sigmoid.astype(dtype), **tolerance)
    both = [apply(first_of_both, x), apply(second_of_both, x)]
    np.testing.assert_allclose(both[0], softplus.astype(dtype), **tolerance)
    np.testing.assert_allclose(both[1], sigmoid.astype(dtype), **tolerance)
    ends = np.array([-1e4, -np.inf, 1e4, np.nan], dtype)
    for softplus in (vectors.softplus, first_of_both):
        assert np.array_equal(apply(softplus, ends), np.array([0, 0, 1e4, np.nan]), equal_nan=True)
    for sigmoid in (vectors.sigmoid, second_of_both):
        assert np.array_equal(apply(sigmoid, ends), np.array([0, 0, 1, np.nan]), equal_nan=True)


@numba.njit
def first_of_both(x):
    return vectors.softplus_and_slope(x)[0]


@numba.njit
def second_of_both(x):
    return vectors.softplus_and_slope(x)[1]


@pytest.mark.parametrize("dtype", DTYPES)
def test_parts_of_a_vector(dtype):
    """Nothing is read or written past the count, at any alignment."""

    @numba.njit
    def copy(x, out, at, count):
        write(out, at, count, read(x, at, count) + 1)
        return total(read(x, at, count))

    for at in (0, 1, 5):
        for count in (0, 1, 2, 7, 15, 16, 17, LANES - 1, LANES, LANES + 3):
            taken = min(count, LANES)
            x = np.full(3 * LANES, np.nan, dtype)
            x[at : at + taken] = np.arange(1, taken + 1)
            out = np.zeros(3 * LANES, dtype)
            assert copy(x, out, at, count) == taken * (taken + 1) / 2
            expected = np.zeros_like(out)
            expected[at : at + taken] = np.arange(2, taken + 2)
            assert np.array_equal(out, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums(dtype):
    @numba.njit
    def run(x, halves):
        store(halves, 0, sum_of_halves(load(x, 0)))
        return total(load(x, 0)), total(load_half(halves, 0)), total(zeros(x))

    x, halves = values(dtype)[:LANES], np.zeros(LANES // 2, dtype)
    whole, of_halves, nothing = run(x, halves)
    assert np.array_equal(halves, x[: LANES // 2] + x[LANES // 2 :])
    assert whole == of_halves
    assert nothing == 0
    assert abs(whole - x.astype(np.float64).sum()) <= LANES * np.finfo(dtype).eps * np.abs(x).sum()
    x[5] = np.nan
    assert np.isnan(run(x, halves)[0])


CACHED = """
import numpy as np
from caduceus.ops.cpu.scan_kernels import vectors_of_rows
vectors_of_rows(np.ones((3, 5)), 0, 5, np.zeros((1, 4, 32)))
print(*vectors_of_rows.stats.cache_hits.values())
"""


@pytest.mark.moderate
def test_compiled_code_is_kept_until_any_source_changes(tmp_path):
    """A kernel contains code of `vectors`, whose types are in its cache as well."""
    sources = tmp_path / "caduceus" / "ops" / "cpu"
    shutil.copytree(Path(vectors.__file__).parent, sources, ignore=shutil.ignore_patterns("__pycache__"))
    for package in (sources, sources.parent, sources.parent.parent):
        (package / "__init__.py").write_text("")  # the kernels alone

    def hits():
        environment = {**os.environ, "PYTHONPATH": str(tmp_path), "NUMBA_CACHE_DIR": str(tmp_path / "cache")}
        command = [sys.executable, "-c", CACHED]
        run = subprocess.run(command, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, check=True)
        return run.stdout.split()

    assert hits() == []
    assert hits() == [b"1"]
    with (sources / "vectors.py").open("a") as file:
        file.write("# changed\n")
    assert hits() == []
    assert hits() == [b"1"]
