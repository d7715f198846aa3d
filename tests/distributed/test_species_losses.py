"""The training loss of each species and of each class of bases, under all arrangements of ranks."""

import json
from collections import defaultdict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from caduceus.alphabet import IGNORE_LABEL
from caduceus.config import Config
from caduceus.data import ShardedGenome, build_loader
from caduceus.distributed.build import build_strategy
from caduceus.distributed.ranks import Ranks
from caduceus.train import trainer
from caduceus.train.metrics import CLOCK_KEYS
from caduceus.train.optimizer import build_optimizer
from tests.distributed.layouts import LAYOUTS, Layout, config_of, train_all

SPECIES = ("small", "large")
SHARED = ("DDP 2", "FSDP 2", "ZeRO 2, 2 ranks", "context 2", "strands 2")


def rows_of(config: Config) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (Path(config.run.dir) / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in CLOCK_KEYS} for row in rows]


@pytest.mark.moderate
def test_it_is_the_mean_over_its_labelled_bases(two_species: Path, tmp_path: Path) -> None:
    """Against a loop over single sequences; in fp64, so but for rounding."""
    config = config_of(LAYOUTS[0], two_species, tmp_path / "run", accumulation=2, steps=1, precision="fp64")
    assert trainer.train(config) == 0
    [row] = rows_of(config)

    model = build_strategy(config, Ranks(0, 1, 1, torch.device("cpu")), build_optimizer).model
    loader = build_loader(config)
    losses, counts = defaultdict(float), defaultdict(float)
    for _, batch in zip(range(2), loader, strict=False):
        for number, ids, labels in zip(batch.g.tolist(), batch.input_ids, batch.labels, strict=True):
            labelled = labels != IGNORE_LABEL
            each = F.cross_entropy(model(ids[None]).logits[0, labelled], labels[labelled], reduction="none")
            species = loader.describe(number)["species"]
            losses[species] += each.sum().item()
            counts[species] += len(each)
    assert set(losses) == set(SPECIES)
    for species in SPECIES:
        assert row[f"loss/{species}"] == pytest.approx(losses[species] / counts[species], rel=1e-12)
    assert row["loss"] == pytest.approx(sum(losses.values()) / sum(counts.values()), rel=1e-12)


@pytest.mark.slow
def test_it_is_the_same_however_ranks_share_the_work(two_species: Path, tmp_path: Path) -> None:
    layouts = [LAYOUTS[0], *(layout for layout in LAYOUTS if layout.name in SHARED)]
    configs = {
        layout.name: config_of(layout, two_species, tmp_path / layout.name, accumulation=2, steps=3)
        for layout in layouts
    }
    assert trainer.train(configs["single"]) == 0
    train_all(2, [configs[name] for name in SHARED])
    alone = rows_of(configs["single"])
    assert all({f"loss/{species}" for species in SPECIES} <= row.keys() for row in alone)
    for name in SHARED:
        for row, expected in zip(rows_of(configs[name]), alone, strict=True):
            for species in SPECIES:
                # fp32 sums in another order, over a few hundred bases and three updates
                assert row[f"loss/{species}"] == pytest.approx(expected[f"loss/{species}"], rel=5e-7), name


@pytest.mark.moderate
def test_losses_by_region_are_those_of_upper_and_lower_case(two_species: Path, tmp_path: Path) -> None:
    """Of the first micro-batch, without weights, against the genome's letters; in fp64, so but for rounding."""
    config = config_of(LAYOUTS[0], two_species, tmp_path / "run", accumulation=2, steps=1, precision="fp64")
    config.monitor.every, config.data.repeat_weight = 1, 0.1
    assert trainer.train(config) == 0
    [row] = rows_of(config)

    model = build_strategy(config, Ranks(0, 1, 1, torch.device("cpu")), build_optimizer).model
    loader, genome = build_loader(config), ShardedGenome(two_species)
    batch, losses = next(iter(loader)), {False: [], True: []}
    for number, ids, labels in zip(batch.g.tolist(), batch.input_ids, batch.labels, strict=True):
        where = loader.describe(number)
        bases = genome.read(where["species"], where["contig"], where["start"], where["end"], where["strand"])
        each = F.cross_entropy(model(ids[None]).logits[0], labels, ignore_index=IGNORE_LABEL, reduction="none")
        for place in (labels != IGNORE_LABEL).nonzero().flatten().tolist():
            losses[chr(bases[place]).islower()].append(each[place].item())
    for is_lower, name in enumerate(("loss_nonrepeat", "loss_repeat")):
        assert row[name] == pytest.approx(sum(losses[is_lower]) / len(losses[is_lower]), rel=1e-12)


@pytest.mark.slow
def test_losses_by_region_are_the_same_however_ranks_share_the_work(two_species: Path, tmp_path: Path) -> None:
    layouts = [LAYOUTS[0], *(layout for layout in LAYOUTS if layout.name in SHARED)]
    configs = {layout.name: config_of(layout, two_species, tmp_path / layout.name, steps=1) for layout in layouts}
    for config in configs.values():
        config.monitor.every = 1
    assert trainer.train(configs["single"]) == 0
    train_all(2, [configs[name] for name in SHARED])
    [alone] = rows_of(configs["single"])
    for name in SHARED:
        for key in ("loss_nonrepeat", "loss_repeat"):
            # fp32 sums in another order, over a few hundred bases
            assert rows_of(configs[name])[0][key] == pytest.approx(alone[key], rel=5e-7), name


@pytest.mark.moderate
def test_one_species_has_no_loss_of_its_own(small_shards: Path, tmp_path: Path) -> None:
    config = config_of(Layout("single", 1, {"strategy": "single"}), small_shards, tmp_path / "run", steps=1)
    assert trainer.train(config) == 0
    assert not [key for key in rows_of(config)[0] if key.startswith("loss/")]
