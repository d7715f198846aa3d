"""The worst and the best sequences of a validation, and the model's predictions for their bases."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from caduceus.alphabet import IGNORE_LABEL
from caduceus.config import Config
from caduceus.data.batch import FILLER, Batch
from caduceus.data.loader import ValidationLoader
from caduceus.distributed.ranks import Ranks
from caduceus.distributed.strategy import Strategy
from caduceus.model.heads import MaskedLMOutput
from caduceus.model.precision import autocast

BINS = 200
"""Number of bins of a sequence for which its loss is recorded."""
STRETCH = 100
"""Bases of the stretch that is recorded base by base: where the loss of the sequence is greatest, or least."""
_LEAST_LABELLED = 5
"""Labelled bases that a stretch should have, if any stretch has so many."""
_OF_BIN = 5
"""Sums of each bin: losses, labelled bases, correctly predicted ones, soft-masked bases, bases."""
_OF_BASE = 7
"""Numbers of each base of a stretch: 0 to 3 for A, C, G, T or -1; labelled; soft-masked; likelihood of A, C, G, T."""
_NUMBERS = _OF_BIN * BINS + _OF_BASE * STRETCH + 2

Together = Callable[[Iterable[Batch]], Iterable[Batch]]


@dataclass(frozen=True)
class Chosen:
    """A chosen sequence: its number within the species (`Batch.g`) and its mean loss.

    kind: worst or best. place: its rank, 1 for the very worst or best.
    """

    species: str
    number: int
    kind: str = "worst"
    place: int = 1
    loss: float = 0.0


class SequenceLosses:
    """Collects the loss of every sequence of a validation, batch by batch."""

    def __init__(self, batches: ValidationLoader) -> None:
        self._sums: dict[str, list[torch.Tensor]] = {species: [] for species in batches.species}
        self._counts = batches.samples

    def add(self, species: str, output: MaskedLMOutput) -> None:
        self._sums[species].append(torch.stack([output.loss_sum, output.weight_sum]).double())

    def extremes(self, ranks: Ranks, count: int) -> list[Chosen]:
        """The `count` worst and best sequences of each species; ranks exchange their sums, and all get the
        same result.
        """
        mine = [torch.cat(sums, dim=1) for sums in self._sums.values()]
        rows = ranks.gather(torch.cat(mine, dim=1).flatten().tolist())
        sums = rows.view(ranks.data_world, -1, 2, rows.shape[1] // 2).sum(1)
        chosen: list[Chosen] = []
        for species, part in zip(self._sums, sums.split([len(part[0]) for part in mine], dim=2), strict=True):
            # Data-parallel rank r has the sequences r, r + R, …
            loss, weight = part.permute(1, 2, 0).flatten(1)[:, : self._counts[species]].numpy()
            with np.errstate(invalid="ignore", divide="ignore"):
                means = loss / weight
            order = np.argsort(means, kind="stable")
            order = order[np.isfinite(means[order])]
            worst, best = order[::-1][:count], order[: max(0, min(count, len(order) - count))]
            for kind, numbers in (("worst", worst), ("best", best)):
                for place, number in enumerate(numbers.tolist(), start=1):
                    chosen.append(Chosen(species, number, kind, place, float(means[number])))
        return chosen


@torch.no_grad()
def told_windows(
    chosen: Sequence[Chosen], strategy: Strategy, batches: ValidationLoader, config: Config, together: Together
) -> list[dict[str, Any]]:
    """The record of a window (see `docs/watching.md`) for each chosen sequence, on the main rank; empty on others.

    Data-parallel ranks share the sequences, and run the same number of batches. `together` iterates over these on all
    ranks.
    """
    if not chosen:
        return []
    ranks, model, numbers = strategy.ranks, strategy.model, []
    share = -(-len(chosen) // ranks.data_world)
    mine = list(chosen[ranks.data_rank :: ranks.data_world])
    fillers = [Chosen(chosen[0].species, FILLER)] * (-(-share // batches.rows) * batches.rows - len(mine))
    rows = iter([*mine, *fillers])
    training = model.training
    model.eval()
    for batch in together(batches.crops([(one.species, one.number) for one in [*mine, *fillers]])):
        with autocast(ranks.device, config.train.precision):
            logits = model(batch.input_ids, starts=batch.starts).logits
        numbers += [_numbers(batch, logits, row, next(rows), strategy, config) for row in range(len(batch.g))]
    model.train(training)
    gathered = ranks.gather(np.concatenate(numbers[:share]).tolist()).view(ranks.data_world, -1, share, _NUMBERS)
    with ranks.agreeing():
        if not ranks.is_main:
            return []
        shift = int(config.data.objective == "next_base")  # a position predicts the base after it
        return [
            {"bases": config.data.seq_len}
            | _told(one, gathered[place % ranks.data_world, :, place // ranks.data_world].numpy(), batches, shift)
            for place, one in enumerate(chosen)
        ]


def _numbers(
    batch: Batch, logits: torch.Tensor, row: int, one: Chosen, strategy: Strategy, config: Config
) -> np.ndarray:
    """(_NUMBERS,) float64 of this rank's slice of a sequence, in row `row` of a batch."""
    base, (first, end) = config.model.vocabulary.bases[0], strategy.ranks.positions(config.data.seq_len)
    labels, labelled = batch.labels[row], batch.labels[row] != IGNORE_LABEL
    losses = torch.zeros(len(labels), dtype=torch.float64, device=labels.device)
    losses[labelled] = F.cross_entropy(logits[row, labelled].double(), labels[labelled], reduction="none")
    likely = logits[row, :, base : base + 4].double().softmax(-1)
    true = torch.where(labelled, labels, batch.input_ids[row]) - base
    true[(true < 0) | (true > 3)] = -1
    repeat = torch.zeros_like(labelled) if batch.repeats is None else batch.repeats[row]
    right = labelled & (likely.argmax(-1) == true)
    sums = torch.stack([losses, labelled, right, repeat, torch.ones_like(losses)]).cpu().numpy()
    place = np.arange(first, end) * BINS // config.data.seq_len
    bins = [np.bincount(place, weights=values, minlength=BINS) for values in sums]
    start, score = _stretch(sums[0], sums[1], one.kind)
    of_bases = np.full((STRETCH, _OF_BASE), np.nan)
    told = torch.cat([torch.stack([true, labelled, repeat], dim=1).double(), likely], dim=1)[start : start + STRETCH]
    of_bases[: len(told)] = told.cpu().numpy()
    return np.concatenate([*bins, of_bases.ravel(), [first + start, score]])


def _stretch(losses: np.ndarray, labelled: np.ndarray, kind: str) -> tuple[int, float]:
    """Where the stretch of a slice begins, and a score of how extreme its mean loss is: greater is more extreme."""
    width = min(STRETCH, len(losses))
    sums = (np.r_[0, values.cumsum()] for values in (losses, labelled))
    total, count = (values[width:] - values[:-width] for values in sums)
    least = min(_LEAST_LABELLED, count.max())
    if least == 0:
        return 0, -np.inf
    means = np.divide(total, count, out=np.zeros_like(total), where=count > 0) * (1 if kind == "worst" else -1)
    means[count < least] = -np.inf
    start = int(means.argmax())
    return start, float(means[start])


def _told(one: Chosen, parts: np.ndarray, batches: ValidationLoader, shift: int) -> dict[str, Any]:
    """A window's record, from the numbers of its slices, (slices, _NUMBERS)."""
    bins = parts[:, : _OF_BIN * BINS].sum(0).reshape(_OF_BIN, BINS)  # where ranks share strands, all twice
    losses, labelled, right, repeat, count = bins
    farthest = parts[parts[:, -1].argmax()]
    bases = farthest[_OF_BIN * BINS : -2].reshape(STRETCH, _OF_BASE)
    bases = bases[~np.isnan(bases[:, 0])]
    where = batches.describe(one.species, one.number)
    return {
        **where,
        "kind": one.kind,
        "place": one.place,
        "loss": one.loss,
        "accuracy": right.sum() / labelled.sum(),
        "bins": {
            "loss": [loss / n if n else None for loss, n in zip(losses, labelled, strict=True)],
            "repeat": [value / n if n else 0.0 for value, n in zip(repeat, count, strict=True)],
        },
        "stretch": {
            "start": where.get("start", 0) + int(farthest[-2]) + shift,
            "bases": "".join("ACGTN"[int(base)] for base in bases[:, 0]),
            "labelled": bases[:, 1].astype(int).tolist(),
            "repeat": bases[:, 2].astype(int).tolist(),
            "likelihood": bases[:, 3:].round(4).tolist(),
        },
    }
