"""A kernel that computes exp2 as fast as the chip can: little memory, REPEATS exponentials per element."""

import triton
import triton.language as tl

BLOCK, REPEATS = tl.constexpr(1024), tl.constexpr(256)


@triton.jit
def exp2_kernel(source_ptr, target_ptr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(source_ptr + at)
    for _ in range(REPEATS):
        x = tl.exp2(x) - 1.5
    tl.store(target_ptr + at, x)
