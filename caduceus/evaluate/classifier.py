"""Networks with a few outputs per sequence: a Caduceus with a head, and a small CNN for comparison.

Shapes: B sequences, L length, D d_model, O outputs.
"""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from caduceus.alphabet import reverse_complement
from caduceus.errors import UserError
from caduceus.evaluate.labelled import Task
from caduceus.evaluate.pools import check_pool, stretch
from caduceus.files import dump_json, replacing_directory
from caduceus.hub import load, save_imported
from caduceus.model.backbone import Backbone
from caduceus.model.heads import CaduceusForMaskedLM
from caduceus.patience import is_file

_HEAD, _TASK, _MODEL = "head.safetensors", "task.json", "writing"


class SequenceModel(nn.Module):
    """A Caduceus whose last hidden states are pooled over a sequence and mapped to outputs by one linear layer.

    A Caduceus-PS averages the outputs of both strands, in training too, and so gives the same outputs for a sequence
    and its reverse complement by construction. Other models see one strand in training; otherwise their outputs on both
    strands are averaged ("post-hoc"), as in the published protocol. With outputs per base there is no pooling.
    """

    def __init__(self, backbone: CaduceusForMaskedLM, task: Task, pool: str) -> None:
        super().__init__()
        if not task.per_base:
            check_pool(pool)
        self.backbone, self.task, self.pool = backbone, task, pool
        self.head = nn.Linear(backbone.config.d_model, task.outputs)

    def forward(self, sequences: list[np.ndarray]) -> Tensor:
        """ASCII sequences of any lengths -> (B, O), or per base (B, L, O), where L is the longest length."""
        outputs = self._strands(sequences).mean(0)
        if self.training or self.backbone.config.rcps:
            return outputs
        reverse = self._strands([reverse_complement(bases) for bases in sequences], reverse=True)[0]
        return (outputs + (mirrored(reverse, sequences, self.task.bin) if self.task.per_base else reverse)) / 2

    def _strands(self, sequences: list[np.ndarray], reverse: bool = False) -> Tensor:
        """Outputs of S strands, (S, B, O), per base (S, B, L, O), per bin (S, B, L / bin, O).

        reverse: the sequences are reverse complements, in which the centre is mirrored.
        """
        device = self.head.weight.device
        lengths = torch.tensor([len(bases) for bases in sequences], device=device)
        longest, vocabulary = int(lengths.max()), self.backbone.config.vocabulary
        ids = np.full((len(sequences), longest), vocabulary.pad, dtype=np.int64)
        for row, bases in enumerate(sequences):
            ids[row, : len(bases)] = vocabulary.encode(bases)
        padding = torch.arange(longest, device=device) >= lengths[:, None]
        some = bool(padding.any())
        held = Backbone.forward(self.backbone, torch.from_numpy(ids).to(device), pad_mask=padding if some else None)
        states = self.backbone.by_strand(held.held).to(self.head.weight.dtype)
        if self.task.per_base:
            return self.head(by_bin(states, self.task.bin))
        return self.head(self._pooled(states, padding, lengths, reverse))

    def _pooled(self, states: Tensor, padding: Tensor, lengths: Tensor, reverse: bool) -> Tensor:
        """(S, B, L, D) -> (S, B, D)"""
        if self.pool == "max":
            return states.masked_fill(padding[..., None], -torch.inf).amax(2)
        sizes = lengths.tolist()
        ends = [stretch(self.pool, size) for size in sizes]
        if reverse:
            ends = [(size - end, size - start) for size, (start, end) in zip(sizes, ends, strict=True)]
        first, last = torch.tensor(ends, device=lengths.device).T[..., None]
        places = torch.arange(padding.shape[1], device=lengths.device)
        outside = (places < first) | (places >= last)
        return states.masked_fill(outside[..., None], 0).sum(2) / (last - first)

    def save(self, folder: str | Path, made_from: dict[str, Any]) -> None:
        """Write a folder for `load`: the backbone, which `caduceus.hub.load` reads too, the head and the task."""
        with replacing_directory(folder) as writing:
            save_imported(self.backbone, writing / _MODEL)
            for path in (writing / _MODEL).iterdir():
                path.rename(writing / path.name)
            (writing / _MODEL).rmdir()
            save_file({name: tensor.cpu() for name, tensor in self.head.state_dict().items()}, writing / _HEAD)
            values = {"task": self.task.to_json(), "pool": self.pool, "made_from": made_from}
            (writing / _TASK).write_bytes(dump_json(values))

    @classmethod
    def load(cls, folder: str | Path) -> "SequenceModel":
        """The model of a folder that `save` wrote. Raises `UserError` for another folder."""
        folder = Path(folder)
        if not is_file(folder / _TASK):
            raise UserError(f"{folder}: not a fine-tuned model ({_TASK} is missing); finetune writes one to OUT/model")
        try:
            values = json.loads((folder / _TASK).read_bytes())
            model = cls(load(folder), Task.from_json(values["task"]), values["pool"])
            model.head.load_state_dict(load_file(folder / _HEAD))
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise UserError(f"{folder}: not a fine-tuned model ({' '.join(str(error).split())[:200]})") from None
        return model


def by_bin(states: Tensor, bin_: int) -> Tensor:
    """Means (…, L / bin, D) of the bases of each bin, of states (…, L, D)."""
    if bin_ == 1:
        return states
    if states.shape[-2] % bin_:
        raise UserError(f"a sequence has {states.shape[-2]:,} bases; this model takes multiples of {bin_}, its bin")
    return states.unflatten(-2, (-1, bin_)).mean(-2)


def mirrored(outputs: Tensor, sequences: list[np.ndarray], bin_: int) -> Tensor:
    """Outputs (B, L / bin, O) of reverse complements, moved to the positions of the sequences themselves."""
    turned = outputs.clone()
    for row, bases in enumerate(sequences):
        count = len(bases) // bin_
        turned[row, :count] = outputs[row, :count].flip(0)
    return turned


class HeadOnly(nn.Module):
    """The head of a `SequenceModel`, on precomputed embeddings of both strands, (2 D,) or (L, 2 D) each."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.head = head

    def forward(self, rows: list[np.ndarray]) -> Tensor:
        """Outputs (B, O), averaged over strands."""
        tensors = [torch.from_numpy(row).to(self.head.weight) for row in rows]
        features = nn.utils.rnn.pad_sequence(tensors, batch_first=True)
        return self.head(features.unflatten(-1, (2, -1))).mean(-2)


class Cnn(nn.Module):
    """A small convolutional network on one-hot bases, without pre-training; it averages both strands."""

    def __init__(self, task: Task, channels: int = 64) -> None:
        super().__init__()
        self.task = task
        widths = (4, channels, channels, channels)
        self.layers = nn.ModuleList(nn.Conv1d(a, b, 9, padding=4) for a, b in itertools.pairwise(widths))
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for _ in self.layers)
        self.head = nn.Linear(channels if task.per_base else 2 * channels, task.outputs)

    def forward(self, sequences: list[np.ndarray]) -> Tensor:
        """ASCII sequences of any lengths -> (B, O), or per base (B, L, O)."""
        reverse = self._strand([reverse_complement(bases) for bases in sequences])
        turned = mirrored(reverse, sequences, self.task.bin) if self.task.per_base else reverse
        return (self._strand(sequences) + turned) / 2

    def _strand(self, sequences: list[np.ndarray]) -> Tensor:
        longest = max(map(len, sequences))
        rows = np.full((len(sequences), longest), ord("-"), dtype=np.uint8)
        for row, bases in enumerate(sequences):
            rows[row, : len(bases)] = bases
        one_hot = np.stack([rows == ord(base) for base in "ACGT"], 1)
        x = torch.from_numpy(one_hot).to(self.head.weight)
        there = torch.from_numpy(rows != ord("-")).to(x)[:, None]
        for layer, norm in zip(self.layers, self.norms, strict=True):
            y = F.gelu(norm(layer(x).mT)).mT * there
            x = x + y if x.shape == y.shape else y
        if self.task.per_base:
            return self.head(by_bin(x.mT, self.task.bin))
        mean, largest = x.sum(2) / there.sum(2), x.masked_fill(there == 0, -torch.inf).amax(2)
        return self.head(torch.cat([mean, largest], 1))
