"""Caduceus, the bi-directional Mamba language model of DNA (Schiff et al. 2024, arXiv:2403.03234), with no flips.

Shapes: B batch, L length, D d_model, V padded vocabulary, S streams: 1 for Caduceus-Ph; 2 for Caduceus-PS, one per
strand, both in the coordinates of the forward strand.

Caduceus-PS has two block forms. As the paper writes it, stream 0 (forward strand) and stream 1 (its complement) keep
their places: X += M(X), Y += M'(Y), where M' is the block M with its directions exchanged. As the published
checkpoints were trained (`fused_add_norm`) the strands swap places in every block, (X, Y) <- (Y + M(Y), X + F M'(F X)),
with Y held channel-flipped and F the flip of channels. Here tensors stay where they are and the roles alternate: the
mirrored stream, to which F M' F applies, is stream 0 in even blocks and stream 1 in odd ones.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from caduceus.alphabet import IGNORE_LABEL, complement_map
from caduceus.config import CaduceusConfig
from caduceus.model.bimamba import BiMamba, project, with_mirrored_channels
from caduceus.ops import Context


class MaskedLMOutput(NamedTuple):
    """What `CaduceusForMaskedLM` returns. Losses are in nats, in at least fp32, and None without labels.

    A tuple, because wrappers of modules (FSDP2, DeepSpeed) look for tensors in tuples only.
    """

    loss: Tensor | None = None
    """`loss_sum / weight_sum`; 0, with zero gradients, where no base is labelled."""
    logits: Tensor | None = None
    """(B, L, V)"""
    hidden_states: tuple[Tensor, ...] | None = None
    """In the published layout: (B, L, D), for Caduceus-PS (B, L, 2D) with the second half channel-flipped. The
    embedding, then each block's output before its residual is added; in place of the last block's, the final norm
    (missing where `fused_add_norm` is false)."""
    loss_sum: Tensor | None = None
    """Sum over labelled bases of weight times cross-entropy."""
    weight_sum: Tensor | None = None
    """Sum of the weights of labelled bases; their number where no weights are given."""


class Norm(nn.Module):
    """RMSNorm or LayerNorm over D in at least fp32, (S, B, L, D) -> same. Mirrored channels as in `BiMamba`."""

    def __init__(self, config: CaduceusConfig, *, mirrored_stream: int, mirror_channels: bool) -> None:
        super().__init__()
        self.eps = config.norm_epsilon
        self.mirrored_stream = mirrored_stream
        self.mirror_channels = mirror_channels
        self.weight = nn.Parameter(torch.empty(config.d_model))
        self.bias = None if config.rms_norm else nn.Parameter(torch.empty(config.d_model))

    @torch.no_grad()
    def init_weights(self) -> None:
        self.weight.fill_(1)
        if self.bias is not None:
            self.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.bias is None:
            normed = _rms_norm(x, self.eps) * self._for_streams(self.weight, x)
        else:
            normed = F.layer_norm(x, x.shape[-1:], eps=self.eps)
            normed = normed * self._for_streams(self.weight, x) + self._for_streams(self.bias, x)
        return normed.to(self.weight.dtype)

    def _for_streams(self, vector: Tensor, x: Tensor) -> Tensor:
        if not self.mirror_channels:
            return vector
        vectors = with_mirrored_channels(vector, 0, self.mirrored_stream)
        return vectors.view(len(x), *[1] * (x.ndim - 2), -1)


class Block(nn.Module):
    """Norm and mixer; the caller adds the residual. (S, B, L, D) -> (S, B, L, D)."""

    def __init__(self, config: CaduceusConfig, *, mirrored_stream: int, mirror_channels: bool, backend: str) -> None:
        super().__init__()
        self.norm = Norm(config, mirrored_stream=mirrored_stream, mirror_channels=mirror_channels)
        self.mixer = BiMamba(config, mirrored_stream=mirrored_stream, mirror_channels=mirror_channels, backend=backend)

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        self.norm.init_weights()
        self.mixer.init_weights(generator)

    def forward(self, residual: Tensor, pad_mask: Tensor | None = None) -> Tensor:
        return self.mixer(self.norm(residual), pad_mask)


class CaduceusForMaskedLM(nn.Module):
    """Caduceus-Ph, Caduceus-PS or uni-directional Mamba with a language-model head tied to the embedding.

    `backend` names the implementation of scan and convolution (see `caduceus.ops`). With `checkpoint_blocks` a backward
    pass recomputes each block instead of keeping its activations.
    """

    def __init__(self, config: CaduceusConfig, backend: str = "auto", checkpoint_blocks: bool = False) -> None:
        super().__init__()
        self.config = config
        self.checkpoint_blocks = checkpoint_blocks
        swaps_strands = config.rcps and config.fused_add_norm
        mirrored = [layer % 2 if swaps_strands else 1 for layer in range(config.n_layer)]
        table = torch.empty(config.padded_vocab_size, config.d_model)
        self.embedding = nn.Embedding.from_pretrained(table, freeze=False)
        self.register_buffer("complement", torch.empty(config.padded_vocab_size, dtype=torch.long), persistent=False)
        self.blocks = nn.ModuleList(
            Block(config, mirrored_stream=stream, mirror_channels=swaps_strands, backend=backend) for stream in mirrored
        )
        self.norm_f = Norm(config, mirrored_stream=mirrored[-1], mirror_channels=swaps_strands)
        self.init_weights()

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Published initialisation of every parameter; also after construction on the meta device and `to_empty`."""
        self.init_ends(generator)
        for block in self.blocks:
            block.init_weights(generator)

    @torch.no_grad()
    def init_ends(self, generator: torch.Generator | None = None) -> None:
        """The part of `init_weights` outside the blocks, which comes first."""
        self.complement.copy_(torch.from_numpy(complement_map(self.config.padded_vocab_size)))
        self.embedding.weight.normal_(std=0.02, generator=generator)
        self.norm_f.init_weights()

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        loss_weights: Tensor | None = None,
        output_hidden_states: bool = False,
        pad_mask: Tensor | None = None,
        return_logits: bool = True,
    ) -> MaskedLMOutput:
        """Predict every base, and the loss of the labelled ones where `labels` are given.

        input_ids (B, L) int64; labels (B, L) int64, `IGNORE_LABEL` where nothing is to be predicted; loss_weights
        (B, L) of the labelled bases. pad_mask (B, L) bool is true at positions that are only padding of the batch:
        results at all other positions are those of the unpadded sequences. (A [PAD] token stands for N and is an
        ordinary input.) With `return_logits` false the head runs at labelled positions only and `.logits` is None.
        """
        residual = self._embed(input_ids)
        hidden_states = [self._published_layout(residual, first=0)] if output_hidden_states else None
        for number, block in enumerate(self.blocks, start=1):
            if self.checkpoint_blocks and torch.is_grad_enabled():
                hidden = checkpoint(block, residual, pad_mask, use_reentrant=False)
            else:
                hidden = block(residual, pad_mask)
            residual = residual + hidden
            if output_hidden_states and number < len(self.blocks):
                first = 1 - block.mixer.mirrored_stream if self.config.fused_add_norm else 0
                hidden_states.append(self._published_layout(hidden, first))
        if output_hidden_states and self.config.fused_add_norm:
            hidden_states.append(self._published_layout(self.norm_f(residual), 1 - self.norm_f.mirrored_stream))

        hidden_states = None if hidden_states is None else tuple(hidden_states)
        logits = self._logits(residual) if return_logits else None
        if labels is None:
            return MaskedLMOutput(logits=logits, hidden_states=hidden_states)
        positions = (labels.flatten() != IGNORE_LABEL).nonzero().squeeze(1)
        if logits is None:
            labelled = self._logits(residual.flatten(1, 2).index_select(1, positions))
        else:
            labelled = logits.flatten(0, 1).index_select(0, positions)
        weights = None if loss_weights is None else loss_weights.flatten()[positions]
        loss_sum, weight_sum = _weighted_cross_entropy(labelled, labels.flatten()[positions], weights)
        loss = loss_sum / torch.where(weight_sum > 0, weight_sum, 1)
        return MaskedLMOutput(loss, logits, hidden_states, loss_sum, weight_sum)

    def share_sequences(self, context: Context | None) -> None:
        """From now on every sequence is a slice of one that goes on over the ranks of `context`."""
        for block in self.blocks:
            block.mixer.context = context

    def no_weight_decay_parameters(self) -> set[str]:
        """Names of the parameters that published training exempts from weight decay: biases, norms, A_log and D."""
        names = set()
        for path, module in self.named_modules():
            for name, _ in module.named_parameters(recurse=False):
                if isinstance(module, Norm) or name in ("conv_bias", "dt_bias", "A_log", "D"):
                    names.add(f"{path}.{name}")
        return names

    def parameter_groups(self, weight_decay: float) -> list[dict]:
        """Parameter groups for an optimizer: with weight decay, and without."""
        exempt = self.no_weight_decay_parameters()
        named = list(self.named_parameters())
        return [
            {"params": [p for name, p in named if name not in exempt], "weight_decay": weight_decay},
            {"params": [p for name, p in named if name in exempt], "weight_decay": 0.0},
        ]

    def _embed(self, input_ids: Tensor) -> Tensor:
        """The streams (S, B, L, D): the bases, and for Caduceus-PS their complements."""
        table = self.embedding.weight
        if self.config.rcps:
            table = torch.cat([table, self._for_complement(table)])
            input_ids = torch.stack([input_ids, input_ids + self.config.padded_vocab_size])
        else:
            input_ids = input_ids[None]
        embedded = F.embedding(input_ids, table)
        if self.config.residual_in_fp32:
            embedded = embedded.to(torch.promote_types(embedded.dtype, torch.float32))
        return embedded

    def _logits(self, residual: Tensor) -> Tensor:
        """residual (S, …, D) -> logits (…, V), in at least fp32 over both strands."""
        table = self.embedding.weight
        weight = table[None]
        if self.config.rcps:
            pair = [table, self._for_complement(table)]
            forward_is_first = not self.config.fused_add_norm or self.norm_f.mirrored_stream == 1
            weight = torch.stack(pair if forward_is_first else pair[::-1])
        logits = project(self.norm_f(residual), weight)
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).sum(0)

    def _for_complement(self, table: Tensor) -> Tensor:
        """Rows of the complementary tokens, channel-flipped where the block form holds the second strand so."""
        table = table[self.complement]
        return table.flip(-1) if self.config.fused_add_norm else table

    def _published_layout(self, streams: Tensor, first: int) -> Tensor:
        """(S, B, L, D) -> (B, L, S·D), stream `first` being the forward strand; the other one channel-flipped."""
        if not self.config.rcps:
            return streams[0]
        second = streams[1 - first]
        return torch.cat([streams[first], second if self.config.fused_add_norm else second.flip(-1)], dim=-1)


def _rms_norm(x: Tensor, eps: float) -> Tensor:
    if x.is_cuda:
        return F.rms_norm(x, x.shape[-1:], eps=eps)
    # PyTorch fuses it on GPUs only; elsewhere this takes about two thirds of the time of its composite.
    mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / x.shape[-1]
    return x * (mean_square + eps).rsqrt()


def _weighted_cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sum of weighted cross-entropy and sum of weights. logits (n, V) in at least fp32, labels (n,), weights (n,)."""
    losses = F.cross_entropy(logits, labels, reduction="none")
    if weights is None:
        return losses.sum(), losses.new_tensor(losses.numel())
    weights = weights.to(losses.dtype)
    return (losses * weights).sum(), weights.sum()
