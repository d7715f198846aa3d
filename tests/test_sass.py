"""The model behind benchmarks/sass.py, on a few machine instructions."""

import sys
from importlib.util import find_spec

import pytest

from tests.conftest import REPOSITORY

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed (Linux only)")


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(REPOSITORY / "benchmarks"), *sys.path])


def code(*lines: str):
    from tests.ops.aot import Instruction

    found = []
    for i, line in enumerate(lines):
        predicate, name, operands = line.split(" ", 2)
        found.append(Instruction(16 * i, name, f" {operands}", predicate.strip("_")))
    return found


LOAD, USE = "_ LDG.E R4, desc[UR4][R2.64]", "_ FADD R5, R4, R5"
ARITHMETIC = [f"_ FADD R{20 + i}, R{20 + i}, 1" for i in range(40)]


def cycles(lines, warps: int) -> float:
    from scheduler import simulate, steps

    return simulate(steps(code(*lines), lambda _: 600), warps).cycles


def test_a_load_is_waited_for_where_it_is_needed_and_hidden_by_other_warps():
    at_once = cycles([LOAD, USE, *ARITHMETIC], 1)
    assert 600 < at_once < 660
    assert 600 < cycles([LOAD, *ARITHMETIC, USE], 1) < at_once - 30
    assert at_once / 8.5 < cycles([LOAD, USE, *ARITHMETIC], 8) < at_once / 6


def test_a_pipe_bounds_what_warps_can_do():
    exps = [f"_ MUFU.EX2 R{20 + i}, R{20 + i}" for i in range(40)]
    assert 8 * 39 < cycles(exps, 8) < 8 * 42


def test_copies_to_shared_memory_are_waited_for_by_groups():
    copy, end = "_ LDGSTS.E R4, desc[UR4][R2.64]", "_ LDGDEPBAR "
    assert 600 < cycles([copy, end, "_ DEPBAR.LE SB0, 0x0", *ARITHMETIC], 1) < 660
    # With a group under way a turn takes half as long: it waits for the copies of the turn before.
    assert 300 < cycles([copy, end, "_ DEPBAR.LE SB0, 0x1", *ARITHMETIC], 1) < 360


def test_instructions_in_turn_wait_for_each_other():
    chained = ["_ FADD R5, R5, 1"] * 40
    assert 4 * 39 < cycles(chained, 1) < 4 * 42
    assert cycles(ARITHMETIC, 1) < 50


def test_addresses_are_followed_to_the_tensors_that_they_belong_to():
    from pointers import tensors

    lines = code(
        "_ ULDC.64 UR6, c[0x0][0x218]",
        "_ LDC.64 R2, c[0x0][0x210]",
        "_ IMAD.WIDE R8, R0, 0x4, R2",
        "@P0 BRA 0x60",
        "_ IADD3 R8, P1, R0, UR6, RZ",
        "_ LDG.E R1, desc[UR4][R8.64+0x20]",
        "_ LDG.E R1, desc[UR4][R8.64]",
        "_ STG.E desc[UR4][R2.64], R1",
        "_ LDG.E.64 R2, desc[UR4][UR6.64]",
        "@P2 BRA 0x60",
        "_ EXIT ",
    )
    found = tensors(lines, {"x_ptr": "*fp32", "y_ptr": "*fp32", "n": "i32"}, 90)
    # Where paths meet an address may be of either; what a load brought, which goes round the loop, is of none.
    assert found == {0x50: "y", 0x60: "x/y", 0x70: "x", 0x80: "y"}
