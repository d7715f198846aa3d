"""A model of one of a multiprocessor's instruction schedulers over loops of machine code: what latency costs.

In each cycle it issues the next instruction of one resident warp whose registers have arrived and whose pipe is free. A
warp issues in order, and goes on past a load until something needs what it loads. Arithmetic has its fixed latency; a
load has the latency of the level of memory that holds its tensor. CYCLES are assumed, the same for all cards. The model
does NOT have: queues before DRAM and L2, misses where a hit is assumed, bank conflicts and the instruction cache. It
can compare kernels; its times may be wrong by 30 %.
"""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tests.ops.aot import Instruction

CYCLES = {"L1": 38, "L2": 280, "DRAM": 700}
"""Cycles of a load, by the level where it finds what it asks for."""
WAVEFRONT = 4
"""Cycles of a scheduler for a wavefront (128 bytes) of the load and store unit, which four schedulers share."""
SHARED = {"LDS": 30, "LDSM": 33}
_OTHER = ("alu", 2, 5)
_PIPES = {
    **dict.fromkeys(("FMUL", "FFMA", "FADD", "HFMA2", "HADD2"), ("fma", 1, 4)),
    "IMAD": ("fma", 2, 5),
    "MUFU": ("mufu", 8, 24),
    "HMMA": ("mma", 8, 18),
    "BAR": ("bar", 1, 25),
    "BRA": ("branch", 1, 10),
    "LDC": ("constants", 2, 30),
    "ULDC": ("constants", 2, 30),
    "SHFL": ("lsu", 4, 24),
}
"""Pipe, cycles that an instruction of a warp occupies it, and cycles until its result can be used."""
COPIED, GROUP = "copied", "group"
"""What stands for registers where global memory is copied to shared memory: until when, and the end of a group."""
_WITHOUT_REGISTERS = ("BRA", "BAR", "EXIT", "NOP", "WARPSYNC", "BSSY", "BSYNC", "DEPBAR", "LDGDEPBAR")
_REGISTER = re.compile(r"\b(U?R)(\d+)(\.64)?")


@dataclass(frozen=True)
class Step:
    """An instruction as the scheduler sees it."""

    pipe: str
    busy: int
    latency: int
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    stops: bool
    """The warp, until it is done: barriers and branches."""
    leaves: int | None = None
    """How many groups of copies to shared memory may be under way after it; the warp waits for those before."""


def steps(code: Sequence[Instruction], latency_of: Callable[[Instruction], int]) -> list[Step]:
    """`latency_of` says how long a load from global memory takes, in cycles."""
    return [_step(instruction, latency_of) for instruction in code]


def _step(instruction: Instruction, latency_of: Callable[[Instruction], int]) -> Step:
    operation = operation_of(instruction)
    pipe, busy, latency = _PIPES.get(operation, _OTHER)
    if operation in ("LDG", "STG", "LDGSTS", "RED", "ATOMG"):
        pipe, busy = "lsu", WAVEFRONT * wavefronts(instruction)
        latency = latency_of(instruction) if operation in ("LDG", "LDGSTS") else 1
    elif operation in ("LDS", "LDSM", "STS", "STSM"):
        pipe, busy, latency = "lsu", WAVEFRONT * wavefronts(instruction), SHARED.get(operation, 1)
    reads, writes = registers(instruction)
    waits = re.search(r"\bSB0, 0x([0-9a-f]+)", instruction.operands) if operation == "DEPBAR" else None
    writes = {"LDGSTS": (COPIED,), "LDGDEPBAR": (GROUP,)}.get(operation, writes)
    stops = operation in ("BAR", "BRA")
    return Step(pipe, busy, latency, reads, writes, stops, int(waits[1], 16) if waits else None)


def operation_of(instruction: Instruction) -> str:
    return instruction.name.split(".")[0]


def wavefronts(instruction: Instruction) -> int:
    """Wavefronts of 128 bytes for a warp of 32 threads: one where 64 bits, the same for all, are loaded from memory."""
    operation, name = operation_of(instruction), instruction.name
    if operation in ("LDG", "LDGSTS"):
        return 4 if ".128" in name and operation == "LDGSTS" else 1
    return 4 if ".128" in name or "M88.4" in name else 2 if ".64" in name else 1


def registers(instruction: Instruction) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Those that an instruction reads and writes, numbers that take several registers with all of them."""
    operation, name = operation_of(instruction), instruction.name
    operands = [text.strip() for text in instruction.operands.split(",")] if instruction.operands.strip() else []
    if operation in _WITHOUT_REGISTERS or not operands:
        return (), ()
    wide = 4 if ".128" in name else 2 if ".64" in name else 1
    if operation in ("STG", "STS", "STSM", "ST"):
        wide = 4 if "M88.4" in name else wide
        return (*_named(operands[:-1], 1), *_named(operands[-1:], wide)), ()
    if operation in ("LDGSTS", "RED"):
        return _named(operands, 1), ()
    if operation == "HMMA":
        reads = tuple(r for text, width in zip(operands[1:], (4, 2, 4), strict=False) for r in _named([text], width))
        return reads, _named(operands[:1], 4)
    if "WIDE" in name:
        return (*_named(operands[1:3], 1), *_named(operands[3:], 2)), _named(operands[:1], 2)
    return _named(operands[1:], 1), _named(operands[:1], wide)


def _named(operands: Sequence[str], width: int) -> tuple[str, ...]:
    found = []
    for text in operands:
        for kind, number, pair in _REGISTER.findall(text):
            found += [f"{kind}{int(number) + i}" for i in range(2 if pair else width)]
    return tuple(found)


@dataclass(frozen=True)
class Issued:
    cycles: float
    """Cycles in which a scheduler takes one warp through the code once; its share where several warps are resident."""
    utilisation: float
    """Cycles in which an instruction was issued."""


def simulate(code: Sequence[Step], warps: int, turns: int = 14, warm_up: int = 3) -> Issued:
    """`warps` resident warps go through `code` again and again from different beginnings, the last first."""
    chance = random.Random(0)
    ready: list[dict[str, int]] = [{} for _ in range(warps)]
    groups: list[list[int]] = [[] for _ in range(warps)]
    at, turn = [0] * warps, [0] * warps
    wakes = [chance.randrange(400 + len(code)) for _ in range(warps)]
    free: dict[str, int] = {}
    order = list(range(warps))
    time = issued = began = before = 0
    while min(turn) < turns:
        soonest, chosen = None, None
        for warp in order:
            step = code[at[warp]]
            known = ready[warp]
            need = max(wakes[warp], free.get(step.pipe, 0))
            for register in (*step.reads, *step.writes):
                if register not in (COPIED, GROUP):
                    need = max(need, known.get(register, 0))
            if step.leaves is not None:
                need = max(need, *groups[warp][: len(groups[warp]) - step.leaves], 0)
            if need <= time:
                chosen = warp
                break
            soonest = need if soonest is None else min(soonest, need)
        if chosen is None:
            time = soonest
            continue
        step = code[at[chosen]]
        free[step.pipe] = time + step.busy
        for register in step.writes:
            if register == COPIED:
                ready[chosen][COPIED] = max(ready[chosen].get(COPIED, 0), time + step.latency)
            elif register == GROUP:
                groups[chosen] = [*groups[chosen][-7:], ready[chosen].pop(COPIED, 0)]
            else:
                ready[chosen][register] = time + step.latency
        if step.stops:
            wakes[chosen] = time + step.latency
        issued += 1
        at[chosen] += 1
        if at[chosen] == len(code):
            at[chosen] = 0
            turn[chosen] += 1
            if began == 0 and min(turn) == warm_up:
                began, before = time, issued
        order.remove(chosen)
        order.insert(0 if chance.random() < 0.7 else len(order), chosen)
        time += 1
    share = (issued - before) / (time - began)
    return Issued(len(code) / share, share)
