"""A sequence cut over ranks gives what the whole sequence gives, forward and backward."""

import itertools

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from caduceus import CaduceusConfig, CaduceusForMaskedLM
from caduceus.alphabet import IGNORE_LABEL
from caduceus.distributed.context import ContextGroup
from tests.distributed.ranks import on_ranks

LENGTH, LAYERS = 48, 2
MODELS = {
    "ps": {"rcps": True},
    "ps_unfused": {"rcps": True, "fused_add_norm": False},
    "ph": {},
    "ph_untied": {"bidirectional_weight_tie": False},
    "ph_multiply": {"bidirectional_strategy": "ew_multiply"},
    "unidirectional": {"bidirectional": False},
    "mamba2_ps": {"rcps": True, "mixer": "mamba2", "headdim": 4},
    "mamba2_ph_untied": {"bidirectional_weight_tie": False, "mixer": "mamba2", "headdim": 8},
}
BACKENDS = ("naive", "cpu")


def losses_and_gradients(
    model_keys: dict, backend: str, positions: slice, context: ContextGroup | None, recomputed_scan_inputs: int = 0
) -> dict[str, Tensor]:
    torch.manual_seed(0)
    config = CaduceusConfig(d_model=8, n_layer=LAYERS, d_state=4, **model_keys)
    model = CaduceusForMaskedLM(config, backend, recomputed_scan_inputs=recomputed_scan_inputs).double()
    model.share_sequences(context)
    input_ids = torch.randint(7, 11, (2, LENGTH))
    labels = torch.where(torch.rand(2, LENGTH) < 0.5, input_ids, IGNORE_LABEL)
    output = model(input_ids[:, positions], labels[:, positions])
    output.loss_sum.sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"loss": output.loss_sum.detach(), "logits": output.logits.detach(), **gradients}


def all_models_on_a_slice(rank: int) -> dict[tuple[str, str], dict[str, Tensor]]:
    size = dist.get_world_size()
    context = ContextGroup(dist.group.WORLD, rank, size)
    width = LENGTH // size
    positions = slice(rank * width, (rank + 1) * width)
    return {
        (name, backend): losses_and_gradients(keys, backend, positions, context)
        for name, keys in MODELS.items()
        for backend in BACKENDS
    }


def scan_inputs_recomputed_on_a_slice(rank: int) -> dict[str, bool]:
    """Whether recomputing what feeds the scan, for which ranks exchange halos once more, gives the same bits."""
    context = ContextGroup(dist.group.WORLD, rank, dist.get_world_size())
    positions = context.rank * LENGTH // context.size, (context.rank + 1) * LENGTH // context.size
    same = {}
    for name, keys in MODELS.items():
        plain, again = (losses_and_gradients(keys, "cpu", slice(*positions), context, blocks) for blocks in (0, LAYERS))
        same[name] = all(torch.equal(plain[key], again[key]) for key in plain)
    return same


@pytest.mark.slow
def test_what_feeds_the_scan_is_recomputed_to_the_same_bits() -> None:
    assert on_ranks(2, scan_inputs_recomputed_on_a_slice) == [dict.fromkeys(MODELS, True)] * 2


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_slices_on_ranks_equal_the_whole_sequence(size: int) -> None:
    ranks = on_ranks(size, all_models_on_a_slice)
    for name, backend in itertools.product(MODELS, BACKENDS):
        whole = losses_and_gradients(MODELS[name], "naive", slice(None), None)
        logits = torch.cat([rank[name, backend]["logits"] for rank in ranks], dim=1)
        # fp64 rounding through two layers; the folding of states over ranks is exact algebra.
        torch.testing.assert_close(logits, whole.pop("logits"), rtol=0, atol=1e-12)
        for key, expected in whole.items():
            total = sum(rank[name, backend][key] for rank in ranks)
            torch.testing.assert_close(
                total, expected, rtol=1e-10, atol=1e-11, msg=lambda m, at=(name, backend, key): f"{at}: {m}"
            )
