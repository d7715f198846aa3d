"""Converts between state dicts of the published Caduceus code (repository kuleshov-group/caduceus) and this package's
model.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from caduceus.config import CaduceusConfig
from caduceus.errors import UserError
from caduceus.hub.published_config import complement, config_from_published, config_to_published, refuse
from caduceus.model.heads import CaduceusForMaskedLM

_MAMBA_NAMES = {
    "in_proj": "in_proj.weight",
    "conv_weight": "conv1d.weight",
    "conv_bias": "conv1d.bias",
    "x_proj": "x_proj.weight",
    "dt_proj": "dt_proj.weight",
    "dt_bias": "dt_proj.bias",
    "A_log": "A_log",
    "D": "D",
    "out_proj": "out_proj.weight",
}
_MAMBA2_NAMES = {
    "in_proj": "in_proj.weight",
    "conv_weight": "conv1d.weight",
    "conv_bias": "conv1d.bias",
    "dt_bias": "dt_bias",
    "A_log": "A_log",
    "D": "D",
    "norm_weight": "norm.weight",
    "out_proj": "out_proj.weight",
}


def from_published(config: dict[str, Any], state_dict: dict[str, Tensor]) -> CaduceusForMaskedLM:
    """This package's model from a published configuration and state dict, with every key accounted for.

    Raises `UserError`, which names the key, for an unknown or unsupported configuration value, for a tensor that is
    missing, unexpected, not floating point or of the wrong shape, and for tied weights that differ.
    """
    ours = config_from_published({"mixer": mixer_of(state_dict), **config})
    model = CaduceusForMaskedLM(ours)
    state = PublishedLayout(ours).checked(model.state_dict(), state_dict)
    model.to(state["embedding.weight"].dtype).load_state_dict(state)
    return model


def mixer_of(state_dict: Iterable[str]) -> str:
    """The mixer of a published state dict; published configurations do not name it."""
    return "mamba2" if any(name.endswith("mamba_fwd.dt_bias") for name in state_dict) else "mamba"


def to_published(model: CaduceusForMaskedLM) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(configuration, state dict) of the published code. A tied weight is under each of its names."""
    return config_to_published(model.config), PublishedLayout(model.config).to_published(model.state_dict())


def hidden_states_to_published(hidden_states: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Hidden states (S, B, L, D) in the published form: (B, L, S·D), the second strand channel-flipped."""
    return tuple(torch.cat([states[0], *(strand.flip(-1) for strand in states[1:])], -1) for states in hidden_states)


class _Entry(NamedTuple):
    ours: str
    index: int | None
    """Row of our tensor that has the published name; None for the whole tensor."""
    published: str


class PublishedLayout:
    """The names of the published state dict for a configuration, and the rows of our stacked tensors for each."""

    def __init__(self, config: CaduceusConfig) -> None:
        self.config = config
        embedding, head = "caduceus.backbone.embeddings.word_embeddings", "lm_head"
        self.embedding = f"{embedding}.embedding.weight" if config.rcps else f"{embedding}.weight"
        self.head = f"{head}.lm_head.weight" if config.rcps else f"{head}.weight"
        self.complement_maps = [f"{module}.complement_map" for module in (embedding, head)] if config.rcps else []

    def to_published(self, ours: dict[str, Tensor]) -> dict[str, Tensor]:
        """Our tensors (parameters or gradients) under published names; no two share memory."""
        published = {}
        for entry in self._entries():
            tensor = ours[entry.ours] if entry.index is None else ours[entry.ours][entry.index]
            published[entry.published] = tensor[:, None] if entry.published.endswith("conv1d.weight") else tensor
        for name, duplicate in self.tied():
            published[duplicate] = published[name]
        for name in self.complement_maps:
            published[name] = torch.tensor(complement(self.config))
        return {name: tensor.detach().clone() for name, tensor in published.items()}

    def from_published(self, published: dict[str, Tensor]) -> dict[str, Tensor]:
        """The reverse of `to_published`."""
        ours: dict[str, Tensor | list[Tensor]] = {}
        for entry in self._entries():
            tensor = published[entry.published]
            if entry.index is None:
                ours[entry.ours] = tensor
            else:
                tensor = tensor.squeeze(1) if entry.published.endswith("conv1d.weight") else tensor
                ours.setdefault(entry.ours, []).append(tensor)
        return {name: torch.stack(value) if isinstance(value, list) else value for name, value in ours.items()}

    def checked(self, ours: dict[str, Tensor], published: dict[str, Tensor]) -> dict[str, Tensor]:
        """`from_published`, after checking every tensor; `ours`: the names and shapes of the result.

        Raises `UserError` for a tensor that is missing, unexpected, not floating point or of the wrong shape, and for
        tied weights that differ.
        """
        expected = self.to_published(ours)
        refuse(expected.keys() - published.keys(), "missing from the state dict")
        refuse(published.keys() - expected.keys(), "in the state dict, but not part of this model")
        for name, tensor in expected.items():
            given = published[name]
            if given.shape != tensor.shape:
                raise UserError(f"{name}: expected shape {list(tensor.shape)}, got {list(given.shape)}")
            if given.is_floating_point() != tensor.is_floating_point():
                raise UserError(f"{name}: expected a tensor like {tensor.dtype}, got {given.dtype}")
        for name, duplicate in self.tied():
            if not torch.equal(published[name], published[duplicate]):
                raise UserError(f"{duplicate}: differs from {name}, to which it should be tied")
        for name in self.complement_maps:
            if not torch.equal(published[name].cpu(), expected[name]):
                raise UserError(f"{name}: not the complement of the vocabulary '{self.config.vocabulary.name}'")
        return self.from_published(published)

    def completed(self, published: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors, with tied weights added under their missing names, and the complement of the alphabet added
        where it is absent.
        """
        filled = {name: torch.tensor(complement(self.config)) for name in self.complement_maps} | published
        for names in self.tied():
            for present, absent in (names, names[::-1]):
                if present in filled:
                    filled.setdefault(absent, filled[present])
        return filled

    def tied(self) -> Iterator[tuple[str, str]]:
        """Yield the pairs of published names of tied weights."""
        yield self.embedding, self.head
        if self._projections_are_tied():
            for layer in range(self.config.n_layer):
                for projection in ("in_proj", "out_proj"):
                    names = [f"{self._mixer(layer)}.mamba_{d}.{projection}.weight" for d in ("fwd", "rev")]
                    yield names[0], names[1]

    def _projections_are_tied(self) -> bool:
        return self.config.bidirectional and self.config.bidirectional_weight_tie

    def _mixer(self, layer: int) -> str:
        return f"caduceus.backbone.layers.{layer}.mixer" + (".submodule" if self.config.rcps else "")

    def _entries(self) -> Iterator[_Entry]:
        wrapper = ".submodule" if self.config.rcps and not self.config.fused_add_norm else ""
        norm_parts = ("weight",) if self.config.rms_norm else ("weight", "bias")
        directions = ("fwd", "rev") if self.config.bidirectional else ("fwd",)
        yield _Entry("embedding.weight", None, self.embedding)
        for part in norm_parts:
            yield _Entry(f"norm_f.{part}", None, f"caduceus.backbone.norm_f{wrapper}.{part}")
        for layer in range(self.config.n_layer):
            for part in norm_parts:
                name = f"caduceus.backbone.layers.{layer}.norm{wrapper}.{part}"
                yield _Entry(f"blocks.{layer}.norm.{part}", None, name)
            for ours, theirs in (_MAMBA2_NAMES if self.config.mixer == "mamba2" else _MAMBA_NAMES).items():
                tied = self._projections_are_tied() and ours in ("in_proj", "out_proj")
                for index, direction in enumerate(directions[:1] if tied else directions):
                    name = f"{self._mixer(layer)}.mamba_{direction}.{theirs}"
                    yield _Entry(f"blocks.{layer}.mixer.{ours}", index, name)
