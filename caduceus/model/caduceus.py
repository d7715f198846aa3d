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
from caduceus.ops import Context, Strands, add_norm, head_cross_entropy


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


def product_dtype(tensor: Tensor) -> torch.dtype:
    """The type that products with a tensor on this device are computed in: autocast's, or the tensor's own."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype


def residual_dtype(config: CaduceusConfig, weight: Tensor) -> torch.dtype:
    """Of the residual in a model with such weights: at least fp32, or without `residual_in_fp32` as products are."""
    return torch.promote_types(weight.dtype, torch.float32) if config.residual_in_fp32 else product_dtype(weight)


class Norm(nn.Module):
    """RMSNorm or LayerNorm over D of residual + x, (S, B, L, D), in at least fp32. Mirrored channels as in `BiMamba`.

    Returns the norm, in the type that products are computed in, and the sum, in the residual's type.
    """

    def __init__(self, config: CaduceusConfig, *, mirrored_stream: int, mirror_channels: bool, backend: str) -> None:
        super().__init__()
        self.eps = config.norm_epsilon
        self.mirrored_stream = mirrored_stream
        self.mirror_channels = mirror_channels
        self.backend = backend
        self.weight = nn.Parameter(torch.empty(config.d_model))
        self.bias = None if config.rms_norm else nn.Parameter(torch.empty(config.d_model))

    @torch.no_grad()
    def init_weights(self) -> None:
        self.weight.fill_(1)
        if self.bias is not None:
            self.bias.zero_()

    def forward(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """Without a residual the sum is x itself."""
        streams, dtype = x.shape[0], product_dtype(self.weight)
        weight, bias = (None if v is None else self._for_streams(v, streams) for v in (self.weight, self.bias))
        return add_norm(x, residual, weight, bias, eps=self.eps, out_dtype=dtype, backend=self.backend)

    def _for_streams(self, vector: Tensor, streams: int) -> Tensor:
        return with_mirrored_channels(vector, 0, self.mirrored_stream, streams) if self.mirror_channels else vector


class Block(nn.Module):
    """Residual add, norm and mixer. The residual is added where a norm reads it, so that one kernel does both."""

    def __init__(self, config: CaduceusConfig, *, mirrored_stream: int, mirror_channels: bool, backend: str) -> None:
        super().__init__()
        options = {"mirrored_stream": mirrored_stream, "mirror_channels": mirror_channels, "backend": backend}
        self.norm = Norm(config, **options)
        self.mixer = BiMamba(config, **options)

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        self.norm.init_weights()
        self.mixer.init_weights(generator)

    def forward(
        self,
        hidden: Tensor,
        residual: Tensor | None = None,
        pad_mask: Tensor | None = None,
        starts: Tensor | None = None,
        recompute_scan_inputs: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """(mixer(norm(residual + hidden)), residual + hidden), (S, B, L, D) each; the next block adds them."""
        normed, residual = self.norm(hidden, residual)
        return self.mixer(normed, pad_mask, starts, recompute_scan_inputs), residual


class CaduceusForMaskedLM(nn.Module):
    """Caduceus-Ph, Caduceus-PS or uni-directional Mamba with a language-model head tied to the embedding.

    `backend` names the implementation of the ops (see `caduceus.ops`). Of the first `checkpoint_blocks` blocks
    the backward pass recomputes the activations instead of keeping them; of the `checkpoint_scan_inputs` blocks after
    them it recomputes only what feeds the scan. (The first, because it comes to them last, when those of all others are
    freed.)

    With `strands`, this rank has one of the two streams of a Caduceus-PS, S = 1. They meet in the logits: `.logits` and
    `.loss` are those of both, `.loss_sum`, from which gradients are to be taken, and `.weight_sum` this rank's half.
    Hidden states are not to be had.
    """

    def __init__(
        self,
        config: CaduceusConfig,
        backend: str = "auto",
        checkpoint_blocks: int = 0,
        strands: Strands | None = None,
        checkpoint_scan_inputs: int = 0,
    ) -> None:
        super().__init__()
        self.config = config
        self.strands = strands
        self.streams = range(2 if config.rcps else 1) if strands is None else range(strands.rank, strands.rank + 1)
        self.backend = backend
        self.checkpoint_blocks = checkpoint_blocks
        self.checkpoint_scan_inputs = checkpoint_scan_inputs
        swaps_strands = config.rcps and config.fused_add_norm
        # Counted from the first stream that is here.
        mirrored = [((layer if swaps_strands else 1) - self.streams[0]) % 2 for layer in range(config.n_layer)]
        table = torch.empty(config.padded_vocab_size, config.d_model)
        self.embedding = nn.Embedding.from_pretrained(table, freeze=False)
        self.register_buffer("complement", torch.empty(config.padded_vocab_size, dtype=torch.long), persistent=False)
        options = {"mirror_channels": swaps_strands, "backend": backend}
        self.blocks = nn.ModuleList(Block(config, mirrored_stream=stream, **options) for stream in mirrored)
        self.norm_f = Norm(config, mirrored_stream=mirrored[-1], **options)
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
        starts: Tensor | None = None,
    ) -> MaskedLMOutput:
        """Predict every base, and the loss of the labelled ones where `labels` are given.

        input_ids (B, L) int64; labels (B, L) int64, `IGNORE_LABEL` where nothing is to be predicted (others outside the
        vocabulary: see `head_cross_entropy`); loss_weights (B, L) of the labelled bases. pad_mask (B, L) bool is true
        at positions that are only padding of the batch: results at all other positions are those of the unpadded
        sequences. (A [PAD] token stands for N and is an ordinary input.) starts (B, L) bool is true at the first
        positions of sequences that are packed into a row: results are those of each by itself. With `return_logits`
        false the head runs at labelled positions only and `.logits` is None.

        Packed sequences may not be shared between ranks: a `ValueError`. All backends but triton run them one after
        another and read `starts` for that, which breaks a compiled graph.
        """
        if output_hidden_states and self.strands is not None:
            raise ValueError("output_hidden_states: this rank has one of the two strands alone")
        hidden, residual = self._embed(input_ids), None
        hidden_states = [self._published_layout(hidden, first=0)] if output_hidden_states else None
        for number, block in enumerate(self.blocks, start=1):
            if number <= self.checkpoint_blocks and torch.is_grad_enabled():
                if residual is not None:  # a block would keep both for its backward pass; of their sum it keeps one
                    hidden, residual = (residual + hidden).to(residual.dtype), None
                hidden, residual = checkpoint(block, hidden, residual, pad_mask, starts, use_reentrant=False)
            else:
                scan_inputs = number <= self.checkpoint_blocks + self.checkpoint_scan_inputs
                recompute_scan_inputs = scan_inputs and torch.is_grad_enabled()
                hidden, residual = block(hidden, residual, pad_mask, starts, recompute_scan_inputs)
            if output_hidden_states and number < len(self.blocks):
                first = 1 - block.mixer.mirrored_stream if self.config.fused_add_norm else 0
                hidden_states.append(self._published_layout(hidden, first))
        normed, _ = self.norm_f(hidden, residual)
        if output_hidden_states:
            if self.config.fused_add_norm:
                hidden_states.append(self._published_layout(normed, 1 - self.norm_f.mirrored_stream))
            hidden_states = tuple(hidden_states)

        head = self._head()
        logits = self._logits(normed, head) if return_logits else None
        if labels is None:
            return MaskedLMOutput(logits=logits, hidden_states=hidden_states)
        loss_sum, weight_sum = head_cross_entropy(
            normed, head, labels, loss_weights, ignore_label=IGNORE_LABEL, strands=self.strands, backend=self.backend
        )
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
        table, size = self.embedding.weight, self.config.padded_vocab_size
        tables = torch.cat([self._for_complement(table) if stream == 1 else table for stream in self.streams])
        embedded = F.embedding(torch.stack([input_ids + row * size for row in range(len(self.streams))]), tables)
        return embedded.to(residual_dtype(self.config, embedded))

    def _head(self) -> Tensor:
        """The head of each stream, (S, V, D): what it predicts is a base of the forward strand."""
        table, mirrored = self.embedding.weight, self.norm_f.mirrored_stream
        streams = range(len(self.streams))
        return torch.stack([self._for_complement(table) if stream == mirrored else table for stream in streams])

    def _logits(self, normed: Tensor, head: Tensor) -> Tensor:
        """normed (S, B, L, D), head (S, V, D) -> logits (B, L, V), in at least fp32 over both strands."""
        logits = project(normed, head)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).sum(0)
        return logits if self.strands is None else self.strands.sum(logits)

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
