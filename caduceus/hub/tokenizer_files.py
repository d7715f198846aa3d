"""Makes the files from which `AutoTokenizer` makes the tokenizer of an export; it does not need `transformers`."""

import json
from typing import Any

from caduceus.alphabet import PLANTCAD, Vocabulary
from caduceus.hub.remote_code import TOKENIZER

TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER_FILE = "tokenizer.json"


def tokenizer_files(vocabulary: Vocabulary, mode: str, published_repository: str | None) -> dict[str, str]:
    """{file name: content} for this package's tokenizer in `mode`, or for that of a repository of the hub."""
    named = {f"{name}_token": f"[{name.upper()}]" for name in ("bos", "cls", "mask", "pad", "sep", "unk")}
    config: dict[str, Any] = {name: token for name, token in named.items() if token in vocabulary.tokens}
    config["padding_side"] = "right" if vocabulary is PLANTCAD else "left"
    config["clean_up_tokenization_spaces"] = False
    if published_repository is not None and vocabulary is PLANTCAD:
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        config["model_input_names"] = ["input_ids"]  # published models take no attention mask
        return {TOKENIZER_CONFIG: _json(config), TOKENIZER_FILE: _json(_fast_tokenizer(vocabulary))}
    config["tokenizer_class"] = "CaduceusTokenizer"
    if published_repository is not None:
        config["auto_map"] = {"AutoTokenizer": [f"{published_repository}--{TOKENIZER}", None]}
        config["model_max_length"] = 131072
        return {TOKENIZER_CONFIG: _json(config)}
    config["auto_map"] = {"AutoTokenizer": [TOKENIZER, None]}
    return {TOKENIZER_CONFIG: _json({**config, "vocabulary": vocabulary.name, "mode": mode})}


def _fast_tokenizer(vocabulary: Vocabulary) -> dict[str, Any]:
    """The published PlantCAD tokenizer.json: lower case, a token for each letter, [UNK] for each unknown one."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    special = [(number, token) for number, token in enumerate(vocabulary.tokens) if token.startswith("[")]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": number, "content": token, **flags} for number, token in special],
        "normalizer": {"type": "Lowercase"},
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "[UNK]",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {token: number for number, token in enumerate(vocabulary.tokens)},
            "merges": [],
        },
    }


def _json(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=2) + "\n"
