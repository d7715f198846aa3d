"""What a model with Mamba-2's mixer keeps: the reverse complement, initial values, weight decay, compiled blocks."""

import pytest
import torch

from caduceus import CaduceusConfig, CaduceusForMaskedLM
from caduceus.errors import UserError

SMALL = {"d_model": 8, "n_layer": 3, "d_state": 4, "mixer": "mamba2", "headdim": 4}


@pytest.mark.parametrize("keys", [{}, {"fused_add_norm": False}, {"bidirectional_weight_tie": False}])
@pytest.mark.parametrize("backend", ["naive", "auto"])
def test_reverse_complement_gives_the_reverse_complement(keys: dict, backend: str) -> None:
    torch.manual_seed(0)
    model = CaduceusForMaskedLM(CaduceusConfig(rcps=True, **SMALL, **keys), backend=backend).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    input_ids = torch.randint(0, 12, (2, 37))
    logits = model(input_ids).logits
    mirrored = model(model.complement[input_ids].flip(1)).logits
    scale = logits.abs().max().item()
    torch.testing.assert_close(mirrored, logits.flip(1)[..., model.complement], rtol=0, atol=1e-12 * scale)


def test_initial_values_are_the_published_ones() -> None:
    mixer = CaduceusForMaskedLM(CaduceusConfig(d_model=64, n_layer=4, mixer="mamba2", headdim=2)).blocks[0].mixer
    A = mixer.A_log.exp()
    assert A.min() >= 1 and A.max() <= 16 and 7 < A.mean() < 10
    dt = torch.nn.functional.softplus(mixer.dt_bias)
    assert dt.min() >= 1e-3 * 0.999 and dt.max() <= 1e-1 * 1.001
    assert torch.equal(mixer.D, torch.ones(2, 64)) and torch.equal(mixer.norm_weight, torch.ones(2, 128))
    assert 0.9 * 256**-0.5 * 2**-0.5 < mixer.out_proj.abs().max() <= (128 * 4) ** -0.5


def test_weight_decay_spares_norms_and_state_parameters() -> None:
    model = CaduceusForMaskedLM(CaduceusConfig(**SMALL))
    spared = {name.rpartition(".")[2] for name in model.no_weight_decay_parameters() if "mixer" in name}
    assert spared == {"conv_bias", "dt_bias", "A_log", "D", "norm_weight"}


@pytest.mark.slow
def test_a_compiled_block_gives_the_same_gradients() -> None:
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = CaduceusForMaskedLM(CaduceusConfig(rcps=True, **{**SMALL, "n_layer": 1}))
        if compiled:
            model.blocks[0].compile(backend="aot_eager")
        loss = model(torch.randint(7, 11, (1, 20)), torch.full((1, 20), 8)).loss
        results.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_heads_divide_the_channels() -> None:
    with pytest.raises(UserError, match=r"^model\.headdim: 5 does not divide the 16 inner channels"):
        CaduceusConfig(d_model=8, mixer="mamba2", headdim=5)
    assert CaduceusConfig(d_model=8, headdim=5).mixer == "mamba"
