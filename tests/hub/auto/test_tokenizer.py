"""The tokenizer of exports: published ids, both modes, padding, and round trips."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DataCollatorForLanguageModeling

from caduceus.hub.auto.tokenization_caduceus import CaduceusTokenizer

PLAIN, PUBLISHED = CaduceusTokenizer(), CaduceusTokenizer(mode="published")
PLANTCAD = CaduceusTokenizer("plantcad")
LETTERS = [*"ACGTacgtUuNnRé*", "[MASK]", "[UNK]"]


def test_plain_tokens_are_those_of_pre_training():
    assert PLAIN("ACGTacgtUuNnR")["input_ids"] == [7, 8, 9, 10, 7, 8, 9, 10, 10, 10, 4, 4, 6]
    assert PLANTCAD("ACGTacgtUuNnR")["input_ids"] == [3, 4, 5, 6, 3, 4, 5, 6, 6, 6, 2, 2, 2]
    assert PLAIN("AC[MASK]é*")["input_ids"] == [7, 8, 3, 6, 6]
    assert PLAIN("")["input_ids"] == []


def test_published_tokens_end_with_sep_and_know_n():
    assert PUBLISHED("ACGTN")["input_ids"] == [7, 8, 9, 10, 11, 1]
    assert PUBLISHED("ACGTN", add_special_tokens=False)["input_ids"] == [7, 8, 9, 10, 11]
    assert PUBLISHED("ACGT", truncation=True, max_length=3)["input_ids"] == [7, 8, 1]
    assert PUBLISHED("AC", return_special_tokens_mask=True)["special_tokens_mask"] == [0, 0, 1]
    assert CaduceusTokenizer("plantcad", "published")("ACGTN")["input_ids"] == [3, 4, 5, 6, 2]


def test_special_tokens_stand_in_a_string_and_come_back():
    for tokenizer in (PLAIN, PUBLISHED, PLANTCAD):
        text = f"ACG{tokenizer.mask_token}T{tokenizer.unk_token}"
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids[3] == tokenizer.mask_token_id and tokenizer.decode(ids).upper() == text
        assert tokenizer.convert_tokens_to_ids(tokenizer.convert_ids_to_tokens(ids)) == ids
        assert tokenizer.decode(ids, skip_special_tokens=True).upper() == "ACGT"


def test_padding_is_left_for_caduceus_and_right_for_plantcad():
    left = PLAIN(["ACG", "A"], padding=True, return_tensors="pt")
    assert left["input_ids"].tolist() == [[7, 8, 9], [4, 4, 7]] and left["input_ids"].dtype == torch.int64
    assert left["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    right = PLANTCAD(["ACG", "A"], padding=True, pad_to_multiple_of=4, return_tensors="np")
    assert right["input_ids"].tolist() == [[3, 4, 5, 0], [3, 0, 0, 0]]
    assert right["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 0, 0, 0]]
    padded = PLAIN(["AC"], padding="max_length", max_length=3, padding_side="right")
    assert padded["input_ids"] == [[7, 8, 4]]
    assert PLAIN.pad([{"input_ids": [7, 8]}, {"input_ids": [7]}])["input_ids"] == [[7, 8], [4, 7]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"text": ["ACG", "A"], "return_tensors": "pt"}, "differ in length; give padding=True"),
        ({"text": "A", "text_pair": "C"}, "text_pair"),
        ({"text": "A", "return_overflowing_tokens": True}, "return_overflowing_tokens"),
    ],
)
def test_what_a_sequence_of_dna_cannot_be_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        PLAIN(**arguments)


@pytest.mark.parametrize(("name", "value"), [("vocabulary", "protein"), ("mode", "fancy")])
def test_unknown_names_are_refused(name, value):
    with pytest.raises(ValueError, match=f"^{name}: choose one of"):
        CaduceusTokenizer(**{name: value})


@pytest.mark.parametrize("tokenizer", [PLAIN, PUBLISHED, PLANTCAD])
def test_a_saved_tokenizer_comes_back(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = CaduceusTokenizer.from_pretrained(tmp_path)
    text = ["ACGTNU", "A[MASK]"]
    assert again(text, padding=True)["input_ids"] == tokenizer(text, padding=True)["input_ids"]
    assert (again.mode, again.vocabulary, len(again)) == (tokenizer.mode, tokenizer.vocabulary, len(tokenizer))


def test_the_collator_of_transformers_masks_bases_only():
    torch.manual_seed(0)
    collator = DataCollatorForLanguageModeling(PLAIN, mlm_probability=0.5)
    batch = collator([PLAIN("ACGTN" * 20), PLAIN("ACGT" * 5)])
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape == (2, 100)
    assert set(batch["labels"].unique().tolist()) == {-100, 7, 8, 9, 10}
    assert not batch["attention_mask"][1, :80].any()


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(
        st.lists(st.sampled_from([*"ACGTacgtUuNnRé*", "[MASK]", "[UNK]"]), max_size=40).map("".join),
        min_size=1,
        max_size=3,
    ),
    tokenizer=st.sampled_from([PLAIN, PUBLISHED, PLANTCAD]),
    side=st.sampled_from(["left", "right"]),
    multiple=st.sampled_from([None, 4]),
)
def test_a_batch_is_what_one_letter_at_a_time_gives(texts, tokenizer, side, multiple):
    rows = []
    for text in texts:
        letters = re.findall(r"\[\w+\]|.", text)
        rows.append([tokenizer.convert_tokens_to_ids(letter) for letter in letters] + tokenizer._end)
    width = max(map(len, rows))
    width += -width % (multiple or 1)
    options = {"padding": True, "padding_side": side, "pad_to_multiple_of": multiple}
    found = tokenizer(texts, return_tensors="pt", return_special_tokens_mask=True, **options)
    pad, special = tokenizer.pad_token_id, set(tokenizer.all_special_ids)

    def padded(row, value):
        beside = [value] * (width - len(row))
        return [*beside, *row] if side == "left" else [*row, *beside]

    assert found["input_ids"].tolist() == [padded(row, pad) for row in rows]
    assert found["attention_mask"].tolist() == [padded([1] * len(row), 0) for row in rows]
    expected = [padded([int(number in special) for number in row], 1) for row in rows]
    assert found["special_tokens_mask"].tolist() == expected
    assert {tensor.dtype for tensor in found.values()} == {torch.int64}
    lists = tokenizer(texts, **options)
    assert lists["input_ids"] == found["input_ids"].tolist()
