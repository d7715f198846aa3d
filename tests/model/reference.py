"""The published model written out with all its flips, over any configuration: what the flip-free model must equal."""

import torch
import torch.nn.functional as F
from torch import Tensor

from caduceus.model.heads import CaduceusForMaskedLM
from caduceus.ops import naive
from caduceus.ops.operands import ScanOperands


def published_logits(model: CaduceusForMaskedLM, input_ids: Tensor) -> Tensor:
    """Logits (B, L, V) of `model`'s parameters, by the published computation."""
    config = model.config
    table = model.embedding.weight
    complement = torch.from_numpy(config.vocabulary.complement(config.padded_vocab_size))
    if not config.rcps:
        residual = F.embedding(input_ids, table)
        for block in model.blocks:
            residual = residual + _mixer(block.mixer, _norm(block.norm, residual))
        return F.linear(_norm(model.norm_f, residual), table)

    forward = F.embedding(input_ids, table)
    reverse_complement = F.embedding(complement[input_ids].flip(1), table)
    residual = torch.cat([forward, _rc(reverse_complement)], dim=-1)
    for block in model.blocks:
        first, second = residual.chunk(2, dim=-1)
        if config.fused_add_norm:
            first, second = second, first
        normed_first, normed_second = _norm(block.norm, first), _norm(block.norm, _rc(second))
        hidden = torch.cat([_mixer(block.mixer, normed_first), _rc(_mixer(block.mixer, normed_second))], dim=-1)
        residual = torch.cat([first, second], dim=-1) + hidden
    first, second = residual.chunk(2, dim=-1)
    logits_first = F.linear(_norm(model.norm_f, first), table)
    logits_second = F.linear(_rc(_rc(_norm(model.norm_f, _rc(second)))).flip(1), table[complement])
    return logits_first + logits_second


def _rc(x: Tensor) -> Tensor:
    return x.flip(1, 2)


def _norm(norm, x: Tensor) -> Tensor:
    if norm.bias is None:
        return x * (x.square().mean(-1, keepdim=True) + norm.eps).rsqrt() * norm.weight
    return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)


def _mixer(mixer, u: Tensor) -> Tensor:
    forward = _mamba(mixer, u, 0)
    if not mixer.config.bidirectional:
        return forward
    backward = _mamba(mixer, u.flip(1), 1).flip(1)
    return forward + backward if mixer.config.bidirectional_strategy == "add" else forward * backward


def _mamba(mixer, u: Tensor, direction: int) -> Tensor:
    config = mixer.config
    projection = 0 if config.bidirectional_weight_tie else direction
    x, z = F.linear(u, mixer.in_proj[projection]).chunk(2, dim=-1)
    x = naive.causal_conv1d(x, mixer.conv_weight[direction], mixer.conv_bias[direction], "silu", False)
    dt, B, C = F.linear(x, mixer.x_proj[direction]).split([config.dt_rank, config.d_state, config.d_state], dim=-1)
    dt = F.linear(dt, mixer.dt_proj[direction])
    A, D, bias = -mixer.A_log[direction].exp(), mixer.D[direction], mixer.dt_bias[direction]
    y, _ = naive.selective_scan(ScanOperands(x, dt, A, B, C, D, z, bias), True, False, None)
    return F.linear(y, mixer.out_proj[projection])
