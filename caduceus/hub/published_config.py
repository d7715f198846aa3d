"""Converts between the configuration of the published Caduceus code (its `config.json`) and this package's."""

import math
from typing import Any

from caduceus.alphabet import CADUCEUS, IGNORE_LABEL, PLANTCAD
from caduceus.config import CaduceusConfig
from caduceus.errors import UserError

_REQUIRED = object()
# Keys that this package has too, with the defaults of the published code.
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
"""Published `vocab_size` -> ours: published checkpoints of Caduceus include the rows that pad the table."""
_PAD_TOKEN_IDS = {CADUCEUS: CADUCEUS.pad, PLANTCAD: IGNORE_LABEL}
"""`pad_token_id` of published configurations, which is the label that published code ignores."""
_SSM_SIZES = {
    "mamba": {"d_state": 16, "d_conv": 4, "expand": 2},
    "mamba2": {"d_state": 128, "d_conv": 4, "expand": 2, "headdim": 64},
}
"""Keys of `ssm_cfg` that this package has too, by mixer."""
FUNCTION_KEYS = {
    *(*_SHARED_KEYS, "vocab_size", "vocab_size_padded", "complement_map", "ssm_cfg"),
    "mixer",  # our own key: the code of PlantCAD2 has one mixer, so its configuration does not name it
    "d_intermediate",
}
"""Keys of a published configuration that decide which function the model computes."""
# Keys about how a model was initialised, saved or is called, which do not change the function.
_SSM_KEYS_WITHOUT_EFFECT = {
    *("dt_min", "dt_max", "dt_init", "dt_scale", "dt_init_floor", "use_fast_path"),
    *("A_init_range", "chunk_size", "use_mem_eff_path"),
}
_SSM_REQUIRED = {
    "mamba2": {
        **{"layer": "Mamba2", "ngroups": 1, "D_has_hdim": False},
        **{"rmsnorm": True, "norm_before_gate": False, "d_ssm": None},
    },
    "mamba": {"layer": "Mamba1"},
}
"""The required values of other keys of `ssm_cfg`, by mixer, where they are given."""
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
    *("conjoin_eval", "conjoin_train", "pooling_strategy"),  # keys of classification heads
    # Keys of transformers' PretrainedConfig in all its versions.
    *("_attn_implementation", "_attn_implementation_autoset", "add_cross_attention", "chunk_size_feed_forward"),
    *("cross_attention_hidden_size", "experts_implementation", "finetuning_task", "id2label", "is_decoder"),
    *("is_encoder_decoder", "label2id", "num_labels", "output_attentions", "prefix", "problem_type", "pruned_heads"),
    *("sep_token_id", "task_specific_params", "tie_encoder_decoder", "tie_word_embeddings", "tokenizer_class"),
    *("bos_token_id", "cls_token_id", "decoder_start_token_id", "eos_token_id", "mask_token_id", "unk_token_id"),
    *("torchscript", "use_bfloat16", "use_cache", "tf_legacy_loss"),
    # Its keys for generation, which no model here does.
    *("bad_words_ids", "begin_suppress_tokens", "diversity_penalty", "do_sample", "early_stopping"),
    *("encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "forced_bos_token_id"),
    *("forced_eos_token_id", "length_penalty", "max_length", "min_length", "no_repeat_ngram_size"),
    *("num_beam_groups", "num_beams", "num_return_sequences", "output_scores", "remove_invalid_values"),
    *("repetition_penalty", "return_dict_in_generate", "suppress_tokens", "temperature", "top_k", "top_p"),
    "typical_p",
}


def config_from_published(published: dict[str, Any]) -> CaduceusConfig:
    """This package's configuration from a published one (`config.json`). Raises `UserError` for unsupported values."""
    for key in ("ssm_cfg", "complement_map"):
        if not isinstance(published.get(key) or {}, dict):
            raise UserError(f"{key}: expected an object of keys and values, got {published[key]!r}")
    ssm = published.get("ssm_cfg") or {}
    known = FUNCTION_KEYS | _KEYS_WITHOUT_EFFECT | {"model_type"}
    refuse(published.keys() - known, "unknown key in the configuration")
    _require(published, "mixer", *_SSM_SIZES)
    mixer = published.get("mixer", "mamba")
    sizes, required = _SSM_SIZES[mixer], {"conv_bias": True, "bias": False, **_SSM_REQUIRED[mixer]}
    rank = {"dt_rank"} if mixer == "mamba" else {"dt_limit"}
    known_ssm = {*sizes, *required, *rank, *_SSM_KEYS_WITHOUT_EFFECT}
    refuse({f"ssm_cfg.{key}" for key in ssm.keys() - known_ssm}, "unknown key in the configuration")

    values = {}
    for source, keys, prefix in ((published, _SHARED_KEYS, ""), (ssm, sizes, "ssm_cfg.")):
        for key, default in keys.items():
            value = source.get(key, default)
            if value is _REQUIRED:
                raise UserError(f"{prefix}{key}: missing from the configuration")
            values[key] = _checked_type(f"{prefix}{key}", value, type(getattr(CaduceusConfig, key)))
    _require(published, "vocab_size", *_VOCAB_SIZES)
    config = CaduceusConfig(**values, mixer=mixer, vocab_size=_VOCAB_SIZES[published.get("vocab_size", 12)])

    _require(published, "model_type", "caduceus")
    _require(published, "vocab_size_padded", config.padded_vocab_size)
    _require(published, "d_intermediate", 0)
    _require(ssm, "dt_rank", "auto", config.dt_rank, prefix="ssm_cfg.")
    for key, value in required.items():
        _require(ssm, key, value, prefix="ssm_cfg.")
    if ssm.get("dt_limit", [0, math.inf]) not in ([0, math.inf], (0, math.inf)):
        raise UserError(f"ssm_cfg.dt_limit: only (0, inf) is supported, got {ssm['dt_limit']!r}")
    given = published.get("complement_map")
    ordered = given and [given.get(str(token), given.get(token)) for token in range(len(given))]
    if given is not None and ordered != complement(config)[: len(given)]:
        raise UserError(f"complement_map: not the complement of the vocabulary '{config.vocabulary.name}'")
    return config


def keys_without_effect(published: dict[str, Any]) -> list[str]:
    """Keys of a published configuration that do not change the function that the model computes."""
    ssm = (published.get("ssm_cfg") or {}).keys() & _SSM_KEYS_WITHOUT_EFFECT
    return sorted(published.keys() & _KEYS_WITHOUT_EFFECT) + sorted(f"ssm_cfg.{key}" for key in ssm)


def config_to_published(config: CaduceusConfig) -> dict[str, Any]:
    """The published configuration of the same function; `config_from_published` converts it back to `config`."""
    sizes = {key: getattr(config, key) for key in _SSM_SIZES[config.mixer]}
    if sizes.get("headdim") == _SSM_SIZES["mamba2"]["headdim"]:
        del sizes["headdim"]  # as in published configurations
    rank = {"dt_rank": "auto"} if config.mixer == "mamba" else {}
    return {
        **{key: getattr(config, key) for key in _SHARED_KEYS},
        "vocab_size": config.vocab_size,
        "vocab_size_padded": config.padded_vocab_size,
        "ssm_cfg": {**sizes, **rank, "conv_bias": True, "bias": False},
        **({"mixer": "mamba2", "d_intermediate": 0} if config.mixer == "mamba2" else {}),
        "complement_map": {str(token): other for token, other in enumerate(complement(config))},
        "pad_token_id": _PAD_TOKEN_IDS[config.vocabulary],
    }


def complement(config: CaduceusConfig) -> list[int]:
    """The complement of every row of the model's table."""
    return config.vocabulary.complement(config.padded_vocab_size).tolist()


def refuse(names: set[str], problem: str) -> None:
    """Raise a `UserError` that names the first two of `names`, if there are any."""
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
