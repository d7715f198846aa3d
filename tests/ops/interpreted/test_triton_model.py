"""Training, packed rows and compiled blocks through the Triton kernels."""

import pytest
import torch

from caduceus import ops
from caduceus.alphabet import IGNORE_LABEL
from caduceus.config import CaduceusConfig
from caduceus.model.costs import kept_state_bytes
from caduceus.model.heads import CaduceusForMaskedLM
from caduceus.ops.triton import scan as triton_scan
from caduceus.ops.triton import scan_launches
from caduceus.train.memory import kept_storages
from tests.model.packed import check_packed_rows

GRADIENTS = 2e-5
"""Rounding of fp32 in sums of another order, relative to the largest value."""


@pytest.mark.slow
@pytest.mark.parametrize(("rcps", "layers", "steps"), [(False, 1, 16), (True, 2, 12)])
def test_training_has_the_losses_of_the_other_backend(rcps, layers, steps, monkeypatch, reference):
    monkeypatch.setattr(triton_scan, "chunk_length", lambda u: 8)  # the 10 positions of a row cross a chunk's border
    config = CaduceusConfig(d_model=8, n_layer=layers, d_state=2, rcps=rcps)
    losses = {backend: train(config, backend, steps) for backend in (reference, "triton")}
    # Rounding of 6e-8 grows with each step that follows it; a term that is missing or doubled shows at 1e-2.
    torch.testing.assert_close(losses["triton"], losses[reference], rtol=1e-4, atol=0)
    assert losses[reference][-4:].mean() < losses[reference][:4].mean() - 0.2


def train(config: CaduceusConfig, backend: str, steps: int) -> torch.Tensor:
    torch.manual_seed(0)
    model = CaduceusForMaskedLM(config, backend=backend)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(steps):
        generator = torch.Generator(torch.get_default_device()).manual_seed(step)
        # Every second base repeats the one before it, which a model can learn.
        bases = torch.randint(7, 11, (1, 5), generator=generator).repeat_interleave(2, 1)
        labels = torch.where(torch.rand(bases.shape, generator=generator) < 0.4, bases, IGNORE_LABEL)
        masked = torch.where(labels == bases, 3, bases)
        loss = model(masked, labels, return_logits=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["ph_layernorm", "ph_multiply", "ph_untied", "ps", "ps_unfused", "ps_unidirectional", "ps_untied"]
)
def test_packed_and_padded_rows_give_what_each_sequence_gives_alone(kind, monkeypatch, reference):
    monkeypatch.setattr(triton_scan, "chunk_length", lambda u: 8)  # rows have 13 positions, so cross a chunk's border
    check_packed_rows(kind, "triton", torch.float32, GRADIENTS, 1, reference)


@pytest.mark.slow
@pytest.mark.parametrize(("autocast", "lengths"), [(False, [6]), (True, [6, 9])])
def test_a_block_compiles_whole(autocast, lengths, device):
    """One graph, forward and backward, for any length, and the same bits as without: the compiler sees into no op."""
    torch.manual_seed(0)
    model = CaduceusForMaskedLM(CaduceusConfig(d_model=8, n_layer=1, d_state=2), backend="triton")
    block = model.blocks[0]
    compiled = torch.compile(block, fullgraph=True, dynamic=len(lengths) > 1, backend="aot_eager")
    for length in lengths:
        inputs, results = torch.randn(2, 1, 1, length, 8), []
        with (
            torch.autocast(device.type, torch.bfloat16, enabled=autocast),
            torch.compiler.set_stance("fail_on_recompile" if length != lengths[0] else "default"),
        ):
            for run in (block, compiled):
                hidden, residual = run(*inputs)
                loss = hidden.float().sin().sum() + residual.square().sum()
                results.append([hidden, residual, *torch.autograd.grad(loss, list(block.parameters()))])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.slow
def test_a_block_lowered_by_inductor_has_the_same_gradients(device):
    """Inductor's code checks the strides of what the ops give against those that it was told."""
    torch.manual_seed(0)
    model = CaduceusForMaskedLM(CaduceusConfig(d_model=8, n_layer=2, d_state=2, rcps=True), backend="triton")
    block, inputs, results = model.blocks[1], torch.randn(2, 2, 1, 6, 8), []
    with torch.autocast(device.type, torch.bfloat16):
        for run in (block, torch.compile(block, fullgraph=True, backend="inductor")):
            hidden, residual = inputs.clone().requires_grad_()
            outputs = run(hidden, residual)
            loss = sum(output.float().sin().sum() for output in outputs)
            results.append([*outputs, *torch.autograd.grad(loss, [hidden, residual, *block.parameters()])])
    for expected, lowered in zip(*results, strict=True):
        assert lowered.stride() == expected.stride()
        # It may round sums to 16 bits at other places.
        torch.testing.assert_close(lowered, expected, rtol=0, atol=2**-7 * expected.abs().max().item())


def test_what_is_recomputed_and_what_is_kept_change_no_bit(monkeypatch):
    monkeypatch.setattr(triton_scan, "chunk_length", lambda u: 8)
    torch.manual_seed(0)
    model = CaduceusForMaskedLM(CaduceusConfig(d_model=8, n_layer=1, d_state=2), backend="triton")
    input_ids, starts = torch.randint(7, 11, (1, 10)), torch.zeros(1, 10, dtype=torch.bool)
    starts[0, 6] = True
    results = []
    for model.recomputed_scan_inputs, kept in ((0, 0), (1, 0), (0, 1), (1, 1)):
        model.keep_states(kept)
        loss = model(input_ids, input_ids, starts=starts, return_logits=False).loss
        results.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    assert all(torch.equal(found, results[0][i]) for result in results[1:] for i, found in enumerate(result))


@pytest.mark.parametrize("keys", [{}, {"bidirectional_strategy": "ew_multiply"}, {"bidirectional": False}])
def test_what_is_kept_has_the_bytes_that_are_told(monkeypatch, keys):
    monkeypatch.setattr(triton_scan, "chunk_length", lambda u: 8)
    config = CaduceusConfig(d_model=8, n_layer=1, d_state=8, **keys)
    model = CaduceusForMaskedLM(config, backend="triton")
    hidden = torch.randn(1, 1, 16, 8, requires_grad=True)
    kept = []
    for blocks in (0, 1):
        model.keep_states(blocks)
        kept.append(sum(storage.nbytes() for storage in kept_storages(model.blocks[0], hidden)))
    assert kept[1] - kept[0] == 16 * kept_state_bytes(config, scan_launches.PIECE)


@pytest.mark.slow
def test_the_last_norm_and_the_loss_compile_whole():
    def loss(hidden, residual, norm, head, labels):
        normed, _ = ops.add_norm(hidden, residual, norm, eps=1e-5, backend="triton")
        return ops.head_cross_entropy(normed, head, labels, ignore_label=IGNORE_LABEL, backend="triton")

    torch.manual_seed(0)
    tensors = [torch.randn(s, requires_grad=True) for s in ((2, 1, 9, 8), (2, 1, 9, 8), (2, 8), (2, 16, 8))]
    labels = torch.tensor([[7, -100, -100, 8, 9, -100, 10, 7, -100]])
    results = []
    for run in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        loss_sum, weight_sum = run(*tensors, labels)
        results.append([loss_sum, weight_sum, *torch.autograd.grad(loss_sum, tensors)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
