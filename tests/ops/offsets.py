"""Finds offsets that may pass 2^31 and are computed in 32 bits, in Triton's IR."""

import re

VALUE = re.compile(r"%[\w.$-]+(?:#\d+)?")
PLACE = re.compile(r" loc\((?:[^()]|\([^()]*\))*\)")
LOOP = re.compile(r"(?:(\S+) = )?scf\.for (?:unsigned )?(.*?)(?: iter_args\((.*?)\))?(?: ->| +:)")


def narrow_products(ttir: str) -> list[str]:
    """Lines of Triton's IR that multiply, or add to a pointer, a 32-bit value made from the program's number on axis 0
    or from the argument L.

    These count rows, chunks or tokens, the only things that grow without bound: their products with sizes and strides
    pass 2^31. All else (a channel, a state, a step within a chunk) is bounded where the kernel is launched, and
    so is its minimum with what is made from these, and a remainder of a constant. Values are followed through
    loops and branches, and through 64 bits back into 32.
    """
    unfollowed = re.search(r"scf\.while|\bcf\.|tt\.call", ttir)
    assert unfollowed is None, f"nothing is known of values that go through {unfollowed.group()}"
    lines = [PLACE.sub("", line).strip() for line in ttir.splitlines()]
    values = _Values()
    while True:  # what a loop yields may be what its first lines multiply
        known = len(values.narrow) + len(values.wide)
        found = values.follow(lines)
        if len(values.narrow) + len(values.wide) == known:
            return found


class _Values:
    """Integers made from the program's number or the length, as far as they are known."""

    def __init__(self) -> None:
        self.narrow: set[str] = {"%L"}
        self.wide: set[str] = set()
        self.constants: set[str] = set()

    def follow(self, lines: list[str]) -> list[str]:
        """Takes every line once; those that multiply or add to a pointer what is narrow."""
        found: list[str] = []
        yielded_to: list[list[list[str]]] = []  # of the regions that a line is in, per value that is yielded
        for line in lines:
            if line.startswith("}"):
                if not line.endswith("{"):  # of an `else`, which yields to the same
                    yielded_to.pop()
            elif line.startswith("scf.yield"):
                for value, targets in zip(VALUE.findall(line), yielded_to[-1], strict=True):
                    self._pass_on([value], targets)
            elif match := LOOP.match(line):
                yielded_to.append(self._enter_loop(*match.groups()))
            else:
                result, _, operation = line.partition(" = ") if line.startswith("%") else ("", "", line)
                if line.endswith("{"):
                    is_branch = operation.startswith("scf.if")
                    yielded_to.append([[r] for r in _results(result)] if is_branch else [])
                if result and self._is_narrow_offset(result, operation):
                    found.append(line)
        return found

    def _enter_loop(self, results: str | None, bounds: str, carried: str | None) -> list[list[str]]:
        counter, *limits = VALUE.findall(bounds)
        self._pass_on(limits, [counter])
        names = VALUE.findall(carried or "")
        targets = [list(pair) for pair in zip(names[::2], _results(results) if results else [], strict=True)]
        for first, both in zip(names[1::2], targets, strict=True):
            self._pass_on([first], both)
        return targets

    def _is_narrow_offset(self, result: str, operation: str) -> bool:
        """Whether the operation makes one; otherwise its result is known as what its operands are."""
        name, operands = operation.split(maxsplit=1)[0], VALUE.findall(operation)
        if operation.startswith("tt.get_program_id x"):
            self.narrow.add(result)
        elif name == "arith.constant":
            self.constants.add(result)
        elif name in ("arith.muli", "arith.shli", "tt.addptr") and not self.narrow.isdisjoint(operands):
            return True
        elif name not in ("arith.cmpi", "tt.addptr", "tt.load") and not self._is_bounded(name, operands):
            self._pass_on(operands, _results(result), name)
        return False

    def _is_bounded(self, name: str, operands: list[str]) -> bool:
        if name in ("arith.minsi", "arith.minui"):
            return not self.narrow.union(self.wide).issuperset(operands)
        return name in ("arith.remsi", "arith.remui") and operands[1] in self.constants

    def _pass_on(self, operands: list[str], results: list[str], name: str = "") -> None:
        is_narrow, is_wide = (not values.isdisjoint(operands) for values in (self.narrow, self.wide))
        if name in ("arith.extsi", "arith.extui"):
            is_narrow, is_wide = False, is_narrow or is_wide
        elif name == "arith.trunci":
            is_narrow, is_wide = is_narrow or is_wide, False
        if is_narrow:
            self.narrow.update(results)
        if is_wide:
            self.wide.update(results)


def _results(text: str) -> list[str]:
    """`%a` by itself, `%a:2` as %a#0 and %a#1, as lines that use them say."""
    name, _, count = text.partition(":")
    return [f"{name}#{i}" for i in range(int(count))] if count else [name]
