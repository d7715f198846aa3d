"""Tests of the Triton kernels: on the GPU that is here, and, interpreted, on the CPU.

Triton decides when it is imported whether it interprets, so for the CPU they run in a process of their own with
TRITON_INTERPRET=1, which tests/interpreter.py starts. Without a GPU they are not collected elsewhere.
"""

import contextlib
import functools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tests.interpreter import INTERPRETING

collect_ignore_glob = [] if INTERPRETING or torch.cuda.is_available() else ["test_*.py"]


def multiply_as_tensor_cores() -> None:
    """Gives `dot` what a GPU's multiplies: of fp32 the 11 leading bits where TF32 is asked for, or two such parts
    (tf32x3); and bf16 as numbers, which Triton 3.9's interpreter holds as raw bits and multiplies as such."""
    import numpy as np
    import triton.language as tl
    from triton._C.libtriton import ir
    from triton.runtime import interpreter

    make = interpreter.InterpreterBuilder.create_dot

    def truncated(data: np.ndarray) -> np.ndarray:
        return (data.view(np.uint32) & 0xFFFFE000).view(np.float32)

    def widened(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def dot(self, a, b, d, input_precision, *rest):
        a, b = widened(a), widened(b)
        if a.dtype.scalar != tl.float32 or input_precision == ir.INPUT_PRECISION.IEEE:
            return make(self, a, b, d, input_precision, *rest)
        parts = [(truncated(data), truncated(data - truncated(data))) for data in (a.data, b.data)]
        (high_a, low_a), (high_b, low_b) = parts
        pairs = [(high_a, high_b)]
        if input_precision == ir.INPUT_PRECISION.TF32x3:
            pairs += [(high_a, low_b), (low_a, high_b)]
        for pair in pairs:
            d = make(self, *(interpreter.TensorHandle(data, tl.float32) for data in pair), d, input_precision, *rest)
        return d

    interpreter.InterpreterBuilder.create_dot = dot


if INTERPRETING:
    from tests.ops.interpreted.programs import shuffle_programs
    from tests.ops.interpreted.quick import quicken

    quicken()
    multiply_as_tensor_cores()
    shuffle_programs()


@pytest.fixture(autouse=True)
def device() -> Iterator[torch.device]:
    """Where a test makes its tensors."""
    device = torch.device("cpu" if INTERPRETING else "cuda")
    with contextlib.nullcontext() if INTERPRETING else device:
        yield device


@pytest.fixture
def reference() -> str:
    """The backend that computes on the same device and is held to be right."""
    return "cpu" if INTERPRETING else "naive"


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Fresh memory holds NaN, so that a result that no kernel wrote shows."""

    def poisoning(make):
        @functools.wraps(make)
        def poisoned(*args, **kwargs) -> Tensor:
            tensor = make(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return poisoned

    for owner, name in ((Tensor, "new_empty"), (torch, "empty"), (torch, "empty_like")):
        monkeypatch.setattr(owner, name, poisoning(getattr(owner, name)))
