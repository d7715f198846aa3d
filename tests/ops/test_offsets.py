"""That an offset which may wrap is found in the IR of a kernel, and none in kernels that take care."""

import pytest

from tests.ops.offsets import narrow_products
from tests.ops.tools import has_tools

triton = pytest.importorskip("triton", reason="triton is not installed (Linux only)")
tl = triton.language

pytestmark = pytest.mark.skipif(not has_tools(), reason="no triton here that brings ptxas (Linux only)")


@triton.jit
def product(x_ptr, stride):
    tl.store(x_ptr + tl.program_id(0) * stride, 0.0)


@triton.jit
def product_of_a_tile(x_ptr, stride):
    row = tl.program_id(0) + tl.arange(0, 16)
    tl.store(x_ptr + row[:, None] * stride + tl.arange(0, 16)[None, :], 0.0)


@triton.jit
def shift(x_ptr, stride):
    tl.store(x_ptr + ((tl.program_id(0) << 8) + stride).to(tl.int64), 0.0)


@triton.jit
def pointer_advanced_in_a_loop(x_ptr, stride):
    step = tl.program_id(0)
    for _ in range(stride):
        tl.store(x_ptr, 0.0)
        x_ptr += step


@triton.jit
def counter_of_a_loop(x_ptr, stride):
    for row in range(tl.program_id(0), 1000, tl.num_programs(0)):
        tl.store(x_ptr + row * stride, 0.0)


@triton.jit
def counter_up_to_it(x_ptr, stride):
    for row in range(0, tl.program_id(0)):
        tl.store(x_ptr + row * stride, 0.0)


@triton.jit
def carried_from_before_the_loop(x_ptr, stride):
    row = tl.program_id(0)
    for _ in range(stride):
        tl.store(x_ptr + row * stride, 0.0)
        row += 1


@triton.jit
def carried_from_the_turn_before(x_ptr, stride):
    row = stride
    for _ in range(stride):
        tl.store(x_ptr + row * stride, 0.0)
        row += tl.program_id(0)


@triton.jit
def used_after_loops(x_ptr, stride):
    first, row = stride, stride
    for _ in range(stride):
        for _ in range(stride):
            tl.store(x_ptr, 0.0)
            first += 1
            row += tl.program_id(0)
    tl.store(x_ptr + row * stride, first.to(tl.float32))


@triton.jit
def used_after_a_branch(x_ptr, stride):
    if stride > 3:
        tl.store(x_ptr, 0.0)
        row = 1
    else:
        tl.store(x_ptr, 1.0)
        row = tl.program_id(0)
    tl.store(x_ptr + row * stride, 0.0)


@triton.jit
def truncated(x_ptr, stride):
    item = tl.program_id(0).to(tl.int64) * stride
    tl.store(x_ptr + (item + 1).to(tl.int32), 0.0)


@triton.jit
def truncated_in_a_loop(x_ptr, stride):
    item = tl.program_id(0).to(tl.int64)
    for _ in range(stride):
        tl.store(x_ptr + (item.to(tl.int32) * stride).to(tl.int64), 0.0)
        item += stride


@triton.jit
def greatest(x_ptr, stride):
    row = tl.max(tl.program_id(0) + tl.arange(0, 16), axis=0)
    tl.store(x_ptr + row * stride, 0.0)


@triton.jit
def made_from_the_length(x_ptr, stride, L):
    begin = tl.where(tl.program_id(1) == 0, -3, L)
    tl.store(x_ptr + begin * stride, 0.0)


WRONG = [
    product,
    product_of_a_tile,
    shift,
    pointer_advanced_in_a_loop,
    counter_of_a_loop,
    counter_up_to_it,
    carried_from_before_the_loop,
    carried_from_the_turn_before,
    used_after_loops,
    used_after_a_branch,
    truncated,
    truncated_in_a_loop,
    greatest,
    made_from_the_length,
]


@triton.jit
def widened(x_ptr, stride):
    row = tl.program_id(0).to(tl.int64)
    tl.store(x_ptr + row * stride, 0.0)


@triton.jit
def widened_in_loops(x_ptr, stride):
    row = tl.program_id(0).to(tl.int64)
    for tile in range(tl.program_id(0), 1000, tl.num_programs(0)):
        at = x_ptr + tl.cast(tile, tl.int64) * stride
        for _ in range(stride):
            tl.store(at + row * stride, 0.0)
            row += stride
            at += stride


@triton.jit
def bounded(x_ptr, stride):
    """Products with a channel, the length of a last chunk, the sign of a direction and the loop's own counter."""
    item = tl.program_id(0).to(tl.int64)
    x_ptr += item * stride + tl.program_id(1) * 16
    length = tl.minimum(1000 - item, stride).to(tl.int32)
    step = (1 - 2 * (item % 2)).to(tl.int32)
    for k in range(length):
        tl.store(x_ptr + (length - 1) * stride, 0.0)
        x_ptr += step * stride + k * stride


@triton.jit
def loaded(x_ptr, stride):
    """A value from where the program's number points to is any number."""
    label = tl.load(x_ptr + tl.program_id(0).to(tl.int64)).to(tl.int32)
    tl.store(x_ptr + label * stride, 0.0)


RIGHT = [widened, widened_in_loops, bounded, loaded]


def ir(kernel) -> str:
    signature = {name: "*fp32" if name == "x_ptr" else "i32" for name in kernel.arg_names}
    source = triton.compiler.ASTSource(kernel, signature)
    target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
    return triton.compile(source, target=target, options={"enable_fp_fusion": True}).asm["ttir"]


@pytest.mark.parametrize("kernel", WRONG, ids=lambda kernel: kernel.__name__)
def test_an_offset_that_may_wrap_is_found(kernel):
    assert len(narrow_products(ir(kernel))) == 1


@pytest.mark.parametrize("kernel", RIGHT, ids=lambda kernel: kernel.__name__)
def test_offsets_that_cannot_wrap_are_not(kernel):
    assert narrow_products(ir(kernel)) == []


@triton.jit
def while_loop(x_ptr, stride):
    row = tl.program_id(0)
    while row < 1000:
        tl.store(x_ptr + row * stride, 0.0)
        row += 1


def test_a_kernel_that_cannot_be_followed_is_refused():
    with pytest.raises(AssertionError, match=r"scf\.while"):
        narrow_products(ir(while_loop))
