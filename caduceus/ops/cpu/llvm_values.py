"""Arithmetic of LLVM values as Python writes it, from which vectors.py makes the functions of compiled code."""

from llvmlite import ir

EXACT = {"contract", "nsz", "arcp"}
"""What compiled arithmetic may do to roundings."""
FLAGS = sorted(EXACT)


class Value:
    """An LLVM value, float or vector of floats, with the arithmetic of Python: what its use emits is LLVM's."""

    def __init__(self, builder: ir.IRBuilder, value: ir.Value) -> None:
        self.builder, self.value = builder, value

    @property
    def double(self) -> bool:
        return isinstance(getattr(self.value.type, "element", self.value.type), ir.DoubleType)

    def _made(self, value: ir.Value) -> "Value":
        return Value(self.builder, value)

    def number(self, number: float, kind: ir.Type | None = None) -> ir.Value:
        kind = kind or self.value.type
        vector = isinstance(kind, ir.VectorType)
        return ir.Constant(kind, [number] * kind.count if vector else number)

    def _operand(self, other) -> ir.Value:
        return other.value if isinstance(other, Value) else self.number(float(other))

    def __add__(self, other):
        return self._made(self.builder.fadd(self.value, self._operand(other), flags=FLAGS))

    def __sub__(self, other):
        return self._made(self.builder.fsub(self.value, self._operand(other), flags=FLAGS))

    def __mul__(self, other):
        return self._made(self.builder.fmul(self.value, self._operand(other), flags=FLAGS))

    def __truediv__(self, other):
        return self._made(self.builder.fdiv(self.value, self._operand(other), flags=FLAGS))

    def __rtruediv__(self, other):
        return self._made(self.number(float(other))) / self

    def at_least(self, floor: float) -> "Value":
        return self._select("<", self.number(float(floor)))

    def at_most(self, ceiling) -> "Value":
        return self._select(">", self._operand(ceiling))

    def _select(self, relation: str, bound: ir.Value) -> "Value":
        """The bound where self stands in the relation to it, and so not where self is NaN."""
        outside = self.builder.fcmp_ordered(relation, self.value, bound)
        return self._made(self.builder.select(outside, bound, self.value))

    def polynomial(self, coefficients: list[float]) -> "Value":
        """Horner's rule, highest power first."""
        total = self._made(self.number(coefficients[0]))
        for coefficient in coefficients[1:]:
            total = total * self + coefficient
        return total

    def times_power_of_two(self, shifted: "Value") -> "Value":
        """self · 2^k, with k the integer in the lowest bits of `shifted`, by addition to the exponent's bits."""
        integer, mantissa = (ir.IntType(64), 52) if self.double else (ir.IntType(32), 23)
        kind = self.value.type
        bits = ir.VectorType(integer, kind.count) if isinstance(kind, ir.VectorType) else integer
        power = self.builder.shl(self.builder.bitcast(shifted.value, bits), self.number(mantissa, bits))
        total = self.builder.add(self.builder.bitcast(self.value, bits), power)
        return self._made(self.builder.bitcast(total, kind))
