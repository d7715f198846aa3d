"""A model that is ready to run: on its device, in its precision, with a fingerprint of what it computes."""

import hashlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from caduceus.config import CaduceusConfig
from caduceus.distributed.ranks import choose_device
from caduceus.errors import UserError
from caduceus.files import fingerprint
from caduceus.hub import load
from caduceus.model.backbone import Backbone
from caduceus.model.heads import CaduceusForMaskedLM
from caduceus.model.precision import autocast
from caduceus.ops.backends import check_backend


class Runner:
    """A trained model, its device and precision, and how bases become batches.

    model: a model in memory, or a folder that `caduceus.hub.load` takes. device: auto, cpu or cuda. precision: fp32
    (that of the weights) or bf16.
    """

    def __init__(self, model: CaduceusForMaskedLM | str | Path, device: str = "auto", precision: str = "fp32") -> None:
        self.device = choose_device(device)
        self.model = (model if isinstance(model, CaduceusForMaskedLM) else load(model)).to(self.device).eval()
        self.precision = precision
        dtype = next(self.model.parameters()).dtype
        check_backend(self.model.backend, self.device, dtype, self.config)

    @property
    def config(self) -> CaduceusConfig:
        return self.model.config

    def autocast(self) -> AbstractContextManager:
        """The context in which to run the model."""
        return autocast(self.device, self.precision)

    def origin(self) -> dict[str, str]:
        """The values that decide the model's numbers, for the record of how a result was made."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(name.encode() + tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return {
            "weights_sha256": digest.hexdigest(),
            "config": fingerprint(asdict(self.config)),
            "precision": self.precision,
        }

    def batch_bases(self, asked: int | None) -> int:
        """Bases of a batch: `asked`, or the number that suits the device: it fits the caches of a CPU, or
        fills a GPU.
        """
        return asked or (16_384 if self.device.type == "cpu" else 524_288)

    def ids(self, bases: np.ndarray) -> Tensor:
        """Token ids (…) int64, on the device, of ASCII bases (…) uint8."""
        return torch.from_numpy(self.config.vocabulary.encode(bases).astype(np.int64)).to(self.device)

    def batches(self, lengths: list[int], most: int, longest: int) -> Iterator[tuple[list[int], bool]]:
        """Which sequences to run together, in their order, and whether to pack them into one row.

        Together they have at most `most` bases, or it is a single one; sequences longer than `longest` are run alone.
        """
        batch: list[int] = []
        for number, length in enumerate(lengths):
            total = sum(lengths[one] for one in batch)
            if batch and (total + length > most or length > longest):
                yield batch, len({lengths[one] for one in batch}) > 1
                batch = []
            batch.append(number)
            if length > longest:
                yield batch, False
                batch = []
        if batch:
            yield batch, len({lengths[one] for one in batch}) > 1

    def states(self, ids: Tensor, layer: int, starts: Tensor | None = None) -> Tensor:
        """The hidden states of `layer` (0 … n_layer; the last is the final norm), (S, B, L, D), in forward
        coordinates.
        """
        output = Backbone.forward(self.model, ids, layer < self.config.n_layer, starts=starts)
        if layer < self.config.n_layer:
            return output.hidden_states[layer]
        return self.model.by_strand(output.held)


def layer_number(layer: int, config: CaduceusConfig) -> int:
    """A layer as one of 0 … n_layer; negative numbers count from the end. Raises `UserError` where there is no such
    layer.
    """
    number = layer + config.n_layer + 1 if layer < 0 else layer
    if not 0 <= number <= config.n_layer:
        raise UserError(f"--layer: the model has 0 (embedding) to {config.n_layer} (final norm), got {layer}")
    return number
