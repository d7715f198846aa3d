"""Sums over a block's channels for scan_backward (scan_backward_kernels.py), as products on the tensor cores."""

import triton
import triton.knobs
import triton.language as tl

from caduceus.ops.triton.scan_arithmetic import stack

COMPILED = tl.constexpr(not triton.knobs.runtime.interpret)
"""Whether kernels of this process run on a GPU, and not in Triton's interpreter."""
WARP_SUM = tl.constexpr("""{
    .reg .b32 b<8>, one;
    .reg .f32 d<16>, e<4>, o;
    .reg .b32 a<4>;
    .reg .pred low;
    mov.b32 one, 0x3f800000;
    mov.f32 o, 0f00000000;
    setp.ne.s32 low, $6, 0;
    cvt.rn.bf16x2.f32 b0, $8, $7;
    cvt.rn.bf16x2.f32 b1, $10, $9;
    cvt.rn.bf16x2.f32 b2, $12, $11;
    cvt.rn.bf16x2.f32 b3, $14, $13;
    cvt.rn.bf16x2.f32 b4, $16, $15;
    cvt.rn.bf16x2.f32 b5, $18, $17;
    cvt.rn.bf16x2.f32 b6, $20, $19;
    cvt.rn.bf16x2.f32 b7, $22, $21;
    mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {d0,d1,d2,d3}, {$2,$3,$4,$5}, {b0,b1}, {o,o,o,o};
    mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {d4,d5,d6,d7}, {$2,$3,$4,$5}, {b2,b3}, {o,o,o,o};
    mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {d8,d9,d10,d11}, {$2,$3,$4,$5}, {b4,b5}, {o,o,o,o};
    mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {d12,d13,d14,d15}, {$2,$3,$4,$5}, {b6,b7}, {o,o,o,o};
    selp.b32 a0, d0, d6, low;
    selp.b32 a1, d8, d14, low;
    selp.b32 a2, d1, d7, low;
    selp.b32 a3, d9, d15, low;
    mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {e0,e1,e2,e3}, {a0,a1,a2,a3}, {one,one}, {o,o,o,o};
    mov.f32 $0, e0;
    mov.f32 $1, e2;
}""")
"""Sums over a warp's 32 threads of the 16 numbers of each: lane l gets the sums of numbers l / 4 and l / 4 + 8.

The first four products have four numbers each where B is: thread l has B[2 (l % 4) + {0, 1} (+ 8), l / 4]. A selects:
its rows 0 … 3, and again rows 12 … 15, add up the four numbers over the four threads that share l / 4. D has the eight
sums of a row where the last product wants a row of A, and ones add them up. Terms are rounded to bf16, and sums of four
to TF32. No number goes through shared memory, and no warp waits for another.
"""


@triton.jit
def sum_over_channels(columns, LOG_COLUMNS: tl.constexpr, BLOCK: tl.constexpr, IN_FP32: tl.constexpr):
    """Sums of the columns in each row of a tile of 16: ones · columns on the tensor cores takes far fewer instructions
    than shuffles."""
    tile = stack(columns, LOG_COLUMNS, BLOCK)
    ones = tl.full([16, BLOCK], 1.0, tl.float32)
    if IN_FP32:
        # The 11 leading bits of TF32, then the rest: as exact as the three passes of tf32x3, one of which is for the
        # other operand's rest, and ones have none. With three the kernel would spill.
        leading = (tile.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
        sums = tl.dot(ones, leading, input_precision="tf32")
        sums = tl.dot(ones, tile - leading, sums, input_precision="tf32")
    else:
        # One TF32 pass rounds less than the 16-bit gradient that follows it.
        sums = tl.dot(ones, tile, input_precision="tf32")
    return sums


@triton.jit
def selects_of_warp(BLOCK: tl.constexpr):
    """Registers of A for WARP_SUM, and whether a lane is of the lower half."""
    group = tl.arange(0, BLOCK) % 32 // 4
    which = group % 4
    one: tl.constexpr = 0x3F80
    other: tl.constexpr = 0x3F800000
    first = tl.where(which == 0, one, tl.where(which == 1, other, 0))
    second = tl.where(which == 2, one, tl.where(which == 3, other, 0))
    zero = tl.zeros([BLOCK], tl.int32)
    low = group < 4
    return (
        tl.where(low, first, zero),
        tl.where(low, zero, first),
        tl.where(low, second, zero),
        tl.where(low, zero, second),
        low.to(tl.int32),
    )


@triton.jit
def sum_over_warp(selects, n, BLOCK: tl.constexpr):
    if COMPILED:
        sums = tl.inline_asm_elementwise(
            WARP_SUM,
            "=f,=f,r,r,r,r,r,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f",
            [selects[0], selects[1], selects[2], selects[3], selects[4]]
            + [n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], n[8], n[9], n[10], n[11], n[12], n[13], n[14], n[15]],
            dtype=(tl.float32, tl.float32),
            is_pure=False,
            pack=1,
        )
    else:  # the same for the interpreter
        group = tl.arange(0, BLOCK) % 32 // 4
        low = tl.zeros([BLOCK], tl.float32)
        high = tl.zeros([BLOCK], tl.float32)
        for i in tl.static_range(8):
            low += tl.where(group == i, _of_warp(n[i], BLOCK), 0.0)
            high += tl.where(group == i, _of_warp(n[i + 8], BLOCK), 0.0)
        sums = (low, high)
    return sums


@triton.jit
def _of_warp(x, BLOCK: tl.constexpr):
    sums = tl.sum(tl.reshape(x.to(tl.bfloat16).to(tl.float32), [BLOCK // 32, 32]), 1)
    return tl.reshape(tl.broadcast_to(sums[:, None], [BLOCK // 32, 32]), [BLOCK])
