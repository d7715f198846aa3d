"""Models in PlantCAD's vocabulary: published sizes, training on the shards of any model, out and in again."""

import pytest
import torch

from caduceus import CaduceusForMaskedLM, hub
from caduceus.alphabet import CADUCEUS, IGNORE_LABEL, PLANTCAD
from caduceus.config import load_config
from caduceus.data import build_loader, build_validation
from caduceus.evaluate.heldout import held_out_loss
from caduceus.model.costs import parameter_count
from caduceus.train.trainer import train
from tests.conftest import REPOSITORY
from tests.train.conftest import SmallRun, numbers

PLANTCAD2 = {"small": 88_238_208, "medium": 311_162_880, "large": 694_385_664}
PUBLISHED_MILLIONS = {"l20": (20, 1), "l24": (40, 10), "l28": (112, 1), "l32": (225, 1)}
"""As the model cards give them, and the unit that they are rounded down to."""


@pytest.mark.parametrize("name", PUBLISHED_MILLIONS)
def test_presets_have_the_published_sizes(name):
    config = load_config(f"plantcad-{name}").model
    with torch.device("meta"):
        model = CaduceusForMaskedLM(config)
    count = sum(parameter.numel() for parameter in model.parameters())
    millions, unit = PUBLISHED_MILLIONS[name]
    assert count // (unit * 1_000_000) * unit == millions
    assert count == parameter_count(config)
    first_line = (REPOSITORY / "configs" / "model" / f"plantcad-{name}.yaml").read_text().splitlines()[0]
    assert f"{count:,} parameters" in first_line


@pytest.mark.parametrize("name", PLANTCAD2)
def test_presets_of_plantcad2_have_the_published_sizes(name):
    config = load_config(f"plantcad2-{name}").model
    with torch.device("meta"):
        model = CaduceusForMaskedLM(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == PLANTCAD2[name] == parameter_count(config)
    assert config.mixer == "mamba2" and config.headdim == 64 and config.vocab_size == 8


def test_one_dataset_of_shards_serves_both_vocabularies(small_shards, tmp_path):
    run = SmallRun(small_shards, tmp_path)
    first, second = (next(iter(build_loader(run.config("x", model={"vocab_size": size})))) for size in (12, 8))
    assert torch.equal(first.g, second.g)
    assert torch.equal(first.labels == IGNORE_LABEL, second.labels == IGNORE_LABEL)
    for base, other in zip(CADUCEUS.bases, PLANTCAD.bases, strict=True):
        assert torch.equal(first.labels == base, second.labels == other)
        assert torch.equal(first.input_ids == base, second.input_ids == other)
    assert torch.equal(first.input_ids == CADUCEUS.mask, second.input_ids == PLANTCAD.mask)


@pytest.mark.moderate
@pytest.mark.parametrize("mixer", [{}, {"mixer": "mamba2", "headdim": 8, "d_state": 8}])
def test_a_run_in_plantcads_vocabulary_trains_and_comes_back_from_an_export(mixer, small_shards, tmp_path):
    config = SmallRun(small_shards, tmp_path).config("run", model={"vocab_size": 8, **mixer}, train={"steps": 4})
    assert train(config) == 0
    model = hub.load(config.run.dir)
    assert model.embedding.weight.shape == (8, 16)
    hub.save_published(model, tmp_path / "export")
    again = hub.load(tmp_path / "export")
    assert again.config == model.config
    loss = held_out_loss(again, build_validation(config), torch.device("cpu"))["valid_loss"]
    assert loss == pytest.approx(numbers(config.run.dir)[-1]["valid_loss"], rel=1e-6)
