"""The published implementation's golden files, and training, through the Triton kernels."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from caduceus.config import CaduceusConfig
from caduceus.model.caduceus import CaduceusForMaskedLM
from caduceus.model.hub import from_published

GOLDEN = Path(__file__).resolve().parents[2] / "golden"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ph_tied", "ps_fused"])
def test_golden_logits(name):
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        config = json.loads(file.metadata()["config"])
    state = {key.removeprefix("state."): t for key, t in tensors.items() if key.startswith("state.")}
    model = from_published(config, state)
    for block in model.blocks:
        block.mixer.backend = "triton"
    with torch.no_grad():
        logits = model(tensors["input_ids"][:1]).logits
    expected = tensors["logits"][:1]
    # The published code's own rounding, in fp32, sums in another order.
    assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("autocast", [False, True])
def test_a_block_compiles_whole(autocast):
    """One graph, forward and backward, and the same bits as without: the ops are opaque to the compiler."""
    torch.manual_seed(0)
    model = CaduceusForMaskedLM(CaduceusConfig(d_model=8, n_layer=1, d_state=2), backend="triton")
    block, hidden = model.blocks[0], torch.randn(1, 1, 6, 8)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    results = []
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for run in (block, compiled):
            output = run(hidden)
            results.append([output, *torch.autograd.grad(output.float().sin().sum(), list(block.parameters()))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
