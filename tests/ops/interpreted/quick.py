"""Triton's interpreter with shorter ways to the same bits.

A kernel's arithmetic takes some microseconds of numpy, and some hundreds of the rules by which Triton finds the types
and shapes of results. Where types and shapes are the everyday ones, the rules are known beforehand; all else goes
Triton's own way. tests/ops/interpreted/test_quick.py compares the two.
"""

import dataclasses
import inspect
from collections.abc import Callable

import numpy as np
import triton.language as tl
from triton.language.core import constexpr
from triton.runtime import interpreter
from triton.runtime.interpreter import TensorHandle

tensor = tl.core.tensor
_own_init = tensor.__init__
own_cast_impl = interpreter.InterpreterBuilder.cast_impl
_builder, _semantic = interpreter.interpreter_builder, interpreter.interpreter_semantic
_CACHING = (None,) * (len(inspect.signature(_builder.create_store).parameters) - 2)
"""What a load or store says of caches: one argument, or before Triton 3.8 or so two."""
_FLOATS, _INTEGERS = (tl.float32,), (tl.int32, tl.int64)
_NUMPY = {"fp32": np.float32, "int32": np.int32, "int64": np.int64, "int1": np.bool_}
CASTS = {("int64", "int32"), ("int32", "int64"), ("int32", "fp32"), ("bf16", "fp32"), ("fp32", "bf16")}
CASTS |= {("fp16", "fp32"), ("fp32", "fp16")}
BITCASTS = {("int32", "fp32"), ("fp32", "int32")}
_ARITHMETIC = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "truediv": np.divide}
_COMPARISONS = {
    "__lt__": np.less,
    "__le__": np.less_equal,
    "__gt__": np.greater,
    "__ge__": np.greater_equal,
    "__eq__": np.equal,
    "__ne__": np.not_equal,
}
OPERATORS = {
    **{f"__{name}__": ufunc for name, ufunc in _ARITHMETIC.items()},
    **{f"__r{name}__": ufunc for name, ufunc in _ARITHMETIC.items()},
    **_COMPARISONS,
    "__rshift__": np.right_shift,
}


def quicken() -> None:
    _patch_modules_once()
    # Integer overflow is computed at every step, but asserted only in Triton's debug mode.
    _builder.options = dataclasses.replace(_builder.options, sanitize_overflow=False)
    interpreter._get_np_dtype = _remembered(interpreter._get_np_dtype)
    interpreter.InterpreterBuilder.cast_impl = _cast_impl
    tensor.__init__ = _init
    for name, ufunc in OPERATORS.items():
        _replace(tensor, name, _binary(ufunc, reflected=name.startswith("__r") and ufunc is not np.right_shift))
    _replace(tensor, "__and__", _and)
    _replace(tensor, "to", _to)
    _replace(tl, "load", _load)
    _replace(tl, "store", _store)
    _replace(tl, "where", _where)
    _replace(tl, "exp2", _unary(np.exp2))


def _patch_modules_once() -> None:
    """Triton patches triton.language for every call of a device function; once for each module is enough."""
    patch, patched = interpreter._patch_lang, set()

    def patch_once(fn):
        if id(fn.__globals__) not in patched:
            patched.add(id(fn.__globals__))
            patch(fn)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = patch_once


def _remembered(find: Callable[[tl.dtype], np.dtype]) -> Callable[[tl.dtype], np.dtype]:
    def find_once(dtype: tl.dtype) -> np.dtype:
        if "of_numpy" not in dtype.__dict__:
            dtype.of_numpy = find(dtype)
        return dtype.of_numpy

    return find_once


def _replace(owner, name: str, quick: Callable[[Callable], Callable]) -> None:
    """`quick` gets Triton's own function and gives the one that takes its place."""
    builtin = getattr(owner, name)

    def own(*args, **kwargs):
        return builtin(*args, **kwargs, _semantic=_semantic)

    replacement = quick(own)
    replacement.own = own
    setattr(owner, name, replacement)


def _init(self, handle: TensorHandle, type: tl.dtype) -> None:
    """As Triton's, with what follows from the type found once for each type object."""
    told = type.__dict__.get("told")
    if told is None:
        _own_init(self, handle, type)
        told = type.told = self.__dict__ | {"sizes": tuple(map(int, type.shape)) if type.is_block() else None}
    self.__dict__.update(told)
    self.handle = handle


def _make(data: np.ndarray, like: tensor) -> tensor:
    """A tensor of another's type."""
    made, handle = object.__new__(tensor), object.__new__(TensorHandle)
    made.__dict__.update(like.type.told)
    handle.data, handle.dtype, handle.attr = data, like.handle.dtype, {}
    made.handle = handle
    return made


def _made(data: np.ndarray, dtype: tl.dtype, sizes: tuple[int, ...] | None) -> tensor:
    """A tensor of a scalar type and a shape, None for a scalar."""
    types = dtype.__dict__.setdefault("of_sizes", {})
    if sizes not in types:
        types[sizes] = dtype if sizes is None else tl.block_type(dtype, list(sizes))
    return tensor(TensorHandle(data, dtype), types[sizes])


def _binary(ufunc: np.ufunc, reflected: bool) -> Callable[[Callable], Callable]:
    compares = ufunc in _COMPARISONS.values()
    dtypes = {np.divide: _FLOATS, np.right_shift: _INTEGERS}.get(ufunc, _FLOATS + _INTEGERS)

    def quick(own):
        def operate(self, given):
            other = given.value if given.__class__ is constexpr else given
            dtype, kind = self.dtype, other.__class__
            if kind is tensor:
                a, b = self.sizes, other.sizes
                if a == b or b is None:
                    like = self
                elif a is None:
                    like = other
                else:
                    return own(self, given)
                if reflected:  # of two tensors Python asks the first
                    return own(self, given)
                if dtype is other.dtype and dtype in dtypes:
                    data = ufunc(self.handle.data, other.handle.data)
                    return _made(data, tl.int1, like.sizes) if compares else _make(data, like)
                if ufunc is np.add:
                    if dtype.is_ptr() and other.dtype in _INTEGERS:
                        return _made(_moved(self, other.handle.data), dtype, like.sizes)
                    if other.dtype.is_ptr() and dtype in _INTEGERS:
                        return _made(_moved(other, self.handle.data), other.dtype, like.sizes)
                if dtype in _INTEGERS and other.dtype in _INTEGERS and dtypes is not _FLOATS:
                    data = ufunc(self.handle.data, other.handle.data)
                    return _made(data, tl.int1 if compares else tl.int64, like.sizes)
                return own(self, given)
            if (kind is float and dtype is tl.float32) or (kind is int and -(2**31) <= other < 2**31):
                if dtype in dtypes:
                    number = _NUMPY[dtype.name](other)
                    data = ufunc(number, self.handle.data) if reflected else ufunc(self.handle.data, number)
                    return _made(data, tl.int1, self.sizes) if compares else _make(data, self)
                if ufunc is np.add and dtype.is_ptr():
                    return _make(_moved(self, np.array([other])), self)
            return own(self, given)

        return operate

    return quick


def _moved(pointer: tensor, offset: np.ndarray) -> np.ndarray:
    size = max(1, pointer.dtype.element_ty.primitive_bitwidth // 8)
    return pointer.handle.data + size * offset.astype(np.uint64)


def _and(own):
    def both(self, other):
        if other.__class__ is tensor and self.dtype is other.dtype is tl.int1 and self.sizes == other.sizes:
            return _make(self.handle.data & other.handle.data, self)
        return own(self, other)

    return both


def _to(own):
    def to(self, dtype, fp_downcast_rounding=None, bitcast=False):
        dtype = dtype.value if dtype.__class__ is constexpr else dtype
        if dtype is self.dtype:
            return self
        pair = self.dtype.name, dtype.name
        if bitcast and pair in BITCASTS:
            return _made(self.handle.data.view(_NUMPY[dtype.name]), dtype, self.sizes)
        if not bitcast and fp_downcast_rounding is None and pair in CASTS:
            return _made(_builder.cast_impl(self.handle, dtype).data, dtype, self.sizes)
        return own(self, dtype, fp_downcast_rounding, bitcast)

    return to


def _unary(ufunc: np.ufunc) -> Callable[[Callable], Callable]:
    def quick(own):
        def operate(x):
            return _make(ufunc(x.handle.data), x) if x.__class__ is tensor and x.dtype is tl.float32 else own(x)

        return operate

    return quick


def _where(own):
    def where(condition, x, y):
        if condition.__class__ is not tensor or condition.dtype is not tl.int1:
            return own(condition, x, y)
        sizes = condition.sizes
        given = [value.value if value.__class__ is constexpr else value for value in (x, y)]
        dtypes = {value.dtype for value in given if value.__class__ is tensor}
        if len(dtypes) != 1:
            return own(condition, x, y)
        (dtype,) = dtypes
        numbers = (float, int) if dtype is tl.float32 else (int,) if dtype in _INTEGERS else ()
        data = []
        for value in given:
            if value.__class__ is tensor and (value.sizes == sizes or value.sizes is None):
                data.append(value.handle.data)
            elif value.__class__ in numbers and abs(value) < 2**31:
                data.append(_NUMPY[dtype.name](value))
            else:
                return own(condition, x, y)
        return _made(np.where(condition.handle.data, *data), dtype, sizes)

    return where


def _load(own):
    def load(pointer, mask=None, other=None, **options):
        if (
            options
            or pointer.__class__ is not tensor
            or not pointer.dtype.is_ptr()
            or pointer.dtype.element_ty is tl.int1
            or (other is not None and (mask is None or other.__class__ not in (int, float) or other != 0))
            or (mask is not None and (mask.__class__ is not tensor or mask.sizes != pointer.sizes))
        ):
            return own(pointer, mask, other, **options)
        if mask is None:
            handle = _builder.create_load(pointer.handle, *_CACHING, False)
        else:
            handle = _builder.create_masked_load(pointer.handle, mask.handle, None, *_CACHING, False)
        return _made(handle.data, pointer.dtype.element_ty, pointer.sizes)

    return load


def _store(own):
    def store(pointer, value, mask=None, **options):
        if (
            options
            or value.__class__ is not tensor
            or not pointer.dtype.is_ptr()
            or pointer.dtype.element_ty is not value.dtype
            or pointer.sizes != value.sizes
            or value.dtype is tl.int1
            or (mask is not None and (mask.__class__ is not tensor or mask.sizes != pointer.sizes))
        ):
            return own(pointer, value, mask, **options)
        if mask is None:
            _builder.create_store(pointer.handle, value.handle, *_CACHING)
        else:
            _builder.create_masked_store(pointer.handle, value.handle, mask.handle, *_CACHING)

    return store


def _cast_impl(self, src: TensorHandle, dst_type: tl.dtype) -> TensorHandle:
    """Between bf16 and fp32 the bits of the upper half are kept; Triton takes numbers apart and puts them together."""
    pair = src.dtype.scalar, dst_type.scalar
    if pair == (tl.bfloat16, tl.float32):
        return TensorHandle((src.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
    if pair == (tl.float32, tl.bfloat16):
        return TensorHandle((src.data.view(np.uint32) >> 16).astype(np.uint16), tl.bfloat16)
    return own_cast_impl(self, src, dst_type)
