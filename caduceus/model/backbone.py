"""Caduceus, the bi-directional Mamba language model of DNA (Schiff et al. 2024, arXiv:2403.03234), with no flips.

Shapes: B batch, L length, D d_model, V padded vocabulary, S streams: 1 for Caduceus-Ph; 2 for Caduceus-PS, one per
strand, both in the coordinates of the forward strand.

Caduceus-PS has two block forms. As the paper writes it, stream 0 (forward strand) and stream 1 (its complement) keep
their places: X += M(X), Y += M'(Y), where M' is the block M with its directions exchanged. As the published
checkpoints were trained (`fused_add_norm`) the strands swap places in every block, (X, Y) <- (Y + M(Y), X + F M'(F X)),
with Y held channel-flipped and F the flip of channels. Here tensors stay where they are and the roles alternate: the
mirrored stream, to which F M' F applies, is stream 0 in even blocks and stream 1 in odd ones.
"""

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from caduceus.config import CaduceusConfig
from caduceus.model.block import Block, Norm, residual_dtype
from caduceus.model.observer import Observer
from caduceus.ops import Context, Strands

_recompute = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)  # no block draws random numbers


class BackboneOutput(NamedTuple):
    """The output of `Backbone`. It is a tuple because wrappers of modules look for tensors only in tuples."""

    held: Tensor
    """(S, B, L, D), the final norm of the streams as the blocks hold them; `Backbone.by_strand` puts them in order."""
    hidden_states: tuple[Tensor, ...] | None = None
    """(S, B, L, D) each: the forward strand and, for Caduceus-PS, the other one, both in forward coordinates of
    positions and channels. The embedding, then each block's output before its residual is added; in place of the last
    block's, the final norm (missing where `fused_add_norm` is false)."""


class Backbone(nn.Module):
    """Embedding, blocks and final norm of Caduceus-Ph, Caduceus-PS or uni-directional Mamba.

    `backend` names the implementation of the ops (see `caduceus.ops`).

    The backward pass recomputes the activations of the first `recomputed_blocks` blocks instead of keeping them. In the
    `recomputed_scan_inputs` blocks after them it recomputes only the inputs of the scan. (It is the first blocks
    because the backward pass reaches them last, when the activations of all others are freed.) With `strands`, this
    rank has one of the two streams of a Caduceus-PS, S = 1, and refuses to return hidden states.
    """

    def __init__(
        self,
        config: CaduceusConfig,
        backend: str = "auto",
        recomputed_blocks: int = 0,
        strands: Strands | None = None,
        recomputed_scan_inputs: int = 0,
    ) -> None:
        super().__init__()
        self.config = config
        self.strands = strands
        self.streams = range(2 if config.rcps else 1) if strands is None else range(strands.rank, strands.rank + 1)
        self.backend = backend
        self.recomputed_blocks = recomputed_blocks
        self.recomputed_scan_inputs = recomputed_scan_inputs
        swaps_strands = config.rcps and config.fused_add_norm
        # Counted from the first stream on this rank.
        mirrored = [((layer if swaps_strands else 1) - self.streams[0]) % 2 for layer in range(config.n_layer)]
        table = torch.empty(config.padded_vocab_size, config.d_model)
        self.embedding = nn.Embedding.from_pretrained(table, freeze=False)
        self.register_buffer("complement", torch.empty(config.padded_vocab_size, dtype=torch.long), persistent=False)
        options = {"mirror_channels": swaps_strands, "backend": backend}
        self.blocks = nn.ModuleList(Block(config, mirrored_stream=stream, **options) for stream in mirrored)
        self.norm_f = Norm(config, mirrored_stream=mirrored[-1], **options)
        self.init_weights()

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Initialise every parameter as published; also for use after construction on the meta device and
        `to_empty`.
        """
        self.init_ends(generator)
        for block in self.blocks:
            block.init_weights(generator)

    @torch.no_grad()
    def init_ends(self, generator: torch.Generator | None = None) -> None:
        """The part of `init_weights` outside the blocks, which comes first."""
        complement = self.config.vocabulary.complement(self.config.padded_vocab_size)
        self.complement.copy_(torch.from_numpy(complement))
        self.embedding.weight.normal_(std=0.02, generator=generator)
        self.norm_f.init_weights()

    def forward(
        self,
        input_ids: Tensor,
        output_hidden_states: bool = False,
        pad_mask: Tensor | None = None,
        starts: Tensor | None = None,
    ) -> BackboneOutput:
        """Embed and mix every base.

        input_ids (B, L) int64. pad_mask (B, L) bool is true at positions that are only padding of the batch: results at
        all other positions are those of the unpadded sequences. (A [PAD] token stands for N and is an ordinary input.)
        starts (B, L) bool is true at the first positions of sequences that are packed into a row: each sequence gets
        the results that it would have alone.

        Raises `ValueError` where packed sequences are shared between ranks. All backends but triton run packed
        sequences one after another and read `starts` for that, which breaks a compiled graph.
        """
        if output_hidden_states and self.strands is not None:
            raise ValueError("output_hidden_states: this rank has one of the two strands alone")
        hidden, residual = self.embed(input_ids), None
        hidden_states = [self.hidden_state(0, hidden)] if output_hidden_states else None
        for number, block in enumerate(self.blocks, start=1):
            if number <= self.recomputed_blocks and torch.is_grad_enabled():
                if residual is not None:  # a block would keep both for its backward pass; of their sum it keeps one
                    hidden, residual = (residual + hidden).to(residual.dtype), None
                hidden, residual = _recompute(block, hidden, residual, pad_mask, starts)
            else:
                scan_inputs = number <= self.recomputed_blocks + self.recomputed_scan_inputs
                recompute_scan_inputs = scan_inputs and torch.is_grad_enabled()
                hidden, residual = block(hidden, residual, pad_mask, starts, recompute_scan_inputs)
            if output_hidden_states and number < len(self.blocks):
                hidden_states.append(self.hidden_state(number, hidden))
        normed, _ = self.norm_f(hidden, residual)
        if output_hidden_states:
            if self.config.fused_add_norm:
                hidden_states.append(self.by_strand(normed))
            hidden_states = tuple(hidden_states)
        return BackboneOutput(normed, hidden_states)

    def share_sequences(self, context: Context | None) -> None:
        """From now on every sequence is a slice of one that the ranks of `context` share."""
        for block in self.blocks:
            block.mixer.context = context

    def keep_states(self, blocks: int) -> None:
        """Let the scans of the last `blocks` blocks keep states for the backward pass, instead of recomputing them;
        results keep their bits. Only the backend triton has this choice.
        """
        for number, block in enumerate(self.blocks):
            block.mixer.keeps_states = number >= len(self.blocks) - blocks

    @contextlib.contextmanager
    def observing(self) -> Iterator[Observer]:
        """A context in which one forward pass reports its inner numbers to the observer."""
        observer = Observer()
        observed = [module for block in self.blocks for module in (block, block.mixer)]
        for module in observed:
            module.observer = observer
        try:
            yield observer
        finally:
            for module in observed:
                module.observer = None

    def no_weight_decay_parameters(self) -> set[str]:
        """Names of the parameters that published training exempts from weight decay: biases, norms, A_log and D."""
        names = set()
        for path, module in self.named_modules():
            for name, _ in module.named_parameters(recurse=False):
                if isinstance(module, Norm) or name in ("conv_bias", "dt_bias", "A_log", "D", "norm_weight"):
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

    def embed(self, input_ids: Tensor) -> Tensor:
        """The streams (S, B, L, D) as the first block gets them: the bases, and for Caduceus-PS their complements."""
        table, size = self.embedding.weight, self.config.padded_vocab_size
        tables = torch.cat([self._for_complement(table) if stream == 1 else table for stream in self.streams])
        embedded = F.embedding(torch.stack([input_ids + row * size for row in range(len(self.streams))]), tables)
        return embedded.to(residual_dtype(self.config, embedded))

    def _for_complement(self, table: Tensor) -> Tensor:
        """The table's rows of the complementary tokens, channel-flipped where the block form holds the second strand
        flipped.
        """
        table = table[self.complement]
        return table.flip(-1) if self.config.fused_add_norm else table

    def hidden_state(self, number: int, hidden: Tensor) -> Tensor:
        """Entry `number` of `BackboneOutput.hidden_states`, from the output of the embedding (0) or of block
        `number`.
        """
        swapped = number > 0 and self.config.fused_add_norm
        return self._by_strand(hidden, 1 - self.blocks[number - 1].mixer.mirrored_stream if swapped else 0)

    def by_strand(self, held: Tensor) -> Tensor:
        """The final norm (S, B, L, D), the forward strand first, without flipped channels."""
        return self._by_strand(held, 1 - self.norm_f.mirrored_stream if self.config.fused_add_norm else 0)

    def _by_strand(self, streams: Tensor, first: int) -> Tensor:
        """(S, B, L, D) with the forward strand, stream `first`, first, and without flipped channels."""
        if not self.config.rcps:
            return streams
        second = streams[1 - first]
        return torch.stack([streams[first], second.flip(-1) if self.config.fused_add_norm else second])
