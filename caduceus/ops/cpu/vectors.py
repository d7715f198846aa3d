"""A numba type for SIMD: `LANES` numbers of float32 or float64 side by side, which LLVM holds in as many registers as
the machine needs. Kernels say with it what stays in registers, which a loop over arrays leaves to chance.

Compiled code has +, -, * and / of vectors (a scalar operand takes the vector's type and stands for all lanes), and the
functions of this module. `exp2`, `softplus` and `sigmoid` take scalars, too, as arithmetic that LLVM can vectorise.
A product and a sum may be contracted to one rounding, and x / y to x times 1 / y; nothing else is reordered.
"""

import math
import operator
from collections.abc import Callable

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, lower_builtin, models, register_model, type_callable

from caduceus.ops.cpu.llvm_values import FLAGS, Value

LANES = 32
"""Lanes of every vector: two registers of AVX-512, whose latencies hide each other."""


class Vector(types.Type):
    """`lanes` numbers of type `dtype` (float32 or float64)."""

    def __init__(self, dtype: types.Float, lanes: int = LANES) -> None:
        self.dtype, self.lanes = dtype, lanes
        super().__init__(f"Vector({dtype}, {lanes})")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager, kind: Vector) -> None:
        super().__init__(manager, kind, ir.VectorType(manager.lookup(kind.dtype).get_value_type(), kind.lanes))


def _exp2(x: Value) -> Value:
    if x.double:
        exponent, shift = 1023, 1.5 * 2.0**52
        coefficients = [math.log(2) ** k / math.factorial(k) for k in range(13, -1, -1)]
    else:
        exponent, shift = 127, 1.5 * 2.0**23
        # minimax on [-1/2, 1/2] with p(0) = 1, so that decays near 1 are exact
        coefficients = [0.0013264727, 0.009671513, 0.055507336, 0.24022243, 0.693147, 1]
    x = x.at_least(-exponent)
    shifted = x + shift  # rounds to an integer, which is left in the lowest bits
    return (x - (shifted - shift)).polynomial(coefficients).times_power_of_two(shifted)


def _decay_of_softplus(x: Value) -> Value:
    """e^-|x|"""
    return _exp2((x * math.log2(math.e)).at_most(x * -math.log2(math.e)))


def _log1p_from(x: Value, s: Value) -> Value:
    """max(x, 0) + log(1 + e^-|x|), given s = e / (2 + e): log(1 + e) = 2 artanh(s), s <= 1/3."""
    terms = 17 if x.double else 7
    return x.at_least(0) + s * (s * s).polynomial([2 / (2 * k + 1) for k in range(terms - 1, -1, -1)])


def _softplus(x: Value) -> Value:
    e = _decay_of_softplus(x)
    return _log1p_from(x, e / (e + 2))


def _sigmoid(x: Value) -> Value:
    y = x * -math.log2(math.e)
    return 1 / (_exp2(y.at_most(1024 if x.double else 128)) + 1)


def _function(emit: Callable[[Value], Value], what: str):
    """A function of one scalar or vector for compiled code, of the same type."""

    def function(typing_context, x):
        if isinstance(x, Vector) or x in (types.float32, types.float64):

            def generate(context, builder, signature, arguments):
                return emit(Value(builder, arguments[0])).value

            return x(x), generate

    function.__doc__ = what
    function.__name__ = emit.__name__.lstrip("_")
    return intrinsic(function)


exp2 = _function(
    _exp2,
    """2^x for x <= 128 (float64: 1024), where it is infinite, to 2e-7 (1e-15) relative; exactly 1 at 0 and exactly 0
    from -127 (-1023) down; NaN stays NaN.""",
)
softplus = _function(_softplus, "log(1 + e^x); exactly 0 for x < -88 (float64: -710).")
sigmoid = _function(_sigmoid, "1 / (1 + e^-x); exactly 0 for x < -89 (float64: -710).")


@intrinsic
def softplus_and_slope(typing_context, x):
    """softplus and its derivative, the sigmoid, for the price of one."""

    def generate(context, builder, signature, arguments):
        x = Value(builder, arguments[0])
        e = _decay_of_softplus(x)
        share = 1 / ((e + 1) * (e + 2))
        softplus = _log1p_from(x, e * (e + 1) * share)
        negative = builder.fcmp_ordered("<", x.value, x.number(0))
        slope = Value(builder, builder.select(negative, e.value, x.number(1))) * (e + 2) * share
        return context.make_tuple(builder, signature.return_type, (softplus.value, slope.value))

    return types.UniTuple(x, 2)(x), generate


def _define(function: Callable, method: Callable[[Value, Value], Value]) -> None:
    """Have an operator take two vectors, or a vector and a scalar that takes the vector's type."""

    @type_callable(function)
    def type_of_result(context):
        def result(a, b):
            vectors = [t for t in (a, b) if isinstance(t, Vector)]
            if vectors and all(t == vectors[0] or isinstance(t, types.Number) for t in (a, b)):
                return vectors[0]

        return result

    def generate(context, builder, signature, arguments):
        kind = signature.return_type
        return method(
            *(
                Value(builder, v if isinstance(t, Vector) else _spread(context, builder, t, kind, v))
                for t, v in zip(signature.args, arguments, strict=True)
            )
        ).value

    for operands in ((Vector, Vector), (Vector, types.Number), (types.Number, Vector)):
        lower_builtin(function, *operands)(generate)


for _name in ("add", "sub", "mul", "truediv"):
    for _operator in (getattr(operator, _name), getattr(operator, f"i{_name}")):
        _define(_operator, getattr(operator, _name))


def _spread(context, builder, scalar_type, kind: Vector, scalar: ir.Value) -> ir.Value:
    scalar = context.cast(builder, scalar, scalar_type, kind.dtype)
    vector = context.get_value_type(kind)
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), scalar, ir.Constant(ir.IntType(32), 0))
    lanes = ir.Constant(ir.VectorType(ir.IntType(32), kind.lanes), [0] * kind.lanes)
    return builder.shuffle_vector(first, ir.Constant(vector, ir.Undefined), lanes)


def _address(context, builder, array_type, array, index, kind: Vector) -> ir.Value:
    flat = context.make_array(array_type)(context, builder, array)
    return builder.bitcast(builder.gep(flat.data, [index]), context.get_value_type(kind).as_pointer())


def _alignment(kind: Vector) -> int:
    return kind.dtype.bitwidth // 8


def _loader(lanes: int):
    @intrinsic
    def load(typing_context, array, index):
        """The vector that begins at an index of a flat array, which is not checked."""
        kind = Vector(array.dtype, lanes)

        def generate(context, builder, signature, arguments):
            address = _address(context, builder, signature.args[0], *arguments, kind)
            return builder.load(address, align=_alignment(kind))

        return kind(array, types.intp), generate

    return load


load, load_half = _loader(LANES), _loader(LANES // 2)


@intrinsic
def store(typing_context, array, index, vector):
    """Write a vector at an index of a flat array, which is not checked."""

    def generate(context, builder, signature, arguments):
        address = _address(context, builder, signature.args[0], *arguments[:2], vector)
        builder.store(arguments[2], address, align=_alignment(vector))
        return context.get_dummy_value()

    return types.void(array, types.intp, vector), generate


@intrinsic
def zeros(typing_context, array):
    """A vector of zeros of an array's type."""
    kind = Vector(array.dtype)

    def generate(context, builder, signature, arguments):
        return ir.Constant(context.get_value_type(kind), None)

    return kind(array), generate


@intrinsic
def read(typing_context, array, index, count):
    """The first `count` lanes from an index of a flat array, and zeros; all from LANES on. Nothing is checked."""
    kind = Vector(array.dtype)

    def generate(context, builder, signature, arguments):
        array, index, count = arguments
        address = _address(context, builder, signature.args[0], array, index, kind)
        vector = context.get_value_type(kind)
        result = cgutils.alloca_once(builder, vector)
        with builder.if_else(_fills(builder, count, kind)) as (whole, part):
            with whole:
                builder.store(builder.load(address, align=_alignment(kind)), result)
            with part:
                builder.store(ir.Constant(vector, None), result)
                first = builder.bitcast(address, vector.element.as_pointer())
                with cgutils.for_range(builder, count) as loop:
                    scalar, lane = builder.load(builder.gep(first, [loop.index])), _lane(builder, loop.index)
                    builder.store(builder.insert_element(builder.load(result), scalar, lane), result)
        return builder.load(result)

    return kind(array, types.intp, types.intp), generate


@intrinsic
def write(typing_context, array, index, count, vector):
    """Write the first `count` lanes at an index of a flat array; all from LANES on. Nothing is checked."""

    def generate(context, builder, signature, arguments):
        array, index, count, value = arguments
        address = _address(context, builder, signature.args[0], array, index, vector)
        with builder.if_else(_fills(builder, count, vector)) as (whole, part):
            with whole:
                builder.store(value, address, align=_alignment(vector))
            with part:
                first = builder.bitcast(address, value.type.element.as_pointer())
                with cgutils.for_range(builder, count) as loop:
                    scalar = builder.extract_element(value, _lane(builder, loop.index))
                    builder.store(scalar, builder.gep(first, [loop.index]))
        return context.get_dummy_value()

    return types.void(array, types.intp, types.intp, vector), generate


def _fills(builder, count: ir.Value, kind: Vector) -> ir.Value:
    return builder.icmp_signed(">=", count, ir.Constant(count.type, kind.lanes))


def _lane(builder, index: ir.Value) -> ir.Value:
    return builder.trunc(index, ir.IntType(32))


def _sum_of_halves(builder, vector: ir.Value) -> ir.Value:
    half = vector.type.count // 2
    nothing = ir.Constant(vector.type, ir.Undefined)
    low, high = (
        builder.shuffle_vector(
            vector, nothing, ir.Constant(ir.VectorType(ir.IntType(32), half), list(range(start, start + half)))
        )
        for start in (0, half)
    )
    return builder.fadd(low, high, flags=FLAGS)


@intrinsic
def sum_of_halves(typing_context, vector):
    """Half as many lanes, each the sum of two."""

    def generate(context, builder, signature, arguments):
        return _sum_of_halves(builder, arguments[0])

    return Vector(vector.dtype, vector.lanes // 2)(vector), generate


@intrinsic
def total(typing_context, vector):
    """Sum of the lanes, in one order on every machine."""

    def generate(context, builder, signature, arguments):
        value = arguments[0]
        while value.type.count > 1:
            value = _sum_of_halves(builder, value)
        return builder.extract_element(value, ir.Constant(ir.IntType(32), 0))

    return vector.dtype(vector), generate


@intrinsic
def prefetch(typing_context, array, index):
    """Ask for the cache line of an element of a flat array, which need not exist."""

    def generate(context, builder, signature, arguments):
        flat = context.make_array(signature.args[0])(context, builder, arguments[0])
        pointer = builder.bitcast(builder.gep(flat.data, [arguments[1]]), ir.IntType(8).as_pointer())
        i32 = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, i32, i32, i32])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
        builder.call(function, [pointer, i32(0), i32(2), i32(1)])
        return context.get_dummy_value()

    return types.void(array, types.intp), generate
