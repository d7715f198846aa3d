import math
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from caduceus import CaduceusConfig, CaduceusForMaskedLM
from caduceus.alphabet import CADUCEUS, IGNORE_LABEL
from caduceus.config import load_config
from caduceus.model.backbone import Backbone
from tests.model.reference import published_logits

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "model"
SMALL = {"d_model": 10, "n_layer": 2, "d_state": 3, "d_conv": 3}
COMPLEMENT = torch.from_numpy(CADUCEUS.complement(16))

configs = st.builds(
    CaduceusConfig,
    d_model=st.sampled_from([6, 17]),
    n_layer=st.integers(1, 3),
    d_state=st.integers(1, 4),
    d_conv=st.integers(1, 4),
    rcps=st.booleans(),
    fused_add_norm=st.booleans(),
    bidirectional=st.booleans(),
    bidirectional_strategy=st.sampled_from(["add", "ew_multiply"]),
    bidirectional_weight_tie=st.booleans(),
    rms_norm=st.booleans(),
)
lengths = st.integers(1, 8)


def with_mamba2(config: CaduceusConfig) -> CaduceusConfig:
    return CaduceusConfig(**{**vars(config), "mixer": "mamba2", "headdim": 2})


def build(config: CaduceusConfig, dtype: torch.dtype = torch.float64, **options) -> CaduceusForMaskedLM:
    """A model with every parameter off its initial value, so that no two channels, directions or layers agree."""
    torch.manual_seed(0)
    model = CaduceusForMaskedLM(config, **{"backend": "naive", **options})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        model.embedding.weight.mul_(3)
    return model.to(dtype)


def tokens(batch: int = 2, length: int = 13, seed: int = 1) -> Tensor:
    return torch.randint(0, 12, (batch, length), generator=torch.Generator().manual_seed(seed))


def labels_for(input_ids: Tensor, share: float = 0.4) -> Tensor:
    chosen = torch.rand(input_ids.shape, generator=torch.Generator().manual_seed(2)) < share
    bases = torch.randint(7, 11, input_ids.shape, generator=torch.Generator().manual_seed(3))
    return torch.where(chosen, bases, IGNORE_LABEL)


def gradients(model: CaduceusForMaskedLM) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return found


@pytest.mark.moderate
@settings(max_examples=25, deadline=None)
@given(config=configs, length=st.integers(1, 9))
def test_equals_the_published_computation_with_flips(config, length):
    model, input_ids = build(config), tokens(length=length)
    torch.testing.assert_close(model(input_ids).logits, published_logits(model, input_ids), rtol=1e-11, atol=1e-12)


@pytest.mark.moderate
@settings(max_examples=20, deadline=None)
@given(config=configs.map(lambda c: CaduceusConfig(**{**vars(c), "rcps": True})), length=st.integers(1, 11))
def test_reverse_complement_gives_the_reverse_complement(config, length):
    model, input_ids = build(config), tokens(length=length)
    output = model(input_ids, output_hidden_states=True)
    mirrored = model(COMPLEMENT[input_ids].flip(1), output_hidden_states=True)
    scale = output.logits.abs().max().item()
    torch.testing.assert_close(mirrored.logits, output.logits.flip(1)[..., COMPLEMENT], rtol=0, atol=1e-12 * scale)
    for ours, theirs in zip(output.hidden_states, mirrored.hidden_states, strict=True):
        assert ours.shape == (2, *input_ids.shape, config.d_model)
        # The strands change places, and positions run the other way; channels stay.
        torch.testing.assert_close(theirs, ours.flip(0, 2), rtol=1e-11, atol=1e-12)
    final = [model.by_strand(Backbone.forward(model, ids).held) for ids in (input_ids, COMPLEMENT[input_ids].flip(1))]
    torch.testing.assert_close(final[1], final[0].flip(0, 2), rtol=1e-11, atol=1e-12)


@pytest.mark.moderate
@settings(max_examples=20, deadline=None)
@given(config=configs | configs.map(with_mamba2), length=lengths, before=st.integers(0, 5), after=st.integers(0, 5))
def test_padding_changes_nothing_at_real_positions(config, length, before, after):
    model = build(config)
    input_ids = tokens(batch=1, length=length)
    labels = labels_for(input_ids, share=1.0)
    alone = model(input_ids, labels)
    alone.loss.backward()
    expected = gradients(model)

    real = slice(before, before + length)
    shape = (2, before + length + after)
    padded_ids, padded_labels = tokens(*shape, seed=5), torch.full(shape, IGNORE_LABEL)
    padded_ids[0, real], padded_labels[0, real] = input_ids[0], labels[0]
    pad_mask = torch.ones(shape, dtype=torch.bool)
    pad_mask[0, real] = False
    pad_mask[1, :1] = False
    padded = model(padded_ids, padded_labels, pad_mask=pad_mask)
    padded.loss.backward()

    torch.testing.assert_close(padded.logits[:1, real], alone.logits, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(padded.loss, alone.loss, rtol=1e-12, atol=0)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("return_logits", [True, False])
@pytest.mark.parametrize("labelled_with_weight_zero", [True, False])
def test_no_labelled_base_gives_zero_loss_and_zero_gradients(return_logits, labelled_with_weight_zero):
    model = build(CaduceusConfig(rcps=True, **SMALL), torch.float32)
    input_ids = torch.full((2, 9), CADUCEUS.pad)  # a window of N
    labels, weights = input_ids.clone(), torch.ones(2, 9)
    if labelled_with_weight_zero:
        labels[0, :3], weights[:] = 8, 0
    output = model(input_ids, labels, weights, return_logits=return_logits)
    output.loss.backward()
    assert output.loss.item() == 0 and not output.loss_sum.any() and not output.weight_sum.any()
    for name, gradient in gradients(model).items():
        assert torch.equal(gradient, torch.zeros_like(gradient)), name


@pytest.mark.parametrize("weighted", [True, False])
def test_loss_is_the_weighted_mean_over_labelled_bases(weighted):
    model, input_ids = build(CaduceusConfig(rcps=True, **SMALL)), tokens()
    labels = labels_for(input_ids)
    weights = torch.ones(labels.shape, dtype=torch.float64)
    if weighted:
        weights.uniform_()
    output = model(input_ids, labels, weights if weighted else None)
    log_probs, labelled = output.logits.log_softmax(-1), labels != IGNORE_LABEL
    cross_entropy = -log_probs.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    expected_sum = [row[use].sum() for row, use in zip(cross_entropy * weights, labelled, strict=True)]
    expected_weight = [row[use].sum() for row, use in zip(weights, labelled, strict=True)]
    torch.testing.assert_close(output.loss_sum, torch.stack(expected_sum))
    torch.testing.assert_close(output.weight_sum, torch.stack(expected_weight))
    torch.testing.assert_close(output.loss, sum(expected_sum) / sum(expected_weight))

    output.loss.backward()
    expected = gradients(model)
    lean = model(input_ids, labels, weights if weighted else None, return_logits=False)
    lean.loss.backward()
    torch.testing.assert_close(lean.loss, output.loss, rtol=1e-14, atol=0)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-11, atol=1e-14, msg=name)


@pytest.mark.parametrize("rcps", [True, False])
def test_checkpointed_blocks_give_the_same_gradients_bit_for_bit(rcps):
    model, input_ids = build(CaduceusConfig(rcps=rcps, **SMALL), torch.float32), tokens()
    labels, pad_mask = labels_for(input_ids), torch.zeros(input_ids.shape, dtype=torch.bool)
    pad_mask[0, -2:] = True
    results = []
    for blocks in range(len(model.blocks) + 1):
        model.recomputed_blocks = blocks
        output = model(input_ids, labels, pad_mask=pad_mask)
        output.loss.backward()
        results.append({"loss": output.loss.detach(), **gradients(model)})
    plain, *checkpointed = results
    assert len(checkpointed) == len(model.blocks)
    assert all(torch.equal(plain[name], other[name]) for other in checkpointed for name in plain)


@pytest.mark.parametrize("backend", ["naive", "cpu"])
@pytest.mark.parametrize("rcps", [True, False])
def test_bf16_autocast_stays_close_and_keeps_fp32_where_it_matters(rcps, backend):
    config = CaduceusConfig(rcps=rcps, **{**SMALL, "d_model": 32})
    model, input_ids = build(config, torch.float32, backend=backend), tokens()
    labels = labels_for(input_ids)
    exact = model(input_ids, labels)
    exact.loss.backward()
    expected = gradients(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(input_ids, labels)
    output.loss.backward()
    assert output.loss.dtype == output.logits.dtype == torch.float32
    # bf16 has 8 bits of mantissa; products of 32 terms through two blocks add a few of its roundings of 4e-3.
    scale = exact.logits.abs().max().item()
    torch.testing.assert_close(output.logits, exact.logits, rtol=0, atol=0.03 * scale)
    for name, gradient in gradients(model).items():
        assert gradient.dtype == torch.float32
        assert (gradient - expected[name]).norm() < 0.1 * expected[name].norm(), name


@pytest.mark.parametrize("recomputed_blocks", [0, 2])
@pytest.mark.parametrize("residual_in_fp32", [True, False])
def test_the_residual_is_summed_in_the_type_that_is_asked_for(residual_in_fp32, recomputed_blocks):
    config = CaduceusConfig(rcps=True, residual_in_fp32=residual_in_fp32, **{**SMALL, "d_model": 32})
    model, input_ids = build(config, torch.float32), tokens()
    model.recomputed_blocks = recomputed_blocks
    exact = model(input_ids).logits
    sums = []
    for norm in (*(block.norm for block in model.blocks), model.norm_f):
        norm.register_forward_pre_hook(
            lambda _, inputs: sums.append((inputs[0] if inputs[1] is None else inputs[1]).dtype)
        )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(input_ids).logits
    assert sums == [torch.float32 if residual_in_fp32 else torch.bfloat16] * (config.n_layer + 1)
    # As with the other roundings to bf16 in these two blocks.
    torch.testing.assert_close(logits, exact, rtol=0, atol=0.03 * exact.abs().max().item())


@pytest.mark.parametrize("residual_in_fp32", [True, False])
def test_bf16_parameters_run(residual_in_fp32):
    config = CaduceusConfig(rcps=True, residual_in_fp32=residual_in_fp32, **SMALL)
    model, input_ids = build(config), tokens()
    exact = model(input_ids).logits
    residuals = []
    model.norm_f.register_forward_pre_hook(lambda _, inputs: residuals.append(inputs[1].dtype))
    logits = model.to(torch.bfloat16)(input_ids).logits
    assert residuals == [torch.float32 if residual_in_fp32 else torch.bfloat16]
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), exact, rtol=0, atol=0.1 * exact.abs().max().item())


# Inductor takes minutes over the naive backend's unrolled time loop; there the traced graphs alone are run.
@pytest.mark.slow
@pytest.mark.parametrize(("backend", "compiler"), [("naive", "aot_eager"), ("cpu", "inductor")])
@pytest.mark.parametrize("layer", [0, 1])
def test_a_block_compiles_without_graph_breaks(layer, backend, compiler):
    model = build(CaduceusConfig(rcps=True, **SMALL), torch.float32, backend=backend)
    block = model.blocks[layer]
    inputs = torch.randn(2, 2, 2, 3, SMALL["d_model"])
    results = []
    for run in (block, torch.compile(block, fullgraph=True, backend=compiler)):
        hidden, residual = inputs.clone().requires_grad_()
        outputs = run(hidden, residual)
        loss = sum(output.square().sum() for output in outputs)
        results.append([*outputs, *torch.autograd.grad(loss, [hidden, residual, *block.parameters()])])
    for expected, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [
        ("1k-118", 470_702),
        ("1k", 1_934_592),
        ("32k", 3_864_832),
        ("131k", 7_725_312),
        ("1m", 7_725_312),
        ("tiny", 82_624),
    ],
)
@pytest.mark.parametrize("strands", ["ph", "ps"])
def test_presets_have_the_published_parameter_counts(strands, preset, parameters):
    config = load_config(CONFIGS / f"{strands}-{preset}.yaml").model
    assert config.rcps == (strands == "ps")
    assert count_parameters(config) == parameters


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        (CaduceusConfig(d_model=128, n_layer=4), 541_312),
        (CaduceusConfig(d_model=256, n_layer=16, bidirectional_weight_tie=False), 14_016_768),
    ],
)
def test_parameter_counts_without_a_preset(config, parameters):
    assert count_parameters(config) == parameters


def test_unidirectional_preset_has_the_published_parameter_count():
    assert count_parameters(load_config(CONFIGS / "mamba-131k.yaml").model) == 7_012_608


def count_parameters(config: CaduceusConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in CaduceusForMaskedLM(config).parameters())


def test_initialisation_is_the_published_one():
    config = CaduceusConfig(d_model=48, n_layer=4)
    model = CaduceusForMaskedLM(config)
    assert model.embedding.weight.std().item() == pytest.approx(0.02, rel=0.1)
    for block in model.blocks:
        mixer = block.mixer
        dt = torch.nn.functional.softplus(mixer.dt_bias)
        assert 1e-3 * (1 - 1e-3) <= dt.min() <= 2e-3 and 5e-2 <= dt.max() <= 1e-1 * (1 + 1e-3)
        assert abs(dt.log().mean().item() - math.log(1e-2)) < 0.4  # log-uniform between 1e-3 and 1e-1
        torch.testing.assert_close(mixer.A_log.exp(), torch.arange(1.0, 17).expand(2, 96, 16))
        assert torch.equal(mixer.D, torch.ones(2, 96)) and torch.equal(block.norm.weight, torch.ones(48))
        for parameter, bound in (
            (mixer.in_proj, 48**-0.5),
            (mixer.conv_weight, 4**-0.5),
            (mixer.conv_bias, 4**-0.5),
            (mixer.x_proj, 96**-0.5),
            (mixer.dt_proj, 3**-0.5),
            (mixer.out_proj, 96**-0.5 / 4**0.5),
        ):
            assert 0.9 * bound < parameter.abs().max() <= bound
            assert parameter.std().item() == pytest.approx(bound / 3**0.5, rel=0.15)


def test_initialisation_follows_the_seed_and_works_after_meta_construction():
    config = CaduceusConfig(rcps=True, **SMALL)
    torch.manual_seed(7)
    first = CaduceusForMaskedLM(config)
    torch.manual_seed(7)
    second = CaduceusForMaskedLM(config)
    with torch.device("meta"):
        third = CaduceusForMaskedLM(config)
    third.to_empty(device="cpu").init_weights(torch.Generator().manual_seed(7))
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]) and torch.equal(tensor, third.state_dict()[name]), name
    input_ids = tokens()
    for block in (*first.blocks, *third.blocks):
        block.mixer.backend = "naive"
    assert torch.equal(first(input_ids).logits, third(input_ids).logits)


@pytest.mark.parametrize("rms_norm", [True, False])
def test_weight_decay_spares_biases_norms_and_state_parameters(rms_norm):
    model = CaduceusForMaskedLM(CaduceusConfig(rms_norm=rms_norm, **SMALL))
    decayed, spared = model.parameter_groups(0.1)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    names = {id(p): re.sub(r"blocks\.\d+\.", "", name) for name, p in model.named_parameters()}
    decayed_names, spared_names = ({names[id(p)] for p in group["params"]} for group in (decayed, spared))
    assert decayed_names == {
        "embedding.weight",
        *(f"mixer.{name}" for name in ("in_proj", "conv_weight", "x_proj", "dt_proj", "out_proj")),
    }
    norms = {f"{module}.{part}" for module in ("norm", "norm_f") for part in ["weight", *["bias"] * (not rms_norm)]}
    assert spared_names == norms | {f"mixer.{name}" for name in ("conv_bias", "dt_bias", "A_log", "D")}
    assert sum(len(group["params"]) for group in (decayed, spared)) == len(list(model.parameters()))
