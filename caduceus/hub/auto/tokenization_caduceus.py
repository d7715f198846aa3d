"""Bases -> token ids for `transformers`, as fast as memory: a table of bytes instead of a search for words.

Any letter is one token, upper or lower case; U is T. `mode="plain"` shows a sequence as pre-training does: N and other
IUPAC codes by the rule of the vocabulary, nothing appended. `mode="published"` is the published Caduceus tokenizer: N
has the token N, and a sequence ends with [SEP]. Special tokens may stand in a string, as in `ACG[MASK]T`.
"""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import BatchEncoding, PreTrainedTokenizer

from caduceus.alphabet import CADUCEUS, VOCABULARIES

_BY_NAME = {vocabulary.name: vocabulary for vocabulary in VOCABULARIES.values()}
MODES = ("plain", "published")


class CaduceusTokenizer(PreTrainedTokenizer):
    """Tokens of a published vocabulary: `caduceus` or `plantcad`. Pads as published: left, and right for PlantCAD."""

    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012 (as of transformers)

    def __init__(self, vocabulary: str = CADUCEUS.name, mode: str = "plain", **options: Any) -> None:
        if vocabulary not in _BY_NAME:
            raise ValueError(f"vocabulary: choose one of {', '.join(_BY_NAME)}; got {vocabulary!r}")
        if mode not in MODES:
            raise ValueError(f"mode: choose one of {', '.join(MODES)}; got {mode!r}")
        self.vocabulary, self.alphabet, self.mode = vocabulary, _BY_NAME[vocabulary], mode
        tokens = self.alphabet.tokens
        self._ids = {token: number for number, token in enumerate(tokens)}
        self._of_byte = self.alphabet.of_byte.copy()
        for byte in b"Uu":
            self._of_byte[byte] = self.alphabet.bases[3]
        if mode == "published" and "N" in tokens:
            for byte in b"Nn":
                self._of_byte[byte] = tokens.index("N")
        self._end = [tokens.index("[SEP]")] if mode == "published" and "[SEP]" in tokens else []
        self._special = re.compile("(" + "|".join(re.escape(token) for token in tokens if token[0] == "[") + ")")
        for name in ("bos", "cls", "mask", "pad", "sep", "unk"):
            if (token := f"[{name.upper()}]") in tokens:
                options.setdefault(f"{name}_token", token)
        options.setdefault("padding_side", "left" if self.alphabet is CADUCEUS else "right")
        super().__init__(vocabulary=vocabulary, mode=mode, **options)

    @property
    def vocab_size(self) -> int:
        """Tokens that have a name."""
        return len(self.alphabet.tokens)

    def get_vocab(self) -> dict[str, int]:
        """Ids by token."""
        return dict(self._ids)

    def token_ids(self, text: str) -> np.ndarray:
        """Ids (L,) uint8 of a string's bases and special tokens, with nothing appended."""
        if "[" not in text:
            return self._of_byte[np.frombuffer(text.encode("ascii", "replace"), np.uint8)]
        parts = [
            np.array([self._ids[part]], np.uint8)
            if part in self._ids and part[0] == "["
            else self._of_byte[np.frombuffer(part.encode("ascii", "replace"), np.uint8)]
            for part in self._special.split(text)
            if part
        ]
        return np.concatenate(parts)

    def __call__(
        self,
        text: str | Sequence[str],
        text_pair: None = None,
        add_special_tokens: bool = True,
        padding: bool | str = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        return_tensors: str | None = None,
        **options: Any,
    ) -> BatchEncoding:
        """Tokens of a string or several, as in `transformers`; a sequence is never cut into overlapping pieces."""
        if text_pair is not None or options.get("return_overflowing_tokens"):
            raise ValueError("text_pair, return_overflowing_tokens: a sequence of DNA has no second part")
        is_batch = not isinstance(text, str)
        rows = [self.token_ids(one) for one in (text if is_batch else [text])]
        end = np.array(self._end if add_special_tokens else [], np.uint8)
        if truncation and str(truncation) not in ("False", "do_not_truncate"):
            most = (max_length or self.model_max_length) - len(end)
            rows = [row[:most] for row in rows]
        rows = [np.concatenate([row, end]) for row in rows] if len(end) else rows
        lengths = [len(row) for row in rows]
        wanted = self._padded_length(lengths, padding, max_length, options.get("pad_to_multiple_of"))
        if wanted:
            rows = [self._padded(row, wanted, options.get("padding_side")) for row in rows]
        found: dict[str, Any] = {"input_ids": rows}
        if options.get("return_attention_mask", "attention_mask" in self.model_input_names) is not False:
            side = options.get("padding_side")
            ones = (np.ones(length, np.uint8) for length in lengths)
            found["attention_mask"] = [self._padded(one, wanted, side, 0) if wanted else one for one in ones]
        if options.get("return_special_tokens_mask"):
            special = np.isin(np.arange(256), self.all_special_ids).astype(np.uint8)
            found["special_tokens_mask"] = [special[row] for row in rows]
        return self._as_encoding(found, is_batch, return_tensors)

    def encode(self, text: str, text_pair: None = None, add_special_tokens: bool = True, **options: Any) -> Any:
        """The ids of one string."""
        return self(text, text_pair, add_special_tokens, **options)["input_ids"]

    def _padded_length(
        self, lengths: list[int], padding: bool | str, max_length: int | None, multiple: int | None
    ) -> int:
        """Positions of a padded row; 0 where nothing is to be padded."""
        if padding is False or str(padding) == "do_not_pad" or not lengths:
            return 0
        if str(getattr(padding, "value", padding)) == "max_length":
            length = max_length or self.model_max_length
        else:
            length = max(lengths)
        return -(-length // multiple) * multiple if multiple else length

    def _padded(self, row: np.ndarray, length: int, side: str | None, value: int | None = None) -> np.ndarray:
        missing = max(length - len(row), 0)
        widths = (missing, 0) if (side or self.padding_side) == "left" else (0, missing)
        return np.pad(row, widths, constant_values=self.pad_token_id if value is None else value)

    def _as_encoding(
        self, found: dict[str, list[np.ndarray]], is_batch: bool, return_tensors: str | None
    ) -> BatchEncoding:
        kind = str(getattr(return_tensors, "value", return_tensors))
        if kind == "None":
            lists = {name: [row.tolist() for row in rows] for name, rows in found.items()}
            return BatchEncoding(lists if is_batch else {name: rows[0] for name, rows in lists.items()})
        if len({len(row) for row in found["input_ids"]}) > 1:
            raise ValueError("return_tensors: sequences differ in length; give padding=True")
        return BatchEncoding({name: _as_matrix(rows) for name, rows in found.items()}, tensor_type=kind)

    def _tokenize(self, text: str, **options: Any) -> list[str]:
        return [self.alphabet.tokens[number] for number in self.token_ids(text).tolist()]

    def _convert_token_to_id(self, token: str) -> int:
        if len(token) == 1:
            return int(self._of_byte[ord(token)]) if token.isascii() else self.alphabet.unk
        return self._ids.get(token, self.alphabet.unk)

    def _convert_id_to_token(self, index: int) -> str:
        """Rows that only pad the table have no name of their own."""
        return self.alphabet.tokens[index] if index < self.vocab_size else "[UNK]"

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens)

    def _decode(self, token_ids: int | list[int], skip_special_tokens: bool = False, **options: Any) -> str:
        ids = [token_ids] if isinstance(token_ids, int) else list(token_ids)
        skipped = set(self.all_special_ids) if skip_special_tokens else set()
        return "".join(self._convert_id_to_token(int(number)) for number in ids if int(number) not in skipped)

    def build_inputs_with_special_tokens(self, token_ids_0: list[int], token_ids_1: None = None) -> list[int]:
        return [*token_ids_0, *self._end]

    def get_special_tokens_mask(
        self, token_ids_0: list[int], token_ids_1: None = None, already_has_special_tokens: bool = False
    ) -> list[int]:
        special = set(self.all_special_ids)
        mask = [int(number in special) for number in token_ids_0]
        return mask if already_has_special_tokens else [*mask, *(1 for _ in self._end)]

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        return len(self._end)

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple:
        """Nothing: the vocabulary is fixed, and its name stands in tokenizer_config.json."""
        return ()


def _as_matrix(rows: list[np.ndarray]) -> np.ndarray:
    """Rows of one length as (B, L) int64, each written once."""
    matrix = np.empty((len(rows), len(rows[0]) if rows else 0), np.int64)
    for number, row in enumerate(rows):
        matrix[number] = row
    return matrix
