"""The head on the backbone, and the model that is trained: `CaduceusForMaskedLM`.

Shapes: B batch, L length, D d_model, V padded vocabulary, S streams.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from caduceus.alphabet import IGNORE_LABEL
from caduceus.config import CaduceusConfig
from caduceus.model.backbone import Backbone
from caduceus.model.mixer import project
from caduceus.ops import Strands, head_cross_entropy


class MaskedLMOutput(NamedTuple):
    """The output of `CaduceusForMaskedLM`. Losses are in nats, in at least fp32, and None without labels.

    It is a tuple because wrappers of modules (FSDP2, DeepSpeed) look for tensors only in tuples.
    """

    loss: Tensor | None = None
    """The sum of `loss_sum` divided by the sum of `weight_sum`; 0, with zero gradients, where no base is labelled."""
    logits: Tensor | None = None
    """(B, L, V)"""
    hidden_states: tuple[Tensor, ...] | None = None
    """The hidden states of `BackboneOutput`: (S, B, L, D) each, in forward coordinates."""
    loss_sum: Tensor | None = None
    """(B,) for each sequence, the sum over its labelled bases of weight times cross-entropy."""
    weight_sum: Tensor | None = None
    """(B,) for each sequence, the sum of the weights of its labelled bases; their number where no weights are given."""
    region_sums: Tensor | None = None
    """(2, 2) float64, `MaskedLMHead.sums_by_region` of this batch; None unless `repeats` are given."""


class MaskedLMHead(nn.Module):
    """Predicts the bases of the forward strand from the final norms of the streams, S of them on this rank.

    It has no parameters of its own: its rows, (S, V, D), are those of the embedding's table, and are given in every
    call.
    """

    def __init__(self, config: CaduceusConfig, strands: Strands | None, backend: str) -> None:
        super().__init__()
        self.pad = config.vocabulary.pad
        self.strands = strands
        self.backend = backend

    def forward(self, held: Tensor, rows: Tensor) -> Tensor:
        """held (S, B, L, D) -> logits (B, L, V), in at least fp32, summed over both strands, on whichever ranks they
        are.
        """
        logits = project(held, rows)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).sum(0)
        return logits if self.strands is None else self.strands.sum(logits)

    def sums(self, held: Tensor, rows: Tensor, labels: Tensor, loss_weights: Tensor | None) -> tuple[Tensor, Tensor]:
        """`loss_sum` and `weight_sum` of `MaskedLMOutput`; logits are computed only at labelled positions."""
        labels = labels.masked_fill(labels == self.pad, IGNORE_LABEL)
        return head_cross_entropy(
            held, rows, labels, loss_weights, ignore_label=IGNORE_LABEL, strands=self.strands, backend=self.backend
        )

    @torch.no_grad()
    def sums_by_region(self, held: Tensor, rows: Tensor, labels: Tensor, repeats: Tensor) -> Tensor:
        """Sums over the labelled bases outside and inside of `repeats` (B, L) bool: (2, 2) float64, of each region the
        losses without weights and the number of bases.
        """
        regions = [self.sums(held, rows, labels, region.float()) for region in (~repeats, repeats)]
        return torch.stack([torch.stack([values.sum().double() for values in region]) for region in regions])


class CaduceusForMaskedLM(Backbone):
    """The backbone with a `MaskedLMHead` that is tied to its embedding.

    It is a subclass of the backbone, so that its parameters have the same names in every checkpoint. With `strands`,
    the two streams of a Caduceus-PS are combined in the logits: `.logits` and `.loss` are those of both ranks;
    `.loss_sum`, which gives the gradients, and `.weight_sum` are this rank's half.
    """

    def __init__(
        self,
        config: CaduceusConfig,
        backend: str = "auto",
        recomputed_blocks: int = 0,
        strands: Strands | None = None,
        recomputed_scan_inputs: int = 0,
    ) -> None:
        super().__init__(config, backend, recomputed_blocks, strands, recomputed_scan_inputs)
        self.head = MaskedLMHead(config, strands, backend)

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        loss_weights: Tensor | None = None,
        output_hidden_states: bool = False,
        pad_mask: Tensor | None = None,
        return_logits: bool = True,
        starts: Tensor | None = None,
        repeats: Tensor | None = None,
    ) -> MaskedLMOutput:
        """Predict every base, and where `labels` are given, the loss of the labelled ones.

        input_ids (B, L) int64; labels (B, L) int64, `IGNORE_LABEL` or, as in published code, [PAD] where nothing is to
        be predicted (others outside the vocabulary: see `head_cross_entropy`); loss_weights (B, L) of the labelled
        bases. pad_mask (B, L) bool is true at positions that are only padding of the batch: results at all other
        positions are those of the unpadded sequences. (A [PAD] token stands for N and is an ordinary input.) starts (B,
        L) bool is true at the first positions of sequences that are packed into a row: each gets the results that it
        would have alone. With `return_logits` false the head runs only at labelled positions, and `.logits` is None.
        repeats (B, L) bool is true where the base to be predicted is soft-masked: `.region_sums` are wanted.

        Raises `ValueError` where packed sequences are shared between ranks. All backends but triton run packed
        sequences one after another and read `starts` for that, which breaks a compiled graph.
        """
        held, hidden_states = super().forward(input_ids, output_hidden_states, pad_mask, starts)
        rows = self.head_rows()
        logits = self.head(held, rows) if return_logits else None
        if labels is None:
            return MaskedLMOutput(logits=logits, hidden_states=hidden_states)
        loss_sum, weight_sum = self.head.sums(held, rows, labels, loss_weights)
        weight = weight_sum.sum()
        loss = loss_sum.sum() / torch.where(weight > 0, weight, 1)
        region_sums = None if repeats is None else self.head.sums_by_region(held, rows, labels, repeats)
        return MaskedLMOutput(loss, logits, hidden_states, loss_sum, weight_sum, region_sums)

    def head_rows(self) -> Tensor:
        """The head's rows for each stream, (S, V, D), with which it predicts the base of the forward strand."""
        table, mirrored = self.embedding.weight, self.norm_f.mirrored_stream
        streams = range(len(self.streams))
        return torch.stack([self._for_complement(table) if stream == mirrored else table for stream in streams])
