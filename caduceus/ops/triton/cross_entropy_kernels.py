"""Kernels of head + cross-entropy. A program takes tiles of ROWS tokens, in the forward pass of one sequence each, and
skips those without a labelled base, so logits exist only in registers. Streams are summed into the logits before the
softmax. A label that is neither ignored nor in the vocabulary makes the loss NaN.
"""

import triton
import triton.language as tl

from caduceus.ops.triton.device import SIZES


@triton.jit
def _logits(
    hidden_ptr, weight_ptr, row, use, S, tokens, D, v, V, ROWS: tl.constexpr, VB: tl.constexpr, DB: tl.constexpr
):
    """sum over streams of hidden · head, [ROWS, VB]; -inf beyond the vocabulary."""
    logits = tl.zeros([ROWS, VB], tl.float32)
    for s in range(S):
        for start in range(0, D, DB):
            column = start + tl.arange(0, DB)
            h_at = hidden_ptr + (s * tokens + row)[:, None] * D + column[None, :]
            h = tl.load(h_at, mask=use[:, None] & (column < D)[None, :], other=0.0).to(tl.float32)
            w_at = weight_ptr + (s * V + v)[None, :] * D + column[:, None]
            w = tl.load(w_at, mask=(v < V)[None, :] & (column < D)[:, None], other=0.0).to(tl.float32)
            logits += tl.dot(h, w, input_precision="tf32x3")
    return tl.where((v < V)[None, :], logits, float("-inf"))


@triton.jit(do_not_specialize=SIZES)
def cross_entropy_forward_kernel(
    hidden_ptr,
    weight_ptr,
    label_ptr,
    loss_weight_ptr,
    sums_ptr,
    S,
    tokens,
    L,
    sequence_tiles,
    tiles,
    D,
    V,
    ignore,
    ROWS: tl.constexpr,
    VB: tl.constexpr,
    DB: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
):
    """sums (2, tiles): over the labelled tokens of a tile, of weight · cross-entropy and of weight."""
    v = tl.arange(0, VB)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        sequence = tile // sequence_tiles
        place = tl.cast(tile % sequence_tiles, tl.int64) * ROWS + tl.arange(0, ROWS)
        row = tl.cast(sequence, tl.int64) * L + place
        label = tl.load(label_ptr + row, mask=place < L, other=ignore)
        use = label != ignore
        loss, weight_sum = 0.0, 0.0
        if tl.max(use.to(tl.int32), axis=0) > 0:
            logits = _logits(hidden_ptr, weight_ptr, row, use, S, tokens, D, v, V, ROWS, VB, DB)
            top = tl.max(logits, axis=1)
            normaliser = top + tl.log(tl.sum(tl.exp(logits - top[:, None]), axis=1))
            own = tl.sum(tl.where(v[None, :] == label[:, None], logits, 0.0), axis=1)
            own = tl.where(use & ((label < 0) | (label >= V)), float("nan"), own)
            weight = use.to(tl.float32)
            if HAS_WEIGHTS:
                weight *= tl.load(loss_weight_ptr + row, mask=use, other=0.0).to(tl.float32)
            loss = tl.sum(weight * (normaliser - own), axis=0)
            weight_sum = tl.sum(weight, axis=0)
        sum_at = sums_ptr + tl.cast(tile, tl.int64)
        tl.store(sum_at, loss)
        tl.store(sum_at + tiles, weight_sum)


@triton.jit(do_not_specialize=SIZES)
def cross_entropy_backward_kernel(
    hidden_ptr,
    weight_ptr,
    label_ptr,
    token_gradient_ptr,
    dhidden_ptr,
    dweight_ptr,
    S,
    tokens,
    D,
    V,
    ignore,
    ROWS: tl.constexpr,
    VB: tl.constexpr,
    DB: tl.constexpr,
):
    """dhidden (S, tokens, D), zero at tokens without a label; dweight (programs, S, V, D), which begins as zero.

    token_gradient (tokens,) fp32: the gradient of the loss with respect to the cross-entropy of each labelled token.
    """
    v = tl.arange(0, VB)
    dweight_ptr += tl.program_id(0).to(tl.int64) * S * V * D
    for tile in range(tl.program_id(0), tl.cdiv(tokens, ROWS), tl.num_programs(0)):
        row = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)
        label = tl.load(label_ptr + row, mask=row < tokens, other=ignore)
        use = label != ignore
        labelled = tl.max(use.to(tl.int32), axis=0) > 0
        dlogits = tl.zeros([ROWS, VB], tl.float32)
        if labelled:
            logits = _logits(hidden_ptr, weight_ptr, row, use, S, tokens, D, v, V, ROWS, VB, DB)
            e = tl.exp(logits - tl.max(logits, axis=1)[:, None])
            weight = tl.load(token_gradient_ptr + row, mask=use, other=0.0)
            onehot = (v[None, :] == label[:, None]).to(tl.float32)
            dlogits = weight[:, None] * (e / tl.sum(e, axis=1)[:, None] - onehot)
        for s in range(S):
            for start in range(0, D, DB):
                column = start + tl.arange(0, DB)
                inside = (column < D)[None, :]
                h_at = (s * tokens + row)[:, None] * D + column[None, :]
                if labelled:
                    w_at = (s * V + v)[:, None] * D + column[None, :]
                    w_mask = (v < V)[:, None] & inside
                    w = tl.load(weight_ptr + w_at, mask=w_mask, other=0.0).to(tl.float32)
                    dh = tl.dot(dlogits, w, input_precision="tf32x3")
                    h = tl.load(hidden_ptr + h_at, mask=use[:, None] & inside, other=0.0).to(tl.float32)
                    dw = tl.load(dweight_ptr + w_at, mask=w_mask, other=0.0)
                    dw += tl.dot(tl.trans(dlogits), h, input_precision="tf32x3")
                    tl.store(dweight_ptr + w_at, dw, mask=w_mask)
                else:
                    dh = tl.zeros([ROWS, DB], tl.float32)
                tl.store(dhidden_ptr + h_at, dh.to(dhidden_ptr.dtype.element_ty), mask=(row < tokens)[:, None] & inside)
        tl.debug_barrier()
