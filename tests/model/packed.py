"""Sequences packed into rows, with padding at a row's end, against each sequence by itself."""

import torch

from caduceus import CaduceusConfig, CaduceusForMaskedLM
from caduceus.alphabet import IGNORE_LABEL

KINDS = {
    "ph": {},
    "ph_layernorm": {"rms_norm": False},
    "ph_untied": {"bidirectional_weight_tie": False},
    "ph_multiply": {"bidirectional_strategy": "ew_multiply"},
    "mamba": {"bidirectional": False},
    "ps": {"rcps": True},
    "ps_unfused": {"rcps": True, "fused_add_norm": False},
    "ps_untied": {"rcps": True, "bidirectional_weight_tie": False},
    "ps_unidirectional": {"rcps": True, "bidirectional": False},
}
MAMBA2_KINDS = {
    f"mamba2_{kind}": {"mixer": "mamba2", "headdim": 4, **KINDS[kind]}
    for kind in ("ph", "ph_untied", "ph_multiply", "mamba", "ps", "ps_unfused", "ps_untied", "ps_unidirectional")
}
"""The same with Mamba-2's mixer, which is torch's on every backend."""

ROWS = ((5, 1, 4), (2, 11))
"""Lengths of the sequences in each row; the first row is padded to the length of the second."""


def check_packed_rows(
    kind: str, backend: str, dtype: torch.dtype, tolerance: float, n_layer: int, reference: str = "cpu"
) -> None:
    """Logits, losses and all gradients of packed rows are those of `reference`, in fp64, on each sequence alone."""
    config = CaduceusConfig(d_model=6, n_layer=n_layer, d_state=2, d_conv=3, **{**KINDS, **MAMBA2_KINDS}[kind])
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)
    apart = CaduceusForMaskedLM(config, backend=reference).double()
    model = CaduceusForMaskedLM(config, backend=backend).to(dtype)
    with torch.no_grad():
        for one, other in zip(apart.parameters(), model.parameters(), strict=True):
            one.add_(0.2 * torch.randn(one.shape, generator=generator)).copy_(one.float())
            other.copy_(one)
    shape = len(ROWS), max(map(sum, ROWS))
    # What stands at padding is arbitrary, and must not matter.
    input_ids = torch.randint(7, 11, shape, generator=generator)
    labels = torch.full(shape, IGNORE_LABEL)
    starts, pad_mask = torch.zeros(shape, dtype=torch.bool), torch.ones(shape, dtype=torch.bool)
    loss_sums, logits = [], {}
    for row, lengths in enumerate(ROWS):
        begin = 0
        loss_sums.append(0)
        for length in lengths:
            place = slice(begin, begin + length)
            labels[row, place] = torch.randint(7, 11, (length,), generator=generator)
            starts[row, begin], pad_mask[row, place] = True, False
            alone = apart(input_ids[row, None, place], labels[row, None, place])
            logits[row, begin] = alone.logits[0]
            loss_sums[row] = loss_sums[row] + alone.loss_sum
            begin += length
    sum(loss_sums).backward()
    starts[1, 0] = False  # the start of a row is one anyhow
    packed = model(input_ids, labels, pad_mask=pad_mask, starts=starts)
    packed.loss_sum.sum().backward()

    def close(found: torch.Tensor, expected: torch.Tensor, name: str) -> None:
        error = (found.double() - expected).abs().max() / expected.abs().max()
        assert error < tolerance, f"{name}: {error:.1e}"

    for (row, begin), expected in logits.items():
        close(packed.logits[row, begin : begin + len(expected)], expected, f"logits from {begin} in row {row}")
    close(packed.loss_sum, torch.cat(loss_sums).detach(), "loss")
    for (name, one), other in zip(apart.named_parameters(), model.parameters(), strict=True):
        close(other.grad, one.grad, name)
