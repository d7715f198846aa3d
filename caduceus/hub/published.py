"""Configuration and state dict of the published Caduceus code (repository kuleshov-group/caduceus) <-> our model."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from caduceus.alphabet import CADUCEUS, IGNORE_LABEL, PLANTCAD
from caduceus.config import CaduceusConfig
from caduceus.errors import UserError
from caduceus.model.heads import CaduceusForMaskedLM

_REQUIRED = object()
# Keys that are ours too, with the defaults of the published code.
_SHARED_KEYS = {
    "d_model": _REQUIRED,
    "n_layer": _REQUIRED,
    "rms_norm": True,
    "fused_add_norm": True,
    "residual_in_fp32": True,
    "pad_vocab_size_multiple": 8,
    "norm_epsilon": 1e-5,
    "bidirectional": True,
    "bidirectional_strategy": "add",
    "bidirectional_weight_tie": True,
    "rcps": False,
}
_VOCAB_SIZES = {12: 12, 16: 12, 8: 8}
"""Ours for each published `vocab_size`: published checkpoints of Caduceus count the rows that pad its table."""
_PAD_TOKEN_IDS = {CADUCEUS: CADUCEUS.pad, PLANTCAD: IGNORE_LABEL}
"""`pad_token_id` of published configurations, which is the label that published code ignores."""
_SSM_SIZES = {"d_state": 16, "d_conv": 4, "expand": 2}
# Keys that say how a model was initialised, saved or is called, not which function it is.
_SSM_KEYS_WITHOUT_EFFECT = {"dt_min", "dt_max", "dt_init", "dt_scale", "dt_init_floor", "use_fast_path"}
_KEYS_WITHOUT_EFFECT = {
    "_name_or_path",
    "_commit_hash",
    "architectures",
    "auto_map",
    "dtype",
    "gradient_checkpointing_stride",
    "initializer_cfg",
    "output_hidden_states",
    "pad_token_id",
    "return_dict",
    "torch_dtype",
    "transformers_version",
}
_MIXER_NAMES = {
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


def from_published(config: dict[str, Any], state_dict: dict[str, Tensor]) -> CaduceusForMaskedLM:
    """Our model from a published configuration and state dict, every key accounted for.

    Raises `UserError` naming the key for a configuration value that is unknown or unsupported, for a tensor that is
    missing, too many, not floating point or of the wrong shape, and for tied weights that differ.
    """
    model = CaduceusForMaskedLM(config_from_published(config))
    layout = PublishedLayout(model.config)
    expected = layout.to_published(model.state_dict())
    _refuse(expected.keys() - state_dict.keys(), "missing from the state dict")
    _refuse(state_dict.keys() - expected.keys(), "in the state dict, but not part of this model")
    for name, tensor in expected.items():
        given = state_dict[name]
        if given.shape != tensor.shape:
            raise UserError(f"{name}: expected shape {list(tensor.shape)}, got {list(given.shape)}")
        if given.is_floating_point() != tensor.is_floating_point():
            raise UserError(f"{name}: expected a tensor like {tensor.dtype}, got {given.dtype}")
    for name, duplicate in layout.tied():
        if not torch.equal(state_dict[name], state_dict[duplicate]):
            raise UserError(f"{duplicate}: differs from {name}, to which it should be tied")
    for name in layout.complement_maps:
        if not torch.equal(state_dict[name].cpu(), expected[name]):
            raise UserError(f"{name}: not the complement of the vocabulary '{model.config.vocabulary.name}'")
    model.to(state_dict[layout.embedding].dtype).load_state_dict(layout.from_published(state_dict))
    return model


def to_published(model: CaduceusForMaskedLM) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(configuration, state dict) of the published code. A tied weight stands under each of its names."""
    return config_to_published(model.config), PublishedLayout(model.config).to_published(model.state_dict())


def hidden_states_to_published(hidden_states: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Hidden states (S, B, L, D) as published code gives them: (B, L, S·D), the second strand channel-flipped."""
    return tuple(torch.cat([states[0], *(strand.flip(-1) for strand in states[1:])], -1) for states in hidden_states)


def config_from_published(published: dict[str, Any]) -> CaduceusConfig:
    """Our configuration from a published one (`config.json`); `UserError` for what we cannot honour."""
    ssm = published.get("ssm_cfg") or {}
    known = {"model_type", "vocab_size", "vocab_size_padded", "complement_map", "ssm_cfg"}
    _refuse(published.keys() - _SHARED_KEYS.keys() - _KEYS_WITHOUT_EFFECT - known, "unknown key in the configuration")
    known_ssm = {*_SSM_SIZES, *_SSM_KEYS_WITHOUT_EFFECT, "dt_rank", "conv_bias", "bias"}
    _refuse({f"ssm_cfg.{key}" for key in ssm.keys() - known_ssm}, "unknown key in the configuration")

    values = {}
    for source, keys, prefix in ((published, _SHARED_KEYS, ""), (ssm, _SSM_SIZES, "ssm_cfg.")):
        for key, default in keys.items():
            value = source.get(key, default)
            if value is _REQUIRED:
                raise UserError(f"{prefix}{key}: missing from the configuration")
            values[key] = _checked_type(f"{prefix}{key}", value, type(getattr(CaduceusConfig, key)))
    _require(published, "vocab_size", *_VOCAB_SIZES)
    config = CaduceusConfig(**values, vocab_size=_VOCAB_SIZES[published.get("vocab_size", 12)])

    complement = _complement(config)
    _require(published, "model_type", "caduceus")
    _require(published, "vocab_size_padded", config.padded_vocab_size)
    _require(ssm, "dt_rank", "auto", config.dt_rank, prefix="ssm_cfg.")
    _require(ssm, "conv_bias", True, prefix="ssm_cfg.")
    _require(ssm, "bias", False, prefix="ssm_cfg.")
    given = published.get("complement_map")
    if given is not None and [given.get(str(i), given.get(i)) for i in range(len(given))] != complement[: len(given)]:
        raise UserError(f"complement_map: not the complement of the vocabulary '{config.vocabulary.name}'")
    return config


def config_to_published(config: CaduceusConfig) -> dict[str, Any]:
    """The published configuration of the same function; `config_from_published` gives `config` back."""
    sizes = {key: getattr(config, key) for key in _SSM_SIZES}
    return {
        **{key: getattr(config, key) for key in _SHARED_KEYS},
        "vocab_size": config.vocab_size,
        "vocab_size_padded": config.padded_vocab_size,
        "ssm_cfg": {**sizes, "dt_rank": "auto", "conv_bias": True, "bias": False},
        "complement_map": {str(token): other for token, other in enumerate(_complement(config))},
        "pad_token_id": _PAD_TOKEN_IDS[config.vocabulary],
    }


class _Entry(NamedTuple):
    ours: str
    index: int | None
    """Row of our tensor that stands under the published name; None for all of it."""
    published: str


class PublishedLayout:
    """Names of the published state dict for one configuration, and where our stacked tensors stand in it."""

    def __init__(self, config: CaduceusConfig) -> None:
        self.config = config
        embedding, head = "caduceus.backbone.embeddings.word_embeddings", "lm_head"
        self.embedding = f"{embedding}.embedding.weight" if config.rcps else f"{embedding}.weight"
        self.head = f"{head}.lm_head.weight" if config.rcps else f"{head}.weight"
        self.complement_maps = [f"{module}.complement_map" for module in (embedding, head)] if config.rcps else []

    def to_published(self, ours: dict[str, Tensor]) -> dict[str, Tensor]:
        """Our tensors, of the parameters or of their gradients, under published names; no two share memory."""
        published = {}
        for entry in self._entries():
            tensor = ours[entry.ours] if entry.index is None else ours[entry.ours][entry.index]
            published[entry.published] = tensor[:, None] if entry.published.endswith("conv1d.weight") else tensor
        for name, duplicate in self.tied():
            published[duplicate] = published[name]
        for name in self.complement_maps:
            published[name] = torch.tensor(_complement(self.config))
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

    def with_tied_names(self, published: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same with every tied weight that stands under one of its names put under the other one too."""
        filled = dict(published)
        for names in self.tied():
            for present, absent in (names, names[::-1]):
                if present in filled:
                    filled.setdefault(absent, filled[present])
        return filled

    def tied(self) -> Iterator[tuple[str, str]]:
        """Pairs of published names of one weight."""
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
            for ours, theirs in _MIXER_NAMES.items():
                tied = self._projections_are_tied() and ours in ("in_proj", "out_proj")
                for index, direction in enumerate(directions[:1] if tied else directions):
                    name = f"{self._mixer(layer)}.mamba_{direction}.{theirs}"
                    yield _Entry(f"blocks.{layer}.mixer.{ours}", index, name)


def _complement(config: CaduceusConfig) -> list[int]:
    return config.vocabulary.complement(config.padded_vocab_size).tolist()


def _refuse(names: set[str], problem: str) -> None:
    if names:
        first, *rest = sorted(names)
        raise UserError(f"{first}: {problem}" + (f" (and {len(rest)} more, such as {rest[0]})" if rest else ""))


def _checked_type(key: str, value: Any, expected: type) -> Any:
    if key == "bidirectional_strategy" and value is None:
        return "add"
    if expected is float and type(value) is int:
        return float(value)
    if type(value) is not expected:
        raise UserError(f"{key}: expected {expected.__name__}, got {value!r}")
    return value


def _require(values: dict[str, Any], key: str, *allowed: Any, prefix: str = "") -> None:
    if key in values and values[key] not in allowed:
        raise UserError(f"{prefix}{key}: only {' or '.join(map(repr, allowed))} is supported, got {values[key]!r}")
