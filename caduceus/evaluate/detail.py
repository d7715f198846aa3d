"""The numbers of a validation besides the loss: accuracy by region and species, and confusion of bases.

All are ratios of sums over labelled bases, so that it does not matter that ranks that share strands count a base twice.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from caduceus.alphabet import IGNORE_LABEL, Vocabulary
from caduceus.data.batch import REGIONS, Batch

BASES = "ACGT"
_OF_REGION = 3
"""Sums per region: losses, bases, correctly predicted bases."""
_CONFUSION = _OF_REGION * len(REGIONS)
_STRANDS = _CONFUSION + len(BASES) ** 2
_COLUMNS = _STRANDS + 2

Mirror = Callable[[torch.Tensor], torch.Tensor]
"""A function: (B, L, …) of sequences, or of this rank's slices of them -> the same for the sequences read backwards."""


class Details:
    """Sums over the labelled bases of each species. `sums` (species, columns) float64 may be added up over ranks."""

    def __init__(self, species: Sequence[str], vocabulary: Vocabulary, device: torch.device) -> None:
        self._first = vocabulary.bases[0]
        self._rows = {name: row for row, name in enumerate(species)}
        self.sums = torch.zeros(len(species), _COLUMNS, dtype=torch.float64, device=device)

    def add(self, species: str, logits: torch.Tensor, batch: Batch) -> None:
        """Count the labelled bases of a batch with these logits (B, L, V)."""
        labelled = batch.labels != IGNORE_LABEL
        labels, logits = batch.labels[labelled], logits[labelled]
        losses = F.cross_entropy(logits, labels, reduction="none")
        true, taken = labels - self._first, self._of_bases(logits).argmax(-1)
        sums, right = self.sums[self._rows[species]], true == taken
        repeats = torch.zeros_like(right) if batch.repeats is None else batch.repeats[labelled]
        for number, region in enumerate((~repeats, repeats)):
            counts = [losses[region].sum(dtype=torch.float64), region.sum(), (right & region).sum()]
            sums[_OF_REGION * number : _OF_REGION * (number + 1)] += torch.stack([count.double() for count in counts])
        pairs = F.one_hot(len(BASES) * true + taken, len(BASES) ** 2)
        sums[_CONFUSION:_STRANDS] += pairs.sum(0)

    def add_strands(self, species: str, logits: torch.Tensor, reverse: torch.Tensor, batch: Batch) -> None:
        """Add how far the predictions for the same bases from both strands are apart.

        logits (B, L, V): of the batch. reverse (B, L, V): of its reverse complement, with the same bases at the same
        positions.
        """
        labelled = batch.labels != IGNORE_LABEL
        forward, backward = (self._of_bases(values[labelled]).double().softmax(-1) for values in (logits, reverse))
        distance = (forward - backward.flip(-1)).abs().sum(-1) / 2  # A C G T in reverse order are their complements
        self.sums[self._rows[species], _STRANDS:] += torch.stack([distance.sum(), labelled.sum()])

    def row(self, sums: torch.Tensor) -> dict[str, float]:
        """The entries of a validation's row, from the sums over all ranks, (species, columns) float64 on the CPU."""
        everything = {"": sums.sum(0), **{f"/{name}": sums[row] for name, row in self._rows.items()}}
        row: dict[str, float] = {}
        for suffix, values in everything.items():
            *regions, strands = *values[:_CONFUSION].view(len(REGIONS), _OF_REGION), values[_STRANDS:]
            row |= _told(suffix, regions, strands)
        counts = everything[""][_CONFUSION:_STRANDS].view(len(BASES), len(BASES))
        for true, shares in zip(BASES, (counts / counts.sum(1, keepdim=True)).tolist(), strict=True):
            row |= {f"valid_confusion/{true}{t}": s for t, s in zip(BASES, shares, strict=True) if not math.isnan(s)}
        return row

    def _of_bases(self, logits: torch.Tensor) -> torch.Tensor:
        """(n, V) -> (n, 4)."""
        return logits[:, self._first : self._first + len(BASES)]


def reverse_complement_of(batch: Batch, vocabulary: Vocabulary, mirror: Mirror) -> torch.Tensor:
    """The input (B, L) of the batch's sequences, or slices of them, on the other strand."""
    complement = torch.from_numpy(vocabulary.complement(len(vocabulary.tokens))).to(batch.input_ids.device)
    return mirror(complement[batch.input_ids])


def of_loss(loss: float) -> dict[str, float]:
    """A loss in nats as perplexity and as bits per base."""
    return {
        "valid_perplexity": math.exp(loss) if loss < 700 else math.inf,
        "valid_bits_per_base": loss / math.log(2),
    }


def _told(suffix: str, regions: Sequence[torch.Tensor], strands: torch.Tensor) -> dict[str, float]:
    """The entries of one species, or of all."""
    row = {}
    loss, count, right = sum(regions).tolist()
    if count:
        row[f"valid_accuracy{suffix}"] = right / count
    for name, values in zip(REGIONS, regions, strict=True):
        loss, count, right = values.tolist()
        if count:
            row |= {f"valid_loss_{name}{suffix}": loss / count, f"valid_accuracy_{name}{suffix}": right / count}
    distance, count = strands.tolist()
    if count:
        row[f"valid_rc_disagreement{suffix}"] = distance / count
    return row
