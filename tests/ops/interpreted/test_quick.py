"""What quickens the interpreter gives the bits, and the types, that Triton's own interpreter gives."""

import itertools

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from packaging.version import Version

from tests.interpreter import INTERPRETING

pytestmark = pytest.mark.skipif(not INTERPRETING, reason="a GPU interprets nothing")

SHAPES = (None, (16,), (16, 1), (1, 16), (4, 16))
NUMBERS = (0, 2, -3, 2**31 - 1, 2**40, 1.5, 1e-40, True, tl.constexpr(3), tl.constexpr(0.25))
if Version(triton.__version__) >= Version("3.9"):  # older ones take them for 0 and infinity; no kernel has them
    NUMBERS += (-0.0, 1e300)


def make(dtype: tl.dtype, shape: tuple[int, ...] | None, seed: int = 0):
    """Numbers of both signs and all magnitudes that are usual, and some that are not."""
    from triton.runtime.interpreter import TensorHandle, interpreter_builder

    rng = np.random.default_rng(seed)
    size = shape or (1,)
    if dtype.is_floating():
        numbers = (rng.normal(size=size) * 10.0 ** rng.integers(-3, 4, size)).astype(np.float32)
        numbers.flat[: numbers.size // 8] = np.array([np.inf, -np.inf, np.nan, 0.0] * 2)[: numbers.size // 8]
        handle = TensorHandle(numbers, tl.float32)
        handle = handle if dtype is tl.float32 else interpreter_builder.cast_impl(handle, dtype)
    else:
        numbers = rng.integers(-100, 100, size)
        of_numpy = {"int32": np.int32, "int64": np.int64, "int1": np.bool_}.get(dtype.name, np.uint64)
        handle = TensorHandle((numbers % 2 if dtype is tl.int1 else numbers).astype(of_numpy), dtype)
    return tl.tensor(handle, dtype if shape is None else tl.block_type(dtype, list(shape)))


def outcome(operation, *operands):
    """Type and bits of the result, or that there is none."""
    try:
        result = operation(*operands)
    except Exception as error:  # Triton raises many kinds
        return type(error)
    if result is NotImplemented:
        return result
    data = np.broadcast_to(result.handle.data, tuple(map(int, result.type.shape)) if result.type.is_block() else (1,))
    return str(result.type), str(result.dtype), data.dtype, data.tobytes()


def require_equal(operation, *operands) -> None:
    with np.errstate(all="ignore"):
        assert outcome(operation, *operands) == outcome(operation.own, *operands), operands


def test_operators():
    """Each sees a third of all pairs, and each pair is seen by a third of them, which share their code."""
    from tests.ops.interpreted.quick import OPERATORS

    dtypes = (
        tl.float32,
        tl.int32,
        tl.int64,
        tl.int1,
        tl.bfloat16,
        tl.pointer_type(tl.float32),
        tl.pointer_type(tl.int64),
    )
    operands = [make(dtype, shape) for dtype in dtypes for shape in SHAPES]
    others = [make(dtype, shape, 1) for dtype in dtypes for shape in SHAPES]
    pairs = list(itertools.product(operands, (*others, *NUMBERS)))
    for place, name in enumerate((*OPERATORS, "__and__")):
        operation = getattr(tl.tensor, name)
        for x, y in pairs[place % 3 :: 3]:
            require_equal(operation, x, y)


def test_casts():
    from tests.ops.interpreted.quick import BITCASTS, CASTS

    dtypes = (tl.float32, tl.float16, tl.bfloat16, tl.int32, tl.int64, tl.int1)
    assert {dtype.name for dtype in dtypes} > {name for pair in CASTS | BITCASTS for name in pair}
    for before, after, shape in itertools.product(dtypes, dtypes, SHAPES[:3]):
        require_equal(tl.tensor.to, make(before, shape), after)
        require_equal(tl.tensor.to, make(before, shape), after, None, True)
        require_equal(tl.tensor.to, make(before, shape), after, "rtz")


def test_choices():
    conditions = [make(dtype, shape) for dtype in (tl.int1, tl.int32) for shape in SHAPES]
    values = [make(dtype, shape, 1) for dtype in (tl.float32, tl.int64, tl.bfloat16) for shape in SHAPES[:3]]
    for condition, x, y in itertools.product(conditions, (*values, 0.5, 2), (*values, -1.0, 7)):
        require_equal(tl.where, condition, x, y)
    for dtype in (tl.float32, tl.int32):
        require_equal(tl.exp2, make(dtype, (16,)))


def test_a_number_as_bf16_keeps_its_upper_half():
    """As Triton's own, which takes numbers apart: of all exponents, with both signs."""
    from triton.runtime.interpreter import TensorHandle, interpreter_builder

    from tests.ops.interpreted.quick import own_cast_impl

    bits = np.arange(0x00800000, 2**32, 77_777, dtype=np.uint32)
    numbers = bits.view(np.float32)
    normal = TensorHandle(numbers[(np.abs(numbers) >= 2.0**-126) & np.isfinite(numbers)], tl.float32)
    halves = interpreter_builder.cast_impl(normal, tl.bfloat16)
    assert np.array_equal(halves.data, own_cast_impl(interpreter_builder, normal, tl.bfloat16).data)
    again = interpreter_builder.cast_impl(halves, tl.float32).data
    assert np.array_equal(again, own_cast_impl(interpreter_builder, halves, tl.float32).data)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_loads_and_stores(dtype):
    x = torch.arange(64).to(dtype)
    element = tl.str_to_ty({torch.float32: "fp32", torch.bfloat16: "bf16", torch.int64: "i64"}.get(dtype, "i1"), None)
    for shape, masked in itertools.product(SHAPES, (False, True)):
        at = make(tl.pointer_type(element), shape)
        at.handle.data = (x.data_ptr() + np.arange(at.handle.data.size) * x.itemsize).astype(np.uint64)
        at.handle.data = at.handle.data.reshape(shape or (1,))
        mask = make(tl.int1, shape) if masked else None
        for other in (None, 0, 0.0, 1, make(element, shape)):
            require_equal(tl.load, at, mask, other)
        for value in (make(element, shape, 2), make(tl.float32, shape, 2), make(element, None, 2), 1):
            stored = []
            for store in (tl.store, tl.store.own):
                x.copy_(torch.arange(64))
                try:
                    store(at, value, mask)
                except Exception as error:
                    stored.append(type(error))
                else:
                    stored.append(str(x.tolist()))
            assert stored[0] == stored[1], (shape, value)
