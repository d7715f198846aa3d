"""The tokenizer for `transformers`: a table of bytes instead of a search for words, so that it is as fast as memory.

Every letter is one token, in upper or lower case; U counts as T. `mode="plain"` encodes a sequence as in pre-training:
N and other IUPAC codes by the rule of the vocabulary, nothing appended. `mode="published"` is the published Caduceus
tokenizer: N has the token N, and a sequence ends with [SEP]. A string may contain special tokens, as in `ACG[MASK]T`.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import BatchEncoding, PreTrainedTokenizer

from caduceus.alphabet import CADUCEUS, VOCABULARIES

_BY_NAME = {vocabulary.name: vocabulary for vocabulary in VOCABULARIES.values()}
MODES = ("plain", "published")


class CaduceusTokenizer(PreTrainedTokenizer):
    """The tokenizer of a published vocabulary: `caduceus` or `plantcad`. It pads as published: on the left, for
    PlantCAD on the right.
    """

    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012 (as in transformers)

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
        self._table = self._of_byte.tobytes()
        self._end = [tokens.index("[SEP]")] if mode == "published" and "[SEP]" in tokens else []
        self._special = re.compile("(" + "|".join(re.escape(token) for token in tokens if token[0] == "[") + ")")
        for name in ("bos", "cls", "mask", "pad", "sep", "unk"):
            if (token := f"[{name.upper()}]") in tokens:
                options.setdefault(f"{name}_token", token)
        options.setdefault("padding_side", "left" if self.alphabet is CADUCEUS else "right")
        super().__init__(vocabulary=vocabulary, mode=mode, **options)

    @property
    def vocab_size(self) -> int:
        """Number of tokens that have a name."""
        return len(self.alphabet.tokens)

    def get_vocab(self) -> dict[str, int]:
        """{token: id}."""
        return dict(self._ids)

    def token_ids(self, text: str) -> np.ndarray:
        """Ids (L,) uint8 of a string's bases and special tokens, without appended ones."""
        if "[" not in text:
            return np.frombuffer(text.encode("ascii", "replace").translate(self._table), np.uint8)
        parts = [
            bytes([self._ids[part]])
            if part in self._ids and part[0] == "["
            else part.encode("ascii", "replace").translate(self._table)
            for part in self._special.split(text)
        ]
        return np.frombuffer(b"".join(parts), np.uint8)

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
        """Tokenize a string or several, as in `transformers`; overlapping pieces are not supported."""
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
        widths = [max(wanted, length) for length in lengths]
        left = (options.get("padding_side") or self.padding_side) == "left"
        firsts = [width - length if left else 0 for width, length in zip(widths, lengths, strict=True)]
        places = [slice(first, first + length) for first, length in zip(firsts, lengths, strict=True)]
        columns = {"input_ids": _Column(rows, places, self.pad_token_id)}
        if options.get("return_attention_mask", "attention_mask" in self.model_input_names) is not False:
            columns["attention_mask"] = _Column([1] * len(rows), places, 0)
        if options.get("return_special_tokens_mask"):
            special = np.isin(np.arange(256), self.all_special_ids).astype(np.uint8)
            columns["special_tokens_mask"] = _Column([special[row] for row in rows], places, 1)
        return self._as_encoding(columns, widths, is_batch, return_tensors)

    def encode(self, text: str, text_pair: None = None, add_special_tokens: bool = True, **options: Any) -> Any:
        """The ids of one string."""
        return self(text, text_pair, add_special_tokens, **options)["input_ids"]

    def _padded_length(
        self, lengths: list[int], padding: bool | str, max_length: int | None, multiple: int | None
    ) -> int:
        """Positions of a padded row; 0 without padding."""
        if padding is False or str(padding) == "do_not_pad" or not lengths:
            return 0
        if str(getattr(padding, "value", padding)) == "max_length":
            length = max_length or self.model_max_length
        else:
            length = max(lengths)
        return -(-length // multiple) * multiple if multiple else length

    def _as_encoding(
        self, columns: dict[str, "_Column"], widths: list[int], is_batch: bool, return_tensors: str | None
    ) -> BatchEncoding:
        kind = str(getattr(return_tensors, "value", return_tensors))
        if kind == "None":
            lists = {name: [row.tolist() for row in column.rows(widths)] for name, column in columns.items()}
            return BatchEncoding(lists if is_batch else {name: rows[0] for name, rows in lists.items()})
        if len(set(widths)) > 1:
            raise ValueError("return_tensors: sequences differ in length; give padding=True")
        matrices = {name: column.matrix(widths) for name, column in columns.items()}
        if kind != "pt":
            return BatchEncoding(matrices, tensor_type=kind)
        import torch  # BatchEncoding would copy

        return BatchEncoding({name: torch.from_numpy(matrix) for name, matrix in matrices.items()})

    def _tokenize(self, text: str, **options: Any) -> list[str]:
        return [self.alphabet.tokens[number] for number in self.token_ids(text).tolist()]

    def _convert_token_to_id(self, token: str) -> int:
        if len(token) == 1:
            return int(self._of_byte[ord(token)]) if token.isascii() else self.alphabet.unk
        return self._ids.get(token, self.alphabet.unk)

    def _convert_id_to_token(self, index: int) -> str:
        """The token of an id; rows that only pad the table have no name."""
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
        """Write nothing: the vocabulary is fixed, and its name is in tokenizer_config.json."""
        return ()


@dataclass
class _Column:
    """A column of a batch: the `values` of each row (an array, or one number for all), and the value of
    padding, `pad`.
    """

    values: Sequence[np.ndarray | int]
    places: Sequence[slice]
    """Number of values in each row."""
    pad: int

    def rows(self, widths: Sequence[int]) -> list[np.ndarray]:
        rows = [np.empty(width, np.int64) for width in widths]
        self._fill(rows)
        return rows

    def matrix(self, widths: Sequence[int]) -> np.ndarray:
        """(B, L) int64, for rows of the same width."""
        matrix = np.empty((len(widths), widths[0] if widths else 0), np.int64)
        self._fill(matrix)
        return matrix

    def _fill(self, rows: Iterable[np.ndarray]) -> None:
        for row, values, place in zip(rows, self.values, self.places, strict=True):  # each position is written once
            row[: place.start] = self.pad
            row[place] = values
            row[place.stop :] = self.pad
