"""Which tensor an instruction of a compiled Triton kernel reads or writes: follows arguments through registers."""

import re
from collections.abc import Sequence

from scheduler import operation_of, registers

from tests.ops.aot import Instruction

FIRST_PARAMETER = {80: 0x160, 90: 0x210}
"""Where a kernel's arguments begin among its constants, by compute capability."""
_CONSTANT = re.compile(r"c\[0x0\]\[0x([0-9a-f]+)\]")
_ADDRESS = re.compile(r"\[(U?R\d+)[.\w]*(?:\+(UR\d+))?")
MEMORY = ("LDG", "STG", "LDGSTS", "RED", "ATOMG")
_Known = dict[str, frozenset[str]]


def tensors(code: Sequence[Instruction], signature: dict[str, str], capability: int) -> dict[int, str]:
    """By an instruction's address the argument, without `_ptr`, that its own address is made of; "?" where unclear."""
    arguments = _pointers(signature, FIRST_PARAMETER[capability])
    index = {instruction.address: i for i, instruction in enumerate(code)}
    incoming: list[_Known | None] = [None] * len(code)
    incoming[0] = {}
    waiting, found = [0], {}
    while waiting:
        i = waiting.pop()
        while i < len(code):
            known, instruction = dict(incoming[i] or {}), code[i]
            if operation_of(instruction) in MEMORY:
                found[instruction.address] = _addressed(instruction, known)
            _follow(instruction, known, arguments)
            jumps = operation_of(instruction) == "BRA" and "0x" in instruction.operands
            if jumps:
                target = index.get(int(instruction.operands.rpartition("0x")[2].strip(), 16))
                if target is not None and _merge(incoming, target, known):
                    waiting.append(target)
            if operation_of(instruction) in ("BRA", "EXIT", "RET") and not instruction.predicate:
                break
            if i + 1 == len(code) or not _merge(incoming, i + 1, known):
                break
            i += 1
    return found


def _pointers(signature: dict[str, str], offset: int) -> dict[int, str]:
    """Offset among the constants -> argument, of those that are tensors."""
    found = {}
    for name, kind in signature.items():
        if kind == "constexpr":
            continue
        size = 8 if kind.startswith("*") or kind.endswith("64") else 4
        offset = -(-offset // size) * size
        if kind.startswith("*"):
            found[offset] = name.removesuffix("_ptr")
        offset += size
    return found


def _follow(instruction: Instruction, known: _Known, arguments: dict[int, str]) -> None:
    reads, writes = registers(instruction)
    if not writes:
        return
    made: frozenset[str] = frozenset()
    if operation_of(instruction) not in MEMORY:
        names = {arguments[int(at, 16)] for at in _CONSTANT.findall(instruction.operands) if int(at, 16) in arguments}
        made = frozenset(names).union(*(known.get(register, frozenset()) for register in reads))
    if instruction.predicate:
        made |= known.get(writes[0], frozenset())
    for register in writes:
        known[register] = made
    if not made:
        for register in writes:
            known.pop(register, None)


def _addressed(instruction: Instruction, known: _Known) -> str:
    text = (
        instruction.operands[instruction.operands.rfind("][") + 1 :]
        if "desc[" in instruction.operands
        else instruction.operands
    )
    made: frozenset[str] = frozenset().union(
        *(known.get(register, frozenset()) for pair in _ADDRESS.findall(text) for register in pair if register)
    )
    return next(iter(made)) if len(made) == 1 else "?" if not made else "/".join(sorted(made))


def _merge(incoming: list[_Known | None], at: int, known: _Known) -> bool:
    """Whether anything is new of what may be known at a place."""
    before = incoming[at]
    if before is None:
        incoming[at] = known
        return True
    merged = {register: before.get(register, frozenset()) | made for register, made in known.items()}
    new = any(made != before.get(register, frozenset()) for register, made in merged.items())
    before.update(merged)
    return new
