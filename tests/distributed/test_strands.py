"""A strand on each of two ranks gives what one rank with both gives, forward and backward."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from caduceus import CaduceusConfig, CaduceusForMaskedLM
from caduceus.alphabet import IGNORE_LABEL
from caduceus.config import Config
from caduceus.data import ShardedGenome
from caduceus.data.loader import build_validation
from caduceus.distributed.ranks import Ranks
from caduceus.distributed.strands import StrandGroup
from caduceus.evaluate.heldout import held_out_loss
from caduceus.hub import load
from tests.distributed.layouts import Layout, config_of, train_all
from tests.distributed.ranks import on_ranks
from tests.train.conftest import numbers

LENGTH = 48
MODELS = {
    "even layers": {"n_layer": 2},
    "odd layers": {"n_layer": 3},
    "unfused": {"fused_add_norm": False},
    "untied": {"bidirectional_weight_tie": False},
    "multiply": {"bidirectional_strategy": "ew_multiply"},
    "unidirectional": {"bidirectional": False},
    "unidirectional, unfused": {"bidirectional": False, "fused_add_norm": False},
    "layer norm": {"rms_norm": False},
    "packed": {},
    "packed, unidirectional": {"bidirectional": False},
    "mamba2": {"mixer": "mamba2", "headdim": 8},
    "mamba2, untied": {"mixer": "mamba2", "headdim": 8, "bidirectional_weight_tie": False},
    "packed, mamba2": {"mixer": "mamba2", "headdim": 8},
}
CASES = [*((name, 0.5) for name in MODELS), ("even layers", 0.0)]
"""Models, and the share of the bases that are labelled."""
IN_SLICES = [("even layers", 0.5), ("odd layers", 0.5), ("unidirectional", 0.5), ("mamba2", 0.5)]


def outcome(
    name: str, share: float, backend: str = "naive", ranks: Ranks | None = None
) -> tuple[dict[str, Tensor], list[str]]:
    """Logits, sums and gradients of this rank's part of a pass, and the order in which the gradients were ready."""
    torch.manual_seed(0)
    config = CaduceusConfig(**{"d_model": 8, "n_layer": 2, "d_state": 4, "rcps": True, **MODELS[name]})
    model = CaduceusForMaskedLM(config, backend=backend, strands=ranks and ranks.strand_group).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    positions = slice(*(ranks.positions(LENGTH) if ranks else (0, LENGTH)))
    model.share_sequences(ranks and ranks.context_group)
    input_ids = torch.randint(7, 11, (2, LENGTH))
    labels = torch.where(torch.rand(2, LENGTH) < share, input_ids, IGNORE_LABEL)[:, positions]
    weights = torch.rand(2, LENGTH, dtype=torch.float64)[:, positions]
    order: list[str] = []
    for path, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, path=path: order.append(path))
    starts = torch.zeros(2, LENGTH, dtype=torch.bool)
    starts[0, 20] = starts[1, 5] = starts[1, 33] = True
    output = model(input_ids[:, positions], labels, weights, starts=starts if name.startswith("packed") else None)
    output.loss_sum.sum().backward()
    gradients = {path: parameter.grad for path, parameter in model.named_parameters()}
    sums = {"loss_sum": output.loss_sum.detach(), "weight_sum": output.weight_sum}
    values = {"logits": output.logits.detach(), "loss": output.loss.detach(), **sums, **gradients}
    return values, order


def all_outcomes(rank: int, context: int, cases: list) -> list[tuple[dict[str, Tensor], list[str]]]:
    ranks = Ranks(rank, dist.get_world_size(), context, torch.device("cpu"), strands=2)
    return [outcome(*case, "cpu", ranks) for case in cases]


@pytest.mark.slow
@pytest.mark.parametrize(("context", "cases"), [(1, CASES), (2, IN_SLICES)])
def test_strands_on_ranks_equal_both_on_one(context: int, cases: list) -> None:
    found = on_ranks(2 * context, all_outcomes, context, cases)
    for case, of_ranks in zip(cases, zip(*found, strict=True), strict=True):
        whole, _ = outcome(*case)
        ranks, orders = zip(*of_ranks, strict=True)
        assert all(order == orders[0] for order in orders)  # in which DeepSpeed adds them up
        # Slices are neighbours, and both strands have the same logits and losses, to the bit.
        first, second = ranks[:context], ranks[context:]
        for one, other in zip(first, second, strict=True):
            assert all(torch.equal(one[part], other[part]) for part in ("logits", "loss", "loss_sum", "weight_sum"))
        logits, loss = torch.cat([rank["logits"] for rank in first], dim=1), whole.pop("loss")
        # fp64 rounding through the layers.
        torch.testing.assert_close(logits, whole.pop("logits"), rtol=1e-11, atol=1e-12)
        if context == 1:
            torch.testing.assert_close(first[0]["loss"], loss, rtol=1e-12, atol=0)
        for part, expected in whole.items():
            total = sum(rank[part] for rank in ranks)
            torch.testing.assert_close(total, expected, rtol=1e-10, atol=1e-11, msg=lambda m, at=case: f"{at}: {m}")


def test_hidden_states_of_one_strand_are_not_taken_for_those_of_both() -> None:
    config = CaduceusConfig(d_model=8, n_layer=2, d_state=4, rcps=True)
    model = CaduceusForMaskedLM(config, strands=StrandGroup(None, 0, 2))
    with pytest.raises(ValueError, match=r"output_hidden_states: .* one of the two strands"):
        model(torch.full((1, 8), 7), output_hidden_states=True)


@pytest.fixture
def damaged_shards(small_shards: Path, tmp_path: Path) -> Path:
    """A copy in which the bases of one window in three are not those of the index's crc32."""
    copy = Path(shutil.copytree(small_shards, tmp_path / "shards"))
    table = ShardedGenome(copy).table("small", "train")
    for window in table.windows[::3]:
        path, offset = table.shards[window["shard"]].path, int(window["offset"]) + 5
        bases = np.memmap(path, np.uint8, "r+", offset, (1,))
        bases[0] = ord("A") if bases[0] in b"Cc" else ord("C")
        bases.flush()
    return copy


@pytest.mark.slow
def test_a_run_counts_validates_and_ends_as_on_one_rank(damaged_shards: Path, tmp_path: Path) -> None:
    def config(name: str, world: int, **parallel: object) -> Config:
        run = config_of(Layout("", world, parallel), damaged_shards, tmp_path / name, 2, steps=4, precision="fp64")
        run.valid.every, run.valid.samples = 2, 5
        return run

    alone, shared = config("alone", 1, strategy="single"), config("shared", 2, strategy="ddp", strands=2)
    train_all(1, [alone])
    train_all(2, [shared])
    rows, expected = (numbers(run.run.dir) for run in (shared, alone))
    assert expected[-2]["substituted_samples"] > 4 and "valid_loss/small" in expected[-1]
    assert rows == [pytest.approx(row, rel=1e-9) for row in expected]
    weights, expected_weights = (load(run.run.dir).state_dict() for run in (shared, alone))
    for name, tensor in expected_weights.items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-9, atol=1e-9)
    model, batches = load(shared.run.dir).double(), build_validation(shared)
    mirror = Ranks(0, 1, 1, torch.device("cpu")).mirrored
    told = {**held_out_loss(model, batches, torch.device("cpu"), mirror=mirror), "step": rows[-1]["step"]}
    of_run = {key: rows[-1][key] for key in ("best_valid_loss", "best_step")}
    assert rows[-1] == pytest.approx({**told, **of_run}, rel=1e-6)
