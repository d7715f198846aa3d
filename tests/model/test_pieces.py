"""A sequence in pieces gives the numbers of one pass, whatever the piece."""

import pytest
import torch

from caduceus import CaduceusConfig, CaduceusForMaskedLM
from caduceus.model.pieces import run_in_pieces
from tests.model.packed import KINDS, MAMBA2_KINDS


def made(kind: str, dtype: torch.dtype, **sizes: int) -> CaduceusForMaskedLM:
    config = CaduceusConfig(
        **{"d_model": 8, "n_layer": 2, "d_state": 4, "d_conv": 3, **sizes, **{**KINDS, **MAMBA2_KINDS}[kind]}
    )
    model = CaduceusForMaskedLM(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.to(dtype)


def in_pieces(model: CaduceusForMaskedLM, ids: torch.Tensor, piece: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits and all hidden states."""
    found: dict[int, list[torch.Tensor]] = {layer: [] for layer in range(-1, len(model.blocks) + 1)}

    def keep(layer: int):
        return lambda first, part: found[layer].append(part.clone())

    run_in_pieces(model, ids, piece, {layer: keep(layer) for layer in found if layer >= 0}, keep(-1))
    logits = torch.cat(found.pop(-1), 1)
    return logits, [torch.cat(parts, 2) for parts in found.values()]


@pytest.mark.moderate
@pytest.mark.parametrize("kind", [*KINDS, *MAMBA2_KINDS])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=["fp64", "fp32"])
def test_pieces_give_the_numbers_of_one_pass(kind: str, dtype: torch.dtype, tolerance: float) -> None:
    model = made(kind, dtype)
    ids = torch.randint(7, 11, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole = model(ids, output_hidden_states=True)
    last = model.by_strand(model.norm_f(*_last_streams(model, ids))[0])
    for piece in (1, 13, 1000):
        logits, states = in_pieces(model, ids, piece)
        assert (logits - whole.logits).abs().max() <= tolerance * whole.logits.abs().max()
        for number, expected in enumerate([*whole.hidden_states[: model.config.n_layer], last]):
            error = (states[number] - expected).abs().max()
            assert error <= tolerance * expected.abs().max(), f"piece {piece}, layer {number}"


@torch.no_grad()
def _last_streams(model: CaduceusForMaskedLM, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    hidden, residual = model.embed(ids), None
    for block in model.blocks:
        hidden, residual = block(hidden, residual)
    return hidden, residual


def test_a_layer_that_is_not_there_is_refused() -> None:
    model = made("ph", torch.float32)
    with pytest.raises(ValueError, match="layers: the model has 0 to 2, got 4"):
        run_in_pieces(model, torch.full((1, 4), 7), 2, {4: lambda first, part: None})
    with pytest.raises(ValueError, match="piece: must be at least 1, got 0"):
        run_in_pieces(model, torch.full((1, 4), 7), 0, {})
