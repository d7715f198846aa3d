"""Exports in `transformers`' Auto classes, by this package: values, ties, files, padding, training."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

from caduceus import hub
from caduceus.config import CaduceusConfig
from caduceus.errors import UserError
from caduceus.model.heads import CaduceusForMaskedLM
from tests.model.golden import NAMES, Golden, load_golden, relative_error


def export(golden: Golden, folder: Path) -> str:
    hub.save_published(hub.from_published(golden.config, golden.part("state")), folder)
    return str(folder)


@pytest.fixture(scope="module")
def ps(tmp_path_factory: pytest.TempPathFactory) -> tuple[Golden, str]:
    golden = load_golden("ps_fused")
    return golden, export(golden, tmp_path_factory.mktemp("ps") / "export")


@pytest.mark.moderate
@pytest.mark.parametrize("name", NAMES)
def test_an_export_gives_the_golden_values_and_comes_back_bit_for_bit(name, tmp_path):
    golden = load_golden(name)
    model = AutoModelForMaskedLM.from_pretrained(export(golden, tmp_path / "export"))
    output = model(golden["input_ids"], labels=golden["labels"], output_hidden_states=True)
    assert relative_error(output.logits, golden["logits"]) < 1e-5
    assert relative_error(output.loss, golden["loss"]) < 1e-5
    hidden = golden.part("hidden")
    assert len(output.hidden_states) == len(hidden)
    assert all(relative_error(output.hidden_states[int(number)], value) < 1e-5 for number, value in hidden.items())
    weighted = model(golden["input_ids"], labels=golden["labels"], loss_weights=golden["loss_weights"])
    assert relative_error(weighted.loss, golden["weighted_loss"]) < 1e-5

    model.save_pretrained(tmp_path / "saved")
    saved, state = load_file(tmp_path / "saved" / "model.safetensors"), golden.part("state")
    assert saved.keys() == state.keys() and all(torch.equal(saved[key], state[key]) for key in state)
    assert hub.load(tmp_path / "saved").config == hub.load(tmp_path / "export").config
    values = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert values["pad_token_id"] == (-100 if golden.config["vocab_size"] == 8 else 4)
    if complement := values.get("complement_map"):
        assert list(complement) == [str(token) for token in range(len(complement))]


@pytest.mark.moderate
def test_a_tied_weight_is_one_parameter(ps):
    _, folder = ps
    for auto in (AutoModelForMaskedLM, AutoModel):
        model = auto.from_pretrained(folder)
        parameters = list(model.parameters())
        assert sum(parameter.numel() for parameter in parameters) == 16000
        assert len({parameter.data_ptr() for parameter in parameters}) == len(parameters)


def test_a_file_of_one_name_for_a_tied_weight_loads_as_well(ps, tmp_path):
    golden, folder = ps
    state = golden.part("state")
    names = ["lm_head.lm_head.weight", "lm_head.complement_map"]
    names += [name for name in state if "mamba_rev" in name and "_proj.weight" in name and "x_proj" not in name]
    names = [name for name in names if "dt_proj" not in name]
    (tmp_path / "config.json").write_text((Path(folder) / "config.json").read_text())
    save_file({key: value for key, value in state.items() if key not in names}, tmp_path / "model.safetensors")
    model, told = AutoModelForMaskedLM.from_pretrained(str(tmp_path), output_loading_info=True)
    assert told["missing_keys"] == told["unexpected_keys"] == []
    assert relative_error(model(golden["input_ids"]).logits, golden["logits"]) < 1e-5


def test_types_devices_and_the_hidden_states(ps):
    golden, folder = ps
    assert AutoConfig.from_pretrained(folder).hidden_size == 20
    for keys in ({"dtype": torch.bfloat16}, {"dtype": "bfloat16", "device_map": "cpu"}, {"torch_dtype": "bfloat16"}):
        assert AutoModelForMaskedLM.from_pretrained(folder, **keys).dtype == torch.bfloat16
    model = AutoModel.from_pretrained(folder, device_map={"": "cpu"}, dtype="auto")
    output = model(golden["input_ids"], output_hidden_states=True)
    assert relative_error(output.last_hidden_state, golden["hidden.3"]) < 1e-5
    last, hidden_states = model(golden["input_ids"], output_hidden_states=True, return_dict=False)
    assert torch.equal(last, output.last_hidden_state) and len(hidden_states) == 4
    for auto in (AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoModelForTokenClassification):
        model = auto.from_pretrained(folder, output_hidden_states=True)
        assert len(model(golden["input_ids"]).hidden_states) == 4


def test_what_cannot_be_is_refused_in_a_line(ps, tmp_path):
    _, folder = ps
    for keys, message in (
        ({"quantization_config": object()}, "quantization_config: Caduceus is not quantized"),
        ({"load_in_8bit": True}, "load_in_8bit: Caduceus is not quantized"),
        ({"device_map": {"a": "cpu", "b": "meta"}}, "device_map: a Caduceus lies on one device"),
        ({"d_model": 18}, "model.safetensors: .*expected shape"),
        ({"pooling_strategy": "median"}, "pooling_strategy: choose one of mean, max, first, last; got 'median'"),
    ):
        with pytest.raises(UserError, match=message):
            AutoModelForSequenceClassification.from_pretrained(folder, **keys)
    AutoConfig.from_pretrained(folder).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="there are no weights in it"):
        AutoModelForMaskedLM.from_pretrained(str(tmp_path))


def test_the_table_of_tokens_keeps_its_size(ps):
    golden, folder = ps
    model = AutoModelForMaskedLM.from_pretrained(folder)
    for same in (None, 16):
        assert model.resize_token_embeddings(same) is model.get_input_embeddings()
    for other in (12, 20):
        with pytest.raises(UserError, match=f"keeps its table of 16 rows, .*; got {other}"):
            model.resize_token_embeddings(other)
    assert relative_error(model(golden["input_ids"]).logits, golden["logits"]) < 1e-5


def test_gradient_checkpointing_gives_the_same_gradients(ps):
    golden, folder = ps
    results = []
    for recompute in (False, True):
        model = AutoModelForMaskedLM.from_pretrained(folder).train()
        if recompute:
            model.gradient_checkpointing_enable()
        assert model.is_gradient_checkpointing == recompute
        loss = model(golden["input_ids"], labels=golden["labels"]).loss
        results.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
        model.gradient_checkpointing_disable()
        assert not model.is_gradient_checkpointing
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def batches(side: str, folder: str) -> tuple[Any, list[str], dict[str, torch.Tensor]]:
    """The tokenizer of an export, sequences, and a batch of them."""
    generator = torch.Generator().manual_seed(1)
    texts = ["".join("ACGTN"[i] for i in torch.randint(0, 5, (n,), generator=generator)) for n in (23, 7, 16)]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return tokenizer, texts, tokenizer(texts, padding=True, padding_side=side, return_tensors="pt")


@pytest.mark.moderate
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", NAMES)
def test_padding_on_either_side_changes_nothing(name, side, tmp_path):
    golden = load_golden(name)
    folder = export(golden, tmp_path / "export")
    model = AutoModelForMaskedLM.from_pretrained(folder).double()
    tokenizer, texts, padded = batches(side, folder)
    logits = model(**padded).logits
    labels = padded["input_ids"].masked_fill(padded["attention_mask"] == 0, -100)
    gradients = torch.autograd.grad(model(**padded, labels=labels).loss, list(model.parameters()))
    total, count = 0, 0
    for row, text in enumerate(texts):
        alone = tokenizer(text, return_tensors="pt")["input_ids"]
        real = padded["attention_mask"][row] == 1
        torch.testing.assert_close(logits[row, real], model(alone).logits[0], rtol=1e-9, atol=1e-10)
        labelled = int((alone != tokenizer.pad_token_id).sum())
        total, count = total + model(alone, labels=alone).loss * labelled, count + labelled
    expected = torch.autograd.grad(total / count, list(model.parameters()))
    for one, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("pooling", ["mean", "max", "first", "last"])
def test_a_classifier_reads_both_strands_alike_and_no_padding(ps, pooling, tmp_path, caplog):
    _, folder = ps
    with caplog.at_level(logging.WARNING):
        model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3, pooling_strategy=pooling)
    assert "score.weight, which starts with random weights" in caplog.text
    model.score.weight.data.mul_(50)
    tokenizer, texts, padded = batches("left", folder)
    logits = model(**padded).logits
    ids = tokenizer(texts[1], return_tensors="pt")["input_ids"]
    complement = torch.tensor(list(AutoConfig.from_pretrained(folder).complement_map.values()))
    torch.testing.assert_close(model(ids).logits[0], logits[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(complement[ids].flip(1)).logits, model(ids).logits, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForSequenceClassification.from_pretrained(str(tmp_path / "saved"))
    assert torch.equal(again(**padded).logits, logits) and again.config.pooling_strategy == pooling
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert "score.weight" in saved and not any(name.startswith("lm_head") for name in saved)


def test_losses_of_the_heads_are_those_of_transformers(ps):
    _, folder = ps
    _, _, padded = batches("right", folder)
    cases = (
        (1, torch.tensor([0.5, 1.0, -1.0]), "regression"),
        (3, torch.tensor([0, 2, 1]), "single_label_classification"),
        (2, torch.tensor([[0.0, 1.0], [1.0, 1.0], [0.0, 0.0]]), "multi_label_classification"),
    )
    for labels, given, kind in cases:
        model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=labels)
        loss = model(**padded, labels=given).loss
        assert loss.isfinite() and loss.ndim == 0 and model.config.problem_type == kind
    model = AutoModelForTokenClassification.from_pretrained(folder, num_labels=4)
    labels = padded["input_ids"].masked_fill(padded["input_ids"] == 4, -100).where(padded["input_ids"] == 4, 1)
    output = model(**padded, labels=labels.masked_fill(padded["attention_mask"] == 0, -100))
    assert output.logits.shape == (*labels.shape, 4) and output.loss.isfinite()


@pytest.mark.moderate
def test_trainer_fine_tunes_saves_and_goes_on(tmp_path):
    torch.manual_seed(0)
    config = CaduceusConfig(d_model=8, n_layer=1, d_state=2, rcps=True)
    hub.save_published(CaduceusForMaskedLM(config), tmp_path / "export")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "export")
    texts = ["ACGT" * n for n in range(4, 24)]
    data = [tokenizer(text) for text in texts]

    def trainer(steps: int) -> Trainer:
        model = AutoModelForMaskedLM.from_pretrained(tmp_path / "export")
        arguments = TrainingArguments(
            str(tmp_path / "out"),
            max_steps=steps,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            save_steps=5,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.3)
        return Trainer(model, arguments, train_dataset=data, data_collator=collator)

    first = trainer(10)
    first.train()
    losses = [row["loss"] for row in first.state.log_history if "loss" in row]
    assert len(losses) == 10 and sum(losses[-3:]) < sum(losses[:3])
    if Version(transformers.__version__) < Version("4.48"):
        pytest.skip("this Trainer of transformers cannot read its own checkpoints with today's torch")
    again = trainer(12)
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-10"))
    assert again.state.global_step == 12
    again.save_model(str(tmp_path / "final"))
    found = hub.load(tmp_path / "final").state_dict()
    held = again.model.backbone_model.state_dict()
    assert all(torch.equal(found[name], held[name]) for name in held)
