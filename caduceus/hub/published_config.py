"""Configuration of the published Caduceus code (its `config.json`) <-> ours."""

from typing import Any

from caduceus.alphabet import CADUCEUS, IGNORE_LABEL, PLANTCAD
from caduceus.config import CaduceusConfig
from caduceus.errors import UserError

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
FUNCTION_KEYS = {*_SHARED_KEYS, "vocab_size", "vocab_size_padded", "complement_map", "ssm_cfg"}
"""Keys of a published configuration that say which function the model is."""
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
    *("conjoin_eval", "conjoin_train", "pooling_strategy"),  # of heads that classify
    # What transformers' PretrainedConfig has had over its versions.
    *("_attn_implementation", "_attn_implementation_autoset", "add_cross_attention", "chunk_size_feed_forward"),
    *("cross_attention_hidden_size", "experts_implementation", "finetuning_task", "id2label", "is_decoder"),
    *("is_encoder_decoder", "label2id", "num_labels", "output_attentions", "prefix", "problem_type", "pruned_heads"),
    *("sep_token_id", "task_specific_params", "tie_encoder_decoder", "tie_word_embeddings", "tokenizer_class"),
    *("bos_token_id", "cls_token_id", "decoder_start_token_id", "eos_token_id", "mask_token_id", "unk_token_id"),
    *("torchscript", "use_bfloat16", "use_cache", "tf_legacy_loss"),
    # What it has had of generation, which no model here does.
    *("bad_words_ids", "begin_suppress_tokens", "diversity_penalty", "do_sample", "early_stopping"),
    *("encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "forced_bos_token_id"),
    *("forced_eos_token_id", "length_penalty", "max_length", "min_length", "no_repeat_ngram_size"),
    *("num_beam_groups", "num_beams", "num_return_sequences", "output_scores", "remove_invalid_values"),
    *("repetition_penalty", "return_dict_in_generate", "suppress_tokens", "temperature", "top_k", "top_p"),
    "typical_p",
}


def config_from_published(published: dict[str, Any]) -> CaduceusConfig:
    """Our configuration from a published one (`config.json`); `UserError` for what we cannot honour."""
    ssm = published.get("ssm_cfg") or {}
    known = FUNCTION_KEYS | _KEYS_WITHOUT_EFFECT | {"model_type"}
    refuse(published.keys() - known, "unknown key in the configuration")
    known_ssm = {*_SSM_SIZES, *_SSM_KEYS_WITHOUT_EFFECT, "dt_rank", "conv_bias", "bias"}
    refuse({f"ssm_cfg.{key}" for key in ssm.keys() - known_ssm}, "unknown key in the configuration")

    values = {}
    for source, keys, prefix in ((published, _SHARED_KEYS, ""), (ssm, _SSM_SIZES, "ssm_cfg.")):
        for key, default in keys.items():
            value = source.get(key, default)
            if value is _REQUIRED:
                raise UserError(f"{prefix}{key}: missing from the configuration")
            values[key] = _checked_type(f"{prefix}{key}", value, type(getattr(CaduceusConfig, key)))
    _require(published, "vocab_size", *_VOCAB_SIZES)
    config = CaduceusConfig(**values, vocab_size=_VOCAB_SIZES[published.get("vocab_size", 12)])

    _require(published, "model_type", "caduceus")
    _require(published, "vocab_size_padded", config.padded_vocab_size)
    _require(ssm, "dt_rank", "auto", config.dt_rank, prefix="ssm_cfg.")
    _require(ssm, "conv_bias", True, prefix="ssm_cfg.")
    _require(ssm, "bias", False, prefix="ssm_cfg.")
    given = published.get("complement_map")
    ordered = given and [given.get(str(token), given.get(token)) for token in range(len(given))]
    if given is not None and ordered != complement(config)[: len(given)]:
        raise UserError(f"complement_map: not the complement of the vocabulary '{config.vocabulary.name}'")
    return config


def keys_without_effect(published: dict[str, Any]) -> list[str]:
    """Keys of a published configuration that do not change which function the model is."""
    ssm = (published.get("ssm_cfg") or {}).keys() & _SSM_KEYS_WITHOUT_EFFECT
    return sorted(published.keys() & _KEYS_WITHOUT_EFFECT) + sorted(f"ssm_cfg.{key}" for key in ssm)


def config_to_published(config: CaduceusConfig) -> dict[str, Any]:
    """The published configuration of the same function; `config_from_published` gives `config` back."""
    sizes = {key: getattr(config, key) for key in _SSM_SIZES}
    return {
        **{key: getattr(config, key) for key in _SHARED_KEYS},
        "vocab_size": config.vocab_size,
        "vocab_size_padded": config.padded_vocab_size,
        "ssm_cfg": {**sizes, "dt_rank": "auto", "conv_bias": True, "bias": False},
        "complement_map": {str(token): other for token, other in enumerate(complement(config))},
        "pad_token_id": _PAD_TOKEN_IDS[config.vocabulary],
    }


def complement(config: CaduceusConfig) -> list[int]:
    """The complement of every row of the model's table."""
    return config.vocabulary.complement(config.padded_vocab_size).tolist()


def refuse(names: set[str], problem: str) -> None:
    """A `UserError` that names the first two of `names`, where there are any."""
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
