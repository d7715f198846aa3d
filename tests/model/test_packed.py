import pytest
import torch

from caduceus import CaduceusConfig, CaduceusForMaskedLM
from tests.model.packed import KINDS, MAMBA2_KINDS, check_packed_rows


@pytest.mark.parametrize("backend", ["naive", "cpu"])
@pytest.mark.parametrize("kind", [*KINDS, *MAMBA2_KINDS])
def test_packed_rows_give_what_each_sequence_gives_alone(kind, backend):
    # Rounding of 1e-16, in sums of some hundred terms, through two layers.
    check_packed_rows(kind, backend, torch.float64, 1e-11, n_layer=2)


@pytest.mark.parametrize("kind", [*KINDS, *MAMBA2_KINDS])
def test_packed_rows_are_not_shared_between_ranks(kind):
    model = CaduceusForMaskedLM(
        CaduceusConfig(d_model=6, n_layer=1, **{**KINDS, **MAMBA2_KINDS}[kind]), backend="naive"
    )
    model.share_sequences(object())
    ids = torch.full((1, 4), 7)
    with pytest.raises(ValueError, match=r"^starts: packed sequences cannot be shared between ranks"):
        model(ids, starts=torch.zeros(1, 4, dtype=torch.bool))


def test_recomputed_blocks_keep_sequences_apart():
    torch.manual_seed(0)
    model = CaduceusForMaskedLM(CaduceusConfig(d_model=6, n_layer=2, d_state=2), backend="naive")
    ids, starts = torch.randint(7, 11, (1, 7)), torch.tensor([[True, False, False, True, False, True, False]])
    gradients = []
    for blocks in (0, 2):
        model.recomputed_blocks = blocks
        model(ids, ids, starts=starts).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
        model.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
