"""The scan's inputs made again in the backward pass: the same bits, one scan, and less that is kept."""

import gc
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from caduceus import CaduceusConfig, CaduceusForMaskedLM
from caduceus.train.memory import kept_storages

FORMS = {
    "ph": {},
    "ps": {"rcps": True},
    "ps_unfused": {"rcps": True, "fused_add_norm": False},
    "ps_multiply": {"rcps": True, "bidirectional_strategy": "ew_multiply"},
    "ph_untied": {"bidirectional_weight_tie": False},
    "unidirectional": {"bidirectional": False},
    "ps_unidirectional": {"rcps": True, "bidirectional": False},
    "mamba2_ps": {"rcps": True, "mixer": "mamba2", "headdim": 8},
    "mamba2_ph_untied": {"bidirectional_weight_tie": False, "mixer": "mamba2", "headdim": 8},
}
LAYERS = 2


def build(form: str, backend: str = "cpu") -> tuple[CaduceusForMaskedLM, Tensor]:
    torch.manual_seed(0)
    config = CaduceusConfig(d_model=8, n_layer=LAYERS, d_state=2, d_conv=3, **FORMS[form])
    return CaduceusForMaskedLM(config, backend=backend), torch.randint(7, 11, (2, 13))


def results(
    model: CaduceusForMaskedLM, input_ids: Tensor, scan_inputs: int, bf16: bool = False, **given
) -> list[Tensor]:
    """The loss and all gradients, of a pass that recomputes the inputs of `scan_inputs` scans."""
    model.recomputed_scan_inputs = scan_inputs
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = model(input_ids, input_ids, return_logits=False, **given).loss
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    return [loss.detach(), *gradients]


def same_bits(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_the_bits_are_the_same(form: str, bf16: bool) -> None:
    model, input_ids = build(form)
    pad_mask, starts = torch.zeros(2, *input_ids.shape, dtype=torch.bool)
    pad_mask[0, -2:] = True
    starts[0, 4] = starts[1, 1] = starts[1, 9] = True
    for given in ({}, {"pad_mask": pad_mask}, {"starts": starts}):
        plain = results(model, input_ids, 0, bf16, **given)
        for scan_inputs in range(1, LAYERS + 1):
            assert same_bits(results(model, input_ids, scan_inputs, bf16, **given), plain)


@pytest.mark.parametrize("form", ["ps", "ph_untied"])
def test_naive_gives_the_same_bits(form: str) -> None:
    model, input_ids = build(form, "naive")
    assert same_bits(results(model, input_ids, LAYERS), results(model, input_ids, 0))


def test_whole_blocks_come_first() -> None:
    model, input_ids = build("ps")
    plain = results(model, input_ids, 0)
    model.recomputed_blocks = 1
    for scan_inputs in range(LAYERS + 1):
        assert same_bits(results(model, input_ids, scan_inputs), plain)


class Calls(TorchDispatchMode):
    """Counts calls of operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.number: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.number[function.name()] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("whole", "scan_inputs"), [(0, 0), (0, 1), (0, 2), (1, 1), (2, 0), (2, 1)])
def test_the_scan_runs_again_only_in_whole_blocks(whole: int, scan_inputs: int) -> None:
    model, input_ids = build("ps")
    model.recomputed_blocks = whole
    with Calls() as calls:
        results(model, input_ids, scan_inputs)
    assert calls.number["caduceus::cpu_scan"] == LAYERS + whole
    assert calls.number["caduceus::cpu_conv"] == LAYERS + min(LAYERS, whole + scan_inputs)


@pytest.mark.parametrize("form", FORMS)
def test_nothing_that_feeds_the_scan_is_kept(form: str) -> None:
    """Not a byte is kept of u, dt, B, C and the low rank that dt comes from, by direction and position."""
    model, _ = build(form)
    config, shape = model.config, (len(model.streams), 2, 50, 8)
    hidden, residual = (torch.randn(shape, requires_grad=True) for _ in range(2))
    full, lean = (
        sum(storage.nbytes() for storage in kept_storages(model.blocks[0], hidden, residual, None, None, again))
        for again in (False, True)
    )
    positions = (2 if config.bidirectional else 1) * hidden.numel() // hidden.shape[-1]
    steps = 0 if config.mixer == "mamba2" else config.d_inner + config.dt_rank  # mamba2's come from the in projection
    fed = positions * (config.d_inner + steps + 2 * config.d_state) * hidden.element_size()
    assert full - lean == fed


def test_a_second_backward_pass_makes_them_once_more() -> None:
    model, input_ids = build("ph")
    model.recomputed_scan_inputs = LAYERS
    loss = model(input_ids, input_ids, return_logits=False).loss
    parameters = list(model.parameters())
    assert same_bits(*([*torch.autograd.grad(loss, parameters, retain_graph=True)] for _ in range(2)))


def test_evaluation_keeps_nothing() -> None:
    model, input_ids = build("ph")
    expected = model(input_ids).logits
    model.recomputed_scan_inputs = LAYERS
    with torch.no_grad():
        assert torch.equal(model(input_ids).logits, expected)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["ps", "ph_untied"])
def test_compiled_blocks_give_the_same_numbers(form: str) -> None:
    model, input_ids = build(form)
    plain = results(model, input_ids, 0)
    for block in model.blocks:
        block.compile(backend="aot_eager")
    for scan_inputs in range(LAYERS + 1):
        for compiled, expected in zip(results(model, input_ids, scan_inputs), plain, strict=True):
            # What is compiled adds up gradients in another order: a few roundings of fp32.
            torch.testing.assert_close(compiled, expected, rtol=0, atol=1e-6 * expected.abs().max().item())


def test_what_only_a_cycle_of_objects_holds_is_not_kept() -> None:
    class Cyclic(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor]:
            cycle: list[Any] = [x.detach() * 2]
            cycle.append(cycle)
            return (x.exp().sin(),)

    x = torch.ones(1000, requires_grad=True)
    gc.disable()
    try:
        assert [storage.nbytes() for storage in kept_storages(Cyclic(), x)] == [4000], "exp's result, for sin"
    finally:
        gc.enable()
