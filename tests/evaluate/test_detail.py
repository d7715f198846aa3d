"""What a validation tells besides the loss, against a loop over single bases."""

import math
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch

from caduceus import CaduceusForMaskedLM
from caduceus.alphabet import IGNORE_LABEL
from caduceus.config import Config, config_from_dict
from caduceus.data import ShardedGenome, build_validation
from caduceus.distributed.ranks import Ranks
from caduceus.evaluate.heldout import held_out_loss

CPU = torch.device("cpu")


def config_of(shards: Path, rcps: bool, bidirectional: bool = True, **data) -> Config:
    return config_from_dict(
        {
            "model": {"d_model": 8, "n_layer": 1, "d_state": 2, "rcps": rcps, "bidirectional": bidirectional},
            "data": {"path": str(shards), "seq_len": 128, **data},
            "train": {"global_batch": 6, "micro_batch": 3},
            "valid": {"samples": 10},
        }
    )


def model_of(config: Config) -> CaduceusForMaskedLM:
    torch.manual_seed(1)
    model = CaduceusForMaskedLM(config.model, "naive").double()
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def validated(config: Config) -> dict[str, float]:
    return held_out_loss(model_of(config), build_validation(config), CPU, mirror=Ranks(0, 1, 1, CPU).mirrored)


@pytest.mark.moderate
def test_regions_accuracy_and_confusion_are_those_of_single_bases(small_shards: Path) -> None:
    config = config_of(small_shards, rcps=False)
    told, genome, model = validated(config), ShardedGenome(small_shards), model_of(config)
    losses, right, pairs = defaultdict(list), defaultdict(list), defaultdict(int)
    batches = build_validation(config)
    for species, batch in batches:
        logits = model(batch.input_ids).logits
        for row, number in enumerate(batch.g.tolist()):
            if number < 0:
                continue
            where = batches.describe(species, number)
            assert where["species"] == "small" and where["strand"] == "+"
            bases = genome.read("small", where["contig"], where["start"], where["end"]).tobytes().decode()
            for place in np.flatnonzero(batch.labels[row] != IGNORE_LABEL).tolist():
                true = bases[place]
                assert "ACGT".index(true.upper()) == batch.labels[row, place] - 7
                region = "repeat" if true.islower() else "nonrepeat"
                taken = "ACGT"[int(logits[row, place, 7:11].argmax())]
                losses[region].append(-logits[row, place].log_softmax(-1)[batch.labels[row, place]].item())
                right[region].append(taken == true.upper())
                pairs[true.upper(), taken] += 1
    everything = [value for values in losses.values() for value in values]
    assert told["valid_loss"] == pytest.approx(np.mean(everything))
    assert told["valid_perplexity"] == pytest.approx(math.exp(np.mean(everything)))
    assert told["valid_bits_per_base"] == pytest.approx(np.mean(everything) / math.log(2))
    for suffix in ("", "/small"):
        for region in ("repeat", "nonrepeat"):
            assert len(losses[region]) > 50
            assert told[f"valid_loss_{region}{suffix}"] == pytest.approx(np.mean(losses[region]))
            assert told[f"valid_accuracy_{region}{suffix}"] == pytest.approx(np.mean(right[region]))
        assert told[f"valid_accuracy{suffix}"] == pytest.approx(np.mean(right["repeat"] + right["nonrepeat"]))
    for true in "ACGT":
        total = sum(pairs[true, taken] for taken in "ACGT")
        for taken in "ACGT":
            assert told[f"valid_confusion/{true}{taken}"] == pytest.approx(pairs[true, taken] / total)


@pytest.mark.moderate
def test_the_strands_of_a_ps_agree_and_those_of_a_ph_do_not(small_shards: Path) -> None:
    assert validated(config_of(small_shards, rcps=True))["valid_rc_disagreement"] < 1e-12
    config = config_of(small_shards, rcps=False)
    species, batch = next(iter(build_validation(config)))
    model, apart = model_of(config), []
    complement = torch.arange(16)
    complement[[7, 8, 9, 10]] = torch.tensor([10, 9, 8, 7])
    for row in range(len(batch.g)):
        forward = model(batch.input_ids[row : row + 1]).logits[0, :, 7:11].softmax(-1)
        backward = model(complement[batch.input_ids[row : row + 1].flip(1)]).logits[0, :, 7:11].softmax(-1)
        for place in np.flatnonzero(batch.labels[row] != IGNORE_LABEL).tolist():
            other = backward[-1 - place, [3, 2, 1, 0]]
            apart.append((forward[place] - other).abs().sum().item() / 2)
    told = validated(config)
    assert told["valid_rc_disagreement"] == pytest.approx(np.mean(apart)) and np.mean(apart) > 0.01
    assert told[f"valid_rc_disagreement/{species}"] == told["valid_rc_disagreement"]


def test_a_next_base_model_has_no_other_strand(small_shards: Path) -> None:
    config = config_of(small_shards, rcps=False, bidirectional=False, objective="next_base")
    told = held_out_loss(model_of(config), build_validation(config), CPU)
    assert "valid_rc_disagreement" not in told and 0 <= told["valid_accuracy_repeat"] <= 1
