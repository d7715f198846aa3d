"""Embeddings of sequences: one vector each, or one per base, of any layer and both strands.

Sequences of the same length make a batch; others are packed into one row without seeing each other. Sequences longer
than `piece` are run in pieces, which gives the same numbers (see `caduceus.model.pieces`).
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from caduceus.alphabet import reverse_complement
from caduceus.distributed.ranks import Ranks
from caduceus.errors import UserError
from caduceus.evaluate.embeddings_file import check_embeddings_name, write_embeddings
from caduceus.evaluate.model import Runner, layer_number
from caduceus.evaluate.parts import Parts, cut
from caduceus.evaluate.pools import check_pool, stretch
from caduceus.evaluate.sequences import Item, SequenceSource
from caduceus.evaluate.windows import checked_bases
from caduceus.files import sha256_of
from caduceus.model.pieces import Visitor, run_in_pieces

STRANDS = ("average", "concatenate", "forward")
_PART_BASES, _PART_SEQUENCES = 1 << 22, 4096


@dataclass(frozen=True)
class EmbedOptions:
    """Which embedding to compute.

    pool: mean or max over the bases; the vector at the `centre` (base L // 2); the mean over `middle:BEFORE:AFTER`
    around it; the vector at a position counted from 0; or `base`, a vector per base. layer: 0 is the embedding, k is
    after block k, n_layer or -1 the final norm. strands: the average of both in forward coordinates, both concatenated,
    or the forward strand alone; Caduceus-PS always computes both, other models are also run on the reverse complement.
    piece: longest sequence of one pass. batch_bases: bases of a batch; the default suits the device.
    """

    pool: str = "mean"
    layer: int = -1
    strands: str = "average"
    piece: int = 65_536
    batch_bases: int | None = None

    def __post_init__(self) -> None:
        if not self.pool.isdecimal():
            check_pool(self.pool, "base", "a place counted from 0")
        if self.strands not in STRANDS:
            raise UserError(f"--strands: choose one of {', '.join(STRANDS)}, got {self.strands!r}")
        for name in ("piece", "batch_bases"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')}: must be at least 1, got {value}")


def embed(
    runner: Runner, sequences: Sequence[str | np.ndarray], options: EmbedOptions | None = None
) -> np.ndarray | list[np.ndarray]:
    """Embeddings of sequences in memory (text or ASCII bytes): (n, D) or, with pool `base`, a list of (L, D).

    D is twice the model's d_model where strands are concatenated.
    """
    options = options or EmbedOptions()
    bases = [checked_bases(s, f"sequence {n}") if isinstance(s, str) else s for n, s in enumerate(sequences, 1)]
    layer = layer_number(options.layer, runner.config)
    most = runner.batch_bases(options.batch_bases)
    results: list[np.ndarray] = []
    with torch.no_grad(), runner.autocast():
        for batch, packed in runner.batches([len(b) for b in bases], most, options.piece):
            results += _embed_batch(runner, [bases[number] for number in batch], packed, layer, options)
    return results if options.pool == "base" else np.stack(results)


def embed_file(
    runner: Runner, source: SequenceSource, out: str | Path, options: EmbedOptions, ranks: Ranks | None = None
) -> None:
    """Embed the sequences of `source`, and write them to `out`, .npz or .parquet. After a kill the same call goes on.

    ranks: the ranks that share the work; by default all that were started with this process.
    """
    check_embeddings_name(out)
    items = source.items()
    layer_number(options.layer, runner.config)
    check_places(items, source, options)
    origin = {
        "verb": "embed",
        "model": runner.origin(),
        "input_sha256": source.sha256(),
        "source": {key: value and str(value) for key, value in asdict(source).items()},
        "options": asdict(options),
    }
    if source.genome is not None:
        origin["genome_sha256"] = sha256_of(source.genome)
    parts = cut(items, lambda item: item.length, _PART_BASES, _PART_SEQUENCES)
    store = Parts(out, origin, ranks)

    def compute(part: Sequence[Item]) -> dict[str, np.ndarray]:
        found = embed(runner, [item.read() for item in part], options)
        return {"embeddings": np.concatenate(found) if options.pool == "base" else found}

    store.run("embedding", parts, lambda item: item.length, compute, "bases")
    with store.writing() as writes:
        if writes:
            lengths = [item.length for item in items] if options.pool == "base" else None
            vectors = (arrays["embeddings"] for arrays in store.load(len(parts)))
            write_embeddings(out, [item.name for item in items], lengths, vectors)
            store.finish(sequences=len(items), bases=sum(item.length for item in items))


def check_places(items: list[Item], source: SequenceSource, options: EmbedOptions) -> None:
    """Raise `UserError` for the first sequence that is too short for the position of `pool`."""
    if options.pool.isdecimal():
        short = next((item for item in items if item.length <= int(options.pool)), None)
        if short is not None:
            raise UserError(
                f"--pool: {source.input}: {short.name} has {short.length:,} bases, so it has no base {options.pool}"
            )


def _embed_batch(
    runner: Runner, bases: list[np.ndarray], packed: bool, layer: int, options: EmbedOptions
) -> list[np.ndarray]:
    """The embedding of each sequence of a batch: (D,), or (L, D) per base."""
    pools = [_Pool(options, len(one)) for one in bases]
    _run(runner, bases, packed, layer, options.piece, [pool.take for pool in pools])
    if not runner.config.rcps and options.strands != "forward":
        reverse = [reverse_complement(one) for one in bases]
        _run(runner, reverse, packed, layer, options.piece, [pool.take_reverse for pool in pools])
    return [pool.result() for pool in pools]


def _run(runner: Runner, bases: list[np.ndarray], packed: bool, layer: int, piece: int, takers: list[Visitor]) -> None:
    """Pass each sequence's hidden states, (S, l, D) from a first position on, to its taker."""
    if len(bases[0]) > piece:
        ids = runner.ids(bases[0][None])
        run_in_pieces(runner.model, ids, piece, {layer: lambda first, states: takers[0](first, states[:, 0])})
        return
    ids = runner.ids(np.concatenate(bases)[None] if packed else np.stack(bases))
    lengths = [len(one) for one in bases]
    starts = None
    if packed:
        starts = torch.zeros_like(ids, dtype=torch.bool)
        starts[0, np.cumsum([0, *lengths[:-1]])] = True
    states = runner.states(ids, layer, starts)
    rows = states[:, 0].split(lengths, 1) if packed else states.unbind(1)
    for take, row in zip(takers, rows, strict=True):
        take(0, row)


class _Pool:
    """Pools a sequence's hidden states, piece by piece; strands are pooled separately and then joined."""

    def __init__(self, options: EmbedOptions, length: int) -> None:
        self.options, self.length = options, length
        self.found: dict[int, Tensor] = {}

    def take(self, first: int, states: Tensor, strand: int = 0) -> None:
        """Take states (S, l, D) of the positions from `first` on, in forward coordinates; `strand`: the number of their
        first strand.
        """
        for number, rows in enumerate(states, start=strand):
            if number == 0 or self.options.strands != "forward":
                self._take_strand(first, rows, number)

    def take_reverse(self, first: int, states: Tensor) -> None:
        """Like `take`, for the reverse complement in its own coordinates, from a model with one stream."""
        self.take(self.length - first - states.shape[1], states.flip(1), strand=1)

    def _take_strand(self, first: int, rows: Tensor, strand: int) -> None:
        pool, before = self.options.pool, self.found.get(strand)
        if pool not in ("max", "base") and not pool.isdecimal():
            start, end = stretch(pool, self.length)
            part = rows[max(start - first, 0) : max(end - first, 0)]
            total = part.sum(0, dtype=torch.float64) / (end - start)
            self.found[strand] = total if before is None else before + total
        elif pool == "max":
            largest = rows.amax(0)
            self.found[strand] = largest if before is None else torch.maximum(before, largest)
        elif pool == "base":
            if before is None:
                before = self.found[strand] = rows.new_empty(self.length, rows.shape[1])
            before[first : first + len(rows)] = rows
        else:
            place = int(pool)
            if first <= place < first + len(rows):
                self.found[strand] = rows[place - first].clone()
        self.dtype = torch.promote_types(rows.dtype, torch.float32)

    def result(self) -> np.ndarray:
        strands = torch.stack([self.found[strand] for strand in sorted(self.found)]).to(self.dtype)
        joined = torch.cat(tuple(strands), -1) if self.options.strands == "concatenate" else strands.mean(0)
        return joined.cpu().numpy()
