"""Runs sequences that are too long for one pass in pieces; the numbers do not depend on the length of a piece.

The streams of a layer are kept whole, in two tensors (S, B, L, D). A mixer's intermediate tensors, many times as large,
exist for one piece at a time. From left to right, the pieces are taken in order, and each passes the state of the scan
and the last inputs of the convolution to the next; from right to left they are taken in reverse.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from caduceus.model.backbone import Backbone
from caduceus.model.block import Block
from caduceus.model.precision import product_dtype

Visitor = Callable[[int, Tensor], None]
"""A function of the first position of a piece and its tensor, which is overwritten after the call."""


@torch.no_grad()
def run_in_pieces(
    model: Backbone,
    input_ids: Tensor,
    piece: int,
    layers: Mapping[int, Visitor],
    logits: Visitor | None = None,
) -> None:
    """Run sequences, input_ids (B, L), in pieces of `piece` bases, and pass results to visitors, piece by piece.

    layers: {number: visitor} for hidden states, (S, B, l, D) in forward coordinates: 0 is the embedding, then each
    block's output before its residual is added, and n_layer the final norm. logits: the visitor for (B, l, V); the
    model must then be a `CaduceusForMaskedLM`. There are no gradients.
    """
    if piece < 1:
        raise ValueError(f"piece: must be at least 1, got {piece}")
    if unknown := layers.keys() - range(len(model.blocks) + 1):
        raise ValueError(f"layers: the model has 0 to {len(model.blocks)}, got {min(unknown)}")
    streams = model.embed(input_ids)
    mixed = torch.empty_like(streams, dtype=product_dtype(model.embedding.weight))
    bounds = [(first, min(first + piece, input_ids.shape[1])) for first in range(0, input_ids.shape[1], piece)]

    def visit(number: int, tensor: Tensor) -> None:
        for first, end in bounds if number in layers else ():
            layers[number](first, model.hidden_state(number, tensor[:, :, first:end]))

    visit(0, streams)
    for number, block in enumerate(model.blocks, start=1):
        _mix(block, streams, mixed, bounds)
        if number < len(model.blocks):
            visit(number, mixed)
        streams += mixed
    for first, end in bounds:
        held, _ = model.norm_f(streams[:, :, first:end], None)
        if len(model.blocks) in layers:
            layers[len(model.blocks)](first, model.by_strand(held))
        if logits is not None:
            logits(first, model.head(held, model.head_rows()))


def _mix(block: Block, streams: Tensor, mixed: Tensor, bounds: list[tuple[int, int]]) -> None:
    """Write a block's output for the streams to `mixed`, (S, B, L, D) each."""
    config = block.mixer.config
    multiply = config.bidirectional and config.bidirectional_strategy == "ew_multiply"
    for backwards in (False, True):
        carried = [None] * len(streams)
        for first, end in reversed(bounds) if backwards else bounds:
            normed, _ = block.norm(streams[:, :, first:end], None)
            part, carried = block.mixer.mix_piece(normed, backwards, carried)
            place = mixed[:, :, first:end]
            if not backwards:
                place.copy_(part)
            elif multiply:
                place.mul_(part)
            else:
                place.add_(part)
